// f_k = sum_i softmax_i(scale * M_ki) x_i on a GPU; what the arguments are is said in cpu.h.
#pragma once

#include "../tensor.h"

namespace ocr_kernels::gpu {

void gather_forward(const Tensor& out, const Tensor& stats, const Tensor& feats, const Tensor& logits, double scale,
                    const Queue& queue);

void gather_backward(const Tensor& dfeats, const Tensor& dlogits, const Tensor& grad, const Tensor& feats,
                     const Tensor& logits, const Tensor& stats, double scale, const Queue& queue);

}  // namespace ocr_kernels::gpu
