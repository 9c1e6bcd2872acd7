"""The files check_<op>.py hold each Triton kernel, in Triton's interpreter on CPU tensors, against
float64. The interpreter has to be chosen before Triton is imported, so these files run in a process
of their own: tests/test_triton_interpreter.py starts it.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import sanitizer
import triton

from neobert_kernels import _library


def pytest_addoption(parser):
    parser.addoption("--kernels", help="take the kernels from this file instead of the package")


def pytest_configure(config):
    if not triton.knobs.runtime.interpret:
        raise pytest.UsageError("these tests need TRITON_INTERPRET=1 in the environment")
    sanitizer.install()


@pytest.fixture(scope="module")
def kernels(request):
    """The module of launchers under test: neobert_kernels.triton.<op> for check_<op>.py, or, with
    --kernels, what that file makes of it: a mutant of the module or of one that it imports from."""
    package = "neobert_kernels.triton."
    name = package + Path(request.path).stem.removeprefix("check_")
    module = importlib.import_module(name)
    path = request.config.getoption("--kernels")
    if path is None:
        return module
    mutated = package + Path(path).stem
    mutant = load_mutant(mutated, path)
    if mutated == name:
        return mutant
    with pytest.MonkeyPatch.context() as patch:
        # Of the modules between the mutant and the op, those that import from it must do so anew.
        patch.setitem(sys.modules, mutated, mutant)
        for between in IMPORTED_FROM.get(Path(path).stem, ()):
            again = importlib.util.find_spec(package + between).origin
            patch.setitem(sys.modules, package + between, load_mutant(package + between, again))
        return load_mutant(name, module.__file__)


# The modules without ops of their own that import from one another.
IMPORTED_FROM = {"_varlen": ("_gradients",)}


def load_mutant(name: str, path: str):
    """The file `path` as a module beside module `name`; its launchers are not registered."""
    spec = importlib.util.spec_from_file_location(f"{name}_mutant", path)
    module = importlib.util.module_from_spec(spec)
    impl, _library.impl = _library.impl, lambda op, key: lambda function: function
    try:
        spec.loader.exec_module(module)
    finally:
        _library.impl = impl
    return module
