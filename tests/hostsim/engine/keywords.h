// Keywords, vector types, built-in variables, barriers, shared memory.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fibers.h"

#define CUDA_HOSTSIM 1
#define __global__ __attribute__((visibility("default")))
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static
#define __align__(n) alignas(n)
#undef __restrict__
#define __restrict__ __restrict

// CUDA aligns vectors of two and four to their size, at most 16 bytes.
#define HOSTSIM_VECTORS(T, name)                                                                              \
  struct name##1 { T x; };                                                                                    \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                                          \
  struct name##3 { T x, y, z; };                                                                              \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; };                          \
  inline name##1 make_##name##1(T x) { return {x}; }                                                          \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                                  \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                          \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
HOSTSIM_VECTORS(float, float)
HOSTSIM_VECTORS(double, double)
HOSTSIM_VECTORS(int, int)
HOSTSIM_VECTORS(short, short)
HOSTSIM_VECTORS(unsigned short, ushort)
HOSTSIM_VECTORS(signed char, char)
HOSTSIM_VECTORS(unsigned char, uchar)
HOSTSIM_VECTORS(long long, longlong)
HOSTSIM_VECTORS(unsigned long long, ulonglong)
#undef HOSTSIM_VECTORS
struct alignas(8) uint2 { unsigned x, y; };  // uint3 belongs to the engine
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

#define threadIdx (hs::engine->current->thread)
#define blockIdx (hs::engine->block)
#define blockDim (hs::engine->block_dim)
#define gridDim (hs::engine->grid_dim)
constexpr int warpSize = 32;

// Shared memory only through these two, at function top level, reached by the whole block.
#define SHARED(T, name, n)                  \
  static char hostsim_shared_tag_##name;    \
  T(&name)[n] = *static_cast<T(*)[n]>(hs::shared_array(&hostsim_shared_tag_##name, sizeof(T) * (n), alignof(T) > 16 ? alignof(T) : 16))
#define DYN_SHARED(T, name) \
  T *name = static_cast<T *>(hs::shared_array(hs::engine, hs::engine->dynamic_nbytes, 1024))

inline void __syncthreads(int line = __builtin_LINE()) { hs::block_barrier(0, 0, line); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  hs::warp_wait(mask, hs::Wait::kSyncwarp, 0, line, nullptr);
}
inline void named_barrier_sync(int id, int num_threads, int line = __builtin_LINE()) {
  if (id < 1 || id >= hs::kMaxBarriers || num_threads % 32)
    hs::fail("named_barrier_sync(%d, %d): ids are 1 to 15, threads whole warps", id, num_threads);
  hs::block_barrier(id, num_threads, line);
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned) { hs::yield(); }
[[noreturn]] inline void __trap() { hs::fail("__trap()"); }
