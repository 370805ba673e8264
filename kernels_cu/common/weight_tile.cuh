// weight_tile.cuh - stored weights as operands of tensor cores: 8 rows by 32 elements, from bytes in shared memory.
//
// Rows are copied to shared memory as they are stored, in 16-byte pieces, and unpacked in registers. Rows of block formats
// start at any even address, so the pieces that cover a stretch of a row begin up to 14 bytes early: `lead` says how many.
//
// The mma sums over k, so any order of k serves as long as weights and activations agree. A lane (row g = lane / 4, t =
// lane % 4) takes eight elements of its row that lie together in memory and feeds four of them to each of two m16n8k16:
// one 16-byte read of shared memory where ldmatrix would deliver the same bytes in another order. Activation rows lie in
// pairs, two elements of one and two of the other in turn, so that 16 bytes are an A operand as the mma wants its registers.
//
// Every kernel goes through these functions, so the order in which an output is summed never depends on kernel or tile.
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

  // How many bytes before the blocks of element `first` of row r the 16-byte piece starts that holds their first byte.
  __device__ __forceinline__ int lead(int r, int first) const {
    const unsigned start = static_cast<unsigned>(address_of(data)) + r * static_cast<unsigned>(stride);
    return static_cast<int>(start + first / D::kBlockSize * D::kBlockNbytes) & 15;
  }
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

  // Starts the copy of piece `piece` of elements first .. first+kElements-1 of a row. What is past the row's end becomes
  // zero in float formats; in block formats it is not to be used.
  // kWholePieces: rows start at multiples of 16 bytes, so no piece is cut off by the tensor's end.
  template <bool kWholePieces = false>
  static __device__ __forceinline__ void copy(unsigned char *tile, int r, int piece, WeightRow row, int first, int K) {
    if constexpr (!kBlocks) {
      const int k = first + piece * 8;
      const bool valid = row.data != nullptr && k < K;
      cp_async16(tile + r * kStride + swizzle(piece, r) * 16, row.data + 2 * static_cast<int64_t>(k), valid);
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

  // The same for pieces lane, lane + 4, ... of the row.
  static __device__ __forceinline__ void copy_row(unsigned char *tile, int r, int lane, WeightRow row, int first, int K) {
    if constexpr (kBlocks) {
      if (row.data == nullptr) return;
      const unsigned char *start = row.data + first / kStep * kStepNbytes;
      const int skip = static_cast<int>(address_of(start) & 15), used = skip + min(kElements, K - first) / kStep * kStepNbytes;
      const unsigned char *from = start - skip;
      if (from + kPieces * 16 <= row.end) {
        unsigned char *to = tile + r * kStride;
#pragma unroll
        for (int i = lane * 16; i < kPieces * 16; i += 64) {
          if (i < used) cp_async16(to + i, from + i);
        }
      } else {
#pragma unroll 1
        for (int piece = lane; piece < kPieces; piece += 4) copy(tile, r, piece, row, first, K);
      }
    } else {
#pragma unroll
      for (int piece = 0; piece < kPieces; piece += 4) copy(tile, r, piece + lane, row, first, K);
    }
  }

  // 16-byte pieces of odd rows swap halves of 128 bytes, so that two rows read together touch all banks.
  static __device__ __forceinline__ int swizzle(int piece, int r) { return piece ^ (r & 1) << 2; }

  // The scale of row r's block at this step, for block formats.
  static __device__ __forceinline__ float scale(const unsigned char *tile, int r, int lead, int step) {
    if constexpr (!kBlocks) return 1.f;
    return block_scale(tile + r * kStride + lead + step * kStepNbytes);
  }
};

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

template <class D>
constexpr int kBits = D::kBlockSize == 1 ? 16 : (D::kBlockNbytes - 2) * 8 / D::kBlockSize;

// A lane's integers of a block, from the kBits / 4 words that hold them, as f16. Elements 8t .. 8t+7 for 8 bits; for 4,
// whose bytes hold elements j and j + 16, elements 4t .. 4t+3 and 16+4t .. 16+4t+3: LaneActivations knows.
template <int kBits>
__device__ __forceinline__ void unpack_block(const uint32_t (&words)[kBits / 4], uint32_t (&b)[4]) {
  static_assert(kBits == 8 || kBits == 4, "a format's bits are unpacked here");
  uint32_t lo, hi;
  if constexpr (kBits == 8) {
    lo = words[0] ^ 0x80808080u, hi = words[1] ^ 0x80808080u;
  } else {
    lo = words[0] & 0x0f0f0f0fu, hi = words[0] >> 4 & 0x0f0f0f0fu;
  }
  constexpr int kBias = 1 << (kBits - 1);
  b[0] = bytes_to_halves<0>(lo, kBias), b[1] = bytes_to_halves<2>(lo, kBias);
  b[2] = bytes_to_halves<0>(hi, kBias), b[3] = bytes_to_halves<2>(hi, kBias);
}

// Where lane (r, t) reads its weights of a tile. Two steps advance all addresses by the same constant, so even and odd
// steps have each their own, worked out once.
template <class D, int kElements>
struct LaneWeights {
  using Tile = RowTile<D, kElements>;
  const unsigned char *data[2];
  int shift[2];  // blocks start at even addresses: bits by which a pair of words is shifted

  __device__ __forceinline__ LaneWeights(const unsigned char *tile, int r, int lead, int t) {
#pragma unroll
    for (int odd = 0; odd < 2; odd++) {
      if constexpr (Tile::kBlocks) {
        const unsigned char *p = tile + r * Tile::kStride + lead + odd * Tile::kStepNbytes + 2 + t * kBits<D>;
        const int within = static_cast<int>(address_of(p) & 3);
        data[odd] = p - within;  // still a pointer to shared memory, which a rounded number would not be
        shift[odd] = within * 8;
      } else {
        data[odd] = tile + r * Tile::kStride + Tile::swizzle(odd * 4 + t, r) * 16;
        shift[odd] = 0;
      }
    }
  }

  // The lane's eight weights at a step, of the row `offset` bytes on, as B operands {b[0], b[1]} and {b[2], b[3]}.
  __device__ __forceinline__ void read(int step, int offset, uint32_t (&b)[4]) const {
    const unsigned char *p = data[step % 2] + step / 2 * 2 * Tile::kStepNbytes + offset;
    if constexpr (Tile::kBlocks) {
      const auto *words = reinterpret_cast<const uint32_t *>(p);
      uint32_t packed[kBits<D> / 4];
#pragma unroll
      for (int i = 0; i < kBits<D> / 4; i++) packed[i] = static_cast<uint32_t>((words[i] | static_cast<uint64_t>(words[i + 1]) << 32) >> shift[step % 2]);
      unpack_block<kBits<D>>(packed, b);
    } else {
      const uint4 v = load16(p);
      b[0] = v.x, b[1] = v.y, b[2] = v.z, b[3] = v.w;
    }
  }
};

// Activation rows 2p and 2p + 1 are pair p: four elements of K of both make 16 bytes, {k, k+1} of the one, then of the other,
// then {k+2, k+3}. In shared memory the pieces of odd pairs are swapped, so that two pairs read together touch all banks.
template <class D>
__device__ __forceinline__ int activation_piece(int pair, int stride, int piece) {
  constexpr int kSwap = kBits<D> == 4 ? 4 : 1;
  return pair * stride + (piece ^ (pair & 1) * kSwap) * 16;
}

// Where lane t reads the A operands of 16 rows: of pair p those rows are g and g + 8 of the mma.
template <class D>
struct LaneActivations {
  const unsigned char *data[2];

  __device__ __forceinline__ LaneActivations(const unsigned char *rows, int pair, int stride, int t) {
#pragma unroll
    for (int i = 0; i < 2; i++) data[i] = rows + activation_piece<D>(pair, stride, kBits<D> == 4 ? i * 4 + t : t * 2 + i);
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

// sum[16 activation rows x 8 weight rows] += activations . weights * scale, over 32 elements.
// Integer weights are multiplied exactly and scaled afterwards: no weight is ever rounded.
template <class D>
__device__ __forceinline__ void multiply_step(float (&sum)[4], const uint32_t (&a)[2][4], const uint32_t (&b)[4], const float (&scale)[2]) {
  const typename D::Half *type = nullptr;
  const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
  if constexpr (kIsQuantized<D>) {
    float block[4] = {0, 0, 0, 0};
    mma(block, a[0], b0, type);
    mma(block, a[1], b1, type);
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] = fmaf(block[i], scale[i & 1], sum[i]);
  } else {
    mma(sum, a[0], b0, type);
    mma(sum, a[1], b1, type);
  }
}
