"""SwiGLU on the GPU, forward and backward: one pass over memory each.

The backward recomputes the activation from gate_up and writes a new tensor: a saved tensor may be
needed by a second backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._library import impl
from ._device import architecture, check_served, on_device

# Elements of the output per program, and warps.
FORWARD = {
    80: {"TILE": 2048, "num_warps": 4},
    90: {"TILE": 2048, "num_warps": 4},
    100: {"TILE": 2048, "num_warps": 4},
}
BACKWARD = {
    80: {"TILE": 2048, "num_warps": 4},
    90: {"TILE": 2048, "num_warps": 4},
    100: {"TILE": 2048, "num_warps": 4},
}


@triton.jit(do_not_specialize=["rows"])
def _forward(
    gate_up_ptr, y_ptr, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (first + row < rows) & (column < WIDTH)
    gate_ptrs = gate_up_ptr + first * (2 * WIDTH) + row * (2 * WIDTH) + column
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + WIDTH, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + first * WIDTH + row * WIDTH + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward(
    dy_ptr,
    gate_up_ptr,
    dgate_up_ptr,
    rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (first + row < rows) & (column < WIDTH)
    at = first * (2 * WIDTH) + row * (2 * WIDTH) + column
    gate = tl.load(gate_up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + at + WIDTH, mask=mask, other=0.0).to(tl.float32)
    dy_ptrs = dy_ptr + first * WIDTH + row * WIDTH + column
    dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = dy * gate * sigmoid
    dtype = dgate_up_ptr.dtype.element_ty
    tl.store(dgate_up_ptr + at, dgate.to(dtype), mask=mask)
    tl.store(dgate_up_ptr + at + WIDTH, dup.to(dtype), mask=mask)


def _tile(table: dict, gate_up: Tensor) -> dict:
    """BLOCK columns, the widest power of two that divides the width so that no lane idles (with a
    masked end where that is under 128), and as many ROWS as fill the tile."""
    tile = dict(table[architecture(gate_up)])
    elements, width = tile.pop("TILE"), gate_up.shape[-1] // 2
    divisor = width & -width
    block = min(elements, divisor if divisor >= 128 else triton.next_power_of_2(min(width, 256)))
    return tile | {"WIDTH": width, "BLOCK": block, "ROWS": elements // block}


def _grid(rows: int, tile: dict) -> tuple[int, int]:
    return triton.cdiv(rows, tile["ROWS"]), triton.cdiv(tile["WIDTH"], tile["BLOCK"])


@impl("swiglu", "CUDA")
def swiglu(gate_up: Tensor) -> Tensor:
    check_served("swiglu", gate_up=gate_up)
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], width)
    if y.numel():
        tile, rows = _tile(FORWARD, gate_up), y.numel() // width
        with on_device(gate_up):
            _forward[_grid(rows, tile)](gate_up, y, rows, **tile)
    return y


@impl("swiglu_bwd", "CUDA")
def swiglu_bwd(dy: Tensor, gate_up: Tensor) -> Tensor:
    check_served("swiglu_bwd", dy=dy, gate_up=gate_up)
    dy, gate_up = dy.contiguous(), gate_up.contiguous()
    dgate_up = torch.empty_like(gate_up)
    if dy.numel():
        tile, rows = _tile(BACKWARD, gate_up), dy.numel() // dy.shape[-1]
        with on_device(gate_up):
            _backward[_grid(rows, tile)](dy, gate_up, dgate_up, rows, **tile)
    return dgate_up
