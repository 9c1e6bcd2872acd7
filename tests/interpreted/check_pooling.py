"""pool and its backward in Triton's interpreter."""

import pytest
import torch
from accuracy import assert_accurate

from neobert_kernels.pooling import reference, reference_bwd

LENGTHS = {
    "one token": [1],
    "edges of a tile": [63, 64, 65, 127, 128, 129],
    "empty": [0, 3, 0, 0, 5, 0],
    "long among short": [2, 300, 1, 4],
    "many": [1] * 70,
}


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("mean", [True, False], ids=["mean", "cls"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_pool(kernels, lengths, dtype, mean):
    dim, cu_seqlens = 100, offsets(lengths)
    tokens = int(cu_seqlens[-1]) + 2  # tokens beyond the last offset belong to no sequence
    hidden = torch.randn(tokens, dim).to(dtype)
    ours, plain = kernels.pool(hidden, cu_seqlens, mean), reference(hidden, cu_seqlens, mean)
    assert_accurate(ours, plain, reference(hidden.double(), cu_seqlens, mean), "pooled")
    dpooled = torch.randn(len(lengths), dim)
    ours = kernels.pool_bwd(dpooled, cu_seqlens, tokens, mean, dtype)
    plain = reference_bwd(dpooled, cu_seqlens, tokens, mean, dtype)
    truth = reference_bwd(dpooled.double(), cu_seqlens, tokens, mean, torch.float64)
    assert_accurate(ours, plain, truth, "dhidden")


@pytest.mark.parametrize("mean", [True, False], ids=["mean", "cls"])
def test_sequences_do_not_depend_on_the_batch(kernels, mean):
    lengths = LENGTHS["edges of a tile"]
    hidden = torch.randn(sum(lengths), 96)
    together = kernels.pool(hidden, offsets(lengths), mean)
    for pooled, part in zip(together, hidden.split(lengths), strict=True):
        assert torch.equal(kernels.pool(part, offsets([len(part)]), mean)[0], pooled)


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_no_tokens(kernels, lengths):
    cu_seqlens = offsets(lengths)
    pooled = kernels.pool(torch.randn(0, 96), cu_seqlens, True)
    assert torch.equal(pooled, torch.zeros(len(lengths), 96))
    assert kernels.pool_bwd(pooled, cu_seqlens, 0, True, torch.float16).shape == (0, 96)
    unowned = kernels.pool_bwd(pooled, cu_seqlens, 3, True, torch.float16)
    assert torch.equal(unowned, torch.zeros(3, 96, dtype=torch.float16))


def test_offsets_beyond_the_tokens_read_nothing_there(kernels):
    # On a GPU offsets are not checked; the sanitizer would see a read outside hidden.
    kernels.pool(torch.randn(5, 96), offsets([3, 7]), True)


def test_errors(kernels):
    with pytest.raises(TypeError, match="hidden must be float32, bfloat16 or float16"):
        kernels.pool(torch.randn(5, 96).double(), offsets([3, 2]), True)
