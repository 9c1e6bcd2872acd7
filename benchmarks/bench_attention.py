"""Varlen attention at NeoBERT's shape, 12 heads of 64, over sequences of one length and of
lognormal lengths.

GFLOP/s counts what the live tokens need: 4 * 64 L² per head forward and 2.5 times that backward;
share_of_matmul is of the rate of a large matrix product in the same run. On the CPU against
PyTorch's SDPA: `sdpa-one-by-one` calls it for each sequence, `sdpa-padded` once on a batch that is
given to it padded, with its mask. On a GPU against the padded one, FlexAttention with a document
mask, FlashAttention-2 (PyTorch's `varlen_attn`), and FlashAttention-3 and xformers if installed;
`ours-one-order` is our backward under `torch.use_deterministic_algorithms`, without which the GPU
sums dq by atomics.
"""

import math
import statistics
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from compare import DEVICE, HEAD_DIM, HEADS
from timing import cuda_seconds, median_seconds
from torch import Tensor

from neobert_kernels import varlen_attention_qkv

GPU = DEVICE == "cuda"
BATCH = 32768 if GPU else 2400  # tokens
SHAPES = ["lognormal", "32", "128", "512", "2048"]
DTYPES = [torch.float32, torch.bfloat16]
METHODS = ["ours", "sdpa-one-by-one", "sdpa-padded"]
# Packages beyond PyTorch, and the module to import.
PACKAGES = {"fa3": "flash_attn_interface", "xformers": "xformers"}
if GPU:
    SHAPES = ["lognormal", *(str(2**n) for n in range(5, 14))]
    DTYPES = [torch.bfloat16]
    METHODS = ["ours", "sdpa-padded", "flex", "fa2"]
    METHODS += [name for name, module in PACKAGES.items() if find_spec(module)]
# Each of FlexAttention's shapes takes a compilation: only some of them.
FLEX_SHAPES = ("lognormal", "128", "512", "2048")
CASES = [(m, s) for m in METHODS for s in SHAPES if m != "flex" or s in FLEX_SHAPES]


def lengths_of(shape: str) -> list[int]:
    if shape != "lognormal":
        return [int(shape)] * (BATCH // int(shape))
    median, longest = (200, 4096) if GPU else (50, 512)
    normal = torch.randn(200 if not GPU else 1000, generator=torch.manual_seed(1))
    lengths = torch.exp(math.log(median) + 1.1 * normal).clamp(8, longest).int()
    return lengths[: int((lengths.cumsum(0) < BATCH).sum()) + 1].tolist()


def ours(qkv: Tensor, lengths: list[int], cu_seqlens: Tensor) -> tuple[Callable, list[Tensor]]:
    return lambda: varlen_attention_qkv(qkv, cu_seqlens, max(lengths)), [qkv]


def sdpa_one_by_one(qkv: Tensor, lengths: list[int], _) -> tuple[Callable, list[Tensor]]:
    # A leaf per sequence: slicing one tensor would cost SDPA a full-size gradient for each.
    leaves = [s.permute(2, 1, 0, 3).unsqueeze(1).detach() for s in qkv.split(lengths)]
    return lambda: [F.scaled_dot_product_attention(*s) for s in leaves], leaves


def sdpa_padded(qkv: Tensor, lengths: list[int], _) -> tuple[Callable, list[Tensor]]:
    padded = qkv.new_zeros(3, len(lengths), HEADS, max(lengths), HEAD_DIM)
    keep = torch.zeros(len(lengths), 1, 1, max(lengths), dtype=torch.bool, device=qkv.device)
    for i, (length, s) in enumerate(zip(lengths, qkv.split(lengths), strict=True)):
        padded[:, i, :, :length], keep[i, ..., :length] = s.permute(2, 1, 0, 3), True
    # Without a mask PyTorch may choose its fastest kernels, cuDNN's among them.
    mask = None if GPU and min(lengths) == max(lengths) else keep
    return lambda: F.scaled_dot_product_attention(*padded, attn_mask=mask), [padded]


def flex(qkv: Tensor, lengths: list[int], _) -> tuple[Callable, list[Tensor]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    counts = torch.tensor(lengths, device=qkv.device)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=qkv.device), counts)

    def same(batch, head, q, k):
        return document[q] == document[k]

    # Its mask is made once for all layers of a model, and is not timed.
    mask = create_block_mask(same, None, None, len(qkv), len(qkv), qkv.device)
    torch._dynamo.reset()  # beyond a few shapes it would be run uncompiled
    attend = torch.compile(flex_attention)
    leaf = qkv.permute(2, 1, 0, 3).unsqueeze(1).contiguous()
    return lambda: attend(*leaf, block_mask=mask), [leaf]


def fa2(qkv: Tensor, lengths: list[int], cu_seqlens: Tensor) -> tuple[Callable, list[Tensor]]:
    from torch.nn.attention.varlen import varlen_attn

    # Separate, so that its backward need not pack the gradients.
    leaves = [t.contiguous() for t in qkv.unbind(2)]
    bounds = (cu_seqlens, cu_seqlens, max(lengths), max(lengths))
    return lambda: varlen_attn(*leaves, *bounds), leaves


def fa3(qkv: Tensor, lengths: list[int], cu_seqlens: Tensor) -> tuple[Callable, list[Tensor]]:
    attend = import_module(PACKAGES["fa3"]).flash_attn_varlen_func
    leaves = [t.contiguous() for t in qkv.unbind(2)]
    bounds = (cu_seqlens, cu_seqlens, max(lengths), max(lengths))

    def run():
        out = attend(*leaves, *bounds)
        return out[0] if isinstance(out, tuple) else out  # some releases add the log-sum-exp

    return run, leaves


def xformers(qkv: Tensor, lengths: list[int], _) -> tuple[Callable, list[Tensor]]:
    ops = import_module("xformers.ops")
    leaves = [t.contiguous().unsqueeze(0) for t in qkv.unbind(2)]
    mask = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(lengths)
    return lambda: ops.memory_efficient_attention(*leaves, attn_bias=mask), leaves


IMPLEMENTATIONS = {
    "ours": ours,
    "ours-one-order": ours,
    "sdpa-one-by-one": sdpa_one_by_one,
    "sdpa-padded": sdpa_padded,
    "flex": flex,
    "fa2": fa2,
    "fa3": fa3,
    "xformers": xformers,
}


def make(method: str, lengths: list[int], dtype: torch.dtype) -> tuple[Callable, list[Tensor]]:
    """A function that attends, and the tensors it reads."""
    qkv = torch.randn(sum(lengths), HEADS, 3, HEAD_DIM, device=DEVICE).to(dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)
    return IMPLEMENTATIONS[method](qkv, lengths, cu_seqlens)


@cache
def matmul_flop_per_second(dtype: torch.dtype) -> float:
    """The rate of a large product, which no attention kernel can beat."""
    n = 8192 if GPU else 2048
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    seconds = (
        statistics.median(cuda_seconds(lambda: a @ b)) if GPU else median_seconds(lambda: a @ b)
    )
    return 2 * n**3 / seconds


def measure_flop(measure, benchmark, fn: Callable, flop: int, dtype: torch.dtype) -> None:
    seconds = measure(fn, flop=flop)
    if not math.isnan(seconds):
        share = flop / seconds / matmul_flop_per_second(dtype)
        benchmark.extra_info["share_of_matmul"] = round(share, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("method", "shape"), CASES)
def test_forward(measure, benchmark, method, shape, dtype):
    lengths = lengths_of(shape)
    attend, _ = make(method, lengths, dtype)
    with torch.inference_mode():
        flop = 4 * HEADS * HEAD_DIM * sum(n * n for n in lengths)
        measure_flop(measure, benchmark, attend, flop, dtype)


@pytest.fixture
def one_order(request):
    """For the method of that name: backwards that sum in a fixed order, run after run."""
    torch.use_deterministic_algorithms(request.getfixturevalue("method") == "ours-one-order")
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("one_order")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("method", "shape"), CASES + [("ours-one-order", shape) for shape in SHAPES if GPU]
)
def test_backward(measure, benchmark, method, shape, dtype):
    lengths = lengths_of(shape)
    attend, leaves = make(method, lengths, dtype)
    for leaf in leaves:
        leaf.requires_grad_()
    out = attend()
    outs = out if isinstance(out, list) else [out]
    douts = [torch.randn_like(o) for o in outs]
    flop = 10 * HEADS * HEAD_DIM * sum(n * n for n in lengths)
    measure_flop(
        measure,
        benchmark,
        lambda: torch.autograd.grad(outs, leaves, douts, retain_graph=True),
        flop,
        dtype,
    )
