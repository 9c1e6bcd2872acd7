"""varlen_attention: accuracy against float64, isolation of sequences, and what it refuses."""

import pytest
import torch
from accuracy import assert_accurate
from isa import OLDER, run_on
from sequences import ARGUMENTS, EDGES, assert_accurate_by_sequence, offsets, packed, plain
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from neobert_kernels import varlen_attention, varlen_attention_qkv
from neobert_kernels._library import ops
from neobert_kernels.attention import reference, reference_bwd

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ONE_LONG = [7, 1, 2190, 30, 3, 64, 1]  # long enough that its keys are divided in the backward pass
ALONE = [1]


def ours(qkv: Tensor, dout: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> list[Tensor]:
    qkv = qkv.detach().requires_grad_()
    out = varlen_attention_qkv(qkv, cu_seqlens, max_seqlen)
    (grad,) = torch.autograd.grad(out, qkv, dout)
    return [out.detach(), *grad.unbind(2)]


def check_accuracy(lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype) -> None:
    qkv, dout, cu_seqlens = packed(lengths, heads, head_dim, dtype, beyond=3)
    results = ours(qkv, dout, cu_seqlens, max(lengths))
    yardsticks = plain(qkv, dout, cu_seqlens, dtype)
    truths = plain(qkv, dout, cu_seqlens, torch.float64)
    for name, *tensors in zip(("out", "dq", "dk", "dv"), results, yardsticks, truths, strict=True):
        what = f"{name}, head_dim {head_dim}, {dtype}"
        assert_accurate_by_sequence(*tensors, lengths, what)
        assert not results[0][sum(lengths) :].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim"),
    [
        (EDGES, 2, 64),
        (EDGES, 2, 128),
        (ONE_LONG, 1, 64),
        (ALONE, 2, 64),
        ([5, 17, 130], 3, 8),
        ([5, 17, 130], 2, 7),
        ([70, 3, 33], 2, 40),
        ([70, 3, 600], 1, 256),
    ],
    ids=["edges", "edges-128", "one-long", "one-token", "dim-8", "dim-7", "dim-40", "dim-256"],
)
def test_accuracy(lengths, heads, head_dim, dtype):
    check_accuracy(lengths, heads, head_dim, dtype)


def check_compactly() -> None:
    for dtype in DTYPES:
        check_accuracy([1, 0, 65, 17, 129, 515], 2, 64, dtype)
        check_accuracy([5, 34], 2, 7, dtype)
    test_isolation(torch.bfloat16)


@pytest.mark.parametrize("isa", OLDER)
def test_other_instruction_sets(isa):
    run_on(isa, check_compactly)


def test_lse():
    qkv, _, cu_seqlens = packed(EDGES, 2, 64, beyond=2)
    _, lse = ops.varlen_attention(*qkv.unbind(2), cu_seqlens, 513, 0.125)
    arguments = (*qkv.unbind(2), cu_seqlens, 513, 0.125)
    truth = reference(*(t.double() for t in arguments[:3]), *arguments[3:])[1]
    assert_accurate(lse, reference(*arguments)[1], truth, "lse")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(dtype):
    """Any scale: negative turns the largest score into the smallest, zero makes all equal."""
    qkv, _, cu_seqlens = packed([40, 9], 2, 64, dtype)
    q, k, v = qkv.unbind(2)
    torch.testing.assert_close(
        varlen_attention(q, k, v, cu_seqlens, 40, -0.3),
        varlen_attention(-q, k, v, cu_seqlens, 40, 0.3),
        rtol=0,
        atol=0,
    )
    means = torch.cat([s.double().mean(0, keepdim=True).expand_as(s) for s in v.split([40, 9])])
    plain_means = torch.cat([s.mean(0, keepdim=True).expand_as(s) for s in v.split([40, 9])])
    out = varlen_attention(q, k, v, cu_seqlens, 40, 0.0)
    assert_accurate(out.flatten(1), plain_means.flatten(1), means.flatten(1))


def test_strided_views_are_read_as_they_lie():
    """Other strides, same values, same bits; separate gradients equal the packed one."""
    qkv, dout, cu_seqlens = packed([65, 3, 130], 2, 64)
    expected = ours(qkv, dout, cu_seqlens, 130)
    wide = torch.full((198, 5, 4, 80), torch.nan)
    views = [wide[:, 1:3, i, 8:72].copy_(qkv[:, :, i]).requires_grad_() for i in range(3)]
    separate = torch.randn(2, 198, 64).transpose(0, 1).copy_(qkv[:, :, 1]).requires_grad_()
    for q, k, v in (views, (views[0], separate, views[2])):
        out = varlen_attention(q, k, v, cu_seqlens, 130)
        # A dout of stride 0, as a sum makes, and a strided one.
        assert torch.autograd.grad(out.sum(), k, retain_graph=True)[0].isfinite().all()
        strided = torch.stack([dout, dout], -1)[..., 0]
        grads = torch.autograd.grad(out, (q, k, v), strided)
        for name, a, b in zip(("out", *ARGUMENTS), (out, *grads), expected, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_isolation(dtype):
    """NaN in one sequence leaves every bit of the others alone, and so does its absence."""
    lengths = [33, 7, 65, 1, 20]
    qkv, dout, cu_seqlens = packed(lengths, 2, 64, dtype, beyond=4)
    before = ours(qkv, dout, cu_seqlens, 65)
    qkv[40:105], qkv[-4:] = torch.nan, torch.nan
    after = ours(qkv, dout, cu_seqlens, 65)
    others = [*range(40), *range(105, 126)]
    for name, a, b in zip(("out", *ARGUMENTS), before, after, strict=True):
        assert torch.equal(a[others], b[others]), name
        assert b[40:105].isnan().all(), name
        assert not b[-4:].any(), f"{name}: tokens of no sequence"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [EDGES, ONE_LONG], ids=["edges", "one-long"])
def test_bits_depend_on_the_sequence_alone(lengths, dtype):
    """Alone, in another order or on another number of threads: the same bits, out and gradients."""
    qkv, dout, cu_seqlens = packed(lengths, 2, 64, dtype)
    together = ours(qkv, dout, cu_seqlens, max(lengths))
    parts = [t.split(lengths) for t in (qkv, dout)]

    alone = [ours(*pair, offsets([len(pair[0])]), 4096) for pair in zip(*parts, strict=True)]
    assert all(map(torch.equal, together, map(torch.cat, zip(*alone, strict=True))))

    order = torch.randperm(len(lengths)).tolist()
    shuffled = [torch.cat([part[i] for i in order]) for part in parts]
    moved = ours(*shuffled, offsets([lengths[i] for i in order]), 4096)
    for a, b in zip(together, moved, strict=True):
        assert torch.equal(torch.cat([a.split(lengths)[i] for i in order]), b)

    threads = torch.get_num_threads()
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        try:
            again = ours(qkv, dout, cu_seqlens, max(lengths))
        finally:
            torch.set_num_threads(threads)
        assert all(map(torch.equal, together, again)), f"{count} threads"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outliers(dtype):
    """Scores of ±5e3, then ±1e5: the softmax picks one key, and nothing overflows."""
    qkv, dout, cu_seqlens = packed([300, 2, 600], 2, 64, dtype)
    qkv[:, :, :2, 5] *= 60  # scores to 5e3; soon beyond that plain float16 overflows
    out, *grads = ours(qkv, dout, cu_seqlens, 600)
    for name, t in zip(ARGUMENTS, grads, strict=True):
        assert t.isfinite().all(), name
    huge = ours(qkv * 5, dout, cu_seqlens, 600)
    assert all(t.isfinite().all() for t in huge)
    truth = plain(qkv, dout, cu_seqlens, torch.float64)[0]
    yardstick = plain(qkv, dout, cu_seqlens, dtype)[0]
    assert_accurate(out.flatten(), yardstick.flatten(), truth.flatten())


def test_grads_twice():
    qkv, dout, cu_seqlens = packed([20, 130], 2, 64)
    qkv.requires_grad_()
    out = varlen_attention_qkv(qkv, cu_seqlens, 130)
    first, second = (torch.autograd.grad(out, qkv, dout, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_reference_gradients():
    qkv, _, cu_seqlens = packed([4, 0, 1, 3], 2, 6, torch.float64, beyond=1)

    class Reference(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.saved = (q, k, v, *reference(q, k, v, cu_seqlens, 4, 0.4))
            return ctx.saved[3]

        @staticmethod
        def backward(ctx, dout):
            return reference_bwd(dout, *ctx.saved, cu_seqlens, 4, 0.4).unbind(2)

    views = [t.requires_grad_() for t in qkv.unbind(2)]
    assert torch.autograd.gradcheck(Reference.apply, views)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    qkv, dout, cu_seqlens = packed([5, 0, 18], 2, 16, dtype, beyond=1)
    arguments = (*qkv.unbind(2), cu_seqlens, 18, 0.25)
    torch.library.opcheck(ops.varlen_attention.default, arguments)
    out, lse = ops.varlen_attention(*arguments)
    backward = (dout, *qkv.unbind(2), out, lse, cu_seqlens, 18, 0.25)
    torch.library.opcheck(ops.varlen_attention_bwd.default, backward)


def test_compiles_whole_for_any_number_of_tokens():
    def loss(qkv, dout, cu_seqlens, max_seqlen):
        packed_out = varlen_attention_qkv(qkv * 1.0, cu_seqlens, max_seqlen)
        separate = varlen_attention(*qkv.unbind(2), cu_seqlens, max_seqlen)
        return ((packed_out + separate) * dout).sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ([5, 12], [40, 3, 9], [33], [2, 2, 2, 60]):
        qkv, dout, cu_seqlens = packed(lengths, 2, 16)
        arguments = (dout, cu_seqlens, max(lengths))
        leaves = [qkv.clone().requires_grad_() for _ in range(2)]
        values = [f(x, *arguments) for f, x in zip((loss, compiled), leaves, strict=True)]
        torch.testing.assert_close(*values)
        grads = [torch.autograd.grad(y, x)[0] for y, x in zip(values, leaves, strict=True)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count <= 2, "a new token count must not compile anew"


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("tokens", [0, 6])
def test_nothing_to_attend_to(lengths, tokens):
    qkv, dout, cu_seqlens = packed(lengths, 2, 64, beyond=tokens)
    for t in ours(qkv, dout, cu_seqlens, 0):
        assert t.shape == dout.shape and not t.any()


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([1, 4], r"begin with 0, got cu_seqlens\[0\] = 1"),
        ([-3, 4], r"begin with 0, got cu_seqlens\[0\] = -3"),
        ([0, 5, 3, 6], r"never fall, got cu_seqlens\[2\] = 3 after cu_seqlens\[1\] = 5"),
        ([0, 2, -1], r"never fall, got cu_seqlens\[2\] = -1 after cu_seqlens\[1\] = 2"),
        ([0, 6, 11], r"at or before the 10 tokens, got cu_seqlens\[2\] = 11"),
        ([0, 2**31 - 1], r"at or before the 10 tokens, got cu_seqlens\[1\] = 2147483647"),
        ([0, 1, 10], r"cu_seqlens gives sequence 1 9 tokens, but max_seqlen is 8"),
    ],
)
def test_bad_offsets(cu_seqlens, message):
    q = torch.randn(10, 2, 8)
    cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    lse = torch.zeros(2, 10)
    with pytest.raises(ValueError, match=message):
        varlen_attention(q, q, q, cu_seqlens, 8)
    with pytest.raises(ValueError, match=message):
        ops.varlen_attention_bwd(q, q, q, q, q, lse, cu_seqlens, 8, 1.0)
    with pytest.raises(ValueError, match="varlen_attention: cu_seqlens"):
        reference(q, q, q, cu_seqlens, 8, 1.0)
    with pytest.raises(ValueError, match="varlen_attention_bwd: cu_seqlens"):
        reference_bwd(q, q, q, q, q, lse, cu_seqlens, 8, 1.0)


@pytest.mark.no_poison
def test_second_derivative_is_refused():
    qkv = torch.randn(10, 2, 3, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(
        varlen_attention_qkv(qkv, offsets([4, 6]), 6).square().sum(), qkv, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_bad_arguments():
    q, cu_seqlens = torch.randn(10, 2, 8), offsets([10])

    def refused(error, message, *arguments):
        with pytest.raises(error, match=message):
            varlen_attention(*arguments)

    refused(TypeError, "q must be float32.*got torch.float64", q.double(), q, q, cu_seqlens, 10)
    refused(TypeError, "v is torch.bfloat16 but q is", q, q, q.bfloat16(), cu_seqlens, 10)
    refused(ValueError, r"k \(9, 2, 8\)", q, q[:9], q, cu_seqlens, 10)
    refused(ValueError, r"q \(2, 8\)", q[0], q[0], q[0], cu_seqlens, 10)
    refused(
        ValueError,
        r"contiguous last axis.*k \(16, 1, 2\)",
        q,
        q.view(10, 8, 2).mT,
        q,
        cu_seqlens,
        10,
    )
    refused(
        ValueError,
        "head_dim must be at least 1",
        q[..., :0],
        q[..., :0],
        q[..., :0],
        cu_seqlens,
        10,
    )
    refused(TypeError, "cu_seqlens must be int32, got torch.int64", q, q, q, cu_seqlens.long(), 10)
    refused(ValueError, r"cu_seqlens must have shape", q, q, q, cu_seqlens[None], 10)
    refused(ValueError, r"cu_seqlens must have shape.*\(0,\)", q, q, q, cu_seqlens[:0], 10)
    refused(ValueError, "cu_seqlens is on meta but q is on cpu", q, q, q, cu_seqlens.to("meta"), 10)
    refused(TypeError, "max_seqlen must be a Python int", q, q, q, cu_seqlens, torch.tensor(10))
    qkv = torch.randn(10, 2, 3, 8)
    for bad in (qkv[:, :, :2], qkv[0], qkv.transpose(0, 1)):
        with pytest.raises(ValueError, match="qkv must be contiguous with shape"):
            varlen_attention_qkv(bad, cu_seqlens, 10)


def test_ops_called_directly_check_too():
    """torch.ops.neobert is reachable without the public functions; it must not crash either."""
    q, cu_seqlens, lse = torch.randn(10, 2, 8), offsets([10]), torch.zeros(2, 10)

    def refused(message, op, *arguments):
        with pytest.raises(ValueError, match=message):
            op(*arguments)

    forward, backward = ops.varlen_attention, ops.varlen_attention_bwd
    refused("k must have q's shape", forward, q, q[:5], q, cu_seqlens, 10, 1.0)
    refused("v must have q's dtype", forward, q, q, q.half(), cu_seqlens, 10, 1.0)
    refused("float32, bfloat16 and float16", forward, *[q.double()] * 3, cu_seqlens, 10, 1.0)
    refused("shape", forward, q[0], q[0], q[0], cu_seqlens, 10, 1.0)
    strided = torch.randn(10, 8, 2).transpose(1, 2)
    refused("contiguous last axis", forward, q, q, strided, cu_seqlens, 10, 1.0)
    refused("contiguous int32 with shape", forward, q, q, q, cu_seqlens.long(), 10, 1.0)
    refused("contiguous int32 with shape", forward, q, q, q, cu_seqlens[:0], 10, 1.0)
    refused("dout must have q's shape", backward, q[:3], q, q, q, q, lse, cu_seqlens, 10, 1.0)
    refused("lse must be float32", backward, q, q, q, q, q, lse[:, :3], cu_seqlens, 10, 1.0)
