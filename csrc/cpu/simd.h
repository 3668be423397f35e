// A SIMD vector for every instruction set from one source, in a namespace of that instruction set: nothing here
// may be shared between files compiled with different flags.
#pragma once

#include <stdint.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif
#if defined(FUSEDRNN_NEON)
#include <arm_neon.h>
#endif

#include <utility>

// Whether bfloat16 is multiplied by the dot products of AVX512-BF16; only bfloat16 is compiled then.
#ifndef FUSEDRNN_DOTS
#define FUSEDRNN_DOTS 0
#endif

#define FUSEDRNN_INLINE inline __attribute__((always_inline))
#define FUSEDRNN_COLD __attribute__((noinline))
// What tiles of sums are measured by: 16 registers of vectors, or 32.
#if FUSEDRNN_VECTOR_BYTES == 64 || defined(FUSEDRNN_NEON)
#define FUSEDRNN_MANY_REGISTERS 1
#else
#define FUSEDRNN_MANY_REGISTERS 0
#endif

#if defined(__clang__)
#define FUSEDRNN_UNROLL _Pragma("unroll 16")
#else
#define FUSEDRNN_UNROLL _Pragma("GCC unroll 16")
#endif

namespace fusedrnn::FUSEDRNN_CAPABILITY {

struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <typename C>
struct Format;
template <>
struct Format<float> {
  using Int = int32_t;
  typedef float Raw __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES), aligned(alignof(float)), may_alias));
  typedef int32_t RawInt __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  // At kOverflow 2^n is infinite already, beyond 89.07 n would leave the exponent; at kUnderflow it is normal still.
  static constexpr float kOverflow = 88.8f, kUnderflow = -87.0f, kTanhIsOne = 10.0f;
  static constexpr int kTerms = 7;
};
template <>
struct Format<double> {
  using Int = int64_t;
  typedef double Raw __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES), aligned(alignof(double)), may_alias));
  typedef int64_t RawInt __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  // As above, with 710.13.
  static constexpr double kOverflow = 709.9, kUnderflow = -708.0, kTanhIsOne = 20.0;
  static constexpr int kTerms = 13;
};

template <typename C>
struct Vec {
  static constexpr int kWidth = FUSEDRNN_VECTOR_BYTES / sizeof(C);
  using Int = typename Format<C>::Int;
  using Raw = typename Format<C>::Raw;
  using Unaligned = typename Format<C>::Unaligned;
  using RawInt = typename Format<C>::RawInt;

  Raw v;

  Vec() = default;
  FUSEDRNN_INLINE explicit Vec(C s) : v(s - Raw{}) {}
  FUSEDRNN_INLINE Vec(Raw raw) : v(raw) {}

  friend FUSEDRNN_INLINE Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend FUSEDRNN_INLINE Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend FUSEDRNN_INLINE Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend FUSEDRNN_INLINE Vec operator/(Vec a, Vec b) { return a.v / b.v; }
};

// exp(r) - 1 for |r| <= ln(2)/2.
template <typename C>
FUSEDRNN_INLINE Vec<C> expm1_of_reduced(Vec<C> r) {
  using F = Format<C>;
  constexpr double kFactorial[] = {1,    1,     2,      6,       24,       120,       720,
                                   5040, 40320, 362880, 3628800, 39916800, 479001600, 6227020800};
  typename Vec<C>::Raw p = C(1.0 / kFactorial[F::kTerms]) - typename Vec<C>::Raw{};
  FUSEDRNN_UNROLL
  for (int k = F::kTerms - 1; k >= 2; --k) p = p * r.v + C(1.0 / kFactorial[k]);
  return (p * r.v) * r.v + r.v;
}

// exp(r) - 1 for x = r + n ln(2), and 2^n.
template <typename C>
struct Reduced {
  Vec<C> expm1, scale;
};

template <typename C>
FUSEDRNN_INLINE Reduced<C> reduce(Vec<C> x) {
  using F = Format<C>;
  using V = Vec<C>;
  // Adding 1.5 * 2^mantissa rounds to an integer, which then sits in the low bits.
  const C magic = C(3) * C(typename F::Int(1) << (F::kMantissa - 1));
  const typename V::Raw shifted = x.v * C(1.44269504088896340736) + magic;
  const typename V::Raw n = shifted - magic;
  const V r = (x.v - n * F::kLn2High) - n * F::kLn2Low;
  const typename V::RawInt scale =
      ((typename V::RawInt)shifted << F::kMantissa) + (typename F::Int(F::kBias) << F::kMantissa);
  return {expm1_of_reduced(r), (typename V::Raw)scale};
}

// The smaller (larger) of a limit and x; NaN passes.
template <typename C>
FUSEDRNN_INLINE Vec<C> at_most(C limit, Vec<C> x) {
  return limit < x.v ? limit - typename Vec<C>::Raw{} : x.v;
}
template <typename C>
FUSEDRNN_INLINE Vec<C> at_least(C limit, Vec<C> x) {
  return limit > x.v ? limit - typename Vec<C>::Raw{} : x.v;
}
// a / b for b > 0; infinite b gives 0.
template <typename C>
FUSEDRNN_INLINE Vec<C> quotient(Vec<C> a, Vec<C> b) {
  return a / b;
}
#if FUSEDRNN_VECTOR_BYTES == 64 && defined(__AVX512F__)
FUSEDRNN_INLINE Vec<float> at_most(float limit, Vec<float> x) {
  return (Vec<float>::Raw)_mm512_min_ps(_mm512_set1_ps(limit), (__m512)x.v);
}
FUSEDRNN_INLINE Vec<float> at_least(float limit, Vec<float> x) {
  return (Vec<float>::Raw)_mm512_max_ps(_mm512_set1_ps(limit), (__m512)x.v);
}
// A division takes as long as all the rest of an activation: 14 bits and one Newton step are within an ulp or two.
// The limit keeps infinity * 0 out of the step, where the reciprocal is 0 already.
FUSEDRNN_INLINE Vec<float> quotient(Vec<float> a, Vec<float> b) {
  const Vec<float>::Raw d = at_most(__FLT_MAX__, b).v;
  const Vec<float>::Raw r = (Vec<float>::Raw)_mm512_rcp14_ps((__m512)b.v);
  return a.v * (r + r * (1.0f - d * r));
}
#endif

// From (n_max + 1/2) ln(2) = 88.38 (709.44) on 2^n is infinite, though exp may not be quite yet: 1 / (1 + infinity)
// is 0. Hence 2^n (1 + expm1), the second factor being positive: 2^n + 2^n expm1 may be infinity - infinity.
template <typename C>
FUSEDRNN_INLINE Vec<C> sigmoid(Vec<C> x) {
  using F = Format<C>;
  const Vec<C> m = at_least(F::kUnderflow, at_most(F::kOverflow, Vec<C>(-x.v)));
  const Reduced<C> e = reduce(m);
  return quotient(Vec<C>(C(1)), Vec<C>(C(1) + e.scale.v * (C(1) + e.expm1.v)));
}

// tanh |x| = e / (e + 2) with e = exp(2 |x|) - 1: precise near 0, and never infinite thanks to the clamp.
template <typename C>
FUSEDRNN_INLINE Vec<C> tanh(Vec<C> x) {
  using V = Vec<C>;
  using Int = typename V::RawInt;
  const typename V::Int sign_bit = typename V::Int(1) << (sizeof(C) * 8 - 1);
  const Int sign = (Int)x.v & sign_bit;
  const V a = at_most(Format<C>::kTanhIsOne, V((typename V::Raw)((Int)x.v ^ sign)));
  const Reduced<C> r = reduce(a + a);
  const typename V::Raw e = r.scale.v * r.expm1.v + (r.scale.v - C(1));
  return (typename V::Raw)((Int)quotient(V(e), V(e + C(2))).v | sign);
}

template <typename C>
FUSEDRNN_INLINE Vec<C> relu(Vec<C> x) {
  return at_least(C(0), x);
}

typedef uint16_t RawHalf __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES / 2)));
typedef uint16_t RawHalfUnaligned
    __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES / 2), aligned(alignof(uint16_t)), may_alias));
typedef uint32_t RawWord __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES)));

template <typename C>
FUSEDRNN_INLINE Vec<C> load(const C* p) {
  return Vec<C>((typename Vec<C>::Raw) * reinterpret_cast<const typename Vec<C>::Unaligned*>(p));
}
template <typename C>
FUSEDRNN_INLINE void store(C* p, Vec<C> x) {
  *reinterpret_cast<typename Vec<C>::Unaligned*>(p) = x.v;
}

// GCC makes several instructions of a conversion between vectors of 16 and 32 bits, where one will do.
FUSEDRNN_INLINE Vec<float> load(const Bfloat16* p) {
#if FUSEDRNN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return Vec<float>((Vec<float>::Raw)_mm512_slli_epi32(bits, 16));
#elif FUSEDRNN_VECTOR_BYTES == 32 && defined(__AVX2__)
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return Vec<float>((Vec<float>::Raw)_mm256_slli_epi32(bits, 16));
#elif defined(FUSEDRNN_NEON)
  return Vec<float>((Vec<float>::Raw)vshll_n_u16(vld1_u16(&p->bits), 16));
#else
  const RawHalf bits = *reinterpret_cast<const RawHalfUnaligned*>(p);
  return Vec<float>((Vec<float>::Raw)(__builtin_convertvector(bits, RawWord) << 16));
#endif
}
FUSEDRNN_INLINE void store(Bfloat16* p, Vec<float> x) {
  const RawWord bits = (RawWord)x.v;
  const RawWord rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const RawWord result = x.v == x.v ? rounded : 0x7fc0 - RawWord{};
#if FUSEDRNN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)result));
#elif FUSEDRNN_VECTOR_BYTES == 32 && defined(__AVX2__)
  const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)result, (__m256i)result), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(both));
#else
  *reinterpret_cast<RawHalfUnaligned*>(p) = __builtin_convertvector(result, RawHalf);
#endif
}

// Of numbers that stand side by side those in even places and those in odd ones, in an instruction each.
struct Pair {
  Vec<float> even, odd;
};
FUSEDRNN_INLINE Pair load_pair(const Bfloat16* p) {
  using Raw = Vec<float>::Raw;
  const RawWord both = (RawWord) * reinterpret_cast<const Vec<float>::Unaligned*>(p);
  return {Vec<float>((Raw)(both << 16)), Vec<float>((Raw)(both & 0xffff0000u))};
}
// The same from there: what a load gave, there is nothing to round.
FUSEDRNN_INLINE void store_pair(Bfloat16* p, Pair x) {
  const RawWord both = ((RawWord)x.even.v >> 16) | (RawWord)x.odd.v;
  *reinterpret_cast<Vec<float>::Unaligned*>(p) = (Vec<float>::Raw)both;
}

// As store, for what a load gave: there is nothing to round.
template <typename P, typename C>
FUSEDRNN_INLINE void store_exact(P* p, Vec<C> x) {
  store(p, x);
}
#if FUSEDRNN_VECTOR_BYTES == 64 && defined(__AVX512F__)
FUSEDRNN_INLINE void store_exact(Bfloat16* p, Vec<float> x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)x.v, 16)));
}
#elif defined(FUSEDRNN_NEON)
FUSEDRNN_INLINE void store_exact(Bfloat16* p, Vec<float> x) { vst1_u16(&p->bits, vshrn_n_u32((uint32x4_t)x.v, 16)); }
#endif

FUSEDRNN_INLINE Vec<float> load(const Half* p) {
#if FUSEDRNN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return Vec<float>((Vec<float>::Raw)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif FUSEDRNN_VECTOR_BYTES == 32 && defined(__F16C__)
  return Vec<float>((Vec<float>::Raw)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(FUSEDRNN_NEON)
  return Vec<float>((Vec<float>::Raw)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))));
#else
  const RawWord bits = __builtin_convertvector((RawHalf) * reinterpret_cast<const RawHalfUnaligned*>(p), RawWord);
  const RawWord magnitude = (bits & 0x7fff) << 13;
  // A subnormal is 2^-14 (1 + mantissa) - 2^-14: of normal numbers, so that nobody flushes it to zero.
  const RawWord subnormal = (RawWord)((Vec<float>::Raw)(magnitude + (113u << 23)) - 0x1p-14f);
  const RawWord finite = (bits & 0x7c00) == 0 ? subnormal : magnitude + (112u << 23);
  const RawWord result = (bits & 0x7c00) == 0x7c00 ? (magnitude | 0x7f800000) : finite;
  return Vec<float>((Vec<float>::Raw)(result | ((bits & 0x8000) << 16)));
#endif
}
FUSEDRNN_INLINE void store(Half* p, Vec<float> x) {
#if FUSEDRNN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x.v, _MM_FROUND_TO_NEAREST_INT));
#elif FUSEDRNN_VECTOR_BYTES == 32 && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x.v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(FUSEDRNN_NEON)
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x.v)));
#else
  const RawWord sign = (RawWord)x.v & 0x80000000u;
  const RawWord a = (RawWord)x.v ^ sign;
  const RawWord normal = (a - (112u << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
  // Adding 0.5 lets the floating-point adder round a subnormal half into the low bits.
  const RawWord subnormal = (RawWord)((Vec<float>::Raw)a + 0.5f) - 0x3f000000u;
  RawWord result = a < (113u << 23) ? subnormal : normal;
  result = a >= (143u << 23) ? 0x7c00 - RawWord{} : result;
  result = a > 0x7f800000u ? 0x7e00 - RawWord{} : result;
  *reinterpret_cast<RawHalfUnaligned*>(p) = __builtin_convertvector(result | (sign >> 16), RawHalf);
#endif
}

// Whole numbers of 8 bits.
typedef int8_t RawByte __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES / 4)));
typedef int8_t RawByteUnaligned
    __attribute__((vector_size(FUSEDRNN_VECTOR_BYTES / 4), aligned(alignof(int8_t)), may_alias));
FUSEDRNN_INLINE Vec<float> load(const int8_t* p) {
#if FUSEDRNN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return (Vec<float>::Raw)_mm512_cvtepi32_ps(wide);
#elif FUSEDRNN_VECTOR_BYTES == 32 && defined(__AVX2__)
  const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return (Vec<float>::Raw)_mm256_cvtepi32_ps(wide);
#elif defined(FUSEDRNN_NEON)
  uint32_t four;
  __builtin_memcpy(&four, p, 4);
  return (Vec<float>::Raw)vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four)))));
#else
  const RawByte bytes = *reinterpret_cast<const RawByteUnaligned*>(p);
  return __builtin_convertvector(__builtin_convertvector(bytes, Vec<float>::RawInt), Vec<float>::Raw);
#endif
}
FUSEDRNN_INLINE void store_exact(int8_t* p, Vec<float> x) {
  const Vec<float>::RawInt wide = __builtin_convertvector(x.v, Vec<float>::RawInt);
#if FUSEDRNN_VECTOR_BYTES == 64 && defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)wide));
#else
  *reinterpret_cast<RawByteUnaligned*>(p) = __builtin_convertvector(wide, RawByte);
#endif
}

#if FUSEDRNN_VECTOR_BYTES == 64 && defined(__AVX512F__)
FUSEDRNN_INLINE __mmask16 first_lanes(int64_t count) { return __mmask16(count > 0 ? (1u << count) - 1 : 0); }
template <typename C>
FUSEDRNN_INLINE Vec<float> load_tail(const float* p, int64_t count) {
  return (Vec<float>::Raw)_mm512_maskz_loadu_ps(first_lanes(count), p);
}
template <typename C>
FUSEDRNN_INLINE Vec<float> load_tail(const Bfloat16* p, int64_t count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(count), p);
  return (Vec<float>::Raw)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
template <typename C>
FUSEDRNN_INLINE Vec<float> load_tail(const Half* p, int64_t count) {
  return (Vec<float>::Raw)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}
FUSEDRNN_INLINE void store_tail(float* p, Vec<float> x, int64_t count) {
  _mm512_mask_storeu_ps(p, first_lanes(count), (__m512)x.v);
}
#elif FUSEDRNN_VECTOR_BYTES == 32 && defined(__AVX2__)
FUSEDRNN_INLINE __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
template <typename C>
FUSEDRNN_INLINE Vec<float> load_tail(const float* p, int64_t count) {
  return (Vec<float>::Raw)_mm256_maskload_ps(p, first_lanes(count));
}
FUSEDRNN_INLINE void store_tail(float* p, Vec<float> x, int64_t count) {
  _mm256_maskstore_ps(p, first_lanes(count), (__m256)x.v);
}
#endif
template <typename C, typename E>
FUSEDRNN_COLD Vec<C> load_tail(const E* p, int64_t count) {
  E padded[Vec<C>::kWidth] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load(static_cast<const E*>(padded));
}
template <typename C, typename E>
FUSEDRNN_COLD void store_tail(E* p, Vec<C> x, int64_t count) {
  E padded[Vec<C>::kWidth];
  store(padded, x);
  for (int64_t i = 0; i < count; ++i) p[i] = padded[i];
}

// The first `count` of a vector; the others are zero.
template <typename C, typename E>
FUSEDRNN_INLINE Vec<C> load(const E* p, int64_t count) {
  return count >= Vec<C>::kWidth ? load(p) : load_tail<C>(p, count);
}
template <typename C, typename E>
FUSEDRNN_INLINE void store(E* p, Vec<C> x, int64_t count) {
  count >= Vec<C>::kWidth ? store(p, x) : store_tail(p, x, count);
}

// x as a tensor of E would give it back.
template <typename E, typename C>
FUSEDRNN_INLINE Vec<C> rounded(Vec<C> x) {
  if constexpr (sizeof(E) == sizeof(C)) {
    return x;
  } else {
    E stored[Vec<C>::kWidth];
    store(stored, x);
    return load(static_cast<const E*>(stored));
  }
}

// Of the lanes of a and of b: with kHigh every second block of kBlock lanes, else the others, those of a first of each
// two. The indices are constants, which is all that clang takes.
template <int kBlock, bool kHigh, typename V, int... l>
FUSEDRNN_INLINE typename V::Raw blocks(V a, V b, std::integer_sequence<int, l...>) {
  constexpr int kWidth = sizeof...(l), kSkip = kHigh ? kBlock : 0;
#if defined(__clang__)
  return __builtin_shufflevector(a.v, b.v, (l & kBlock ? kWidth + l - kBlock + kSkip : l + kSkip)...);
#else
  return __builtin_shuffle(a.v, b.v, typename V::RawInt{(l & kBlock ? kWidth + l - kBlock + kSkip : l + kSkip)...});
#endif
}

// rows[i] lane j <-> rows[j] lane i: swap the off-diagonal blocks of size kBlock, 1, 2, 4 and so on.
template <int kBlock, int kWidth, typename V>
FUSEDRNN_INLINE void transpose(V* rows) {
  if constexpr (kBlock < kWidth) {
    constexpr std::make_integer_sequence<int, kWidth> kLanes;
    FUSEDRNN_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      if (i & kBlock) continue;
      const V a = rows[i], b = rows[i + kBlock];
      rows[i] = blocks<kBlock, false>(a, b, kLanes);
      rows[i + kBlock] = blocks<kBlock, true>(a, b, kLanes);
    }
    transpose<kBlock * 2, kWidth>(rows);
  }
}

// Lane j is the sum of all lanes of rows[j]; the rows are used up.
template <int kBlock, int kWidth, typename V>
FUSEDRNN_INLINE V fold(V* rows) {
  if constexpr (kBlock == kWidth) {
    return rows[0];
  } else {
    constexpr std::make_integer_sequence<int, kWidth> kLanes;
    FUSEDRNN_UNROLL
    for (int i = 0; i < kWidth; i += 2 * kBlock) {
      const V a = rows[i], b = rows[i + kBlock];
      rows[i] = blocks<kBlock, false>(a, b, kLanes) + blocks<kBlock, true>(a, b, kLanes);
    }
    return fold<kBlock * 2, kWidth>(rows);
  }
}

}  // namespace fusedrnn::FUSEDRNN_CAPABILITY
