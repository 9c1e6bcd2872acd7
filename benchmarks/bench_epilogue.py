"""The layer's four GEMMs with their epilogues, and the layer, against the kernels they replace:
PyTorch's GEMM and our norm, rotary, SwiGLU and residual add beside it. On a GPU, for inference, and
the layer for training too.

An epilogue stays only where "fused" is at least 3 % faster than "separate" at every size.
"""

import pytest
import torch
from bench_rotary import tables
from compare import DEVICE, DIM, HEAD_DIM, HEADS, WIDTH

from neobert import NeoBERT, NeoBERTConfig
from neobert.fused import fuse_epilogues
from neobert.packing import PackedBatch
from neobert.prepared import PreparedNeoBERT
from neobert_kernels import (
    add_rms_norm,
    apply_rotary_qkv_,
    linear,
    linear_add,
    rms_linear_rotary,
    rms_linear_swiglu,
    rms_norm,
    sum_of_squares,
    swiglu,
)
from neobert_kernels.epilogue import fold_gain, interleave_gate_up

pytestmark = pytest.mark.skipif(DEVICE != "cuda", reason="the epilogue kernels are for GPUs")
TOKENS = (256, 1024, 4096, 16384, 65536)
LENGTH = 256  # tokens of a sequence


def weight(out_features: int, in_features: int) -> torch.Tensor:
    return (torch.randn(out_features, in_features) * in_features**-0.5).bfloat16()


def qkv(by, x, stream, gain):
    w = weight(3 * DIM, DIM)
    table = tables(len(x), LENGTH)
    if by == "fused":
        folded, squares = fold_gain(w, gain), sum_of_squares(x)
        return lambda: rms_linear_rotary(x, squares, folded, *table)
    shape = (len(x), HEADS, 3, HEAD_DIM)
    return lambda: apply_rotary_qkv_(linear(rms_norm(x, gain), w).view(shape), *table)


def w12(by, x, stream, gain):
    w = weight(2 * WIDTH, DIM)
    if by == "fused":
        folded, squares = interleave_gate_up(fold_gain(w, gain)), sum_of_squares(x)
        return lambda: rms_linear_swiglu(x, squares, folded)
    return lambda: swiglu(linear(rms_norm(x, gain), w))


def add(width, by, x, stream, gain):
    """The norm after it is counted with the GEMM that takes it: `qkv` or `w12`."""
    w, branch = weight(DIM, width), torch.randn(len(x), width).bfloat16()
    if by == "fused":
        return lambda: linear_add(branch, w, stream)
    return lambda: linear(branch, w, stream)


def add_norm(by, x, stream, gain):
    """wo and what leads to w12's input, the norm in the add's own pass."""
    w, branch = weight(DIM, DIM), torch.randn(len(x), DIM).bfloat16()
    if by == "fused":
        return lambda: linear_add(branch, w, stream)
    return lambda: add_rms_norm(linear(branch, w), stream, gain)


GEMMS = {
    "qkv": (qkv, 2 * DIM * 3 * DIM),
    "wo": (lambda *a: add(DIM, *a), 2 * DIM * DIM),
    "wo+norm": (add_norm, 2 * DIM * DIM),
    "w12": (w12, 2 * DIM * 2 * WIDTH),
    "w3": (lambda *a: add(WIDTH, *a), 2 * WIDTH * DIM),
}


@pytest.mark.parametrize("stream", ["bfloat16", "float32"])
@pytest.mark.parametrize("number", TOKENS)
@pytest.mark.parametrize("name", GEMMS)
@pytest.mark.parametrize("by", ["separate", "fused"])
def test_gemm(measure, by, name, number, stream):
    make, flop = GEMMS[name]
    if stream == "float32" and name in ("qkv", "w12"):
        pytest.skip("of these the stream's dtype is that of the norm's input alone")
    with torch.device(DEVICE), torch.inference_mode():
        x, gain = torch.randn(number, DIM).bfloat16(), torch.ones(DIM).bfloat16()
        call = make(by, x, torch.randn(number, DIM).to(getattr(torch, stream)), gain)
        measure(call, flop=number * flop)


@pytest.mark.parametrize("number", TOKENS)
@pytest.mark.parametrize("by", ["separate", "fused"])
def test_four_layers(measure, by, number):
    """What decides: the encoder without and with fused epilogues, four layers of it."""
    with torch.device(DEVICE), torch.inference_mode():
        model = NeoBERT(NeoBERTConfig(num_hidden_layers=4)).bfloat16().eval()
        cu_seqlens = torch.arange(0, number + 1, LENGTH, dtype=torch.int32)
        ids, positions = torch.randint(1, 30000, (number,)), torch.arange(number) % LENGTH
        batch = PackedBatch(ids, positions, cu_seqlens, LENGTH)
        prepared = PreparedNeoBERT(model)

        def separate():
            return model(
                input_ids=ids[None],
                position_ids=positions[None],
                cu_seqlens=cu_seqlens,
                max_seqlen=LENGTH,
            )

        gemms = 2 * DIM * (3 * DIM + DIM + 2 * WIDTH + WIDTH)
        flop = 4 * number * (gemms + 4 * LENGTH * DIM)
        measure(separate if by == "separate" else lambda: prepared(batch), flop=flop)


@pytest.mark.parametrize("how", ["bfloat16 by autocast", "bfloat16"])
@pytest.mark.parametrize("number", TOKENS[1:])
@pytest.mark.parametrize("by", ["separate", "fused"])
def test_four_layers_training(measure, by, number, how):
    """Forward and backward of the encoder without and with fused epilogues, as the trainer runs it
    (float32 weights and residual stream, autocast) and all in bfloat16."""
    autocast = how.endswith("autocast")
    with torch.device(DEVICE):
        model = NeoBERT(NeoBERTConfig(num_hidden_layers=4)).train()
        model.to(torch.float32 if autocast else torch.bfloat16)
        if by == "fused":
            fuse_epilogues(model)
        inputs = {
            "input_ids": torch.randint(1, 30000, (1, number)),
            "position_ids": (torch.arange(number) % LENGTH)[None],
            "cu_seqlens": torch.arange(0, number + 1, LENGTH, dtype=torch.int32),
            "max_seqlen": LENGTH,
        }
        parameters = list(model.transformer_encoder.parameters())

        def step():
            with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
                hidden = model(**inputs).last_hidden_state
            # Not the embedding's, whose scatter would be timed beside the layers.
            torch.autograd.grad(hidden, parameters, hidden.detach())

        gemms = 2 * DIM * (3 * DIM + DIM + 2 * WIDTH + WIDTH)
        flop = 4 * number * (3 * gemms + 3.5 * 4 * LENGTH * DIM)
        measure(step, flop=flop)
