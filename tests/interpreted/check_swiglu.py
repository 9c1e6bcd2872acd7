"""swiglu and its backward in Triton's interpreter."""

import pytest
import torch
from accuracy import assert_accurate

from neobert_kernels.swiglu import reference, reference_bwd

# (rows, width): NeoBERT's; one that is cut into columns; ragged ones; one element.
SHAPES = [(3, 2048), (2, 3072), (5, 1536), (67, 40), (3, 5, 129), (1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu(kernels, shape, dtype):
    gate_up = (3 * torch.randn(*shape[:-1], 2 * shape[-1])).to(dtype)
    gate_up[..., 0], gate_up[..., -1] = -200.0, 3.0
    gate_up[0, ..., 0] = 200.0  # exponentials overflow on either side
    dy = torch.randn(shape).to(dtype)
    truth = reference(gate_up.double())
    assert_accurate(kernels.swiglu(gate_up), reference(gate_up), truth, "y")
    saved = gate_up.clone()
    ours = kernels.swiglu_bwd(dy, gate_up)
    truth = reference_bwd(dy.double(), gate_up.double())
    assert_accurate(ours, reference_bwd(dy, gate_up), truth, "dgate_up")
    assert torch.equal(gate_up, saved), "the backward must not overwrite what was saved"


def test_strided_input(kernels):
    gate_up, dy = torch.randn(3, 2, 80)[:, 1], torch.randn(40).expand(3, 40)
    ours, contiguous = kernels.swiglu(gate_up), kernels.swiglu(gate_up.contiguous())
    assert torch.equal(ours, contiguous)
    ours = kernels.swiglu_bwd(dy, gate_up)
    assert torch.equal(ours, kernels.swiglu_bwd(dy.contiguous(), gate_up.contiguous()))


def test_no_rows(kernels):
    assert kernels.swiglu(torch.randn(0, 80)).shape == (0, 40)
    assert kernels.swiglu_bwd(torch.randn(0, 40), torch.randn(0, 80)).shape == (0, 80)


def test_errors(kernels):
    with pytest.raises(TypeError, match="gate_up must be float32, bfloat16 or float16"):
        kernels.swiglu(torch.randn(2, 80, dtype=torch.float64))
