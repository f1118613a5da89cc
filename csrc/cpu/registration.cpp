// The ops on CPUs, and the schemas of all. What the kernels need of the standard library is here, compiled for any
// processor.
#include <torch/headeronly/version.h>

#include "../block/ops.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "isa.h"

namespace ocr_kernels {

#define OCR_DECLARE(isa)                                                                                               \
  namespace isa {                                                                                                      \
  OCR_DECLARE_KERNELS(Parallel)                                                                                        \
  OCR_DECLARE_PASSES(Parallel)                                                                                         \
  }
OCR_FOR_EACH_ISA(OCR_DECLARE)

void* allocate(int64_t bytes) {
  if (bytes >= kTooMany) throw std::bad_alloc();
  return ::operator new(size_t(bytes), std::align_val_t(64));
}
void release(void* memory) { ::operator delete(memory, std::align_val_t(64)); }

void unknown_dtype(Dtype dtype) {
  throw std::invalid_argument("dtype " + std::to_string(int(dtype)) +
                              " is none of float64, float32, bfloat16, float16");
}

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

// The first exception of a task is thrown again here: PyTorch would make a RuntimeError of any.
void parallel(int64_t tasks, void (*body)(const void* state, int64_t task), const void* state) {
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr exception;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    try {
      for (int64_t task = begin; task < end; ++task) body(state, task);
    } catch (...) {
      if (!failed.test_and_set()) exception = std::current_exception();
    }
  });
  if (exception) std::rethrow_exception(exception);
}

struct Cpu {
  static constexpr const char* name = "the CPU";
  explicit Cpu(const Argument&) {}
  bool holds(const Argument& tensor) const { return tensor.is_cpu(); }
  static void prepare(void* data, int64_t bytes) { expect_large_pages(data, bytes); }

  template <class Arguments>
  void run(const Arguments& a) const {
    static constexpr void (*variants[])(const Arguments&, Parallel) = OCR_VARIANTS(run);
    variants[int(chosen_isa())](a, parallel);
  }
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
  Passes<Cpu>::define(m);
  m.def("build_facts() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(ocr_kernels_native, CPU, m) {
  Ops<Cpu>::implement(m);
  Passes<Cpu>::implement(m);
}

STABLE_TORCH_LIBRARY_IMPL(ocr_kernels_native, CompositeExplicitAutograd, m) {
  m.impl("build_facts", TORCH_BOX(&build_facts));
}

}  // namespace ocr_kernels
