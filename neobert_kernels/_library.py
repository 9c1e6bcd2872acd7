"""One torch.library namespace. An op is a schema here and one kernel per dispatch key elsewhere.

PyTorch's dispatcher chooses: the reference (plain PyTorch) is registered for every device and for
fake tensors, a C++ kernel overrides it on the CPU, a CUDA or Triton kernel on the GPU. There is no
other registry, no backend argument and no environment variable.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

lib = torch.library.Library("neobert", "DEF")
ops = torch.ops.neobert
OPS: list[str] = []
# Private, and a sixth of the cost of asking the public is_autocast_enabled for a tensor's device.
is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled
_PYTHON_KERNELS: dict[tuple[str, str], Callable] = {}


def define(schema: str, reference: Callable, fake: Callable | None = None) -> None:
    """Declares an op. `reference` runs on any device that has no kernel.

    On fake tensors (torch.compile) the reference runs too, unless its work depends on the values
    of a tensor: then `fake` gives the shapes.
    """
    name = lib.define(schema)
    lib.impl(name, reference, "CompositeExplicitAutograd")
    if fake is not None:
        torch.library.register_fake(f"neobert::{name}", fake, lib=lib)
    OPS.append(name)


def impl(name: str, key: str) -> Callable[[Callable], Callable]:
    """Decorator: this function is the `key` ("CPU", "CUDA") kernel of op `name`, unless the
    compiled library, which is loaded before any Python kernel, has brought one."""

    def register(fn: Callable) -> Callable:
        if (name, key) in _PYTHON_KERNELS:
            raise RuntimeError(f"neobert::{name} already has a {key} kernel in Python")
        _PYTHON_KERNELS[name, key] = fn
        if not has_kernel(name, key):
            lib.impl(name, fn, key)
        return fn

    return register


@contextmanager
def python_kernels_serve(key: str) -> Iterator[None]:
    """Within, the Python kernels for `key` serve also where a compiled one has been brought: for
    tests and benchmarks that hold the one against the other."""
    with torch.library._scoped_library("neobert", "IMPL") as library:
        with warnings.catch_warnings():  # of each override
            warnings.simplefilter("ignore")
            for (name, of_key), kernel in _PYTHON_KERNELS.items():
                if of_key == key:
                    library.impl(name, kernel, key, allow_override=True)
        yield


def has_kernel(name: str, key: str) -> bool:
    """Whether op `name` has a kernel of its own for dispatch key `key`, beside the reference."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"neobert::{name}", key)
