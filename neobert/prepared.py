"""A NeoBERT prepared for inference: five launches a layer, nothing pointwise between them.

The weights are those of the model, in memory only, laid out for the ops of
`neobert_kernels.epilogue`: the norms' gains folded into qkv and w12, the rows of w12 as gate and up
in turn. The model itself, and so whatever is saved of it, stays in the released format.
"""

from typing import Any

import torch
from torch import Tensor, nn

from neobert.layers import NeoBERTBlock, bare_weights, check_bare
from neobert.model import NeoBERT
from neobert.packing import PackedBatch
from neobert_kernels import sum_of_squares
from neobert_kernels.epilogue import fold_gain, interleave_gate_up
from neobert_kernels.linear import autocast_dtype
from neobert_kernels.unchecked import (
    linear_add,
    rms_linear_rotary,
    rms_linear_swiglu,
    varlen_attention_qkv,
)


class PreparedNeoBERT(nn.Module):
    """The encoder of a NeoBERT as it is now, for inference on packed sequences.

    On a GPU the ops are Triton kernels; on a CPU plain PyTorch serves them, slower than the model
    itself. The residual stream is in the dtype of the embedding, and autocast changes nothing.

    model: shares its embedding, wo, w3, final norm and rotary table with this; qkv and w12 are
        copied, 275 MB in bfloat16. After a change of the model's weights, prepare it anew.
    Raises ValueError for a model with a module in a block that does more than multiply by its
        weight: an adapter, a quantiser, a hook.
    """

    def __init__(self, model: NeoBERT):
        super().__init__()
        self.config = model.config
        self.encoder = model.encoder
        self.rotary = model.rotary
        self.layers = nn.ModuleList(
            _PreparedBlock(f"transformer_encoder.{number}", block)
            for number, block in enumerate(model.transformer_encoder)
        )
        self.layer_norm = model.layer_norm

    @torch.no_grad()
    def forward(self, batch: PackedBatch) -> Tensor:
        """(tokens, hidden_size), as NeoBERT's last_hidden_state of the packed batch.

        Raises ValueError for a sequence longer than config.max_length, IndexError for a token id or
        a position outside its table (CPU).
        """
        if batch.max_seqlen > self.config.max_length:
            raise ValueError(
                f"a sequence of {batch.max_seqlen} tokens is longer than the model's max_length,"
                f" {self.config.max_length}"
            )
        # In which plain PyTorch's products would be of another dtype.
        if autocast_dtype(batch.input_ids) is not None:
            with torch.autocast(batch.input_ids.device.type, enabled=False):
                return self(batch)
        hidden = self.encoder(batch.input_ids)
        squares = sum_of_squares(hidden)
        for layer in self.layers:
            hidden, squares = layer(hidden, squares, self.rotary.cos, self.rotary.sin, batch)
        return self.layer_norm(hidden)


class _PreparedBlock(nn.Module):
    def __init__(self, name: str, block: Any):
        super().__init__()
        check_bare(name, block, NeoBERTBlock)
        qkv, self.wo, w12, self.w3, attention_gain, ffn_gain = bare_weights(block, name)
        self.scale = block.scale
        self.attention_eps, self.ffn_eps = block.attention_norm.eps, block.ffn_norm.eps
        qkv, w12 = fold_gain(qkv, attention_gain), fold_gain(w12, ffn_gain)
        self.register_buffer("qkv", qkv.detach(), persistent=False)
        self.register_buffer("w12", interleave_gate_up(w12).detach(), persistent=False)

    def forward(
        self, hidden: Tensor, squares: Tensor, cos: Tensor, sin: Tensor, batch: PackedBatch
    ) -> tuple[Tensor, Tensor]:
        """The residual stream after the block, and its sums of squares, from those before it."""
        qkv = rms_linear_rotary(
            hidden, squares, self.qkv, cos, sin, batch.positions, self.attention_eps
        )
        attended = varlen_attention_qkv(qkv, batch.cu_seqlens, batch.max_seqlen, self.scale)
        hidden, squares = linear_add(attended.flatten(1), self.wo, hidden)
        gated = rms_linear_swiglu(hidden, squares, self.w12, self.ffn_eps)
        return linear_add(gated, self.w3, hidden)
