// Tiles of tensors in shared memory, and products of them: what the kernels for GPUs are made of.
#pragma once

#include <type_traits>

#include "device.h"

namespace ocr_kernels::gpu {

// Tile sizes by element type: pixels and channels of a result, and how many terms of a product's sums are in shared
// memory at a time.
template <class T>
constexpr int kPixels = sizeof(T) == 8 ? 32 : 64;
template <class T>
constexpr int kChannels = sizeof(T) == 8 ? 64 : 128;
template <class T>
constexpr int kInner = sizeof(T) == 2 ? 64 : 32;

constexpr int kRegionStep = 32;  // of a sum over regions

constexpr int64_t tiles(int64_t length, int64_t tile) { return (length + tile - 1) / tile; }
constexpr int max(int a, int b) { return a < b ? b : a; }

// What is subtracted for a maximum: while all scores are -inf the weights are exp(-inf - 0) = 0, not NaN.
template <class Accumulator>
OCR_DEVICE Accumulator shift(Accumulator maximum) {
  return maximum == -Accumulator(INFINITY) ? Accumulator(0) : maximum;
}

// ---- tensors

template <class Run>
OCR_DEVICE void with_type(Dtype dtype, Run run) {
  switch (dtype) {
    case Dtype::Float64:
      return run(double());
    case Dtype::Float32:
      return run(float());
    case Dtype::BFloat16:
      return run(BFloat16());
    case Dtype::Float16:
      return run(Float16());
  }
  stop();
}

template <class Accumulator>
OCR_DEVICE Accumulator read(const void* data, Dtype dtype, int64_t at) {
  Accumulator x = 0;
  with_type(dtype, [&](auto type) { x = Accumulator(to_accumulator(static_cast<const decltype(type)*>(data)[at])); });
  return x;
}

// One image [rows, columns] of a tensor.
struct Image {
  void* data;
  Dtype dtype;
  int64_t rows, columns, stride_row, stride_column;

  OCR_DEVICE Image(const Tensor& t, int64_t image)
      : data(static_cast<unsigned char*>(t.data) + image * t.stride_batch * bytes_of(t.dtype)),
        dtype(t.dtype),
        rows(t.rows),
        columns(t.columns),
        stride_row(t.stride_row),
        stride_column(t.stride_column) {}

  static OCR_DEVICE int bytes_of(Dtype dtype) {
    int bytes = 0;
    with_type(dtype, [&](auto type) { bytes = int(sizeof type); });
    return bytes;
  }

  // Where the columns are pixels, the rows are channels or regions.
  OCR_DEVICE bool channels_last() const { return stride_row == 1 && stride_column != 1; }
  // Whether `count` neighbours from any multiple of it on lie in memory as one piece, aligned to its size.
  OCR_DEVICE bool in_pieces_of(int count) const {
    const int64_t bytes = int64_t(count) * bytes_of(dtype);
    return (channels_last() || stride_column == 1) && (channels_last() ? stride_column : stride_row) % count == 0 &&
           reinterpret_cast<uintptr_t>(data) % uintptr_t(bytes < 16 ? bytes : 16) == 0;
  }
  OCR_DEVICE bool has(int64_t row, int64_t column) const { return row < rows && column < columns; }
  template <class T>
  OCR_DEVICE T* at(int64_t row, int64_t column) const {
    return static_cast<T*>(data) + row * stride_row + column * stride_column;
  }
  template <class Accumulator>
  OCR_DEVICE Accumulator get(int64_t row, int64_t column) const {
    return read<Accumulator>(data, dtype, row * stride_row + column * stride_column);
  }
  template <class Accumulator>
  OCR_DEVICE void set(int64_t row, int64_t column, Accumulator x) const {
    with_type(dtype, [&](auto type) {
      using T = decltype(type);
      *at<T>(row, column) = Narrow<T>::value(AccumulatorOf<T>(x));
    });
  }
};

OCR_DEVICE constexpr Dtype dtype_of(double) { return Dtype::Float64; }
OCR_DEVICE constexpr Dtype dtype_of(float) { return Dtype::Float32; }
OCR_DEVICE constexpr Dtype dtype_of(BFloat16) { return Dtype::BFloat16; }
OCR_DEVICE constexpr Dtype dtype_of(Float16) { return Dtype::Float16; }

// ---- tiles in shared memory

// One of the two factors of a product, [rows, inner], in shared memory. Element (r, j) lies at data[r * pitch + j] or,
// where the inner dimension comes first, at data[j * pitch + r].
template <class T>
struct Operand {
  const T* data;
  int pitch;
  bool inner_first;
};

// Lines are longer than what they hold by 16 bytes: eight of them start in different banks.
template <class T>
constexpr int kGap = 16 / int(sizeof(T));
template <class T>
constexpr int tile_bytes(int rows, int columns) {  // either way round
  return max(rows * (columns + kGap<T>), columns * (rows + kGap<T>)) * int(sizeof(T));
}

// A tile [ROWS, COLUMNS] in the order of its tensor: by rows or, in channels_last, by columns.
template <class T, int ROWS, int COLUMNS>
struct Tile {
  T* data;
  bool channels_last;

  OCR_DEVICE int pitch() const { return (channels_last ? ROWS : COLUMNS) + kGap<T>; }
  OCR_DEVICE T& at(int row, int column) const {
    return data[channels_last ? column * pitch() + row : row * pitch() + column];
  }
  OCR_DEVICE Operand<T> by_rows() const { return {data, pitch(), channels_last}; }      // [ROWS, inner = COLUMNS]
  OCR_DEVICE Operand<T> by_columns() const { return {data, pitch(), !channels_last}; }  // [COLUMNS, inner = ROWS]
};

// A tile on its way from memory: `fetch` brings it to registers, `put` from there to shared memory, so that one tile is
// on its way while another is being multiplied. What lies outside the tensor is zero.
template <class T, int ROWS, int COLUMNS>
class Transfer {
  static constexpr int kPiece = 16 / int(sizeof(T));
  static constexpr int kPieces = (ROWS * COLUMNS / kPiece + kThreads - 1) / kThreads;
  static constexpr bool kExact = ROWS * COLUMNS / kPiece % kThreads == 0;

 public:
  static constexpr int kBytes = tile_bytes<T>(ROWS, COLUMNS);

  OCR_DEVICE Transfer(const Tensor& tensor, int64_t image)
      : image_(tensor, image),
        pieces_(image_.dtype == dtype_of(T()) && image_.in_pieces_of(kPiece)),
        pairs_(sizeof(T) == 2 && image_.in_pieces_of(2) &&
               (image_.channels_last() ? image_.rows : image_.columns) % 2 == 0) {}

  OCR_DEVICE const Image& image() const { return image_; }

  OCR_DEVICE void fetch(int64_t row, int64_t column) {
    const int thread = thread_index_anew();
    const bool channels_last = image_.channels_last();
    const int64_t lines = channels_last ? image_.columns : image_.rows,
                  length = channels_last ? image_.rows : image_.columns;
    const int64_t line_stride = channels_last ? image_.stride_column : image_.stride_row;
    const int64_t stride = channels_last ? image_.stride_row : image_.stride_column;
    OCR_UNROLL
    for (int p = 0; p < kPieces; ++p) {
      const int64_t line = (channels_last ? column : row) + line_of(p, thread),
                    first = (channels_last ? row : column) + first_of(p, thread);
      const int64_t at = line * line_stride + first * stride;
      held_[p] = Vector{};
      if (!exists(p, thread) || line >= lines) continue;
      if (pieces_ && first + kPiece <= length) held_[p] = load_vector(static_cast<const T*>(image_.data) + at);
      else held_[p] = fetch_words(at, stride, length - first);
    }
  }

  OCR_DEVICE Tile<T, ROWS, COLUMNS> put(void* shared) const {
    const int thread = thread_index_anew();
    const Tile<T, ROWS, COLUMNS> tile{static_cast<T*>(shared), image_.channels_last()};
    OCR_UNROLL
    for (int p = 0; p < kPieces; ++p)
      if (exists(p, thread))
        *reinterpret_cast<Vector*>(tile.data + line_of(p, thread) * tile.pitch() + first_of(p, thread)) = held_[p];
    return tile;
  }

 private:
  static OCR_DEVICE bool exists(int p, int thread) { return kExact || p * kThreads + thread < ROWS * COLUMNS / kPiece; }
  OCR_DEVICE int line_of(int p, int thread) const {
    const int piece = p * kThreads + thread;
    return image_.channels_last() ? piece / (ROWS / kPiece) : piece / (COLUMNS / kPiece);
  }
  OCR_DEVICE int first_of(int p, int thread) const {
    const int piece = p * kThreads + thread;
    return (image_.channels_last() ? piece % (ROWS / kPiece) : piece % (COLUMNS / kPiece)) * kPiece;
  }

  // A piece that is not aligned as one, of which `count` elements exist.
  OCR_DEVICE Vector fetch_words(int64_t at, int64_t stride, int64_t count) const {
    Vector piece{};
    if (pairs_) {
      const uint32_t* from = reinterpret_cast<const uint32_t*>(static_cast<const T*>(image_.data) + at);
      OCR_UNROLL
      for (int w = 0; w < 4; ++w) piece.word[w] = 2 * w < count ? from[w] : 0;
    } else {
      OCR_UNROLL_BY(1)  // unrolled it would take all registers
      for (int w = 0; w < 4; ++w) {
        OCR_UNROLL
        for (int i = 1; i < 4; ++i) piece.word[i - 1] = piece.word[i];
        piece.word[3] = word(w, at, stride, count);
      }
    }
    return piece;
  }
  OCR_DEVICE uint32_t word(int w, int64_t at, int64_t stride, int64_t count) const {
    if constexpr (sizeof(T) == 2) {
      const T* from = static_cast<const T*>(image_.data) + at + 2 * w * stride;
      return (2 * w < count ? from[0].bits : 0) | (2 * w + 1 < count ? uint32_t(from[stride].bits) << 16 : 0);
    } else if constexpr (sizeof(T) == 4) {
      return w < count ? static_cast<const uint32_t*>(image_.data)[at + w * stride] : 0;
    } else {  // read from any type, where another operand is float64
      const double x = w / 2 < count ? read<double>(image_.data, image_.dtype, at + w / 2 * stride) : 0;
      uint64_t bits;
      memcpy(&bits, &x, sizeof bits);
      return uint32_t(bits >> (w % 2 * 32));
    }
  }

  Image image_;
  bool pieces_, pairs_;
  Vector held_[kPieces];
};

// ---- products

// Sums [ROWS, COLUMNS] in the registers of a block, for 16-bit factors: what a warp has is made of 16 x 8.
template <class T, int ROWS, int COLUMNS, bool matrix_units = sizeof(T) == 2>
class Sums {
  static constexpr int kWarpColumns = ROWS >= 64 ? 2 : 4, kWarpRows = kWarps / kWarpColumns;
  static constexpr int kDown = ROWS / kWarpRows / 16, kAcross = COLUMNS / kWarpColumns / 8;
  static_assert(kDown * kWarpRows * 16 == ROWS && kAcross % 2 == 0 && kAcross * kWarpColumns * 8 == COLUMNS,
                "a warp has whole fragments");

 public:
  OCR_DEVICE void clear() {
    for_each([](int, int, float& sum) { sum = 0; });
  }

  // += a [ROWS, inner] b [COLUMNS, inner]^T
  OCR_DEVICE void add_product(Operand<T> a, Operand<T> b, int inner, bool /*one_chain*/ = false) {
    // a lane addresses a line of one of four 8 x 8 matrices, which in a follow each other down the rows first, in b
    // along the inner dimension: the second is 8 further that way, the third 8 the other way, the fourth both
    const int thread = thread_index_anew(), matrix = thread % 32 / 8, near = matrix % 2 * 8, far = matrix / 2 * 8;
    for (int j = 0; j < inner; j += 16) {
      uint32_t rows[kDown][4], columns[kAcross / 2][4];
      OCR_UNROLL
      for (int m = 0; m < kDown; ++m) load(rows[m], a, thread, first_row(thread) + m * 16, j, near, far);
      OCR_UNROLL
      for (int n = 0; n < kAcross / 2; ++n) load(columns[n], b, thread, first_column(thread) + n * 16, j, far, near);
      OCR_UNROLL
      for (int m = 0; m < kDown; ++m) OCR_UNROLL
      for (int n = 0; n < kAcross; ++n) {
        const uint32_t pair[2] = {columns[n / 2][n % 2 * 2], columns[n / 2][n % 2 * 2 + 1]};
        multiply_add(sums_[m][n], rows[m], pair, T());
      }
    }
  }

  // body(row, column, sum) for what this thread has
  template <class Body>
  OCR_DEVICE void for_each(Body body) {
    const int thread = thread_index_anew(), lane = thread % 32;
    OCR_UNROLL
    for (int m = 0; m < kDown; ++m) OCR_UNROLL
    for (int n = 0; n < kAcross; ++n) OCR_UNROLL
    for (int i = 0; i < 4; ++i)
      body(first_row(thread) + m * 16 + i / 2 * 8 + lane / 4, first_column(thread) + n * 8 + lane % 4 * 2 + i % 2,
           sums_[m][n][i]);
  }

 private:
  static OCR_DEVICE int first_row(int thread) { return thread / 32 / kWarpColumns * (kDown * 16); }
  static OCR_DEVICE int first_column(int thread) { return thread / 32 % kWarpColumns * (kAcross * 8); }
  // The 16 x 16 elements from (row, inner) on, as four matrices; this lane addresses the one at (r, j) from there.
  static OCR_DEVICE void load(uint32_t (&to)[4], Operand<T> from, int thread, int row, int inner, int r, int j) {
    const int line = thread % 8;
    const T* address = from.inner_first ? from.data + (inner + j + line) * from.pitch + row + r
                                        : from.data + (row + r + line) * from.pitch + inner + j;
    load_matrices(to, address, from.inner_first);
  }

  float sums_[kDown][kAcross][4];
};

// The same for float and double: thread (y, x) of 16 x 16 has the rows y + 16 m and the columns x + 16 n. A product's
// terms are summed alone first: one chain over all products takes fewer registers, but rounds more.
template <class T, int ROWS, int COLUMNS>
class Sums<T, ROWS, COLUMNS, false> {
  static constexpr int kDown = ROWS / 16, kAcross = COLUMNS / 16;

 public:
  OCR_DEVICE void clear() {
    for_each([](int, int, T& sum) { sum = 0; });
  }

  OCR_DEVICE void add_product(Operand<T> a, Operand<T> b, int inner, bool one_chain = false) {
    const int a_row = a.inner_first ? 1 : a.pitch, a_step = a.inner_first ? a.pitch : 1;
    const int b_row = b.inner_first ? 1 : b.pitch, b_step = b.inner_first ? b.pitch : 1;
    const T *rows = a.data + y() * a_row, *columns = b.data + x() * b_row;
    T alone[kDown][kAcross] = {};
    auto& product = one_chain ? sums_ : alone;
    for (int j = 0; j < inner; ++j, rows += a_step, columns += b_step) {
      T factors[kAcross];
      OCR_UNROLL
      for (int n = 0; n < kAcross; ++n) factors[n] = columns[n * 16 * b_row];
      OCR_UNROLL
      for (int m = 0; m < kDown; ++m) {
        const T factor = rows[m * 16 * a_row];
        OCR_UNROLL
        for (int n = 0; n < kAcross; ++n) product[m][n] += factor * factors[n];
      }
    }
    if (one_chain) return;
    OCR_UNROLL
    for (int m = 0; m < kDown; ++m) OCR_UNROLL
    for (int n = 0; n < kAcross; ++n) sums_[m][n] += product[m][n];
  }

  template <class Body>
  OCR_DEVICE void for_each(Body body) {
    OCR_UNROLL
    for (int m = 0; m < kDown; ++m) OCR_UNROLL
    for (int n = 0; n < kAcross; ++n) body(y() + m * 16, x() + n * 16, sums_[m][n]);
  }

 private:
  static OCR_DEVICE int y() { return thread_index() / 16; }
  static OCR_DEVICE int x() { return thread_index() % 16; }

  T sums_[kDown][kAcross];
};

// sums [ROWS, COLUMNS] += a [channels, ROWS]^T b [channels, COLUMNS], over all channels, from the given columns on.
// `shared` holds kSumOverChannels bytes.
template <class T, int ROWS, int COLUMNS>
constexpr int kSumOverChannels = Transfer<T, kInner<T>, ROWS>::kBytes + Transfer<T, kInner<T>, COLUMNS>::kBytes;

template <class T, int ROWS, int COLUMNS>
OCR_DEVICE void add_sum_over_channels(Sums<T, ROWS, COLUMNS>& sums, Transfer<T, kInner<T>, ROWS>& a, int64_t a_column,
                                      Transfer<T, kInner<T>, COLUMNS>& b, int64_t b_column, unsigned char* shared,
                                      bool one_chain = false) {
  const int64_t channels = a.image().rows;
  OCR_UNROLL_BY(1)
  for (int64_t channel = 0;; channel += kInner<T>) {  // one tile is multiplied while the next is on its way
    Operand<T> rows{}, columns{};
    if (channel > 0) {
      rows = a.put(shared).by_columns();
      columns = b.put(shared + Transfer<T, kInner<T>, ROWS>::kBytes).by_columns();
      synchronize();
    }
    if (channel < channels) {
      a.fetch(channel, a_column);
      b.fetch(channel, b_column);
    }
    if (channel > 0) sums.add_product(rows, columns, kInner<T>, one_chain);
    synchronize();
    if (channel >= channels) break;
  }
}

// ---- results

// A tile of sums in shared memory on its way to a tensor, in that tensor's order.
template <class Accumulator, int ROWS, int COLUMNS>
struct Result {
  static constexpr int kBytes = tile_bytes<Accumulator>(ROWS, COLUMNS);
  Image image;
  Tile<Accumulator, ROWS, COLUMNS> tile;

  OCR_DEVICE Result(const Tensor& tensor, int64_t image_index, void* shared)
      : image(tensor, image_index), tile{static_cast<Accumulator*>(shared), image.channels_last()} {}

  // Writes value(row, column, sum) of what exists of the tile whose corner is (row, column).
  template <class Value>
  OCR_DEVICE void write(int64_t row, int64_t column, Value value) const {
    with_type(image.dtype, [&](auto type) { write_as<decltype(type)>(row, column, value); });
  }

 private:
  template <class To, class Value>
  OCR_DEVICE void write_as(int64_t row, int64_t column, Value value) const {
    constexpr int kPiece = 4;
    struct alignas(sizeof(To) * kPiece < 16 ? sizeof(To) * kPiece : 16) Piece {
      To element[kPiece];
    };
    const bool channels_last = image.channels_last(), pieces = image.in_pieces_of(kPiece);
    const int line_length = channels_last ? ROWS : COLUMNS;
    for (int i = thread_index() * kPiece; i < ROWS * COLUMNS; i += kThreads * kPiece) {
      const int line = i / line_length, first = i % line_length;
      const int r = channels_last ? first : line, c = channels_last ? line : first;
      Piece piece;
      int count = 0;
      OCR_UNROLL
      for (int n = 0; n < kPiece; ++n) {
        const int rr = r + (channels_last ? n : 0), cc = c + (channels_last ? 0 : n);
        const bool exists = image.has(row + rr, column + cc);
        piece.element[n] = Narrow<To>::value(exists ? value(row + rr, column + cc, tile.at(rr, cc)) : Accumulator(0));
        count += exists;
      }
      To* to = static_cast<To*>(image.data) + (row + r) * image.stride_row + (column + c) * image.stride_column;
      if (pieces && count == kPiece) *reinterpret_cast<Piece*>(to) = piece;
      else OCR_UNROLL
      for (int n = 0; n < kPiece; ++n)
        if (n < count) to[n * (channels_last ? image.stride_row : image.stride_column)] = piece.element[n];
    }
  }
};

}  // namespace ocr_kernels::gpu
