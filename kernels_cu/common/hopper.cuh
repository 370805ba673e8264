// hopper.cuh - instructions of sm_90a: barriers that count bytes, tensor copies by the copy engine, warpgroup products.
//
// As in dev.cuh every wrapper exists twice: its PTX for nvcc, its meaning for the simulated device. Layouts are those of the
// PTX ISA ("Asynchronous Warpgroup Level Matrix Instructions", "Tensor copies", swizzle of 128 bytes).
//
// What the engine and the tensor cores read and write lies in dynamic shared memory, tiles at multiples of 1024 bytes.
#pragma once

#include "dtype.cuh"

template <class Half>
constexpr bool kIsF16 = false;
template <>
constexpr bool kIsF16<__half> = true;

constexpr int kWarpgroup = 128;    // threads: four warps, the first of them at a multiple of four
constexpr int kSwizzleSpan = 128;  // bytes of a row of a tile
constexpr int kSwizzleRows = 8;    // rows after which the swizzle repeats

#if defined(__CUDACC__)

// A map of an array in device memory, made by the driver (cuTensorMapEncodeTiled); a __grid_constant__ parameter.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

// ---- barriers in shared memory, 8 bytes each. A phase ends when all arrivals and all announced bytes have come.
__device__ __forceinline__ void mbarrier_init(uint64_t *barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_u32(barrier)), "r"(arrivals) : "memory");
}

// After the inits, by the thread that made them, before the block's barrier that lets others see them.
__device__ __forceinline__ void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void mbarrier_arrive(uint64_t *barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_u32(barrier)) : "memory");
}

// Arrives, and announces bytes that copies will bring.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t *barrier, int nbytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_u32(barrier)), "r"(nbytes) : "memory");
}

// Waits for the end of the current phase of this parity: 0 for the first, 1 for the second, and so on in turn.
__device__ __forceinline__ void mbarrier_wait(uint64_t *barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "wait_%=:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra wait_%=;\n}" ::"r"(smem_u32(barrier)),
      "r"(parity)
      : "memory");
}

// ---- copies of a box of an array to shared memory by the copy engine. One thread asks; `barrier` counts the bytes. What
// lies outside of the array becomes zero. `x` counts elements of a row, `y` rows.
__device__ __forceinline__ void prefetch_map(const TensorMap &map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ void copy_box(void *to, const TensorMap &map, int x, int y, uint64_t *barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(smem_u32(to)),
               "l"(&map), "r"(x), "r"(y), "r"(smem_u32(barrier))
               : "memory");
}

// ---- products of a warpgroup: d[64 x N] (+)= a[64 x 16] . b[N x 16]^T, all of it asynchronous. Of d, thread t of the group
// holds, at 4 j + 2 h + i, row t / 32 * 16 + t % 32 / 4 + 8 h and column 8 j + t % 4 * 2 + i.
//
// a and b are told by descriptors of tiles whose rows are 128 bytes (64 elements of K), swizzled, one after another;
// `wgmma_descriptor(tile)` of k = 0, and 2 more for each 16 elements of K.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void *tile) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kGroups = static_cast<uint64_t>(kSwizzleRows * kSwizzleSpan / 16) << 32;
  return kSwizzle128 | kGroups | 1ull << 16 | (smem_u32(tile) & 0x3ffff) >> 4;
}

// Before the first product after anything else has touched the registers of d.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kLeft of the committed groups are under way. Until then d is undefined, and the tiles are being read.
template <int kLeft>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

#define GLLM_REGS_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define GLLM_REGS_64 GLLM_REGS_32 "," "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define GLLM_REGS_96 GLLM_REGS_64 "," "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define GLLM_REGS_128 GLLM_REGS_96 "," "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define GLLM_OUT_8(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define GLLM_OUT_32(d, i) GLLM_OUT_8(d, i), GLLM_OUT_8(d, i + 8), GLLM_OUT_8(d, i + 16), GLLM_OUT_8(d, i + 24)
#define GLLM_OUT_64(d) GLLM_OUT_32(d, 0), GLLM_OUT_32(d, 32)
#define GLLM_OUT_96(d) GLLM_OUT_64(d), GLLM_OUT_32(d, 64)
#define GLLM_OUT_128(d) GLLM_OUT_96(d), GLLM_OUT_32(d, 96)
#define GLLM_WGMMA(n, type, count, outs, a_at, b_at, sum_at)                                                                    \
  asm volatile("{\n.reg .pred sum;\nsetp.ne.b32 sum, %" #sum_at ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type     \
               "." type " {" GLLM_REGS_##count "}, %" #a_at ", %" #b_at ", sum, 1, 1, 0, 0;\n}"                                \
               : outs                                                                                                           \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))

// `accumulate` false: d starts from zero.
template <int N, class Half>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 64 || N == 128 || N == 192 || N == 256, "widths with a wrapper");
  constexpr bool kF16 = kIsF16<Half>;
  if constexpr (N == 64 && kF16) GLLM_WGMMA(64, "f16", 32, GLLM_OUT_32(d, 0), 32, 33, 34);
  if constexpr (N == 64 && !kF16) GLLM_WGMMA(64, "bf16", 32, GLLM_OUT_32(d, 0), 32, 33, 34);
  if constexpr (N == 128 && kF16) GLLM_WGMMA(128, "f16", 64, GLLM_OUT_64(d), 64, 65, 66);
  if constexpr (N == 128 && !kF16) GLLM_WGMMA(128, "bf16", 64, GLLM_OUT_64(d), 64, 65, 66);
  if constexpr (N == 192 && kF16) GLLM_WGMMA(192, "f16", 96, GLLM_OUT_96(d), 96, 97, 98);
  if constexpr (N == 192 && !kF16) GLLM_WGMMA(192, "bf16", 96, GLLM_OUT_96(d), 96, 97, 98);
  if constexpr (N == 256 && kF16) GLLM_WGMMA(256, "f16", 128, GLLM_OUT_128(d), 128, 129, 130);
  if constexpr (N == 256 && !kF16) GLLM_WGMMA(256, "bf16", 128, GLLM_OUT_128(d), 128, 129, 130);
}
#undef GLLM_WGMMA

// ---- registers a thread of this warpgroup may use from now on, at most 65,536 in the block. Each role of a kernel is a branch
// of one if, and asks as the first thing it does.
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

#else

#include "hostsim_hopper.h"

#endif
