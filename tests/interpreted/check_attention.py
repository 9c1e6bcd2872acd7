"""varlen_attention's forward in Triton's interpreter, and the list of tiles."""

import pytest
import torch
from sequences import assert_accurate_by_sequence, far_apart, offsets, packed, plain

from neobert_kernels.attention import reference

# Short, long and none in one batch; all short, at each limit of a regime; one long among short.
LENGTHS = {
    "edges": [1, 0, 63, 64, 65, 2, 0, 127, 128, 129, 0],
    "up to 64": [64, 5, 0, 63],
    "up to 128": [65, 128, 3],
    "one long": [7, 1, 300, 30, 3],
    "multiples of a tile": [256, 384],
}
CASES = [
    *((lengths, 64, torch.float16) for lengths in LENGTHS.values()),
    (LENGTHS["edges"], 128, torch.float16),
    ([511, 513], 64, torch.float16),
    ([3, 129, 64, 0, 17], 64, torch.float32),
    ([3, 129, 64, 0, 17], 128, torch.float32),
]


def attend(kernels, qkv, cu_seqlens, max_seqlen, scale=None):
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    return kernels.varlen_attention(*qkv.unbind(2), cu_seqlens, max_seqlen, scale)


@pytest.mark.parametrize(("lengths", "head_dim", "dtype"), CASES, ids=str)
def test_accuracy(kernels, lengths, head_dim, dtype):
    qkv, dout, cu_seqlens = packed(lengths, 2, head_dim, dtype, beyond=3)
    out, lse = attend(kernels, qkv, cu_seqlens, max(lengths))
    yardstick = plain(qkv, dout, cu_seqlens, dtype)[0]
    truth = plain(qkv, dout, cu_seqlens, torch.float64)[0]
    assert_accurate_by_sequence(out, yardstick, truth, lengths, "out")
    arguments = (cu_seqlens, max(lengths), head_dim**-0.5)
    yardstick, truth = (
        reference(*(t.to(wide) for t in qkv.unbind(2)), *arguments)[1].t()
        for wide in (torch.float32, torch.float64)
    )
    assert lse.dtype == torch.float32
    assert_accurate_by_sequence(lse.t(), yardstick, truth, lengths, "lse")
    assert not out[sum(lengths) :].any() and not lse[:, sum(lengths) :].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_bits_depend_on_the_sequence_alone(kernels, dtype):
    """Alone, in another order, with a looser max_seqlen: the same bits."""
    lengths = [3, 64, 0, 100, 150, 1] if dtype == torch.float16 else [3, 0, 20, 40]
    qkv, _, cu_seqlens = packed(lengths, 2, 64, dtype)
    together = attend(kernels, qkv, cu_seqlens, max(lengths))
    for (start, end), length in zip(
        zip(cu_seqlens.tolist(), cu_seqlens[1:].tolist(), strict=False), lengths, strict=True
    ):
        if not length:
            continue
        for max_seqlen in (length, 100, 4096):
            alone = attend(kernels, qkv[start:end], offsets([length]), max(max_seqlen, length))
            assert torch.equal(alone[0], together[0][start:end])
            assert torch.equal(alone[1], together[1][:, start:end])
    order = torch.randperm(len(lengths)).tolist()
    moved = torch.cat([qkv.split(lengths)[i] for i in order])
    out = attend(kernels, moved, offsets([lengths[i] for i in order]), max(lengths))[0]
    assert torch.equal(out, torch.cat([together[0].split(lengths)[i] for i in order]))


def test_nan_stays_in_its_sequence(kernels):
    lengths = [33, 7, 65, 1, 140, 20]
    qkv, _, cu_seqlens = packed(lengths, 2, 64, torch.float16, beyond=4)
    before = attend(kernels, qkv, cu_seqlens, 140)
    bad = [*range(40, 105), *range(106, 246), *range(266, 270)]
    qkv[bad] = torch.nan
    after = attend(kernels, qkv, cu_seqlens, 140)
    others = [token for token in range(266) if token not in bad]
    assert torch.equal(before[0][others], after[0][others])
    assert torch.equal(before[1][:, others], after[1][:, others])
    assert after[0][40:105].isnan().all() and after[0][106:246].isnan().all()
    assert not after[0][266:].any(), "tokens of no sequence"


def test_offsets_padded_by_repeating_the_last(kernels):
    lengths = [9, 140, 3]
    qkv, _, cu_seqlens = packed(lengths, 2, 64, torch.float16, beyond=20)
    padded = torch.cat([cu_seqlens, cu_seqlens[-1:].expand(40)])
    for exact, same in zip(
        attend(kernels, qkv, cu_seqlens, 140), attend(kernels, qkv, padded, 512), strict=True
    ):
        assert torch.equal(exact, same)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("tokens", [0, 150])
def test_nothing_to_attend_to(kernels, lengths, tokens):
    qkv = torch.randn(tokens, 2, 3, 64)
    for max_seqlen in (0, 200):
        out, lse = attend(kernels, qkv, offsets(lengths), max_seqlen)
        assert out.shape == (tokens, 2, 64) and not out.any()
        assert lse.shape == (2, tokens) and not lse.any()


def test_strided_views_are_read_as_they_lie(kernels):
    lengths = [65, 3, 130]
    qkv, _, cu_seqlens = packed(lengths, 2, 64, torch.float16)
    expected = attend(kernels, qkv, cu_seqlens, 130)
    wide = torch.full((198, 5, 4, 80), torch.nan, dtype=torch.float16)
    q, k, v = (wide[:, 1:3, i, 8:72].copy_(qkv[:, :, i]) for i in range(3))
    k = torch.empty(2, 198, 64, dtype=torch.float16).transpose(0, 1).copy_(k)
    ours = kernels.varlen_attention(q, k, v, cu_seqlens, 130, 0.125)
    assert all(map(torch.equal, ours, expected))


def test_rows_more_than_two_to_the_31_elements_apart(kernels):
    qkv, _, cu_seqlens = packed([150, 10], 1, 64, torch.float16)
    expected = attend(kernels, qkv, cu_seqlens, 150)
    q, k, v = qkv.unbind(2)
    far = far_apart(k, 2**24)
    ours = kernels.varlen_attention(q, far, v, cu_seqlens, 150, 0.125)
    assert all(map(torch.equal, ours, expected))
    ours = kernels.varlen_attention(far_apart(q, 2**24), k, v, cu_seqlens, 150, 0.125)
    assert all(map(torch.equal, ours, expected))


def test_scale(kernels):
    """Any scale: negative turns the largest score into the smallest, zero makes all equal."""
    lengths = [40, 9, 140]
    qkv, _, cu_seqlens = packed(lengths, 2, 64, torch.float16)
    q, k, v = qkv.unbind(2)
    negative = kernels.varlen_attention(q, k, v, cu_seqlens, 140, -0.3)
    turned = kernels.varlen_attention(-q, k, v, cu_seqlens, 140, 0.3)
    assert all(map(torch.equal, negative, turned))
    out, lse = kernels.varlen_attention(q, k, v, cu_seqlens, 140, 0.0)
    means = torch.cat([s.double().mean(0, keepdim=True).expand_as(s) for s in v.split(lengths)])
    torch.testing.assert_close(out.double(), means, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse[0, [0, 40, 49]], torch.tensor([40.0, 9.0, 140.0]).log())


def test_large_scores(kernels):
    """Scores of ±5e3: the softmax picks one key, and nothing overflows."""
    lengths = [50, 300]
    qkv, dout, cu_seqlens = packed(lengths, 2, 64, torch.float16)
    qkv[:, :, :2, 5] *= 60
    out, _ = attend(kernels, qkv, cu_seqlens, 300)
    yardstick = plain(qkv, dout, cu_seqlens, torch.float16)[0]
    truth = plain(qkv, dout, cu_seqlens, torch.float64)[0]
    assert_accurate_by_sequence(out, yardstick, truth, lengths, "out")


def listed(kernels, monkeypatch, lengths, max_seqlen, tokens=None):
    """The list of tiles as (start, length, first row), and for how many it has room."""
    tokens = sum(lengths) if tokens is None else tokens
    lists = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: lists.append((args[5], grid[0]))

    monkeypatch.setattr(kernels, "_long", Recorder())
    attend(kernels, torch.zeros(tokens, 1, 3, 64).half(), offsets(lengths), max_seqlen)
    if not lists:
        return [], 0
    ((tiles, capacity),) = lists
    assert len(tiles) == 3 * capacity + 1
    count = int(tiles[-1])
    return list(zip(*tiles[:-1].view(3, capacity)[:, :count].tolist(), strict=True)), capacity


@pytest.mark.parametrize(
    "lengths",
    [
        [129, 3, 0, 700, 128, 129, 256, 1, 384],
        [128, 1, 0],
        [129] * 5,
        [130, *[0] * 600, 257, *[5] * 20, 131],  # more sequences than a step of the listing
    ],
    ids=["mixed", "all short", "equal", "many"],
)
def test_the_list_has_every_tile_the_longest_first(kernels, monkeypatch, lengths):
    starts = offsets(lengths).tolist()
    expected = [
        (start, length, row)
        for start, length in zip(starts, lengths, strict=False)
        if length > 128
        for row in range(0, length, 128)
    ]
    tiles, capacity = listed(kernels, monkeypatch, lengths, max(lengths))
    assert sorted(tiles) == sorted(expected)
    order = [length for _, length, _ in tiles]
    assert order == sorted(order, reverse=True)
    assert len(tiles) <= capacity <= 2 * sum(lengths) // 129
    if set(lengths) == {129}:
        assert capacity == len(tiles), "no room for tiles that cannot be"


def test_a_sequence_longer_than_max_seqlen_is_nan(kernels):
    lengths = [5, 30, 200, 70, 150]
    qkv, _, cu_seqlens = packed(lengths, 2, 64, torch.float16)
    expected = attend(kernels, qkv, cu_seqlens, 200)
    for max_seqlen in (0, 20, 64, 100, 160):
        for ours, right in zip(attend(kernels, qkv, cu_seqlens, max_seqlen), expected, strict=True):
            axis = 0 if ours.dim() == 3 else 1
            pieces = (t.split(lengths, axis) for t in (ours, right))
            for length, mine, true in zip(lengths, *pieces, strict=True):
                assert torch.equal(mine, true) if length <= max_seqlen else mine.isnan().all()


BAD_OFFSETS = [[0, 200, 100, 300], [-150, 20, 900], [7, 5, 3], [0, 400, 0, 400, 0, 400]]


@pytest.mark.parametrize("cu_seqlens", BAD_OFFSETS, ids=str)
def test_bad_offsets_leave_no_tensor(kernels, cu_seqlens):
    # On a GPU offsets are not checked; the sanitizer would see an access outside a tensor. Tiles
    # that overlap are written by two programs: that clash is not the kernel's.
    qkv = torch.randn(300, 1, 3, 64).half()
    try:
        attend(kernels, qkv, torch.tensor(cu_seqlens, dtype=torch.int32), 512)
    except Exception as error:
        assert "by more than one program" in str(error), error


def test_errors(kernels):
    q, cu_seqlens = torch.randn(10, 2, 64), offsets([10])

    def refused(error, message, *arguments):
        with pytest.raises(error, match=message):
            kernels.varlen_attention(*arguments, 10, 0.125)

    narrow = torch.randn(10, 2, 96)
    refused(ValueError, r"head_dim of 64 or 128.*\(10, 2, 96\)", narrow, narrow, narrow, cu_seqlens)
    refused(ValueError, r"k must have shape \(10, 2, 64\).*\(9, 2, 64\)", q, q[:9], q, cu_seqlens)
    refused(TypeError, "cu_seqlens must be int32, got torch.int64", q, q, q, cu_seqlens.long())
    refused(ValueError, "cu_seqlens is on meta but q is on cpu", q, q, q, cu_seqlens.to("meta"))
    refused(TypeError, "q must be float32, bfloat16 or float16", *[q.double()] * 3, cu_seqlens)
    refused(TypeError, r"v is torch\.float16 but q is", q, q, q.half(), cu_seqlens)
    strided = torch.randn(10, 64, 2).mT
    refused(ValueError, "k must have a contiguous last axis", q, strided, q, cu_seqlens)
    far = torch.randn(64).as_strided((1, 1, 64), (2**24 + 1, 64, 1))
    refused(ValueError, r"stride 2\*\*24 at most.*\(16777217", far, far, far, cu_seqlens)
