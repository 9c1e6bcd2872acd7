"""csrc/cpu/simd.h and pair.h by themselves: the exponential and the 16-bit conversions, over all of
float32."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.cpp_extension import include_paths

CPU = Path(__file__).parent.parent / "csrc/cpu"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
ISAS = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
SOURCE = f"""
#include "{CPU}/pair.h"
#include <algorithm>
using namespace neobert;
template <class T> void round_trip(const float* x, T* y, float* back, long n) {{
  for_vectors(n, [&](int64_t i, int, auto lanes) {{
    store(y + i, load(x + i, lanes), lanes);
    store(back + i, load(y + i, lanes), lanes);
  }});
}}
template <bool kSplit, class T> void round_trip_pairs(const float* x, T* y, float* back, long n) {{
  for_pairs(n, [&](int64_t i, auto, auto lanes) {{
    const long count = std::min<long>(kPair, n - i);
    float ordered[kPair] = {{}}, seen[kPair], read[kPair];
    for (long j = 0; j < count; ++j) ordered[place<kSplit>(j)] = x[i + j];
    store_pair<false>(seen, store_pair<kSplit>(y + i, load_pair<false>(ordered), lanes));
    store_pair<false>(read, load_pair<kSplit>(y + i, lanes));
    for (long j = 0; j < count; ++j) {{
      const float a = seen[place<kSplit>(j)], b = read[place<kSplit>(j)];
      back[i + j] = std::memcmp(&a, &b, sizeof(a)) == 0 ? a : 12345.0f;
    }}
  }});
}}
extern "C" void exponential(const float* x, float* y, long n) {{
  for_vectors(n, [&](int64_t i, int, auto lanes) {{
    store(y + i, exp(load(x + i, lanes)), lanes);
  }});
}}
extern "C" void to_bfloat16(const float* x, void* y, float* back, long n) {{
  round_trip(x, static_cast<bf16*>(y), back, n);
}}
extern "C" void to_float16(const float* x, void* y, float* back, long n) {{
  round_trip(x, static_cast<fp16*>(y), back, n);
}}
extern "C" void pairs_to_bfloat16(const float* x, void* y, float* back, long n) {{
  round_trip_pairs<false>(x, static_cast<bf16*>(y), back, n);
}}
extern "C" void split_pairs_to_bfloat16(const float* x, void* y, float* back, long n) {{
  round_trip_pairs<true>(x, static_cast<bf16*>(y), back, n);
}}
extern "C" void pairs_to_float32(const float* x, void* y, float* back, long n) {{
  round_trip_pairs<false>(x, static_cast<float*>(y), back, n);
}}
extern "C" void pairs_to_float16(const float* x, void* y, float* back, long n) {{
  round_trip_pairs<false>(x, static_cast<fp16*>(y), back, n);
}}
"""


@pytest.fixture(scope="module", params=ISAS)
def simd(request, tmp_path_factory):
    """The header's functions, compiled for one instruction set that this CPU has."""
    capability = torch.backends.cpu.get_cpu_capability()
    has = {"avx2": capability in ("AVX2", "AVX512"), "avx512": capability == "AVX512"}
    has["avx512_bf16"] = has["avx512"] and torch.cpu._is_avx512_bf16_supported()
    if COMPILER is None or not has[request.param]:
        pytest.skip(f"no compiler, or this CPU has no {request.param}")
    folder = tmp_path_factory.mktemp("simd")
    (folder / "simd.cpp").write_text(SOURCE)
    includes = [flag for path in include_paths() for flag in ("-isystem", path)]
    command = [COMPILER, "-std=c++20", "-O2", "-shared", "-fPIC", *ISAS[request.param], *includes]
    command += ["-fno-math-errno", "-fno-trapping-math"]  # as setup.py has it
    subprocess.run([*command, "simd.cpp", "-o", "simd.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "simd.so"))


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def every(step):
    """Every step-th float32 there is, NaN, infinities and denormals among them."""
    return np.arange(0, 2**32, step, dtype=np.uint64).astype(np.uint32).view(np.float32)


def test_exp(simd):
    """Within 1 ulp of float64's, a denormal step where the result is denormal, over all floats."""
    edges = [0.0, -0.0, np.inf, -np.inf, np.nan, 88.722839, 88.7229, -87.4, -103.9, -104.0, -1e30]
    fine = np.linspace(-105, 90, 1_000_003).astype(np.float32)
    x = np.concatenate([every(1021), fine, np.array(edges, np.float32)])
    y = np.empty_like(x)
    simd.exponential(pointer(x), pointer(y), ctypes.c_long(x.size))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        exact = np.exp(x.astype(np.float64))
        rounded = exact.astype(np.float32)
    nan, infinite = np.isnan(x), np.isposinf(rounded)
    assert np.isnan(y[nan]).all() and not np.isnan(y[~nan]).any()
    assert np.isposinf(y[infinite]).all() and np.isfinite(y[~nan & ~infinite]).all()
    finite = ~nan & ~infinite
    ulp = np.spacing(np.maximum(rounded[finite], np.finfo(np.float32).tiny)).astype(np.float64)
    error = np.abs(y[finite].astype(np.float64) - exact[finite]) / ulp
    assert error.max() <= 1.0, f"{error.max():.3f} ulp at {x[finite][error.argmax()]!r}"


CONVERSIONS = {
    "to_bfloat16": torch.bfloat16,
    "pairs_to_bfloat16": torch.bfloat16,
    "split_pairs_to_bfloat16": torch.bfloat16,
    "to_float16": torch.float16,
    "pairs_to_float16": torch.float16,
    "pairs_to_float32": torch.float32,
}


@pytest.mark.parametrize("tail", [5, 29])
@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions_are_torchs(simd, name, tail):
    """Bit for bit, denormals, ties and overflow included, among their like and among others; NaN is
    NaN; nothing is written behind the end."""
    ties = np.arange(0x8000, 2**32, 2**16, dtype=np.uint64).astype(np.uint32).view(np.float32)
    x = np.concatenate([every(4093), ties, every(2**13)])
    x = x[: x.size // 32 * 32 - 32 + tail]
    if tail == 5:
        x = np.random.default_rng(0).permutation(x)
    expected, back = torch.from_numpy(x).to(CONVERSIONS[name]), np.empty_like(x)
    out = torch.full((x.size + 64,), 7.0, dtype=expected.dtype)
    ours = out[: x.size]
    count = ctypes.c_long(x.size)
    getattr(simd, name)(pointer(x), ctypes.c_void_p(out.data_ptr()), pointer(back), count)
    assert (out[x.size :] == 7).all()
    nan = expected.isnan()
    bits = torch.int32 if expected.dtype == torch.float32 else torch.int16
    assert torch.equal(ours.isnan(), nan)
    assert torch.equal(ours[~nan].view(bits), expected[~nan].view(bits))
    assert torch.equal(torch.from_numpy(back)[~nan], expected[~nan].float())
