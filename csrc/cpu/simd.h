// Vectors of float and double as wide as the instruction set this file is compiled for, and the four element types.
//
// A file of kernels is compiled once per instruction set with -DOCR_ISA=<name>. The inline namespace keeps the
// compilations apart, so that the linker never hands one processor's code to another; for the same reason nothing here
// or in the kernels calls a template or inline function of the standard library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../tensor.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>  // which every such processor has
#endif

#if !defined(OCR_ISA)
#define OCR_ISA portable
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define OCR_INLINE __forceinline
#define OCR_UNROLL
#define OCR_PREFETCH(address)
#else
#define OCR_PREFETCH(address) __builtin_prefetch(address)
#define OCR_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define OCR_UNROLL _Pragma("unroll")
#else
#define OCR_UNROLL _Pragma("GCC unroll 32")
#endif
#endif

namespace ocr_kernels {
inline namespace OCR_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#if defined(__GNUC__)
template <class T, int bytes = kVectorBytes>
struct Native {
  typedef T type __attribute__((vector_size(bytes)));
};
template <class T, int bytes = kVectorBytes>
using Lanes = typename Native<T, bytes>::type;
#else
template <class T>
struct Lanes {
  T lane[kVectorBytes / sizeof(T)];
  T& operator[](int i) { return lane[i]; }
  T operator[](int i) const { return lane[i]; }
};
#define OCR_LANEWISE(op)                                                                                               \
  template <class T>                                                                                                   \
  OCR_INLINE Lanes<T> operator op(const Lanes<T>& a, const Lanes<T>& b) {                                              \
    Lanes<T> r;                                                                                                        \
    for (int i = 0; i < int(kVectorBytes / sizeof(T)); ++i) r[i] = a[i] op b[i];                                       \
    return r;                                                                                                          \
  }
OCR_LANEWISE(+)
OCR_LANEWISE(-)
OCR_LANEWISE(*)
OCR_LANEWISE(/)
#undef OCR_LANEWISE
#endif

template <class T>
struct Vec {
  static constexpr int size = kVectorBytes / sizeof(T);
  Lanes<T> v;
  OCR_INLINE Vec operator+(Vec o) const { return {v + o.v}; }
  OCR_INLINE Vec operator-(Vec o) const { return {v - o.v}; }
  OCR_INLINE Vec operator*(Vec o) const { return {v * o.v}; }
  OCR_INLINE Vec operator/(Vec o) const { return {v / o.v}; }
};

template <class To, class From>
OCR_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// ---- one element of any type, by way of float

OCR_INLINE float to_float(float x) { return x; }
OCR_INLINE double to_float(double x) { return x; }
OCR_INLINE float to_float(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
OCR_INLINE float to_float(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  uint32_t bits = (magnitude << 13) + (112u << 23);  // the exponent's bias goes from 15 to 127
  if (magnitude >= 0x7c00) bits += 112u << 23;       // infinity and NaN
  if (magnitude < 0x0400) bits = bit_cast<uint32_t>(float(magnitude) * 0x1p-24f);  // subnormal
  return bit_cast<float>(bits | sign);
}

template <class T>
struct From {
  static OCR_INLINE T value(double x) { return T(x); }
};
template <>
struct From<BFloat16> {
  static OCR_INLINE BFloat16 value(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    if (x != x) return {uint16_t((bits >> 16) | 0x40)};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // to nearest, ties to even
  }
};
template <>
struct From<Float16> {
  static OCR_INLINE Float16 value(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude >= 0x47800000) {  // 65536 and above, infinity, NaN
      half = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    } else if (magnitude < 0x38800000) {  // subnormal: 0.5 has its last bit at 2^-24, so the addition rounds there
      half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
    } else {
      half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
    }
    return {uint16_t(half | ((bits >> 16) & 0x8000))};
  }
};
template <class T, class Lane>
OCR_INLINE T from_float(Lane x) {
  return From<T>::value(x);
}

// ---- loads and stores of whole vectors; Lane is the type of the lanes, T that of memory

template <class Lane>
OCR_INLINE Vec<Lane> broadcast(Lane x) {
#if defined(__GNUC__)
  return {x - Lanes<Lane>{}};  // a scalar mixed with a vector is broadcast; x - 0 is x, its sign and NaN kept
#else
  Vec<Lane> r;
  for (int i = 0; i < Vec<Lane>::size; ++i) r.v[i] = x;
  return r;
#endif
}

template <class Lane, class T>
struct Memory {
  static OCR_INLINE Vec<Lane> load(const T* p) {
    Vec<Lane> r;
    for (int i = 0; i < Vec<Lane>::size; ++i) r.v[i] = Lane(to_float(p[i]));
    return r;
  }
  static OCR_INLINE void store(T* p, Vec<Lane> x) {
    for (int i = 0; i < Vec<Lane>::size; ++i) p[i] = from_float<T>(x.v[i]);
  }
};
template <class Lane>
struct Memory<Lane, Lane> {
  static OCR_INLINE Vec<Lane> load(const Lane* p) {
    Vec<Lane> r;
    memcpy(&r, p, sizeof r);
    return r;
  }
  static OCR_INLINE void store(Lane* p, Vec<Lane> x) { memcpy(p, &x, sizeof x); }
};

#if defined(__GNUC__)
template <>
struct Memory<float, BFloat16> {
  using Half = Lanes<uint16_t, kVectorBytes / 2>;
  static OCR_INLINE Vec<float> load(const BFloat16* p) {
    Half half;
    memcpy(&half, p, sizeof half);
    return {bit_cast<Lanes<float>>(__builtin_convertvector(half, Lanes<uint32_t>) << 16)};
  }
  static OCR_INLINE void store(BFloat16* p, Vec<float> x) {
    const auto bits = bit_cast<Lanes<uint32_t>>(x.v), top = bits >> 16;
    const auto rounded = (bits + 0x7fff + (top & 1)) >> 16;
    const Half half = __builtin_convertvector(x.v == x.v ? rounded : (top | 0x40), Half);
    memcpy(p, &half, sizeof half);
  }
};
#endif

#if defined(__AVX512F__)
template <>
struct Memory<float, Float16> {
  static OCR_INLINE Vec<float> load(const Float16* p) {
    return {(Lanes<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static OCR_INLINE void store(Float16* p, Vec<float> x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x.v, _MM_FROUND_TO_NEAREST_INT));
  }
};
#elif defined(__AVX2__)
template <>
struct Memory<float, Float16> {
  static OCR_INLINE Vec<float> load(const Float16* p) {
    return {(Lanes<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static OCR_INLINE void store(Float16* p, Vec<float> x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x.v, _MM_FROUND_TO_NEAREST_INT));
  }
};
#elif defined(__aarch64__)
template <>
struct Memory<float, Float16> {
  static OCR_INLINE Vec<float> load(const Float16* p) {
    float16x4_t half;
    memcpy(&half, p, sizeof half);
    return {(Lanes<float>)vcvt_f32_f16(half)};
  }
  static OCR_INLINE void store(Float16* p, Vec<float> x) {
    const float16x4_t half = vcvt_f16_f32((float32x4_t)x.v);
    memcpy(p, &half, sizeof half);
  }
};
#endif

template <class Lane, class T>
OCR_INLINE Vec<Lane> load(const T* p) {
  return Memory<Lane, T>::load(p);
}
template <class T, class Lane>
OCR_INLINE void store(T* p, Vec<Lane> x) {
  Memory<Lane, T>::store(p, x);
}

// The first `count` lanes; the others are 0 in the vector and untouched in memory.
template <class Lane, class T>
OCR_INLINE Vec<Lane> load(const T* p, int64_t count) {
  constexpr int lanes = Vec<Lane>::size, elements = kVectorBytes / sizeof(T);
  T buffer[lanes > elements ? lanes : elements] = {};
  memcpy(buffer, p, size_t(count) * sizeof(T));
  return load<Lane>(buffer);
}
template <class T, class Lane>
OCR_INLINE void store(T* p, Vec<Lane> x, int64_t count) {
  T buffer[Vec<Lane>::size];
  store(buffer, x);
  memcpy(p, buffer, size_t(count) * sizeof(T));
}

// How much of a vector is there, for code that is compiled for either.
struct Whole {};
struct Part {
  int64_t count;
};
template <class Lane, class T>
OCR_INLINE Vec<Lane> load(const T* p, Whole) {
  return load<Lane>(p);
}
template <class Lane, class T>
OCR_INLINE Vec<Lane> load(const T* p, Part part) {
  return load<Lane>(p, part.count);
}
template <class T, class Lane>
OCR_INLINE void store(T* p, Vec<Lane> x, Whole) {
  store(p, x);
}
template <class T, class Lane>
OCR_INLINE void store(T* p, Vec<Lane> x, Part part) {
  store(p, x, part.count);
}
template <class Lane>
OCR_INLINE Vec<Lane> only(Vec<Lane> x, Whole) {
  return x;
}
template <class Lane>
OCR_INLINE Vec<Lane> only(Vec<Lane> x, Part part) {  // with 0 in the lanes that are not there
  Lane lanes[Vec<Lane>::size];
  store(lanes, x);
  return load<Lane>(lanes, part.count);
}

// ---- arithmetic

// a * b + c
OCR_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return {(Lanes<float>)_mm512_fmadd_ps((__m512)a.v, (__m512)b.v, (__m512)c.v)};
#elif defined(__AVX2__)
  return {(Lanes<float>)_mm256_fmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v)};
#elif defined(__aarch64__)
  return {(Lanes<float>)vfmaq_f32((float32x4_t)c.v, (float32x4_t)a.v, (float32x4_t)b.v)};
#else
  return a * b + c;
#endif
}
OCR_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return {(Lanes<double>)_mm512_fmadd_pd((__m512d)a.v, (__m512d)b.v, (__m512d)c.v)};
#elif defined(__AVX2__)
  return {(Lanes<double>)_mm256_fmadd_pd((__m256d)a.v, (__m256d)b.v, (__m256d)c.v)};
#elif defined(__aarch64__)
  return {(Lanes<double>)vfmaq_f64((float64x2_t)c.v, (float64x2_t)a.v, (float64x2_t)b.v)};
#else
  return a * b + c;
#endif
}

// Where `b` is NaN, `a`; where `a` is NaN, NaN.
template <class Lane>
OCR_INLINE Vec<Lane> max(Vec<Lane> a, Vec<Lane> b) {
#if defined(__GNUC__)
  return {b.v > a.v ? b.v : a.v};
#else
  for (int i = 0; i < Vec<Lane>::size; ++i) a.v[i] = b.v[i] > a.v[i] ? b.v[i] : a.v[i];
  return a;
#endif
}
template <class Lane>
OCR_INLINE Vec<Lane> min(Vec<Lane> a, Vec<Lane> b) {
#if defined(__GNUC__)
  return {b.v < a.v ? b.v : a.v};
#else
  for (int i = 0; i < Vec<Lane>::size; ++i) a.v[i] = b.v[i] < a.v[i] ? b.v[i] : a.v[i];
  return a;
#endif
}

// x where a is above the limit, else y
template <class Lane>
OCR_INLINE Vec<Lane> if_above(Vec<Lane> a, Lane limit, Vec<Lane> x, Vec<Lane> y = Vec<Lane>()) {
#if defined(__GNUC__)
  return {a.v > limit ? x.v : y.v};
#else
  for (int i = 0; i < Vec<Lane>::size; ++i) x.v[i] = a.v[i] > limit ? x.v[i] : y.v[i];
  return x;
#endif
}

// x where a is the limit or below it, else y, also where a is NaN
template <class Lane>
OCR_INLINE Vec<Lane> if_at_most(Vec<Lane> a, Lane limit, Vec<Lane> x, Vec<Lane> y) {
#if defined(__GNUC__)
  return {a.v <= limit ? x.v : y.v};
#else
  for (int i = 0; i < Vec<Lane>::size; ++i) x.v[i] = a.v[i] <= limit ? x.v[i] : y.v[i];
  return x;
#endif
}

// Over the lanes, in halves: a fixed order.
template <class Lane>
OCR_INLINE Lane sum(Vec<Lane> x) {
  Lane lane[Vec<Lane>::size];
  store(lane, x);
  for (int half = Vec<Lane>::size / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}
template <class Lane>
OCR_INLINE Lane max_lane(Vec<Lane> x) {
  Lane lane[Vec<Lane>::size];
  store(lane, x);
  Lane result = lane[0];
  for (int i = 1; i < Vec<Lane>::size; ++i) result = lane[i] > result ? lane[i] : result;
  return result;
}

template <int... i>
struct Indices {};
template <int n, int... rest>
struct Count : Count<n - 1, n - 1, rest...> {};
template <int... all>
struct Count<0, all...> {
  using type = Indices<all...>;
};

// Lane step of a transposition: a's lanes with bit `half` set change places with b's lanes with it clear.
template <int half, class Lane, int... i>
OCR_INLINE void exchange_lanes(Vec<Lane>& a, Vec<Lane>& b, Indices<i...>) {
#if defined(__GNUC__)
  constexpr int size = Vec<Lane>::size;
  const Lanes<Lane> x = a.v, y = b.v;
#if defined(__clang__)
  a.v = __builtin_shufflevector(x, y, (i & half ? size + i - half : i)...);
  b.v = __builtin_shufflevector(x, y, (i & half ? size + i : i + half)...);
#else
  using Index = decltype(x < y);
  a.v = __builtin_shuffle(x, y, Index{(i & half ? size + i - half : i)...});
  b.v = __builtin_shuffle(x, y, Index{(i & half ? size + i : i + half)...});
#endif
#else
  const Vec<Lane> x = a, y = b;
  for (int lane = 0; lane < Vec<Lane>::size; ++lane) {
    a.v[lane] = lane & half ? y.v[lane - half] : x.v[lane];
    b.v[lane] = lane & half ? y.v[lane] : x.v[lane + half];
  }
#endif
}
template <int half, class Lane>
OCR_INLINE void exchange(Vec<Lane>& a, Vec<Lane>& b) {
  exchange_lanes<half>(a, b, typename Count<Vec<Lane>::size>::type{});
}

// x[i][j] becomes x[j][i], for as many vectors as they have lanes.
template <class Lane, int half = Vec<Lane>::size / 2>
OCR_INLINE void transpose(Vec<Lane>* x) {
  if constexpr (half > 0) {
    OCR_UNROLL
    for (int i = 0; i < Vec<Lane>::size; ++i)
      if (!(i & half)) exchange<half>(x[i], x[i + half]);
    transpose<Lane, half / 2>(x);
  }
}

// exp(x) = 2^n exp(r) with n the integer nearest to x / ln 2, and the Taylor series of exp(r), |r| <= ln(2) / 2.
template <class Lane>
struct Exp;
template <>
struct Exp<float> {
  using Int = int32_t;
  static constexpr int degree = 7, mantissa = 23, bias = 127;
  static constexpr float lowest = -104.f, highest = 89.f;                     // beyond: exp is 0, or infinite
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;  // n * ln2_high is exact
  static constexpr float round = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
};
template <>
struct Exp<double> {
  using Int = int64_t;
  static constexpr int degree = 13, mantissa = 52, bias = 1023;
  static constexpr double lowest = -746., highest = 710.;
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double round = 0x1.8p52;
};

template <class Lane>
OCR_INLINE Vec<Lane> exp(Vec<Lane> x) {
#if defined(__GNUC__)
  using E = Exp<Lane>;
  using Int = Lanes<typename E::Int>;
  constexpr Lane reciprocal[] = {1,
                                 1,
                                 Lane(1) / 2,
                                 Lane(1) / 6,
                                 Lane(1) / 24,
                                 Lane(1) / 120,
                                 Lane(1) / 720,
                                 Lane(1) / 5040,
                                 Lane(1) / 40320,
                                 Lane(1) / 362880,
                                 Lane(1) / 3628800,
                                 Lane(1) / 39916800,
                                 Lane(1) / 479001600,
                                 Lane(1) / 6227020800.};
  x = min(max(x, broadcast<Lane>(E::lowest)), broadcast<Lane>(E::highest));  // NaN stays
  const Vec<Lane> shifted = fma(x, broadcast<Lane>(Lane(1.4426950408889634074)), broadcast<Lane>(E::round));
  const Vec<Lane> n = shifted - broadcast<Lane>(E::round);
  const Vec<Lane> r = fma(n, broadcast<Lane>(-E::ln2_low), fma(n, broadcast<Lane>(-E::ln2_high), x));
  Vec<Lane> power = broadcast(reciprocal[E::degree]);
  OCR_UNROLL
  for (int i = E::degree - 1; i >= 0; --i) power = fma(power, r, broadcast(reciprocal[i]));
  // 2^n in two factors, each a normal number even where the result is subnormal or infinite
  const Int whole = bit_cast<Int>(shifted.v) - bit_cast<Int>(broadcast<Lane>(E::round).v), half = whole >> 1;
  const Vec<Lane> first = {bit_cast<Lanes<Lane>>((half + E::bias) << E::mantissa)};
  const Vec<Lane> second = {bit_cast<Lanes<Lane>>((whole - half + E::bias) << E::mantissa)};
  return power * first * second;
#else
  for (int i = 0; i < Vec<Lane>::size; ++i) x.v[i] = Lane(std::exp(double(x.v[i])));
  return x;
#endif
}

}  // namespace OCR_ISA
}  // namespace ocr_kernels
