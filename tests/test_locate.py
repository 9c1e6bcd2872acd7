"""What a model may be named by: a checkpoint, a run for its newest one, a hub repository."""

import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from neobert.encode import Encoder
from neobert.locate import locate
from neobert.mteb import MTEBEncoder
from neobert.perplexity import Scorer
from neobert.search import Index
from tests.test_cli import run
from tests.tiny import write_tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread", "hub_offline")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The output of a run with two checkpoints, of other weights each."""
    output = tmp_path_factory.mktemp("runs") / "mine"
    first, last = (output / "checkpoints" / f"step-{step:08}" for step in (90, 1000))
    first.mkdir(parents=True)
    write_tiny_checkpoint(first)
    shutil.copytree(first, last)
    weights = load_file(last / "model.safetensors")
    changed = {name: weight.flip(0).contiguous() for name, weight in weights.items()}
    save_file(changed, last / "model.safetensors", metadata={"format": "pt"})
    (output / "checkpoints" / ".step-00002000.unfinished").mkdir()
    return output


def test_a_run_stands_for_its_newest_checkpoint(trained):
    last = trained / "checkpoints" / "step-00001000"
    assert locate(trained) == locate(str(trained)) == locate(last) == last
    assert locate("chandar-lab/NeoBERT") == "chandar-lab/NeoBERT"
    assert locate(last.parent, last.name) == last.parent  # subfolder, of transformers


def test_a_run_is_loaded_as_its_newest_checkpoint(trained, tmp_path):
    last = trained / "checkpoints" / "step-00001000"
    expected = Encoder.from_pretrained(last, "cpu").encode("a text", normalize=True)
    other = Encoder.from_pretrained(last.with_name("step-00000090"), "cpu")
    assert np.abs(other.encode("a text", normalize=True) - expected).max() > 1e-2
    found = Encoder.from_pretrained(trained, "cpu").encode("a text", normalize=True)
    np.testing.assert_array_equal(found, expected)

    texts = ["some words of a text"]
    scores = [
        next(scorer(scorer.documents(texts, "x")[0])).loss
        for scorer in (Scorer.from_pretrained(each, "cpu") for each in (trained, last))
    ]
    assert scores[0] == scores[1]

    metas = [MTEBEncoder(str(each), device="cpu").mteb_model_meta for each in (trained, last)]
    assert metas[0].name == "local/mine" and metas[0].revision == metas[1].revision

    (tmp_path / "texts.txt").write_text("a text\n")
    code, said = run("index", "--model", trained, "--input", tmp_path / "texts.txt", "--output",
                     tmp_path / "index", "--device", "cpu")  # fmt: skip
    assert code == 0, said
    index = Index.load(tmp_path / "index", device="cpu")
    assert index.settings.model == str(last)  # the one that its vectors are of, however it goes on
    np.testing.assert_allclose(index.embeddings[0], expected, atol=1e-6)


def test_a_folder_without_a_model_is_refused(trained, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "finished" / "model").mkdir(parents=True)
    (tmp_path / "finished" / "model" / "config.json").write_text("{}")
    for load in (locate, Encoder.from_pretrained, Scorer.from_pretrained):
        with pytest.raises(ValueError, match=r"empty holds no model: neither a config\.json nor"):
            load(tmp_path / "empty")
        with pytest.raises(ValueError, match=r"there is one in .*finished/model$"):
            load(tmp_path / "finished")
        with pytest.raises(ValueError, match="'nowhere' is neither a directory nor a hub repo"):
            load("nowhere")
    with pytest.raises(ValueError, match=r"mine/absent holds no model"):
        locate(trained.parent, "mine/absent")
