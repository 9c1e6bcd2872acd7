"""Semantic search: indexes, exact search, recall and the BM25 it is compared with."""

import dataclasses
import json
import os
import signal
from functools import cache

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from neobert import search
from neobert.cli import app
from neobert.encode import Encoder
from neobert.retrieval import bm25_scores, recall_at
from neobert.search import Index, IndexSettings, build_index
from neobert.sentence_folder import write_sentence_folder
from neobert.signals import Stopped
from tests.tiny import texts, write_tiny_checkpoint

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::neobert.encode.TruncationWarning"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return Encoder.from_pretrained(checkpoint, device="cpu")


@cache
def some_texts():
    return texts()


def records(count=40):
    return [{"text": text, "name": f"n{i}"} for i, text in enumerate(some_texts()[:count])]


def run(*arguments, stdin=None):
    result = CliRunner().invoke(app, list(map(str, arguments)), input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize("block", [1, 90, 1 << 26])
def test_search_is_exact(tmp_path, checkpoint, encoder, monkeypatch, block):
    monkeypatch.setattr(search, "MOST_SCORES", block)
    settings = IndexSettings(checkpoint, pooling="cls", prompt="document: ", query_prompt="query: ")
    assert build_index(tmp_path / "i", records(), encoder, settings) == (40, 0)
    index = Index.load(tmp_path / "i", device="cpu")
    assert index.settings == dataclasses.replace(
        settings, dtype="float32", max_length=encoder.max_length
    )
    assert index.records == records()
    queries = ["a batch of tokens", "write a file", "x"]
    with pytest.warns(match="truncated"):
        rows = encoder.encode([each["text"] for each in records()], "cls", prompt="document: ")
    asked = encoder.encode(queries, "cls", prompt="query: ")
    rows, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows, asked))
    cosines = asked @ rows.T
    for hits, expected in zip(index.search(queries, 7), cosines, strict=True):
        best = np.sort(expected)[::-1][:7]
        np.testing.assert_allclose([hit.score for hit in hits], best, atol=1e-5)
        for hit in hits:
            assert hit.score == pytest.approx(expected[hit.number], abs=1e-5)
            assert hit.record == records()[hit.number]
    assert len(index.search(["x"], 1000)[0]) == 40 and index.search([], 3) == []


def test_a_text_finds_itself_first(tmp_path, checkpoint, encoder):
    build_index(tmp_path, records(), encoder, IndexSettings(checkpoint))
    hits = Index.load(tmp_path, device="cpu").search([records()[17]["text"]], 1)
    assert hits[0][0].number == 17 and hits[0][0].score == pytest.approx(1, abs=1e-5)


def test_an_unfinished_index_is_none(tmp_path, checkpoint, encoder):
    settings = IndexSettings(checkpoint)
    build_index(tmp_path, records(), encoder, settings)

    def stopping():
        yield from records(5)
        raise Stopped(signal.SIGINT)

    with pytest.raises(Stopped):
        build_index(tmp_path, stopping(), encoder, settings)
    with pytest.raises(FileNotFoundError, match=r"is not an index: it has no index\.json"):
        Index.load(tmp_path)
    assert not [name for name in os.listdir(tmp_path) if "unfinished" in name]
    with pytest.raises(ValueError, match="no text to index: 2 blank ones"):
        build_index(tmp_path, [{"text": ""}, {"text": " \t"}], encoder, settings)


def test_bad_input(tmp_path, checkpoint, encoder):
    settings = IndexSettings(checkpoint)
    build_index(tmp_path, records(3), encoder, settings)
    index = Index.load(tmp_path, device="cpu")
    with pytest.raises(TypeError, match="queries must be a list of str, got the str 'abc'"):
        index.search("abc")
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        index.search(["abc"], 0)
    np.save(tmp_path / search.EMBEDDINGS, np.zeros((2, 128), np.float32))
    with pytest.raises(ValueError, match=r"\(3 records, 128 of the model\), got \(2, 128\)"):
        Index.load(tmp_path, device="cpu")


def test_the_prompts_are_the_models_unless_others_are_given(tmp_path):
    model, source = write_tiny_checkpoint(tmp_path / "model"), tmp_path / "texts.txt"
    source.write_text("some text\nmore text\n")
    prompts = {"query": "find: ", "document": "text: "}
    write_sentence_folder(model, 128, 32, prompts)
    command = ["index", "--model", model, "--input", source, "--output", tmp_path / "i"]
    for options, expected in (
        ([], ("text: ", "find: ")),
        (["--prompt", "", "--query-prompt", "q: "], ("", "q: ")),
    ):
        code, said = run(*command, "--device", "cpu", *options)
        assert code == 0, said
        settings = Index.load(tmp_path / "i", device="cpu").settings
        assert (settings.prompt, settings.query_prompt) == expected
        assert (settings.pooling, settings.max_length) == ("mean", 32)


def test_the_commands(tmp_path, checkpoint):
    source, folder = tmp_path / "texts.jsonl", tmp_path / "index"
    lines = [{"body": each["text"], "name": each["name"]} for each in records(9)]
    source.write_text("\n".join(map(json.dumps, [*lines, {"body": " "}])))
    code, said = run("index", "--model", checkpoint, "--input", source, "--output", folder,
                     "--field", "body", "--device", "cpu")  # fmt: skip
    assert code == 0 and "9 texts, 1 blank ones passed over" in said
    code, said = run("search", lines[4]["body"], "--index", folder, "-k", 3, "--device", "cpu")
    shown = said.strip().splitlines()
    assert code == 0 and len(shown) == 3, said
    assert shown[0].split()[:3] == ["1", "1.000", "n4"] and all(len(x) <= 80 for x in shown)
    code, said = run("search", "--index", folder, "-k", 2, "--json", "--device", "cpu",
                     stdin="first query\n\nsecond\n")  # fmt: skip
    found = [json.loads(line) for line in said.splitlines()]
    assert [each["query"] for each in found] == ["first query"] * 2 + ["second"] * 2
    assert [each["rank"] for each in found] == [1, 2, 1, 2] and "body" in found[0]
    code, said = run("search", "--index", folder, "--json", "-k", 1, "--device", "cpu",
                     stdin=b"a query\nopen \xff file\n")  # fmt: skip
    assert code == 1 and said.startswith('{"query": "a query"'), said
    assert "Error: stdin, line 2: not UTF-8" in said


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["search", " ", "--index", "i"], "the query is empty"),
        (["search", "a \udcff", "--index", "i"], "the query is not UTF-8: 'a \\udcff'"),
        (["search", "a", "--index", "absent"], "absent is not an index"),
        (["search", "a", "--index", "i", "--model", "gone"], "'gone' is neither a directory nor"),
        (["index", "--input", "absent.txt", "--output", "o", "--model", "m/m"], "absent.txt"),
        (["index", "--input", "bad.jsonl", "--output", "o", "--field", "text", "--model", "M"],
         "bad.jsonl, line 2: no field 'text'"),
        (["index", "--input", "bad.jsonl", "--output", "o", "--field", "text", "--model", "M",
          "--max-length", "0"], "(the model's), got 0"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path, checkpoint, encoder, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    build_index("i", records(3), encoder, IndexSettings(checkpoint))
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"body": "bad"}\n')
    code, said = run(*(checkpoint if word == "M" else word for word in command))
    assert code == 1 and "Error: " in said and message in said


def test_recall_counts_ties_against():
    scores = torch.tensor([[3.0, 2, 1, 0], [0, 0, 0, 0], [1, 1, 0, 5], [float("nan"), 1, 0, 0]])
    relevant = torch.tensor([1, 2, 0, 0])
    assert [recall_at(k, scores, relevant) for k in (1, 2, 3, 4)] == [0, 0.25, 0.5, 1.0]
    with pytest.raises(ValueError, match=r"got \(4, 4\) and \(3,\)"):
        recall_at(1, scores, relevant[:3])


def test_bm25_finds_words_and_says_nothing_of_others():
    found = ["Write rows to a CSV file.", "Parse JSON text.", "Sleep for some seconds, and sleep."]
    scores = bm25_scores(found, ["csv rows", "sleep", "the", "zebra"])
    assert scores.shape == (4, 3) and scores.dtype == torch.float32
    assert scores[0].argmax() == 0 and scores[1].argmax() == 2
    assert (scores[0, 1:] == 0).all() and (scores[2:] == 0).all()
    assert recall_at(1, scores[:2], torch.tensor([0, 2])) == 1.0
    assert recall_at(2, scores[2:], torch.tensor([0, 2])) == 0.0
