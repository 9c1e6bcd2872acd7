"""neobert.demo, on tiny models: the table it prints, and the search it trains for."""

import json
import re
from pathlib import Path

import pytest
import torch

import neobert
from neobert import demo, demo_search, demo_speed
from neobert.config import NeoBERTConfig
from neobert.docstrings import documented, is_held_out
from neobert.encode import Encoder
from neobert.search import Index
from tests.tiny import texts

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison]

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
    chosen = [int(name) for name in demo_speed.spread(names, lengths, 20_000)]
    assert len(set(chosen)) == len(chosen) == 40
    assert abs(sum(chosen) - 20_000) < 200
    assert max(chosen) > 950 and min(chosen) < 50 and chosen != sorted(chosen)
    assert sorted(demo_speed.spread(names, lengths, 10**9)) == sorted(names)


def test_demo_from_texts_to_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "standard_library_docstrings", texts)
    monkeypatch.setattr(demo_speed, "NeoBERTConfig", lambda: TINY)
    monkeypatch.setattr(demo_speed, "WARM_UP_TOKENS", 200)
    demo.speed(None, 0.1)
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
    monkeypatch.setattr(demo_speed, "WARM_UP_TOKENS", 200)
    demo_speed.write_checkpoint(tmp_path, texts(), TINY)
    capsys.readouterr()
    demo.main(["--seconds", "0.1", "--model", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "random" not in shown and "neobert.Encoder" in shown
    encoder = Encoder.from_pretrained(str(tmp_path), device="cpu")
    assert encoder.max_length == 4096 and encoder.tokenizer.model_max_length == 4096


def few_names() -> dict[str, str]:
    """Of this package: some tens of them are held out."""
    return dict(documented(Path(neobert.__file__).parent))


def test_summary_pairs_need_a_summary_and_a_rest():
    whole = "Write rows to a file.\n\nThe file is closed\nat the end."
    pairs = demo_search.summary_pairs([whole, "One paragraph alone.", "Two words.\n\n" + whole])
    assert pairs == [
        {"query": "Write rows to a file.", "positive": "The file is closed\nat the end."}
    ]


def test_demo_trains_measures_and_leaves_an_index(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_search, "standard_library_names", few_names)
    shape = ("model.vocab_size=600", "model.hidden_size=64", "model.num_hidden_layers=2",
             "model.num_attention_heads=1", "model.intermediate_size=96")  # fmt: skip
    rest = ("save_every=3", "log_every=3", "tensorboard=false")
    pretrain = (*shape, "steps=3", "validate_every=3", "validation_documents=10", *rest)
    monkeypatch.setattr(demo_search, "PRETRAIN", pretrain)
    monkeypatch.setattr(demo_search, "CONTRASTIVE", ("steps=4", "batch_size=16", *rest))
    tmp_path = tmp_path / "one, two: three #4"  # a folder's name is not YAML
    found = demo_search.demonstrate_search(tmp_path)
    shown = capsys.readouterr().out

    names = few_names()
    held_out = {name: text for name, text in names.items() if is_held_out(name)}
    assert 10 < len(held_out) < len(names) / 4
    for file in ("texts", "names", "summaries"):
        lines = [json.loads(line) for line in open(tmp_path / f"{file}.jsonl")]
        trained = {value for line in lines for value in line.values()}
        assert lines and not trained & set(held_out.values()), file
        assert not {text.split(" ")[0] for text in trained} & set(held_out), file

    for method, recall in found.items():
        assert 0 <= recall <= 1 and re.search(rf"{re.escape(method)} +{recall * 100:.1f}%", shown)
    assert len(found) == 3
    written = json.loads((tmp_path / "recall.json").read_text())
    assert written["held_out_names"] == len(held_out)
    assert written["recall_at_10"] == {name: round(recall, 4) for name, recall in found.items()}
    assert all(seconds > 0 for seconds in written["training_seconds"].values())
    index = Index.load(tmp_path / "index")
    assert len(index.records) == len(names)
    assert f"neobert search --index {tmp_path / 'index'}" in shown
    # The trained model's figure is that of the model left on disk.
    scores = demo_search.cosines(
        index.encoder, [demo_search.as_query(name) for name in held_out], list(held_out.values())
    )
    own = scores.diagonal()[:, None]
    expected = ((scores >= own).sum(1) <= demo_search.K).double().mean()
    assert found["this NeoBERT, trained just now"] == pytest.approx(expected.item())

    before = index.encoder.model.layer_norm.weight.clone()
    demo_search.demonstrate_search(tmp_path)
    assert "is there already" in capsys.readouterr().out
    assert torch.equal(Index.load(tmp_path / "index").encoder.model.layer_norm.weight, before)
