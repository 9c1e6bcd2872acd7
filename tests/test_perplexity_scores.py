"""Scores of pseudo-perplexity: their means and errors, their file, their plot."""

import json
import math

import numpy as np
import pytest

from neobert.perplexity import Document
from neobert.perplexity_scores import (
    Score,
    mean_perplexity,
    means_by_length,
    plot_by_length,
    read_scores,
    resume,
    score_line,
)


def scores_of(*lengths_and_losses) -> list[Score]:
    return [
        Score.of(Document(i, np.zeros(tokens, int), np.arange(masked), masked), np.full(masked, x))
        for i, (tokens, masked, x) in enumerate(lengths_and_losses, 1)
    ]


def test_means():
    same = scores_of((32, 30, 1.0), (32, 30, 3.0), (48, 46, 2.0), (48, 46, 2.0))
    np.testing.assert_allclose(means_by_length(same), [(32, math.exp(2)), (48, math.exp(2))])
    mixed = scores_of((32, 30, 1.0), (33, 31, 3.0), (63, 61, 5.0), (65, 63, 2.0))
    expected = [(32, math.exp(1)), (48, math.exp(4)), (65, math.exp(2))]
    np.testing.assert_allclose(means_by_length(mixed), expected)
    # Over all tokens: a long document counts more.
    mean, error = mean_perplexity(scores_of((4, 2, 1.0), (8, 6, 3.0)))
    assert mean == pytest.approx(math.exp(2.5)) and error == 0


def test_the_mean_of_sampled_documents_estimates_that_of_all_their_tokens():
    """Of documents of unlike lengths, of which equally many tokens are masked: over many draws the
    mean is that of all tokens, and the stated standard error is the spread seen."""
    generator = np.random.default_rng(2)
    losses = [generator.gamma(2.0, scale, n) for scale, n in ((0.2, 30), (0.6, 200), (1.0, 12))]
    documents = [
        Document(i, np.zeros(len(each) + 2, int), np.arange(1, len(each) + 1), len(each))
        for i, each in enumerate(losses)
    ]
    drawn = []
    for _ in range(2000):
        chosen = [generator.choice(each, 10, replace=False) for each in losses]
        scores = [Score.of(*pair) for pair in zip(documents, chosen, strict=True)]
        drawn.append(mean_perplexity(scores))
    means, errors = np.array(drawn).T
    truth = math.exp(np.concatenate(losses).mean())
    # A convex function of an unbiased estimate: too large by half the relative error squared.
    bias = truth * np.log(means).var() / 2
    assert means.mean() == pytest.approx(truth + bias, abs=4 * means.std() / 2000**0.5)
    assert np.sqrt((errors**2).mean()) == pytest.approx(means.std(), rel=0.1)


def test_a_perplexity_that_no_float_holds(tmp_path):
    """Is infinite, in a file of valid JSON and in a plot, and stops nothing."""
    documents = scores_of((6, 4, 800.0), (8, 6, 3.0))
    sampled = Score.of(Document(3, np.zeros(12, int), np.arange(1, 11), 10), np.array([8e2, 9e2]))
    scores = [*documents, sampled]
    assert scores[0].perplexity == math.inf and scores[0].perplexity_standard_error == 0
    assert sampled.perplexity == sampled.perplexity_standard_error == math.inf
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(map(score_line, scores)))

    def not_json(name):
        raise AssertionError(name)

    records = [json.loads(x, parse_constant=not_json) for x in path.read_text().splitlines()]
    assert [each["perplexity"] for each in records] == [None, pytest.approx(math.exp(3)), None]
    assert read_scores(path) == scores
    assert mean_perplexity(documents) == (pytest.approx(math.exp(321.8)), 0)
    assert mean_perplexity([sampled]) == (math.inf, math.inf)
    assert means_by_length(scores)[-1][1] == math.inf
    plot_by_length({"one": scores, "only infinite": [sampled]}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size


def test_scores_of_an_older_version_and_other_files_are_refused(tmp_path):
    (score,) = scores_of((6, 4, 1.0))
    path = tmp_path / "scores.jsonl"
    path.write_text(score_line(score))
    assert read_scores(path) == [score]
    record = json.loads(score_line(score))
    del record["special"]
    for text, message in (
        (json.dumps(record), "line 1: a score without 'special', of an older version"),
        ('{"text": "a"}', "line 1: not a score of `neobert eval perplexity`, which has document"),
        ("[1]", "line 1: not a score"),
        ("text", "line 1: not JSON"),
    ):
        path.write_text(text + "\n")
        for read in (read_scores, lambda path: resume(path, {})):
            with pytest.raises(ValueError, match=message):
                read(path)


def test_resume_wants_the_settings_it_began_with(tmp_path):
    path = tmp_path / "scores.jsonl"
    assert resume(path, {"seed": 0}) == []
    path.write_bytes(b"")
    assert resume(path, {"seed": 0}) == []
    with pytest.raises(ValueError, match="seed was 0 and is 1; yarn was None and is 2"):
        resume(path, {"seed": 1, "yarn": 2})


def test_outputs_of_one_stem_have_settings_of_their_own(tmp_path):
    plain, yarn = tmp_path / "scores.plain", tmp_path / "scores.yarn"
    assert resume(plain, {"yarn": None}) == resume(yarn, {"yarn": 2}) == []
    (score,) = scores_of((6, 4, 1.0))
    plain.write_text(score_line(score))
    assert resume(plain, {"yarn": None}) == [score]
    plain.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"moved.settings.json, which says .* is not beside it"):
        resume(tmp_path / "moved", {"yarn": None})
