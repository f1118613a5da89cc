// What the kernels for GPUs are written with, in namespace gpu. nvcc makes CUDA of it. Any other compiler makes the
// same kernels run on a CPU, thread by thread (on_host.h): so they are tested where there is no GPU.
#pragma once

#include "../arguments.h"

namespace ocr_kernels::gpu {

constexpr int kThreads = 256;  // of every block
constexpr int kWarps = kThreads / 32;

// The type of sums over elements of T, and what the weights are multiplied by on their way into a product: at
// most 1, they would be subnormal in float16 below 2^-14.
template <class T>
struct Arithmetic {
  using Accumulator = float;
  static constexpr float lift = 1;
};
template <>
struct Arithmetic<double> {
  using Accumulator = double;
  static constexpr double lift = 1;
};
template <>
struct Arithmetic<Float16> {
  using Accumulator = float;
  static constexpr float lift = 32768;
};
template <class T>
using AccumulatorOf = typename Arithmetic<T>::Accumulator;

// Sixteen bytes in registers.
struct alignas(16) Vector {
  uint32_t word[4];
};

}  // namespace ocr_kernels::gpu

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

#define OCR_KERNEL __global__ void __launch_bounds__(kThreads, 2)
#define OCR_DEVICE __device__ __forceinline__
#define OCR_UNROLL _Pragma("unroll")
#define OCR_UNROLL_BY(n) OCR_PRAGMA(unroll n)
#define OCR_PRAGMA(text) _Pragma(#text)

namespace ocr_kernels::gpu {

OCR_DEVICE int thread_index() { return int(threadIdx.x); }
// The same, but what is computed from it is computed where it is used, instead of taking registers throughout a loop.
OCR_DEVICE int thread_index_anew() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}
OCR_DEVICE int64_t block_index() { return blockIdx.x; }
OCR_DEVICE void synchronize() { __syncthreads(); }
OCR_DEVICE unsigned char* shared_memory() {
  extern __shared__ Vector memory[];
  return reinterpret_cast<unsigned char*>(memory);
}

// The value of the lane whose index differs in the bits of `mask`.
template <class Accumulator>
OCR_DEVICE Accumulator shuffle_xor(Accumulator value, int mask) {
  return __shfl_xor_sync(0xffffffff, value, mask);
}

OCR_DEVICE float to_accumulator(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
OCR_DEVICE float to_accumulator(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
OCR_DEVICE float to_accumulator(float x) { return x; }
OCR_DEVICE double to_accumulator(double x) { return x; }

template <class T>
struct Narrow {
  static OCR_DEVICE T value(double x) { return T(x); }
};
template <>
struct Narrow<BFloat16> {
  static OCR_DEVICE BFloat16 value(float x) { return {__bfloat16_as_ushort(__float2bfloat16_rn(x))}; }
};
template <>
struct Narrow<Float16> {
  static OCR_DEVICE Float16 value(float x) { return {__half_as_ushort(__float2half_rn(x))}; }
};

OCR_DEVICE float exponential(float x) { return expf(x); }
OCR_DEVICE double exponential(double x) { return exp(x); }
OCR_DEVICE float max(float a, float b) { return fmaxf(a, b); }
OCR_DEVICE double max(double a, double b) { return fmax(a, b); }

OCR_DEVICE void stop() { __trap(); }

OCR_DEVICE Vector load_vector(const void* p) {
  const uint4 v = __ldg(static_cast<const uint4*>(p));
  return {{v.x, v.y, v.z, v.w}};
}

// Four 8x8 matrices of 16-bit numbers from shared memory: lane l brings the address of row l % 8 of matrix l / 8 and
// gets of each matrix the numbers 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; transposed, of column l / 4.
template <class T>
OCR_DEVICE void load_matrices(uint32_t (&to)[4], const T* row, bool transposed) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  if (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// sums [16, 8] += a [16, 16] b [16, 8], in the matrix units' distribution over the lanes of a warp: with g = lane / 4
// and t = 2 (lane % 4), a holds the pairs (g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8), b those at (t, g), (t + 8,
// g), pairs going down the inner dimension, and sums (g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1).
OCR_DEVICE void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Float16) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  for (int half = 0; half < 2; ++half)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}
OCR_DEVICE void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // no matrix unit takes bfloat16: every lane fetches the rows and columns of its sums
  const int lane = thread_index() % 32, t = lane % 4;
  for (int half = 0; half < 2; ++half)
    for (int from = 0; from < 4; ++from) {
      const uint32_t rows[2] = {__shfl_sync(0xffffffff, a[2 * half], lane / 4 * 4 + from),
                                __shfl_sync(0xffffffff, a[2 * half + 1], lane / 4 * 4 + from)};
      const uint32_t columns[2] = {__shfl_sync(0xffffffff, b[half], 8 * t + from),
                                   __shfl_sync(0xffffffff, b[half], 8 * t + 4 + from)};
      for (int i = 0; i < 4; ++i) {
        const uint32_t x = rows[i / 2], y = columns[i % 2];
        sums[i] = fmaf(__uint_as_float(x << 16), __uint_as_float(y << 16), sums[i]);
        sums[i] = fmaf(__uint_as_float(x & 0xffff0000), __uint_as_float(y & 0xffff0000), sums[i]);
      }
    }
#endif
}

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), int64_t blocks, int shared_bytes, const Queue& queue,
            const Parameters&... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error("the tensors are too large for one launch");
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  kernel<<<unsigned(blocks), kThreads, size_t(shared_bytes), static_cast<cudaStream_t>(queue.stream)>>>(arguments...);
  check(cudaGetLastError());
}

}  // namespace ocr_kernels::gpu

#else
#include "on_host.h"
#endif
