// Loads, bits, maths, atomics.
#pragma once
#include <type_traits>

#include "keywords.h"

template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T> T __ldca(const T *p) { return *p; }
template <class T> T __ldcs(const T *p) { return *p; }
template <class T> T __ldlu(const T *p) { return *p; }
template <class T> T __ldcv(const T *p) { return *p; }
template <class T> void __stcg(T *p, T v) { *p = v; }
template <class T> void __stcs(T *p, T v) { *p = v; }
template <class T> void __stwt(T *p, T v) { *p = v; }

// ---- bits
template <class To, class From>
inline To hostsim_bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &v, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float v) { return hostsim_bits<unsigned>(v); }
inline int __float_as_int(float v) { return hostsim_bits<int>(v); }
inline float __uint_as_float(unsigned v) { return hostsim_bits<float>(v); }
inline float __int_as_float(int v) { return hostsim_bits<float>(v); }
inline long long __double_as_longlong(double v) { return hostsim_bits<long long>(v); }
inline double __longlong_as_double(long long v) { return hostsim_bits<double>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
inline int __clzll(long long v) { return v ? __builtin_clzll(v) : 64; }
inline unsigned __brev(unsigned v) {
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (v >> i & 1) << (31 - i);
  return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) {
    unsigned s = selector >> 4 * i & 0xf, byte = bytes >> 8 * (s & 7) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    r |= byte << 8 * i;
  }
  return r;
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned n) {
  return static_cast<unsigned>((static_cast<uint64_t>(hi) << 32 | lo) << (n & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned n) {
  return static_cast<unsigned>((static_cast<uint64_t>(hi) << 32 | lo) >> (n & 31));
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; i++) c += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; i++) c += static_cast<uint8_t>(a >> 8 * i) * static_cast<uint8_t>(b >> 8 * i);
  return c;
}

// ---- conversions
inline int __float2int_rn(float v) { return static_cast<int>(rintf(v)); }
inline int __float2int_rz(float v) { return static_cast<int>(v); }
inline int __float2int_rd(float v) { return static_cast<int>(floorf(v)); }
inline int __float2int_ru(float v) { return static_cast<int>(ceilf(v)); }
inline unsigned __float2uint_rn(float v) { return static_cast<unsigned>(rintf(v)); }
inline float __int2float_rn(int v) { return static_cast<float>(v); }
inline float __uint2float_rn(unsigned v) { return static_cast<float>(v); }

// ---- maths. The device's fast forms are less exact: tests compare within tolerances.
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
inline float __frsqrt_rn(float v) { return 1.0f / sqrtf(v); }
inline float __fsqrt_rn(float v) { return sqrtf(v); }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __expf(float v) { return expf(v); }
inline float __exp10f(float v) { return powf(10.0f, v); }
inline float __logf(float v) { return logf(v); }
inline float __log2f(float v) { return log2f(v); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float __sinf(float v) { return sinf(v); }
inline float __cosf(float v) { return cosf(v); }
inline float __saturatef(float v) { return v > 0 ? (v < 1 ? v : 1) : 0; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
// Rounded on their own: the compiler must not contract them with a neighbour.
inline float __fadd_rn(float a, float b) { volatile float r = a + b; return r; }
inline float __fsub_rn(float a, float b) { volatile float r = a - b; return r; }
inline float __fmul_rn(float a, float b) { volatile float r = a * b; return r; }
inline double __dadd_rn(double a, double b) { volatile double r = a + b; return r; }
inline double __dmul_rn(double a, double b) { volatile double r = a * b; return r; }
using std::isfinite;
using std::isinf;
using std::isnan;
template <class A, class B>
inline std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(static_cast<T>(a), static_cast<T>(b));
  else return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
inline std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(static_cast<T>(a), static_cast<T>(b));
  else return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

// ---- atomics: blocks may run on several CPU threads
namespace hs {
template <class T, class Change>
T atomic_change(T *p, Change change) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  static_assert(sizeof(T) == sizeof(Bits));
  Bits *address = reinterpret_cast<Bits *>(p), old = __atomic_load_n(address, __ATOMIC_RELAXED), next;
  T value;
  do {
    memcpy(&value, &old, sizeof value);
    T changed = change(value);
    memcpy(&next, &changed, sizeof next);
  } while (!__atomic_compare_exchange_n(address, &old, next, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
  return value;
}
template <class T>
struct Same {
  using type = T;
};
template <class T>
using same = typename Same<T>::type;  // keeps an argument out of template deduction
}  // namespace hs
template <class T> T atomicAdd(T *p, hs::same<T> v) { return hs::atomic_change(p, [=](T old) { return static_cast<T>(old + v); }); }
template <class T> T atomicSub(T *p, hs::same<T> v) { return hs::atomic_change(p, [=](T old) { return static_cast<T>(old - v); }); }
template <class T> T atomicMin(T *p, hs::same<T> v) { return hs::atomic_change(p, [=](T old) { return v < old ? v : old; }); }
template <class T> T atomicMax(T *p, hs::same<T> v) { return hs::atomic_change(p, [=](T old) { return old < v ? v : old; }); }
template <class T> T atomicAnd(T *p, hs::same<T> v) { return hs::atomic_change(p, [=](T old) { return static_cast<T>(old & v); }); }
template <class T> T atomicOr(T *p, hs::same<T> v) { return hs::atomic_change(p, [=](T old) { return static_cast<T>(old | v); }); }
template <class T> T atomicXor(T *p, hs::same<T> v) { return hs::atomic_change(p, [=](T old) { return static_cast<T>(old ^ v); }); }
template <class T> T atomicExch(T *p, hs::same<T> v) { return hs::atomic_change(p, [=](T) { return v; }); }
template <class T> T atomicCAS(T *p, hs::same<T> expected, hs::same<T> v) {
  return hs::atomic_change(p, [=](T old) { return old == expected ? v : old; });
}
inline unsigned atomicInc(unsigned *p, unsigned limit) {
  return hs::atomic_change(p, [=](unsigned old) { return old >= limit ? 0u : old + 1; });
}
