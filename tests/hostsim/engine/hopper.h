// sm_90a: barriers that count bytes, tensor copies, products of warpgroups. See hostsim_hopper.h.
#pragma once
#include <cstdint>

namespace hs {

// What cuTensorMapEncodeTiled writes here: an array of up to five axes, the innermost first, and a box of it.
// tests/hostsim/stub and direct.py fill it in.
struct alignas(64) TensorMap {
  static constexpr int kMaxRank = 5;
  static constexpr uint64_t kMagic = 0x70616d726f736e74;
  uint64_t magic, address;
  uint64_t stride[kMaxRank - 1];  // bytes from one to the next of axis 1, 2, ...
  uint32_t size[kMaxRank], box[kMaxRank];
  uint32_t rank, element_nbytes, swizzle_nbytes;
  uint32_t unused[7];
};
static_assert(sizeof(TensorMap) == 128, "as the driver's");

void mbarrier_init(uint64_t *barrier, int arrivals);
void mbarrier_arrive(uint64_t *barrier, int expected_nbytes);
void mbarrier_wait(uint64_t *barrier, int parity, int line);
void copy_box(void *to, const TensorMap &map, int rank, const int *at, uint64_t *barrier);

uint64_t wgmma_descriptor(const void *tile);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int leave, int line);
void wgmma(float *d, int n, bool is_f16, uint64_t a, uint64_t b, bool accumulate);

// Called by the engine when a block starts, when a thread ends, and when all threads have.
void start_hopper();
void check_thread_is_done();
void check_block_is_done();

}  // namespace hs
