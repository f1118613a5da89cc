// The attention's kernels for every element type.
#include "gpu.h"
#include "gpu_kernels.h"

namespace ocr_kernels::gpu {

void attention_forward(const Tensor& out, const Tensor& query, const Tensor& key, const Tensor& value, double scale,
                       const Queue& queue) {
  with_tiles(query.dtype, key.columns, [&](auto type, auto regions) {
    attention_forward<decltype(type), decltype(regions)::value>(out, query, key, value, scale, queue);
  });
}

void attention_backward(const Tensor& dquery, const Tensor& dkey, const Tensor& dvalue, const Tensor& grad,
                        const Tensor& query, const Tensor& key, const Tensor& value, double scale, const Queue& queue) {
  with_tiles(query.dtype, key.columns, [&](auto type, auto regions) {
    attention_backward<decltype(type), decltype(regions)::value>(dquery, dkey, dvalue, grad, query, key, value, scale,
                                                                 queue);
  });
}

}  // namespace ocr_kernels::gpu
