"""What MTEB's texts are given in front: the paper's instructions, a sentence-transformers folder's
prompts; and its pooling."""

import json

import mteb
import numpy as np
import pytest
from mteb.mocks import MockRetrievalTask
from mteb.models import SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer

from neobert import instructions
from neobert.mteb import BENCHMARK, MTEBEncoder
from neobert.pairs import PairSource, prompts_of
from neobert.sentence_folder import SentenceFolder, read_sentence_folder
from tests import tiny
from tests.mteb_data import RETRIEVAL, STS, encode

pytestmark = [
    pytest.mark.usefixtures("one_thread", "hub_offline"),
    pytest.mark.no_poison,  # mteb's classifiers and k-means are not ours to make deterministic
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(checkpoint):
    return MTEBEncoder(str(checkpoint), device="cpu", max_tokens=512)


def test_every_task_of_the_benchmark_has_its_instruction():
    tasks = mteb.get_benchmark(BENCHMARK).tasks
    names = {task.metadata.name for task in tasks}
    forums = {part.metadata.name for task in tasks for part in getattr(task, "tasks", [])}
    assert len(names) == 56 and len(forums) == 12
    assert set(instructions.TASKS) == names | forums
    assert all(text.endswith(".") for text in instructions.TASKS.values())
    types = {task.metadata.type for task in tasks} | {"BitextMining"}
    assert types <= set(instructions.TYPES)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("SICK-R", "Retrieve semantically similar text. "),
        ("STS22", "Retrieve semantically similar text. "),
        ("BiorxivClusteringS2S", "Identify the main and secondary category of Biorxiv papers based "
         "on their titles. "),
        ("StackExchangeClustering", "Identify the topic or theme of StackExchange posts based on "
         "their titles. "),
        ("SciFact", "Given a scientific claim, retrieve documents that support or refute the "
         "claim . "),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prompt_type", [None, *PromptType])
def test_the_papers_instruction(model, name, expected, prompt_type):
    assert model.prompt(mteb.get_task(name).metadata, prompt_type) == expected


def test_a_task_beyond_the_paper_has_its_types_instruction(model):
    assert model.prompt(RETRIEVAL, PromptType.query) == "Given a query, retrieve relevant texts. "


@pytest.fixture(scope="module")
def sentence_folder(checkpoint, tmp_path_factory):
    """save(prompts, **changes to the pooling) → a folder saved by sentence-transformers."""

    def save(prompts, pooling="mean", **more):
        folder = tmp_path_factory.mktemp("sentences")
        saved = SentenceTransformer(str(checkpoint), device="cpu")
        saved[1].pooling_mode = pooling
        saved.prompts = prompts
        for key, value in more.items():
            setattr(saved, key, value)
        saved.save(str(folder))
        return folder

    return save


@pytest.mark.parametrize("prompts, expected", [
    ({"STS": "alike: ", "query": "q: "}, ["alike: ", "q: ", ""]),
    ({"document": "d: "}, ["", "", "d: "]),
    ({"query": "", "document": ""}, "the paper's"),  # as sentence-transformers writes by itself
    (prompts_of([PairSource("pairs.csv")]), ["", "", ""]),  # trained here without instructions
    (prompts_of([PairSource("a.csv", symmetric=True), PairSource("b.csv")]), ["", "", ""]),
    (prompts_of([PairSource("pairs.csv", instruction="Find")]), ["", "Find ", ""]),
    ({"ALLNLI": "of a data set: "}, "the paper's"),
    ({"ALLNLI": "of a data set: ", "document": ""},
     ["Retrieve semantically similar text. ", "Given a query, retrieve relevant texts. ", ""]),
    ({MockRetrievalTask().metadata.name: "own: "}, ["Retrieve semantically similar text. ", "own: ",
                                                    "own: "]),
])  # fmt: skip
def test_a_folders_own_prompts_come_first(sentence_folder, prompts, expected):
    model = MTEBEncoder(str(sentence_folder(prompts)), device="cpu")
    asked = [(STS, None), (RETRIEVAL, PromptType.query), (RETRIEVAL, PromptType.document)]
    if expected == "the paper's":
        expected = [instructions.prompt(task.name, task.type) for task, _ in asked]
    assert [model.prompt(*each) for each in asked] == expected
    bare = MTEBEncoder(str(sentence_folder(prompts)), device="cpu", instructions=False)
    assert [bare.prompt(*each) for each in asked] == ["", "", ""]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_same_vectors_as_sentence_transformers(sentence_folder, pooling):
    folder = str(sentence_folder({"query": "q: ", "document": "d: "}, pooling))
    ours = MTEBEncoder(folder, device="cpu")
    theirs = SentenceTransformerEncoderWrapper(folder, device="cpu")
    texts = [text[:200] for text in tiny.texts()[:20]]
    for prompt_type in PromptType:
        a, b = (encode(each, texts, RETRIEVAL, prompt_type) for each in (ours, theirs))
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_what_a_sentence_folder_says(sentence_folder, checkpoint, tmp_path):
    assert read_sentence_folder(checkpoint) == SentenceFolder()
    folder = sentence_folder({"a": "A "}, default_prompt_name="a", max_seq_length=50)
    read = read_sentence_folder(folder)
    assert (read.pooling, read.default_prompt, read.normalize) == ("mean", "A ", False)
    assert read.max_length == SentenceTransformer(str(folder), device="cpu").max_seq_length == 50
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(
        json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 40}')
    assert read_sentence_folder(folder).pooling == "cls"
    model = MTEBEncoder(str(folder), device="cpu")
    assert model.encoder.max_length == 40 and model.mteb_model_meta.experiment_kwargs is None
    for config, error in [
        ({"pooling_mode": "weightedmean"}, "pools by weightedmean"),
        ({"pooling_mode": "mean", "include_prompt": False}, "has prompts and pools without"),
    ]:
        pooling.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=error):
            read_sentence_folder(folder)
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="Transformer, Pooling, Dense in"):
        read_sentence_folder(folder)
