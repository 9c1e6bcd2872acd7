"""The epilogue GEMMs on the GPU: accuracy at real widths, rows that ignore the batch, graphs."""

import pytest
import torch
from accuracy import assert_accurate
from cases import DIM, HEAD_DIM, LENGTHS, WIDTH

from neobert import NeoBERT, NeoBERTConfig
from neobert.encode import Encoder
from neobert.packing import pack
from neobert.prepared import PreparedNeoBERT
from neobert_kernels import epilogue
from neobert_kernels._library import ops
from tests.checkpoints import random_sequences
from tests.tiny import texts, write_tiny_checkpoint

pytestmark = pytest.mark.no_poison
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
OPS = ("rms_linear_rotary", "rms_linear_swiglu", "linear_add")


def arguments(name, tokens, dtype, stream):
    """Of one call, with the outlier of a trained model in the residual stream."""

    def randn(*shape, scale=1.0, dtype=dtype):
        return (scale * torch.randn(shape, device="cuda")).to(dtype)

    x = randn(tokens, DIM, dtype=stream)
    x[:, 256] = 1330.0
    if name == "linear_add":
        return randn(tokens, WIDTH), randn(DIM, WIDTH, scale=WIDTH**-0.5), x
    squares = epilogue.reference_squares(x)
    if name == "rms_linear_swiglu":
        return x, squares, randn(2 * WIDTH, DIM, scale=DIM**-0.5), 1e-5
    table = torch.randn(2, 512, HEAD_DIM // 2, device="cuda").unbind()
    positions = torch.arange(tokens, device="cuda") % 512
    return x, squares, randn(3 * DIM, DIM, scale=DIM**-0.5), *table, positions, 1e-5


REFERENCES = {
    "rms_linear_rotary": epilogue.reference_rotary,
    "rms_linear_swiglu": epilogue.reference_swiglu,
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
    ours, plain = run(getattr(ops, name), given)[0], run(REFERENCES[name], given)[0]
    truth = run(REFERENCES[name], wide)[0]
    assert_accurate(*(t.flatten() for t in (ours, plain, truth)), name)


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
