"""What attention's forward and backward share: rows of ragged sequences, and who serves which.

A sequence's own length decides, on the GPU, what serves it, so that its bits depend on nothing else
in the batch. Up to SHORT tokens it is one program's work for each head. A longer one is cut into
tiles of rows. The host knows how many tokens and sequences there are, not how long each is: so the
kernel of the short sequences is launched for all of them, and a long one's program lists its tiles
instead, those of the longest sequence first; later launches work off that list. They are made for
the most tiles that those sizes allow, two of 128 rows for every 129 tokens, and programs beyond the
list end at once.

Float32 is multiplied without tensor cores, from operands in registers: its tiles are small, and all
its sequences count as long.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import check_cu_seqlens, check_same_dtype, check_shape
from ._device import check_served

SHORT = 128  # tokens
HEAD_DIMS = (64, 128)
FILLERS = 64  # at most so many programs fill the rows of no sequence, for each head
MAX_STRIDE = 2**24  # of tokens, so that 128 rows lie within the reach of 32 bits


@triton.jit
def pointers(ptr, first, row, stride, COLUMNS: tl.constexpr):
    """To COLUMNS of rows first + row, where first may be far and row is within a tile."""
    ptr += tl.cast(first, tl.int64) * stride
    return ptr + row[:, None] * stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def load(ptrs, live, MASKED: tl.constexpr):
    """Some rows, zeros for those not live; all are unless MASKED."""
    if MASKED:
        return tl.load(ptrs, mask=live[:, None], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def again(held, ptrs, live):
    """The tile that a loop has for each of its steps, held from before it. In float32 it is read at
    each step: as the operand of a product, held, it would fill the registers."""
    if held.dtype == tl.float32:
        return tl.load(ptrs, mask=live[:, None], other=0.0, volatile=True)
    else:
        return held


@triton.jit
def span(cu_seqlens_ptr, sequence, sequences, tokens):
    """First token and length of a sequence, or of several. Offsets are not checked (that would
    wait for the GPU), but whatever they are, no span leaves the tokens."""
    live = sequence < sequences
    start = tl.load(cu_seqlens_ptr + sequence, mask=live, other=0)
    end = tl.load(cu_seqlens_ptr + sequence + 1, mask=live, other=0)
    start = tl.minimum(tl.maximum(start, 0), tokens)
    return start, tl.maximum(tl.minimum(end, tokens) - start, 0)


@triton.jit
def list_tiles(
    cu_seqlens_ptr,
    tiles_ptr,
    start,
    length,
    sequence,
    tokens,
    sequences,
    max_seqlen,
    capacity,
    SHORT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr = 512,
):
    """Lists the tiles of ROWS rows of one long sequence, after those of all longer ones; of the
    sequence after the last, which has none, that is the number of tiles. The list is four arrays:
    first tokens of sequences, their lengths, first rows of tiles, each of `capacity`, the number.
    """
    ahead = tl.zeros([BLOCK], tl.int32)
    for first in range(0, sequences, BLOCK):
        other = first + tl.arange(0, BLOCK)
        _, others = span(cu_seqlens_ptr, other, sequences, tokens)
        is_ahead = (others > length) | ((others == length) & (other < sequence))
        is_ahead &= (others > SHORT) & (others <= max_seqlen)
        ahead += tl.where(is_ahead, tl.cdiv(others, ROWS), 0)
    place = tl.sum(ahead, 0)
    for first in range(0, length, ROWS * BLOCK):
        tile = first // ROWS + tl.arange(0, BLOCK)
        at = place + tile
        mask = (tile * ROWS < length) & (at < capacity)
        tl.store(tiles_ptr + at, start + 0 * tile, mask=mask)
        tl.store(tiles_ptr + capacity + at, length + 0 * tile, mask=mask)
        tl.store(tiles_ptr + 2 * capacity + at, tile * ROWS, mask=mask)
    if sequence == sequences:
        tl.store(tiles_ptr + 3 * capacity, tl.minimum(place, capacity))


@triton.jit
def fill(ptr, stride, first, last, step, value, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Writes `value` to ROWS rows at first, and at every step from there on, up to the last."""
    row = tl.arange(0, ROWS)
    values = tl.full([ROWS, COLUMNS], value, ptr.dtype.element_ty)
    for at in range(first, last, step):
        ptrs = pointers(ptr, at, row, stride, COLUMNS)
        tl.store(ptrs, values, mask=(at + row < last)[:, None])


def plan(q: Tensor, sequences: int, max_seqlen: int, rows: int) -> tuple[int, dict]:
    """How many tiles of `rows` rows the long sequences have at most, and the constants of the
    kernel of the short ones."""
    tokens = q.shape[0]
    short = 0 if q.dtype == torch.float32 else 64 if max_seqlen <= 64 else SHORT
    longest, most = min(max_seqlen, tokens), min(sequences, tokens // (short + 1))
    capacity = min(most * triton.cdiv(longest, rows), (tokens + most * (rows - 1)) // rows)
    if longest <= short:
        capacity = 0
    return capacity, {"LONGEST": short, "LIST": rows if capacity else 0}


def check(op: str, cu_seqlens: Tensor, q: Tensor, **others: Tensor) -> None:
    """Raises unless q, and what else has its shape, are what the kernels take."""
    check_served(op, q=q, **others, cu_seqlens=cu_seqlens)
    check_same_dtype(op, q=q, **others)
    check_cu_seqlens(op, cu_seqlens)
    if q.dim() != 3 or q.shape[2] not in HEAD_DIMS:
        raise ValueError(
            f"{op}: the Triton kernel serves a head_dim of 64 or 128, in q of shape (tokens, heads,"
            f" head_dim), got {tuple(q.shape)}"
        )
    for name, tensor in others.items():
        check_shape(op, name, tensor, q.shape, "q")
    for name, tensor in (("q", q), *others.items()):
        if tensor.stride(2) != 1 or tensor.stride(0) > MAX_STRIDE:
            raise ValueError(
                f"{op}: {name} must have a contiguous last axis and a first one of stride 2**24 at"
                f" most, got strides {tensor.stride()}"
            )
