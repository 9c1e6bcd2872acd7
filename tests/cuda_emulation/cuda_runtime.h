// Stands in for the CUDA toolkit's header when the kernels are compiled for the host: every CUDA
// thread of a block is a fiber, the blocks run one after the other. It is slow, and strict: every
// access must be aligned and lie inside a tensor that the op was given or made, every lane that a
// shuffle names must take part, every thread must reach the same barrier.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one at a time

using std::max;
using std::min;

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

// ---- Memory

struct Range {
  uintptr_t begin, end;
};
inline std::vector<Range> tensors;     // what kernels may touch
inline Range stacks{0, 0};             // the threads' own variables
inline int64_t wide_accesses = 0, narrow_accesses = 0;

[[gnu::noinline]] inline void check(const void* p, size_t bytes, const char* what) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p), end = begin + bytes;
  if (begin >= stacks.begin && end <= stacks.end) return;
  const std::string access =
      std::string(what) + " of " + std::to_string(bytes) + " bytes by thread (" +
      std::to_string(threadIdx.x) + ", " + std::to_string(threadIdx.y) + ", " +
      std::to_string(threadIdx.z) + ") of block " + std::to_string(blockIdx.x);
  if (begin % bytes != 0) throw std::runtime_error("emulation: misaligned " + access);
  for (const Range& range : tensors)
    if (begin >= range.begin && end <= range.end) {
      ++(bytes == 16 ? wide_accesses : narrow_accesses);
      return;
    }
  throw std::runtime_error("emulation: out-of-bounds " + access);
}

// ---- Threads

enum class State { kReady, kShuffle, kBarrier, kDone };

struct Thread {
  ucontext_t context;
  jmp_buf resume;
  bool started = false;
  uint3 index;
  State state;
  uint32_t value, mask;
  int other_lane;
};

inline std::vector<Thread> threads;
inline std::vector<char> stack_memory;
inline jmp_buf scheduler;
inline size_t current = 0;
inline std::function<void()> body;
inline std::string failure;
inline bool descending = false;  // the order in which threads run between barriers

constexpr size_t kStackBytes = 64 << 10;
constexpr int kLanes = 32;

// setjmp and longjmp switch, for they make no system call; ucontext only starts a thread on its
// stack. Threads outlive a block: the next one runs its body anew.
inline void wait(State state) {
  threads[current].state = state;
  if (_setjmp(threads[current].resume) == 0) _longjmp(scheduler, 1);
}

inline void enter() {
  for (;;) {
    try {
      body();
    } catch (const std::exception& error) {
      failure = error.what();
    }
    wait(State::kDone);
  }
}

inline void run(Thread& thread) {
  if (_setjmp(scheduler) != 0) return;
  if (thread.started) _longjmp(thread.resume, 1);
  thread.started = true;
  setcontext(&thread.context);
}

inline void make_threads(size_t count) {
  if (threads.size() >= count) return;
  threads = std::vector<Thread>(count);
  stack_memory.resize(count * kStackBytes);
  stacks.begin = reinterpret_cast<uintptr_t>(stack_memory.data());
  stacks.end = stacks.begin + stack_memory.size();
  for (size_t i = 0; i < count; ++i) {
    getcontext(&threads[i].context);
    threads[i].context.uc_stack.ss_sp = stack_memory.data() + i * kStackBytes;
    threads[i].context.uc_stack.ss_size = kStackBytes;
    makecontext(&threads[i].context, enter, 0);
  }
}

[[noreturn]] inline void fail(std::string why) {
  threads.clear();  // some stopped midway
  failure.clear();
  throw std::runtime_error(why);
}

// Lets those go on whose shuffle or barrier is complete; false if there are none.
inline bool release() {
  bool released = false;
  for (size_t first = 0; first < threads.size(); first += kLanes) {
    const size_t last = std::min(first + kLanes, threads.size());
    uint32_t present = 0, mask = 0;
    for (size_t i = first; i < last; ++i)
      if (threads[i].state == State::kShuffle) {
        present |= 1u << (i - first);
        mask |= threads[i].mask;
      }
    if (present == 0 || present != mask) continue;
    uint32_t values[kLanes];
    for (size_t i = first; i < last; ++i) values[i - first] = threads[i].value;
    for (size_t i = first; i < last; ++i) {
      if (threads[i].state != State::kShuffle) continue;
      const size_t other = (i - first) ^ static_cast<size_t>(threads[i].other_lane);
      if (other < kLanes && (present >> other & 1)) threads[i].value = values[other];
      threads[i].state = State::kReady;
      released = true;
    }
  }
  if (released) return true;
  for (const Thread& thread : threads)
    if (thread.state != State::kBarrier && thread.state != State::kDone) return false;
  for (Thread& thread : threads)
    if (thread.state == State::kBarrier) {
      thread.state = State::kReady;
      released = true;
    }
  return released;
}

inline void run_block() {
  const size_t count = size_t{blockDim.x} * blockDim.y * blockDim.z;
  make_threads(count);
  for (size_t i = 0; i < threads.size(); ++i) {
    threads[i].state = i < count ? State::kReady : State::kDone;
    threads[i].index.x = i % blockDim.x;
    threads[i].index.y = i / blockDim.x % blockDim.y;
    threads[i].index.z = i / blockDim.x / blockDim.y;
  }
  do {
    for (size_t i = 0; i < count; ++i) {
      current = descending ? count - 1 - i : i;
      if (threads[current].state != State::kReady) continue;
      threadIdx = threads[current].index;
      run(threads[current]);
      if (!failure.empty()) fail(failure);
    }
  } while (release());
  for (const Thread& thread : threads)
    if (thread.state != State::kDone)
      fail("emulation: deadlock, a shuffle or barrier that not every thread reaches");
}

}  // namespace emulation

// ---- The words of memory: copying one checks both its ends

#define EMULATED_WORD(name, type, count)                                             \
  struct alignas(sizeof(type) * count) name {                                        \
    type parts[count];                                                               \
    name() = default;                                                                \
    name(const name& other) {                                                        \
      emulation::check(&other, sizeof(name), "load");                                \
      std::memcpy(parts, other.parts, sizeof(parts));                                \
    }                                                                                \
    name& operator=(const name& other) {                                             \
      emulation::check(&other, sizeof(name), "load");                                \
      emulation::check(this, sizeof(name), "store");                                 \
      std::memcpy(parts, other.parts, sizeof(parts));                                \
      return *this;                                                                  \
    }                                                                                \
  };
EMULATED_WORD(uint4, uint32_t, 4)
EMULATED_WORD(uint2, uint32_t, 2)
EMULATED_WORD(uint1, uint32_t, 1)
EMULATED_WORD(ushort1, uint16_t, 1)
#undef EMULATED_WORD

template <class T>
T __ldg(const T* p) {
  if constexpr (std::is_arithmetic_v<T>) emulation::check(p, sizeof(T), "load");
  return *p;
}

template <class T>
T __ldcs(const T* p) {
  return __ldg(p);
}

// ---- Warps and blocks

inline float __shfl_xor_sync(unsigned mask, float value, int other_lane) {
  emulation::Thread& self = emulation::threads[emulation::current];
  std::memcpy(&self.value, &value, sizeof(value));
  self.mask = mask;
  self.other_lane = other_lane;
  emulation::wait(emulation::State::kShuffle);
  std::memcpy(&value, &self.value, sizeof(value));
  return value;
}

inline void __syncthreads() { emulation::wait(emulation::State::kBarrier); }

// ---- Arithmetic, with the errors of the special function unit where they are known

inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline float __expf(float v) { return std::exp2(v * 1.44269504f); }
inline float __fdividef(float a, float b) {
  return std::fabs(b) > 0x1p126f ? a / INFINITY : a * (1.0f / b);
}

// ---- Launches

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 2;  // few, so that a few rows already make a block take several
  return cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               const A&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535 || block.x == 0 || block.y == 0 || block.z == 0 || block.z > 64 ||
      uint64_t{block.x} * block.y * block.z > 1024)
    return cudaErrorInvalidConfiguration;
  gridDim = grid;
  blockDim = block;
  emulation::body = [&] { kernel(static_cast<P>(arguments)...); };
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) emulation::run_block();
  return cudaSuccess;
}
