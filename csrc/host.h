// Runs the kernels' own source on a CPU, for the tests: g++ instead of nvcc, one fibre a thread, one block at a time.
// A fibre runs until a barrier or a shuffle and then waits for the others, so both mean what they mean on a device.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#define __global__
#define __launch_bounds__(...)
#define SURGERY_SHARED(name) char* name = surgery_host::shared

using std::isinf;
using std::max;
using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 blockIdx, gridDim, threadIdx;

namespace surgery_host {

constexpr int kFibres = 256, kWarp = 32, kStack = 64 * 1024;

struct Barrier {
  int arrived = 0, passed = 0;
};

inline char* shared;
// a fibre starts on a context of its own and is left and resumed by jumps, which cost no system call
inline jmp_buf scheduler, fibres[kFibres];
inline int current;
inline bool done[kFibres];
inline Barrier block_barrier, warp_barrier[kFibres / kWarp];
inline uint32_t exchanged[kFibres];

inline void wait(Barrier& barrier, int members) {
  const int turn = barrier.passed;
  if (++barrier.arrived == members) barrier.arrived = 0, ++barrier.passed;
  while (barrier.passed == turn)
    if (!_setjmp(fibres[current])) _longjmp(scheduler, 1);
}

template <typename Params>
struct Call {
  inline static void (*kernel)(Params);
  inline static const Params* params;
  static void run() {
    kernel(*params);
    done[current] = true;
    _longjmp(scheduler, 1);
  }
};

template <typename Params>
int launch(void (*kernel)(Params), dim3 grid, size_t shared_bytes, void* /*stream*/, const Params& params) {
  // filled with NaN: memory that a kernel reads before it writes must show
  std::vector<uint64_t> memory(shared_bytes / 8 + 2);
  const std::unique_ptr<char[]> stacks(new char[size_t(kFibres) * kStack]);
  shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16);
  gridDim = grid, Call<Params>::kernel = kernel, Call<Params>::params = &params;
  for (unsigned block = 0; block < grid.x * grid.y * grid.z; ++block) {
    blockIdx = dim3(block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y);
    std::fill(memory.begin(), memory.end(), ~uint64_t(0));
    std::fill(done, done + kFibres, false);
    volatile bool all_done = false;
    for (volatile int round = 0; !all_done; ++round) {
      all_done = true;
      for (current = 0; current < kFibres; ++current) {
        if (done[current]) continue;
        threadIdx = dim3(unsigned(current));
        if (!_setjmp(scheduler)) {
          if (round) _longjmp(fibres[current], 1);
          ucontext_t start;
          getcontext(&start);
          start.uc_stack.ss_sp = &stacks[size_t(current) * kStack], start.uc_stack.ss_size = kStack;
          start.uc_link = nullptr;
          makecontext(&start, Call<Params>::run, 0);
          setcontext(&start);
        }
        all_done = all_done && done[current];
      }
    }
  }
  return 0;
}

}  // namespace surgery_host

using surgery_host::launch;

inline void __syncthreads() { surgery_host::wait(surgery_host::block_barrier, surgery_host::kFibres); }

template <typename T>
T __shfl_xor_sync(unsigned, T x, int lane_mask) {
  using namespace surgery_host;
  static_assert(sizeof(T) == 4, "a shuffle moves 32 bits");
  Barrier& barrier = warp_barrier[current / kWarp];
  __builtin_memcpy(&exchanged[current], &x, 4);
  wait(barrier, kWarp);
  __builtin_memcpy(&x, &exchanged[current ^ lane_mask], 4);
  wait(barrier, kWarp);
  return x;
}
