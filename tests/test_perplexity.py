"""Pseudo-perplexity: against the definition computed naively, sampling, batches, bad input."""

import json
import math
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from neobert import perplexity as perplexity_module
from neobert.cli import app
from neobert.perplexity import Document, Scorer, masked_batches
from neobert.perplexity_scores import (
    Score,
    mean_perplexity,
    read_scores,
)
from neobert.plain import PlainNeoBERT
from neobert.signals import Stopped
from tests.accuracy import assert_accurate
from tests.tiny import MAX_LENGTH, texts, write_tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def scorer(checkpoint):
    return Scorer.from_pretrained(checkpoint, device="cpu", max_tokens=300)


def some_texts(tokens: list[int]) -> list[str]:
    """Texts of about so many words."""
    words = " ".join(texts()).split()
    return [" ".join(words[100 * i : 100 * i + count]) for i, count in enumerate(tokens)]


@torch.no_grad()
def naive_losses(plain: PlainNeoBERT, tokenizer, text: str) -> torch.Tensor:
    """The definition: one position after the other, whole logits, no batch. Nothing is asked where
    the text has a special token, which no training asks for either."""
    ids = torch.tensor(tokenizer(text, truncation=True, max_length=MAX_LENGTH)["input_ids"])
    losses = []
    for place in range(1, len(ids) - 1):
        if int(ids[place]) in tokenizer.all_special_ids:
            continue
        masked = ids.clone()
        masked[place] = tokenizer.mask_token_id
        logits = plain.decoder(plain(masked[None]))[0]
        losses.append(-logits.log_softmax(-1)[place, ids[place]])
    return torch.stack(losses)


def test_equals_one_position_at_a_time(checkpoint, scorer):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    chosen = some_texts([2, 7, 30, 300])
    chosen.append("Return the \u2603 of [MASK], an \u2603 object [SEP] and stop.")
    documents, _ = scorer.documents(chosen, "x")
    scores = list(scorer(documents))
    batches = masked_batches(documents, scorer.mask_id, scorer.max_tokens)
    losses = torch.cat([scorer._losses(*batch) for batch in batches])
    assert [score.document for score in scores] == [1, 2, 3, 4, 5]
    assert scores[3].truncated and not scores[0].truncated
    assert [score.special for score in scores] == [{}] * 4 + [{"[UNK]": 2, "[MASK]": 1, "[SEP]": 1}]
    truth = PlainNeoBERT.load(checkpoint, torch.float64)
    plain = PlainNeoBERT.load(checkpoint, torch.float32)
    ours = losses.split([score.masked for score in scores])
    for text, score, mine in zip(chosen, scores, ours, strict=True):
        true = naive_losses(truth, tokenizer, text)
        assert score.masked == score.maskable == len(true)
        assert len(true) == score.tokens - 2 - sum(score.special.values())
        assert_accurate(mine, naive_losses(plain, tokenizer, text), true, "losses")
        assert score.loss == pytest.approx(true.mean().item(), rel=1e-6)
        assert score.perplexity == pytest.approx(math.exp(true.mean()), rel=1e-5)
        assert score.loss_standard_error == score.perplexity_standard_error == 0


@pytest.mark.parametrize("max_tokens", [1, 100, 10_000])
def test_the_budget_changes_nothing(scorer, max_tokens):
    documents, _ = scorer.documents(some_texts([3, 20, 5]), "x")
    other = Scorer.__new__(Scorer)
    other.__dict__ = scorer.__dict__ | {"max_tokens": max_tokens}
    sizes = []
    scores = list(other(documents, sizes.append))
    copies = [len(each.ids) for each in documents for _ in each.places]
    assert sum(sizes) == sum(copies)
    if max_tokens == 100:  # more than a copy of 20 words has, of whatever docstrings
        assert max(sizes) <= 100 and 1 < len(sizes) < len(copies)
    else:
        assert sizes == (copies if max_tokens == 1 else [sum(copies)])
    for mine, theirs in zip(scores, scorer(documents), strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-6)


def test_batches_hold_the_copies_of_several_documents():
    documents = [
        Document(1, np.array([7, 10, 11, 12, 8]), np.array([1, 2, 3]), 3),
        Document(2, np.array([7, 20, 21, 8]), np.array([2]), 2),
        Document(3, np.arange(30, 50), np.array([1, 5]), 18),
    ]
    seen = []
    for batch, rows, labels in masked_batches(documents, 99, 14):
        ids = batch.input_ids
        assert (ids[rows] == 99).all() and (ids == 99).sum() == len(rows) == batch.num_sequences
        assert batch.num_tokens <= 14 or batch.num_sequences == 1
        seen.append((batch.cu_seqlens.diff().tolist(), labels.tolist()))
        restored = ids.clone()
        restored[rows] = labels
        for sequence in restored.split(batch.cu_seqlens.diff().tolist()):
            assert any(np.array_equal(sequence, document.ids) for document in documents)
    assert seen == [([5, 5], [10, 11]), ([5, 4], [12, 21]), ([20], [31]), ([20], [35])]


def test_a_batch_has_no_more_copies_than_logits_fit(monkeypatch):
    monkeypatch.setattr(perplexity_module, "MOST_COPIES", 2)
    document = Document(1, np.array([7, 10, 11, 12, 8]), np.array([1, 2, 3]), 3)
    sizes = [batch.num_sequences for batch, _, _ in masked_batches([document] * 2, 99, 10_000)]
    assert sizes == [2, 2, 2]


def test_sampled_positions_estimate_all_of_them():
    """Over many draws: the mean is right, and the stated standard error is the spread seen."""
    losses = np.random.default_rng(1).gamma(2.0, 0.5, 60)
    document = Document(1, np.zeros(62, int), np.arange(1, 61), 60)
    whole = Score.of(document, losses)
    assert whole.loss_standard_error == whole.perplexity_standard_error == 0
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        places = generator.choice(len(losses), 20, replace=False)
        drawn.append(Score.of(document, losses[places]))
    loss, loss_error, perplexity, perplexity_error = (
        np.array([getattr(score, name) for score in drawn])
        for name in ("loss", "loss_standard_error", "perplexity", "perplexity_standard_error")
    )
    assert loss.mean() == pytest.approx(whole.loss, abs=4 * loss.std() / 2000**0.5)
    assert np.sqrt((loss_error**2).mean()) == pytest.approx(loss.std(), rel=0.06)
    assert np.median(perplexity_error) == pytest.approx(perplexity.std(), rel=0.15)


def test_the_sample_is_a_function_of_seed_and_document(scorer):
    (long,) = some_texts([40])
    chosen = [long, long, "a cat"]
    first, _ = scorer.documents(chosen, "x", positions=8)
    again, _ = scorer.documents(chosen, "x", positions=8)
    other, _ = scorer.documents(chosen, "x", positions=8, seed=1)
    for a, b in zip(first, again, strict=True):
        assert np.array_equal(a.places, b.places)
    assert not np.array_equal(first[0].places, other[0].places)
    assert not np.array_equal(first[0].places, first[1].places)
    assert len(set(first[0].places)) == 8 and first[0].maskable > 8
    assert min(first[0].places) >= 1 and max(first[0].places) < len(first[0].ids) - 1
    assert len(first[2].places) == first[2].maskable  # all of a text with fewer
    (sampled, _, whole) = scorer(first)
    assert sampled.loss_standard_error > 0 == whole.loss_standard_error


def test_yarn_and_lengths_beyond_the_models(checkpoint):
    text = [" ".join(texts())]
    plain = Scorer.from_pretrained(checkpoint, "cpu", max_length=2 * MAX_LENGTH)
    yarn = Scorer.from_pretrained(checkpoint, "cpu", yarn=2)
    assert plain.max_length == yarn.max_length == 2 * MAX_LENGTH
    rope = yarn.model.config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("yarn", 2.0)
    assert rope["original_max_position_embeddings"] == MAX_LENGTH
    cos = plain.model.model.rotary.cos, yarn.model.model.rotary.cos
    assert cos[0].shape == cos[1].shape and not torch.allclose(*cos, atol=0.05)
    documents, _ = plain.documents(text, "x", positions=4)
    (one,), (other,) = plain(documents), yarn(documents)
    assert one.tokens == other.tokens == 2 * MAX_LENGTH and one.loss != other.loss
    with pytest.raises(ValueError, match=r"yarn must be a factor greater than 1, got 1"):
        Scorer.from_pretrained(checkpoint, "cpu", yarn=1)
    yarn.model.save_pretrained(checkpoint / "stretched")
    for file in checkpoint.glob("token*"):
        (checkpoint / "stretched" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="scaled already"):
        Scorer.from_pretrained(checkpoint / "stretched", "cpu", yarn=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"texts.txt, document 2: .*at least 2 tokens, .* got 0 \(''\)"),
        ({"positions": 1}, "positions must be at least 2"),
        ({"min_tokens": 1}, "min_tokens must be at least 2"),
    ],
)
def test_bad_documents_are_named(scorer, options, message):
    with pytest.raises(ValueError, match=message):
        scorer.documents(["some words of text", "", "a"], "texts.txt", **options)


def test_a_document_of_one_token_is_named_or_counted(scorer):
    chosen = ["some words of text", "a", "", "more words of text"]
    with pytest.raises(ValueError, match=r"x, document 2: .* got 1 \('a'\)"):
        scorer.documents(chosen, "x")
    documents, passed_over = scorer.documents(chosen, "x", min_tokens=2)
    assert [document.number for document in documents] == [1, 4] and passed_over == 2


def test_special_tokens_are_never_masked(scorer):
    text = "Return the \u2603 of [MASK], an \u2603 object [SEP] and stop."
    ids = scorer.tokenize.backend.encode(text).ids
    special = {scorer.tokenize.backend.token_to_id(name) for name in scorer.special.values()}
    for positions in (None, 3):
        for seed in range(20):
            ((document,), _) = scorer.documents([text], "x", positions, seed)
            assert document.ids.tolist() == ids
            assert not special & set(document.ids[document.places].tolist())
            assert document.maskable == sum(each not in special for each in ids)
    with pytest.raises(
        ValueError, match=r"x, document 1: .* special ones like \[UNK\] not .*got 1"
    ):
        scorer.documents(["a \u2603 [MASK]"], "x")
    assert scorer.documents(["a \u2603 [MASK]", "\u2603"], "x", min_tokens=2) == ([], 2)


def test_mistaken_options(checkpoint):
    with pytest.raises(ValueError, match=f"between 4 .* {MAX_LENGTH} .*, got 3"):
        Scorer.from_pretrained(checkpoint, "cpu", max_length=3)
    with pytest.raises(ValueError, match=f"between 4 .* {MAX_LENGTH} .*, got 0"):
        Scorer.from_pretrained(checkpoint, "cpu", max_length=0, yarn=2)
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        Scorer.from_pretrained(checkpoint, "cpu", max_tokens=0)
    with pytest.raises(ValueError, match="'absent' is neither a directory nor"):
        Scorer.from_pretrained("absent")


def run(*arguments):
    result = CliRunner().invoke(app, ["eval", "perplexity", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_the_command_goes_on_after_an_interruption(tmp_path, checkpoint, monkeypatch):
    data, output = tmp_path / "texts.jsonl", tmp_path / "scores.jsonl"
    lines = [json.dumps({"body": text}) for text in some_texts([9, 8, 3, 7, 30])]
    data.write_text("\n".join(lines) + '\n{"body": "a"}\n')
    command = ["--model", checkpoint, "--data", data, "--field", "body", "--output", output,
               "--device", "cpu", "--positions", 6, "--max-tokens", 100]  # fmt: skip
    code, said = run(*command)
    assert code == 1 and f"Error: {data}, document 6:" in said and not output.exists()
    command += ["--min-tokens", 2, "--plot", tmp_path / "plot.png"]

    whole, once = Scorer._losses, []

    def interrupted(self, *batch):
        if len(once) == 2:
            raise Stopped(signal.SIGTERM)
        once.append(1)
        return whole(self, *batch)

    monkeypatch.setattr(Scorer, "_losses", interrupted)
    code, said = run(*command)
    assert code == 143 and "SIGTERM: stopped, " in said
    kept = read_scores(output)
    assert 0 < len(kept) < 5
    with open(output, "a") as file:
        file.write('{"document": 99, "tok')  # as kill -9 may leave it
    monkeypatch.setattr(Scorer, "_losses", whole)
    code, said = run(*command)
    assert code == 0, said
    assert "1 documents were shorter than 2 tokens" in said and (tmp_path / "plot.png").exists()
    scores = read_scores(output)
    assert scores[: len(kept)] == kept and [score.document for score in scores] == [1, 2, 3, 4, 5]
    fresh = tmp_path / "fresh.jsonl"
    code, said = run(*(fresh if word == output else word for word in command))
    assert code == 0
    mean, error = mean_perplexity(read_scores(fresh))
    assert f"pseudo-perplexity {mean:.4f} ± {error:.4f} over all of them" in said and error > 0
    for one, other in zip(read_scores(fresh), scores, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
    code, said = run(*command, "--seed", 1)
    assert code == 1 and "holds a run with other settings: seed was 0 and is 1" in said


def test_scores_of_a_model_or_of_texts_that_have_changed_are_refused(tmp_path, checkpoint):
    """The paths, the number of documents and their tokens are the same."""
    model = shutil.copytree(checkpoint, tmp_path / "model")
    data, output = tmp_path / "texts.txt", tmp_path / "scores.jsonl"
    data.write_text("return the text\nreturn the name\n")
    command = ["--model", model, "--data", data, "--output", output, "--device", "cpu"]
    code, said = run(*command)
    assert code == 0 and run(*command)[0] == 0, said
    data.write_text("return the name\nreturn the text\n")
    code, said = run(*command)
    assert code == 1 and re.search(r"other settings: documents_digest was '\w+' and is", said), said
    data.write_text("return the text\nreturn the name\n")
    weights = load_file(model / "model.safetensors")
    weights["decoder.bias"] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    code, said = run(*command)
    assert code == 1 and re.search(r"other settings: model_revision was '\w+' and is", said), said


def test_empty_lines_of_a_text_file_keep_their_numbers(tmp_path, checkpoint):
    (tmp_path / "texts.txt").write_text("some words of text\n\nmore words of text\n")
    code, said = run("--model", checkpoint, "--data", tmp_path / "texts.txt",
                     "--output", tmp_path / "o.jsonl", "--device", "cpu")  # fmt: skip
    assert code == 1 and "texts.txt, document 2: " in said


@pytest.mark.parametrize(
    ("option", "name", "text", "message"),
    [
        ("--plot", "absent/plot.png", None, "absent is not a directory"),
        ("--plot", "plot.xyz", None, "a plot's name ends in one of .*png"),
        ("--plot", "plot", None, "a plot's name ends in one of"),
        ("--beside", "empty.jsonl", "", "empty.jsonl has no scores"),
        ("--beside", "texts.jsonl", '{"text": "a"}\n', "texts.jsonl, line 1: not a score of"),
    ],
)
def test_what_a_plot_needs_is_looked_at_first(
    tmp_path, checkpoint, monkeypatch, option, name, text, message
):
    def load(*arguments):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Scorer, "from_pretrained", load)
    if text is not None:
        (tmp_path / name).write_text(text)
    code, said = run("--model", checkpoint, "--data", "docstrings", "--output", tmp_path / "o",
                     option, tmp_path / name)  # fmt: skip
    assert code == 1 and re.search(message, said), said
    assert not (tmp_path / "o").exists()


def test_a_loss_that_is_not_finite_names_the_document(checkpoint, scorer):
    other = Scorer.from_pretrained(checkpoint, "cpu", max_tokens=300)
    documents, _ = scorer.documents(some_texts([9, 5, 9]), "x")
    bad = documents[1].ids[documents[1].places[3]]
    assert bad not in documents[0].ids
    with torch.no_grad():
        other.model.model.encoder.weight[bad] = math.nan
    scores = other(documents)
    assert next(scores).document == 1
    count = documents[1].maskable
    message = rf"document 2: the loss of token \d+ of .* is nan, and \d+ of the {count} losses"
    with pytest.raises(ValueError, match=message):
        next(scores)
