// Tiles of a tensor of any layout and element type, copied to and from small buffers of lanes.
#pragma once

#include "../tensor.h"
#include "simd.h"

namespace ocr_kernels {

// Memory of the size, or std::bad_alloc; defined in registration.cpp, as the standard library is not called from here.
void* allocate(int64_t bytes);
void release(void* memory);
[[noreturn]] void unknown_dtype(Dtype dtype);

inline namespace OCR_ISA {

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }
inline int64_t round_up(int64_t a, int64_t b) { return product(divide_up(a, b), b); }

template <class T>
OCR_INLINE void fill(T* data, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) data[i] = value;
}

// body(0) to body(tasks - 1), on the threads of `parallel`
template <class Body>
void run_tasks(Parallel parallel, int64_t tasks, const Body& body) {
  parallel(tasks, [](const void* state, int64_t task) { (*static_cast<const Body*>(state))(task); }, &body);
}

// Memory aligned to a cache line.
template <class T>
class Buffer {
 public:
  template <class... Sizes>
  explicit Buffer(Sizes... sizes) : memory_(allocate(product(int64_t(sizeof(T)), sizes...))) {}
  ~Buffer() { release(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return static_cast<T*>(memory_); }

 private:
  void* memory_;
};

// An image's pixels in splits of whole tiles: tasks, and each summed alone. They depend on the image's shape alone, so
// that results depend neither on the threads nor on the other images.
struct Splits {
  int64_t pixels, tile, tiles, count;

  Splits(int64_t pixels_, int64_t tile_, int64_t max_count)
      : pixels(pixels_), tile(tile_), tiles(divide_up(pixels, tile)), count(max(1, min(tiles, max_count))) {}

  int64_t first_tile(int64_t split) const { return product(tiles, split) / count; }

  // body(image, first pixel, number of pixels) for the tiles of a task
  template <class Body>
  OCR_INLINE void for_each_tile(int64_t task, Body body) const {
    const int64_t image = task / count, split = task % count;
    for (int64_t t = first_tile(split); t < first_tile(split + 1); ++t)
      body(image, t * tile, min(tile, pixels - t * tile));
  }
};

// How many images have their splits' sums in memory at a time: malloc keeps up to 32 MiB, and gives back to the system
// what is larger, whose pages it would have to hand out anew in every call.
inline int64_t images_at_a_time(int64_t batch, int64_t bytes_of_image) {
  return max(1, min(batch, (int64_t(24) << 20) / max(1, bytes_of_image)));
}

// ---- lanes

// Two bfloat16 in one 32-bit lane, for products on AVX512-BF16.
using Pair = uint32_t;

// What products hold in a lane, and what they add up in.
template <class Lane>
struct Holds {
  using Element = Lane;
  using Accumulator = Lane;
  static constexpr int64_t elements = 1;
  static constexpr Dtype dtype = sizeof(Lane) == 8 ? Dtype::Float64 : Dtype::Float32;
};
template <>
struct Holds<Pair> {
  using Element = BFloat16;
  using Accumulator = float;
  static constexpr int64_t elements = 2;
  static constexpr Dtype dtype = Dtype::BFloat16;
};
template <class Lane>
using AccumulatorOf = typename Holds<Lane>::Accumulator;

template <class Lane>
OCR_INLINE int64_t lanes(int64_t elements) {
  return divide_up(elements, Holds<Lane>::elements);
}

// From one row of a buffer to the next: whole panels, and an odd number of cache lines, so that a column of the buffer
// spreads over all sets of a cache.
template <class Lane>
OCR_INLINE int64_t row_stride(int64_t lanes) {
  return round_up(lanes, 256 / sizeof(Lane)) + 64 / int64_t(sizeof(Lane));
}

// ---- tensors

inline Tensor transposed(Tensor t) {
  return {t.data, t.dtype, t.batch, t.columns, t.rows, t.stride_batch, t.stride_column, t.stride_row};
}
// Where the columns are pixels, the rows are channels or regions.
inline bool channels_last(const Tensor& t) { return t.stride_row == 1 && t.stride_column != 1; }

template <class T>
OCR_INLINE T* element(const Tensor& t, int64_t batch, int64_t row, int64_t column) {
  return static_cast<T*>(t.data) + batch * t.stride_batch + row * t.stride_row + column * t.stride_column;
}

// Some images of a tensor, or none of a tensor without data.
inline Tensor images_of(Tensor t, int64_t first, int64_t count) {
  const int64_t bytes = t.dtype == Dtype::Float64 ? 8 : t.dtype == Dtype::Float32 ? 4 : 2;
  if (t.data) t.data = static_cast<char*>(t.data) + first * t.stride_batch * bytes;
  t.batch = count;
  return t;
}

// The part of a tensor [batch, rows, columns] that a tile holds.
struct Window {
  int64_t batch, row, rows, column, columns;
};
inline Window transposed(Window w) { return {w.batch, w.column, w.columns, w.row, w.rows}; }

template <class Body>
OCR_INLINE void with_element_type(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::Float64:
      return body(double());
    case Dtype::Float32:
      return body(float());
    case Dtype::BFloat16:
      return body(BFloat16());
    case Dtype::Float16:
      return body(Float16());
  }
  unknown_dtype(dtype);
}

// How many rows ahead memory is asked for what is read next: rows lie too far apart for a processor to guess.
constexpr int64_t kAhead = 8;

// to[i] = from[i * step] for i < count, then zeros up to `padded`
template <class Lane, class T>
OCR_INLINE void read_run(Lane* to, const T* from, int64_t step, int64_t count, int64_t padded, int64_t ahead) {
  constexpr int size = Vec<Lane>::size;
  int64_t i = 0;
  if (step == 1)
    for (; i + size <= count; i += size) {
      OCR_PREFETCH(from + i + ahead);
      store(to + i, load<Lane>(from + i));
    }
  for (; i < count; ++i) to[i] = Lane(to_float(from[i * step]));
  for (; i < padded; ++i) to[i] = Lane(0);
}
template <class Lane, class T>
OCR_INLINE void write_run(T* to, const Lane* from, int64_t step, int64_t count) {
  constexpr int size = Vec<Lane>::size;
  int64_t i = 0;
  if (step == 1)
    for (; i + size <= count; i += size) store(to + i, load<Lane>(from + i));
  for (; i < count; ++i) to[i * step] = from_float<T>(from[i]);
}

// Where neighbours in memory are in different rows, blocks are transposed in registers. A lane has neighbouring rows.
template <class Lane, class T>
OCR_INLINE void read_transposed(Lane* to, int64_t stride, int64_t padded, const Tensor& tensor, Window w) {
  constexpr int64_t size = Vec<Lane>::size, block_rows = size * Holds<Lane>::elements;
  for (int64_t i = 0; i < padded; i += size)
    for (int64_t r = 0; r < w.rows; r += block_rows) {
      const int64_t rows = min(block_rows, w.rows - r);
      Vec<Lane> block[size];
      for (int j = 0; j < size; ++j) {
        if (i + j >= w.columns) {
          block[j] = broadcast(Lane(0));
          continue;
        }
        const T* from = element<T>(tensor, w.batch, w.row + r, w.column + i + j);
        OCR_PREFETCH(from + size * tensor.stride_column);
        block[j] = rows == block_rows ? load<Lane>(from) : load<Lane>(from, rows);
      }
      transpose(block);
      Lane* const first = to + r / Holds<Lane>::elements * stride + i;
      for (int64_t j = 0; j < lanes<Lane>(rows); ++j) store(first + j * stride, block[j]);
    }
}
template <class Lane, class T>
OCR_INLINE void write_transposed(const Tensor& tensor, Window w, const Lane* from, int64_t stride) {
  constexpr int64_t size = Vec<Lane>::size;
  for (int64_t i = 0; i < w.columns; i += size)
    for (int64_t r = 0; r < w.rows; r += size) {
      const int64_t rows = min(size, w.rows - r), columns = min(size, w.columns - i);
      Vec<Lane> block[size];
      for (int64_t j = 0; j < size; ++j)
        block[j] = j < rows ? load<Lane>(from + (r + j) * stride + i) : broadcast(Lane(0));
      transpose(block);
      for (int64_t j = 0; j < columns; ++j) {
        T* to = element<T>(tensor, w.batch, w.row + r, w.column + i + j);
        rows == size ? store(to, block[j]) : store(to, block[j], rows);
      }
    }
}

// A window as rows of lanes, each followed by zeros up to `padded`, whole vectors. Where a lane is a pair, `across`
// puts neighbouring rows into it and `along` neighbours in a row.
template <class Lane>
void read_across(Lane* to, int64_t stride, int64_t padded, const Tensor& tensor, Window w) {
  with_element_type(tensor.dtype, [&](auto type) {
    using T = decltype(type);
    if (channels_last(tensor)) return read_transposed<Lane, T>(to, stride, padded, tensor, w);
    for (int64_t r = 0; r < w.rows; ++r)
      read_run(to + r * stride, element<T>(tensor, w.batch, w.row + r, w.column), tensor.stride_column, w.columns,
               padded, kAhead * tensor.stride_row);
  });
}
template <class Lane>
void read_along(Lane* to, int64_t stride, int64_t padded, const Tensor& tensor, Window w) {
  read_across(to, stride, padded, tensor, w);
}

// to [columns, rows] = from [rows, columns], lanes across the rows of each, with zeros up to whole vectors.
template <class Lane>
void turn(Lane* to, int64_t stride, Lane* from, int64_t from_stride, int64_t rows, int64_t columns) {
  const Tensor lanes{from, Holds<Lane>::dtype, 1, columns, rows, 0, 1, from_stride};
  read_across(to, stride, round_up(rows, Vec<Lane>::size), lanes, {0, 0, columns, 0, rows});
}

// Asks for the memory of a window that is written soon.
inline void prefetch(const Tensor& tensor, Window w) {
  const Tensor lines = channels_last(tensor) ? transposed(tensor) : tensor;
  if (channels_last(tensor)) w = transposed(w);
  if (lines.stride_column != 1) return;
  with_element_type(tensor.dtype, [&](auto type) {
    for (int64_t r = 0; r < w.rows; ++r)
      for (int64_t i = 0; i < w.columns; i += 64 / sizeof type)
        OCR_PREFETCH(element<decltype(type)>(lines, w.batch, w.row + r, w.column + i));
  });
}

// Asks for what is read soon of a window whose columns are neighbours in memory: its cache lines from first / all of
// them to last / all. The window may have no rows.
inline void prefetch_share(const Tensor& tensor, Window w, int64_t first, int64_t last, int64_t all) {
  if (tensor.stride_column != 1) return;
  with_element_type(tensor.dtype, [&](auto type) {
    constexpr int64_t line = 64 / sizeof type;
    const int64_t lines = divide_up(w.columns, line), end = w.rows * lines * last / all;
    int64_t i = w.rows * lines * first / all;
    for (int64_t r = i / lines, at = i % lines * line; i < end; ++i, at += line) {
      if (at >= w.columns) ++r, at = 0;
      OCR_PREFETCH(element<decltype(type)>(tensor, w.batch, w.row + r, w.column + at));
    }
  });
}

// The window of the tensor = rows of whole vectors
template <class Lane>
void write_tile(const Tensor& tensor, Window w, const Lane* from, int64_t stride) {
  with_element_type(tensor.dtype, [&](auto type) {
    using T = decltype(type);
    if (channels_last(tensor)) return write_transposed<Lane, T>(tensor, w, from, stride);
    for (int64_t r = 0; r < w.rows; ++r)
      write_run(element<T>(tensor, w.batch, w.row + r, w.column), from + r * stride, tensor.stride_column, w.columns);
  });
}

// ---- weights

// A power of two by which `count` weights of at most 1 are multiplied: what they weigh in the sum does not overflow.
template <class A>
A lift(int64_t count) {
  A result = 1;
  for (; count > 1; count = divide_up(count, 2)) result /= 2;
  return result;
}

// Weights as products take them: rounded, stored in a row from column i on, and [rows, columns] as lanes along the rows
// or across them. `to` is where lanes are made if they have to be.
template <class Lane>
OCR_INLINE Vec<Lane> rounded(Vec<Lane> x, Lane) {
  return x;
}
template <class Lane>
OCR_INLINE void store_along(Lane* row, int64_t i, Vec<Lane> x) {
  store(row + i, x);
}
template <class Lane>
const Lane* lanes_along(Lane*, const Lane* from, int64_t, int64_t) {
  return from;
}
template <class Lane>
const Lane* lanes_across(Lane*, const Lane* from, int64_t, int64_t) {
  return from;
}

#if defined(__AVX512BF16__)
using Half = Lanes<uint16_t, kVectorBytes / 2>;

OCR_INLINE Half narrow(Vec<float> x) { return bit_cast<Half>(_mm512_cvtneps_pbh((__m512)x.v)); }
OCR_INLINE Vec<Pair> interleave(Half first, Half second) {
  return {__builtin_convertvector(first, Lanes<Pair>) | __builtin_convertvector(second, Lanes<Pair>) << 16};
}
OCR_INLINE Vec<float> rounded(Vec<float> x, Pair) { return bit_cast<Vec<float>>(interleave(Half{}, narrow(x))); }

template <>
struct Memory<Pair, BFloat16> {
  static OCR_INLINE Vec<Pair> load(const BFloat16* p) {
    Vec<Pair> x;
    memcpy(&x, p, sizeof x);
    return x;
  }
};

OCR_INLINE void store_along(Pair* row, int64_t i, Vec<float> x) {
  const Half half = narrow(x);
  memcpy(reinterpret_cast<BFloat16*>(row) + i, &half, sizeof half);
}

inline void read_across(Pair* to, int64_t stride, int64_t padded, const Tensor& tensor, Window w) {
  constexpr int size = Vec<Pair>::size;
  if (channels_last(tensor)) return read_transposed<Pair, BFloat16>(to, stride, padded, tensor, w);
  const int64_t step = tensor.stride_column;
  for (int64_t r = 0; r < w.rows; r += 2, to += stride) {
    const BFloat16* first = element<BFloat16>(tensor, w.batch, w.row + r, w.column);
    const BFloat16* second = r + 1 < w.rows ? first + tensor.stride_row : nullptr;
    int64_t i = 0;
    if (step == 1 && second)
      for (; i + size <= w.columns; i += size) {
        OCR_PREFETCH(first + i + kAhead * tensor.stride_row);
        OCR_PREFETCH(second + i + kAhead * tensor.stride_row);
        Half x, y;
        memcpy(&x, first + i, sizeof x);
        memcpy(&y, second + i, sizeof y);
        store(to + i, interleave(x, y));
      }
    for (; i < w.columns; ++i) to[i] = Pair(first[i * step].bits) | (second ? Pair(second[i * step].bits) << 16 : 0);
    for (; i < padded; ++i) to[i] = 0;
  }
}
inline void read_along(Pair* to, int64_t stride, int64_t padded, const Tensor& tensor, Window w) {
  for (int64_t r = 0; r < w.rows; ++r) {
    const BFloat16* from = element<BFloat16>(tensor, w.batch, w.row + r, w.column);
    BFloat16* row = reinterpret_cast<BFloat16*>(to + r * stride);
    if (tensor.stride_column == 1) memcpy(row, from, size_t(w.columns) * sizeof *row);
    else
      for (int64_t i = 0; i < w.columns; ++i) row[i] = from[i * tensor.stride_column];
    fill(row + w.columns, 2 * padded - w.columns, BFloat16{0});
  }
}
inline void turn(Pair* to, int64_t stride, Pair* from, int64_t from_stride, int64_t rows, int64_t columns) {
  constexpr int64_t size = Vec<Pair>::size;
  for (int64_t i = 0; i < columns; i += size, to += size / 2 * stride)
    for (int64_t r = 0; r < rows; r += size) {
      Vec<Pair> block[size];
      for (int64_t j = 0; j < size; ++j)
        block[j] = r + j < rows ? load<Pair>(from + (r + j) * from_stride + i) : broadcast(Pair(0));
      transpose(block);
      for (int64_t j = 0; j < size; j += 2) {
        Half halves[4];
        memcpy(halves, block + j, sizeof halves);
        store(to + j / 2 * stride + 2 * r, interleave(halves[0], halves[2]));
        store(to + j / 2 * stride + 2 * r + size, interleave(halves[1], halves[3]));
      }
    }
}

inline const Pair* lanes_along(Pair* to, const float* from, int64_t rows, int64_t stride) {
  for (int64_t i = 0; i < rows * stride; i += Vec<float>::size) store_along(to, i, load<float>(from + i));
  return to;
}
inline const Pair* lanes_across(Pair* to, const float* from, int64_t rows, int64_t stride) {
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t i = 0; i < stride; i += Vec<float>::size) {
      const float* first = from + r * stride + i;
      const Half second = r + 1 < rows ? narrow(load<float>(first + stride)) : Half{};
      store(to + r / 2 * stride + i, interleave(narrow(load<float>(first)), second));
    }
  return to;
}
#endif

// Whether products of pairs with these bfloat16 are those of float32. AVX512-BF16 takes subnormal numbers for 0: wrong
// beside infinity, and too much beside what is very large.
inline bool fits_pairs(const Tensor& t) {
  for (int64_t b = 0; b < t.batch; ++b)
    for (int64_t r = 0; r < t.rows; ++r) {
      const BFloat16* p = element<BFloat16>(t, b, r, 0);
      uint16_t unfit = 0;
      for (int64_t i = 0; i < t.columns; ++i, p += t.stride_column) {
        const uint16_t magnitude = p->bits & 0x7fff;
        unfit |= uint16_t(uint16_t(magnitude - 1) < 0x7f) | uint16_t(magnitude >= 0x5f80);  // 2^64
      }
      if (unfit) return false;
    }
  return true;
}

}  // namespace OCR_ISA
}  // namespace ocr_kernels
