// The softmax over regions of a tile of scores [K, pixels], and its backward pass.
#pragma once

#include "products.h"

namespace ocr_kernels {
inline namespace OCR_ISA {

constexpr int kColumns = 4;  // vectors of pixels at a time: each sum over regions is a chain of additions

// sums[v] = the sum over regions of body(region, v), in chains
template <class A, class Body>
OCR_INLINE void sum_over_regions(Vec<A>* sums, int64_t regions, Body body) {
  for (int v = 0; v < kColumns; ++v) sums[v] = broadcast(A(0));
  for (int64_t first = 0; first < regions; first += kChain) {
    Vec<A> chain[kColumns];
    for (int v = 0; v < kColumns; ++v) chain[v] = broadcast(A(0));
    for (int64_t k = first; k < min(first + kChain, regions); ++k)
      for (int v = 0; v < kColumns; ++v) chain[v] = body(k, v, chain[v]);
    for (int v = 0; v < kColumns; ++v) sums[v] = sums[v] + chain[v];
  }
}

// scores [K, kPixels] become exp(scale * score - max) * lift, rounded to what products of `lane` take, and reciprocals
// those of their sums.
template <int64_t kPixels, class Lane, class A = AccumulatorOf<Lane>>
void exponentials(A* scores, int64_t regions, A scale, A lift, A* reciprocals, Lane lane) {
  constexpr int size = Vec<A>::size;
  for (int64_t i = 0; i < kPixels; i += kColumns * size) {
    const auto score = [&](int64_t k, int v) {
      return load<A>(scores + k * kPixels + i + v * size) * broadcast(scale);
    };
    Vec<A> maximum[kColumns], sums[kColumns];
    for (int v = 0; v < kColumns; ++v) maximum[v] = score(0, v);
    for (int64_t k = 1; k < regions; ++k)
      for (int v = 0; v < kColumns; ++v) maximum[v] = max(maximum[v], score(k, v));
    sum_over_regions(sums, regions, [&](int64_t k, int v, Vec<A> sum) {
      const Vec<A> weight = rounded(exp(score(k, v) - maximum[v]) * broadcast(lift), lane);
      store(scores + k * kPixels + i + v * size, weight);
      return sum + weight;
    });
    for (int v = 0; v < kColumns; ++v) store(reciprocals + i + v * size, broadcast(A(1)) / sums[v]);
  }
}

// matrix[k, i] *= factors[i]; pixels that do not exist get 0, also where a region has made them NaN.
template <int64_t kPixels, class A>
void scale_pixels(A* matrix, int64_t regions, const A* factors, int64_t pixels) {
  constexpr int size = Vec<A>::size;
  for (int64_t k = 0; k < regions; ++k, matrix += kPixels) {
    for (int64_t i = 0; i < kPixels; i += size) store(matrix + i, load<A>(matrix + i) * load<A>(factors + i));
    for (int64_t i = pixels; i < kPixels; ++i) matrix[i] = 0;
  }
}

// dweights become dscores = scale * weights * (dweights - sum_k weights dweights). The dweight of the highest weight is
// subtracted from all before: what they have in common would leave rounding of the weights' sum, and one with most of
// the weight would swallow the terms of the others.
template <int64_t kPixels, class A>
void softmax_backward(A* dweights, const A* weights, int64_t regions, A scale, int64_t pixels) {
  constexpr int size = Vec<A>::size;
  for (int64_t i = 0; i < kPixels; i += kColumns * size) {
    Vec<A> highest[kColumns], base[kColumns], delta[kColumns];
    for (int v = 0; v < kColumns; ++v) {
      highest[v] = load<A>(weights + i + v * size);
      base[v] = load<A>(dweights + i + v * size);
    }
    for (int64_t k = 1; k < regions; ++k)
      for (int v = 0; v < kColumns; ++v) {
        const int64_t at = k * kPixels + i + v * size;
        const Vec<A> weight = load<A>(weights + at);
        base[v] = if_above(weight - highest[v], A(0), load<A>(dweights + at), base[v]);
        highest[v] = max(highest[v], weight);
      }
    sum_over_regions(delta, regions, [&](int64_t k, int v, Vec<A> sum) {
      const int64_t at = k * kPixels + i + v * size;
      return fma(load<A>(weights + at), load<A>(dweights + at) - base[v], sum);
    });
    for (int64_t k = 0; k < regions; ++k)
      for (int v = 0; v < kColumns; ++v) {
        const int64_t at = k * kPixels + i + v * size;
        const Vec<A> difference = load<A>(dweights + at) - base[v] - delta[v];
        store(dweights + at, broadcast(scale) * (load<A>(weights + at) * difference));
      }
  }
  for (int64_t k = 0; k < regions; ++k)
    for (int64_t i = pixels; i < kPixels; ++i) dweights[k * kPixels + i] = 0;
}

}  // namespace OCR_ISA
}  // namespace ocr_kernels
