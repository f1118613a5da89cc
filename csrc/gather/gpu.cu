// The gather's kernels for every element type. Sums in float64 take every operand as float64.
#include "gpu.h"
#include "gpu_kernels.h"

namespace ocr_kernels::gpu {

void gather_forward(const Tensor& out, const Tensor& stats, const Tensor& feats, const Tensor& logits, double scale,
                    const Queue& queue) {
  with_tiles(stats.dtype == Dtype::Float64 ? stats.dtype : feats.dtype, logits.rows, [&](auto type, auto regions) {
    gather_forward<decltype(type), decltype(regions)::value>(out, stats, feats, logits, scale, queue);
  });
}

void gather_backward(const Tensor& dfeats, const Tensor& dlogits, const Tensor& grad, const Tensor& feats,
                     const Tensor& logits, const Tensor& stats, double scale, const Queue& queue) {
  with_tiles(stats.dtype == Dtype::Float64 ? stats.dtype : feats.dtype, logits.rows, [&](auto type, auto regions) {
    gather_backward<decltype(type), decltype(regions)::value>(dfeats, dlogits, grad, feats, logits, stats, scale,
                                                              queue);
  });
}

}  // namespace ocr_kernels::gpu
