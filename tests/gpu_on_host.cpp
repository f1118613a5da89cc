// The kernels for GPUs, run thread by thread on a CPU, in a library that takes the place of the one for CPUs.
#include <cstddef>
#include <cstring>

#include "../csrc/ops.h"

namespace ocr_kernels {

namespace gpu {
OCR_DECLARE_KERNELS(const Queue&)
}

struct Host {
  static constexpr const char* name = "the CPU";
  static void prepare(void*, int64_t) {}

  explicit Host(const Argument&) {}
  bool holds(const Argument& tensor) const { return tensor.is_cpu(); }
  template <class Arguments>
  void run(const Arguments& a) {
    gpu::run(a, {nullptr, allocate, &scratch_});
  }

 private:
  using Buffers = std::vector<std::vector<std::max_align_t>>;
  static void* allocate(void* scratch, int64_t bytes) {
    auto& buffers = *static_cast<Buffers*>(scratch);
    buffers.emplace_back(size_t(bytes) / sizeof(std::max_align_t) + 1);
    std::memset(buffers.back().data(), 0xff, size_t(bytes));  // NaN in every element type
    return buffers.back().data();
  }
  Buffers scratch_;
};

std::string build_facts() { return ""; }

STABLE_TORCH_LIBRARY(ocr_kernels_native, m) {
  define_schemas(m);
  m.def("build_facts() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(ocr_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("build_facts", TORCH_BOX(&build_facts));
}
STABLE_TORCH_LIBRARY_IMPL(ocr_kernels_native, CPU, m) { Ops<Host>::implement(m); }

}  // namespace ocr_kernels
