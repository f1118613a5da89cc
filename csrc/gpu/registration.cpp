// The ops on GPUs: a library of its own, since a PyTorch built for CPUs lacks what it calls.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/version.h>

#include "../ops.h"

namespace ocr_kernels {

namespace gpu {
OCR_DECLARE_KERNELS(const Queue&)
}

namespace {

class Gpu {
 public:
  static constexpr const char* name = "the GPU of the first tensor";
  static void prepare(void*, int64_t) {}

  explicit Gpu(const Argument& first) : first_(first), index_(index_of(first)), current_(index_) {
    // this library has a CUDA runtime of its own, which is told as well
    STD_TORCH_CHECK(cudaSetDevice(index_) == cudaSuccess, "CUDA: device ", index_, " cannot be used");
  }
  bool holds(const Argument& tensor) const { return tensor.is_cuda() && tensor.get_device_index() == index_; }
  template <class Arguments>
  void run(const Arguments& a) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    gpu::run(a, {stream, allocate, this});
  }

 private:
  static int32_t index_of(const Argument& first) {
    STD_TORCH_CHECK(first.is_cuda(), "all tensors must be on one GPU, but the first is not on any");
    return first.get_device_index();
  }
  // PyTorch's own allocator hands out again what these hold only to what follows on the same stream.
  static void* allocate(void* state, int64_t bytes) {
    Gpu& gpu = *static_cast<Gpu*>(state);
    gpu.scratch_.push_back(torch::stable::new_empty(gpu.first_, {bytes}, ScalarType::Byte));
    return gpu.scratch_.back().mutable_data_ptr();
  }

  Argument first_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard current_;
  std::vector<Argument> scratch_;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ocr_kernels_native, CUDA, m) { Ops<Gpu>::implement(m); }

// One `name=value` a line, read from the file where nothing can load it.
#define OCR_TEXT(x) OCR_TEXT_OF(x)
#define OCR_TEXT_OF(x) #x
extern const char cuda_build_facts[];
const char cuda_build_facts[] =
    "version=" OCR_KERNELS_VERSION "\ncompiler=nvcc " OCR_TEXT(__CUDACC_VER_MAJOR__) "." OCR_TEXT(
        __CUDACC_VER_MINOR__) "\ntorch=" TORCH_VERSION "\narchitectures=" OCR_CUDA_ARCHITECTURES;

}  // namespace ocr_kernels
