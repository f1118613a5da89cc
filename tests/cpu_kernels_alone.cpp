// Runs a kernel for CPUs without PyTorch, as a program for any processor that there is a compiler and an emulator for.
//
// It is named on the command line. Standard input has its tensors, each as eight integers (the bytes of its memory, 0
// where it is not wanted, dtype, sizes and strides) and its memory; then its number, if it takes one. Standard output
// is their memory.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../csrc/arguments.h"

namespace ocr_kernels {
inline namespace portable {
OCR_DECLARE_KERNELS(Parallel)
OCR_DECLARE_PASSES(Parallel)
}  // namespace portable

void* allocate(int64_t bytes) {
  void* const memory = std::aligned_alloc(64, size_t(bytes + 63) / 64 * 64);
  std::memset(memory, 0xff, size_t(bytes));  // NaN in every element type
  return memory;
}
void release(void* memory) { std::free(memory); }
void unknown_dtype(Dtype) { std::abort(); }

namespace {

void one_after_the_other(int64_t tasks, void (*body)(const void* state, int64_t task), const void* state) {
  for (int64_t task = 0; task < tasks; ++task) body(state, task);
}

void read(void* to, int64_t bytes) {
  if (std::fread(to, 1, size_t(bytes), stdin) != size_t(bytes)) std::abort();
}

template <class Arguments>
void run_from_input() {
  constexpr int count = sizeof(Arguments) / sizeof(Tensor);  // tensors, then perhaps a number
  Arguments arguments{};
  Tensor* const tensors = reinterpret_cast<Tensor*>(&arguments);
  int64_t bytes[count];
  for (int i = 0; i < count; ++i) {
    int64_t n[8];
    read(n, sizeof n);
    bytes[i] = n[0];
    tensors[i] = {n[0] ? allocate(n[0]) : nullptr, Dtype(n[1]), n[2], n[3], n[4], n[5], n[6], n[7]};
    read(tensors[i].data, n[0]);
  }
  read(tensors + count, sizeof arguments - count * sizeof(Tensor));
  run(arguments, one_after_the_other);
  for (int i = 0; i < count; ++i) std::fwrite(tensors[i].data, 1, size_t(bytes[i]), stdout);
}

}  // namespace
}  // namespace ocr_kernels

int main(int, char** arguments) {
  using namespace ocr_kernels;
  if (!std::strcmp(arguments[1], "gather_forward")) run_from_input<GatherForward>();
  else if (!std::strcmp(arguments[1], "gather_backward")) run_from_input<GatherBackward>();
  else if (!std::strcmp(arguments[1], "attention_forward")) run_from_input<AttentionForward>();
  else if (!std::strcmp(arguments[1], "attention_backward")) run_from_input<AttentionBackward>();
  else if (!std::strcmp(arguments[1], "block_activate")) run_from_input<BlockActivate>();
  else if (!std::strcmp(arguments[1], "block_moments")) run_from_input<BlockMoments>();
  else if (!std::strcmp(arguments[1], "block_gradient")) run_from_input<BlockGradient>();
  else if (!std::strcmp(arguments[1], "block_through")) run_from_input<BlockThrough>();
  else if (!std::strcmp(arguments[1], "block_softmax")) run_from_input<BlockSoftmax>();
  else if (!std::strcmp(arguments[1], "block_softmax_backward")) run_from_input<BlockSoftmaxBackward>();
  else return 1;
}
