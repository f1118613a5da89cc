// Chooses the compilation of cpu_kernels.cpp that this processor runs best.
#include "cpu.h"

#include "../cpu/isa.h"

#define OCR_DECLARE(isa)                                                                                               \
  namespace ocr_kernels::isa {                                                                                         \
  void gather_forward(const Tensor& out, const Tensor& stats, const Tensor& feats, const Tensor& logits, double scale, \
                      Parallel parallel);                                                                              \
  void gather_backward(const Tensor& dfeats, const Tensor& dlogits, const Tensor& grad, const Tensor& feats,           \
                       const Tensor& logits, const Tensor& stats, double scale, Parallel parallel);                    \
  }

OCR_FOR_EACH_ISA(OCR_DECLARE)

namespace ocr_kernels::cpu {

void gather_forward(const Tensor& out, const Tensor& stats, const Tensor& feats, const Tensor& logits, double scale,
                    Parallel parallel) {
  static constexpr decltype(&gather_forward) variants[] = OCR_VARIANTS(gather_forward);
  variants[int(chosen_isa())](out, stats, feats, logits, scale, parallel);
}

void gather_backward(const Tensor& dfeats, const Tensor& dlogits, const Tensor& grad, const Tensor& feats,
                     const Tensor& logits, const Tensor& stats, double scale, Parallel parallel) {
  static constexpr decltype(&gather_backward) variants[] = OCR_VARIANTS(gather_backward);
  variants[int(chosen_isa())](dfeats, dlogits, grad, feats, logits, stats, scale, parallel);
}

}  // namespace ocr_kernels::cpu
