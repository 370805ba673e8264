// weight_tile.cuh - 16-bit weights as operands of tensor cores: 8 rows by 32 elements, from bytes in shared memory.
//
// Rows start at multiples of 16 bytes and are copied to shared memory as they are stored, in 16-byte pieces.
//
// The mma sums over k, so any order of k serves as long as weights and activations agree. A lane (row g = lane / 4, t =
// lane % 4) takes eight elements of its row that lie together in memory and feeds four of them to each of two m16n8k16:
// one 16-byte read of shared memory where ldmatrix would deliver the same bytes in another order. Activation rows lie in
// pairs, two elements of one and two of the other in turn, so that 16 bytes are an A operand as the mma wants its registers.
//
// Every kernel goes through these functions, so the order in which an output is summed never depends on kernel or tile.
#pragma once

#include "vec.cuh"

constexpr int kStep = 32;      // elements multiplied at once: two mma
constexpr int kSegment = 256;  // elements summed in one chain; an output is the sum of its segments, in order
constexpr int kTileRows = 8;   // weight rows of one mma

// Eight rows of a weight of `rows` rows: first, first + step, ... as far as they exist.
template <class D>
struct WeightTile {
  const unsigned char *data;
  int64_t stride;  // bytes from one to the next
  int count;

  __device__ __forceinline__ WeightTile(const void *weight, int first, int step, int rows, int K) {
    const int64_t nbytes = row_nbytes<D>(K);
    data = static_cast<const unsigned char *>(weight) + first * nbytes;
    stride = step * nbytes;
    count = max(0, min(kTileRows, ceil_div(rows - first, step)));
  }
  // Null past the last.
  __device__ __forceinline__ const unsigned char *row(int r) const { return r < count ? data + r * stride : nullptr; }
};

// The layout of rows in shared memory, kElements of a row at a time.
template <int kElements>
struct RowTile {
  static constexpr int kPieces = kElements / 8, kStride = kElements * 2;

  // Starts the copy of piece `piece` of elements first .. first+kElements-1 of a row. What is past the row's end is zero.
  static __device__ __forceinline__ void copy(unsigned char *tile, int r, int piece, const unsigned char *row, int first, int K) {
    const int k = first + piece * 8;
    cp_async16(tile + r * kStride + swizzle(piece, r) * 16, row + 2 * static_cast<int64_t>(k), row != nullptr && k < K);
  }

  // The same for pieces lane, lane + 4, ... of the row.
  static __device__ __forceinline__ void copy_row(unsigned char *tile, int r, int lane, const unsigned char *row, int first, int K) {
#pragma unroll
    for (int piece = 0; piece < kPieces; piece += 4) copy(tile, r, piece + lane, row, first, K);
  }

  // 16-byte pieces of odd rows swap halves of 128 bytes, so that two rows read together touch all banks.
  static __device__ __forceinline__ int swizzle(int piece, int r) { return piece ^ (r & 1) << 2; }
};

// Where lane (r, t) reads its weights of a tile. Two steps advance all addresses by the same constant, so even and odd
// steps have each their own, worked out once.
template <int kElements>
struct LaneWeights {
  using Tile = RowTile<kElements>;
  const unsigned char *data[2];

  __device__ __forceinline__ LaneWeights(const unsigned char *tile, int r, int t) {
#pragma unroll
    for (int odd = 0; odd < 2; odd++) data[odd] = tile + r * Tile::kStride + Tile::swizzle(odd * 4 + t, r) * 16;
  }

  // The lane's eight weights at a step, of the row `offset` bytes on, as B operands {b[0], b[1]} and {b[2], b[3]}.
  __device__ __forceinline__ void read(int step, int offset, uint32_t (&b)[4]) const {
    const uint4 v = load16(data[step % 2] + step / 2 * 2 * kStep * 2 + offset);
    b[0] = v.x, b[1] = v.y, b[2] = v.z, b[3] = v.w;
  }
};

// Activation rows 2p and 2p + 1 are pair p: four elements of K of both make 16 bytes, {k, k+1} of the one, then of the other,
// then {k+2, k+3}. In shared memory the pieces of odd pairs are swapped, so that two pairs read together touch all banks.
__device__ __forceinline__ int activation_piece(int pair, int stride, int piece) { return pair * stride + (piece ^ (pair & 1)) * 16; }

// Where lane t reads the A operands of 16 rows: of pair p those rows are g and g + 8 of the mma.
struct LaneActivations {
  const unsigned char *data[2];

  __device__ __forceinline__ LaneActivations(const unsigned char *rows, int pair, int stride, int t) {
#pragma unroll
    for (int i = 0; i < 2; i++) data[i] = rows + activation_piece(pair, stride, t * 2 + i);
  }

  __device__ __forceinline__ void read(int step, int offset, uint32_t (&a)[2][4]) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint4 v = load16(data[i] + step * kStep * 4 + offset);
      a[i][0] = v.x, a[i][1] = v.y, a[i][2] = v.z, a[i][3] = v.w;
    }
  }
};

__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const bf16 *) { mma_m16n8k16_bf16(d, a, b); }
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const __half *) { mma_m16n8k16_f16(d, a, b); }

// sum[16 activation rows x 8 weight rows] += activations . weights, over 32 elements.
template <class Half>
__device__ __forceinline__ void multiply_step(float (&sum)[4], const uint32_t (&a)[2][4], const uint32_t (&b)[4]) {
  const Half *type = nullptr;
  const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
  mma(sum, a[0], b0, type);
  mma(sum, a[1], b1, type);
}
