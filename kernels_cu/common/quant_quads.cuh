// quant_quads.cuh - packed weights for byte products: how a lane's 16 bytes of a row become words of four bytes each.
//
// Four neighbouring elements 16j + 4t .. of a segment are a quad: one word, in the order 0, 2, 1, 3. A lane unpacks one to eight
// vectors of four words, for 8 bits to 1.
#pragma once

#include "packed.cuh"

// Which lane's a quad is, and which word of which of its vectors.
template <int kBits>
struct QuadPlace {
  static constexpr int kSegments = 16 / kBits;  // of a step
  static constexpr int kLanes = 32 / kSegments;  // of a segment
  static constexpr int kVectors = 8 / kBits;     // of four quads, of a lane

  int lane, vector, word;

  __device__ __forceinline__ QuadPlace(int segment, int quad) {
    const int j = quad / 4, t = quad % 4;
    if constexpr (kBits == 1) {
      const int half = j % 8;
      lane = segment * kLanes + t / 2, vector = (t % 2 * 2 + j / 8) * 2 + half % 4 / 2, word = half / 4 * 2 + half % 2;
    } else {
      const int of_piece = j % (4 * kVectors);
      lane = segment * kLanes + j / (4 * kVectors) * 4 + t, vector = of_piece / 4, word = of_piece % 4;
    }
  }

  // The first stretch j of words 0 and 1, or 2 and 3, of a lane's vector.
  static __device__ __forceinline__ int stretch(int lane, int vector, int pair) {
    if constexpr (kBits == 1) return vector / 2 % 2 * 8 + vector % 2 * 2 + pair * 4;
    return lane % kLanes / 4 * (4 * kVectors) + vector * 4 + pair * 2;
  }
};

// Bytes 0 and 2, or 1 and 3, of two words in turn.
__device__ __forceinline__ uint32_t even_bytes(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x6240); }
__device__ __forceinline__ uint32_t odd_bytes(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7351); }

// The quads of vector v as bytes u. With kSwapped, words 0 and 1 have exchanged half of their bytes, and so have 2 and 3: 4 bits
// come out so; swapping activations instead saves doing it for every row.
template <int kBits, bool kSwapped>
__device__ __forceinline__ void unpack_quads(const uint4 &from, int v, uint32_t (&u)[4]) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
  if constexpr (kBits == 8) {
#pragma unroll
    for (int i = 0; i < 4; i++) u[i] = words[i];
  } else if constexpr (kBits == 4) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t low = words[v * 2 + i] & 0x0f0f0f0fu, high = words[v * 2 + i] >> 4 & 0x0f0f0f0fu;
      u[2 * i] = kSwapped ? low : even_bytes(low, high);
      u[2 * i + 1] = kSwapped ? high : odd_bytes(low, high);
    }
  } else {
    static_assert(!kSwapped, "groups of these widths are apart");
    constexpr uint32_t kMask = kBits == 2 ? 0x03030303u : 0x01010101u;
    const uint32_t w = kBits == 2 ? words[v] : words[v / 2] >> v % 2 * 4;
    uint32_t fields[4];
#pragma unroll
    for (int i = 0; i < 4; i++) fields[i] = w >> i * kBits & kMask;
    u[0] = even_bytes(fields[0], fields[1]), u[1] = even_bytes(fields[2], fields[3]);
    u[2] = odd_bytes(fields[0], fields[1]), u[3] = odd_bytes(fields[2], fields[3]);
  }
}
