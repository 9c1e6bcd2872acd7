"""The model's door: where the forward's arguments say that sequences and padding lie, and the
heads' way back from tokens to sequences."""

import torch
from torch import Tensor

from neobert.packing import PaddedLayout, pack_padded, padded_layout, restarting_positions
from neobert_kernels import pool
from neobert_kernels._checks import check_cu_seqlens


def packed_boundaries(
    cu_seqlens: Tensor | None, max_seqlen: int | Tensor | None, kwargs: dict
) -> tuple[Tensor, int] | None:
    """(cu_seqlens, max_seqlen) of packed input in either spelling, or None for padded input.

    Takes NeoBERT's names, or from `kwargs` those of transformers' DataCollatorWithFlattening:
    `cu_seq_lens_q`, `max_length_q`. Raises ValueError if only one of the two is there.
    """
    if cu_seqlens is None:
        cu_seqlens = kwargs.get("cu_seq_lens_q")
    if max_seqlen is None:
        max_seqlen = kwargs.get("max_length_q")
    if cu_seqlens is None and max_seqlen is None:
        return None
    if cu_seqlens is None or max_seqlen is None:
        missing = "cu_seqlens" if cu_seqlens is None else "max_seqlen"
        raise ValueError(f"packed input needs cu_seqlens and max_seqlen, but {missing} is None")
    return cu_seqlens, int(max_seqlen)


def input_layout(
    inputs: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    packed: tuple[Tensor, int] | None,
    max_length: int,
) -> tuple[PaddedLayout, Tensor]:
    """Where the tokens are, and the rotary position, (tokens,) integer, of each.

    inputs: (batch, length) ids or (batch, length, dim) embeddings. Packed input is one row that
    holds no padding and many sequences. Raises ValueError as `NeoBERT.forward` says.
    """
    if inputs.dim() != (3 if inputs.is_floating_point() else 2):
        raise ValueError(
            "input_ids must be (batch, length) and inputs_embeds (batch, length, hidden_size), "
            f"got {tuple(inputs.shape)} {inputs.dtype}"
        )
    shape = inputs.shape[0], inputs.shape[1]
    if packed is None:
        _refuse_undeclared_packing(shape, attention_mask, position_ids)
        layout = padded_layout(shape, attention_mask, inputs.device)
    else:
        _check_packed(inputs, attention_mask, packed[0])
        layout = PaddedLayout(shape, None, *packed)
    columns_count = packed is None and position_ids is None
    longest = shape[1] if columns_count else layout.max_seqlen
    if longest > max_length:
        raise ValueError(
            f"a sequence of {longest} tokens is longer than config.max_length {max_length}; "
            "truncate it, or load the model with a larger max_length (and YaRN in rope_parameters)"
        )
    if position_ids is None and packed is not None:
        return layout, restarting_positions(layout.cu_seqlens, shape[1])
    if position_ids is None:
        position_ids = torch.arange(shape[1], device=inputs.device)
    elif position_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"position_ids must be int64 or int32, got {position_ids.dtype}")
    elif position_ids.device != inputs.device:
        raise ValueError(
            f"position_ids are on {position_ids.device} but the input is on {inputs.device}"
        )
    return layout, pack_padded(position_ids.expand(shape), layout)


def check_tokens_to_keep(
    tokens_to_keep: Tensor, inputs: Tensor, packed: tuple[Tensor, int] | None
) -> None:
    if packed is None:
        raise ValueError(
            "tokens_to_keep counts packed tokens: it needs cu_seqlens and max_seqlen, and the input"
            f" {tuple(inputs.shape)} came without"
        )
    if tokens_to_keep.dim() != 1 or tokens_to_keep.dtype != torch.int64:
        raise ValueError(
            "tokens_to_keep must be (kept,) int64 places of packed tokens, got "
            f"{tuple(tokens_to_keep.shape)} {tokens_to_keep.dtype}"
        )
    if tokens_to_keep.device != inputs.device:
        raise ValueError(
            f"tokens_to_keep are on {tokens_to_keep.device} but the input is on {inputs.device}"
        )


def first_tokens(hidden: Tensor, attention_mask: Tensor | None, kwargs: dict) -> Tensor:
    """(sequences, dim): the first token of each, wherever padding put it; zeros if it has none."""
    _refuse_tokens_to_keep(kwargs)
    packed = packed_boundaries(kwargs.get("cu_seqlens"), kwargs.get("max_seqlen"), kwargs)
    if packed is not None:
        return pool(hidden.flatten(0, 1), packed[0], "cls").to(hidden.dtype)
    if attention_mask is None:
        return hidden[:, 0]
    column = (attention_mask != 0).int().argmax(1).to(hidden.device)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), column]


def one_row_per_sequence(logits: Tensor, attention_mask: Tensor | None, kwargs: dict) -> Tensor:
    """(sequences, longest, …) with the dtype's lowest value where a sequence has no token."""
    _refuse_tokens_to_keep(kwargs)
    packed = packed_boundaries(kwargs.get("cu_seqlens"), kwargs.get("max_seqlen"), kwargs)
    if packed is not None:
        cu_seqlens, max_seqlen = packed
        column = torch.arange(max_seqlen, device=logits.device)
        keep = column < cu_seqlens.diff().unsqueeze(1)
        token = (cu_seqlens[:-1].unsqueeze(1) + column).clamp(max=max(logits.shape[1] - 1, 0))
        logits = logits[0][token]
    elif attention_mask is not None:
        keep = attention_mask.to(logits.device) != 0
    else:
        return logits
    return logits.masked_fill(~keep.unsqueeze(-1), torch.finfo(logits.dtype).min)


def _refuse_tokens_to_keep(kwargs: dict) -> None:
    if kwargs.get("tokens_to_keep") is not None:
        raise ValueError("tokens_to_keep: this head itself chooses the tokens that it reads")


def _check_packed(inputs: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor) -> None:
    if inputs.shape[0] != 1:
        raise ValueError(
            "packed input (cu_seqlens given) must be one row, input_ids (1, tokens), got "
            f"{inputs.shape[0]} rows of {inputs.shape[1]}"
        )
    check_cu_seqlens("NeoBERT", cu_seqlens)
    if cu_seqlens.device != inputs.device:
        raise ValueError(
            f"cu_seqlens are on {cu_seqlens.device} but the input is on {inputs.device}"
        )
    # Collators that call tokenizer.pad leave a mask of ones beside the boundaries. Looking at it
    # makes the host wait for a GPU: leave the mask out.
    if attention_mask is not None and not (attention_mask == 1).all():
        raise ValueError(
            "attention_mask is not all ones beside cu_seqlens: packed input holds no padding"
        )


def _refuse_undeclared_packing(
    shape: tuple[int, int], attention_mask: Tensor | None, position_ids: Tensor | None
) -> None:
    """position_ids that restart in a single row without a mask mean packed sequences to some of
    transformers' backends; read as one sequence, each would attend to the others."""
    if position_ids is None or attention_mask is not None or shape[0] != 1:
        return
    if not (position_ids.diff() > 0).all():
        raise ValueError(
            "position_ids do not rise along the only row: for packed sequences also give "
            "cu_seqlens and max_seqlen (DataCollatorWithFlattening(return_flash_attn_kwargs=True) "
            "does); for one sequence with such positions give an attention_mask of ones"
        )
