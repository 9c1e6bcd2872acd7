"""batch_invariant=True on the GPU: accuracy of its product, and bits that ignore the batch."""

import pytest
import torch
from accuracy import assert_accurate

from neobert.encode import Encoder
from neobert_kernels import linear, linear_swiglu
from neobert_kernels._library import has_kernel
from neobert_kernels.linear import reference
from tests.batch_invariance import differing_texts, real_texts, write_wide_checkpoint

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = {"qkv": (2304, 768), "wo": (768, 768), "w12": (4096, 768), "w3": (768, 2048)}


def operands(rows, shape, dtype):
    x, weight = torch.randn(rows, shape[1]), torch.randn(shape) * shape[1] ** -0.5
    return x.to("cuda", dtype), weight.to("cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_accuracy(shape, dtype):
    assert has_kernel("batch_invariant_linear", "CUDA")
    x, weight = operands(515, shape, dtype)
    truth, plain = x.double() @ weight.double().t(), x @ weight.t()
    ours = linear(x, weight, batch_invariant=True)
    assert_accurate(ours.flatten(), plain.flatten(), truth.flatten(), "y")
    residual = torch.randn(515, shape[0], device="cuda")
    ours = linear(x, weight, residual, batch_invariant=True)
    plain, truth = reference(x, weight, residual), truth + residual.double()
    assert_accurate(ours.flatten(), plain.flatten(), truth.flatten(), "y + residual")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_rows_bits_are_its_own(shape, dtype):
    x, weight = operands(3000, shape, dtype)
    together = linear(x, weight, batch_invariant=True)
    gated = linear_swiglu(x, weight, batch_invariant=True)
    for count in (1, 2, 7, 16, 63, 64, 127, 128, 129, 500, 1024, 2999):
        for start in {0, 1, 3000 - count}:
            at = slice(start, start + count)
            assert torch.equal(linear(x[at], weight, batch_invariant=True), together[at])
            assert torch.equal(linear_swiglu(x[at], weight, batch_invariant=True), gated[at])
    order = torch.randperm(3000, device="cuda")
    assert torch.equal(linear(x[order], weight, batch_invariant=True), together[order])


@pytest.mark.no_poison  # of captured graphs
@pytest.mark.filterwarnings("ignore::neobert.encode.TruncationWarning")
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_real_texts_in_random_batches(tmp_path, dtype, cuda_graphs):
    path = write_wide_checkpoint(tmp_path, layers=4)
    encoder = Encoder.from_pretrained(
        path, "cuda", dtype, cuda_graphs=cuda_graphs, batch_invariant=True
    )
    assert differing_texts(encoder, real_texts(60), 200, [1]) == 0
    if cuda_graphs:  # and the bits are those without graphs
        eager = Encoder.from_pretrained(path, "cuda", dtype, batch_invariant=True)
        texts = real_texts(60)
        assert (encoder.encode(texts[:9]) == eager.encode(texts[:9])).all()
