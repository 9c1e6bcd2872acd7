"""varlen_attention's backward in Triton's interpreter: with sums in one order, and by atomics."""

import pytest
import torch
from sequences import (
    ARGUMENTS,
    assert_accurate_by_sequence,
    far_apart,
    offsets,
    packed,
    plain,
)

from neobert_kernels.attention import reference
from neobert_kernels.triton.attention import varlen_attention

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
    # No shorter ones in float32: the errors of their few scores would be a matter of luck.
    ([33, 48, 0, 65], 64, torch.float32),
    ([33, 48, 0, 65], 128, torch.float32),
]
MODES = pytest.mark.parametrize("deterministic", [True, False], ids=["one order", "atomics"])


def backward(kernels, qkv, dout, cu_seqlens, max_seqlen, scale=None, deterministic=True):
    """[dq, dk, dv] packed, from the forward kernel's output and log-sum-exp."""
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    out, lse = varlen_attention(*qkv.unbind(2), cu_seqlens, 10**6, scale)
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        return kernels.varlen_attention_bwd(
            dout, *qkv.unbind(2), out, lse, cu_seqlens, max_seqlen, scale
        )
    finally:
        torch.use_deterministic_algorithms(was)


@MODES
@pytest.mark.parametrize(("lengths", "head_dim", "dtype"), CASES, ids=str)
def test_accuracy(kernels, lengths, head_dim, dtype, deterministic):
    qkv, dout, cu_seqlens = packed(lengths, 2, head_dim, dtype, beyond=3)
    ours = backward(kernels, qkv, dout, cu_seqlens, max(lengths), deterministic=deterministic)
    assert ours.shape == qkv.shape and ours.dtype == dtype and ours.is_contiguous()
    yardsticks = plain(qkv, dout, cu_seqlens, dtype)[1:]
    truths = plain(qkv, dout, cu_seqlens, torch.float64)[1:]
    for name, *tensors in zip(ARGUMENTS, ours.unbind(2), yardsticks, truths, strict=True):
        assert_accurate_by_sequence(*tensors, lengths, f"d{name}")
    assert not ours[sum(lengths) :].any()


def test_one_order_needs_no_atomics(kernels, monkeypatch):
    qkv, dout, cu_seqlens = packed([140, 3], 1, 64, torch.float16)
    monkeypatch.delattr(kernels, "_delta")  # it prepares the sums that atomics add to
    backward(kernels, qkv, dout, cu_seqlens, 140)
    with pytest.raises(NameError, match="_delta"):
        backward(kernels, qkv, dout, cu_seqlens, 140, deterministic=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_bits_depend_on_the_sequence_alone(kernels, dtype):
    """Alone, in another order, with a looser max_seqlen: the same bits."""
    lengths = [3, 64, 0, 100, 150, 1] if dtype == torch.float16 else [3, 0, 20, 40]
    qkv, dout, cu_seqlens = packed(lengths, 2, 64, dtype)
    together = backward(kernels, qkv, dout, cu_seqlens, max(lengths))
    parts = [t.split(lengths) for t in (qkv, dout, together)]
    for length, one, dout_one, expected in zip(lengths, *parts, strict=True):
        for max_seqlen in {max(length, 64), max(length, 100), 4096} if length else ():
            alone = backward(kernels, one, dout_one, offsets([length]), max_seqlen)
            assert torch.equal(alone, expected)
    order = torch.randperm(len(lengths)).tolist()
    moved, dout_moved, expected = (torch.cat([part[i] for i in order]) for part in parts)
    ours = backward(kernels, moved, dout_moved, offsets([lengths[i] for i in order]), max(lengths))
    assert torch.equal(ours, expected)


@MODES
def test_nan_stays_in_its_sequence(kernels, deterministic):
    lengths = [33, 7, 65, 1, 140, 20, 150]
    qkv, dout, cu_seqlens = packed(lengths, 1, 64, torch.float16, beyond=4)
    before = backward(kernels, qkv, dout, cu_seqlens, 150, deterministic=deterministic)
    bad = [*range(40, 105), *range(106, 246), *range(416, 420)]
    qkv[bad] = torch.nan
    after = backward(kernels, qkv, dout, cu_seqlens, 150, deterministic=deterministic)
    others = [token for token in range(416) if token not in bad]
    assert torch.equal(before[others], after[others])
    assert after[40:105].isnan().all() and after[106:246].isnan().all()
    assert not after[416:].any(), "tokens of no sequence"


@MODES
def test_offsets_padded_by_repeating_the_last(kernels, deterministic):
    lengths = [9, 140, 3]
    qkv, dout, cu_seqlens = packed(lengths, 2, 64, torch.float16, beyond=20)
    padded = torch.cat([cu_seqlens, cu_seqlens[-1:].expand(40)])
    exact = backward(kernels, qkv, dout, cu_seqlens, 140, deterministic=deterministic)
    same = backward(kernels, qkv, dout, padded, 512, deterministic=deterministic)
    assert torch.equal(exact, same)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("tokens", [0, 150])
def test_nothing_to_attend_to(kernels, lengths, tokens):
    qkv, dout = torch.randn(tokens, 2, 3, 64), torch.randn(tokens, 2, 64)
    for max_seqlen in (0, 200):
        ours = backward(kernels, qkv, dout, offsets(lengths), max_seqlen)
        assert ours.shape == qkv.shape and not ours.any()


def test_strided_views_are_read_as_they_lie(kernels):
    lengths = [65, 3, 130]
    qkv, dout, cu_seqlens = packed(lengths, 2, 64, torch.float16)
    out, lse = reference(*qkv.unbind(2), cu_seqlens, 130, 0.125)
    expected = kernels.varlen_attention_bwd(dout, *qkv.unbind(2), out, lse, cu_seqlens, 130, 0.125)
    wide = torch.full((198, 5, 4, 80), torch.nan, dtype=torch.float16)
    q, k, v = (wide[:, 1:3, i, 8:72].copy_(qkv[:, :, i]) for i in range(3))
    k = torch.empty(2, 198, 64, dtype=torch.float16).transpose(0, 1).copy_(k)
    spread = [torch.stack([t, t], 1)[:, 0] for t in (dout, out, lse)]
    ours = kernels.varlen_attention_bwd(
        spread[0], q, k, v, spread[1], spread[2], cu_seqlens, 130, 0.125
    )
    assert torch.equal(ours, expected)


@MODES
def test_rows_more_than_two_to_the_31_elements_apart(kernels, deterministic):
    qkv, dout, cu_seqlens = packed([150, 10], 1, 64, torch.float16)
    out, lse = reference(*qkv.unbind(2), cu_seqlens, 150, 0.125)
    q, k, v = qkv.unbind(2)
    rest = (v, out, lse, cu_seqlens, 150, 0.125)
    torch.use_deterministic_algorithms(deterministic)
    expected = kernels.varlen_attention_bwd(dout, q, k, *rest)
    for far in ((far_apart(q, 2**24), k), (q, far_apart(k, 2**24))):
        assert torch.equal(kernels.varlen_attention_bwd(dout, *far, *rest), expected)


@MODES
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_far_from_zero(kernels, deterministic, sign):
    """All scores about ±2000: the weight of a key that is not there, 2^2954, must not be used."""
    lengths = [50, 100, 140]
    qkv, dout, cu_seqlens = packed(lengths, 1, 64, torch.float16)
    qkv[:, :, 0] = 16 + 0.05 * qkv[:, :, 0]
    qkv[:, :, 1] = sign * (16 + 0.05 * qkv[:, :, 1])
    ours = backward(kernels, qkv, dout, cu_seqlens, 140, deterministic=deterministic)
    yardsticks = plain(qkv, dout, cu_seqlens, torch.float16)[1:]
    truths = plain(qkv, dout, cu_seqlens, torch.float64)[1:]
    for name, *tensors in zip(ARGUMENTS, ours.unbind(2), yardsticks, truths, strict=True):
        assert_accurate_by_sequence(*tensors, lengths, f"d{name}")


@MODES
def test_scale(kernels, deterministic):
    lengths = [40, 9, 140]
    qkv, dout, cu_seqlens = packed(lengths, 1, 64, torch.float16)
    negative = backward(kernels, qkv, dout, cu_seqlens, 140, -0.3, deterministic)
    qkv[:, :, 0] *= -1
    turned = backward(kernels, qkv, dout, cu_seqlens, 140, 0.3, deterministic)
    turned[:, :, 0] *= -1
    assert torch.equal(negative, turned)
    zero = backward(kernels, qkv, dout, cu_seqlens, 140, 0.0, deterministic)
    assert not zero[:, :, :2].any() and zero[:, :, 2].isfinite().all()


def test_a_sequence_longer_than_max_seqlen_is_nan(kernels):
    lengths = [5, 30, 200, 70, 150]
    qkv, dout, cu_seqlens = packed(lengths, 1, 64, torch.float16)
    expected = backward(kernels, qkv, dout, cu_seqlens, 200)
    for max_seqlen in (0, 20, 64, 100, 160):
        ours = backward(kernels, qkv, dout, cu_seqlens, max_seqlen)
        for length, mine, true in zip(
            lengths, ours.split(lengths), expected.split(lengths), strict=True
        ):
            assert torch.equal(mine, true) if length <= max_seqlen else mine.isnan().all()


@MODES
@pytest.mark.parametrize("cu_seqlens", [[-150, 20, 900], [0, 400, 0, 400, 0, 400]], ids=str)
def test_bad_offsets_leave_no_tensor(kernels, cu_seqlens, deterministic):
    # On a GPU offsets are not checked; the sanitizer would see an access outside a tensor. Tiles
    # that overlap are written by two programs: that clash is not the kernel's.
    q, lse = torch.randn(300, 1, 64).half(), torch.randn(1, 300)
    torch.use_deterministic_algorithms(deterministic)
    bad = torch.tensor(cu_seqlens, dtype=torch.int32)
    try:
        kernels.varlen_attention_bwd(q, q, q, q, q, lse, bad, 512, 0.125)
    except Exception as error:
        assert "by more than one program" in str(error), error


def test_errors(kernels):
    q, cu_seqlens, lse = torch.randn(10, 2, 64), offsets([10]), torch.randn(2, 10)

    def refused(error, message, *arguments):
        with pytest.raises(error, match=message):
            kernels.varlen_attention_bwd(*arguments, 10, 0.125)

    narrow = torch.randn(10, 2, 96)
    refused(ValueError, "head_dim of 64 or 128", *[narrow] * 5, lse, cu_seqlens)
    refused(ValueError, "dout must have shape", q[:3], q, q, q, q, lse, cu_seqlens)
    refused(ValueError, r"lse must have shape \(2, 10\)", q, q, q, q, q, lse[:, :3], cu_seqlens)
    refused(TypeError, "cu_seqlens must be int32", q, q, q, q, q, lse, cu_seqlens.long())
    refused(TypeError, "lse must be float32", q, q, q, q, q, lse.half(), cu_seqlens)
