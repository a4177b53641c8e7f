// Mathematical functions of the Metal library.
#pragma once
#include "types.h"

namespace metal {
#define CPU_UNARY(NAME)                                                    \
  inline float NAME(float x) { return __builtin_##NAME##f(x); }            \
  inline half NAME(half x) { return half(__builtin_##NAME##f(float(x))); } \
  inline bfloat NAME(bfloat x) { return bfloat(__builtin_##NAME##f(float(x))); }
CPU_UNARY(exp)
CPU_UNARY(exp2)
CPU_UNARY(log)
CPU_UNARY(log2)
CPU_UNARY(log10)
CPU_UNARY(sqrt)
CPU_UNARY(sin)
CPU_UNARY(cos)
CPU_UNARY(tan)
CPU_UNARY(tanh)
CPU_UNARY(sinh)
CPU_UNARY(cosh)
CPU_UNARY(asin)
CPU_UNARY(acos)
CPU_UNARY(atan)
CPU_UNARY(asinh)
CPU_UNARY(acosh)
CPU_UNARY(atanh)
CPU_UNARY(floor)
CPU_UNARY(ceil)
CPU_UNARY(trunc)
CPU_UNARY(rint)
CPU_UNARY(round)
CPU_UNARY(fabs)
inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float atan2(float y, float x) { return __builtin_atan2f(y, x); }
inline float pow(float a, float b) { return __builtin_powf(a, b); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline bfloat fma(bfloat a, bfloat b, bfloat c) { return bfloat(__builtin_fmaf(a, b, c)); }
inline half fma(half a, half b, half c) { return half(__builtin_fmaf(a, b, c)); }
inline float fmod(float a, float b) { return __builtin_fmodf(a, b); }
inline float copysign(float a, float b) { return __builtin_copysignf(a, b); }
template <class T> constexpr bool isnan(T x) { return float(x) != float(x); }
template <class T> constexpr bool isinf(T x) { return __builtin_isinf(float(x)); }
template <class T> constexpr T abs(T x) { return x < T(0) ? T(-x) : x; }
template <class T> constexpr T max(T a, T b) { return a > b ? a : b; }
template <class T> constexpr T min(T a, T b) { return a < b ? a : b; }
template <class T>
  requires std::is_integral_v<T>
constexpr T clamp(T v, std::type_identity_t<T> lo, std::type_identity_t<T> hi) {
  return v < lo ? lo : v > hi ? hi : v;
}
template <class T>
  requires(!std::is_integral_v<T>)
constexpr T clamp(T v, std::type_identity_t<T> lo, std::type_identity_t<T> hi) {
  return v < lo ? lo : v > hi ? hi : v;
}
inline float fmax(float a, float b) { return a > b ? a : b; }
inline float fmin(float a, float b) { return a < b ? a : b; }
template <class T> T select(T a, T b, bool c) { return c ? b : a; }
inline int popcount(uint x) { return __builtin_popcount(x); }
inline int clz(uint x) { return x ? __builtin_clz(x) : 32; }
inline int ctz(uint x) { return x ? __builtin_ctz(x) : 32; }
template <class T> T extract_bits(T v, uint off, uint n) { return n == 0 ? T(0) : T(v << (32 - n - off)) >> (32 - n); }
namespace precise {
using metal::cos;
using metal::exp;
using metal::log;
using metal::rsqrt;
using metal::sin;
using metal::sqrt;
using metal::tanh;
inline float divide(float a, float b) { return a / b; }
using metal::exp2;
using metal::log10;
using metal::log2;
}  // namespace precise
namespace fast {
using metal::cos;
using metal::exp;
using metal::exp2;
using metal::log;
using metal::log2;
using metal::rsqrt;
using metal::sin;
using metal::sqrt;
using metal::tanh;
inline float divide(float a, float b) { return a / b; }
}  // namespace fast

}  // namespace metal
