// simdgroup_matrix of the Metal library: matrices of 8 x 8 elements, of which each lane holds two.
#pragma once
#include "simd.h"

namespace metal {
// A lane holds the elements (row, column) and (row, column + 1), as MLX's steel/gemm/mma.h assumes.
inline int cpu_matrix_row(int lane) { return (lane / 4 & 4) + lane / 2 % 4; }
inline int cpu_matrix_column(int lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
template <class T, int R = 8, int C = 8> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8);
  vec<T, 2> elements;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diag) {
    int l = executor::current_fiber().lane;
    int row = cpu_matrix_row(l), column = cpu_matrix_column(l);
    elements = {row == column ? diag : T(0), row == column + 1 ? diag : T(0)};
  }
  vec<T, 2>& thread_elements() { return elements; }
};
template <class T, int R, int C> inline simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, R, C> m;
  m.elements = {v, v};
  return m;
}
template <class TD, class TA, class TB, class TC> struct cpu_multiply_accumulate {
  simdgroup_matrix<TD>* d;
  const simdgroup_matrix<TA>* a;
  const simdgroup_matrix<TB>* b;
  const simdgroup_matrix<TC>* c;
};
template <class TD, class TA, class TB, class TC>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<TD>& d, const simdgroup_matrix<TA>& a,
                                          const simdgroup_matrix<TB>& b, const simdgroup_matrix<TC>& c,
                                          CPU_SITE_ARGUMENTS) {
  typedef cpu_multiply_accumulate<TD, TA, TB, TC> S;
  S s{&d, &a, &b, &c};
  const executor::Site site = CPU_SITE("simdgroup_multiply_accumulate");
  executor::simd_rendezvous(&s, site, [](executor::SimdGroup& g) CPU_UNINSTRUMENTED {
    float A[8][8], B[8][8], D[8][8];
    for (int l = 0; l < 32; l++) {
      S& s = *static_cast<S*>(g.slot(l));
      int r = cpu_matrix_row(l), k = cpu_matrix_column(l);
      vec<TA, 2> a;
      vec<TB, 2> b;
      vec<TC, 2> c;
      __builtin_memcpy((void*)&a, &s.a->elements, sizeof a);
      __builtin_memcpy((void*)&b, &s.b->elements, sizeof b);
      __builtin_memcpy((void*)&c, &s.c->elements, sizeof c);  // copies of bytes, which are no accesses of the kernel
      A[r][k] = a.x;
      A[r][k + 1] = a.y;
      B[r][k] = b.x;
      B[r][k + 1] = b.y;
      D[r][k] = c.x;
      D[r][k + 1] = c.y;
    }
    for (int i = 0; i < 8; i++)
      for (int k = 0; k < 8; k++)
        for (int j = 0; j < 8; j++) D[i][j] += A[i][k] * B[k][j];
    for (int l = 0; l < 32; l++) {
      S& s = *static_cast<S*>(g.slot(l));
      int r = cpu_matrix_row(l), k = cpu_matrix_column(l);
      vec<TD, 2> d{TD(D[r][k]), TD(D[r][k + 1])};
      __builtin_memcpy((void*)&s.d->elements, &d, sizeof d);
    }
  });
}
template <class T, class P>
inline void simdgroup_load(simdgroup_matrix<T>& d, const P* p, ulong row_stride = 8, ulong2 origin = ulong2(0ul, 0ul),
                           bool transpose = false, CPU_SITE_ARGUMENTS) {
  int l = executor::current_fiber().lane, r = cpu_matrix_row(l), c = cpu_matrix_column(l);
  p += origin.y * row_stride + origin.x;
  if (transpose) {
    d.elements = {T(p[c * row_stride + r]), T(p[(c + 1) * row_stride + r])};
  } else {
    d.elements = {T(p[r * row_stride + c]), T(p[r * row_stride + c + 1])};
  }
  executor::simd_rendezvous(nullptr, CPU_SITE("simdgroup_load"), [](executor::SimdGroup&) CPU_UNINSTRUMENTED {});
}
template <class T, class P>
inline void simdgroup_store(const simdgroup_matrix<T>& s, P* p, ulong row_stride = 8, ulong2 origin = ulong2(0ul, 0ul),
                            bool transpose = false, CPU_SITE_ARGUMENTS) {
  int l = executor::current_fiber().lane, r = cpu_matrix_row(l), c = cpu_matrix_column(l);
  p += origin.y * row_stride + origin.x;
  if (transpose) {
    p[c * row_stride + r] = P(s.elements.x);
    p[(c + 1) * row_stride + r] = P(s.elements.y);
  } else {
    p[r * row_stride + c] = P(s.elements.x);
    p[r * row_stride + c + 1] = P(s.elements.y);
  }
  executor::simd_rendezvous(nullptr, CPU_SITE("simdgroup_store"), [](executor::SimdGroup&) CPU_UNINSTRUMENTED {});
}

}  // namespace metal
