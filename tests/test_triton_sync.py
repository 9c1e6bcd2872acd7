"""No launcher makes the host wait for the GPU, forward or backward.

Every public function runs on meta tensors, which have no values: whatever asks for one (item,
tolist, bool, nonzero, a copy to the host, …) fails. The launchers run as they are; only the kernels
themselves, and questions about the GPU, are left out.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed (Linux only)")

import triton
from triton.runtime.jit import JITFunction

import neobert_kernels
from neobert_kernels.triton import _device, cross_entropy, pooling, rms_norm, rotary, swiglu

LAUNCHERS = {
    name: getattr(module, name)
    for module, names in (
        (rms_norm, ("rms_norm", "add_rms_norm", "rms_norm_bwd", "add_rms_norm_bwd")),
        (swiglu, ("swiglu", "swiglu_bwd")),
        (rotary, ("rotary", "rotary_qkv_")),
        (pooling, ("pool", "pool_bwd")),
        (cross_entropy, ("linear_cross_entropy", "linear_cross_entropy_grads")),
    )
    for name in names
}


class _Launchers(TorchDispatchMode):
    """Sends our ops to their launchers."""

    def __init__(self):
        super().__init__()
        self.launched: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        if namespace == "neobert":
            self.launched.add(name)
            return LAUNCHERS[name](*args)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_values(monkeypatch):
    """Launchers in the place of ops, without kernels; new tensors without values."""

    def synchronize(*args, **kwargs):
        raise RuntimeError("synchronize")

    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(_device, "_gpu", lambda device: (90, 132))
    # As in the interpreter, launchers then take tensors of any device.
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream):
        monkeypatch.setattr(owner, "synchronize", synchronize)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it knows no "meta"
    torch.use_deterministic_algorithms(False)  # there is no memory to fill with NaN
    with torch.device("meta"), _Launchers() as mode:
        yield mode


def empty(*shape, dtype=torch.bfloat16, grad=False):
    tensor = torch.empty(shape, dtype=dtype)
    return tensor.requires_grad_() if grad else tensor


def backward(*outputs):
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])


def run_everything():
    tokens, dim, vocab = 9000, 768, 30522  # more tokens than fit a chunk of the loss
    x, stream = empty(tokens, dim, grad=True), empty(tokens, dim, dtype=torch.float32, grad=True)
    weight = empty(dim, dtype=torch.float32, grad=True)
    backward(neobert_kernels.rms_norm(x, weight))
    backward(*neobert_kernels.add_rms_norm(x, stream, weight))
    backward(neobert_kernels.swiglu(empty(tokens, 4096, grad=True)))
    table = [empty(64, 32, dtype=torch.float32)] * 2
    positions = empty(tokens, dtype=torch.int64)
    backward(neobert_kernels.apply_rotary(empty(tokens, 12, 64, grad=True), *table, positions))
    qkv = 1 * empty(tokens, 12, 3, 64, grad=True)
    backward(neobert_kernels.apply_rotary_qkv_(qkv, *table, positions))
    cu_seqlens = empty(9, dtype=torch.int32)
    for mode in ("mean", "cls"):
        backward(neobert_kernels.pool(x, cu_seqlens, mode))
    head = (empty(vocab, dim, grad=True), empty(vocab, grad=True), empty(tokens, dtype=torch.int64))
    backward(neobert_kernels.linear_cross_entropy(x, *head))
    with torch.no_grad():
        neobert_kernels.linear_cross_entropy(x, *head)


def test_nothing_waits_for_the_gpu(no_values):
    run_everything()
    assert no_values.launched == LAUNCHERS.keys()


WAITS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x.any()),
    "int": lambda x: int(x.sum()),
    "index": lambda x: range(x[0]),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu", non_blocking=True),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, x),
    "equal": lambda x: torch.equal(x, x),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_a_planted_wait_is_caught(no_values, monkeypatch, wait):
    launch = LAUNCHERS["swiglu_bwd"]

    def planted(dy, gate_up):
        wait(gate_up[0].long())
        return launch(dy, gate_up)

    monkeypatch.setitem(LAUNCHERS, "swiglu_bwd", planted)
    with pytest.raises((RuntimeError, NotImplementedError)):
        run_everything()


def test_an_op_that_does_not_wait_passes(no_values, monkeypatch):
    launch = LAUNCHERS["swiglu_bwd"]
    monkeypatch.setitem(LAUNCHERS, "swiglu_bwd", lambda dy, g: launch(dy, g + g[0].long().sum()))
    run_everything()
