"""Bad input to the trainer: an error that names it, and the last good checkpoint intact."""

import dataclasses
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from neobert.corpus import Source, open_texts, text_batches
from neobert.locate import checkpoints
from neobert.pretrain import pretrain
from neobert.saving import SaveError
from neobert.shards import CorruptShardError, prepare
from tests.checkpoints import word_tokenizer
from tests.runs import settings, write_texts

pytestmark = [pytest.mark.no_poison, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.jsonl")


@pytest.fixture(scope="module")
def three_steps(texts, tmp_path_factory):
    """The configuration and the checkpoint of a run of three steps."""
    config = settings(texts, tmp_path_factory.mktemp("runs") / "run", steps=3)
    return config, pretrain(config).checkpoint


@pytest.fixture
def begun(three_steps, tmp_path):
    """A copy of that run to go wrong with."""
    config, checkpoint = three_steps
    shutil.copytree(checkpoint.parent.parent, tmp_path / "run")
    return dataclasses.replace(config, output=str(tmp_path / "run"), steps=6)


def test_an_empty_data_set(tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match=r"empty.jsonl has no documents"):
        pretrain(settings(path, tmp_path / "run"))


def test_a_field_that_is_not_there(texts, tmp_path):
    config = settings(texts, tmp_path / "run", data=f"[{{path: {texts}, field: content}}]")
    with pytest.raises(ValueError, match=r"has no field 'content'; it has 'text'"):
        pretrain(config)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing.jsonl' is neither a file"):
        pretrain(settings(tmp_path / "missing.jsonl", tmp_path / "run"))


def test_a_corrupt_shard(texts, tmp_path):
    data = open_texts(Source(str(texts)))
    prepare(
        tmp_path / "shards",
        lambda position: text_batches(data, "text", position),
        word_tokenizer(),
        {"path": "texts"},
    )
    tokens = tmp_path / "shards" / "00000.tokens"
    config = settings(tmp_path / "shards", tmp_path / "run")
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-100])
    with pytest.raises(CorruptShardError, match=r"00000.tokens has .* bytes; shards.json says"):
        pretrain(config)
    tokens.write_bytes(b"\xff" * len(whole))  # of the right length: seen when it is read
    with pytest.raises(CorruptShardError, match=r"00000.tokens: .* beyond the vocabulary"):
        pretrain(config)
    assert not checkpoints(tmp_path / "run")


def test_a_checkpoint_of_another_architecture(texts, tmp_path, three_steps):
    config = settings(texts, tmp_path / "run", start_from=three_steps[1], model__hidden_size=128,
                      model__num_hidden_layers=3)  # fmt: skip
    error = r"another architecture: hidden_size is 64 there and 128 here; num_hidden_layers is 2"
    with pytest.raises(ValueError, match=error):
        pretrain(config)


def test_a_run_that_is_continued_with_other_settings(begun):
    changed = dataclasses.replace(begun, seed=1, lr=1.0)
    with pytest.raises(ValueError, match=r"another configuration: seed was 0 and is 1; lr was"):
        pretrain(changed)
    allowed = dataclasses.replace(begun, micro_batch_bins=4, log_every=2)
    assert pretrain(allowed).step == 6


def test_held_out_documents_of_which_nothing_is_masked(texts, tmp_path):
    config = settings(texts, tmp_path / "run", mask_rate=1e-6)
    error = r"validation_documents=10: none of their \d+ tokens is masked at mask_rate=1e-06; hold"
    with pytest.raises(ValueError, match=error):
        pretrain(config)
    assert pretrain(dataclasses.replace(config, validation_documents=0, steps=1)).step == 1


def test_a_tokenizer_beyond_the_vocabulary(texts, tmp_path):
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    config = settings(texts, tmp_path / "run", tokenizer=tmp_path / "tokenizer",
                      model__vocab_size=10)  # fmt: skip
    with pytest.raises(
        ValueError, match=r"model.vocab_size=10 is less than the tokenizer's \d+ ids"
    ):
        pretrain(config)


def test_bins_that_do_not_divide(texts, tmp_path):
    config = settings(texts, tmp_path / "run", micro_batch_bins=3)
    with pytest.raises(
        ValueError, match=r"batch_bins=8 must be a multiple of 1 process\(es\) times"
    ):
        pretrain(config)


def test_a_full_disk(begun):
    """The system refuses to write: files may not grow beyond 100 kB, as on a full disk."""
    (good,) = checkpoints(Path(begun.output))
    before = {path.name: path.read_bytes() for path in good.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SaveError, match=f"the last good checkpoint is .*{good.name}"):
            pretrain(begun)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoints(Path(begun.output)) == [good]
    assert {path.name: path.read_bytes() for path in good.iterdir()} == before
    assert not list(good.parent.glob(".*")), "what was begun is removed"
    assert pretrain(begun).step == 6  # there is room again
    (end,) = checkpoints(Path(begun.output))[-1:]
    assert all(torch.isfinite(t).all() for t in load_file(end / "model.safetensors").values())
