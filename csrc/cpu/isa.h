// Which of the compiled variants this processor runs. For files that are compiled without instruction set flags.
#pragma once

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#define OCR_X86_VARIANTS 1
#define OCR_FOR_EACH_ISA(f) f(portable) f(avx2) f(avx512) f(avx512bf16)
#define OCR_VARIANTS(f) {portable::f, avx2::f, avx512::f, avx512bf16::f}  // in the order of Isa
#else
#define OCR_FOR_EACH_ISA(f) f(portable)
#define OCR_VARIANTS(f) {portable::f}
#endif

namespace ocr_kernels {

enum class Isa { Portable, Avx2, Avx512, Avx512Bf16 };

inline Isa processor_isa() {
#if defined(OCR_X86_VARIANTS)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::Portable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return Isa::Avx2;
  return __builtin_cpu_supports("avx512bf16") ? Isa::Avx512Bf16 : Isa::Avx512;
#else
  return Isa::Portable;
#endif
}

constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "avx512bf16"};

// The environment variable OCR_KERNELS_ISA lowers it.
inline Isa chosen_isa() {
  static const Isa isa = [] {
    const char* wanted = std::getenv("OCR_KERNELS_ISA");
    const int best = int(processor_isa());
    if (!wanted || !*wanted) return Isa(best);
    std::string known;
    for (int i = 0; i <= best; ++i) {
      if (std::strcmp(wanted, kIsaNames[i]) == 0) return Isa(i);
      known += (i ? ", " : "") + std::string(kIsaNames[i]);
    }
    throw std::runtime_error("OCR_KERNELS_ISA must be one of " + known + " on this processor, but is " + wanted);
  }();
  return isa;
}

}  // namespace ocr_kernels
