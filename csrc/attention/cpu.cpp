// Chooses the compilation of cpu_kernels.cpp that this processor runs best.
#include "cpu.h"

#include "../cpu/isa.h"

#define OCR_DECLARE(isa)                                                                                               \
  namespace ocr_kernels::isa {                                                                                         \
  void attention_forward(const Tensor& out, const Tensor& query, const Tensor& key, const Tensor& value, double scale, \
                         Parallel parallel);                                                                           \
  void attention_backward(const Tensor& dquery, const Tensor& dkey, const Tensor& dvalue, const Tensor& grad,          \
                          const Tensor& query, const Tensor& key, const Tensor& value, double scale,                   \
                          Parallel parallel);                                                                          \
  }

OCR_FOR_EACH_ISA(OCR_DECLARE)

namespace ocr_kernels::cpu {

void attention_forward(const Tensor& out, const Tensor& query, const Tensor& key, const Tensor& value, double scale,
                       Parallel parallel) {
  static constexpr decltype(&attention_forward) variants[] = OCR_VARIANTS(attention_forward);
  variants[int(chosen_isa())](out, query, key, value, scale, parallel);
}

void attention_backward(const Tensor& dquery, const Tensor& dkey, const Tensor& dvalue, const Tensor& grad,
                        const Tensor& query, const Tensor& key, const Tensor& value, double scale, Parallel parallel) {
  static constexpr decltype(&attention_backward) variants[] = OCR_VARIANTS(attention_backward);
  variants[int(chosen_isa())](dquery, dkey, dvalue, grad, query, key, value, scale, parallel);
}

}  // namespace ocr_kernels::cpu
