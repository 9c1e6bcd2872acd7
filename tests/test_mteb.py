"""MTEB through mteb itself, on a tiny model and data made on the spot, without a network."""

import json
import math

import mteb
import numpy as np
import pytest
import torch
from mteb.mocks import ALL_MOCK_TASK_TEST_GRID
from mteb.models.models_protocols import EncoderProtocol
from scipy.stats import pearsonr, spearmanr

from neobert import instructions
from neobert.checkpoint import write_random_checkpoint
from neobert.mteb import BENCHMARK, EvaluationError, MTEBEncoder, evaluate, select_tasks
from tests import tiny
from tests.mteb_data import cosines, encode, hub_folder, write_sts
from tests.test_cli import run

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


# The model


def test_every_text_task_of_mteb_runs(model):
    assert isinstance(model, EncoderProtocol)
    results = mteb.mock_run(model)
    of_text = [t for t in ALL_MOCK_TASK_TEST_GRID if t.metadata.modalities == ["text"]]
    ran = {name for name, status in results.items() if status is not None}
    assert results.all_passed and ran == {task.metadata.name for task in of_text}
    assert len(ran) >= 28


def test_texts_are_packed_across_the_batches_of_mteb(model):
    texts = tiny.texts()[:101]
    vectors = encode(model, texts, show_progress_bar=False)
    stats = model.encoder.stats
    # 51 batches of mteb's; ours are of 512 tokens, nearly full.
    assert stats.texts == 101 and stats.batches <= math.ceil(stats.tokens / 512 * 1.2) < 30
    assert vectors.shape == (101, tiny.HIDDEN_SIZE) and vectors.dtype == np.float32
    prompt = "Retrieve semantically similar text. "
    np.testing.assert_array_equal(vectors, model.encoder.encode(texts, prompt=prompt))
    assert np.abs(vectors - model.encoder.encode(texts)).max() > 0.01


def test_similarity_is_the_cosine(model):
    a, b = torch.randn(2, 5, 8).numpy()
    np.testing.assert_allclose(model.similarity_pairwise(a, b), cosines(a, b), atol=1e-6)
    np.testing.assert_allclose(model.similarity(a, b).diagonal(), cosines(a, b), atol=1e-6)


def test_totals_count_every_call(checkpoint):
    model = MTEBEncoder(str(checkpoint), device="cpu", instructions=False)
    encode(model, ["a text", "another"])
    encode(model, ["word " * 500, " "])
    assert (model.totals.texts, model.totals.truncated, model.totals.batches) == (4, 1, 2)
    assert model.empty_texts == 1
    assert model.totals.tokens > tiny.MAX_LENGTH and model.totals.seconds > 0


def test_an_embedding_that_is_not_finite_stops_with_its_text(checkpoint, tmp_path):
    model = MTEBEncoder(str(checkpoint), device="cpu", instructions=False)
    columns = write_sts(tmp_path / "sts.jsonl")
    cut = {"truncation": True, "max_length": model.encoder.max_length}
    ids = [set(model.encoder.tokenizer(text, **cut)["input_ids"]) for text in columns[0]]
    index = next(i for i in range(10, len(ids)) if ids[i] - set().union(*ids[:i]))
    bad = (ids[index] - set().union(*ids[:index])).pop()
    with torch.no_grad():
        model.encoder.model.get_input_embeddings().weight[bad] = torch.nan
    tasks = select_tasks([str(tmp_path / "sts.jsonl")])
    with pytest.raises(EvaluationError, match=rf"^sts-\w+: .*of text {index} of sts.* not finite"):
        list(evaluate(model, tasks, tmp_path / "out"))
    assert not list(tmp_path.rglob("sts-*.json"))
    with pytest.raises(ValueError, match="precision must be float32, got 'int8'"):
        encode(model, ["a text"], precision="int8")


def test_a_score_that_is_none_is_an_error(checkpoint, tmp_path, monkeypatch):
    model = MTEBEncoder(str(checkpoint), device="cpu")
    write_sts(tmp_path / "sts.jsonl")
    monkeypatch.setattr(  # the same for all texts, so that nothing correlates with it
        model.encoder, "encode", lambda texts, *_, **__: np.ones((len(texts), 8), np.float32)
    )
    for _ in range(2):  # computed, then cached
        with pytest.raises(EvaluationError, match=r"its cosine_spearman is nan \(.*\.json\)"):
            list(evaluate(model, select_tasks([str(tmp_path / "sts.jsonl")]), tmp_path / "out"))


def test_a_task_that_fails_leaves_the_others_theirs(model, checkpoint, tmp_path):
    """They are evaluated and in the command's table, whose exit says that one failed."""
    for name in ("first", "last"):
        write_sts(tmp_path / f"{name}.jsonl")
    # One cosine for all: nothing correlates with it.
    lines = [{"sentence1": "a", "sentence2": "b", "score": score} for score in (1.0, 2.0, 3.0)]
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, lines)))
    names = [str(tmp_path / f"{name}.jsonl") for name in ("first", "bad", "last")]
    found = []
    with pytest.raises(EvaluationError, match=r"^bad-\w+: .*\nbad-\w+: [^\n]*$"):
        for task, _ in evaluate(model, select_tasks([*names, names[1]]), tmp_path / "out"):
            found.append(task.metadata.name.split("-")[0])
    assert found == ["first", "last"]
    command = ["eval", "mteb", "--model", checkpoint, "--device", "cpu", "--output", tmp_path / "c"]
    code, said = run(*command, "--tasks", ",".join(names))
    assert code == 1 and "Error: bad-" in said and "| Class. | Clust. |" in said, said
    [table] = (tmp_path / "c").glob("*.json")
    assert json.loads(table.read_text())["average"]["tasks"] == 2
    code, said = run(*command, "--tasks", names[1])
    assert code == 1 and "Error: bad-" in said and "Class." not in said, said


def test_model_meta(checkpoint, model, tmp_path):
    meta = model.mteb_model_meta
    assert meta.name == f"local/{checkpoint.name}" and len(meta.revision) == 40
    assert meta.experiment_kwargs is None and meta.max_tokens == tiny.MAX_LENGTH
    parameters = list(model.encoder.model.parameters())
    assert meta.n_parameters == sum(p.numel() for p in parameters)
    assert meta.n_active_parameters == meta.n_parameters - 1000 * tiny.HIDDEN_SIZE
    assert meta.memory_usage_mb * 2**20 == 4 * meta.n_parameters
    assert meta.modalities == ["text"] and meta.similarity_fn_name.value == "cosine"
    json.dumps(meta.to_dict(), default=str)

    other = MTEBEncoder(str(checkpoint), dtype="float16", max_length=64, instructions=False)
    assert other.mteb_model_meta.revision == meta.revision
    assert other.mteb_model_meta.experiment_kwargs == {
        "dtype": "float16",
        "max_length": 64,
        "instructions": False,
    }
    # Other weights in a folder of the same name are another model.
    same_name = tiny.write_tiny_checkpoint(tmp_path / checkpoint.name)
    config = other.encoder.model.config
    assert MTEBEncoder(str(same_name)).mteb_model_meta == meta
    write_random_checkpoint(same_name, config, seed=1, outliers=False)
    assert MTEBEncoder(str(same_name)).mteb_model_meta.revision != meta.revision


# Evaluating


def test_a_local_task_scores_as_computed_by_hand(model, tmp_path):
    first, second, scores = write_sts(tmp_path / "pairs.jsonl")
    prompt = "Retrieve semantically similar text. "
    a, b = (model.encoder.encode(texts, prompt=prompt).astype(float) for texts in (first, second))
    [(task, result)] = evaluate(model, select_tasks([str(tmp_path / "pairs.jsonl")]), tmp_path)
    [found] = result.scores["test"]
    assert task.metadata.type == "STS"
    assert result.get_score() == found["cosine_spearman"]
    assert found["cosine_spearman"] == pytest.approx(spearmanr(cosines(a, b), scores)[0], abs=1e-9)
    assert found["cosine_pearson"] == pytest.approx(pearsonr(cosines(a, b), scores)[0], abs=1e-5)


def test_finished_tasks_are_not_computed_again(checkpoint, tmp_path, monkeypatch):
    for name in ("one", "two"):
        write_sts(tmp_path / f"{name}.jsonl", 10 if name == "one" else 12)
    model = MTEBEncoder(str(checkpoint), device="cpu")
    names = [str(tmp_path / f"{name}.jsonl") for name in ("one", "two")]
    run = evaluate(model, select_tasks(names), tmp_path / "out")
    _, first = next(run)  # stopped after one of two
    run.close()
    assert model.totals.texts == 20
    results = list(evaluate(model, select_tasks(names), tmp_path / "out"))
    assert model.totals.texts == 20 + 24 and results[0][1].task_name == first.task_name

    monkeypatch.setattr(MTEBEncoder, "encode", None)  # would fail if anything were computed
    again = list(evaluate(model, select_tasks(names), tmp_path / "out"))
    # The cache has six decimals.
    scores = [result.get_score() for _, result in results]
    assert [result.get_score() for _, result in again] == pytest.approx(scores, abs=1e-6)
    monkeypatch.undo()
    write_sts(tmp_path / "one.jsonl", 11)  # other contents are another task
    list(evaluate(model, select_tasks(names[:1]), tmp_path / "out"))
    assert model.totals.texts == 44 + 22
    other = MTEBEncoder(str(checkpoint), device="cpu", dtype="bfloat16")
    list(evaluate(other, select_tasks(names[:1]), tmp_path / "out"))
    assert other.totals.texts == 22


def test_mtebs_own_tasks_on_data_sets_in_a_folder(checkpoint, model, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    first, second, scores = hub_folder(tmp_path / "data")
    tasks = select_tasks(["STSBenchmark", "NFCorpus"], data=tmp_path / "data")
    [kept] = select_tasks(["STSBenchmark"])  # the benchmark's own, untouched
    assert kept.metadata.dataset["path"] == "mteb/stsbenchmark-sts"
    results = dict((t.metadata.name, r) for t, r in evaluate(model, tasks, tmp_path / "out"))
    prompt = instructions.prompt("STSBenchmark", "STS")
    a, b = (model.encoder.encode(texts, prompt=prompt).astype(float) for texts in (first, second))
    by_hand = spearmanr(cosines(a, b), scores)[0]
    assert results["STSBenchmark"].get_score() == pytest.approx(by_hand, abs=1e-9)
    assert 0 <= results["NFCorpus"].get_score() <= 1
    loaded = mteb.ResultCache(tmp_path / "out").load_results(tasks=["STSBenchmark", "NFCorpus"])
    [of_model] = loaded.model_results
    assert of_model.model_name == f"local/{checkpoint.name}" and len(of_model.task_results) == 2
    with pytest.raises(ValueError, match=r"STS12: there is no folder .*sts12-sts; to have it"):
        select_tasks(["STS12"], data=tmp_path / "data")
    with pytest.raises(ValueError, match="CQADupstackAndroidRetrieval: there is no folder"):
        select_tasks(["CQADupstackRetrieval"], data=tmp_path / "data")


@pytest.mark.parametrize("names, group, error", [
    (["STSBenchmrk"], BENCHMARK, "'STSBenchmrk' not found. Did you mean: 'STSBenchmark'"),
    ([], "MTEB(eng, v7)", r"'MTEB\(eng, v7\)' not found. Did you mean: MTEB\(eng, v2\)"),
    (["CIFAR10"], BENCHMARK, "CIFAR10 is a task of image, and a NeoBERT reads text"),
    (["nowhere.csv"], BENCHMARK, "there is no task data at nowhere.csv"),
])  # fmt: skip
def test_tasks_that_there_are_not(names, group, error):
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        select_tasks(names, group)


def test_a_benchmarks_tasks_and_any_others():
    assert len(select_tasks()) == 56
    [one, other] = select_tasks(["MSMARCO", "STSBenchmark"])
    assert one.eval_splits == ["dev"] and other.eval_splits == ["test"]  # as the benchmark has them
    assert select_tasks(["STS17"])[0].hf_subsets == ["en-en"]
    assert select_tasks(["NFCorpus"], "MTEB(eng, v2)")[0].metadata.name == "NFCorpus"


# The command


def test_the_command(tmp_path, checkpoint):
    write_sts(tmp_path / "pairs.jsonl")
    command = ["eval", "mteb", "--model", checkpoint, "--device", "cpu", "--output",
               tmp_path / "out", "--tasks", tmp_path / "pairs.jsonl"]  # fmt: skip
    code, said = run(*command, "--no-progress", "--dtype", "float16")
    assert code == 0, said
    assert "48 texts" in said and "| Class. | Clust. |" in said
    [table] = (tmp_path / "out").glob("*.json")
    summary = json.loads(table.read_text())
    assert summary["model"] == f"local/{checkpoint.name} (dtype=float16)"
    [score] = [figures["score"] for figures in summary["tasks"].values()]
    assert summary["average"] == {"tasks": 1, "score": score}
    assert table.with_suffix(".md").read_text().strip() in said
    code, said = run(*command, "--dtype", "float16")
    assert code == 0 and "1 tasks, 0 texts" in said, said
    for more, error in [
        (["--tasks", "STSBenchmrk"], "Did you mean: 'STSBenchmark'"),
        (["--tasks", "STS12"], "STS12: Couldn't reach"),
    ]:
        code, said = run(*command, *more)
        assert code == 1 and error in said and "Traceback" not in said, said
