// What each op takes and fills, as ops.h has checked it: on B images, with C, D and Dv channels, N pixels, K regions.
// Pixels are counted as one dimension. The kernels for each kind of device and instruction set are `run`.
#pragma once

#include "tensor.h"

namespace ocr_kernels {

// f_k = sum_i softmax_i(scale * M_ki) x_i: the softmax runs over pixels.
struct GatherForward {
  Tensor out;     // [B, C, K]
  Tensor stats;   // [B, C + 2, K]: `out` before its rounding, maxima of scale * logits, sums of exp(score - maximum)
  Tensor feats;   // [B, C, N]
  Tensor logits;  // [B, K, N]
  double scale;
};

// A gradient without data is not wanted.
struct GatherBackward {
  Tensor dfeats;   // [B, C, N]
  Tensor dlogits;  // [B, K, N]
  Tensor grad;     // [B, C, K], in the dtype of feats
  Tensor feats;
  Tensor logits;
  Tensor stats;  // the forward's
  double scale;
};

// y_i = sum_k softmax_k(scale * q_i . k_k) v_k: the softmax runs over regions. All tensors have one dtype.
struct AttentionForward {
  Tensor out;    // [B, Dv, N]
  Tensor query;  // [B, D, N]
  Tensor key;    // [B, D, K]
  Tensor value;  // [B, Dv, K]
  double scale;
};

struct AttentionBackward {
  Tensor dquery;  // [B, D, N]
  Tensor dkey;    // [B, D, K]
  Tensor dvalue;  // [B, Dv, K]
  Tensor grad;    // [B, Dv, N]
  Tensor query;
  Tensor key;
  Tensor value;
  double scale;
};

// Declares the kernels of all ops, for the namespace of a kind of device. Resources are what they need beside tensors.
#define OCR_DECLARE_KERNELS(Resources)                                                                                 \
  void run(const GatherForward& a, Resources);                                                                         \
  void run(const GatherBackward& a, Resources);                                                                        \
  void run(const AttentionForward& a, Resources);                                                                      \
  void run(const AttentionBackward& a, Resources);

}  // namespace ocr_kernels
