// The two register-blocked products that every pass of the gather is made of.
#pragma once

#include "../cpu/simd.h"
#include "../tensor.h"

namespace ocr_kernels {
inline namespace OCR_ISA {

// Two bfloat16 in one 32-bit lane. A product of lanes is the sum of both products, in float32.
using Pair = uint32_t;

// What a lane of the products holds.
template <class Lane>
struct Holds {
  using Element = Lane;
  using Sum = Lane;
  static constexpr int elements = 1;
  static constexpr Dtype dtype = sizeof(Lane) == 8 ? Dtype::Float64 : Dtype::Float32;
};
template <>
struct Holds<Pair> {
  using Element = BFloat16;
  using Sum = float;
  static constexpr int elements = 2;
  static constexpr Dtype dtype = Dtype::BFloat16;
};
template <class Lane>
using AccumulatorOf = typename Holds<Lane>::Sum;

template <class A>
OCR_INLINE Vec<A> multiply_add(Vec<A> a, Vec<A> b, Vec<A> c) {
  return fma(a, b, c);
}
#if defined(__AVX512BF16__)
constexpr bool kPairProducts = true;
OCR_INLINE Vec<float> multiply_add(Vec<Pair> a, Vec<Pair> b, Vec<float> c) {
  return {(Lanes<float>)_mm512_dpbf16_ps((__m512)c.v, (__m512bh)a.v, (__m512bh)b.v)};
}
#else
constexpr bool kPairProducts = false;
#endif

// Accumulators, operands and one spare fill the registers: 32 in AVX-512, 16 in the others.
#if defined(__AVX512F__)
constexpr int kDotRows = 6, kDotColumns = 4, kOuterRows = 6, kOuterVectors = 4;
#else
constexpr int kDotRows = 3, kDotColumns = 4, kOuterRows = 6, kOuterVectors = 2;
#endif

template <class Lane>
constexpr int kPanelOf = kOuterVectors * Vec<Lane>::size;

// Sums instead of exchanges: lane i ends as the sum over the lanes of x[i].
template <int half, class A>
OCR_INLINE void fold(Vec<A>* x) {
  if constexpr (half > 0) {
    OCR_UNROLL
    for (int i = 0; i < half; ++i) {
      exchange<half>(x[i], x[i + half]);
      x[i] = x[i] + x[i + half];
    }
    fold<half / 2>(x);
  }
}

// sums[i] = the sum over the lanes of x[i]
template <int count, class A>
OCR_INLINE void lane_sums(A* sums, const Vec<A>* x) {
  constexpr int size = Vec<A>::size;
  OCR_UNROLL
  for (int first = 0; first < count; first += size) {
    Vec<A> group[size];
    OCR_UNROLL
    for (int i = 0; i < size; ++i) group[i] = x[first + (first + i < count ? i : 0)];
    fold<size / 2>(group);
    store(sums + first, group[0]);
  }
}
template <class A>
constexpr int kDotSums = (kDotRows * kDotColumns + Vec<A>::size - 1) / Vec<A>::size * Vec<A>::size;

// sums[r][s] = sum_l rows[r][l] * columns[s][l]; `length` is whole vectors. The rows lie where the caller's tensor has
// them, aligned to their elements only.
template <class Lane, class A = AccumulatorOf<Lane>>
OCR_INLINE void dot_block(A* sums, const char* const* rows, const Lane* columns, int64_t column_stride,
                          int64_t length) {
  Vec<A> acc[kDotRows * kDotColumns];
  OCR_UNROLL
  for (int i = 0; i < kDotRows * kDotColumns; ++i) acc[i] = broadcast(A(0));
  for (int64_t l = 0; l < length; l += Vec<Lane>::size) {
    Vec<Lane> x[kDotRows];
    OCR_UNROLL
    for (int r = 0; r < kDotRows; ++r) memcpy(&x[r], rows[r] + l * int64_t(sizeof(Lane)), sizeof x[r]);
    OCR_UNROLL
    for (int s = 0; s < kDotColumns; ++s) {
      const Vec<Lane> w = load<Lane>(columns + s * column_stride + l);
      OCR_UNROLL
      for (int r = 0; r < kDotRows; ++r) acc[r * kDotColumns + s] = multiply_add(x[r], w, acc[r * kDotColumns + s]);
    }
  }
  lane_sums<kDotRows * kDotColumns>(sums, acc);
}

// out[r][:] (+)= sum_j a(r, j) * b[j][:], with a(r, j) at a + r * a_row + j * a_step, and a panel's width of lanes
template <class Lane, class A = AccumulatorOf<Lane>>
OCR_INLINE void outer_block(bool add, A* out, int64_t out_stride, const Lane* a, int64_t a_row, int64_t a_step,
                            const Lane* b, int64_t b_stride, int64_t length) {
  Vec<A> acc[kOuterRows][kOuterVectors];
  OCR_UNROLL
  for (int r = 0; r < kOuterRows; ++r) OCR_UNROLL
  for (int v = 0; v < kOuterVectors; ++v) acc[r][v] = broadcast(A(0));
  for (int64_t j = 0; j < length; ++j, a += a_step, b += b_stride) {
    Vec<Lane> y[kOuterVectors];
    OCR_UNROLL
    for (int v = 0; v < kOuterVectors; ++v) y[v] = load<Lane>(b + v * Vec<Lane>::size);
    OCR_UNROLL
    for (int r = 0; r < kOuterRows; ++r) {
      const Vec<Lane> x = broadcast(a[r * a_row]);
      OCR_UNROLL
      for (int v = 0; v < kOuterVectors; ++v) acc[r][v] = multiply_add(x, y[v], acc[r][v]);
    }
  }
  OCR_UNROLL
  for (int r = 0; r < kOuterRows; ++r) OCR_UNROLL
  for (int v = 0; v < kOuterVectors; ++v) {
    A* p = out + r * out_stride + v * Vec<A>::size;
    store(p, add ? load<A>(p) + acc[r][v] : acc[r][v]);
  }
}

}  // namespace OCR_ISA
}  // namespace ocr_kernels
