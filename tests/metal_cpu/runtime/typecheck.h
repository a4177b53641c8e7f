// Declarations of the Metal library for a check with clang, where a wrong or missing address space is an error.
#pragma once
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef unsigned long size_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef _Float16 half;
typedef __bf16 bfloat;
typedef __bf16 bfloat16_t;
#define VECTORS(T)                                    \
  typedef T T##2 __attribute__((ext_vector_type(2))); \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
VECTORS(uint)
VECTORS(float)
VECTORS(ulong)
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define METAL_FUNC inline
#define INFINITY __builtin_inff()

namespace metal {
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags) __attribute__((convergent));
void simdgroup_barrier(mem_flags) __attribute__((convergent));
template <class T> T simd_sum(T);
template <class T> T simd_max(T);
template <class T> T simd_min(T);
template <class T> T simd_prefix_inclusive_sum(T);
template <class T> T simd_shuffle(T, ushort);
float exp(float);
float fma(float, float, float);
float abs(float);
template <class T> T min(T, T);
template <class T> T max(T, T);
template <class T, int R, int C> struct simdgroup_matrix {
  typedef T pair __attribute__((ext_vector_type(2)));
  simdgroup_matrix();
  explicit simdgroup_matrix(T);
  pair& thread_elements();
};
template <class T> using matrix = simdgroup_matrix<T, 8, 8>;
template <class T> void simdgroup_multiply_accumulate(matrix<T>&, matrix<T>, matrix<T>, matrix<T>);
template <class T>
void simdgroup_load(matrix<T>&, const threadgroup T*, ulong row = 8, ulong2 origin = 0, bool transpose = false);
template <class T>
void simdgroup_load(matrix<T>&, const device T*, ulong row = 8, ulong2 origin = 0, bool transpose = false);
template <class T> void simdgroup_store(matrix<T>, threadgroup T*, ulong row = 8);
template <class T> void simdgroup_store(matrix<T>, device T*, ulong row = 8);
template <class T, int R, int C> simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T);
}  // namespace metal
using namespace metal;
