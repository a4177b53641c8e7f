// Atomics of the Metal library: relaxed only, as in Metal.
#pragma once
#include "types.h"

namespace metal {
enum memory_order { memory_order_relaxed };
template <class T> struct atomic {
  T v;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<bool> atomic_bool;
template <class T, class U> inline T atomic_fetch_add_explicit(atomic<T>* p, U u, memory_order) {
  T o;
  __atomic_load(&p->v, &o, __ATOMIC_RELAXED);
  for (;;) {
    T n = T(o + u);
    if (__atomic_compare_exchange(&p->v, &o, &n, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return o;
  }
}
template <class T> inline T atomic_load_explicit(const atomic<T>* p, memory_order) {
  T o;
  __atomic_load(&p->v, &o, __ATOMIC_RELAXED);
  return o;
}
template <class T, class U> inline void atomic_store_explicit(atomic<T>* p, U u, memory_order) {
  T n = u;
  __atomic_store(&p->v, &n, __ATOMIC_RELAXED);
}
template <class T, class U>
inline bool atomic_compare_exchange_weak_explicit(atomic<T>* p, T* e, U u, memory_order, memory_order) {
  T n = u;
  return __atomic_compare_exchange(&p->v, e, &n, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}
template <class T, class U> inline T atomic_exchange_explicit(atomic<T>* p, U u, memory_order) {
  T n = u, o;
  __atomic_exchange(&p->v, &n, &o, __ATOMIC_RELAXED);
  return o;
}

}  // namespace metal
