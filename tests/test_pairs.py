"""Reading pairs, what is left out and reported, and the batches drawn from them."""

import gzip
import json
from collections import Counter

import pytest
import torch
from datasets import Dataset

from neobert.docstrings import name_pairs
from neobert.pair_batches import PairSampler, share_of
from neobert.pairs import HELD_OUT, Pair, Pairs, PairSource
from neobert.text import TextTokenizer
from tests.checkpoints import word_tokenizer

ROWS = [
    {"query": "a cat", "positive": "the cat", "negatives": ["a dog", "a mat"]},
    {"query": "a dog", "positive": "the dog", "negatives": []},
    {"query": "red", "positive": "very red", "negatives": ["blue"]},
]
READ = [
    Pair("a cat", ("the cat",), ("a dog", "a mat")),
    Pair("a dog", ("the dog",), ()),
    Pair("red", ("very red",), ("blue",)),
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def all_of(pairs):
    return pairs[range(len(pairs))]


def test_jsonl_and_parquet_and_globs(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS[:2])
    write_jsonl(tmp_path / "b.jsonl", ROWS[2:])
    Dataset.from_list(ROWS).to_parquet(tmp_path / "c.parquet")
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write((tmp_path / "a.jsonl").read_text())
    for path, expected in [("*.jsonl", READ), ("c.parquet", READ), ("d.jsonl.gz", READ[:2])]:
        assert all_of(Pairs(PairSource(f"{tmp_path}/{path}", negatives=["negatives"]))) == expected
    pairs = Pairs(PairSource(f"{tmp_path}/*.jsonl"))
    assert [pair.negatives for pair in all_of(pairs)] == [()] * 3
    assert pairs.where(2) == f"{tmp_path}/b.jsonl, row 1"
    assert pairs[[2, 0]] == [all_of(pairs)[2], all_of(pairs)[0]]


def test_csv_with_and_without_a_first_line_of_names(tmp_path):
    rows = 'A man, eating.,"A ""man"" eats\nhere.",4.2\nNone,nan,5\n'
    (tmp_path / "a.csv").write_text("one,two,score\n" + rows.replace("A man,", '"A man,"'))
    with pytest.raises(ValueError, match=r"a.csv, line 2: not CSV|a.csv, line 3: 4 fields"):
        Pairs(PairSource(str(tmp_path / "a.csv"), query="one", positive="two"))
    rows = rows.replace("A man, eating.", '"A man, eating."')
    expected = [Pair("A man, eating.", ('A "man" eats\nhere.',), ()), Pair("None", ("nan",), ())]
    (tmp_path / "a.csv").write_text("one,two,score\n" + rows)
    (tmp_path / "b.csv").write_text(rows)
    source = PairSource(query="one", positive="two", score="score", min_score=4)
    source.path = str(tmp_path / "a.csv")
    assert all_of(Pairs(source)) == expected
    source.path, source.columns = str(tmp_path / "b.csv"), ["one", "two", "score"]
    assert all_of(Pairs(source)) == expected
    with gzip.open(tmp_path / "c.csv.gz", "wt") as file:
        file.write(rows)
    source.path = str(tmp_path / "c.csv.gz")
    assert all_of(Pairs(source)) == expected


def test_names_and_docstrings():
    train, held_out = (
        Pairs(PairSource("docstrings", split=split)) for split in ("train", HELD_OUT)
    )
    assert len(held_out) == len(name_pairs(True)) and len(train) > 5 * len(held_out)
    (pair,) = held_out[[7]]
    assert (pair.query, *pair.positives) == name_pairs(True)[7]
    with pytest.raises(ValueError, match=r"split of docstrings is 'train' or 'held-out', got 'dev"):
        Pairs(PairSource("docstrings", split="dev"))


BAD = [
    {"query": "fine", "positive": "yes", "score": 5.0, "negatives": ["no"]},
    {"query": "", "positive": "an empty query", "score": 5.0, "negatives": []},
    {"query": "an empty positive", "positive": " \n", "score": 5.0, "negatives": []},
    {"query": "nothing", "positive": None, "score": 5.0, "negatives": []},
    {"query": None, "positive": "no query", "score": 5.0, "negatives": []},
    {"query": "no score", "positive": "x", "score": None, "negatives": []},
    {"query": "too low", "positive": "x", "score": 1.0, "negatives": []},
    {"query": "q", "positive": "p", "score": 4.0, "negatives": ["p", "n", "", "q"]},
]


def test_what_is_left_out_is_counted_with_file_and_row(tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", BAD)
    source = PairSource(str(path), score="score", min_score=4, negatives=["negatives"])
    pairs = Pairs(source)
    assert all_of(pairs) == [Pair("fine", ("yes",), ("no",)), Pair("q", ("p",), ("n",))]
    rows = {
        reason: (n, [place.rsplit(" ", 1)[1] for place in places])
        for reason, (n, places) in pairs.left_out.items()
    }
    assert rows == {
        "the query or the positive is empty": (3, ["2", "3", "5"]),
        "there is no positive": (1, ["4"]),
        "the score is not a number": (1, ["6"]),
        "the score is below min_score": (1, ["7"]),
        "a negative is the positive or the query itself": (1, ["8"]),
        "a negative is empty": (1, ["8"]),
    }
    report = pairs.report()
    assert report.startswith("bad: 2 pairs of 8 rows, left out: 3 where the query or the positive")
    assert f"1 where there is no positive ({path}, row 4)" in report
    assert "1 where the score is below min_score, 1 where" in report


def test_a_score_of_nan_in_csv_and_parquet(tmp_path):
    (tmp_path / "a.csv").write_text("query,positive,score\na,b,nan\nc,d,4.5\ne,f,high\n")
    Dataset.from_list(
        [{"query": "a", "positive": "b", "score": score} for score in (float("nan"), 4.5)]
    ).to_parquet(tmp_path / "b.parquet")
    for name, count in (("a.csv", 2), ("b.parquet", 1)):
        pairs = Pairs(PairSource(str(tmp_path / name), score="score"))
        assert len(pairs) == 1
        assert pairs.left_out["the score is not a number"][0] == count
        assert pairs.left_out["the score is not a number"][1][0] == f"{tmp_path / name}, row 1"


def test_many_rows_left_out_are_counted_and_some_named(tmp_path):
    rows = [{"query": "", "positive": "x"}] * 9000 + [{"query": "q", "positive": "x"}]
    pairs = Pairs(PairSource(str(write_jsonl(tmp_path / "a.jsonl", rows))))
    (count, places), = pairs.left_out.values()  # fmt: skip
    assert (count, len(places), len(pairs)) == (9000, 5, 1)
    assert pairs.report().endswith("row 5; …)")


@pytest.mark.parametrize("name, content, changes, error", [
    ("a.jsonl", '{"query": "a", "positve": "b"}', {}, "a.jsonl has no column 'positive' .positive "
     "of a.; did you mean 'positve'"),
    ("a.jsonl", '{"query": "a", "positive": "b"}', {"score": "scor"}, "no column 'scor' .score of"),
    ("a.jsonl", '{"query": "a", "positive": "b"}', {"negatives": ["neg"]}, "no column 'neg'"),
    ("a.jsonl", '{"query": 3, "positive": "b"}', {}, "a.jsonl, row 1: column 'query' is not a "
     "text: 3"),
    ("a.jsonl", '{"query": "", "positive": "b"}', {}, "a.jsonl has no usable pair: a: 0 pairs of 1 "
     "rows, left out: 1 where the query or the positive is empty"),
    ("a.jsonl", "{nonsense", {}, "a.jsonl cannot be read"),
    ("a.jsonl", "", {}, "a.jsonl is empty"),
    ("a.csv", "query,positive\n", {}, "a.csv has no rows"),
    ("a.csv", "query,positive\na,b\nc\n", {}, "a.csv, line 3: 1 fields, but there are 2 columns"),
    ("a.csv", "query,query\na,b\n", {}, "two columns of one name"),
    ("a.csv", "query,positive\na,\xff\n", {}, "a.csv is not UTF-8"),
    ("a.jsonl", '{"query": "a", "positive": "b"}', {"columns": ["x"]}, "only a CSV file"),
    ("a.tsv", "a\tb", {}, "the files must all be of one kind, one of .jsonl, .json"),
])  # fmt: skip
def test_bad_files(tmp_path, name, content, changes, error):
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=error):
        Pairs(PairSource(str(tmp_path / name), **changes))


@pytest.mark.parametrize("path, title", [
    ("a/faq.jsonl.gz", "faq"), ("a/b/part-*.parquet", "b"), ("*.csv", "*.csv"),
    ("docstrings", "docstrings"), ("sentence-transformers/gooaq", "gooaq"), ("a/.csv", "a/.csv"),
])  # fmt: skip
def test_names_of_data_sets(path, title):
    assert PairSource(path).title == title
    assert PairSource(path, "mine").title == "mine"


def test_no_such_file():
    with pytest.raises(FileNotFoundError, match=r"'nowhere.csv' is neither a file"):
        Pairs(PairSource("nowhere.csv"))


class Numbered(list):
    """Pairs of a list, as `Pairs` gives them: several at a time."""

    def __getitem__(self, numbers):
        return [list.__getitem__(self, number) for number in numbers]


def numbered(name, count, negatives=0):
    texts = [f"{name}{i}" for i in range(count)]
    return Numbered(
        Pair(text, (f"{text} yes",), tuple(f"{text} no {j}" for j in range(negatives)))
        for text in texts
    )


SIZES = {"small": 100, "middle": 400, "large": 2500}


def make_sampler(**changes):
    settings = {"batch_size": 30, "hard_negatives": 2, "alpha": 0.5, "seed": 3} | changes
    sources = [PairSource(name=name) for name in SIZES]
    return PairSampler(sources, [numbered(name, n, 4) for name, n in SIZES.items()], **settings)


def test_data_sets_are_drawn_by_the_root_of_their_size():
    steps = 4000
    for alpha, weights in ((0.5, [10, 20, 50]), (1.0, [100, 400, 2500]), (0.0, [1, 1, 1])):
        sampler = make_sampler(alpha=alpha)
        drawn = Counter(sampler.source_of(step)[0] for step in range(steps))
        for number, weight in enumerate(weights):
            p = weight / sum(weights)
            assert abs(drawn[number] - p * steps) < 4 * (steps * p * (1 - p)) ** 0.5, alpha


def test_a_batch_is_a_function_of_seed_and_step():
    sampler = make_sampler()
    batches = [sampler(step) for step in range(40)]
    for step in (39, 0, 17):
        assert make_sampler()(step) == batches[step]
    assert make_sampler(seed=4)(0) != batches[0]
    assert len({batch.source.title for batch in batches}) == 3
    for batch in batches:
        texts = [*batch.queries, *batch.positives, *(t for each in batch.negatives for t in each)]
        assert all(text.startswith(batch.source.title) for text in texts)
        assert len(set(batch.queries)) == 30 and {len(each) for each in batch.negatives} == {2}


def test_an_epoch_has_every_pair_at_most_once_and_the_next_another_order():
    sampler = make_sampler()
    seen = [sampler.numbers(step) for step in range(200)]
    small = [number for source, numbers in seen if source == 0 for number in numbers]
    first, second = small[:90], small[90:180]  # 3 batches of 30; 10 pairs wait for the next epoch
    assert len(set(first)) == len(set(second)) == 90 and first != second
    assert set(first) | set(second) > set(first)


def test_a_data_set_smaller_than_a_batch():
    with pytest.raises(ValueError, match=r"small has 100 usable pairs, fewer than batch_size=128"):
        make_sampler(batch_size=128)


def share(batch, rank, processes):
    tokenize = TextTokenizer(word_tokenizer())
    return share_of(batch, rank, processes, tokenize, 64, 50)


def known_batch():
    """Two pairs of one query, a positive that another pair has as negative, and twins."""
    pairs = Numbered([
        Pair("a cat", ("the cat", "the big cat"), ("the dog",)),
        Pair("a cat", ("the old cat",), ("red",)),
        Pair("a dog", ("the dog",), ("the big cat", "a mat")),
        Pair("the mat", ("the tree",), ("a cat",)),
    ])  # fmt: skip
    sampler = PairSampler([PairSource(name="x")], [pairs], 4, hard_negatives=2)
    return sampler(0)


def test_known_positives_are_masked_and_nothing_else():
    batch = known_batch()
    whole = share(batch, 0, 1)
    (candidates,) = batch.candidates(1)
    assert whole.counts == [len(candidates)] == [9]
    allowed = {
        "a cat": {"a cat", "the cat", "the big cat", "the old cat"},
        "a dog": {"a dog", "the dog"},
        "the mat": {"the mat", "the tree"},
    }
    for row, query in enumerate(batch.queries):
        target = int(whole.targets[row])
        assert candidates[target] == batch.positives[row]
        for column, text in enumerate(candidates):
            expected = text in allowed[query] and column != target
            assert bool(whole.masked[row, column]) == expected, (query, text)
    assert int(whole.masked.sum()) >= 5


def test_the_processes_have_one_batch():
    batch = known_batch()
    whole, parts = share(batch, 0, 1), [share(batch, rank, 2) for rank in range(2)]
    texts = [text for each in batch.candidates(2) for text in each]
    assert parts[0].counts == parts[1].counts and sum(parts[0].counts) == len(texts)
    assert sorted(texts) == sorted(batch.candidates(1)[0])
    assert sum(part.num_texts for part in parts) == whole.num_texts
    assert sum(part.masked.sum() for part in parts) == whole.masked.sum()
    targets = torch.cat([part.targets for part in parts])
    assert [texts[i] for i in targets.tolist()] == batch.positives


def test_the_instruction_goes_before_queries_or_before_all():
    prompts = {}
    for symmetric in (False, True):
        source = PairSource(name="x", instruction="the red", symmetric=symmetric)
        batch = PairSampler([source], [numbered("cat ", 2)], 2)(0)
        ids = {}
        for chunk in share(batch, 0, 1).chunks:
            rows = chunk.packed.input_ids.split(chunk.packed.cu_seqlens.diff().tolist())
            ids |= dict(zip(chunk.rows.tolist(), rows, strict=True))
        tokenizer = word_tokenizer()
        prompts[symmetric] = ["the red cat" in tokenizer.decode(ids[i].tolist()) for i in range(4)]
    assert prompts == {False: [True, True, False, False], True: [True] * 4}
