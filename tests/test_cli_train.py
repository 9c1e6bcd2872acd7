"""`neobert prepare` and `neobert pretrain`, as a user runs them."""

import pytest
import yaml
from typer.testing import CliRunner

from neobert.cli import app
from neobert.locate import checkpoints
from neobert.recipes import load_config
from neobert.shards import TokenShards
from tests.checkpoints import word_tokenizer
from tests.runs import SETTINGS, write_texts

pytestmark = [
    pytest.mark.no_poison,
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path / "texts.jsonl")


@pytest.fixture
def tokenizer(tmp_path):
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def invoke(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def prepare(texts, tokenizer, output, *more):
    return invoke("prepare", "--data", texts, "--tokenizer", tokenizer, "--output", output, *more)


def test_prepare_then_pretrain(tmp_path, texts, tokenizer):
    code, said = prepare(texts, tokenizer, tmp_path / "shards", "--shard-tokens", 1000, "--check")
    assert code == 0, said
    shards = TokenShards(tmp_path / "shards")
    assert f"{len(shards)} documents, {shards.num_tokens:,} tokens of uint16" in said
    assert len(shards) == 300 and len(shards.shards) > 2
    small = [f"{key}={value}" for key, value in SETTINGS.items()]
    command = ["pretrain", "--preset", "tiny", "--data", tmp_path / "shards", "--output",
               tmp_path / "run", *small]  # fmt: skip
    code, said = invoke(*command, "steps=2")
    assert code == 0, said
    (checkpoint,) = checkpoints(tmp_path / "run")
    assert "step 2: loss 5." in said.splitlines()[-1] and str(checkpoint) in said
    code, said = invoke(*command, "steps=4")  # goes on
    assert code == 0 and "step 3 " in said and "step 1 " not in said, said
    code, said = invoke(*command, "steps=4", "seed=1")
    assert code == 1 and "seed was 0 and is 1" in said and "Traceback" not in said


def test_show_prints_what_config_reads(tmp_path):
    two = ["--data", "a.txt", "--data", "b.txt"]
    code, said = invoke("pretrain", "--preset", "tiny", *two, "--show", "lr=0.5")
    assert code == 0, said
    (tmp_path / "shown.yaml").write_text(said)
    config = load_config(None, tmp_path / "shown.yaml")
    assert [source.path for source in config.data] == ["a.txt", "b.txt"]
    assert config.lr == yaml.safe_load(said)["lr"] == 0.5
    code, again = invoke("pretrain", "--config", tmp_path / "shown.yaml", "--show")
    assert again == said


@pytest.mark.parametrize("arguments, error", [
    (["--preset", "tny"], "there is no preset 'tny'; did you mean 'tiny'?"),
    (["--preset", "tiny", "--output", "x", "stepps=3"], "Did you mean one of: 'steps'"),
    ([], "missing mandatory value: output"),
    (["--preset", "tiny", "--output", "x", "--data", "missing.txt"], "'missing.txt' is neither"),
])  # fmt: skip
def test_errors_of_pretrain(tmp_path, monkeypatch, arguments, error):
    monkeypatch.chdir(tmp_path)
    code, said = invoke("pretrain", *arguments)
    assert code == 1 and said.startswith("Error: ") and error in said, said


def test_errors_of_prepare(tmp_path, texts, tokenizer):
    code, said = prepare(tmp_path / "missing.txt", tokenizer, tmp_path / "shards")
    assert code == 1 and "missing.txt' is neither a file" in said
    code, said = prepare(texts, tokenizer, tmp_path / "shards", "--field", "body")
    assert code == 1 and "has no field 'body'; it has 'text'" in said
    assert not (tmp_path / "shards").exists()
    assert prepare(texts, tokenizer, tmp_path / "shards")[0] == 0
    path = tmp_path / "shards" / "00000.tokens"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    code, said = prepare(texts, tokenizer, tmp_path / "shards", "--check")
    assert code == 1 and "00000.tokens: its checksum is wrong" in said


@pytest.mark.parametrize("name", ["a, b", "a: b #c", "[a", "it's \u00e9\U0001f600", "12", "null"])
def test_options_are_taken_as_they_are_typed(tmp_path, name):
    code, said = invoke("pretrain", "--preset", "tiny", "--data", f"{name}.txt", "--data", "x.txt",
                        "--output", name, "--show")  # fmt: skip
    assert code == 0, said
    (tmp_path / "shown.yaml").write_text(said)
    config = load_config(None, tmp_path / "shown.yaml")
    assert config.output == name and [each.path for each in config.data] == [f"{name}.txt", "x.txt"]
