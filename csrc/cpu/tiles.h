// Tiles of a tensor of any layout and element type, copied to and from small buffers of the arithmetic's own type.
#pragma once

#include <new>

#include "../tensor.h"
#include "simd.h"

namespace ocr_kernels {
inline namespace OCR_ISA {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

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
  explicit Buffer(int64_t count) : memory_(::operator new(size_t(count) * sizeof(T) + 64)) {}
  ~Buffer() { ::operator delete(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_) + 63) / 64 * 64); }

 private:
  void* memory_;
};

// Element (r, i) of a tile lies at data[i / panel * panel_stride + r * row_stride + i % panel].
template <class T>
struct Tile {
  T* data;
  int64_t row_stride, panel, panel_stride;
  OCR_INLINE T* at(int64_t r, int64_t i) const { return data + i / panel * panel_stride + r * row_stride + i % panel; }
};
template <class T>
OCR_INLINE Tile<T> plain_tile(T* data, int64_t row_stride) {
  return {data, row_stride, row_stride, 0};
}

// The part of a tensor [batch, rows, columns] that a tile holds.
struct Window {
  int64_t batch, row, rows, column, columns;
};

inline Tensor transposed(Tensor t) {
  return {t.data, t.dtype, t.batch, t.columns, t.rows, t.stride_batch, t.stride_column, t.stride_row};
}
// As of pixels in channels_last, where the rows are channels or regions.
inline bool neighbours_are_rows(const Tensor& t) { return t.stride_row == 1 && t.stride_column != 1; }

template <class T>
OCR_INLINE T* element(const Tensor& t, int64_t batch, int64_t row, int64_t column) {
  return static_cast<T*>(t.data) + batch * t.stride_batch + row * t.stride_row + column * t.stride_column;
}

template <class F>
OCR_INLINE void with_element_type(Dtype dtype, F call) {
  switch (dtype) {
    case Dtype::Float64:
      return call(double());
    case Dtype::Float32:
      return call(float());
    case Dtype::BFloat16:
      return call(BFloat16());
    case Dtype::Float16:
      return call(Float16());
  }
}

// to[i] = from[i * step] for i < count, then zeros up to `padded`
template <class A, class T>
OCR_INLINE void read_run(A* to, const T* from, int64_t step, int64_t count, int64_t padded) {
  constexpr int size = Vec<A>::size;
  int64_t i = 0;
  if (step == 1)
    for (; i + size <= count; i += size) store(to + i, load<A>(from + i));
  for (; i < count; ++i) to[i] = A(to_float(from[i * step]));
  for (; i < padded; ++i) to[i] = A(0);
}
template <class A, class T>
OCR_INLINE void write_run(T* to, const A* from, int64_t step, int64_t count) {
  constexpr int size = Vec<A>::size;
  int64_t i = 0;
  if (step == 1)
    for (; i + size <= count; i += size) store(to + i, load<A>(from + i));
  for (; i < count; ++i) to[i * step] = from_float<T>(from[i]);
}

// Where neighbours in memory are in different rows, blocks are transposed in registers.
template <class A, class T>
OCR_INLINE void read_transposed(Tile<A> tile, int64_t padded, const Tensor& tensor, Window w) {
  constexpr int size = Vec<A>::size;
  for (int64_t i = 0; i < padded; i += size)
    for (int64_t r = 0; r < w.rows; r += size) {
      const int64_t rows = smaller(size, w.rows - r);
      Vec<A> block[size];
      for (int j = 0; j < size; ++j) {
        if (i + j >= w.columns) {
          block[j] = broadcast(A(0));
          continue;
        }
        const T* from = element<T>(tensor, w.batch, w.row + r, w.column + i + j);
        block[j] = rows == size ? load<A>(from) : load<A>(from, rows);
      }
      transpose(block);
      A* to = tile.at(r, i);
      for (int64_t j = 0; j < rows; ++j) store(to + j * tile.row_stride, block[j]);
    }
}
template <class A, class T>
OCR_INLINE void write_transposed(const Tensor& tensor, Window w, Tile<A> tile) {
  constexpr int size = Vec<A>::size;
  for (int64_t i = 0; i < w.columns; i += size)
    for (int64_t r = 0; r < w.rows; r += size) {
      const int64_t rows = smaller(size, w.rows - r), columns = smaller(size, w.columns - i);
      const A* from = tile.at(r, i);
      Vec<A> block[size];
      for (int64_t j = 0; j < size; ++j) block[j] = j < rows ? load<A>(from + j * tile.row_stride) : broadcast(A(0));
      transpose(block);
      for (int64_t j = 0; j < columns; ++j) {
        T* to = element<T>(tensor, w.batch, w.row + r, w.column + i + j);
        rows == size ? store(to, block[j]) : store(to, block[j], rows);
      }
    }
}

// tile = the window, each row followed by zeros up to `padded`, a multiple of the vector's size
template <class A>
void read_tile(Tile<A> tile, int64_t padded, const Tensor& tensor, Window w) {
  with_element_type(tensor.dtype, [&](auto type) {
    using T = decltype(type);
    if (neighbours_are_rows(tensor)) return read_transposed<A, T>(tile, padded, tensor, w);
    for (int64_t r = 0; r < w.rows; ++r) {
      const T* from = element<T>(tensor, w.batch, w.row + r, w.column);
      A* to = tile.data + r * tile.row_stride;
      for (int64_t i = 0; i < padded; i += tile.panel, to += tile.panel_stride)
        read_run(to, from + i * tensor.stride_column, tensor.stride_column,
                 larger(0, smaller(tile.panel, w.columns - i)), smaller(tile.panel, padded - i));
    }
  });
}

// tensor = tile over the window; the tile is a single panel, with whole vectors in its rows
template <class A>
void write_tile(const Tensor& tensor, Window w, Tile<A> tile) {
  with_element_type(tensor.dtype, [&](auto type) {
    using T = decltype(type);
    if (neighbours_are_rows(tensor)) return write_transposed<A, T>(tensor, w, tile);
    for (int64_t r = 0; r < w.rows; ++r)
      write_run(element<T>(tensor, w.batch, w.row + r, w.column), tile.data + r * tile.row_stride, tensor.stride_column,
                w.columns);
  });
}

}  // namespace OCR_ISA
}  // namespace ocr_kernels
