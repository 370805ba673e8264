// mma, ldmatrix and cp.async: the meaning of the PTX wrappers in kernels_cu/common/dev.cuh.
//
// Fragment layouts are those of the PTX ISA ("Matrix Fragments for mma.m16n8k16", "ldmatrix"). Asynchronous copies are
// adversarial: the destination is NaN from the moment of issue until the issuing thread waits for the copy's group.
#pragma once
#include "collectives.h"
#include "half.h"

namespace hs {

struct MmaInput {
  uint32_t a[4], b[2];
  float c[4];
};
struct Floats4 {
  float v[4];
};
struct Words4 {
  uint32_t v[4];
};

template <class H>
HOSTSIM_NO_TSAN void complete_mma(Warp &warp, uint32_t mask, int) {
  if (mask != kFullMask) fail("mma needs all 32 lanes, mask %08x", mask);
  float A[16][16], B[16][8], C[16][8];
  for (int l = 0; l < 32; l++) {
    const MmaInput &in = input<MmaInput>(warp, l);
    int group = l / 4, pair = l % 4 * 2;
    H a[8], b[4];
    memcpy(a, in.a, sizeof a);
    memcpy(b, in.b, sizeof b);
    for (int i = 0; i < 2; i++) {
      A[group][pair + i] = a[i];
      A[group + 8][pair + i] = a[2 + i];
      A[group][pair + 8 + i] = a[4 + i];
      A[group + 8][pair + 8 + i] = a[6 + i];
      B[pair + i][group] = b[i];
      B[pair + 8 + i][group] = b[2 + i];
      C[group][pair + i] = in.c[i];
      C[group + 8][pair + i] = in.c[2 + i];
    }
  }
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++)
      for (int j = 0; j < 8; j++) C[i][j] += A[i][k] * B[k][j];
  for (int l = 0; l < 32; l++) {
    int group = l / 4, pair = l % 4 * 2;
    output<Floats4>(warp, l) = {{C[group][pair], C[group][pair + 1], C[group + 8][pair], C[group + 8][pair + 1]}};
  }
}

template <class H>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line) {
  MmaInput in;
  memcpy(in.a, a, sizeof a);
  memcpy(in.b, b, sizeof b);
  memcpy(in.c, d, sizeof d);
  Floats4 out = collective<MmaInput, Floats4>(kFullMask, Wait::kMma, 0, line, in, complete_mma<H>);
  memcpy(d, out.v, sizeof d);
}

template <int kCount, bool kTranspose>
HOSTSIM_NO_TSAN void complete_ldmatrix(Warp &warp, uint32_t mask, int) {
  if (mask != kFullMask) fail("ldmatrix needs all 32 lanes, mask %08x", mask);
  const uint16_t *rows[8 * kCount];
  for (int l = 0; l < 8 * kCount; l++) rows[l] = input<const uint16_t *>(warp, l);
  for (int l = 0; l < 8 * kCount; l++)
    if (reinterpret_cast<uintptr_t>(rows[l]) % 16) fail("ldmatrix: the row address of lane %d is not 16-byte aligned", l);
  for (int m = 0; m < kCount; m++)
    for (int l = 0; l < 32; l++) {
      uint16_t pair[2];
      for (int i = 0; i < 2; i++)
        pair[i] = kTranspose ? rows[m * 8 + l % 4 * 2 + i][l / 4] : rows[m * 8 + l / 4][l % 4 * 2 + i];
      memcpy(&output<Words4>(warp, l).v[m], pair, 4);
    }
}

template <int kCount, bool kTranspose>
void ldmatrix(uint32_t (&r)[kCount], const void *row, int line) {
  if (lane() < 8 * kCount) note_read(row, 16);
  Words4 out = collective<const void *, Words4>(kFullMask, Wait::kLdmatrix, kCount, line, row,
                                                complete_ldmatrix<kCount, kTranspose>);
  memcpy(r, out.v, sizeof r);
}

HOSTSIM_NO_TSAN inline void land(const AsyncCopy &copy) {
  note_write(copy.to, copy.nbytes + copy.zero_nbytes);
  if (copy.nbytes) memcpy(copy.to, copy.from, copy.nbytes);
  memset(static_cast<char *>(copy.to) + copy.nbytes, 0, copy.zero_nbytes);
}

template <int kNbytes>
void cp_async(void *to, const void *from, bool valid) {
  if (reinterpret_cast<uintptr_t>(to) % kNbytes || reinterpret_cast<uintptr_t>(from) % kNbytes)
    fail("cp.async: an address is not %d-byte aligned", kNbytes);
  note_write(to, kNbytes);
  if (valid) note_read(from, kNbytes);
  memset(to, 0xFF, kNbytes);
  uint16_t nbytes = valid ? kNbytes : 0;
  Fiber &me = *engine->current;
  me.copies.push_back({to, from, nbytes, static_cast<uint16_t>(kNbytes - nbytes), me.copy_group});
}

// Lands every group but the newest `leave`.
inline void cp_async_wait_but(uint32_t leave) {
  Fiber &me = *engine->current;
  size_t n = 0;
  for (; n < me.copies.size() && me.copies[n].group + leave < me.copy_group; n++) land(me.copies[n]);
  me.copies.erase(me.copies.begin(), me.copies.begin() + n);
}

}  // namespace hs

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], HOSTSIM_LINE) {
  hs::mma<__nv_bfloat16>(d, a, b, line);
}
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], HOSTSIM_LINE) {
  hs::mma<__half>(d, a, b, line);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void *row, HOSTSIM_LINE) { hs::ldmatrix<4, false>(r, row, line); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row, HOSTSIM_LINE) { hs::ldmatrix<4, true>(r, row, line); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void *row, HOSTSIM_LINE) { hs::ldmatrix<2, false>(r, row, line); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void *row, HOSTSIM_LINE) { hs::ldmatrix<2, true>(r, row, line); }
inline void cp_async16(void *shared, const void *global, bool valid = true) { hs::cp_async<16>(shared, global, valid); }
inline void cp_async8(void *shared, const void *global, bool valid = true) { hs::cp_async<8>(shared, global, valid); }
inline void cp_async4(void *shared, const void *global, bool valid = true) { hs::cp_async<4>(shared, global, valid); }
inline void cp_async_commit() { hs::engine->current->copy_group++; }
template <int N>
void cp_async_wait() {
  hs::cp_async_wait_but(N);
}
