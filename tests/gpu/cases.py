"""Every op with inputs of NeoBERT's widths, as one function of its differentiable tensors.

`python tests/gpu/cases.py` runs all of them once, forward and backward, on few tokens:
test_sanitizer.py puts it under compute-sanitizer.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import neobert_kernels
from neobert_kernels import _compiled
from neobert_kernels._library import python_kernels_serve

DIM, HEADS, HEAD_DIM, WIDTH, VOCAB = 768, 12, 64, 2048, 30522
# DESIGN's lengths that break kernels: tile edges, one long among short, empty, single tokens.
LENGTHS = [1, 63, 64, 65, 0, 127, 128, 129, 1, 511, 513, 2000, 0]


class Case(NamedTuple):
    ours: Callable[..., tuple[Tensor, ...]]
    plain: Callable[..., tuple[Tensor, ...]]  # also takes float64
    inputs: tuple[Tensor, ...]  # the differentiable ones, in the dtype under test


def rotate(x, cos, sin, positions):
    cos, sin = (table.to(x.dtype if x.dtype == torch.float64 else torch.float32)[positions]
                .unsqueeze(1) for table in (cos, sin))  # fmt: skip
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return rotated.flatten(-2).to(x.dtype)


def rotate_qkv(qkv, *table):
    q, k, v = qkv.unbind(2)
    return torch.stack([rotate(q, *table), rotate(k, *table), v], 2)


def plain_norm(x, weight):
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), 1e-5).to(x.dtype)


def plain_add_norm(x, stream, weight):
    total = stream + x.to(stream.dtype)
    return plain_norm(total, weight).to(x.dtype), total


def plain_swiglu(gate_up):
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def plain_pool(hidden, cu_seqlens, mode):
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    rows = wide.split(cu_seqlens.diff().tolist())
    take = (lambda r: r.mean(0)) if mode == "mean" else (lambda r: r[0])
    return torch.stack([take(r) if len(r) else wide.new_zeros(wide.shape[1]) for r in rows])


def plain_loss(hidden, weight, bias, labels):
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


def plain_attention(q, k, v, lengths):
    """softmax(q kᵀ / sqrt(head_dim)) v of each sequence, rounded as PyTorch does at each step."""
    outs = []
    for qs, ks, vs in zip(*(t.split(lengths) for t in (q, k, v)), strict=True):
        qs, ks, vs = (t.transpose(0, 1) for t in (qs, ks, vs))
        weights = torch.softmax(qs @ ks.transpose(1, 2) * q.shape[-1] ** -0.5, -1)
        outs.append((weights @ vs).transpose(0, 1))
    return torch.cat(outs)


def make(dtype: torch.dtype, lengths: list[int], device: str) -> dict[str, Case]:
    """The cases, by name. Residual streams are float32; the norm's gain and the head's tensors
    are of the dtype under test."""
    tokens = sum(lengths)

    def randn(*shape, scale=1.0, dtype=dtype):
        return (scale * torch.randn(shape, device=device)).to(dtype)

    x, gain = randn(tokens, DIM), 1 + randn(DIM, scale=0.1)
    stream = randn(tokens, DIM, dtype=torch.float32)
    angles = torch.outer(torch.arange(4096.0), 1e4 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM))
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    table = (angles.cos().to(device), angles.sin().to(device), positions)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    labels = torch.randint(VOCAB, (tokens,), device=device)
    labels[torch.rand(tokens, device=device) > 0.2] = -100
    labels[0] = 17
    cases = {
        "rms_norm": Case(neobert_kernels.rms_norm, plain_norm, (x, gain)),
        "add_rms_norm": Case(neobert_kernels.add_rms_norm, plain_add_norm, (x, stream, gain)),
        "swiglu": Case(neobert_kernels.swiglu, plain_swiglu, (randn(tokens, 2 * WIDTH),)),
        "rotary": Case(
            lambda q: neobert_kernels.apply_rotary(q, *table),
            lambda q: rotate(q, *table),
            (randn(tokens, HEADS, HEAD_DIM),),
        ),
        "rotary_qkv": Case(
            lambda qkv: neobert_kernels.apply_rotary_qkv_(1 * qkv, *table),
            lambda qkv: rotate_qkv(qkv, *table),
            (randn(tokens, HEADS, 3, HEAD_DIM),),
        ),
        "linear_cross_entropy": Case(
            lambda h, w, b: neobert_kernels.linear_cross_entropy(h, w, b, labels),
            lambda h, w, b: plain_loss(h, w, b, labels),
            (x, randn(VOCAB, DIM, scale=DIM**-0.5), randn(VOCAB, scale=0.1)),
        ),
    }
    attention = (cu_seqlens, max(lengths))
    cases["attention"] = Case(
        lambda q, k, v: neobert_kernels.varlen_attention(q, k, v, *attention),
        lambda q, k, v: plain_attention(q, k, v, lengths),
        tuple(randn(tokens, HEADS, HEAD_DIM) for _ in range(3)),
    )
    cases["attention_qkv"] = Case(
        lambda qkv: neobert_kernels.varlen_attention_qkv(qkv, *attention),
        lambda qkv: plain_attention(*qkv.unbind(2), lengths),
        (randn(tokens, HEADS, 3, HEAD_DIM),),
    )
    for mode in ("mean", "cls"):
        cases[f"pool_{mode}"] = Case(
            lambda h, mode=mode: neobert_kernels.pool(h, cu_seqlens, mode),
            lambda h, mode=mode: plain_pool(h, cu_seqlens, mode),
            (x,),
        )
    return cases


def run(fn: Callable, inputs: tuple[Tensor, ...], wide: bool = False) -> list[Tensor]:
    """fn's outputs and the gradients of `inputs`, for fixed gradients of the outputs; all in
    float64 if `wide`."""
    leaves = [t.detach().to(torch.float64 if wide else t.dtype).requires_grad_() for t in inputs]
    outputs = fn(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    # Of values that half precision holds exactly, so that both precisions get the same.
    gradients = [
        torch.randint(-8, 9, t.shape, generator=generator, device=t.device).to(t.dtype) / 8
        for t in outputs
    ]
    return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, leaves, gradients)]


def run_all() -> None:
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        for dtype in (torch.bfloat16, torch.float32):
            for name, case in make(dtype, [1, 0, 65, 7, 150], "cuda").items():
                run(case.ours, case.inputs)
                print(name, dtype)
    torch.cuda.synchronize()


if __name__ == "__main__":
    run_all()
    if _compiled.CUDA_LOADED:
        with python_kernels_serve("CUDA"):
            run_all()
