"""The CUDA C++ kernels without a GPU: the same source, compiled for the host, against float64.

The emulation (tests/cuda_emulation) runs every CUDA thread, checks each access for alignment and
bounds, and fails on a divergent shuffle or barrier. What it cannot show is speed, and the errors of
the GPU's own exp and division.
"""

import itertools
import shutil
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from neobert_kernels.rms_norm import reference as norm_reference
from neobert_kernels.rms_norm import reference_add, reference_add_bwd, reference_bwd
from neobert_kernels.rotary import reference as rotary_reference
from neobert_kernels.swiglu import reference as swiglu_reference
from neobert_kernels.swiglu import reference_bwd as swiglu_reference_bwd
from tests.accuracy import assert_accurate
from tests.cuda_emulation.build import COMPILER, ROOT, Emulated

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.usefixtures("one_thread"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_PAIRS = list(itertools.product(DTYPES, DTYPES))
# Rows that are no multiple of a block's, and, in backward, several a warp. Columns: NeoBERT's, each
# limit of what registers hold, beyond all, fewer than a warp's, and what no wide access fits.
NORM_SHAPES = [
    (33, 768), (1, 768), (9, 1024), (9, 1536), (9, 2048), (9, 2056), (9, 2051), (61, 24), (70, 9),
    (3, 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def cuda() -> Emulated:
    return Emulated("neobert_emulated", ROOT / "csrc/cuda")


def weight_dtypes(dim: int, dtype: torch.dtype) -> set[torch.dtype]:
    """Those with kernels of their own, which only narrow rows have; else any."""
    return {dtype, torch.float32} if dim <= 768 else {DTYPES[dim % 3]}


def misaligned(x: Tensor) -> Tensor:
    """The same values, contiguous, one element off any 16-byte boundary."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def as_double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


@pytest.fixture
def small():
    """Gathers outputs with short rows and holds them together to the rule when the test ends: of a
    few elements, plain PyTorch's errors can all be small by luck, and are no yardstick."""
    gathered = defaultdict(list)
    yield gathered
    for (name, _), parts in gathered.items():
        assert_accurate(*map(torch.cat, zip(*parts, strict=True)), f"{name} of small shapes")


def check(ours: list[Tensor], plain, truth, names: str, small: dict | None = None) -> None:
    plain, truth = ([v] if isinstance(v, Tensor) else v for v in (plain, truth))
    for name, *values in zip(names.split(), ours, plain, truth, strict=True):
        if small is not None and values[0].shape[-1] < 64:
            assert values[0].shape == values[2].shape and values[0].dtype == values[1].dtype, name
            small[name, values[0].dtype].append([v.flatten() for v in values])
        else:
            assert_accurate(*values, name)


def check_norm(cuda: Emulated, x: Tensor, weight: Tensor, small=None) -> None:
    check(
        cuda.rms_norm(x, weight, 1e-5),
        norm_reference(x, weight, 1e-5),
        norm_reference(*as_double(x, weight), 1e-5),
        "y rstd",
        small,
    )


def check_norm_bwd(cuda: Emulated, dy, dtotal, x, weight, small) -> None:
    rstd = norm_reference(x, weight, 1e-5)[1]
    arguments, doubles = (dy, dtotal, x, weight, rstd), as_double(dy, dtotal, x, weight, rstd)
    plain, truth = reference_bwd(*arguments), reference_bwd(*doubles)
    check(cuda.rms_norm_bwd(*arguments), plain, truth, "dx dweight", small)
    plain, truth = reference_add_bwd(*arguments), reference_add_bwd(*doubles)
    check(cuda.add_rms_norm_bwd(*arguments), plain, truth, "dx dresidual dweight", small)


def check_swiglu(cuda: Emulated, gate_up: Tensor, dy: Tensor, small=None) -> None:
    plain, truth = swiglu_reference(gate_up), swiglu_reference(gate_up.double())
    check(cuda.swiglu(gate_up), plain, truth, "y", small)
    plain = swiglu_reference_bwd(dy, gate_up)
    truth = swiglu_reference_bwd(dy.double(), gate_up.double())
    check(cuda.swiglu_bwd(dy, gate_up), plain, truth, "dgate_up", small)


def check_rotary(cuda: Emulated, x: Tensor, positions: Tensor, inverse: bool, small=None) -> None:
    cos, sin = tables(64, x.shape[-1])
    plain = rotary_reference(x, cos, sin, positions, inverse)
    truth = rotary_reference(x.double(), cos.double(), sin.double(), positions, inverse)
    check(cuda.rotary(x, cos, sin, positions, inverse), plain, truth, "y", small)


def tables(max_position: int, head_dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(max_position).unsqueeze(1) * 10000.0 ** -torch.linspace(
        0, 1, head_dim // 2
    )
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(cuda, small, dtype):
    for rows, dim in NORM_SHAPES:
        for weight_dtype in weight_dtypes(dim, dtype):
            x, weight = torch.randn(rows, dim, dtype=dtype), torch.randn(dim, dtype=weight_dtype)
            check_norm(cuda, x, weight, small)
            check_norm(cuda, misaligned(x), misaligned(weight), small)


@pytest.mark.parametrize("dtype,residual_dtype", DTYPE_PAIRS)
def test_add_rms_norm(cuda, small, dtype, residual_dtype):
    """Any pair of dtypes; the sum is exactly the rounded one, the statistics are the sum's."""
    for rows, dim in NORM_SHAPES:
        x, residual = torch.randn(rows, dim, dtype=dtype), torch.randn(rows, dim)
        residual, weight = residual.to(residual_dtype), torch.randn(dim, dtype=dtype)
        y, total, rstd = cuda.add_rms_norm(x, residual, weight, 1e-5)
        plain = reference_add(x, residual, weight, 1e-5)
        assert total.dtype == residual_dtype and total.equal(plain[1])
        truth = norm_reference(total.double(), weight.double(), 1e-5)
        check([y, rstd], [plain[0], plain[2]], truth, "y rstd", small)
        if dtype == residual_dtype and dim % 8 == 0:
            assert y.equal(cuda.rms_norm(total, weight, 1e-5)[0])


@pytest.mark.parametrize("dtype,x_dtype", DTYPE_PAIRS)
def test_rms_norm_bwd(cuda, small, dtype, x_dtype):
    for rows, dim in NORM_SHAPES:
        for weight_dtype in weight_dtypes(dim, dtype):
            dy, x = torch.randn(rows, dim, dtype=dtype), torch.randn(rows, dim).to(x_dtype)
            weight, dtotal = torch.randn(dim, dtype=weight_dtype), torch.randn_like(x)
            check_norm_bwd(cuda, dy, dtotal, x, weight, small)
            check_norm_bwd(cuda, dy, None, misaligned(x), weight, small)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(cuda, small, dtype):
    for rows, width in [(1, 2048), (3, 2056), (5, 1), (33, 3), (300, 8), (2, 4100), (2, 520)]:
        gate_up = 3 * torch.randn(rows, 2 * width, dtype=dtype)
        dy = torch.randn(rows, width, dtype=dtype)
        check_swiglu(cuda, gate_up, dy, small)
        check_swiglu(cuda, misaligned(gate_up), dy, small)
        check_swiglu(cuda, gate_up, misaligned(dy), small)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_of_extreme_gates(cuda, dtype):
    """Every row holds one magnitude, so that a lost small value cannot hide behind a large one."""
    gate = torch.linspace(-104, 104, 105).unsqueeze(1) + torch.rand(105, 32)
    gate_up = torch.cat([gate, torch.randn(105, 32)], 1).to(dtype)
    check_swiglu(cuda, gate_up, torch.randn(105, 32).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary(cuda, small, dtype):
    shapes = [
        (1, 12, 64),
        (5, 12, 64),
        (2, 2, 128),
        (3, 3, 6),
        (70, 1, 2),
        (2, 5, 24),
        (1, 1, 1056),
    ]
    for (tokens, heads, head_dim), inverse in itertools.product(shapes, (False, True)):
        positions = torch.randint(0, 64, (tokens,))
        x = torch.randn(tokens, heads, head_dim, dtype=dtype)
        check_rotary(cuda, x, positions, inverse, small)
        check_rotary(cuda, misaligned(x), positions.int(), inverse, small)
        qkv = torch.randn(tokens, heads, 3, head_dim, dtype=dtype)
        check_rotary(cuda, qkv[:, :, 1], positions, inverse, small)
        check_rotary(cuda, x.transpose(0, 1)[:, :1], positions[:1].expand(heads), inverse, small)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotary_of_packed_qkv(cuda, dtype):
    for tokens, heads, head_dim in [(1, 12, 64), (5, 3, 128), (3, 2, 6)]:
        cos, sin = tables(64, head_dim)
        positions = torch.randint(0, 64, (tokens,), dtype=torch.int32)
        qkv = torch.randn(tokens, heads, 3, head_dim, dtype=dtype)
        for given, inverse in ((qkv, False), (misaligned(qkv), True)):
            (rotated,) = cuda.rotary_qkv_(given, cos, sin, positions, inverse)
            for i in (0, 1):
                one = cuda.rotary(given[:, :, i], cos, sin, positions, inverse)[0]
                assert rotated[:, :, i].equal(one)
            assert rotated[:, :, 2].equal(qkv[:, :, 2])


def test_rotary_outside_the_table_is_nan(cuda):
    cos, sin = tables(8, 64)
    positions = torch.tensor([0, 8, 7, -1])
    (y,) = cuda.rotary(torch.randn(4, 2, 64), cos, sin, positions, False)
    assert y[[1, 3]].isnan().all() and y[[0, 2]].isfinite().all()


def test_a_row_depends_on_nothing_but_itself(cuda):
    x, weight = torch.randn(7, 768, dtype=torch.bfloat16), torch.randn(768)
    dy, rstd = torch.randn_like(x), torch.rand(7)
    y, dx = cuda.rms_norm(x, weight, 1e-5)[0], cuda.rms_norm_bwd(dy, x, x, weight, rstd)[0]
    for i in range(7):
        row = slice(i, i + 1)
        assert cuda.rms_norm(x[row], weight, 1e-5)[0].equal(y[row])
        alone = cuda.rms_norm_bwd(dy[row], x[row], x[row], weight, rstd[row])[0]
        assert alone.equal(dx[row])


def test_empty_inputs(cuda):
    for shape in [(0, 768), (2, 0, 768), (3, 0)]:
        x, weight = torch.randn(shape), torch.randn(shape[-1])
        y, rstd = cuda.rms_norm(x, weight, 1e-5)
        assert y.shape == shape and rstd.shape == shape[:-1]
        dx, dweight = cuda.rms_norm_bwd(x, None, x, weight, rstd)
        assert dx.shape == shape and dweight.equal(torch.zeros_like(weight))
    assert cuda.swiglu(torch.randn(0, 64))[0].shape == (0, 32)
    assert cuda.swiglu_bwd(torch.randn(4, 0), torch.randn(4, 0))[0].shape == (4, 0)
    cos, sin = tables(4, 64)
    none = torch.empty(0, dtype=torch.int64)
    assert cuda.rotary(torch.randn(0, 12, 64), cos, sin, none, False)[0].shape == (0, 12, 64)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_aligned_arrays_move_in_16_bytes(cuda, dtype):
    """Each element once: what is narrower is one rstd per row, and the positions."""
    x, weight = torch.randn(5, 768, dtype=dtype), torch.randn(768, dtype=dtype)
    row = 768 * 2 // 16
    cuda.rms_norm(x, weight, 1e-5)
    assert cuda.accesses() == (5 * 3 * row, 5)  # x, weight; y
    cuda.add_rms_norm(x, x, weight, 1e-5)
    assert cuda.accesses() == (5 * 5 * row, 5)  # x, residual, weight; y, total
    cuda.swiglu(x)
    assert cuda.accesses() == (5 * 3 * row // 2, 0)
    cuda.swiglu_bwd(x[:, :384].contiguous(), x)
    assert cuda.accesses() == (5 * 5 * row // 2, 0)
    cos, sin = tables(8, 64)
    cuda.rotary(x.view(5, 12, 64), cos, sin, torch.arange(5), False)
    # Per token 8 accesses of 12 heads, of which 3 threads take 4 each: x; y, and once cos and sin.
    assert cuda.accesses() == (5 * (2 * row + 2 * 8 * 3), 5 * 8 * 3)


def test_errors_name_the_argument(cuda):
    x, weight = torch.randn(4, 64), torch.randn(64)
    with pytest.raises(RuntimeError, match=r"rms_norm: .* but x is Double"):
        cuda.rms_norm(x.double(), weight, 1e-5)
    with pytest.raises(RuntimeError, match="but residual is Int"):
        cuda.add_rms_norm(x, x.int(), weight, 1e-5)
    with pytest.raises(RuntimeError, match=r"weight must .* \(4, 64\), got \(63\)"):
        cuda.rms_norm(x, weight[1:], 1e-5)
    with pytest.raises(RuntimeError, match=r"residual must .* \(4, 64\), got \(3, 64\)"):
        cuda.add_rms_norm(x, x[1:], weight, 1e-5)
    with pytest.raises(RuntimeError, match=r"gate_up must have shape .* got \(4, 63\)"):
        cuda.swiglu(x[:, 1:])
    with pytest.raises(
        RuntimeError, match=r"dy must .* Float, .* \(4, 64\), got BFloat16 \(4, 32\)"
    ):
        cuda.swiglu_bwd(x[:, :32].bfloat16(), x)
    cos, sin = tables(8, 16)
    with pytest.raises(RuntimeError, match=r"cos must .* 32\), .* got Float \(8, 8\)"):
        cuda.rotary(x.view(4, 1, 64), cos, sin, torch.arange(4), False)
    with pytest.raises(RuntimeError, match=r"positions must .* \(4\), got Float \(4\)"):
        cuda.rotary(x.view(4, 4, 16), cos, sin, torch.arange(4.0), False)


MUTATIONS = {
    "array.cuh": [("other = kWarp / 2; other > 0", "other = kWarp / 2; other > 1")],
    "rms_norm.cu": [("  __syncthreads();\n  if (threadIdx.y != 0", "  if (threadIdx.y != 0")],
    "swiglu.cu": [("if (is_aligned && width % N == 0)", "if (is_aligned)")],
    "rotary.cu": [("before * sine + odd", "before * sine - odd")],
}


def test_broken_kernels_are_caught(tmp_path):
    """A shuffle too few, a barrier too few, no tail, a wrong sign."""
    sources = shutil.copytree(ROOT / "csrc/cuda", tmp_path / "cuda")
    for name, replacements in MUTATIONS.items():
        text = (sources / name).read_text()
        for old, new in replacements:
            assert text.count(old) == 1, f"{name} no longer holds {old!r} once"
            text = text.replace(old, new)
        (sources / name).write_text(text)
    broken = Emulated("neobert_emulated_broken", sources)
    x, weight = torch.randn(9, 768), torch.randn(768)
    with pytest.raises(AssertionError, match=r"y: error"):
        check_norm(broken, x, weight)
    with pytest.raises(AssertionError, match="race"):
        broken.rms_norm_bwd(*torch.randn(3, 61, 64).unbind(), torch.randn(64), torch.rand(61))
    check_swiglu(broken, x, x[:, :384].contiguous())
    with pytest.raises(RuntimeError, match=r"misaligned|out-of-bounds"):
        check_swiglu(broken, torch.randn(9, 2 * 41), torch.randn(9, 41))
    with pytest.raises(AssertionError, match="y: error"):
        check_rotary(broken, x.view(9, 12, 64), torch.arange(9), False)
