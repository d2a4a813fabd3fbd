/* Enough of CUDA to compile a .cu file with a host C++ compiler and run its kernels serially.

   Blocks run one after another, threads as fibers: each runs until it waits at a barrier or a
   shuffle, then the next one does. All threads of a block must wait at the same point, accesses
   must be aligned, and every second block runs its threads in descending order, so that a missing
   barrier shows. A breach is thrown as an error, which the host code reports. */

#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

/* ---- the language ---- */

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define alignas(bytes) __attribute__((aligned(bytes))) /* which may follow static */

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

/* ---- threads ---- */

namespace emulation {

enum Point { RUNNING, BARRIER, SHUFFLE, DONE };

struct Fiber {
  jmp_buf at;
  dim3 index;
  unsigned number;
  Point point;
  int parity; /* of its shuffles: a slot is read while the next one is written */
};

inline jmp_buf scheduler;
inline ucontext_t origin;
inline std::vector<Fiber> fibers;
inline std::vector<std::unique_ptr<char[]>> stacks;
inline std::vector<float> slots[2];
inline Fiber* current;
inline dim3 block, block_size;
inline const std::function<void()>* kernel;
inline int widest; /* bytes of the widest access of the last launch */
inline int blocks; /* of the last launch */
inline std::string breach;

inline void wait(Point point) {
  current->point = point;
  if (_setjmp(current->at) == 0) _longjmp(scheduler, 1);
}

inline void fiber_main() {
  (*kernel)();
  wait(DONE);
}

inline void resume(Fiber& fiber) {
  static ucontext_t fresh;
  current = &fiber;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.point != RUNNING) _longjmp(fiber.at, 1);
  const size_t size = 1 << 16;
  while (stacks.size() <= fiber.number) stacks.emplace_back(new char[size]);
  getcontext(&fresh);
  fresh.uc_stack.ss_sp = stacks[fiber.number].get();
  fresh.uc_stack.ss_size = size;
  fresh.uc_link = &origin;
  makecontext(&fresh, fiber_main, 0);
  setcontext(&fresh);
}

inline void run_block(bool descending) {
  const unsigned count = block_size.x;
  fibers.assign(count, Fiber());
  for (auto& side : slots) side.assign(count, 0.0f);
  for (unsigned i = 0; i < count; ++i) fibers[i].index = dim3(i, 0, 0), fibers[i].number = i;
  while (fibers[0].point != DONE) {
    for (unsigned i = 0; i < count; ++i) resume(fibers[descending ? count - 1 - i : i]);
    for (const Fiber& fiber : fibers)
      if (fiber.point != fibers[0].point) breach = "threads of a block wait at different points";
    if (!breach.empty()) return;
  }
}

inline bool launch(dim3 grid, dim3 size, const std::function<void()>& body) {
  if (grid.x > INT_MAX || grid.y > 65535 || size.x > 1024 || size.x % 32 || size.y * size.z != 1)
    return false;
  block_size = size, kernel = &body, widest = 0, breach.clear();
  blocks = static_cast<int>(grid.x * grid.y);
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x && breach.empty(); ++x) {
      block = dim3(x, y, 0);
      run_block((x + y) % 2 != 0);
    }
  if (!breach.empty()) throw std::runtime_error(breach);
  return true;
}

inline void access(const void* place, int bytes) {
  if (reinterpret_cast<uintptr_t>(place) % bytes) breach = "an access is not aligned";
  if (bytes > widest) widest = bytes;
}

template <typename Part, int count>
struct Vector {
  Part part[count];
  Vector() = default;
  Vector(const Vector& other) { *this = other; }
  Vector& operator=(const Vector& other) {
    access(this, sizeof part), access(&other, sizeof part);
    memcpy(part, other.part, sizeof part);
    return *this;
  }
};

/* bits of the nearest 16-bit float: `fraction` bits of fraction, `exponent` of exponent */
inline uint16_t narrow(float value, int fraction, int exponent) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = bits >> 31 << 15;
  const uint16_t infinity = ((1 << exponent) - 1) << fraction;
  if (std::isnan(value)) return 0x7fff;
  const double size = std::fabs(static_cast<double>(value));
  if (size == 0) return sign;
  const int bias = (1 << (exponent - 1)) - 1;
  int power = std::isinf(value) ? bias + 1 : std::ilogb(size);
  if (power < 1 - bias) power = 1 - bias;
  if (power > bias) return sign | infinity;
  /* in units of the last place; rounding up may carry into the exponent, as it should */
  const double units = std::nearbyint(std::ldexp(size, fraction - power));
  const uint32_t whole = static_cast<uint32_t>(units);
  const uint32_t made = whole + (static_cast<uint32_t>(power + bias - 1) << fraction);
  return sign | static_cast<uint16_t>(made < infinity ? made : infinity);
}

inline float widen(uint16_t bits, int fraction, int exponent) {
  const int bias = (1 << (exponent - 1)) - 1, power = bits >> fraction & ((1 << exponent) - 1);
  const int low = bits & ((1 << fraction) - 1);
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (power == (1 << exponent) - 1) return low ? NAN : sign * INFINITY;
  if (power == 0) return sign * static_cast<float>(std::ldexp(low, 1 - bias - fraction));
  return sign * static_cast<float>(std::ldexp(low + (1 << fraction), power - bias - fraction));
}

template <int fraction, int exponent>
struct Small {
  uint16_t bits;
  Small() = default;
  explicit Small(float value) : bits(narrow(value, fraction, exponent)) {}
  operator float() const { return widen(bits, fraction, exponent); }
};

}  // namespace emulation

#define threadIdx (emulation::current->index)
#define blockIdx (emulation::block)

inline void __syncthreads() { emulation::wait(emulation::BARRIER); }

inline float __shfl_xor_sync(unsigned mask, float value, int lanes, int width) {
  using namespace emulation;
  const unsigned other = current->number ^ static_cast<unsigned>(lanes);
  if (mask != 0xffffffffu || width != 32 || lanes >= 32 || other >= block_size.x)
    breach = "a shuffle leaves its warp";
  std::vector<float>& side = slots[current->parity ^= 1];
  side[current->number] = value;
  wait(SHUFFLE);
  return side[other];
}

/* ---- types ---- */

using half = emulation::Small<10, 5>;
using nv_bfloat16 = emulation::Small<7, 8>;
using __half = half;
using uint1 = emulation::Vector<uint32_t, 1>;
using uint2 = emulation::Vector<uint32_t, 2>;
using uint4 = emulation::Vector<uint32_t, 4>;
using float2 = emulation::Vector<float, 2>;
using float4 = emulation::Vector<float, 4>;
struct __half2 : emulation::Vector<half, 2> {
  __half2() = default;
  __half2(half a, half b) { part[0] = a, part[1] = b; }
};
struct nv_bfloat162 : emulation::Vector<nv_bfloat16, 2> {
  nv_bfloat162() = default;
  nv_bfloat162(nv_bfloat16 a, nv_bfloat16 b) { part[0] = a, part[1] = b; }
};
using half2 = __half2;

template <typename Bytes>
void __stwb(Bytes* to, const Bytes& value) {
  *to = value;
}

inline float __half2float(half value) { return value; }
inline half __float2half(float value) { return half(value); }
inline float __bfloat162float(nv_bfloat16 value) { return value; }
inline nv_bfloat16 __float2bfloat16(float value) { return nv_bfloat16(value); }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline bool __hgt(float a, float b) { return a > b; }
inline bool __hlt(float a, float b) { return a < b; }

/* ---- the runtime ---- */

enum cudaError_t { cudaSuccess, cudaErrorCudartUnloading, cudaErrorInvalidConfiguration };
typedef struct CUstream_st* cudaStream_t;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

extern "C" __attribute__((used)) inline cudaError_t cudaGetDevice(int* device) {
  return *device = 0, cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorInvalidConfiguration"; }

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args... args) {
  const std::function<void()> body = [&] { kernel(args...); };
  return emulation::launch(config->gridDim, config->blockDim, body) ? cudaSuccess
                                                                    : cudaErrorInvalidConfiguration;
}

/* Of the last launch. */
extern "C" __attribute__((visibility("default"))) int emulation_widest() {
  return emulation::widest;
}
extern "C" __attribute__((visibility("default"))) int emulation_blocks() {
  return emulation::blocks;
}
