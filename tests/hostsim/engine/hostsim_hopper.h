// hostsim_hopper.h - what kernels_cu/common/hopper.cuh includes when nvcc is not the one reading: the wrappers of sm_90a.
//
// Adversarial, as cp.async is: a box lands when somebody waits for its barrier and not before, its destination is NaN until
// then; a product is computed when its group is waited for, from the tiles as they are at that moment, and its registers are
// NaN until then.
#pragma once
#include "hostsim.h"
#include "hopper.h"

using TensorMap = hs::TensorMap;

inline void mbarrier_init(uint64_t *barrier, int arrivals) { hs::mbarrier_init(barrier, arrivals); }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t *barrier) { hs::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect(uint64_t *barrier, int nbytes) { hs::mbarrier_arrive(barrier, nbytes); }
inline void mbarrier_wait(uint64_t *barrier, int parity, HOSTSIM_LINE) { hs::mbarrier_wait(barrier, parity, line); }

inline void prefetch_map(const TensorMap &) {}
inline void copy_box(void *to, const TensorMap &map, int x, int y, uint64_t *barrier) {
  const int at[hs::TensorMap::kMaxRank] = {x, y};
  hs::copy_box(to, map, 2, at, barrier);
}

inline uint64_t wgmma_descriptor(const void *tile) { return hs::wgmma_descriptor(tile); }
inline void wgmma_fence() { hs::wgmma_fence(); }
inline void wgmma_commit() { hs::wgmma_commit(); }
template <int kLeft>
void wgmma_wait(HOSTSIM_LINE) {
  hs::wgmma_wait(kLeft, line);
}
template <int N, class Half>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 64 || N == 128 || N == 192 || N == 256, "widths with a wrapper");
  hs::wgmma(d, N, kIsF16<Half>, a, b, accumulate);
}

template <int kCount>
void take_registers() {}
template <int kCount>
void give_registers() {}
