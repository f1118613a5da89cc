// f_k = sum_i softmax_i(scale * M_ki) x_i: the softmax runs over pixels.
#pragma once

#include "../tensor.h"

namespace ocr_kernels::cpu {

// out [B, C, K] and stats [B, C + 2, K] from feats [B, C, N] and logits [B, K, N]. stats are `out` before its rounding,
// then the maxima of scale * logits and the softmax's sums; float64 where feats or logits are, else float32. N >= 1.
void gather_forward(const Tensor& out, const Tensor& stats, const Tensor& feats, const Tensor& logits, double scale,
                    Parallel parallel);

// dfeats [B, C, N] and dlogits [B, K, N] from grad [B, C, K]; a gradient whose data is null is not wanted.
void gather_backward(const Tensor& dfeats, const Tensor& dlogits, const Tensor& grad, const Tensor& feats,
                     const Tensor& logits, const Tensor& stats, double scale, Parallel parallel);

}  // namespace ocr_kernels::cpu
