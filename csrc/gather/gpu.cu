// The gather's kernels for every element type. Sums in float64 take every operand as float64.
#include "gpu_kernels.h"

namespace ocr_kernels::gpu {

void run(const GatherForward& a, const Queue& queue) {
  check_dtypes(a.out, a.stats, a.feats, a.logits);
  with_tiles(a.stats.dtype == Dtype::Float64 ? a.stats.dtype : a.feats.dtype, a.logits.rows,
             [&](auto type, auto regions) { gather_forward<decltype(type), decltype(regions)::value>(a, queue); });
}

void run(const GatherBackward& a, const Queue& queue) {
  check_dtypes(a.dfeats, a.dlogits, a.grad, a.feats, a.logits, a.stats);
  with_tiles(a.stats.dtype == Dtype::Float64 ? a.stats.dtype : a.feats.dtype, a.logits.rows,
             [&](auto type, auto regions) { gather_backward<decltype(type), decltype(regions)::value>(a, queue); });
}

}  // namespace ocr_kernels::gpu
