"""batch_invariant=True: the same bits alone, in any batch, in any order; else an error."""

import importlib

import numpy as np
import pytest
import torch
from batch_invariance import differing_texts, real_texts, write_wide_checkpoint
from torch import nn
from typer.testing import CliRunner

from neobert import NeoBERT, NeoBERTConfig
from neobert.cli import app
from neobert.encode import Encoder
from neobert.invariance import make_batch_invariant, unit_length
from neobert_kernels import _compiled, linear, linear_swiglu
from neobert_kernels._library import ops
from neobert_kernels.linear import reference_batch_invariant

# The package's attribute `linear` is the function.
module = importlib.import_module("neobert_kernels.linear")

pytestmark = [
    pytest.mark.filterwarnings("ignore::neobert.encode.TruncationWarning"),
    pytest.mark.skipif(_compiled.LOADED is None, reason=_compiled.status()),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_wide_checkpoint(tmp_path_factory.mktemp("wide"), layers=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_real_texts_in_random_batches(checkpoint, dtype):
    """At the released widths. batch_invariance.py is the same with a thousand batches."""
    encoder = Encoder.from_pretrained(checkpoint, "cpu", dtype, batch_invariant=True)
    assert differing_texts(encoder, real_texts(14), 30, [1, 2, 3]) == 0


def test_pytorch_gemm_would_be_found_out(checkpoint, monkeypatch):
    """The test above must be able to fail. And where PyTorch's GEMM serves (here in float32, in
    place of 16-bit types on a CPU with AMX), batch_invariant=True must go round it."""
    monkeypatch.setattr(module, "PYTORCH_GEMM_DTYPES", frozenset({torch.float32}))
    texts = real_texts(14)
    default = Encoder.from_pretrained(checkpoint, "cpu", "float32")
    assert differing_texts(default, texts, 30, [1, 2, 3]) > 0
    invariant = Encoder.from_pretrained(checkpoint, "cpu", "float32", batch_invariant=True)
    assert differing_texts(invariant, texts, 30, [1, 2, 3]) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_goes_round_the_gemm_of_pytorch(dtype, monkeypatch):
    x, weight = torch.randn(33, 96).to(dtype), torch.randn(64, 96).to(dtype)
    residual = torch.randn(33, 64)
    expected = linear(x, weight, residual), linear_swiglu(x, weight)
    monkeypatch.setattr(module, "PYTORCH_GEMM_DTYPES", frozenset(DTYPES))
    monkeypatch.setattr(torch.nn.functional, "linear", None)  # calling it is an error
    assert torch.equal(linear(x, weight, residual, batch_invariant=True), expected[0])
    assert torch.equal(linear_swiglu(x, weight, batch_invariant=True), expected[1])
    with pytest.raises(TypeError, match="not callable"):
        linear(x, weight)


def test_gradients_are_those_of_linear():
    x, weight, residual = torch.randn(7, 12), torch.randn(10, 12), torch.randn(7, 10)
    leaves = [t.requires_grad_() for t in (x, weight, residual)]
    loss = (linear(*leaves, batch_invariant=True).square()).sum()
    expected = torch.autograd.grad((linear(*leaves).square()).sum(), leaves)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        assert torch.equal(ours, theirs)
    loss = linear_swiglu(x, weight, batch_invariant=True).sum()
    expected = torch.autograd.grad(linear_swiglu(x, weight).sum(), leaves[:2])
    for ours, theirs in zip(torch.autograd.grad(loss, leaves[:2]), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_has_no_batch(dtype):
    """One row at a time, against PyTorch's whole product and against itself."""
    x, weight = torch.randn(9, 80).to(dtype), torch.randn(50, 80).to(dtype)
    residual = torch.randn(9, 50)
    y = reference_batch_invariant(x, weight, residual)
    assert y.dtype == residual.dtype
    plain = residual + x.float() @ weight.float().t()
    torch.testing.assert_close(y, plain, rtol=0, atol=0.1 if dtype == torch.bfloat16 else 1e-4)
    for at in (slice(0, 1), slice(3, 9), slice(8, 9), slice(0, 0)):
        assert torch.equal(reference_batch_invariant(x[at], weight, residual[at]), y[at])


def test_unit_length():
    rows = torch.randn(5, 768) * torch.tensor([1e-6, 1.0, 1e3, 0.0, 1e15])[:, None]
    expected = torch.nn.functional.normalize(rows.double(), dim=-1)
    assert (unit_length(rows) - expected).abs().max() < 1e-7
    assert all(torch.equal(unit_length(rows[i : i + 1])[0], unit_length(rows)[i]) for i in range(5))


def small_model() -> NeoBERT:
    return NeoBERT(
        NeoBERTConfig(
            vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=1,
            intermediate_size=96, max_length=16,
        )
    )  # fmt: skip


def replace_a_projection(model):
    model.transformer_encoder[0].wo = nn.Linear(64, 64, bias=False)


def hook_a_norm(model):
    model.layer_norm.register_forward_hook(lambda *_: None)


def offload(model):
    model.transformer_encoder[0].ffn.w3.forward = lambda x, residual: x


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (replace_a_projection, "transformer_encoder.0.wo"),
        (hook_a_norm, "layer_norm"),
        (offload, "transformer_encoder.0.ffn.w3"),
        (lambda model: model.compile(), "model"),
    ],
)
def test_what_may_depend_on_the_batch_is_refused(change, named):
    model = small_model()
    change(model)
    with pytest.raises(ValueError, match=f"batch_invariant: the module '{named}'"):
        make_batch_invariant(model)
    assert not any(getattr(m, "batch_invariant", False) for m in model.modules())


def test_a_device_without_kernels_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="the model is on meta"):
        make_batch_invariant(small_model().to("meta"))
    kernel = "neobert.invariance.has_kernel"
    monkeypatch.setattr(kernel, lambda name, key: (name, key) != ("linear", "CPU"))
    with pytest.raises(ValueError, match="linear have no kernel for cpu"):
        make_batch_invariant(small_model())


def test_command(checkpoint, tmp_path):
    texts = real_texts(6)
    lines = [" ".join(text.split()) for text in texts]
    (tmp_path / "texts.txt").write_text("\n".join(lines) + "\n")
    arguments = ["encode", "--model", str(checkpoint), "--input", str(tmp_path / "texts.txt")]
    arguments += ["--output", str(tmp_path / "rows.npy"), "--batch-invariant", "--device", "cpu"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    encoder = Encoder.from_pretrained(checkpoint, "cpu", batch_invariant=True)
    alone = np.stack([encoder.encode(line) for line in lines])
    assert np.array_equal(np.load(tmp_path / "rows.npy"), alone)


def test_the_op_on_the_cpu_is_the_kernel_of_linear():
    x, weight = torch.randn(20, 40), torch.randn(30, 40)
    assert torch.equal(ops.batch_invariant_linear(x, weight, None), ops.linear(x, weight, None))
