"""varlen_attention on the GPU: accuracy, isolation, one order of summation, extreme batches."""

import pytest
import torch
from accuracy import assert_accurate
from cases import plain_attention
from sequences import EDGES, assert_accurate_by_sequence, offsets
from torch import Tensor

from neobert_kernels import varlen_attention, varlen_attention_qkv
from neobert_kernels.triton import attention, attention_bwd

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HEADS = 12
NAMES = ("out", "dq", "dk", "dv")


@pytest.fixture
def deterministic(request):
    """Whether the backward must sum in a fixed order: parametrized indirectly, True without."""
    wanted = getattr(request, "param", True)
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield wanted
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


MODES = pytest.mark.parametrize(
    "deterministic", [True, False], indirect=True, ids=["one order", "atomics"]
)


def packed(lengths, head_dim=64, dtype=torch.bfloat16, beyond=0, heads=HEADS):
    tokens = sum(lengths) + beyond
    qkv = torch.randn(tokens, heads, 3, head_dim, device="cuda").to(dtype)
    dout = torch.randn(tokens, heads, head_dim, device="cuda").to(dtype)
    return qkv, dout, offsets(lengths).cuda()


def run(qkv: Tensor, dout: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> list[Tensor]:
    qkv = qkv.detach().requires_grad_()
    out = varlen_attention_qkv(qkv, cu_seqlens, max_seqlen)
    (grad,) = torch.autograd.grad(out, qkv, dout)
    return [out.detach(), *grad.unbind(2)]


def plain(qkv: Tensor, dout: Tensor, lengths: list[int], dtype: torch.dtype) -> list[Tensor]:
    q, k, v = (t[: sum(lengths)].to(dtype).requires_grad_() for t in qkv.unbind(2))
    out = plain_attention(q, k, v, lengths)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout[: sum(lengths)].to(dtype))]


@pytest.mark.no_poison
@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", [EDGES, [7, 1, 8000, 30, 3], [64, 3], [128, 65, 3]], ids=str)
def test_accuracy(lengths, head_dim, dtype, deterministic):
    qkv, dout, cu_seqlens = packed(lengths, head_dim, dtype, beyond=3, heads=2)
    ours = run(qkv, dout, cu_seqlens, max(lengths))
    yardsticks = plain(qkv, dout, lengths, dtype)
    truths = plain(qkv, dout, lengths, torch.float64)
    for name, mine, *others in zip(NAMES, ours, yardsticks, truths, strict=True):
        tensors = [t[: sum(lengths)].cpu() for t in (mine, *others)]
        if dtype == torch.float32:
            # The errors of a short sequence's few scores are a matter of luck.
            assert_accurate(*(t.flatten() for t in tensors), name)
        else:
            assert_accurate_by_sequence(*tensors, lengths, name)
        assert not mine[sum(lengths) :].any()


@pytest.mark.no_poison
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bits_depend_on_the_sequence_alone(head_dim, dtype, deterministic):
    """Alone, in another order, with a looser max_seqlen, beside NaN: the same bits."""
    qkv, dout, cu_seqlens = packed(EDGES, head_dim, dtype)
    together = run(qkv, dout, cu_seqlens, max(EDGES))
    parts = [t.split(EDGES) for t in (qkv, dout, *together)]
    for length, *pieces in zip(EDGES, *parts, strict=True):
        if length == 0:
            continue
        for max_seqlen in {max(length, 64), max(length, 128), max(length, 129), 4096}:
            alone = run(*pieces[:2], offsets([length]).cuda(), max_seqlen)
            for name, mine, expected in zip(NAMES, alone, pieces[2:], strict=True):
                assert torch.equal(mine, expected), f"{name} of {length}, max_seqlen {max_seqlen}"
    order = torch.randperm(len(EDGES)).tolist()
    moved = [torch.cat([part[i] for i in order]) for part in parts]
    ours = run(*moved[:2], offsets([EDGES[i] for i in order]).cuda(), max(EDGES))
    assert all(map(torch.equal, ours, moved[2:]))
    start, end = cu_seqlens[10:12].tolist()  # the sequence of 511
    qkv[start:end] = torch.nan
    for before, after in zip(together, run(qkv, dout, cu_seqlens, max(EDGES)), strict=True):
        assert torch.equal(before[:start], after[:start])
        assert torch.equal(before[end:], after[end:])
        assert after[start:end].isnan().all()


@pytest.mark.no_poison
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_every_time(dtype, deterministic):
    lengths = [2000, 511, 3, 64, 1000, 129] * 4
    inputs = (*packed(lengths, dtype=dtype), max(lengths))
    first = run(*inputs)
    for _ in range(10):
        assert all(map(torch.equal, first, run(*inputs)))


@pytest.mark.no_poison
@MODES
@pytest.mark.parametrize(
    "lengths",
    [[1] * 100_000, [8192] * 13, [20_000], [*[1] * 50_000, 4096, *[0] * 50_000, 129]],
    ids=["one-token sequences", "100k tokens", "long", "long among 100k"],
)
def test_large_batches(lengths, deterministic):
    """Every sequence's first token and last as in a batch of its own."""
    qkv, dout, cu_seqlens = packed(lengths)
    together = run(qkv, dout, cu_seqlens, max(lengths))
    starts = cu_seqlens.tolist()
    for i in {0, 1, len(lengths) // 2, lengths.index(max(lengths)), len(lengths) - 1}:
        if i < len(lengths) and lengths[i]:
            own = slice(starts[i], starts[i + 1])
            alone = run(qkv[own], dout[own], offsets([lengths[i]]).cuda(), lengths[i])
            for name, mine, expected in zip(NAMES, together, alone, strict=True):
                if deterministic or name != "dq":
                    assert torch.equal(mine[own], expected), name
    if lengths[0] == 1:
        torch.testing.assert_close(together[0][:50_000], qkv[:50_000, :, 2], rtol=0, atol=0)


@pytest.mark.no_poison
def test_more_than_two_to_the_31_elements(deterministic):
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip(f"needs 40 GiB of GPU memory, {free / 2**30:.0f} are free")
    tail = [100, 400, 3]
    lengths = [512] * (2**31 // (HEADS * 3 * 64) // 512 + 1) + tail
    qkv, dout, cu_seqlens = packed(lengths)
    assert qkv[: -sum(tail)].numel() > 2**31
    together = run(qkv, dout, cu_seqlens, 512)
    own = slice(-sum(tail), None)
    alone = run(qkv[own].contiguous(), dout[own], offsets(tail).cuda(), 512)
    for name, mine, expected in zip(NAMES, together, alone, strict=True):
        assert torch.equal(mine[own], expected), name


@pytest.mark.no_poison
def test_a_graph_replays_other_lengths(deterministic):
    """Offsets of fixed capacity, padded by repeating the last: the list is built at each replay."""
    capacity, max_seqlen, tokens = 64, 2048, 4096
    qkv, dout, _ = packed([tokens])
    cu_seqlens = torch.zeros(capacity + 1, dtype=torch.int32, device="cuda")

    def set_lengths(lengths):
        exact = offsets(lengths).cuda()
        cu_seqlens.copy_(torch.cat([exact, exact[-1:].expand(capacity - len(lengths))]))
        return exact

    set_lengths([tokens // 2] * 2)
    run(qkv, dout, cu_seqlens, max_seqlen)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run(qkv, dout, cu_seqlens, max_seqlen)
    for lengths in ([1] * 50, [2048, 1000, 3, 500], [64] * 63, EDGES, [0, 0, 5]):
        exact = set_lengths(lengths)
        graph.replay()
        assert all(map(torch.equal, replayed, run(qkv, dout, exact, max_seqlen)))


@pytest.mark.no_poison
@MODES
def test_the_host_never_waits(deterministic):
    inputs = (*packed([2000, 3, 64, 100]), 2000)
    run(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.no_poison
@MODES
def test_the_number_of_tokens_and_sequences_compiles_nothing(deterministic):
    kernels = (
        attention._short,
        attention._long,
        *(getattr(attention_bwd, f"_{name}") for name in ("short", "keys", "queries", "delta")),
    )

    def compiled():
        device = torch.cuda.current_device()
        return [len(kernel.device_caches[device][0]) for kernel in kernels]

    warm_up = (([33], 64), ([33], 128), ([33], 4096), ([300], 4096))
    for lengths, max_seqlen in warm_up:
        run(*packed(lengths), max_seqlen)
    before = compiled()
    for lengths, max_seqlen in (([1], 1), ([16] * 16, 16), ([128], 128), ([5, 1000], 1024)):
        run(*packed(lengths), max_seqlen)
    assert compiled() == before


@pytest.mark.no_poison
def test_a_sequence_longer_than_max_seqlen_is_nan(deterministic):
    lengths = [5, 300, 70]
    inputs = packed(lengths)
    for ours, right in zip(run(*inputs, 100), run(*inputs, 300), strict=True):
        assert ours[5:305].isnan().all()
        assert torch.equal(ours[:5], right[:5]) and torch.equal(ours[305:], right[305:])


def test_errors():
    q, cu_seqlens = torch.randn(10, 2, 64, device="cuda"), offsets([10]).cuda()

    def refused(error, message, *arguments):
        with pytest.raises(error, match=message):
            varlen_attention(*arguments)

    narrow = torch.randn(10, 2, 96, device="cuda")
    refused(ValueError, "head_dim of 64 or 128", narrow, narrow, narrow, cu_seqlens, 10)
    refused(ValueError, r"k \(9, 2, 64\)", q, q[:9], q, cu_seqlens, 10)
    refused(TypeError, "cu_seqlens must be int32, got torch.int64", q, q, q, cu_seqlens.long(), 10)
    refused(ValueError, "cu_seqlens is on cpu but q is on cuda", q, q, q, cu_seqlens.cpu(), 10)
