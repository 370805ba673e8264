// dev.cuh - the ground under every kernel: the only file with inline PTX, and what a kernel includes instead of CUDA headers.
//
// One source serves two compilers. nvcc takes the first half, where each hardware instruction is a small function around its
// PTX. A C++ compiler takes the second, hostsim.h, which runs the threads of a block as fibers and gives every function
// below the same meaning. A wrapper therefore exists twice and has a conformance test; kernels contain no `asm`.
#pragma once

// mma.m16n8k16 and cp.async need sm_80. Binaries of earlier architectures have none of the kernels made of them; the launch
// arithmetic takes others there.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define TENSOR_CORE_KERNELS 1
#else
#define TENSOR_CORE_KERNELS 0
#endif

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifndef INFINITY  // NVRTC has no math.h
#define INFINITY __int_as_float(0x7f800000)
#endif

// Shared memory. Both macros stand at the top level of a kernel (or of a function it inlines), reached by the whole block.
#define SHARED(T, name, n) __shared__ T name[n]
#define DYN_SHARED(T, name)                                           \
  extern __shared__ __align__(1024) unsigned char gllm_dyn_shared[]; \
  T *name = reinterpret_cast<T *>(gllm_dyn_shared)

__device__ __forceinline__ unsigned smem_u32(const void *p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

// ---- tensor cores: d[16x8] += a[16x16] * b[16x8], fragments laid out as PTX ISA "mma.m16n8k16" says; needs sm_80
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

__device__ __forceinline__ void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8, 16-byte aligned.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_u32(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_u32(row))
               : "memory");
}

// ---- asynchronous copy to shared memory, 16 bytes, both sides 16-byte aligned. `valid` false writes zeros and reads nothing.
__device__ __forceinline__ void cp_async16(void *shared, const void *global, bool valid = true) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_u32(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
#else
  *static_cast<uint4 *>(shared) = valid ? *static_cast<const uint4 *>(global) : make_uint4(0, 0, 0, 0);
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most N of this thread's committed groups are under way; other threads' copies need a barrier as well.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ---- barrier among the n threads (whole warps) that name the same id, 1 to 15
__device__ __forceinline__ void named_barrier_sync(int id, int n) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n) : "memory"); }

// ---- 16 bytes of memory that is read once (weights): through the read-only path, not kept in L1
__device__ __forceinline__ uint4 load_stream16(const void *p) {
  uint4 v;
#if __CUDA_ARCH__ >= 700
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
#else
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
#endif
  return v;
}

// ---- four byte products added to c; a's bytes have no sign, b's have one or not. sm_61 and later
__device__ __forceinline__ int dp4a_u32_s32(uint32_t a, uint32_t b, int c) {
  int d;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ int dp4a_u32_u32(uint32_t a, uint32_t b, int c) {
  int d;
  asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// ---- overlapping launches (sm_90). A launch that may overlap starts while the one before it runs, as soon as all blocks of
// that one have called allow_next_launch() or ended. Before wait_for_earlier_launches() a kernel touches nothing but its
// parameters and memory no kernel ever writes (weights); afterwards all that was launched before has ended, memory included.
// Every thread that reads or writes other memory calls it. Elsewhere, and in launches that may not overlap, both do nothing.
__device__ __forceinline__ void allow_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_earlier_launches() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- bytes of dynamic shared memory that the launch has asked for
__device__ __forceinline__ int dynamic_smem_nbytes() {
  unsigned n;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(n));
  return static_cast<int>(n);
}

// ---- 2^x to about 2 units in the last place; results below 2^-126 are 0
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- reductions over a full warp; every lane gets the result. The simulator does each as one collective, in this order.
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}

__device__ __forceinline__ float warp_max(float v) {  // fmaxf: a NaN loses to any number
#pragma unroll
  for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
  return v;
}

// ---- the number of this warp in its block, which all its lanes reach together. As it comes from a shuffle, nvcc knows that it
// is the same for all; without that, every shuffle in a loop that depends on it brings code for lanes that went other ways.
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0); }

#else  // a C++ compiler: the simulated device (tests/hostsim)

#include "hostsim.h"

__device__ __forceinline__ uint4 load_stream16(const void *p) { return *static_cast<const uint4 *>(p); }
__device__ __forceinline__ int dp4a_u32_s32(uint32_t a, uint32_t b, int c) {
  for (int i = 0; i < 32; i += 8) c += static_cast<int>(a >> i & 255) * static_cast<int8_t>(b >> i);
  return c;
}
__device__ __forceinline__ int dp4a_u32_u32(uint32_t a, uint32_t b, int c) { return static_cast<int>(__dp4a(a, b, static_cast<unsigned>(c))); }
__device__ __forceinline__ void allow_next_launch() {}
__device__ __forceinline__ void wait_for_earlier_launches() {}
__device__ __forceinline__ int dynamic_smem_nbytes() { return static_cast<int>(hs::engine->dynamic_nbytes); }
__device__ __forceinline__ float exp2_approx(float x) { return exp2f(x); }
__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }

#endif

// For kernels that have nothing to do ahead.
__device__ __forceinline__ void overlap_launches() {
  allow_next_launch();
  wait_for_earlier_launches();
}

constexpr unsigned kFullMask = 0xffffffffu;

// Addresses of large arrays: byte offsets are 64-bit always, as rows times row size exceed 2^31 in real models.
__device__ __forceinline__ const void *byte_offset(const void *p, int64_t nbytes) { return static_cast<const unsigned char *>(p) + nbytes; }
__device__ __forceinline__ void *byte_offset(void *p, int64_t nbytes) { return static_cast<unsigned char *>(p) + nbytes; }
__device__ __forceinline__ bool is_aligned(const void *p, int nbytes) { return reinterpret_cast<uintptr_t>(p) % nbytes == 0; }
__device__ __forceinline__ uintptr_t address_of(const void *p) { return reinterpret_cast<uintptr_t>(p); }
template <class T>
__device__ __forceinline__ T *pointer_at(uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

template <class I>
__device__ __forceinline__ constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}
