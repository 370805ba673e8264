// philox.cuh - Philox4x32-10 (Salmon et al. 2011) and the draw made from it, bit for bit what cpu_backend/philox.py does.
#pragma once

#include "dev.cuh"

struct PhiloxWords {
  uint32_t w[4];
};

__device__ __forceinline__ PhiloxWords philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// -ln(-ln u) for u = (top 23 bits + 1/2) * 2^-23: exact in f32 and never 0 or 1. Its values lie in (-2.82, 16.7).
__device__ __forceinline__ float gumbel(uint32_t word) {
  const float u = (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f;
  return -logf(-logf(u));
}
