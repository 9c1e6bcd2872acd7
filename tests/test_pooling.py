"""Pooling: values and gradients over ragged batches, isolation, errors."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from accuracy import assert_accurate
from isa import OLDER, run_on

from neobert_kernels import pool

module = importlib.import_module("neobert_kernels.pooling")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [
    [1],
    [0],
    [],
    [3, 0, 1, 0, 0, 7],
    [63, 64, 65, 127, 128, 129, 0, 511, 513],
    [2, 1, 1500, 3, 1],
]


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def plain(hidden, lengths, mode, dpooled, dtype):
    """One sequence after another, with PyTorch's own mean; its gradient."""
    hidden = hidden.detach().to(dtype).requires_grad_()
    rows = [
        (part.mean(0) if mode == "mean" else part[0]) if len(part) else part.sum(0)
        for part in hidden[: sum(lengths)].split(lengths)
    ]
    pooled = torch.stack(rows)
    return pooled.detach(), *torch.autograd.grad(pooled, hidden, dpooled.to(dtype))


def check_accuracy():
    for dtype in DTYPES:
        for lengths in LENGTHS:
            for dim in (1, 17, 769) if sum(lengths) < 100 else (300,):
                # Three tokens more than the sequences have: they get no gradient.
                hidden = (torch.randn(sum(lengths) + 3, dim) + 1).to(dtype)
                dpooled = torch.randn(len(lengths), dim)
                for mode in ("mean", "cls"):
                    hidden = hidden.detach().requires_grad_()
                    pooled = pool(hidden, offsets(lengths), mode)
                    assert pooled.dtype == torch.float32 and pooled.shape == dpooled.shape
                    (dhidden,) = torch.autograd.grad(pooled, hidden, dpooled)
                    assert dhidden.dtype == dtype and not dhidden[sum(lengths) :].any()
                    if not lengths:
                        continue
                    what = f"{mode} of {lengths}, dim {dim}, {dtype}"
                    yardsticks, truths = (
                        plain(hidden, lengths, mode, dpooled, t)
                        for t in (torch.float32, torch.float64)
                    )
                    for ours, yardstick, truth in zip(
                        (pooled.detach(), dhidden), yardsticks, truths, strict=True
                    ):
                        assert_accurate(ours.flatten(), yardstick.flatten(), truth.flatten(), what)


def test_accurate():
    check_accuracy()


@pytest.mark.parametrize("isa", OLDER)
def test_accurate_on(isa):
    run_on(isa, check_accuracy)


@pytest.mark.parametrize("mode", module.MODES)
def test_isolated_and_batch_invariant(mode):
    lengths = [5, 0, 600, 1, 64]
    hidden = torch.randn(sum(lengths), 768)
    pooled = pool(hidden, offsets(lengths), mode)
    for i, part in enumerate(hidden.split(lengths)):
        assert torch.equal(pool(part, offsets([len(part)]), mode)[0], pooled[i])
    hidden[5:605] = float("nan")
    changed = pool(hidden, offsets(lengths), mode)
    assert torch.equal(changed[[0, 1, 3, 4]], pooled[[0, 1, 3, 4]]) and changed[2].isnan().any()


def test_bits_do_not_depend_on_threads():
    lengths = [4000, 3, 0, 900]
    hidden = torch.randn(sum(lengths), 768, requires_grad=True)
    dpooled = torch.randn(4, 768)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            pooled = pool(hidden, offsets(lengths))
            results.append((pooled, *torch.autograd.grad(pooled, hidden, dpooled)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_strided_hidden():
    hidden = torch.randn(12, 40)[::2, ::2]
    assert torch.equal(pool(hidden, offsets([4, 2])), pool(hidden.contiguous(), offsets([4, 2])))


def test_backward_twice():
    hidden = torch.randn(6, 8, requires_grad=True)
    pooled = pool(hidden, offsets([4, 2]))
    first, second = (torch.autograd.grad(pooled.sum(), hidden, retain_graph=True) for _ in range(2))
    assert torch.equal(*first, *second)


@pytest.mark.parametrize("mean", [True, False])
def test_reference_in_float64(monkeypatch, mean):
    names = {"pool": module.reference, "pool_bwd": module.reference_bwd}
    monkeypatch.setattr(module, "ops", SimpleNamespace(**names))
    hidden = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    cu_seqlens = offsets([2, 0, 3])
    assert torch.autograd.gradcheck(lambda h: module._Pool.apply(h, cu_seqlens, mean), hidden)


@pytest.mark.parametrize(
    "bad, message",
    [
        ([1, 5], "must begin with 0, got"),
        ([0, 4, 3, 5], "must never fall"),
        ([0, 7], "must end at or before the 6 tokens, got"),
        ([0, -2, 5], "must never fall"),
    ],
)
def test_offsets_that_do_not_fit(bad, message):
    cu_seqlens = torch.tensor(bad, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"pool: cu_seqlens {message}"):
        pool(torch.randn(6, 4), cu_seqlens)
    with pytest.raises(ValueError, match="pool: cu_seqlens must begin with 0, never fall"):
        module.reference(torch.randn(6, 4), cu_seqlens, True)


def test_bad_input():
    hidden, cu_seqlens = torch.randn(6, 4), offsets([4, 2])
    with pytest.raises(TypeError, match=r"hidden must be float32.*got torch.float64"):
        pool(hidden.double(), cu_seqlens)
    with pytest.raises(ValueError, match=r"hidden must have shape \(tokens, dim\), got \(1, 6, 4"):
        pool(hidden.unsqueeze(0), cu_seqlens)
    with pytest.raises(ValueError, match=r"mode must be one of .*, got 'max'"):
        pool(hidden, cu_seqlens, "max")
    with pytest.raises(TypeError, match=r"cu_seqlens must be int32, got torch.int64"):
        pool(hidden, cu_seqlens.long())
    with pytest.raises(ValueError, match=r"cu_seqlens must have shape.*got \(0,\)"):
        pool(hidden, cu_seqlens[:0])
    with pytest.raises(ValueError, match="cu_seqlens is on meta but hidden is on cpu"):
        pool(hidden, cu_seqlens.to("meta"))
