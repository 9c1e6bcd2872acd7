"""A sanitizer for kernels in Triton's interpreter: what `compute-sanitizer` checks on a GPU.

The interpreter reads and writes raw addresses. Here each must lie within a tensor that the launch
was given, and none that a program writes may be read or written by another program of the launch,
since programs run in any order.
"""

import numpy as np
import triton.runtime.interpreter as interpreter
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class _CheckedMemory:
    """Stands in for the interpreter's load and store."""

    def __init__(self, memory):
        self._memory = memory
        self.atomic_rmw, self.atomic_cas = memory.atomic_rmw, memory.atomic_cas
        self.begin([])

    def begin(self, tensors: list[Tensor]) -> None:
        extents = sorted(_extent(tensor) for tensor in tensors if tensor.numel())
        self._starts = np.array([start for start, _ in extents], dtype=np.uint64)
        # A view may begin before another of the same storage and end after it.
        ends = np.array([end for _, end in extents], dtype=np.uint64)
        self._ends = np.maximum.accumulate(ends) if extents else ends
        self._loads: list[tuple[np.ndarray, int]] = []
        self._stores: list[tuple[np.ndarray, int]] = []

    def load(self, pointers, mask, other, dtype):
        self._loads.append((self._touched("load", pointers, mask, dtype.itemsize), _program()))
        return self._memory.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        touched = self._touched("store", pointers, mask, value.dtype.itemsize)
        self._stores.append((touched, _program()))
        return self._memory.store(pointers, value, mask)

    def end(self) -> None:
        written = np.concatenate([np.empty(0, np.uint64), *(each for each, _ in self._stores)])
        if not written.size:
            return
        writer = np.concatenate([np.full(len(touched), by) for touched, by in self._stores])
        order = np.argsort(written, kind="stable")
        written, writer = written[order], writer[order]
        clash = (written[1:] == written[:-1]) & (writer[1:] != writer[:-1])
        assert not clash.any(), f"{clash.sum()} elements are written by more than one program"
        for touched, reader in self._loads:
            at = np.searchsorted(written, touched).clip(max=len(written) - 1)
            clash = (written[at] == touched) & (writer[at] != reader)
            assert not clash.any(), f"{clash.sum()} elements are read and written by two programs"

    def _touched(self, what: str, pointers, mask, itemsize: int) -> np.ndarray:
        touched = np.unique(np.broadcast_to(pointers, np.shape(mask))[np.asarray(mask)])
        at = np.searchsorted(self._starts, touched, side="right") - 1
        inside = (at >= 0) & (touched + np.uint64(itemsize) <= self._ends[at])
        assert inside.all(), f"{what} of {(~inside).sum()} elements outside every tensor"
        return touched


def _extent(tensor: Tensor) -> tuple[int, int]:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _program() -> int:
    x, y, z = interpreter.interpreter_builder.grid_idx
    return x + (y << 20) + (z << 40)


def install() -> None:
    """Checks every kernel launch in this process from now on."""
    if isinstance(interpreter._interpreter, _CheckedMemory):
        return
    memory = _CheckedMemory(interpreter._interpreter)
    interpreter._interpreter = memory
    launch = interpreter.GridExecutor.__call__

    def checked_launch(self, *args, **kwargs):
        given = [a.base if isinstance(a, TensorDescriptor) else a for a in args]
        memory.begin([a for a in (*given, *kwargs.values()) if isinstance(a, Tensor)])
        launch(self, *args, **kwargs)
        memory.end()

    interpreter.GridExecutor.__call__ = checked_launch

    # Triton 3.6 turns a one-element array into an index in a way that NumPy 2.4 no longer allows.
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_index
