// From tensors to the operands of products, and from products to tensors: layouts and element types end here.
#pragma once

#include "cpu_products.h"

namespace ocr_kernels {
inline namespace OCR_ISA {

constexpr int64_t kWidth = 32;  // rows of channels are padded to a multiple of it: two vectors
constexpr int64_t kStrip = 48;  // rows of a product that stay in the first-level cache until they are stored
static_assert(kStrip % kPanel == 0, "a strip is made of whole panels");

template <class To, class From>
OCR_INLINE void copy_dense(To* to, const From* from, int64_t count) {
  using A = typename Arithmetic<To>::Number;
  int64_t i = 0;
  for (; i + Vec<A>::size <= count; i += Vec<A>::size) store(to + i, load<A>(from + i));
  if (i < count) store(to + i, load<A>(from + i, count - i), count - i);
}
template <class T>
OCR_INLINE void copy_dense(T* to, const T* from, int64_t count) {
  if (count == kPixels) memcpy(to, from, kPixels * sizeof(T));  // moves without a call
  else memcpy(to, from, size_t(count) * sizeof(T));
}

template <class To, class From>
OCR_INLINE void copy_line(To* to, int64_t to_stride, const From* from, int64_t from_stride, int64_t count) {
  if (to_stride == 1 && from_stride == 1) return copy_dense(to, from, count);
  for (int64_t i = 0; i < count; ++i) to[i * to_stride] = from_float<To>(to_float(from[i * from_stride]));
}

// to [columns, rows] = from [rows, columns]; both numbers are multiples of a vector's lanes.
template <class A>
void transpose(A* to, int64_t to_pitch, const A* from, int64_t from_pitch, int64_t rows, int64_t columns) {
  constexpr int size = Vec<A>::size;
  for (int64_t r = 0; r < rows; r += size)
    for (int64_t c = 0; c < columns; c += size) {
      Vec<A> x[size];
      OCR_UNROLL
      for (int i = 0; i < size; ++i) x[i] = load<A>(from + (r + i) * from_pitch + c);
      transpose(x);
      OCR_UNROLL
      for (int i = 0; i < size; ++i) store(to + (c + i) * to_pitch + r, x[i]);
    }
}

// The rows of a [rows, columns] matrix as panels, for every image: [batch][row panels][inner units][kPanel].
template <class T>
class PackedMatrix {
  using Op = Arithmetic<T>;
  using Unit = typename Op::Unit;

 public:
  PackedMatrix(const Tensor& matrix, Parallel parallel, bool wanted = true)
      : matrix_(matrix),
        inner_(divide_up(matrix.columns, Op::group)),
        panels_(wanted ? divide_up(matrix.rows, kPanel) : 0),
        units_(matrix.batch * panels_ * inner_ * kPanel) {
    run_tasks(parallel, matrix.batch * panels_, [&](int64_t task) { pack_panel(task); });
  }
  int64_t rows() const { return matrix_.rows; }

  // result [rows, kPixels] = the image's rows from first_row on, times b [columns, kPixels], times the pixels' factors
  void multiply_rows(int64_t image, int64_t first_row, int64_t rows, const Unit* b, typename Op::Number* result,
                     const typename Op::Number* factors) const {
    const Unit* panels = units_.data() + (image * panels_ * kPanel + first_row) * inner_;
    multiply<Op, Panels, Finish::Scale>(rows, inner_, kPixels, panels, b, kPixels, result, kPixels, factors);
  }

 private:
  void pack_panel(int64_t task) const {
    const int64_t image = task / panels_, first_row = task % panels_ * kPanel;
    Unit* to = units_.data() + task * inner_ * kPanel;
    for (int64_t j = 0; j < inner_; ++j)
      for (int64_t m = first_row; m < first_row + kPanel; ++m)
        *to++ = Op::unit(number(image, m, j * Op::group), number(image, m, j * Op::group + 1));
  }
  T number(int64_t image, int64_t row, int64_t column) const {
    return row < matrix_.rows && column < matrix_.columns ? *element<T>(matrix_, image, row, column) : T{};
  }

  Tensor matrix_;
  int64_t inner_, panels_;
  Buffer<Unit> units_;
};

// A tile of query or grad [channels, pixels] as an operand; pixels and channels that do not exist are zeros.
template <class T>
class PixelTile {
  using Op = Arithmetic<T>;
  using Stored = typename Op::Stored;
  using Unit = typename Op::Unit;

 public:
  explicit PixelTile(const Tensor& pixels)
      : tensor_(pixels),
        lines_are_pixels_(neighbours_are_rows(pixels)),
        width_(round_up(pixels.rows, kWidth)),
        lines_(width_ * kPixels),
        paired_(Op::group == 1 ? 0 : width_ * kPixels / Op::group),
        turned_(width_ * kPixels / Op::group) {
    clear();
  }

  int64_t width() const { return width_; }

  void load(int64_t image, int64_t first, int64_t count) {
    if (count < kPixels) clear();
    const T* from = element<T>(tensor_, image, 0, first);
    const int64_t lines = lines_are_pixels_ ? count : tensor_.rows, length = lines_are_pixels_ ? tensor_.rows : count;
    const int64_t line_stride = lines_are_pixels_ ? tensor_.stride_column : tensor_.stride_row;
    const int64_t stride = lines_are_pixels_ ? 1 : tensor_.stride_column;
    for (int64_t l = 0; l < lines; ++l)
      copy_line(lines_.data() + l * pitch(), 1, from + l * line_stride, stride, length);
  }

  const Unit* by_channel() const { return lines_are_pixels_ ? turned() : paired(); }  // [channels / group, kPixels]
  const Unit* by_pixel() const { return lines_are_pixels_ ? paired() : turned(); }    // [kPixels / group, width]

 private:
  int64_t pitch() const { return lines_are_pixels_ ? width_ : kPixels; }
  int64_t padded_lines() const { return lines_are_pixels_ ? kPixels : width_; }
  void clear() { memset(lines_.data(), 0, size_t(width_ * kPixels) * sizeof(Stored)); }

  const Unit* paired() const { return Op::pair_lines(lines_.data(), padded_lines(), pitch(), paired_.data()); }
  const Unit* turned() const {
    using Lane = typename Op::Number;  // as large as a unit, and only moved
    static_assert(sizeof(Lane) == sizeof(Unit), "a unit fills a lane");
    transpose(reinterpret_cast<Lane*>(turned_.data()), padded_lines(), reinterpret_cast<const Lane*>(lines_.data()),
              pitch() / Op::group, padded_lines(), pitch() / Op::group);
    return turned_.data();
  }

  Tensor tensor_;
  bool lines_are_pixels_;
  int64_t width_;
  Buffer<Stored> lines_;
  Buffer<Unit> paired_, turned_;
};

// Writes products [channels, kPixels] strip by strip.
template <class T>
class StripWriter {
  using Number = typename Arithmetic<T>::Number;

 public:
  explicit StripWriter(const Tensor& out) : out_(out), strip_(kStrip * kPixels), turned_(kStrip * kPixels) {}

  // out[:, first : first + count] = matrix times b, times the pixels' factors
  void write_product(int64_t image, int64_t first, int64_t count, const PackedMatrix<T>& matrix,
                     const typename Arithmetic<T>::Unit* b, const Number* factors) {
    for (int64_t row = 0; row < out_.rows; row += kStrip) {
      const int64_t rows = smaller(kStrip, out_.rows - row);
      matrix.multiply_rows(image, row, rows, b, strip_.data(), factors);
      store_strip(element<T>(out_, image, row, first), rows, count);
    }
  }

 private:
  void store_strip(T* to, int64_t rows, int64_t pixels) {
    if (neighbours_are_rows(out_)) {
      transpose(turned_.data(), kStrip, strip_.data(), kPixels, kStrip, kPixels);
      for (int64_t i = 0; i < pixels; ++i) copy_dense(to + i * out_.stride_column, turned_.data() + i * kStrip, rows);
    } else {
      for (int64_t r = 0; r < rows; ++r)
        copy_line(to + r * out_.stride_row, out_.stride_column, strip_.data() + r * kPixels, 1, pixels);
    }
  }

  Tensor out_;
  Buffer<Number> strip_, turned_;
};

}  // namespace OCR_ISA
}  // namespace ocr_kernels
