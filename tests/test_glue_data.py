"""GLUE's readers, tokens and metrics: every task in its own format and in the hub's."""

import json

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from scipy.stats import pearsonr
from tokenizers import processors

import neobert.glue_data
from neobert.glue_data import packed_batches, read_examples, tokenize
from neobert.glue_tasks import TASKS, find_task, score, scores
from tests.checkpoints import word_tokenizer
from tests.glue_files import TSV, write_tsv

NAMES = [task.name for task in TASKS.values()]


def examples(data, name, split="train"):
    read = read_examples(str(data), find_task(name), split)
    return list(zip(read.texts, read.labels.tolist(), strict=True))


def hub_columns(name, rows):
    task = find_task(name)
    columns = {text: [texts[i] for texts, _ in rows] for i, text in enumerate(task.texts)}
    return columns | {"label": [label for _, label in rows], "idx": list(range(len(rows)))}


def test_there_are_eight():
    assert sorted(NAMES) == sorted(TSV)
    assert NAMES == ["MNLI", "QNLI", "QQP", "RTE", "SST-2", "MRPC", "CoLA", "STS-B"]  # Table 3


@pytest.mark.parametrize("name", NAMES)
def test_glues_own_files(tmp_path, name):
    write_tsv(tmp_path, name)
    expected = [(texts, pytest.approx(label)) for texts, label in TSV[name][1]]
    assert examples(tmp_path, name) == expected
    for split in find_task(name).splits[1:]:
        assert len(examples(tmp_path, name, split)) == 2
    labels = read_examples(str(tmp_path), find_task(name), "train").labels
    assert labels.dtype == (np.float32 if name == "STS-B" else np.int64)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("name", NAMES)
def test_the_hubs_files(tmp_path, name, kind):
    """Of which a split may have several, and whose labels have the same numbers as the TSVs'."""
    task, rows = find_task(name), TSV[name][1]
    folder = tmp_path / task.subset
    folder.mkdir()
    for part in range(len(rows)):
        columns = hub_columns(name, [rows[part]])
        path = folder / f"train-{part:05}-of-{len(rows):05}.{kind}"
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.table(columns), path)
        else:
            record = {column: values[0] for column, values in columns.items()}
            path.write_text(json.dumps(record) + "\n")
    assert examples(tmp_path, name) == [(texts, pytest.approx(label)) for texts, label in rows]


def test_the_hub(monkeypatch):
    asked = []

    def load_dataset(*arguments, **keywords):
        asked.append((arguments, keywords))
        return datasets.Dataset.from_dict(hub_columns("MNLI", TSV["MNLI"][1]))

    monkeypatch.setattr(neobert.glue_data, "load_dataset", load_dataset)
    assert examples("hub", "MNLI", "dev_mismatched") == TSV["MNLI"][1]
    assert asked == [(("nyu-mll/glue", "mnli"), {"split": "validation_mismatched"})]


def test_development_sets_are_not_mixed_up(tmp_path):
    folder = write_tsv(tmp_path, "MNLI")
    text = (folder / "dev_mismatched.tsv").read_text()
    (folder / "dev_mismatched.tsv").write_text(text.replace("\tA.\tB.", "\tanother\tpair"))
    assert examples(tmp_path, "MNLI", "dev_matched")[0][0] == ("A.", "B.")
    assert examples(tmp_path, "MNLI", "dev_mismatched")[0][0] == ("another", "pair")


def test_rows_of_qqp_that_a_line_break_cuts_are_left_out_and_counted(tmp_path):
    folder = write_tsv(tmp_path, "QQP")
    header, *rows = (folder / "train.tsv").read_text().splitlines()
    broken = ["5\t1\t2\tHow do", "", "I?\tWhat?\t1"]
    text = "\n".join([header, rows[0], *broken, rows[1]]) + "\n"
    (folder / "train.tsv").write_text(text)
    assert examples(tmp_path, "QQP") == TSV["QQP"][1]
    read = read_examples(str(tmp_path), find_task("QQP"), "train")
    assert read.left_out == tuple(f"{folder / 'train.tsv'}, row {row}" for row in (3, 4, 5))
    (folder / "train.tsv").write_text("\n".join([header, *broken]))
    with pytest.raises(ValueError, match="has no examples"):
        examples(tmp_path, "QQP")
    (folder / "train.tsv").write_text("\n".join([*broken, header, *rows]))
    with pytest.raises(ValueError, match="row 1: the columns are"):
        examples(tmp_path, "QQP")
    assert [task.name for task in TASKS.values() if task.broken_rows] == ["QQP"]


HEADER = "index\tsentence1\tsentence2\tlabel\n"
ROWS = "0\ta\tb\tentailment\n1\tc\td\tnot_entailment\n"


@pytest.mark.parametrize("name, text, error", [
    ("RTE", HEADER + ROWS + "2\te\tf\tneutral\n", r"train.tsv, row 4: the label 'neutral' is none"),
    ("RTE", HEADER + ROWS + "\n3\te\tf\tentailment\n", r"train.tsv, row 4: an empty line"),
    ("RTE", HEADER + ROWS + " \n", r"train.tsv, row 4: an empty line"),
    ("RTE", HEADER + "0\ta\tb\n", r"train.tsv, row 2: 3 columns; RTE has 4: index, sentence1,"),
    ("RTE", HEADER + "0\ta\tb\tc\tentailment\n", r"train.tsv, row 2: 5 columns; RTE has 4"),
    ("RTE", HEADER + "0\t \t\tentailment\n", r"row 2: no text in sentence1 and sentence2"),
    ("RTE", "index\tsentence2\tsentence1\tlabel\n" + ROWS,
     r"train.tsv, row 1: the columns are index, sentence2, sentence1, label; those of RTE are "
     r"index, sentence1, sentence2, label, in this order"),
    ("RTE", ROWS, r"train.tsv, row 1: the columns are 0, a, b, entailment; those of RTE are"),
    ("RTE", HEADER + "0\ta\tb\tentailment\n1\tc\td\tentailment\n",
     r"train.tsv: all 2 examples have the label 'entailment'"),
    ("RTE", HEADER, r"train.tsv has no examples"),
    ("RTE", "", r"train.tsv has no examples"),
    ("RTE", HEADER + "0\ta\t\udcff\tentailment\n", r"train.tsv, row 2: not UTF-8"),
    ("CoLA", "gj04\tThe cat sat.\t\t1\n", r"row 1: the label 'The cat sat.' is none of CoLA's: 0"),
    ("CoLA", "gj04\t2\t\tThe cat sat.\n", r"row 1: the label '2' is none of CoLA's: 0, 1"),
    ("SST-2", "sentence\tlabel\nit\t-1\n", r"row 2: the label '-1' is none of SST-2's: 0, 1"),
    ("STS-B", TSV["STS-B"][0]["train.tsv"].replace("1.600", "5.2"),
     r"train.tsv, row 3: the score '5.2' is not a number from 0 to 5"),
    ("STS-B", TSV["STS-B"][0]["train.tsv"].replace("1.600", "nan"), r"row 3: the score 'nan'"),
    ("STS-B", TSV["STS-B"][0]["train.tsv"].replace("1.600", "good"), r"row 3: the score 'good'"),
    ("STS-B", TSV["STS-B"][0]["train.tsv"].replace("1.600", "5"), r"have the label 5.0"),
])  # fmt: skip
def test_what_is_refused_in_a_tsv(tmp_path, name, text, error):
    folder = write_tsv(tmp_path, name)
    (folder / "train.tsv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=error):
        examples(tmp_path, name)


@pytest.mark.parametrize("line, error", [
    ('{"sentence1": "a", "sentence2": "b", "label": 2}', r"row 2: the label 2 is none of RTE's: 0"),
    ('{"sentence1": "a", "sentence2": "b", "label": -1}', r"row 2: the label -1 is none"),
    ('{"sentence1": "a", "sentence2": "b", "label": "1"}', r"row 2: the label '1' is none"),
    ('{"sentence1": "a", "sentence2": "b", "label": true}', r"row 2: the label True is none"),
    ('{"sentence1": "a", "sentence2": null, "label": 1}', r"row 2: sentence2 is not a text: None"),
    ('{"sentence1": "a", "label": 1}', r"row 2: no sentence2; RTE has the columns sentence1,"),
    ('["a", "b", 1]', r"row 2: no sentence1, sentence2, label; RTE has"),
    ('{"sentence1": "a",', r"row 2: not JSON"),
    ("", r"row 2: an empty line"),
])  # fmt: skip
def test_what_is_refused_in_jsonl(tmp_path, line, error):
    (tmp_path / "rte").mkdir()
    first = '{"sentence1": "a", "sentence2": "b", "label": 0}'
    (tmp_path / "rte" / "train.jsonl").write_text(f"{first}\n{line}\n{first}\n")
    with pytest.raises(ValueError, match=rf"train.jsonl, {error}"):
        examples(tmp_path, "RTE")


def test_what_is_refused_in_parquet(tmp_path):
    (tmp_path / "rte").mkdir()
    path = tmp_path / "rte" / "train.parquet"
    columns = hub_columns("RTE", TSV["RTE"][1])
    pyarrow.parquet.write_table(pyarrow.table(columns | {"label": [0, 7]}), path)
    with pytest.raises(ValueError, match=r"train.parquet, row 2: the label 7 is none of RTE's"):
        examples(tmp_path, "RTE")
    del columns["sentence2"]
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(ValueError, match=r"train.parquet: no sentence2; RTE has the columns"):
        examples(tmp_path, "RTE")
    path.write_text("not Parquet at all")
    with pytest.raises(ValueError, match=r"train.parquet cannot be read"):
        examples(tmp_path, "RTE")


def test_missing_and_doubled_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data for RTE: neither .*RTE nor .*rte is a"):
        examples(tmp_path, "RTE")
    folder = write_tsv(tmp_path, "RTE")
    (folder / "dev.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no dev examples for RTE: .*RTE holds neither de"):
        examples(tmp_path, "RTE", "dev")
    (folder / "train.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"train examples of RTE twice: train.tsv, train.jsonl"):
        examples(tmp_path, "RTE")
    with pytest.raises(ValueError, match=r"there is no task 'RTTE'; did you mean 'rte'"):
        find_task("RTTE")


def test_pairs_are_cls_a_sep_b_sep(tmp_path):
    tokenizer = word_tokenizer()

    def tokens(name, max_length):
        read = read_examples(str(tmp_path), find_task(name), "train")
        found = tokenize(read, tokenizer, max_length)
        assert found[0].dtype == np.int32
        return [" ".join(tokenizer.convert_ids_to_tokens(ids.tolist())) for ids in found]

    write_tsv(tmp_path, "RTE")
    write_tsv(tmp_path, "CoLA")
    assert tokens("RTE", 64) == [  # full stops and quotes are not in the vocabulary
        "[CLS] the [UNK] cat sat [UNK] [SEP] it sat [UNK] [SEP]",
        "[CLS] a dog [UNK] [SEP] a cat [UNK] [SEP]",
    ]
    assert tokens("RTE", 8)[0] == "[CLS] the [UNK] cat [SEP] it sat [SEP]", (
        "the longer is cut first"
    )
    assert tokens("CoLA", 64)[1] == "[CLS] sat cat the [UNK] [SEP]"
    assert tokens("CoLA", 4)[1] == "[CLS] sat cat [SEP]"


def test_a_tokenizer_without_pairs(tmp_path):
    write_tsv(tmp_path, "RTE")
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    read = read_examples(str(tmp_path), find_task("RTE"), "train")
    with pytest.raises(ValueError, match=r"tokenizer must give \[CLS\] a \[SEP\] b \[SEP\]"):
        tokenize(read, tokenizer, 64)


def test_batches_hold_every_example_once_within_the_budget():
    generator = np.random.default_rng(0)
    sequences = [generator.integers(1, 99, n, np.int32) for n in generator.integers(2, 40, 50)]
    sequences[7] = generator.integers(1, 99, 100, np.int32)  # longer than the budget
    labels = np.arange(50, dtype=np.float32)
    chosen = [7, *generator.permutation(np.arange(8, 50))[:30].tolist()]
    batches = packed_batches(sequences, labels, chosen, 64)
    assert sorted(i for batch in batches for i in batch.indices) == sorted(chosen)
    for batch in batches:
        assert batch.packed.num_tokens <= 64 or batch.indices == [7]
        assert batch.labels.tolist() == batch.indices
        padded = batch.padded_inputs(pad_id=0)
        lengths = batch.packed.cu_seqlens.diff()
        assert torch.equal(padded["attention_mask"].sum(1), lengths)
        for row, index in enumerate(batch.indices):
            expected = torch.from_numpy(sequences[index]).long()
            assert torch.equal(padded["input_ids"][row, : lengths[row]], expected)


def test_metrics():
    truth, outputs = np.array([1, 0, 1, 1]), np.array([[0, 1], [2, 1], [1, 0], [-2, -1]])
    assert scores(find_task("RTE"), [truth], [outputs]) == {"accuracy": 0.75}
    found = scores(find_task("MRPC"), [truth], [outputs])
    assert found == pytest.approx({"accuracy": 0.75, "f1": 0.8})
    assert score(found) == pytest.approx(0.775)
    matthews = (2 * 1 - 0 * 1) / (2 * 3 * 1 * 2) ** 0.5
    assert scores(find_task("CoLA"), [truth], [outputs]) == pytest.approx({"matthews": matthews})

    values, predicted = np.array([0.0, 1.5, 4.0, 5.0]), np.array([[0.1], [0.3], [9.0], [0.2]])
    found = scores(find_task("STS-B"), [values], [predicted])
    pearson = pearsonr(values, predicted[:, 0]).statistic
    assert found == pytest.approx({"pearson": pearson, "spearman": 0.4})
    assert score(found) == pytest.approx((pearson + 0.4) / 2)

    three, logits = np.array([2, 0]), np.array([[0, 0, 1], [0, 1, 0]])
    found = scores(find_task("MNLI"), [three, three[:1]], [logits, logits[:1]])
    assert found == {"accuracy_matched": 0.5, "accuracy_mismatched": 1.0} and score(found) == 0.75


def test_metrics_of_constant_predictions_are_defined():
    """As a model's in its first steps may be: no NaN may be the best score."""
    truth, outputs = np.array([1, 0, 1]), np.array([[1.0, 0.0]] * 3)
    assert scores(find_task("CoLA"), [truth], [outputs]) == {"matthews": 0.0}
    assert scores(find_task("QQP"), [truth], [outputs]) == pytest.approx(
        {"accuracy": 1 / 3, "f1": 0.0}
    )
    values = np.array([1.0, 2.0, 3.0])
    found = scores(find_task("STS-B"), [values], [np.ones((3, 1))])
    assert found == {"pearson": 0.0, "spearman": 0.0}
