"""Tasks made of files: read, scored through mteb as by hand, and refused by file and row."""

import csv
import json
import math

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from sklearn.metrics import average_precision_score

from neobert import instructions
from neobert.local_tasks import is_local, local_task
from neobert.mteb import MTEBEncoder, evaluate
from tests import tiny
from tests.test_mteb import cosines

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.no_poison,
    pytest.mark.filterwarnings("ignore"),
]
PAIRS = [
    {"sentence1": "a cat, on a mat", "sentence2": 'she said "no"', "score": 1.5},
    {"sentence1": "two\nlines", "sentence2": "na\u00efve", "score": 0},
    {"sentence1": "x", "sentence2": "y", "score": 4},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    checkpoint = tiny.write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    return MTEBEncoder(str(checkpoint), device="cpu")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            delimiter = "\t" if path.suffix == ".tsv" else ","
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    return path


def scores(model, path, output):
    [(task, result)] = evaluate(model, [local_task(path)], output)
    [found] = result.scores["test"]
    assert found["main_score"] == found[task.metadata.main_score]
    return found


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    rows = [{"id": i, **row} for i, row in enumerate(PAIRS)]  # a column that no task knows
    task = local_task(write(tmp_path / f"my pairs{suffix}", rows))
    assert task.metadata.type == "STS" and task.metadata.name.startswith("my-pairs-")
    assert task.dataset["test"].to_list() == PAIRS
    assert (task.min_score, task.max_score) == (0, 4)


def test_pairs_of_two_labels(model, tmp_path):
    texts = tiny.texts()[:40]
    rows = [
        {"sentence1": a, "sentence2": b, "labels": i % 2}
        for i, (a, b) in enumerate(zip(texts[:20], texts[20:], strict=True))
    ]
    found = scores(model, write(tmp_path / "pairs.parquet", rows), tmp_path)
    prompt = instructions.prompt("pairs", "PairClassification")
    a, b = (model.encoder.encode(half, prompt=prompt) for half in (texts[:20], texts[20:]))
    by_hand = average_precision_score([row["labels"] for row in rows], cosines(a, b))
    assert found["cosine_ap"] == pytest.approx(by_hand, abs=1e-5) and found["max_ap"] >= by_hand


def test_clustering_reads_every_row(model, tmp_path):
    rows = [
        {"sentences": text, "labels": label}
        for label, text in zip("ab" * 20, ["yes", "a longer text of other words"] * 20, strict=True)
    ]
    before = model.totals.texts
    found = scores(model, write(tmp_path / "topics.csv", rows), tmp_path)
    assert model.totals.texts - before == 40 and found["v_measure"] == pytest.approx(1)


def test_classification_of_a_folder(model, tmp_path):
    texts = {"good": "yes yes yes", "bad": "another thing altogether, of many words"}
    rows = [{"text": text, "label": label} for label, text in texts.items()] * 8
    for split in ("train", "test"):
        write(tmp_path / "mood" / f"{split}.jsonl", rows)
    assert scores(model, tmp_path / "mood", tmp_path / "out")["accuracy"] == 1


def beir(folder, **changes):
    texts = tiny.texts()
    rows = {
        "corpus": [{"_id": f"d{i}", "title": "", "text": t} for i, t in enumerate(texts[:30])],
        "queries": [{"_id": f"q{i}", "text": t} for i, t in enumerate(texts[30:35])],
        "qrels": [{"query-id": f"q{i}", "corpus-id": f"d{3 * i}", "score": 1} for i in range(4)],
    } | changes
    files = {"corpus": "corpus.jsonl", "queries": "queries.jsonl", "qrels": "qrels/test.tsv"}
    for name, file in files.items():
        write(folder / file, rows[name])
    return rows


def test_retrieval_of_a_beir_folder(model, tmp_path):
    rows = beir(tmp_path / "beir")
    found = scores(model, tmp_path / "beir", tmp_path / "out")
    prompt = instructions.prompt("beir", "Retrieval")
    queries, corpus = (
        model.encoder.encode([row["text"] for row in rows[name]], prompt=prompt, normalize=True)
        for name in ("queries", "corpus")
    )
    gains = []
    for i, similarities in enumerate(queries[:4] @ corpus.T):  # the fifth has nothing relevant
        rank = list(np.argsort(-similarities)).index(3 * i)
        gains.append(1 / math.log2(rank + 2) if rank < 10 else 0)
    assert found["ndcg_at_10"] == pytest.approx(np.mean(gains), abs=1e-5)
    assert 0 < np.mean(gains) < 1


def test_what_is_meant_as_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert is_local("pairs.csv") and is_local("./pairs") and is_local("folder")
    assert not is_local("STSBenchmark") and not is_local("STS22.v2")


def without(rows, index, **changes):
    return [row | (changes if i == index else {}) for i, row in enumerate(rows)]


@pytest.mark.parametrize("rows, error", [
    ([{"a": "x", "sentence2": "y", "score": 1}], r"pairs\S+: has the columns 'a', 'sentence2', "
     "'score', needs sentence1, sentence2, score or sentence1, sentence2, labels or sentences"),
    (without(PAIRS, 1, sentence2=" "), r"pairs\S+, row 2: 'sentence2' must be a text, is ' '"),
    (without(PAIRS, 2, score="nan"), r"pairs\S+, row 3: 'score' is 'nan', must be a number"),
    (without(PAIRS, 2, score=None), r"pairs\S+, row 3: 'score' is (None|''), must be a number"),
    ([row | {"score": 2} for row in PAIRS], r"pairs\S+: 'score' is the same in all of its 3 rows"),
    ([{"sentence1": "a", "sentence2": "b", "labels": i} for i in range(3)],
     r"pairs\S+, row 3: 'labels' is '?2'?, must be 0 or 1"),
    ([{"sentences": "a", "labels": ""}], r"pairs\S+, row 1: 'labels' is '', must be a name"),
])  # fmt: skip
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_errors_name_the_file_and_the_row(tmp_path, rows, error, suffix):
    with pytest.raises(ValueError, match=error):
        local_task(write(tmp_path / f"pairs{suffix}", rows))


@pytest.mark.parametrize("name, text, error", [
    ("a.csv", "x,y,1.0\nz,w,2.0\n", r"a\.csv: has the columns 'x', 'y', '1\.0', needs sentence1"),
    ("a.csv", "sentence1,sentence2,score\nx,y\n", "row 1: has 2 cells, the first line names 3"),
    ("a.csv", 'sentence1,sentence2,score\n"x,y,1\n', r"a\.csv, line \d: unexpected end of data"),
    ("a.csv", "", "has no rows"),
    ("a.jsonl", '{"sentence1": "x"\n', r"a\.jsonl, row 1: not JSON"),
    ("a.jsonl", "[1]\n", "row 1: not a JSON object"),
    ("a.jsonl", "\udcff\n", r"a\.jsonl, row 1: not JSON"),
    ("a.parquet", "x", r"a\.parquet: Parquet"),
    ("a.txt", "x", r"must end in \.csv, \.tsv, \.jsonl, \.parquet"),
])  # fmt: skip
def test_files_that_cannot_be_read(tmp_path, name, text, error):
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=error):
        local_task(tmp_path / name)


@pytest.mark.parametrize("changes, error", [
    ({"corpus": [{"_id": "d0", "body": "x"}]}, r"corpus\.jsonl: has the columns '_id', 'body', "),
    ({"corpus": [{"_id": "d0", "text": "x"}] * 2}, r"corpus\.jsonl, row 2: the _id 'd0' is there"),
    ({"queries": [{"_id": "q0", "text": ""}]}, r"queries\.jsonl, row 1: 'text' must be a text"),
    ({"qrels": [{"query-id": "q9", "corpus-id": "d0", "score": 1}]},
     r"test\.tsv, row 1: the query-id 'q9' is not in .*queries\.jsonl"),
    ({"qrels": [{"query-id": "q0", "corpus-id": "d99", "score": 1}]},
     r"test\.tsv, row 1: the corpus-id 'd99' is not in .*corpus\.jsonl"),
    ({"qrels": [{"query-id": "q0", "corpus-id": "d0", "score": "high"}]}, "must be an integer"),
    ({"qrels": [{"query-id": "q0", "corpus-id": "d0", "score": 0.9}]}, "must be an integer"),
    ({"qrels": [{"query": "q0", "corpus-id": "d0", "score": 1}]}, "needs query-id, corpus-id, "),
])  # fmt: skip
def test_errors_of_a_beir_folder(tmp_path, changes, error):
    beir(tmp_path, **changes)
    with pytest.raises(ValueError, match=error):
        local_task(tmp_path)


def test_errors_of_a_folder(tmp_path):
    write(tmp_path / "train.csv", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    with pytest.raises(ValueError, match=r"has no test \(\.csv"):
        local_task(tmp_path)
    write(tmp_path / "test.csv", [{"text": "a", "label": "x"}, {"text": "b", "label": "z"}])
    with pytest.raises(ValueError, match=r"test\.csv, row 2: the label 'z' is in no row of train"):
        local_task(tmp_path)
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d0", "text": "x"}')
    with pytest.raises(ValueError, match="has no queries"):
        local_task(tmp_path)
