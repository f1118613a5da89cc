// The register-blocked products that every pass of both ops is made of.
#pragma once

#include "tiles.h"

namespace ocr_kernels {
inline namespace OCR_ISA {

// Lanes that are added up one after the other; a longer sum is a sum of such, so that rounding errors do not pile up.
constexpr int64_t kChain = 128;

// Accumulators, operands and one spare fill the registers: 32 in AVX-512, 16 in the others.
#if defined(__AVX512F__)
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

// result[:][a panel] (+)= a [rows, length] b [length, a panel], then times the columns' factors if there are any
template <int rows, class Lane, class A = AccumulatorOf<Lane>>
OCR_INLINE void multiply_block(bool add, A* result, int64_t result_stride, Left<Lane> a, const Lane* b,
                               int64_t b_stride, int64_t length, const A* factors) {
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
  if (factors) {
    OCR_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const Vec<A> factor = load<A>(factors + v * Vec<A>::size);
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
                              int64_t b_stride, int64_t length, const A* factors) {
  if constexpr (max_rows > 1)
    if (rows < max_rows)
      return multiply_rows<max_rows - 1>(rows, add, result, result_stride, a, b, b_stride, length, factors);
  multiply_block<max_rows>(add, result, result_stride, a, b, b_stride, length, factors);
}

// result [rows, columns] (+)= a [rows, length] b [length, columns], then times the columns' factors if there are any.
// Columns are rounded up to whole panels.
template <class Lane, class A = AccumulatorOf<Lane>>
void multiply(bool add, A* result, int64_t result_stride, Left<Lane> a, const Lane* b, int64_t b_stride, int64_t rows,
              int64_t length, int64_t columns, const A* factors = nullptr) {
  const int64_t blocks = divide_up(rows, kRows), height = rows / blocks;  // of nearly the same height
  const int64_t higher = rows - blocks * height;                          // are higher by one
  for (int64_t j = 0; j < length; j += kChain)
    for (int64_t i = 0; i < columns; i += kPanel<Lane>)  // a chain of a panel stays in the first cache for all rows
      for (int64_t block = 0, first = 0; block < blocks; ++block) {
        const int64_t count = height + (block < higher);
        multiply_rows<kRows>(count, add || j > 0, result + first * result_stride + i, result_stride,
                             Left<Lane>{a.data + first * a.row + j * a.step, a.row, a.step}, b + j * b_stride + i,
                             b_stride, min(kChain, length - j),
                             factors && j + kChain >= length ? factors + i : nullptr);
        first += count;
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

// A small tensor [batch, rows, columns] as the left factor, with zeros after its rows, and after the last.
template <class Lane>
class SmallMatrix {
 public:
  SmallMatrix(const Tensor& matrix, Parallel parallel, bool wanted = true)
      : rows_(round_up(matrix.rows, kDotColumns)),
        stride_(row_stride<Lane>(lanes<Lane>(matrix.columns))),
        lanes_(wanted ? matrix.batch : 0, rows_, stride_) {
    run_tasks(parallel, wanted ? matrix.batch : 0, [&](int64_t image) {
      Lane* const to = lanes_.data() + image * rows_ * stride_;
      fill(to + matrix.rows * stride_, (rows_ - matrix.rows) * stride_, Lane(0));
      read_along(to, stride_, round_up(lanes<Lane>(matrix.columns), Vec<Lane>::size), matrix,
                 {image, 0, matrix.rows, 0, matrix.columns});
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

constexpr int64_t kStrip = 3072;      // numbers of a result that stay in the first cache until they are written
constexpr int64_t kStripPixels = 64;  // at a time, where neighbours in memory are channels

// out [B, rows, N], its columns in w, = matrix [B, rows, K] times weights [K, columns], lanes across the regions, then
// times the columns' factors if there are any
template <class Lane, class A = AccumulatorOf<Lane>>
void write_product(const Tensor& out, Window w, const SmallMatrix<Lane>& matrix, int64_t regions, const Lane* weights,
                   int64_t stride, A* strip, const A* factors = nullptr) {
  const int64_t columns = channels_last(out) ? kStripPixels : round_up(w.columns, kPanel<A>);
  const int64_t rows = kStrip / columns / kRows * kRows;
  for (int64_t row = 0; row < out.rows; row += rows)
    for (int64_t i = 0; i < w.columns; i += columns) {
      const Window part{w.batch, row, min(rows, out.rows - row), w.column + i, min(columns, w.columns - i)};
      multiply(false, strip, columns, matrix.from(w.batch, row), weights + i, stride, part.rows, lanes<Lane>(regions),
               part.columns, factors ? factors + i : factors);
      write_tile(out, part, strip, columns);
    }
}

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
