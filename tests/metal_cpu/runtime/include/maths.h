// Mathematical functions of the Metal library.
#pragma once
#include "types.h"

namespace metal {
#define CPU_UNARY(NAME)                                                    \
  inline float NAME(float x) { return __builtin_##NAME##f(x); }            \
  inline half NAME(half x) { return half(__builtin_##NAME##f(float(x))); } \
  inline bfloat NAME(bfloat x) { return bfloat(__builtin_##NAME##f(float(x))); }
CPU_UNARY(exp)
CPU_UNARY(log)
CPU_UNARY(sqrt)
CPU_UNARY(ceil)
CPU_UNARY(round)
CPU_UNARY(fabs)
inline float atan2(float y, float x) { return __builtin_atan2f(y, x); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline bfloat fma(bfloat a, bfloat b, bfloat c) { return bfloat(__builtin_fmaf(a, b, c)); }
inline half fma(half a, half b, half c) { return half(__builtin_fmaf(a, b, c)); }
template <class T> constexpr bool isnan(T x) { return float(x) != float(x); }
template <class T> constexpr bool isinf(T x) { return __builtin_isinf(float(x)); }
template <class T> constexpr T abs(T x) { return x < T(0) ? T(-x) : x; }
template <class T> constexpr T max(T a, T b) { return a > b ? a : b; }
template <class T> constexpr T min(T a, T b) { return a < b ? a : b; }
template <class T> constexpr T clamp(T v, std::type_identity_t<T> lo, std::type_identity_t<T> hi) {
  return v < lo ? lo : v > hi ? hi : v;
}
inline float fmax(float a, float b) { return a > b ? a : b; }
inline float fmin(float a, float b) { return a < b ? a : b; }
template <class T> T select(T a, T b, bool c) { return c ? b : a; }
namespace precise {
using metal::sqrt;
}  // namespace precise

}  // namespace metal
