// The ops on CPUs, and the schemas of all.
#include <torch/headeronly/version.h>

#include "../ops.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <string>

#include "../attention/cpu.h"
#include "../gather/cpu.h"
#include "isa.h"

namespace ocr_kernels {
namespace {

// A large result is memory that the system has yet to hand out, page by page. In large pages that takes a fraction of
// the time, which is otherwise more than the kernels'.
void expect_large_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // refused: nothing is lost
#endif
}

void parallel(int64_t tasks, void (*body)(const void* state, int64_t task), const void* state) {
  torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(state, task);
  });
}

struct Cpu {
  static constexpr const char* name = "the CPU";
  bool holds(const Argument& tensor) const { return tensor.is_cpu(); }
  explicit Cpu(const Argument&) {}
  Parallel resources() const { return parallel; }
  static void prepare(void* data, int64_t bytes) { expect_large_pages(data, bytes); }

  static constexpr auto gather_forward = cpu::gather_forward;
  static constexpr auto gather_backward = cpu::gather_backward;
  static constexpr auto attention_forward = cpu::attention_forward;
  static constexpr auto attention_backward = cpu::attention_backward;
};

// One `name=value` a line.
std::string build_facts() {
#if defined(_MSC_VER)
  const std::string compiler = "MSVC " + std::to_string(_MSC_FULL_VER);
#elif defined(__clang__)
  const std::string compiler = "Clang " __clang_version__;
#else
  const std::string compiler = "GCC " __VERSION__;
#endif
  return "version=" OCR_KERNELS_VERSION "\ncompiler=" + compiler +
         "\ntorch=" TORCH_VERSION "\ninstruction_sets=" OCR_INSTRUCTION_SETS "\ninstruction_set=" +
         kIsaNames[int(chosen_isa())];
}

}  // namespace

STABLE_TORCH_LIBRARY(ocr_kernels_native, m) {
  define_schemas(m);
  m.def("build_facts() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(ocr_kernels_native, CPU, m) { Ops<Cpu>::implement(m); }

STABLE_TORCH_LIBRARY_IMPL(ocr_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("build_facts", TORCH_BOX(&build_facts));
}

}  // namespace ocr_kernels
