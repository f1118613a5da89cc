// The kernels for GPUs, run thread by thread on a CPU, in a library that takes the place of the one for CPUs.
#include <cstddef>
#include <cstring>

#include "../csrc/attention/gpu.h"
#include "../csrc/gather/gpu.h"
#include "../csrc/ops.h"

namespace ocr_kernels {

struct Host {
  static constexpr const char* name = "the CPU";
  static void prepare(void*, int64_t) {}
  static constexpr auto gather_forward = gpu::gather_forward;
  static constexpr auto gather_backward = gpu::gather_backward;
  static constexpr auto attention_forward = gpu::attention_forward;
  static constexpr auto attention_backward = gpu::attention_backward;

  explicit Host(const Argument&) {}
  bool holds(const Argument& tensor) const { return tensor.is_cpu(); }
  Queue resources() const { return {nullptr, allocate, &scratch_}; }

 private:
  using Buffers = std::vector<std::vector<std::max_align_t>>;
  static void* allocate(void* scratch, int64_t bytes) {
    auto& buffers = *static_cast<Buffers*>(scratch);
    buffers.emplace_back(size_t(bytes) / sizeof(std::max_align_t) + 1);
    std::memset(buffers.back().data(), 0xff, size_t(bytes));  // NaN in every element type
    return buffers.back().data();
  }
  mutable Buffers scratch_;
};

STABLE_TORCH_LIBRARY(ocr_kernels_native, m) { define_schemas(m); }
STABLE_TORCH_LIBRARY_IMPL(ocr_kernels_native, CPU, m) { Ops<Host>::implement(m); }

}  // namespace ocr_kernels
