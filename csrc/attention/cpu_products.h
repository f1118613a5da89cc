// The products of the attention: result = A B with the columns of B in vectors, all of them in dense buffers.
#pragma once

#include "../cpu/simd.h"
#include "../cpu/tiles.h"

namespace ocr_kernels {
inline namespace OCR_ISA {

constexpr int64_t kPixels = 64;  // of a tile
constexpr int64_t kChain = 64;   // terms added one after the other; a longer sum is a sum of such
#if defined(__AVX512F__)
constexpr int kPanel = 8;  // rows of A in registers, by two vectors of B
#else
constexpr int kPanel = 6;
#endif

// How the numbers of a tensor enter a product. A Unit is what one multiply-add takes from a row of A or from a lane of
// B: `group` numbers that follow each other along the inner dimension. Tiles keep their numbers as `Stored`, in lines;
// pair_lines makes units of neighbouring lines. by_region and by_pixel make units of weights [K, kPixels].
template <class A>
struct Single {
  using Number = A;
  using Stored = A;
  using Unit = A;
  using Units = Vec<A>;
  static constexpr int group = 1;
  template <class T>
  static OCR_INLINE Unit unit(T first, T) {
    return A(to_float(first));
  }
  static OCR_INLINE Units broadcast_unit(const Unit* p) { return broadcast(*p); }
  static OCR_INLINE Units load_units(const Unit* p) { return load<A>(p); }
  static OCR_INLINE Vec<A> multiply_add(Units a, Units b, Vec<A> c) { return fma(a, b, c); }
  static OCR_INLINE Vec<A> rounded(Vec<A> x) { return x; }
  static const Unit* pair_lines(const Stored* lines, int64_t, int64_t, Unit*) { return lines; }
  static const Unit* by_region(const A* weights, int64_t, Unit*) { return weights; }
  static const Unit* by_pixel(const A* weights, int64_t, Unit*) { return weights; }
};

template <class T>
struct Arithmetic : Single<float> {};
template <>
struct Arithmetic<double> : Single<double> {};

#if defined(__AVX512BF16__)
template <>
struct Arithmetic<BFloat16> {
  using Number = float;
  using Stored = BFloat16;
  struct Unit {
    BFloat16 first, second;
  };
  using Units = __m512i;
  static constexpr int group = 2;
  static OCR_INLINE Unit unit(BFloat16 first, BFloat16 second) { return {first, second}; }
  static OCR_INLINE Units broadcast_unit(const Unit* p) { return _mm512_set1_epi32(bit_cast<int>(*p)); }
  static OCR_INLINE Units load_units(const Unit* p) { return _mm512_loadu_si512(p); }
  static OCR_INLINE Vec<float> multiply_add(Units a, Units b, Vec<float> c) {
    return {(Lanes<float>)_mm512_dpbf16_ps((__m512)c.v, (__m512bh)a, (__m512bh)b)};
  }
  static OCR_INLINE Vec<float> rounded(Vec<float> x) {
    return {(Lanes<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrowed(x)), 16)};
  }

  // [lines, pitch] -> [lines / 2, pitch]
  static const Unit* pair_lines(const Stored* lines, int64_t count, int64_t pitch, Unit* to) {
    for (int64_t l = 0; l < count; l += 2)
      for (int64_t i = 0; i < pitch; i += 16) {
        const Stored* line = lines + l * pitch + i;
        store_pairs(to + l / 2 * pitch + i, sixteen(line), sixteen(line + pitch));
      }
    return to;
  }
  // [K, kPixels] -> [K / 2, kPixels], as B of a product over regions
  static const Unit* by_region(const float* weights, int64_t regions, Unit* to) {
    for (int64_t k = 0; k < regions; k += 2)
      for (int64_t i = 0; i < kPixels; i += 16) {
        const float* row = weights + k * kPixels + i;
        const __m256i second = k + 1 < regions ? narrowed(load<float>(row + kPixels)) : _mm256_setzero_si256();
        store_pairs(to + k / 2 * kPixels + i, narrowed(load<float>(row)), second);
      }
    return to;
  }
  // [K, kPixels] -> [K, kPixels / 2], as A of a product over pixels
  static const Unit* by_pixel(const float* weights, int64_t regions, Unit* to) {
    for (int64_t i = 0; i < regions * kPixels; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i / 2), narrowed(load<float>(weights + i)));
    return to;
  }

 private:
  static OCR_INLINE __m256i sixteen(const BFloat16* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static OCR_INLINE __m256i narrowed(Vec<float> x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x.v); }
  static OCR_INLINE void store_pairs(Unit* p, __m256i first, __m256i second) {
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
    _mm512_storeu_si512(p, _mm512_or_si512(_mm512_cvtepu16_epi32(first), high));
  }
};
#endif

// Where the units of A lie: panel by panel with the rows side by side, or row by row.
struct Panels {
  static constexpr int64_t row = 1, step = kPanel;
  static OCR_INLINE int64_t panel(int64_t first_row, int64_t inner) { return first_row * inner; }
};
template <class Op>
struct Rows {
  static constexpr int64_t row = kPixels / Op::group, step = 1;
  static OCR_INLINE int64_t panel(int64_t first_row, int64_t) { return first_row * row; }
};

// What becomes of the sums: result = factors[column] * sum, or result += sum.
enum class Finish { Scale, Add };

template <class Op, class Layout, Finish finish, int rows>
OCR_INLINE void multiply_block(int64_t inner, int64_t column, const typename Op::Unit* a, const typename Op::Unit* b,
                               int64_t b_pitch, typename Op::Number* result, int64_t pitch,
                               const typename Op::Number* factors) {
  using Number = typename Op::Number;
  constexpr int size = Vec<Number>::size;
  b += column;
  Vec<Number> totals[rows][2];
  OCR_UNROLL
  for (int m = 0; m < rows; ++m) totals[m][0] = totals[m][1] = broadcast(Number(0));
  for (int64_t left_over = inner; left_over > 0; left_over -= kChain) {
    Vec<Number> sums[rows][2];
    OCR_UNROLL
    for (int m = 0; m < rows; ++m) sums[m][0] = sums[m][1] = broadcast(Number(0));
    for (int64_t j = smaller(left_over, kChain); j > 0; --j, a += Layout::step, b += b_pitch) {
      const typename Op::Units left = Op::load_units(b), right = Op::load_units(b + size);
      OCR_UNROLL
      for (int m = 0; m < rows; ++m) {
        const typename Op::Units x = Op::broadcast_unit(a + m * Layout::row);
        sums[m][0] = Op::multiply_add(x, left, sums[m][0]);
        sums[m][1] = Op::multiply_add(x, right, sums[m][1]);
      }
    }
    OCR_UNROLL
    for (int m = 0; m < rows; ++m) {
      totals[m][0] = totals[m][0] + sums[m][0];
      totals[m][1] = totals[m][1] + sums[m][1];
    }
  }
  OCR_UNROLL
  for (int m = 0; m < rows; ++m) {
    OCR_UNROLL
    for (int v = 0; v < 2; ++v) {
      const int64_t at = column + v * size;
      Number* p = result + m * pitch + at;
      store(p, finish == Finish::Add ? load<Number>(p) + totals[m][v] : totals[m][v] * load<Number>(factors + at));
    }
  }
}

template <class Op, class Layout, Finish finish, int rows>
void multiply_panel(int64_t inner, int64_t columns, const typename Op::Unit* a, const typename Op::Unit* b,
                    int64_t b_pitch, typename Op::Number* result, int64_t pitch, const typename Op::Number* factors) {
  for (int64_t n = 0; n < columns; n += 2 * Vec<typename Op::Number>::size)
    multiply_block<Op, Layout, finish, rows>(inner, n, a, b, b_pitch, result, pitch, factors);
}

// result [rows, columns] from a [rows, inner] in its layout and b [inner, columns]. Columns are whole pairs of vectors.
template <class Op, class Layout, Finish finish, int most = kPanel>
void multiply(int64_t rows, int64_t inner, int64_t columns, const typename Op::Unit* a, const typename Op::Unit* b,
              int64_t b_pitch, typename Op::Number* result, int64_t pitch, const typename Op::Number* factors) {
  int64_t m = 0;
  for (; m + most <= rows; m += most)
    multiply_panel<Op, Layout, finish, most>(inner, columns, a + Layout::panel(m, inner), b, b_pitch,
                                             result + m * pitch, pitch, factors);
  if constexpr (most > 1)
    if (m < rows)
      multiply<Op, Layout, finish, most - 1>(rows - m, inner, columns, a + Layout::panel(m, inner), b, b_pitch,
                                             result + m * pitch, pitch, factors);
}

}  // namespace OCR_ISA
}  // namespace ocr_kernels
