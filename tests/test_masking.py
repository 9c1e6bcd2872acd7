"""Masking: who is chosen, what becomes of it, and that (seed, step, lane) decides alone."""

import pytest
import torch

from neobert.masking import IGNORE_INDEX, Masking

SPECIAL = (0, 100, 101, 102, 103)
MASK = 103
MASKING = Masking(MASK, SPECIAL, 2000)
BERT = Masking(MASK, SPECIAL, 2000, rate=0.15, scheme="80/10/10")


def ids(tokens=50_000):
    ids = torch.randint(200, 2000, (tokens,))
    ids[::10] = torch.tensor(SPECIAL).repeat(tokens // 50)
    return ids


def assert_share(selected, of, expected):
    """Within five standard deviations of a binomial share."""
    n = int(of.sum())
    assert abs(int(selected.sum()) / n - expected) < 5 * (expected * (1 - expected) / n) ** 0.5


def test_every_chosen_token_becomes_mask_and_no_special_one_is_chosen():
    original = ids()
    masked, labels = MASKING(original, seed=1, step=2, lane=3)
    chosen = labels != IGNORE_INDEX
    special = torch.isin(original, torch.tensor(SPECIAL))
    assert not (chosen & special).any()
    assert_share(chosen, ~special, 0.2)
    assert torch.equal(labels[chosen], original[chosen])
    assert (masked[chosen] == MASK).all()
    assert torch.equal(masked[~chosen], original[~chosen])
    assert masked.dtype == labels.dtype == torch.int64


def test_80_10_10():
    original = ids(500_000)
    masked, labels = BERT(original, seed=1, step=2)
    chosen = labels != IGNORE_INDEX
    assert_share(chosen, ~torch.isin(original, torch.tensor(SPECIAL)), 0.15)
    assert torch.equal(masked[~chosen], original[~chosen])
    as_mask, kept = chosen & (masked == MASK), chosen & (masked == original)
    other = chosen & ~as_mask & ~kept
    assert_share(as_mask, chosen, 0.8)
    assert_share(other, chosen, 0.1)  # a random token is the old one once in 2,000 times
    assert not torch.isin(masked[other], torch.tensor(SPECIAL)).any()
    assert masked[other].unique().numel() > 1500


def test_a_pure_function_of_seed_step_and_lane():
    original = ids(1000)
    again = [MASKING(original, 1, 2, 3)[1] for _ in range(2)]
    assert torch.equal(*again)
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 3, 2)):
        labels = MASKING(original, *other)[1]
        both = ((labels != IGNORE_INDEX) & (again[0] != IGNORE_INDEX)).sum()
        assert both < 60, "as independent masks share: about 4 % of 900"


@pytest.mark.parametrize("rate", [0, 1, -0.1, 20])
def test_rate(rate):
    with pytest.raises(ValueError, match="mask rate must lie between 0 and 1"):
        Masking(MASK, SPECIAL, 2000, rate)


def test_scheme():
    with pytest.raises(ValueError, match="one of mask, 80/10/10, got 'random'"):
        Masking(MASK, SPECIAL, 2000, scheme="random")
