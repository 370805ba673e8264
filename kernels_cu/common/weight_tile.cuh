// weight_tile.cuh - stored weights as operands of tensor cores: 8 rows by 32 elements, from bytes in shared memory.
//
// Rows are copied to shared memory as they are stored, in 16-byte pieces, and unpacked in registers. Rows of block formats
// start at any even address, so the pieces that cover a stretch of a row begin up to 14 bytes early: `lead` says how many.
//
// The mma sums over k, so any order of k serves as long as weights and activations agree. A lane (row g = lane / 4, t =
// lane % 4) takes eight elements of its row that lie together in memory and feeds four of them to each of two m16n8k16:
// one 16-byte read of shared memory where ldmatrix would deliver the same bytes in another order. Every kernel goes
// through these functions, so the order in which an output is summed never depends on the kernel or the tile.
#pragma once

#include "quant.cuh"

constexpr int kStep = 32;      // elements multiplied at once: two mma
constexpr int kSegment = 256;  // elements summed in one chain; an output is the sum of its segments, in order
constexpr int kTileRows = 8;   // weight rows of one mma

constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// A stored row, or nothing (`data` null) past the last; `end` is where its tensor ends.
struct WeightRow {
  const unsigned char *data;
  const unsigned char *end;
};

// Eight rows of a weight of `rows` rows: first, first + step, ... as far as they exist.
template <class D>
struct WeightTile {
  const unsigned char *data, *end;
  int64_t stride;  // bytes from one to the next
  int count;

  __device__ __forceinline__ WeightTile(const void *weight, int first, int step, int rows, int K) {
    const int64_t nbytes = row_nbytes<D>(K);
    data = static_cast<const unsigned char *>(weight) + first * nbytes;
    end = static_cast<const unsigned char *>(weight) + rows * nbytes;
    stride = step * nbytes;
    count = max(0, min(kTileRows, ceil_div(rows - first, step)));
  }
  __device__ __forceinline__ WeightRow row(int r) const { return {r < count ? data + r * stride : nullptr, end}; }
};

// The layout of a format's rows in shared memory, kElements of a row at a time.
template <class D, int kElements>
struct RowTile {
  static constexpr bool kBlocks = kIsQuantized<D>;
  static constexpr int kStepNbytes = kStep / D::kBlockSize * D::kBlockNbytes;
  static constexpr int kNbytes = kElements / kStep * kStepNbytes;
  static constexpr int kPieces = kBlocks ? (kNbytes + 14 + 15) / 16 : kNbytes / 16;
  // An odd multiple of 16 bytes puts eight rows of 4-bit words in different banks; 16-byte reads are swizzled instead.
  static constexpr int kStride = kBlocks ? (kStepNbytes < 32 ? kPieces | 1 : kPieces) * 16 : kNbytes;

  static __device__ __forceinline__ int lead(const unsigned char *row, int first) {
    if constexpr (!kBlocks) return 0;
    return static_cast<int>(address_of(row + first / kStep * kStepNbytes) & 15);
  }

  // Starts the copy of piece `piece` of elements first .. first+kElements-1 of a row. What is past the row's end becomes
  // zero in float formats; in block formats it is not to be used.
  // kWholePieces: rows start at multiples of 16 bytes, so no piece is cut off by the tensor's end.
  template <bool kWholePieces = false>
  static __device__ __forceinline__ void copy(unsigned char *tile, int r, int piece, WeightRow row, int first, int K) {
    if constexpr (!kBlocks) {
      const int k = first + piece * 8;
      const bool valid = row.data != nullptr && k < K;
      cp_async16(tile + r * kStride + swizzle(piece, r) * 16, valid ? row.data + 2 * static_cast<int64_t>(k) : row.end, valid);
    } else {
      if (row.data == nullptr) return;
      const unsigned char *start = row.data + first / kStep * kStepNbytes;
      const int skip = static_cast<int>(address_of(start) & 15);
      const int used = skip + min(kElements, K - first) / kStep * kStepNbytes;
      if (piece * 16 >= used) return;
      const unsigned char *from = start - skip + piece * 16;
      unsigned char *to = tile + r * kStride + piece * 16;
      if (kWholePieces || from + 16 <= row.end) {
        cp_async16(to, from);
      } else {  // the tensor ends within this piece
#pragma unroll 1
        for (int i = 0; from + i < row.end; i += 2) *reinterpret_cast<uint16_t *>(to + i) = *reinterpret_cast<const uint16_t *>(from + i);
      }
    }
  }

  // 16-byte pieces of odd rows swap halves of 128 bytes, so that two rows read together touch all banks.
  static __device__ __forceinline__ int swizzle(int piece, int r) { return piece ^ (r & 1) << 2; }

  // The eight weights of lane (r, t) at step `step` of the tile, as the halves of two B operands: {b[0], b[1]}, {b[2], b[3]}.
  static __device__ __forceinline__ void weights(const unsigned char *tile, int r, int lead, int step, int t, uint32_t (&b)[4]);

  // The scale of row r's block at this step, for block formats.
  static __device__ __forceinline__ float scale(const unsigned char *tile, int r, int lead, int step) {
    if constexpr (!kBlocks) return 1.f;
    return block_scale(tile + r * kStride + lead + step * kStepNbytes);
  }
};

// 32 bits of shared memory from an even address.
__device__ __forceinline__ uint32_t word_at(const unsigned char *p) {
  const auto *aligned = pointer_at<const uint32_t>(address_of(p) & ~static_cast<uintptr_t>(3));
  const uint64_t both = aligned[0] | static_cast<uint64_t>(aligned[1]) << 32;
  return static_cast<uint32_t>(both >> (address_of(p) & 2) * 8);
}

// Bytes 0, 1 (or 2, 3) of a word, each 0..255, minus `bias`, as two f16: exact, as f16 holds integers up to 2048. A byte
// under the exponent of 1024 is that number plus 1024.
template <int kFirst>
__device__ __forceinline__ uint32_t bytes_to_halves(uint32_t word, int bias) {
#if defined(__CUDACC__)
  const uint32_t raised = __byte_perm(word, 0x64646464u, kFirst == 0 ? 0x4140 : 0x4342);
  const uint32_t both = (0x6400u + bias) * 0x10001u;
  __half2 x, y;
  memcpy(&x, &raised, 4);
  memcpy(&y, &both, 4);
  const __half2 difference = __hsub2(x, y);
  uint32_t out;
  memcpy(&out, &difference, 4);
  return out;
#else
  const int lo = word >> 8 * kFirst & 255, hi = word >> (8 * kFirst + 8) & 255;
  return pack_pair<__half>(static_cast<float>(lo - bias), static_cast<float>(hi - bias));
#endif
}

// Integers of kBits bits as f16 for lane t of a block; which elements those are, `activations` below must know.
template <int kBits>
__device__ __forceinline__ void unpack_block(const unsigned char *data, int t, uint32_t (&b)[4]) {
  static_assert(kBits == 8 || kBits == 4, "a format's bits are unpacked here");
  if constexpr (kBits == 8) {  // elements 8t .. 8t+7
    const uint32_t lo = word_at(data + 8 * t) ^ 0x80808080u, hi = word_at(data + 8 * t + 4) ^ 0x80808080u;
    b[0] = bytes_to_halves<0>(lo, 128), b[1] = bytes_to_halves<2>(lo, 128);
    b[2] = bytes_to_halves<0>(hi, 128), b[3] = bytes_to_halves<2>(hi, 128);
  } else {  // elements 4t .. 4t+3 and 16+4t .. 16+4t+3
    const uint32_t word = word_at(data + 4 * t), lo = word & 0x0f0f0f0fu, hi = word >> 4 & 0x0f0f0f0fu;
    b[0] = bytes_to_halves<0>(lo, 8), b[1] = bytes_to_halves<2>(lo, 8);
    b[2] = bytes_to_halves<0>(hi, 8), b[3] = bytes_to_halves<2>(hi, 8);
  }
}

template <class D>
constexpr int kBits = D::kBlockSize == 1 ? 16 : (D::kBlockNbytes - 2) * 8 / D::kBlockSize;

template <class D, int kElements>
__device__ __forceinline__ void RowTile<D, kElements>::weights(const unsigned char *tile, int r, int lead, int step, int t, uint32_t (&b)[4]) {
  if constexpr (!kBlocks) {
    const uint4 v = load16(tile + r * kStride + swizzle(step * 4 + t, r) * 16);
    b[0] = v.x, b[1] = v.y, b[2] = v.z, b[3] = v.w;
  } else {
    unpack_block<kBits<D>>(tile + r * kStride + lead + step * kStepNbytes + 2, t, b);
  }
}

// Where activation k of row r lies: rows of 16-bit floats, `stride` bytes apart (a multiple of 128), swizzled as above.
__device__ __forceinline__ int activation_offset(int r, int stride, int k) { return r * stride + ((k >> 3 ^ (r & 1) << 2) * 16 + (k & 7) * 2); }

// The eight activations that go with `weights` of lane t: of row r, elements k .. k+31.
template <class D>
__device__ __forceinline__ void activations(const unsigned char *rows, int r, int stride, int k, int t, uint32_t (&x)[4]) {
  if constexpr (kBits<D> == 4) {
    const auto *lo = reinterpret_cast<const uint2 *>(rows + activation_offset(r, stride, k + 4 * t));
    const auto *hi = reinterpret_cast<const uint2 *>(rows + activation_offset(r, stride, k + 16 + 4 * t));
    x[0] = lo->x, x[1] = lo->y, x[2] = hi->x, x[3] = hi->y;
  } else {
    const uint4 v = load16(rows + activation_offset(r, stride, k + 8 * t));
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  }
}

__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const bf16 *) { mma_m16n8k16_bf16(d, a, b); }
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const __half *) { mma_m16n8k16_f16(d, a, b); }

// sum[16 activation rows x 8 weight rows] += activations (rows g and g + 8) . weights * scale, over 32 elements.
// Integer weights are multiplied exactly and scaled afterwards: no weight is ever rounded.
template <class D>
__device__ __forceinline__ void multiply_step(float (&sum)[4], const uint32_t (&x)[2][4], const uint32_t (&b)[4], const float (&scale)[2]) {
  const typename D::Half *type = nullptr;
  const uint32_t a0[4] = {x[0][0], x[1][0], x[0][1], x[1][1]}, a1[4] = {x[0][2], x[1][2], x[0][3], x[1][3]};
  const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
  if constexpr (kIsQuantized<D>) {
    float block[4] = {0, 0, 0, 0};
    mma(block, a0, b0, type);
    mma(block, a1, b1, type);
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] = fmaf(block[i], scale[i & 1], sum[i]);
  } else {
    mma(sum, a0, b0, type);
    mma(sum, a1, b1, type);
  }
}
