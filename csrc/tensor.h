// What the kernels know of a tensor, with nothing of PyTorch in it.
#pragma once

#include <cstdint>

namespace ocr_kernels {

enum class Dtype { Float64, Float32, BFloat16, Float16 };
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// A tensor [batch, rows, columns] with element strides of any kind. Where there are pixels, they are the columns.
struct Tensor {
  void* data;  // null: not wanted
  Dtype dtype;
  int64_t batch, rows, columns;
  int64_t stride_batch, stride_row, stride_column;
};

// The product of sizes; kTooMany where it is larger, so that memory for it is refused instead of too small.
constexpr int64_t kTooMany = int64_t(1) << 62;
template <class... Sizes>
constexpr int64_t product(int64_t result, Sizes... sizes) {
  ((result = sizes != 0 && result > kTooMany / int64_t(sizes) ? kTooMany : result * int64_t(sizes)), ...);
  return result;
}

// Runs body(state, 0) to body(state, tasks - 1), each once, in any order, on any number of threads.
using Parallel = void (*)(int64_t tasks, void (*body)(const void* state, int64_t task), const void* state);

// The stream that kernels run on, and memory for intermediate results, which lives as long as the call.
struct Queue {
  void* stream;
  void* (*allocate)(void* state, int64_t bytes);
  void* state;

  template <class T, class... Sizes>
  T* scratch(Sizes... sizes) const {
    return static_cast<T*>(allocate(state, product(int64_t(sizeof(T)), sizes...)));
  }
};

}  // namespace ocr_kernels
