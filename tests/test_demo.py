"""neobert.demo, on a tiny model: the checkpoint it writes, and the table it prints."""

import re

import pytest

from neobert import demo
from neobert.config import NeoBERTConfig
from neobert.encode import Encoder
from tests.tiny import texts

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = NeoBERTConfig(
    vocab_size=1000,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=192,
)


def test_spread_keeps_the_lengths():
    lengths = list(range(1, 1001))
    names = [str(length) for length in lengths]
    chosen = [int(name) for name in demo.spread(names, lengths, 20_000)]
    assert len(set(chosen)) == len(chosen) == 40
    assert abs(sum(chosen) - 20_000) < 200
    assert max(chosen) > 950 and min(chosen) < 50 and chosen != sorted(chosen)
    assert sorted(demo.spread(names, lengths, 10**9)) == sorted(names)


def test_demo_from_texts_to_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "standard_library_docstrings", texts)
    monkeypatch.setattr(demo, "NeoBERTConfig", lambda: TINY)
    monkeypatch.setattr(demo, "WARM_UP_TOKENS", 200)
    demo.main(["--seconds", "0.1"])
    shown = capsys.readouterr().out
    rows = re.findall(
        r"(plain, 32|plain, one|neobert\.Encoder).* ([\d.]+)x +(\d+)% +(\S+)\n", shown
    )
    assert [row[0] for row in rows[:3]] == ["plain, 32", "plain, one", "neobert.Encoder"]
    assert rows[0][3] == "reference" and int(rows[0][2]) > 0
    assert [row[2] for row in rows[1:3]] == ["0", "0"]
    assert all(0 < float(row[3]) < 1e-5 for row in rows[1:3]), shown
    assert all(0 < float(row[3]) < 0.05 for row in rows[3:]), shown


def test_demo_takes_a_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "standard_library_docstrings", texts)
    monkeypatch.setattr(demo, "WARM_UP_TOKENS", 200)
    demo.write_checkpoint(tmp_path, texts(), TINY)
    capsys.readouterr()
    demo.main(["--seconds", "0.1", "--model", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "random" not in shown and "neobert.Encoder" in shown
    encoder = Encoder.from_pretrained(str(tmp_path), device="cpu")
    assert encoder.max_length == 4096 and encoder.tokenizer.model_max_length == 4096
