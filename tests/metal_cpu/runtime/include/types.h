// Keywords, half, bfloat, vectors and type traits of the Metal library, for g++ and clang++ in C++20.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include "../executor.h"

#define device
#define constant
#define thread
#define threadgroup /* declarations are rewritten to CPU_THREADGROUP by the translator */
#define METAL_FUNC inline
#define __METAL__ 1
#define __METAL_VERSION__ 400
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define CPU_THREADGROUP(NAME, ...)                                                                           \
  __VA_ARGS__& NAME = *reinterpret_cast<std::remove_reference_t<__VA_ARGS__>*>(executor::threadgroup_memory( \
      [] {                                                                                                   \
        static char k;                                                                                       \
        return &k;                                                                                           \
      }(),                                                                                                   \
      sizeof(__VA_ARGS__), alignof(__VA_ARGS__)))
#define CPU_UNINSTRUMENTED \
  __attribute__((no_sanitize("thread")))  // for the exchange between lanes, which is no memory access of the kernel
#define CPU_SITE_ARGUMENTS const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE()
#define CPU_SITE(OPERATION) \
  executor::Site { file_, line_, OPERATION }

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

struct cpu_half_tag {};
struct cpu_bfloat_tag {};
template <class Tag> struct alignas(2) small_float;
template <class T>
concept cpu_arithmetic = std::is_arithmetic_v<T>;
template <class Tag> struct alignas(2) small_float {
  uint16_t bits;
  small_float() = default;
  static constexpr uint16_t encode(float f) {
    if constexpr (std::is_same_v<Tag, cpu_bfloat_tag>) {
      uint32_t u = std::bit_cast<uint32_t>(f);
      if ((u & 0x7fffffff) > 0x7f800000) return uint16_t((u >> 16) | 0x40);  // a NaN stays one
      return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
    } else
      return std::bit_cast<uint16_t>((_Float16)f);
  }
  template <cpu_arithmetic A> constexpr small_float(A f) : bits(encode(static_cast<float>(f))) {}
  template <class U>
    requires(!std::is_same_v<U, Tag>)
  constexpr explicit small_float(small_float<U> o) : bits(encode(float(o))) {}
  constexpr operator float() const {
    if constexpr (std::is_same_v<Tag, cpu_bfloat_tag>)
      return std::bit_cast<float>(uint32_t(bits) << 16);
    else
      return float(std::bit_cast<_Float16>(bits));
  }
  template <class R> small_float& operator+=(R r) { return *this = small_float(float(*this) + float(r)); }
  template <class R> small_float& operator-=(R r) { return *this = small_float(float(*this) - float(r)); }
  template <class R> small_float& operator*=(R r) { return *this = small_float(float(*this) * float(r)); }
  template <class R> small_float& operator/=(R r) { return *this = small_float(float(*this) / float(r)); }
  constexpr small_float operator-() const {
    small_float r;
    r = *this;
    r.bits ^= 0x8000;
    return r;
  }
};
typedef small_float<cpu_half_tag> half;
typedef small_float<cpu_bfloat_tag> bfloat;
// The type of a result: small with small or integer gives small, small with float gives float.
#define CPU_BINARY(OP)                                                                                  \
  template <class Tag> constexpr small_float<Tag> operator OP(small_float<Tag> a, small_float<Tag> b) { \
    return small_float<Tag>(float(a) OP float(b));                                                      \
  }                                                                                                     \
  template <class Tag, cpu_arithmetic A> constexpr auto operator OP(small_float<Tag> a, A b) {          \
    if constexpr (std::is_floating_point_v<A>)                                                          \
      return float(a) OP float(b);                                                                      \
    else                                                                                                \
      return small_float<Tag>(float(a) OP float(b));                                                    \
  }                                                                                                     \
  template <class Tag, cpu_arithmetic A> constexpr auto operator OP(A a, small_float<Tag> b) {          \
    if constexpr (std::is_floating_point_v<A>)                                                          \
      return float(a) OP float(b);                                                                      \
    else                                                                                                \
      return small_float<Tag>(float(a) OP float(b));                                                    \
  }
CPU_BINARY(+)
CPU_BINARY(-)
CPU_BINARY(*)
CPU_BINARY(/)
#define CPU_COMPARISON(OP)                                                                     \
  template <class Tag> constexpr bool operator OP(small_float<Tag> a, small_float<Tag> b) {    \
    return float(a) OP float(b);                                                               \
  }                                                                                            \
  template <class Tag, cpu_arithmetic A> constexpr bool operator OP(small_float<Tag> a, A b) { \
    return float(a) OP float(b);                                                               \
  }                                                                                            \
  template <class Tag, cpu_arithmetic A> constexpr bool operator OP(A a, small_float<Tag> b) { \
    return float(a) OP float(b);                                                               \
  }
CPU_COMPARISON(<)
CPU_COMPARISON(>)
CPU_COMPARISON(<=)
CPU_COMPARISON(>=)
CPU_COMPARISON(==)
CPU_COMPARISON(!=)

namespace metal {
template <class T, int N> struct vec;
template <class T> struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  vec() = default;
  constexpr vec(T s) : x(s), y(s) {}
  constexpr vec(T a, T b) : x(a), y(b) {}
  template <class U> constexpr explicit vec(vec<U, 2> o) : x(T(o.x)), y(T(o.y)) {}
  constexpr T& operator[](int i) { return (&x)[i]; }
  constexpr const T& operator[](int i) const { return (&x)[i]; }
};
template <class T> struct alignas(4 * sizeof(T)) vec<T, 3> {
  T x, y, z;
  vec() = default;
  constexpr vec(T s) : x(s), y(s), z(s) {}
  constexpr vec(T a, T b, T c) : x(a), y(b), z(c) {}
  template <class U> constexpr explicit vec(vec<U, 3> o) : x(T(o.x)), y(T(o.y)), z(T(o.z)) {}
  constexpr T& operator[](int i) { return (&x)[i]; }
  constexpr const T& operator[](int i) const { return (&x)[i]; }
};
template <class T> struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  vec() = default;
  constexpr vec(T s) : x(s), y(s), z(s), w(s) {}
  constexpr vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  constexpr vec(vec<T, 2> a, vec<T, 2> b) : x(a.x), y(a.y), z(b.x), w(b.y) {}
  template <class U> constexpr explicit vec(vec<U, 4> o) : x(T(o.x)), y(T(o.y)), z(T(o.z)), w(T(o.w)) {}
  constexpr T& operator[](int i) { return (&x)[i]; }
  constexpr const T& operator[](int i) const { return (&x)[i]; }
};
#define CPU_VECTOR_BINARY(OP)                                                                      \
  template <class T, int N> inline vec<T, N> operator OP(vec<T, N> a, vec<T, N> b) {               \
    vec<T, N> r;                                                                                   \
    for (int i = 0; i < N; i++) r[i] = T(a[i] OP b[i]);                                            \
    return r;                                                                                      \
  }                                                                                                \
  template <class T, int N> inline vec<T, N> operator OP(vec<T, N> a, std::type_identity_t<T> b) { \
    vec<T, N> r;                                                                                   \
    for (int i = 0; i < N; i++) r[i] = T(a[i] OP b);                                               \
    return r;                                                                                      \
  }                                                                                                \
  template <class T, int N> inline vec<T, N> operator OP(std::type_identity_t<T> a, vec<T, N> b) { \
    vec<T, N> r;                                                                                   \
    for (int i = 0; i < N; i++) r[i] = T(a OP b[i]);                                               \
    return r;                                                                                      \
  }                                                                                                \
  template <class T, int N, class R> inline vec<T, N>& operator OP## = (vec<T, N> & a, R b) { return a = a OP b; }
CPU_VECTOR_BINARY(+)
CPU_VECTOR_BINARY(-)
CPU_VECTOR_BINARY(*)
CPU_VECTOR_BINARY(/)
CPU_VECTOR_BINARY(&)
CPU_VECTOR_BINARY(|)
CPU_VECTOR_BINARY(^)
CPU_VECTOR_BINARY(>>)
CPU_VECTOR_BINARY(<<)
template <class T, int N> inline T dot(vec<T, N> a, vec<T, N> b) {
  T r = a[0] * b[0];
  for (int i = 1; i < N; i++) r = r + a[i] * b[i];
  return r;
}
}  // namespace metal
#define CPU_VECTOR_TYPES(T)      \
  typedef metal::vec<T, 2> T##2; \
  typedef metal::vec<T, 3> T##3; \
  typedef metal::vec<T, 4> T##4;
CPU_VECTOR_TYPES(float)
CPU_VECTOR_TYPES(int)
CPU_VECTOR_TYPES(uint)
CPU_VECTOR_TYPES(short)
CPU_VECTOR_TYPES(ulong)
using metal::vec;
template <class T, class U> constexpr T as_type(const U& u) {
  static_assert(sizeof(T) == sizeof(U));
  return __builtin_bit_cast(T, u);
}

namespace metal {
using ::bfloat;
using ::half;
using ::uchar;
using ::uint;
using ::ulong;
using ::ushort;
using std::bool_constant;
using std::conditional_t;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_integral;
using std::is_integral_v;
using std::is_same_v;
using std::remove_cv_t;
using std::true_type;

template <class T> struct numeric_limits;
#define CPU_INTEGER_LIMITS(T)                                                                                \
  template <> struct numeric_limits<T> {                                                                     \
    static constexpr T max() { return std::is_signed_v<T> ? T((~0ull >> (65 - 8 * sizeof(T)))) : T(~T(0)); } \
    static constexpr T min() { return std::is_signed_v<T> ? T(-max() - 1) : T(0); }                          \
  };
CPU_INTEGER_LIMITS(uint8_t)
CPU_INTEGER_LIMITS(uint16_t)
CPU_INTEGER_LIMITS(uint32_t)
CPU_INTEGER_LIMITS(uint64_t)
CPU_INTEGER_LIMITS(int8_t)
CPU_INTEGER_LIMITS(int16_t)
CPU_INTEGER_LIMITS(int32_t)
CPU_INTEGER_LIMITS(int64_t)
#define CPU_FLOAT_LIMITS(T, MAX, MIN)                                \
  template <> struct numeric_limits<T> {                             \
    static constexpr T max() { return T(MAX); }                      \
    static constexpr T min() { return T(MIN); }                      \
    static constexpr T infinity() { return T(__builtin_inff()); }    \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); } \
  };
CPU_FLOAT_LIMITS(float, 3.402823466e+38f, 1.17549435e-38f)
CPU_FLOAT_LIMITS(half, 65504.0f, 6.1035e-5f)
CPU_FLOAT_LIMITS(bfloat, 3.3895314e38f, 1.17549435e-38f)
}  // namespace metal
inline uint3 cpu_uint3(executor::Uint3 a) { return uint3(a.x, a.y, a.z); }
