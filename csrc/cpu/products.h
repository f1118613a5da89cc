// The register-blocked products that every pass of both ops is made of.
#pragma once

#include "tiles.h"

namespace ocr_kernels {
inline namespace OCR_ISA {

// Lanes that are added up one after the other; a longer sum is a sum of such, so that rounding errors do not pile up.
constexpr int64_t kChain = 128;

// Accumulators, operands and one spare fill the registers: 32 in AVX-512 and on AArch64, 16 in the others.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kDotRows = 6, kDotColumns = 4, kRows = 6, kVectors = 4;
#else
constexpr int kDotRows = 3, kDotColumns = 4, kRows = 6, kVectors = 2;
#endif
template <class Lane>
constexpr int kPanel = kVectors * Vec<Lane>::size;  // columns of `multiply` come in panels

template <class Lane>
OCR_INLINE Vec<Lane> multiply_add(Vec<Lane> a, Vec<Lane> b, Vec<Lane> c) {
  return fma(a, b, c);
}
#if defined(__AVX512BF16__)
OCR_INLINE Vec<float> multiply_add(Vec<Pair> a, Vec<Pair> b, Vec<float> c) {
  return {(Lanes<float>)_mm512_dpbf16_ps((__m512)c.v, (__m512bh)a.v, (__m512bh)b.v)};
}
#endif

// ---- result = a b, columns in vectors

// A left factor: number (r, j) lies at data[r * row + j * step].
template <class Lane>
struct Left {
  const Lane* data;
  int64_t row, step;
};

// What a result is multiplied by at last, if anything: its rows, or its columns.
template <class A>
struct Factors {
  const A *of_rows, *of_columns;
};

// result[:][a panel] (+)= a [rows, length] b [length, a panel], then times the factors
template <int rows, class Lane, class A = AccumulatorOf<Lane>>
OCR_INLINE void multiply_block(bool add, A* result, int64_t result_stride, Left<Lane> a, const Lane* b,
                               int64_t b_stride, int64_t length, Factors<A> factors) {
  Vec<A> sums[rows][kVectors];
  OCR_UNROLL
  for (int r = 0; r < rows; ++r) OCR_UNROLL
  for (int v = 0; v < kVectors; ++v) sums[r][v] = broadcast(A(0));
  for (int64_t j = 0; j < length; ++j, a.data += a.step, b += b_stride) {
    Vec<Lane> y[kVectors];
    OCR_UNROLL
    for (int v = 0; v < kVectors; ++v) y[v] = load<Lane>(b + v * Vec<Lane>::size);
    OCR_UNROLL
    for (int r = 0; r < rows; ++r) {
      const Vec<Lane> x = broadcast(a.data[r * a.row]);
      OCR_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add(x, y[v], sums[r][v]);
    }
  }
  if (add) {
    OCR_UNROLL
    for (int r = 0; r < rows; ++r) OCR_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[r][v] = load<A>(result + r * result_stride + v * Vec<A>::size) + sums[r][v];
  }
  if (factors.of_rows) {
    OCR_UNROLL
    for (int r = 0; r < rows; ++r) OCR_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[r][v] = sums[r][v] * broadcast(factors.of_rows[r]);
  }
  if (factors.of_columns) {
    OCR_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const Vec<A> factor = load<A>(factors.of_columns + v * Vec<A>::size);
      OCR_UNROLL
      for (int r = 0; r < rows; ++r) sums[r][v] = sums[r][v] * factor;
    }
  }
  OCR_UNROLL
  for (int r = 0; r < rows; ++r) OCR_UNROLL
  for (int v = 0; v < kVectors; ++v) store(result + r * result_stride + v * Vec<A>::size, sums[r][v]);
}

template <int max_rows, class Lane, class A = AccumulatorOf<Lane>>
OCR_INLINE void multiply_rows(int64_t rows, bool add, A* result, int64_t result_stride, Left<Lane> a, const Lane* b,
                              int64_t b_stride, int64_t length, Factors<A> factors) {
  if constexpr (max_rows > 1)
    if (rows < max_rows)
      return multiply_rows<max_rows - 1>(rows, add, result, result_stride, a, b, b_stride, length, factors);
  multiply_block<max_rows>(add, result, result_stride, a, b, b_stride, length, factors);
}

// result [rows, columns] (+)= a [rows, length] b [length, columns], then times the factors. Columns are rounded up to
// whole panels.
template <class Lane, class A = AccumulatorOf<Lane>>
void multiply(bool add, A* result, int64_t result_stride, Left<Lane> a, const Lane* b, int64_t b_stride, int64_t rows,
              int64_t length, int64_t columns, Factors<A> factors = {}) {
  const int64_t blocks = divide_up(rows, kRows), height = rows / blocks;  // of nearly the same height
  const int64_t higher = rows - blocks * height;                          // are higher by one
  for (int64_t j = 0; j < length; j += kChain) {
    const bool last = j + kChain >= length;
    for (int64_t i = 0; i < columns; i += kPanel<Lane>)  // a chain of a panel stays in the first cache for all rows
      for (int64_t block = 0, r = 0; block < blocks; ++block) {
        const int64_t count = height + (block < higher);
        multiply_rows<kRows>(count, add || j > 0, result + r * result_stride + i, result_stride,
                             Left<Lane>{a.data + r * a.row + j * a.step, a.row, a.step}, b + j * b_stride + i, b_stride,
                             min(kChain, length - j),
                             Factors<A>{last && factors.of_rows ? factors.of_rows + r : nullptr,
                                        last && factors.of_columns ? factors.of_columns + i : nullptr});
        r += count;
      }
  }
}

// ---- dot products of rows

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

// sums[s][r] = sum_l columns[s][l] * rows[r][l]; `length` is whole vectors. The rows lie where the caller's tensor has
// them, aligned to their elements only.
template <class Lane, class A = AccumulatorOf<Lane>>
OCR_INLINE void dot_block(A* sums, const char* const* rows, const Lane* columns, int64_t column_stride,
                          int64_t length) {
  Vec<A> acc[kDotColumns * kDotRows];
  OCR_UNROLL
  for (int i = 0; i < kDotColumns * kDotRows; ++i) acc[i] = broadcast(A(0));
  for (int64_t l = 0; l < length; l += Vec<Lane>::size) {
    Vec<Lane> x[kDotRows];
    OCR_UNROLL
    for (int r = 0; r < kDotRows; ++r) memcpy(&x[r], rows[r] + l * int64_t(sizeof(Lane)), sizeof x[r]);
    OCR_UNROLL
    for (int s = 0; s < kDotColumns; ++s) {
      const Vec<Lane> w = load<Lane>(columns + s * column_stride + l);
      OCR_UNROLL
      for (int r = 0; r < kDotRows; ++r) acc[s * kDotRows + r] = multiply_add(x[r], w, acc[s * kDotRows + r]);
    }
  }
  lane_sums<kDotColumns * kDotRows>(sums, acc);
}

// Rows of the tensor as operands of dot_block: where they lie if they can stay there, else copied to `buffer`.
template <class Lane>
void dot_rows(const char** rows, Lane* buffer, int64_t stride, int64_t padded, const Tensor& tensor, Window w) {
  using Element = typename Holds<Lane>::Element;
  const bool in_place =
      tensor.dtype == Holds<Lane>::dtype && tensor.stride_column == 1 && w.columns == padded * Holds<Lane>::elements;
  if (!in_place) read_along(buffer, stride, padded, tensor, w);
  for (int64_t r = 0; r < kDotRows; ++r) {
    const int64_t row = min(r, w.rows - 1);  // rows that do not exist repeat the last
    rows[r] = in_place ? reinterpret_cast<const char*>(element<Element>(tensor, w.batch, w.row + row, w.column))
                       : reinterpret_cast<const char*>(buffer + row * stride);
  }
}

// ---- what both ops do with products

// A small tensor [batch, rows, columns] as a factor, lanes along its rows or across them, with zeros after the last.
template <class Lane>
class SmallMatrix {
 public:
  SmallMatrix(const Tensor& matrix, Parallel parallel, bool wanted = true, bool across = false)
      : rows_(round_up(across ? lanes<Lane>(matrix.rows) : matrix.rows, kDotColumns)),
        stride_(row_stride<Lane>(across ? matrix.columns : lanes<Lane>(matrix.columns))),
        lanes_(wanted ? matrix.batch : 0, rows_, stride_) {
    run_tasks(parallel, wanted ? matrix.batch : 0, [&](int64_t image) {
      Lane* const to = lanes_.data() + image * rows_ * stride_;
      const Window all{image, 0, matrix.rows, 0, matrix.columns};
      fill(to + (rows_ - kDotColumns) * stride_, kDotColumns * stride_, Lane(0));
      if (across) read_across(to, stride_, round_up(matrix.columns, Vec<Lane>::size), matrix, all);
      else read_along(to, stride_, round_up(lanes<Lane>(matrix.columns), Vec<Lane>::size), matrix, all);
    });
  }
  int64_t stride() const { return stride_; }
  // its numbers from (row, lane) on
  Left<Lane> from(int64_t image, int64_t row, int64_t lane = 0) const {
    return {lanes_.data() + (image * rows_ + row) * stride_ + lane, stride_, 1};
  }

 private:
  int64_t rows_, stride_;
  Buffer<Lane> lanes_;
};

// out [B, C, N] = matrix [B, C, K] times weights [K, N], a strip at a time, which stays in the first cache until it is
// written. Neighbours in memory are in one vector: pixels, or where out is channels_last channels.
template <class Lane>
class OutputProduct {
  using A = AccumulatorOf<Lane>;
  static constexpr int64_t kStrip = 3072, kChannels = 256;

 public:
  OutputProduct(const Tensor& out, const Tensor& matrix, Parallel parallel)
      : out_(out),
        regions_(matrix.columns),
        matrix_(channels_last(out) ? transposed(matrix) : matrix, parallel, out.data != nullptr, channels_last(out)) {}

  // Writes the columns in w from weights, lanes across regions, and multiplies each by its factor if there are any.
  void write(Window w, const Lane* weights, int64_t stride, const A* factors = nullptr) const {
    const bool by_pixel = channels_last(out_);
    const int64_t columns = by_pixel ? min(kChannels, round_up(out_.rows, kPanel<A>)) : round_up(w.columns, kPanel<A>);
    const int64_t rows = kStrip / columns / kRows * kRows, length = lanes<Lane>(regions_);
    const int64_t channels = by_pixel ? columns : rows, pixels = by_pixel ? rows : columns;
    alignas(64) A strip[kStrip];
    for (int64_t c = 0; c < out_.rows; c += channels)
      for (int64_t i = 0; i < w.columns; i += pixels) {
        const Window part{w.batch, c, min(channels, out_.rows - c), w.column + i, min(pixels, w.columns - i)};
        const A* const pixel_factors = factors ? factors + i : nullptr;
        prefetch(out_, part);
        if (by_pixel) {
          multiply(false, strip, columns, Left<Lane>{weights + i, 1, stride}, matrix_.from(w.batch, 0, c).data,
                   matrix_.stride(), part.columns, length, part.rows, Factors<A>{pixel_factors, nullptr});
          write_tile(transposed(out_), transposed(part), strip, columns);
        } else {
          multiply(false, strip, columns, matrix_.from(w.batch, c), weights + i, stride, part.rows, length,
                   part.columns, Factors<A>{nullptr, pixel_factors});
          write_tile(out_, part, strip, columns);
        }
      }
  }

 private:
  const Tensor out_;
  const int64_t regions_;
  const SmallMatrix<Lane> matrix_;
};

// out[:, k] of each image [B, C, K] = the sum over its splits of sums [split, K, stride], each times its factors [K] if
// there are any. `unrounded` is filled with the same where it has data.
template <class A>
void reduce(Parallel parallel, const Tensor& out, const Tensor& unrounded, int64_t splits, const A* sums,
            int64_t stride, const A* factors, int64_t factors_stride) {
  constexpr int64_t slab = 16;  // regions of a task
  const int64_t slabs = divide_up(out.columns, slab);
  run_tasks(parallel, out.batch * slabs, [&](int64_t task) {
    const int64_t b = task / slabs, first = task % slabs * slab, regions = min(slab, out.columns - first);
    const Buffer<A> total(slab, stride);
    fill(total.data(), slab * stride, A(0));
    for (int64_t split = b * splits; split < (b + 1) * splits; ++split)
      for (int64_t k = 0; k < regions; ++k) {
        const A* from = sums + (split * out.columns + first + k) * stride;
        const A factor = factors ? factors[split * factors_stride + first + k] : A(1);
        A* to = total.data() + k * stride;
        for (int64_t c = 0; c < out.rows; ++c) to[c] += from[c] * factor;
      }
    const Tensor targets[] = {out, unrounded};
    for (const Tensor& target : targets)
      if (target.data) write_tile(transposed(target), {b, first, regions, 0, out.rows}, total.data(), stride);
  });
}

// Runs body with the lanes of an op's products: pairs if asked for, or wide ones.
template <class Body>
void with_lanes(Dtype statistics, bool pairs, Body body) {
  if (statistics == Dtype::Float64) return body(double());
#if defined(__AVX512BF16__)
  if (pairs) return body(Pair());
#endif
  body(float());
}

}  // namespace OCR_ISA
}  // namespace ocr_kernels
