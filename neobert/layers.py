"""The encoder's layers, on packed tensors: (tokens, dim) in, (tokens, dim) out."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from neobert.config import NeoBERTConfig
from neobert.packing import PaddedLayout, sequence_of_token, unpack_padded
from neobert_kernels import epilogue_training, swiglu
from neobert_kernels.unchecked import (
    apply_rotary_qkv_,
    linear,
    linear_swiglu,
    rms_norm,
    rotary_attention_,
    varlen_attention_qkv,
)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm by the fused op; sums in float32 whatever the dtype."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """A projection without bias that can add itself to the residual stream.

    batch_invariant: see `neobert_kernels.linear`; `neobert.invariance` sets it.
    """

    batch_invariant = False

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return linear(x, self.weight, residual, self.batch_invariant)


def is_bare(module: nn.Module, cls: type[nn.Module] = Linear) -> bool:
    """Whether calling `module` does nothing but use its weight, so that a fused op may take it.

    Adapters (LoRA) and quantisers replace the module, offloading replaces its forward, and
    profilers and interpreters hook it; each must be called, not bypassed.
    """
    hooked = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _has_any_global_hook()
    )
    return type(module) is cls and not hooked and "forward" not in module.__dict__


def bare_weight(module: nn.Module, cls: type[nn.Module] = Linear) -> Tensor | None:
    """The weight of a bare module; None if it must be called, or keeps its weight elsewhere.

    Calling a module and asking it for an attribute, both of which run Python of torch.nn, take the
    host as long as an op. So blocks ask this first, and find their modules in `_modules`.
    """
    return module._parameters.get("weight") if is_bare(module, cls) else None


def norm(module: Any, x: Tensor) -> Tensor:
    """module(x), for a norm."""
    weight = bare_weight(module, RMSNorm)
    return module(x) if weight is None else rms_norm(x, weight, module.eps)


def project(module: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """module(x), plus the residual stream where one is given: in one op if `module` is ours."""
    weight = bare_weight(module)
    if weight is not None:
        return linear(x, weight, residual, module.batch_invariant)
    if residual is None:
        return module(x)
    if isinstance(module, Linear):
        return module(x, residual)
    return (residual + module(x)).to(residual.dtype)


class SwiGLU(nn.Module):
    """residual + w3(silu(gate) * up), with [gate, up] = w12(x) (Shazeer 2020, eq. 6)."""

    def __init__(self, config: NeoBERTConfig):
        super().__init__()
        self.w12 = Linear(config.hidden_size, 2 * config.swiglu_width)
        self.w3 = Linear(config.swiglu_width, config.hidden_size)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        modules: Any = self._modules
        w12 = modules["w12"]
        weight = bare_weight(w12)
        if weight is None:
            gated = swiglu(w12(x))
        else:
            gated = linear_swiglu(x, weight, w12.batch_invariant)
        return project(modules["w3"], gated, residual)


def rotary_frequencies(config: NeoBERTConfig) -> tuple[Tensor, float]:
    """(head_dim / 2,) float64 radians per position, and the factor on cos and sin (YaRN's)."""
    head_dim = config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    if rope["rope_type"] in ("dynamic", "longrope"):
        raise ValueError(
            f"rope_type {rope['rope_type']!r} changes the rotation with the longest sequence of a "
            "batch and is not served; use 'default', 'linear', 'yarn', 'llama3' or 'proportional'"
        )
    if rope["rope_type"] == "default":
        frequencies = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2).double() / head_dim)
        scale = 1.0
    else:
        frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and rope["rope_type"] != "proportional":
        raise ValueError(
            "rope_parameters has partial_rotary_factor "
            f"{rope['partial_rotary_factor']}, but NeoBERT rotates all of head_dim {head_dim}"
        )
    return frequencies.double(), scale


class RotaryTable(nn.Module):
    """cos and sin, (max_length, head_dim / 2) float32, of every angle the model may need.

    Computed in float64 and rounded once. Never in a checkpoint, never in another dtype, and made
    anew whenever the model is moved: loading on the meta device leaves buffers uninitialised.
    """

    def __init__(self, config: NeoBERTConfig):
        super().__init__()
        self.config = config
        shape = config.max_length, config.hidden_size // config.num_attention_heads // 2
        self.register_buffer("cos", torch.empty(shape, dtype=torch.float32), persistent=False)
        self.register_buffer("sin", torch.empty(shape, dtype=torch.float32), persistent=False)
        self.fill()

    @torch.no_grad()
    def fill(self) -> None:
        if self.cos.is_meta:
            return
        with torch.device("cpu"):
            frequencies, scale = rotary_frequencies(self.config)
            angles = torch.outer(torch.arange(self.config.max_length).double(), frequencies)
            self.cos.copy_(angles.cos() * scale)
            self.sin.copy_(angles.sin() * scale)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.cos.dtype != torch.float32:
            self.cos, self.sin = self.cos.float(), self.sin.float()
        self.fill()
        return self


class NeoBERTBlock(GradientCheckpointingLayer):
    """A pre-norm transformer block: attention, then SwiGLU, each added to the residual stream."""

    def __init__(self, config: NeoBERTConfig):
        super().__init__()
        dim, self.heads = config.hidden_size, config.num_attention_heads
        self.head_dim = dim // self.heads
        self.scale = self.head_dim**-0.5
        self.attention_norm = RMSNorm(dim, config.norm_eps)
        self.qkv = Linear(dim, 3 * dim)
        self.wo = Linear(dim, dim)
        self.ffn_norm = RMSNorm(dim, config.norm_eps)
        self.ffn = SwiGLU(config)

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        tokens_to_keep: Tensor | None = None,
        squares: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens_to_keep: (kept,) int64; what lies after the attention is computed for these tokens
            alone, and (kept, dim) returned.
        squares: `sum_of_squares` of hidden. With it the block is computed by the ops of
            `neobert_kernels.epilogue_training`, and those of what it returns are returned too. (Two
            tensors rather than one pair of them: reentrant checkpointing looks into no argument.)
        """
        if squares is not None:
            return self._fused(
                hidden, squares, cos, sin, positions, cu_seqlens, max_seqlen, tokens_to_keep
            )
        modules: Any = self._modules
        qkv = project(modules["qkv"], norm(modules["attention_norm"], hidden))
        attended = rotary_attention_(
            qkv, self.heads, cos, sin, positions, cu_seqlens, max_seqlen, self.scale
        )
        attended = attended.flatten(1)
        if tokens_to_keep is not None:
            attended = attended.index_select(0, tokens_to_keep)
            hidden = hidden.index_select(0, tokens_to_keep)
        hidden = project(modules["wo"], attended, hidden)
        return modules["ffn"](norm(modules["ffn_norm"], hidden), hidden)

    def _fused(
        self,
        hidden: Tensor,
        squares: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        tokens_to_keep: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        qkv, wo, w12, w3, attention_norm, ffn_norm = bare_weights(self)
        rotated, hidden = epilogue_training.norm_linear_rotary(
            hidden, squares, qkv, attention_norm, cos, sin, positions, self.attention_norm.eps
        )
        attended = varlen_attention_qkv(rotated, cu_seqlens, max_seqlen, self.scale).flatten(1)
        if tokens_to_keep is not None:
            attended = attended.index_select(0, tokens_to_keep)
            hidden = hidden.index_select(0, tokens_to_keep)
        hidden, squares = epilogue_training.linear_add(attended, wo, hidden)
        gated, hidden = epilogue_training.norm_linear_swiglu(
            hidden, squares, w12, ffn_norm, self.ffn_norm.eps
        )
        return epilogue_training.linear_add(gated, w3, hidden)

    def rotated_qkv(self, hidden: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        """(tokens, heads, 3, head_dim): the projection packs [q, k, v] per head."""
        modules: Any = self._modules
        qkv = project(modules["qkv"], norm(modules["attention_norm"], hidden))
        qkv = qkv.view(-1, self.heads, 3, self.head_dim)
        return apply_rotary_qkv_(qkv, cos, sin, positions)

    def attention_probabilities(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, layout: PaddedLayout
    ) -> Tensor:
        """(batch, heads, length, length) softmax of the scores, zeros to and from padding.

        For whoever asks for attentions: the matrix that the fused op never makes, computed beside
        it from the same q and k.
        """
        q, k, _ = self.rotated_qkv(hidden, cos, sin, positions).unbind(2)
        q, k = (unpack_padded(t, layout).transpose(1, 2).float() for t in (q, k))
        sequence = sequence_of_token(layout.cu_seqlens, hidden.shape[0]) + 1
        sequence = unpack_padded(sequence, layout).unsqueeze(1)
        attends = (sequence.unsqueeze(3) == sequence.unsqueeze(2)) & (sequence.unsqueeze(2) > 0)
        scores = q @ k.transpose(2, 3) * self.scale
        # Not -inf: a padded row's softmax would be NaN, and so would every gradient through it.
        scores = scores.masked_fill(~attends, torch.finfo(scores.dtype).min)
        return scores.softmax(-1).masked_fill(~attends, 0.0).to(hidden.dtype)


def bare_weights(block: NeoBERTBlock, name: str = "block") -> tuple[Tensor, ...]:
    """The weights of qkv, wo, w12 and w3 and the gains of attention_norm and ffn_norm, for ops that
    take them in the place of the modules.

    Raises ValueError for a module that does more than use its weight; `name` is that of the block.
    """
    modules: Any = block._modules
    ffn = modules["ffn"]
    check_bare(f"{name}.ffn", ffn, SwiGLU)
    found = []
    for part, module, cls in (
        ("qkv", modules["qkv"], Linear),
        ("wo", modules["wo"], Linear),
        ("ffn.w12", ffn._modules["w12"], Linear),
        ("ffn.w3", ffn._modules["w3"], Linear),
        ("attention_norm", modules["attention_norm"], RMSNorm),
        ("ffn_norm", modules["ffn_norm"], RMSNorm),
    ):
        check_bare(f"{name}.{part}", module, cls)
        found.append(module.weight)
    return tuple(found)


def check_bare(name: str, module: nn.Module, cls: type[nn.Module]) -> None:
    """Raises ValueError unless `is_bare`."""
    if not is_bare(module, cls):
        raise ValueError(
            f"{name} must be a bare {cls.__name__}, since fused epilogues use its weight alone; it"
            f" is a {type(module).__name__}, or one with hooks or another forward"
        )
