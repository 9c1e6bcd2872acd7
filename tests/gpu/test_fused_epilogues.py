"""The epilogue GEMMs on the GPU: accuracy at real widths, rows that ignore the batch, graphs."""

import pytest
import torch
from accuracy import assert_accurate
from cases import DIM, HEAD_DIM, LENGTHS, WIDTH

from neobert import NeoBERT, NeoBERTConfig
from neobert.checkpoint import write_random_checkpoint
from neobert.encode import Encoder
from neobert.fused import fuse_epilogues
from neobert.packing import pack
from neobert.prepared import PreparedNeoBERT
from neobert_kernels import epilogue
from neobert_kernels._library import ops
from tests.checkpoints import random_sequences
from tests.tiny import texts, write_tiny_checkpoint

pytestmark = pytest.mark.no_poison
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
OPS = ("rms_linear_rotary", "rms_linear_swiglu", "rms_linear_swiglu_keep", "linear_add")


def arguments(name, tokens, dtype, stream):
    """Of one call, with the outlier of a trained model in the residual stream."""

    def randn(*shape, scale=1.0, dtype=dtype):
        return (scale * torch.randn(shape, device="cuda")).to(dtype)

    x = randn(tokens, DIM, dtype=stream)
    x[:, 256] = 1330.0
    if name == "linear_add":
        return randn(tokens, WIDTH), randn(DIM, WIDTH, scale=WIDTH**-0.5), x
    squares = epilogue.reference_squares(x)
    if name.startswith("rms_linear_swiglu"):
        return x, squares, randn(2 * WIDTH, DIM, scale=DIM**-0.5), 1e-5
    table = torch.randn(2, 512, HEAD_DIM // 2, device="cuda").unbind()
    positions = torch.arange(tokens, device="cuda") % 512
    return x, squares, randn(3 * DIM, DIM, scale=DIM**-0.5), *table, positions, 1e-5


REFERENCES = {
    "rms_linear_rotary": epilogue.reference_rotary,
    "rms_linear_swiglu": epilogue.reference_swiglu,
    "rms_linear_swiglu_keep": epilogue.reference_swiglu_keep,
    "linear_add": epilogue.reference_add,
}


def run(fn, given):
    outputs = fn(*given)
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.parametrize("stream", ["of the weights' dtype", "of float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 63, 129, 1000, 20000])
@pytest.mark.parametrize("name", OPS)
def test_accuracy(name, tokens, dtype, stream):
    given = arguments(name, tokens, dtype, torch.float32 if stream == "of float32" else dtype)
    x = given[0].to(dtype)  # what a kernel multiplies
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            for t in (x, *given[1:])]  # fmt: skip
    results = (
        run(getattr(ops, name), given),
        run(REFERENCES[name], given),
        run(REFERENCES[name], wide),
    )
    for each in list(zip(*results, strict=True))[: 2 if name.endswith("keep") else 1]:
        assert_accurate(*(t.flatten() for t in each), name)


@pytest.mark.parametrize("name", OPS)
def test_rows_do_not_depend_on_the_batch(name):
    given = arguments(name, 3000, torch.bfloat16, torch.bfloat16)
    together = run(getattr(ops, name), given)
    for rows in (slice(2999, 3000), slice(5, 70), slice(1000, 1700)):
        part = [
            t[rows].contiguous() if isinstance(t, torch.Tensor) and len(t) == 3000 else t
            for t in given
        ]
        for alone, all_rows in zip(run(getattr(ops, name), part), together, strict=True):
            assert torch.equal(alone, all_rows[rows])


@torch.no_grad()
def test_the_prepared_encoder():
    torch.manual_seed(0)
    model = NeoBERT(NeoBERTConfig(num_hidden_layers=3)).eval().to("cuda", torch.bfloat16)
    batch = pack(random_sequences(LENGTHS, 30000)).to("cuda")
    expected = model(
        batch.input_ids[None], cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen
    ).last_hidden_state[0]
    actual = PreparedNeoBERT(model)(batch)
    assert torch.nn.functional.cosine_similarity(actual.float(), expected.float()).min() > 0.999


def test_an_encoder_with_graphs(tmp_path):
    checkpoint, given = write_tiny_checkpoint(tmp_path), [text[:80] for text in texts()]
    fused = Encoder.from_pretrained(checkpoint, device="cuda", fused_epilogues=True)
    graphed = Encoder.from_pretrained(
        checkpoint, device="cuda", fused_epilogues=True, cuda_graphs=True
    )
    expected, actual = (e.encode(given, max_tokens=512) for e in (fused, graphed))
    assert graphed.stats.graphed == graphed.stats.batches
    norms = (actual**2).sum(1) ** 0.5 * (expected**2).sum(1) ** 0.5
    assert ((actual * expected).sum(1) / norms).min() > 0.999


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of the released width, seven layers, with the outlier."""
    config = NeoBERTConfig(vocab_size=1000, num_hidden_layers=7)
    return write_random_checkpoint(tmp_path_factory.mktemp("model"), config)


def gradients(checkpoint, fused, inputs, dtype, autocast, weights=None):
    """In `dtype`, of the checkpoint rounded to that of `weights`."""
    model = NeoBERT.from_pretrained(checkpoint, dtype=weights or dtype).to(dtype).train().cuda()
    if fused:
        fuse_epilogues(model)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        hidden = model(**inputs).last_hidden_state
    torch.manual_seed(1)
    hidden.backward(torch.randn(hidden.shape, device="cuda").to(hidden.dtype))
    return {name: parameter.grad.double() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "bfloat16 by autocast"])
def test_gradients_err_as_those_that_are_not_fused(checkpoint, precision):
    """Against float32, whose own error does not count beside bfloat16's; in float32 the two agree.
    The kernels of the model that is not fused are held against plain PyTorch in test_ops.py."""
    batch = pack(random_sequences(LENGTHS)).to("cuda")
    inputs = batch.inputs()
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    truth = gradients(checkpoint, False, inputs, torch.float32, False, dtype)
    autocast = precision.endswith("autocast")
    errors = []
    for fused in (True, False):
        found = gradients(checkpoint, fused, inputs, dtype, autocast)
        relative = [(found[name] - t).norm() / t.norm() for name, t in truth.items()]
        errors.append(torch.stack(relative))
    if precision == "float32":
        assert errors[0].max() < 1e-4
    else:
        assert errors[0].max() <= 2 * errors[1].max()
        assert errors[0].median() <= 2 * errors[1].median()


def test_a_training_step_is_deterministic(checkpoint):
    batch = pack(random_sequences([64, 64, 5])).to("cuda")
    inputs = batch.inputs()
    first, second = (gradients(checkpoint, True, inputs, torch.float32, True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
