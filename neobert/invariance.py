"""Batch invariance: the same sequence gets the same bits alone, in any batch and in any order.

Every op but one gives a row, a sequence or an element bits that depend on it alone: attention goes
by the length of each sequence, norms and pooling sum in one order, the rest is elementwise. The
exception are matrix products where a library computes them, on a GPU and on CPUs with AMX: it
chooses how to sum by the number of rows. So there the projections take kernels of one tile shape
and one order of summation instead.
"""

from torch import Tensor, nn

from neobert.layers import Linear, NeoBERTBlock, RMSNorm, RotaryTable, SwiGLU, is_bare
from neobert.model import NeoBERT
from neobert_kernels import rms_norm
from neobert_kernels._library import has_kernel

# Whose forward consists of the ops below, and of copies.
_MODULES = {
    NeoBERT,
    nn.Embedding,
    RotaryTable,
    nn.ModuleList,
    NeoBERTBlock,
    SwiGLU,
    RMSNorm,
    Linear,
}
_OPS = ("rms_norm", "rotary_qkv_", "varlen_attention", "pool")
_PRODUCTS = {"cpu": ("linear", "linear_swiglu"), "cuda": ("batch_invariant_linear", "swiglu")}


def make_batch_invariant(model: NeoBERT) -> None:
    """Has the model's projections computed batch-invariantly from now on.

    Raises ValueError where the bits cannot be promised: a device without the kernels, whose
    references are PyTorch's own ops; modules that are not this package's own (adapters, quantisers)
    or are hooked, offloaded or compiled, which may compute anything.
    """
    kind = model.device.type
    if kind not in _PRODUCTS:
        raise ValueError(f"batch_invariant: the model is on {kind}; it must be on cpu or cuda")
    missing = [op for op in (*_OPS, *_PRODUCTS[kind]) if not has_kernel(op, kind.upper())]
    if missing:
        raise ValueError(
            f"batch_invariant: {', '.join(missing)} have no kernel for {kind} here, and PyTorch's "
            "own ops promise no bits (`python -m neobert_kernels` says what serves and why)"
        )
    if model.fused_epilogues:
        raise ValueError(
            "batch_invariant: the model has fused epilogues, which do not promise bits"
        )
    for name, module in model.named_modules():
        compiled = module._compiled_call_impl is not None
        if type(module) not in _MODULES or not is_bare(module, type(module)) or compiled:
            raise ValueError(
                f"batch_invariant: the module {name or 'model'!r}, {type(module).__name__}, is "
                "replaced, hooked or compiled; its bits may depend on the batch"
            )
    for module in model.modules():
        if isinstance(module, Linear):
            module.batch_invariant = True


def unit_length(rows: Tensor) -> Tensor:
    """(n, dim) float32 rows at length 1, or zeros. By the norm op: one pass, and each row's sum in
    an order of its own, where torch's reduction goes by the number of rows."""
    dim = rows.shape[-1]
    return rms_norm(rows, rows.new_full((dim,), dim**-0.5), 1e-24 / dim)
