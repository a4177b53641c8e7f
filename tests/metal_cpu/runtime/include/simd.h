// Barriers and simdgroup functions of the Metal library: each is a rendezvous in the executor.
#pragma once
#include "types.h"

namespace metal {
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
inline void threadgroup_barrier(mem_flags f, CPU_SITE_ARGUMENTS) {
  executor::threadgroup_rendezvous(int(f), CPU_SITE("threadgroup_barrier"));
}
inline void simdgroup_barrier(mem_flags f, CPU_SITE_ARGUMENTS) {
  executor::simdgroup_rendezvous(int(f), CPU_SITE("simdgroup_barrier"));
}

template <class T> struct cpu_slot {  // operands and result of a lane
  T in, out;
  T fill;    // of simd_shuffle_and_fill_up
  uint arg;  // lane or distance of a shuffle
};
#define CPU_SLOT(i) (static_cast<cpu_slot<T>*>(g.slot(i)))
// Reductions combine pairs of lanes, then pairs of results. Apple does not document an order: tests must not need one.
#define CPU_REDUCE(NAME, EXPR)                                                                     \
  template <class T> inline T NAME(T v, CPU_SITE_ARGUMENTS) {                                      \
    cpu_slot<T> s{v, v, v, 0};                                                                     \
    executor::simd_rendezvous(&s, CPU_SITE(#NAME), [](executor::SimdGroup& g) CPU_UNINSTRUMENTED { \
      T values[executor::SIMD_WIDTH];                                                              \
      int n = g.size;                                                                              \
      for (int i = 0; i < n; i++) values[i] = CPU_SLOT(i)->in;                                     \
      for (int distance = 1; distance < n; distance *= 2)                                          \
        for (int i = 0; i + distance < n; i += 2 * distance) {                                     \
          T a = values[i], b = values[i + distance];                                               \
          values[i] = EXPR;                                                                        \
        }                                                                                          \
      for (int i = 0; i < n; i++) CPU_SLOT(i)->out = values[0];                                    \
    });                                                                                            \
    return s.out;                                                                                  \
  }
CPU_REDUCE(simd_sum, T(a + b))
CPU_REDUCE(simd_max, (a > b ? a : b))
CPU_REDUCE(simd_min, (a < b ? a : b))
#define CPU_QUAD_REDUCE(NAME, EXPR)                                                                \
  template <class T> inline T NAME(T v, CPU_SITE_ARGUMENTS) {                                      \
    cpu_slot<T> s{v, v, v, 0};                                                                     \
    executor::simd_rendezvous(&s, CPU_SITE(#NAME), [](executor::SimdGroup& g) CPU_UNINSTRUMENTED { \
      for (int q = 0; q < g.size; q += 4) {                                                        \
        T r = CPU_SLOT(q)->in;                                                                     \
        for (int j = 1; j < 4 && q + j < g.size; j++) {                                            \
          T a = r, b = CPU_SLOT(q + j)->in;                                                        \
          r = EXPR;                                                                                \
        }                                                                                          \
        for (int j = 0; j < 4 && q + j < g.size; j++) CPU_SLOT(q + j)->out = r;                    \
      }                                                                                            \
    });                                                                                            \
    return s.out;                                                                                  \
  }
CPU_QUAD_REDUCE(quad_sum, T(a + b))
// A shuffle from a lane outside the simdgroup is undefined in Metal; here its result has all bits set, a NaN.
template <class T> inline T cpu_all_ones() {
  T t;
  __builtin_memset((void*)&t, 0xFF, sizeof t);
  return t;
}
#define CPU_SHUFFLE(NAME, SOURCE)                                                                  \
  template <class T> inline T NAME(T v, ushort arg, CPU_SITE_ARGUMENTS) {                          \
    cpu_slot<T> s{v, v, v, arg};                                                                   \
    executor::simd_rendezvous(&s, CPU_SITE(#NAME), [](executor::SimdGroup& g) CPU_UNINSTRUMENTED { \
      for (int i = 0; i < g.size; i++) {                                                           \
        int a = CPU_SLOT(i)->arg, j = SOURCE;                                                      \
        CPU_SLOT(i)->out = j >= 0 && j < g.size ? CPU_SLOT(j)->in : cpu_all_ones<T>();             \
        (void)a;                                                                                   \
      }                                                                                            \
    });                                                                                            \
    return s.out;                                                                                  \
  }
CPU_SHUFFLE(simd_shuffle, a)
CPU_SHUFFLE(simd_shuffle_down, i + a)
CPU_SHUFFLE(simd_shuffle_up, i - a)
template <class T> inline T simd_shuffle_and_fill_up(T v, T fill, ushort arg, CPU_SITE_ARGUMENTS) {
  cpu_slot<T> s{v, v, fill, arg};
  executor::simd_rendezvous(&s, CPU_SITE("simd_shuffle_and_fill_up"), [](executor::SimdGroup& g) CPU_UNINSTRUMENTED {
    for (int i = 0; i < g.size; i++) {
      int a = CPU_SLOT(i)->arg;
      CPU_SLOT(i)->out = i - a >= 0 ? CPU_SLOT(i - a)->in : CPU_SLOT(g.size + i - a)->fill;
    }
  });
  return s.out;
}
template <class T> inline T simd_prefix_inclusive_sum(T v, CPU_SITE_ARGUMENTS) {
  cpu_slot<T> s{v, v, v, 0};
  executor::simd_rendezvous(&s, CPU_SITE("simd_prefix_inclusive_sum"), [](executor::SimdGroup& g) CPU_UNINSTRUMENTED {
    T a = T(0);
    for (int i = 0; i < g.size; i++) {
      a = T(a + CPU_SLOT(i)->in);
      CPU_SLOT(i)->out = a;
    }
  });
  return s.out;
}

}  // namespace metal
