// A GPU's blocks on a CPU, for tests. Each of a block's threads is a fiber with a stack of its own, and they take turns
// where threads wait for each other: at a barrier, and within a warp where its lanes exchange something. Shared memory
// holds NaN at first. With OCR_BACKWARDS in the environment the threads take their turns from the last to the first:
// what is missing a barrier has another result then.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#include "../cpu/simd.h"

#define OCR_KERNEL inline void
#define OCR_DEVICE inline
#define OCR_UNROLL_BY(n)

namespace ocr_kernels::gpu {

class Grid {
 public:
  static void run(const std::function<void()>& kernel, int64_t blocks, int shared_bytes) {
    Grid grid(kernel, blocks, shared_bytes);
    Grid* const before = current();
    current() = &grid;
    grid.start();
    current() = before;
  }
  static Grid*& current() {
    static thread_local Grid* grid = nullptr;
    return grid;
  }

  int thread() const { return running_; }
  int64_t block() const { return block_; }
  unsigned char* shared() { return reinterpret_cast<unsigned char*>(shared_.data()); }

  void wait_for_block() {
    const int64_t turn = ++fibers_[running_].turns;
    ++turns_;
    // the last in its warp goes on with the next warp, or with the first: all are here then
    switch_to(position() % 32 == 31 ? (position() + 1) % kThreads : position() + 1);
    if (turns_ < turn * kThreads) fail("threads of a block have gone different ways");
  }

  // what each lane of the warp brings
  template <class V>
  const V* exchange(const V& value) {
    static_assert(sizeof(V) <= sizeof(Slot), "an exchanged value fits in a slot");
    Fiber& fiber = fibers_[running_];
    // two sets in turn: a lane may bring its next value before another has read the last ones
    V* const values = reinterpret_cast<V*>(slots_[running_ / 32][fiber.exchanges % 2]);
    values[running_ % 32] = value;
    const int64_t exchange = ++fiber.exchanges;
    int64_t& of_warp = exchanges_[running_ / 32];
    ++of_warp;
    switch_to(position() / 32 * 32 + (position() + 1) % 32);
    if (of_warp < exchange * 32) fail("lanes of a warp have gone different ways");
    return values;
  }

 private:
  struct Fiber {
    std::unique_ptr<char[]> stack;
    ucontext_t context;
    jmp_buf at;
    int64_t turns = 0, exchanges = 0;
    bool started = false;
  };
  struct Slot {
    uint32_t word[8];
  };
  static constexpr size_t kStack = 128 * 1024;

  Grid(const std::function<void()>& kernel, int64_t blocks, int shared_bytes)
      : kernel_(kernel),
        blocks_(blocks),
        shared_(size_t(shared_bytes) / sizeof(Vector)),
        backwards_(std::getenv("OCR_BACKWARDS") != nullptr),
        fibers_(kThreads) {
    for (Fiber& fiber : fibers_) {
      fiber.stack.reset(new char[kStack]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, [] { current()->live(); }, 0);
    }
  }

  int position() const { return thread_at(running_); }
  int thread_at(int position) const { return backwards_ ? kThreads - 1 - position : position; }

  void start() {
    if (_setjmp(home_)) return;
    enter(thread_at(0));
  }

  // a fiber's life: every block of the grid
  void live() {
    for (int64_t block = 0; block < blocks_; ++block) {
      if (position() == 0) {
        block_ = block;
        std::fill(shared_.begin(), shared_.end(), Vector{{~0u, ~0u, ~0u, ~0u}});
      }
      kernel_();
      wait_for_block();
    }
    _longjmp(home_, 1);
  }

  void switch_to(int position) {
    if (!_setjmp(fibers_[running_].at)) enter(thread_at(position));
  }
  [[noreturn]] void enter(int thread) {
    running_ = thread;
    Fiber& fiber = fibers_[running_];
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    setcontext(&fiber.context);
    std::abort();  // setcontext does not return
  }
  [[noreturn]] static void fail(const char* reason) {
    std::fprintf(stderr, "%s\n", reason);
    std::abort();
  }

  const std::function<void()>& kernel_;
  int64_t blocks_, block_ = 0;
  std::vector<Vector> shared_;
  bool backwards_;
  int running_ = 0;
  jmp_buf home_;
  std::vector<Fiber> fibers_;
  Slot slots_[kWarps][2][32];
  int64_t turns_ = 0, exchanges_[kWarps] = {};  // of all threads together
};

OCR_DEVICE int thread_index() { return Grid::current()->thread(); }
OCR_DEVICE int thread_index_anew() { return thread_index(); }
OCR_DEVICE int64_t block_index() { return Grid::current()->block(); }
OCR_DEVICE void synchronize() { Grid::current()->wait_for_block(); }
OCR_DEVICE unsigned char* shared_memory() { return Grid::current()->shared(); }

template <class Accumulator>
OCR_DEVICE Accumulator shuffle_xor(Accumulator value, int mask) {
  return Grid::current()->exchange(value)[thread_index() % 32 ^ mask];
}

template <class T>
OCR_DEVICE AccumulatorOf<T> to_accumulator(T x) {
  return to_float(x);
}
template <class T>
struct Narrow {
  static T value(AccumulatorOf<T> x) { return from_float<T>(x); }
};

template <class Accumulator>
OCR_DEVICE Accumulator exponential(Accumulator x) {
  return std::exp(x);
}
template <class Accumulator>
OCR_DEVICE Accumulator max(Accumulator a, Accumulator b) {
  return std::fmax(a, b);
}

OCR_DEVICE void stop() { std::abort(); }

OCR_DEVICE Vector load_vector(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(Vector)) std::abort();  // a GPU would
  return *static_cast<const Vector*>(p);
}

template <class T>
OCR_DEVICE void load_matrices(uint32_t (&to)[4], const T* row, bool transposed) {
  static_assert(sizeof(T) == 2, "matrices of 16-bit numbers");
  if (reinterpret_cast<uintptr_t>(row) % sizeof(Vector)) std::abort();
  const T* const* rows = Grid::current()->exchange(row);
  const int lane = thread_index() % 32, line = lane / 4, first = lane % 4 * 2;
  for (int m = 0; m < 4; ++m) {
    const T* const* matrix = rows + m * 8;
    to[m] = transposed ? matrix[first][line].bits | uint32_t(matrix[first + 1][line].bits) << 16
                       : matrix[line][first].bits | uint32_t(matrix[line][first + 1].bits) << 16;
  }
}

template <class T>
OCR_DEVICE void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const Operands* lanes = Grid::current()->exchange(Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const int lane = thread_index() % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int j = 0; j < 16; ++j) {
      const uint32_t x = lanes[row % 8 * 4 + j % 8 / 2].a[j / 8 * 2 + row / 8];
      const uint32_t y = lanes[column * 4 + j % 8 / 2].b[j / 8];
      sums[i] += to_float(T{uint16_t(x >> (j % 2 * 16))}) * to_float(T{uint16_t(y >> (j % 2 * 16))});
    }
  }
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), int64_t blocks, int shared_bytes, const Queue&,
            const Parameters&... arguments) {
  if (shared_bytes > 64 * 1024) std::abort();  // more than the smallest GPU has
  if (blocks > 0) Grid::run([&] { kernel(arguments...); }, blocks, shared_bytes);
}

}  // namespace ocr_kernels::gpu
