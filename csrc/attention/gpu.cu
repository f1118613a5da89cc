// The attention's kernels for every element type.
#include "gpu_kernels.h"

namespace ocr_kernels::gpu {

void run(const AttentionForward& a, const Queue& queue) {
  check_dtypes(a.out, a.query, a.key, a.value);
  with_tiles(a.query.dtype, a.key.columns,
             [&](auto type, auto regions) { attention_forward<decltype(type), decltype(regions)::value>(a, queue); });
}

void run(const AttentionBackward& a, const Queue& queue) {
  check_dtypes(a.dquery, a.dkey, a.dvalue, a.grad, a.query, a.key, a.value);
  with_tiles(a.query.dtype, a.key.columns,
             [&](auto type, auto regions) { attention_backward<decltype(type), decltype(regions)::value>(a, queue); });
}

}  // namespace ocr_kernels::gpu
