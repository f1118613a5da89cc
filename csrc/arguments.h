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

// What the block does to a tile of pixels [channels, pixels] between two products. Neighbours in memory are pixels, in
// all maps of a call, or they are channels. `vectors` are rows [channels], in the dtype of statistics; `slope` is that
// of the activation.

// out = activation(factor * h + offset) * mask
struct BlockActivate {
  Tensor out;
  Tensor h;
  Tensor vectors;  // factor, offset, mask
  double slope;
};

// Means of h over pixels, and sums of squares about them.
struct BlockMoments {
  Tensor out;  // [2, channels]
  Tensor h;
};

// d = grad * mask through the activation of factor * h + offset; sums over pixels of d, and of d * (h - mean).
struct BlockGradient {
  Tensor out;   // d; without data it is not wanted
  Tensor sums;  // [2, channels]
  Tensor grad;
  Tensor h;
  Tensor vectors;  // factor, offset, mask, mean
  double slope;
};

// out = a * d + b * (h - mean) + c with the same d
struct BlockThrough {
  Tensor out;
  Tensor grad;
  Tensor h;
  Tensor vectors;  // factor, offset, mask, a, b, c, mean
  double slope;
};

// out = softmax over regions of scores
struct BlockSoftmax {
  Tensor out;     // [K, pixels]
  Tensor scores;  // [K, pixels]
};

// out = scale * w * (dw - sum_k w dw), dw = dweights + matrix w + column
struct BlockSoftmaxBackward {
  Tensor out;       // [K, pixels]
  Tensor weights;   // [K, pixels]
  Tensor dweights;  // [K, pixels]
  Tensor matrix;    // [K, K + 1], the last is the column
  double scale;
};

// Declares the kernels of the two ops, for the namespace of a kind of device. Resources are what they need beside
// tensors.
#define OCR_DECLARE_KERNELS(Resources)                                                                                 \
  void run(const GatherForward& a, Resources);                                                                         \
  void run(const GatherBackward& a, Resources);                                                                        \
  void run(const AttentionForward& a, Resources);                                                                      \
  void run(const AttentionBackward& a, Resources);

// Those of the block's passes.
#define OCR_DECLARE_PASSES(Resources)                                                                                  \
  void run(const BlockActivate& a, Resources);                                                                         \
  void run(const BlockMoments& a, Resources);                                                                          \
  void run(const BlockGradient& a, Resources);                                                                         \
  void run(const BlockThrough& a, Resources);                                                                          \
  void run(const BlockSoftmax& a, Resources);                                                                          \
  void run(const BlockSoftmaxBackward& a, Resources);

}  // namespace ocr_kernels
