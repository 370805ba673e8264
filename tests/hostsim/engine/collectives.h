// Shuffles, votes and reductions over a warp. Each is computed once, by the lane that arrives last.
#pragma once
#include "keywords.h"

namespace hs {

struct ShuffleInput {
  uint64_t bits;
  int source;
};

// Plain loops here, no lambdas: those would not inherit that a function is hidden from TSan.
HOSTSIM_NO_TSAN inline void complete_shuffle(Warp &warp, uint32_t mask, int) {
  for (int l = 0; l < 32; l++) {
    if (!(mask >> l & 1)) continue;
    int source = input<ShuffleInput>(warp, l).source;
    if (!(mask >> source & 1)) fail("__shfl_sync: lane %d reads lane %d, which is not in mask %08x", l, source, mask);
    output<uint64_t>(warp, l) = input<ShuffleInput>(warp, source).bits;
  }
}

template <class T>
T shuffle(uint32_t mask, T value, int source, int line) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  ShuffleInput in{0, source};
  memcpy(&in.bits, &value, sizeof value);
  uint64_t bits = collective<ShuffleInput, uint64_t>(mask, Wait::kShuffle, sizeof(T), line, in, complete_shuffle);
  memcpy(&value, &bits, sizeof value);
  return value;
}

HOSTSIM_NO_TSAN inline void complete_ballot(Warp &warp, uint32_t mask, int) {
  uint32_t votes = 0;
  for (int l = 0; l < 32; l++)
    if (mask >> l & 1) votes |= static_cast<uint32_t>(input<int>(warp, l) != 0) << l;
  for (int l = 0; l < 32; l++)
    if (mask >> l & 1) output<uint32_t>(warp, l) = votes;
}

template <class T>
HOSTSIM_NO_TSAN void complete_match(Warp &warp, uint32_t mask, int) {
  for (int l = 0; l < 32; l++) {
    uint32_t same = 0;
    for (int k = 0; k < 32; k++)
      if (mask >> k & 1) same |= static_cast<uint32_t>(input<T>(warp, k) == input<T>(warp, l)) << k;
    if (mask >> l & 1) output<uint32_t>(warp, l) = same;
  }
}

struct Add {
  template <class T> static T of(T a, T b) { return a + b; }
};
struct Min {
  template <class T> static T of(T a, T b) { return b < a ? b : a; }
  static float of(float a, float b) { return fminf(a, b); }
};
struct Max {
  template <class T> static T of(T a, T b) { return a < b ? b : a; }
  static float of(float a, float b) { return fmaxf(a, b); }
};
struct And {
  template <class T> static T of(T a, T b) { return a & b; }
};
struct Or {
  template <class T> static T of(T a, T b) { return a | b; }
};
struct Xor {
  template <class T> static T of(T a, T b) { return a ^ b; }
};

template <class T, class Op>
HOSTSIM_NO_TSAN void complete_reduce(Warp &warp, uint32_t mask, int) {
  T total = input<T>(warp, __builtin_ctz(mask));
  for (uint32_t rest = mask & (mask - 1); rest; rest &= rest - 1)
    total = Op::of(total, input<T>(warp, __builtin_ctz(rest)));
  for (int l = 0; l < 32; l++)
    if (mask >> l & 1) output<T>(warp, l) = total;
}
template <class Op, class T>
T reduce(uint32_t mask, T value, int line) {
  return collective<T, T>(mask, Wait::kReduce, 0, line, value, complete_reduce<T, Op>);
}

// In the order of a tree of xor shuffles over 16, 8, 4, 2, 1, so that float sums have the same bits as the device's.
template <class T, class Op>
HOSTSIM_NO_TSAN void complete_tree(Warp &warp, uint32_t mask, int) {
  if (mask != kFullMask) fail("a reduction over the warp needs all 32 lanes, mask %08x", mask);
  T value[32], next[32];
  for (int l = 0; l < 32; l++) value[l] = input<T>(warp, l);
  for (int offset = 16; offset; offset /= 2) {
    for (int l = 0; l < 32; l++) next[l] = Op::of(value[l], value[l ^ offset]);
    memcpy(value, next, sizeof value);
  }
  for (int l = 0; l < 32; l++) output<T>(warp, l) = value[l];
}
template <class Op, class T>
T tree(T value, int line) {
  return collective<T, T>(kFullMask, Wait::kReduce, 1, line, value, complete_tree<T, Op>);
}

}  // namespace hs

#define HOSTSIM_LINE int line = __builtin_LINE()

inline float warp_sum(float v, HOSTSIM_LINE) { return hs::tree<hs::Add>(v, line); }
inline float warp_max(float v, HOSTSIM_LINE) { return hs::tree<hs::Max>(v, line); }
inline float warp_min(float v, HOSTSIM_LINE) { return hs::tree<hs::Min>(v, line); }

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, HOSTSIM_LINE) {
  int l = hs::lane();
  return hs::shuffle(mask, v, (l & ~(width - 1)) | (source & (width - 1)), line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, HOSTSIM_LINE) {
  int l = hs::lane(), source = l ^ bits;
  return hs::shuffle(mask, v, source / width > l / width ? l : source, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned distance, int width = 32, HOSTSIM_LINE) {
  int l = hs::lane(), source = l + static_cast<int>(distance);
  return hs::shuffle(mask, v, source / width != l / width ? l : source, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned distance, int width = 32, HOSTSIM_LINE) {
  int l = hs::lane(), source = l - static_cast<int>(distance);
  return hs::shuffle(mask, v, source < (l & ~(width - 1)) ? l : source, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, HOSTSIM_LINE) {
  return hs::collective<int, uint32_t>(mask, hs::Wait::kVote, 0, line, predicate, hs::complete_ballot);
}
inline int __any_sync(unsigned mask, int predicate, HOSTSIM_LINE) { return __ballot_sync(mask, predicate, line) != 0; }
inline int __all_sync(unsigned mask, int predicate, HOSTSIM_LINE) { return __ballot_sync(mask, !predicate, line) == 0; }
template <class T>
unsigned __match_any_sync(unsigned mask, T v, HOSTSIM_LINE) {
  return hs::collective<T, uint32_t>(mask, hs::Wait::kVote, 1, line, v, hs::complete_match<T>);
}
template <class T>
T __reduce_add_sync(unsigned mask, T v, HOSTSIM_LINE) { return hs::reduce<hs::Add>(mask, v, line); }
template <class T>
T __reduce_min_sync(unsigned mask, T v, HOSTSIM_LINE) { return hs::reduce<hs::Min>(mask, v, line); }
template <class T>
T __reduce_max_sync(unsigned mask, T v, HOSTSIM_LINE) { return hs::reduce<hs::Max>(mask, v, line); }
inline unsigned __reduce_and_sync(unsigned mask, unsigned v, HOSTSIM_LINE) { return hs::reduce<hs::And>(mask, v, line); }
inline unsigned __reduce_or_sync(unsigned mask, unsigned v, HOSTSIM_LINE) { return hs::reduce<hs::Or>(mask, v, line); }
inline unsigned __reduce_xor_sync(unsigned mask, unsigned v, HOSTSIM_LINE) { return hs::reduce<hs::Xor>(mask, v, line); }
