"""Nothing makes the host wait for the GPU: no launcher, no encoder's forward on packed sequences,
no masked-LM training step.

All of it runs on meta tensors, which have no values: whatever asks for one (item, tolist, bool,
nonzero, a copy to the host, …) fails, and so does a tensor made from Python numbers, which would
be copied to the GPU and waited for. The launchers run as they are; only the kernels themselves, and
questions about the GPU, are left out.
"""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="Triton is not installed (Linux only)")

import triton
from triton.runtime.jit import JITFunction

import neobert.door
import neobert.layers
import neobert.model
import neobert_kernels
from neobert import NeoBERT, NeoBERTForSequenceClassification, NeoBERTLMHead
from neobert.fused import fuse_epilogues
from neobert.packing import PackedBatch
from neobert.prepared import PreparedNeoBERT
from neobert_kernels import pool
from neobert_kernels._library import ops
from neobert_kernels.triton import (
    _device,
    attention,
    attention_bwd,
    batch_invariant_linear,
    cross_entropy,
    epilogue,
    pooling,
    rms_norm,
    rotary,
    swiglu,
)
from tests.checkpoints import small_config

linear = sys.modules["neobert_kernels.linear"]  # the package's `linear` is the function

LAUNCHERS = {
    name: getattr(module, name)
    for module, names in (
        (rms_norm, ("rms_norm", "add_rms_norm", "rms_norm_bwd", "add_rms_norm_bwd")),
        (swiglu, ("swiglu", "swiglu_bwd")),
        (rotary, ("rotary", "rotary_qkv_")),
        (pooling, ("pool", "pool_bwd")),
        (attention, ("varlen_attention",)),
        (attention_bwd, ("varlen_attention_bwd",)),
        (batch_invariant_linear, ("batch_invariant_linear",)),
        (
            epilogue,
            (
                "sum_of_squares",
                "linear_add",
                "rms_linear_swiglu",
                "rms_linear_swiglu_keep",
                "rms_linear_rotary",
            ),
        ),
        (cross_entropy, ("linear_cross_entropy", "linear_cross_entropy_grads")),
    )
    for name in names
}


# On a GPU too these serve: the GEMM is PyTorch's.
REFERENCES = {"linear": linear.reference, "linear_swiglu": linear.reference_swiglu}


class _Launchers(TorchDispatchMode):
    """Sends our ops to what serves them on a GPU; those that no test names, to their shapes alone.
    Refuses tensors that come from the host."""

    def __init__(self):
        super().__init__()
        self.launched: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        if namespace == "neobert":
            self.launched.add(name)
            serves = LAUNCHERS.get(name) or REFERENCES.get(name)
            if serves is None:
                return func(*args)
            with self:  # what it calls counts too
                return serves(*args)
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
        if any(t.device.type == "cpu" for t in tensors):
            raise RuntimeError(f"{name} takes a tensor from the host")
        return result


@pytest.fixture
def no_values(monkeypatch):
    """Launchers in the place of ops, without kernels; new tensors without values."""

    def synchronize(*args, **kwargs):
        raise RuntimeError("synchronize")

    def upload(*args, **kwargs):
        raise RuntimeError("a tensor from numbers of the host")

    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(_device, "_gpu", lambda device: (90, 132))
    # As in the interpreter, launchers then take tensors of any device.
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream):
        monkeypatch.setattr(owner, "synchronize", synchronize)
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, upload)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it knows no "meta"
    torch.use_deterministic_algorithms(False)
    # There is no memory to fill with NaN.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    with torch.device("meta"), _Launchers() as mode:
        yield mode


def empty(*shape, dtype=torch.bfloat16, grad=False):
    tensor = torch.empty(shape, dtype=dtype)
    return tensor.requires_grad_() if grad else tensor


def backward(*outputs):
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])


def run_ops():
    tokens, dim, vocab = 9000, 768, 30522  # more tokens than fit a chunk of the loss
    x, stream = empty(tokens, dim, grad=True), empty(tokens, dim, dtype=torch.float32, grad=True)
    weight = empty(dim, dtype=torch.float32, grad=True)
    backward(neobert_kernels.rms_norm(x, weight))
    backward(*neobert_kernels.add_rms_norm(x, stream, weight))
    backward(neobert_kernels.swiglu(empty(tokens, 4096, grad=True)))
    with torch.no_grad():
        neobert_kernels.linear(x, empty(dim, dim), stream, batch_invariant=True)
    table = [empty(64, 32, dtype=torch.float32)] * 2
    positions = empty(tokens, dtype=torch.int64)
    backward(neobert_kernels.apply_rotary(empty(tokens, 12, 64, grad=True), *table, positions))
    qkv = 1 * empty(tokens, 12, 3, 64, grad=True)
    backward(neobert_kernels.apply_rotary_qkv_(qkv, *table, positions))
    cu_seqlens = empty(9, dtype=torch.int32)
    for mode in ("mean", "cls"):
        backward(neobert_kernels.pool(x, cu_seqlens, mode))
    q, k, v = (empty(tokens, 12, 64, grad=True) for _ in range(3))
    for max_seqlen in (64, 128, 4096):  # each regime, and both ways to sum dq
        backward(neobert_kernels.varlen_attention(q, k, v, cu_seqlens, max_seqlen))
        torch.use_deterministic_algorithms(True)
        qkv = empty(tokens, 12, 3, 64, grad=True)
        backward(neobert_kernels.varlen_attention_qkv(qkv, cu_seqlens, max_seqlen))
        torch.use_deterministic_algorithms(False)
    head = (empty(vocab, dim, grad=True), empty(vocab, grad=True), empty(tokens, dtype=torch.int64))
    backward(neobert_kernels.linear_cross_entropy(x, *head))
    with torch.no_grad():
        neobert_kernels.linear_cross_entropy(x, *head)
        squares = neobert_kernels.sum_of_squares(x)
        neobert_kernels.rms_linear_swiglu(x, squares, empty(4096, dim))
        ops.rms_linear_swiglu_keep(x, squares, empty(4096, dim), 1e-5)
        neobert_kernels.rms_linear_rotary(x, squares, empty(2304, dim), *table, positions)
        for residual in (x, stream):
            neobert_kernels.linear_add(x, empty(dim, dim), residual)


def packed_input(tokens=50, sequences=4):
    return {
        "input_ids": empty(1, tokens, dtype=torch.int64),
        "position_ids": empty(1, tokens, dtype=torch.int64),
        "cu_seqlens": empty(sequences + 1, dtype=torch.int32),
        "max_seqlen": 20,
    }


with torch.device("meta"):
    CONFIG = small_config(num_hidden_layers=2)
    ENCODER = NeoBERT(CONFIG).bfloat16().eval()
    PREPARED = PreparedNeoBERT(ENCODER)
    CLASSIFIER = NeoBERTForSequenceClassification(CONFIG).bfloat16().eval()
    LANGUAGE_MODEL = NeoBERTLMHead(CONFIG).train()
    FUSED = NeoBERTLMHead(CONFIG).train()
    fuse_epilogues(FUSED)


@torch.inference_mode()
def run_encoder():
    """Embeddings of packed sequences; positions given and not, and padded without a mask."""
    packed = packed_input()
    hidden = ENCODER(**packed).last_hidden_state[0]
    for mode in ("mean", "cls"):
        pool(hidden, packed["cu_seqlens"], mode)
    ENCODER(**packed | {"position_ids": None}, output_hidden_states=True)
    ENCODER(empty(3, 9, dtype=torch.int64))
    CLASSIFIER(**packed)


@torch.inference_mode()
def run_prepared():
    """As `run_encoder`, of the encoder with fused epilogues."""
    packed = packed_input()
    ids, positions = packed["input_ids"][0], packed["position_ids"][0]
    PREPARED(PackedBatch(ids, positions, packed["cu_seqlens"], packed["max_seqlen"]))


def run_training_step(dtype=torch.bfloat16, model=LANGUAGE_MODEL):
    """Forward and backward of the masked-language model, the loss over a number of tokens that
    only the GPU knows."""
    model.to(dtype).zero_grad()
    labels, count = empty(1, 50, dtype=torch.int64), empty(dtype=torch.int64)
    model(**packed_input(), labels=labels, num_items_in_batch=count).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def run_fused_training_step():
    """As `run_training_step`, with fused epilogues."""
    run_training_step(model=FUSED)


def run_fused_training_step_under_autocast():
    run_training_step_under_autocast(FUSED)


def run_training_step_under_autocast(model=LANGUAGE_MODEL):
    """On meta tensors there is none; what the functions ask about it is answered here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "is_any_autocast_enabled", lambda: True)
        patch.setattr(torch, "is_autocast_enabled", lambda device: True)
        patch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
        run_training_step(torch.float32, model)


PATHS = [
    run_ops,
    run_encoder,
    run_prepared,
    run_training_step,
    run_training_step_under_autocast,
    run_fused_training_step,
    run_fused_training_step_under_autocast,
]


@pytest.mark.parametrize("path", PATHS)
def test_nothing_waits_for_the_gpu(no_values, path):
    path()
    if path is run_ops:
        assert no_values.launched == LAUNCHERS.keys()
    elif path is run_prepared:
        fused = {"sum_of_squares", "rms_linear_rotary", "linear_add", "rms_linear_swiglu"}
        assert no_values.launched == fused | {"varlen_attention", "rms_norm"}
    elif path in (run_fused_training_step, run_fused_training_step_under_autocast):
        fused = {"sum_of_squares", "rms_linear_rotary", "linear_add", "rms_linear_swiglu_keep"}
        kept = {"rms_norm_bwd", "rotary_qkv_", "swiglu_bwd", "varlen_attention_bwd", "linear"}
        assert fused | kept <= no_values.launched
        assert not no_values.launched & {"rms_linear_swiglu", "swiglu", "linear_swiglu"}
    else:
        assert {"rms_norm", "rotary_qkv_", "varlen_attention", "linear"} <= no_values.launched


WAITED = (RuntimeError, NotImplementedError, TypeError)  # the last for Tensor.numpy
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
    "numpy": lambda x: x.numpy(),
    "tensor": lambda x: torch.tensor([1, 2], device=x.device),
    "upload": lambda x: torch.ones(3, device="cpu").to(x.device),
    "add": lambda x: x + torch.ones(3, device="cpu"),
    "synchronize": lambda x: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_a_planted_wait_is_caught(no_values, monkeypatch, wait):
    launch = LAUNCHERS["swiglu_bwd"]

    def planted(dy, gate_up):
        wait(gate_up[0].long())
        return launch(dy, gate_up)

    monkeypatch.setitem(LAUNCHERS, "swiglu_bwd", planted)
    with pytest.raises(WAITED):
        run_ops()


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
@pytest.mark.parametrize(
    ("path", "module", "place"),
    [
        (run_encoder, neobert.door, "restarting_positions"),
        (run_encoder, neobert.layers, "project"),
        (run_training_step, neobert.layers, "project"),
        (run_training_step, neobert.model, "linear_cross_entropy"),
        (run_fused_training_step, neobert_kernels.epilogue_training, "_folded"),
        (run_fused_training_step, neobert_kernels.epilogue_training, "product"),
    ],
)
def test_a_wait_planted_in_the_model_is_caught(no_values, monkeypatch, path, module, place, wait):
    function = getattr(module, place)

    def planted(*args, **kwargs):
        result = function(*args, **kwargs)
        wait(result.flatten().long())
        return result

    monkeypatch.setattr(module, place, planted)
    with pytest.raises(WAITED):
        path()


def test_an_op_that_does_not_wait_passes(no_values, monkeypatch):
    launch = LAUNCHERS["swiglu_bwd"]
    monkeypatch.setitem(LAUNCHERS, "swiglu_bwd", lambda dy, g: launch(dy, g + g[0].long().sum()))
    run_ops()
