// y_i = sum_k softmax_k(scale * q_i . k_k) v_k on a GPU; what the arguments are is said in cpu.h.
#pragma once

#include "../tensor.h"

namespace ocr_kernels::gpu {

void attention_forward(const Tensor& out, const Tensor& query, const Tensor& key, const Tensor& value, double scale,
                       const Queue& queue);

void attention_backward(const Tensor& dquery, const Tensor& dkey, const Tensor& dvalue, const Tensor& grad,
                        const Tensor& query, const Tensor& key, const Tensor& value, double scale, const Queue& queue);

}  // namespace ocr_kernels::gpu
