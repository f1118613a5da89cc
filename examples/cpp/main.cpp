// Both ops from C++, without Python: load the compiled library, then call what it registers by name.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include <cmath>
#include <iostream>
#include <optional>

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: example path/to/libocr_kernels_cpu.so\n";
    return 2;
  }
  if (dlopen(argv[1], RTLD_NOW) == nullptr) {
    std::cerr << dlerror() << "\n";
    return 1;
  }
  using at::Tensor;
  auto& dispatcher = c10::Dispatcher::singleton();
  const auto gather = dispatcher.findSchemaOrThrow("ocr_kernels_native::spatial_gather", "")
                          .typed<Tensor(const Tensor&, const Tensor&, double)>();
  const auto attention = dispatcher.findSchemaOrThrow("ocr_kernels_native::pixel_region_attention", "")
                             .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, std::optional<double>)>();

  c10::InferenceMode inference;
  at::manual_seed(0);
  const Tensor feats = at::randn({2, 64, 16, 32});   // x  [B, C, H, W]
  const Tensor logits = at::randn({2, 19, 16, 32});  // M  [B, K, H, W], before any softmax
  const Tensor query = at::randn({2, 32, 16, 32});   // phi(x)  [B, D, H, W]
  const Tensor key = at::randn({2, 32, 19});         // psi(f)  [B, D, K]
  const Tensor value = at::randn({2, 32, 19});       // delta(f)  [B, D, K]

  const Tensor regions = gather.call(feats, logits, 1.0);                  // [B, C, K]
  const Tensor context = attention.call(query, key, value, std::nullopt);  // [B, D, H, W]

  const Tensor over_pixels = logits.flatten(2).softmax(2);
  const Tensor over_regions = (key.transpose(1, 2).matmul(query.flatten(2)) / std::sqrt(32.0)).softmax(1);
  const bool right = at::allclose(regions, feats.flatten(2).matmul(over_pixels.transpose(1, 2)), 1e-4, 1e-5) &&
                     at::allclose(context.flatten(2), value.matmul(over_regions), 1e-4, 1e-5);
  std::cout << "regions " << regions.sizes() << ", context " << context.sizes()
            << (right ? ": as the formulas have them\n" : ": wrong\n");
  return right ? 0 : 1;
}
