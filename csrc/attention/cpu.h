// y_i = sum_k softmax_k(scale * q_i . k_k) v_k: the softmax runs over regions.
#pragma once

#include "../tensor.h"

namespace ocr_kernels::cpu {

// out [B, Dv, N] from query [B, D, N], key [B, D, K] and value [B, Dv, K], all of one dtype. N >= 1.
void attention_forward(const Tensor& out, const Tensor& query, const Tensor& key, const Tensor& value, double scale,
                       Parallel parallel);

// dquery [B, D, N], dkey [B, D, K] and dvalue [B, Dv, K] from grad [B, Dv, N]; one whose data is null is not wanted.
void attention_backward(const Tensor& dquery, const Tensor& dkey, const Tensor& dvalue, const Tensor& grad,
                        const Tensor& query, const Tensor& key, const Tensor& value, double scale, Parallel parallel);

}  // namespace ocr_kernels::cpu
