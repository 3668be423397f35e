// Products of float32 rows with int8 weights in whole numbers, where the processor multiplies bytes: nothing is
// widened.
//
// A row becomes whole numbers of some digits of 8 bits, of which each is multiplied by the weights in bytes, and the
// products are summed in 32 bits, exactly. The panel has the weights of four of the depth side by side,
// [depth / 4][kVectors][W lanes][4].
//
// As it is (AVX512-VNNI): x = q * unit, the unit being 2^-22 or 2^-23 of the row's largest |x|, an error of at most
// 2^-23 of the largest, which is what the rounding of a float32 sum comes to. q + 2^23 has three digits without a sign.
// With Weights::kInt8Both the row is rounded to whole numbers of 8 bits, one digit: the unit is 1/127 of its largest
// |x|. Where nothing multiplies digits, the same whole numbers are multiplied as floats.
//
// AVX512-VNNI multiplies bytes without a sign, q + 128, and behind the panel there are the sums of its columns, int32
// [kVectors][W], for what was added. AVX2 has sums of pairs in 16 bits, which hold 2 * 127 * 128: |q| times w, or
// times ~w = -w - 1 where q is negative; behind the row there is what those -1 come to.
// Intel 64 and IA-32 Architectures Software Developer's Manual, VPDPBUSD, VPMADDUBSW.
#pragma once

#include <stdint.h>
#include <string.h>

#include "panels.h"

namespace fusedrnn::FUSEDRNN_CAPABILITY {

// What multiplies digits in this file's instruction set.
#if FUSEDRNN_VECTOR_BYTES == 64 && defined(__AVX512F__) && !FUSEDRNN_TILES && !defined(FUSEDRNN_CELL)
#define FUSEDRNN_VNNI 1
#else
#define FUSEDRNN_VNNI 0
#endif
#if FUSEDRNN_VECTOR_BYTES == 32 && defined(__AVX2__) && !FUSEDRNN_TILES && !defined(FUSEDRNN_CELL)
#define FUSEDRNN_BYTE_PAIRS 1
#else
#define FUSEDRNN_BYTE_PAIRS 0
#endif
constexpr bool kDigits = FUSEDRNN_VNNI || FUSEDRNN_BYTE_PAIRS;

struct Digits {
  static constexpr int kExact = 3, kRounded = 1;  // of a row
  static constexpr int kMost = FUSEDRNN_VNNI ? kExact : kRounded;
  // Sums of a longer depth might not fit.
  static constexpr int64_t kMostDepth = 1 << 16;
  static constexpr int64_t fours(int64_t depth) { return divide_up(depth, 4); }
  // Of a digit of a row, so that whole vectors can be written.
  static constexpr int64_t digit(int64_t depth) {
    constexpr int64_t kBytes = FUSEDRNN_VNNI ? 16 : 32;
    return divide_up(depth, kBytes) * kBytes;
  }
  // Of a row: its digits, or |q|, the signs and the sum of |q| that is negative.
  static constexpr int64_t row(int count, int64_t depth) {
    return FUSEDRNN_BYTE_PAIRS ? 2 * digit(depth) + 32 : count * digit(depth);
  }
  static constexpr int64_t panel(int vectors, int64_t depth) {
    return (fours(depth) + FUSEDRNN_VNNI) * vectors * FUSEDRNN_VECTOR_BYTES;
  }
};

constexpr int32_t kInfinite = 0x7f800000;
// A row of less is rounded to 8 bits as if this was its largest: 127 / largest may be infinite.
constexpr float kLeast = 0x1p-100f;

// A row rounded to 8 bits, ties to even, in floats, and its unit; one that is not finite stays as it is. The numbers
// are those of to_digits.
inline void to_whole(float* to, float* unit, const float* x, int64_t depth) {
  int32_t largest = 0;
  for (int64_t k = 0; k < depth; ++k) {
    int32_t bits;
    memcpy(&bits, x + k, 4);
    bits &= 0x7fffffff;
    largest = largest > bits ? largest : bits;
  }
  if (largest >= kInfinite) {
    memcpy(to, x, static_cast<size_t>(depth) * 4);
    *unit = 1;
    return;
  }
  float most;
  memcpy(&most, &largest, 4);
  most = most < kLeast ? kLeast : most;
  const float scale = 127.0f / most;
  for (int64_t k = 0; k < depth; ++k) to[k] = __builtin_rintf(x[k] * scale);
  *unit = most / 127.0f;
}

// Whether rows are multiplied as digits, those rounded to 8 bits or those that are not.
inline bool has_digits([[maybe_unused]] bool rounded) {
#if FUSEDRNN_VNNI
  return __builtin_cpu_supports("avx512vnni");
#else
  return kDigits && rounded;
#endif
}

// The digits of rows, row(kCount, depth) bytes each, and their units; where a row is not finite they are nothing, the
// unit 0.
template <int kCount>
void to_digits(uint8_t* to, float* units, const float* const* rows, int64_t count, int64_t depth);

// sums[count][kVectors] = rows times one panel times the scales of its columns; `digits` and `units` are those of the
// rows.
template <int kCount, int kVectors>
void product_of_digits(Vec<float>* sums, const float* const* rows, const uint8_t* digits, const float* units,
                       int64_t count, const Vec<float>* scales, const int8_t* panel, int64_t depth);

#if FUSEDRNN_VNNI || FUSEDRNN_BYTE_PAIRS

// Whole arrays of accumulators, so that they live in registers.
#if defined(__clang__)
#define FUSEDRNN_UNROLL_ALL _Pragma("unroll 64")
#else
#define FUSEDRNN_UNROLL_ALL _Pragma("GCC unroll 64")
#endif

using Ints = Vec<float>::RawInt;
constexpr int kLanes = Vec<float>::kWidth;

FUSEDRNN_INLINE Ints load_ints(const void* p) {
  Ints found;
  memcpy(&found, p, sizeof(found));
  return found;
}

// Vector v of a panel of weight^T: lane j at depth k is weight[j][k]; lanes beyond `count` are zero.
FUSEDRNN_COLD inline void pack_fours(int8_t* panel, int vectors, int v, const int8_t* weight, int64_t stride,
                                     int64_t count, int64_t depth) {
  int32_t sums[kLanes] = {};
  const int64_t fours = Digits::fours(depth);
  for (int64_t k = 0; k < fours; ++k) {
    int8_t lanes[kLanes][4] = {};
    for (int64_t j = 0; j < min(count, kLanes); ++j) {
      memcpy(lanes[j], weight + j * stride + 4 * k, static_cast<size_t>(min(4, depth - 4 * k)));
      sums[j] += lanes[j][0] + lanes[j][1] + lanes[j][2] + lanes[j][3];
    }
    memcpy(panel + (k * vectors + v) * FUSEDRNN_VECTOR_BYTES, lanes, sizeof(lanes));
  }
  if (FUSEDRNN_VNNI) memcpy(panel + (fours * vectors + v) * FUSEDRNN_VECTOR_BYTES, sums, sizeof(sums));
}

#if FUSEDRNN_VNNI

FUSEDRNN_INLINE Ints larger(Ints a, Ints b) { return (Ints)_mm512_max_epi32((__m512i)a, (__m512i)b); }
FUSEDRNN_INLINE int32_t largest_lane(Ints a) { return _mm512_reduce_max_epi32((__m512i)a); }

template <int kCount>
FUSEDRNN_INLINE void digits_of_row(uint8_t* to, const float* x, float scale, int64_t depth) {
  constexpr int32_t kSign = 1 << (8 * kCount - 1);
  const int64_t digit = Digits::digit(depth);
  for (int64_t k = 0; k < depth; k += 16) {
    const Vec<float>::Raw scaled = load<float>(x + k, depth - k).v * scale;
    const __m512i rounded = _mm512_min_epi32(_mm512_cvtps_epi32((__m512)scaled), _mm512_set1_epi32(kSign - 1));
    const __m512i q = _mm512_add_epi32(rounded, _mm512_set1_epi32(kSign));
    FUSEDRNN_UNROLL
    for (int j = 0; j < kCount; ++j) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j * digit + k),
                       _mm512_cvtepi32_epi8(_mm512_srli_epi32(q, 8 * j)));
    }
  }
}

// With few sums several run side by side: one alone would wait for its own previous addition.
constexpr int ways_of_digits(int sums) { return sums >= 8 ? 1 : sums >= 3 ? 2 : 4; }
// What the registers hold: the sums, a weight for each of them, and a digit.
constexpr int most_rows_of_digits(int count, int vectors) {
  return 24 / (vectors == 3 && count > 1 ? 8 : vectors * count);
}

// What was added to q, 128 in its highest digit, is taken away beforehand.
template <int kCount, int kRows, int kVectors>
FUSEDRNN_INLINE void begin_digits(Ints* acc, const uint8_t*, int64_t, const int8_t* panel, int64_t depth) {
  const int8_t* const columns = panel + Digits::fours(depth) * kVectors * 64;
  FUSEDRNN_UNROLL_ALL
  for (int v = 0; v < kVectors; ++v) {
    const __m512i added = _mm512_slli_epi32(_mm512_loadu_si512(columns + v * 64), 7);
    FUSEDRNN_UNROLL_ALL
    for (int r = 0; r < kRows; ++r) {
      acc[(r * kCount + kCount - 1) * kVectors + v] = (Ints)_mm512_sub_epi32(_mm512_setzero_si512(), added);
    }
  }
}

// acc += four digits times four weights, in each lane. GCC 12 copies the accumulators of its intrinsic around.
FUSEDRNN_INLINE void multiply_four(Ints& acc, __m512i digits, __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(digits), "v"(weights));
}

// The same for rows from the four at k on.
template <int kCount, int kRows, int kVectors>
FUSEDRNN_INLINE void add_digits(Ints* acc, const uint8_t* rows, int64_t row_bytes, int64_t digit, const int8_t* panel,
                                int64_t k) {
  __m512i weight[kVectors];
  FUSEDRNN_UNROLL_ALL
  for (int v = 0; v < kVectors; ++v) weight[v] = _mm512_loadu_si512(panel + (k * kVectors + v) * 64);
  FUSEDRNN_UNROLL_ALL
  for (int i = 0; i < kRows * kCount; ++i) {
    int32_t four;
    memcpy(&four, rows + i / kCount * row_bytes + i % kCount * digit + 4 * k, 4);
    const __m512i x = _mm512_set1_epi32(four);
    FUSEDRNN_UNROLL_ALL
    for (int v = 0; v < kVectors; ++v) multiply_four(acc[i * kVectors + v], x, weight[v]);
  }
}

#else

FUSEDRNN_INLINE Ints larger(Ints a, Ints b) { return (Ints)_mm256_max_epi32((__m256i)a, (__m256i)b); }
FUSEDRNN_INLINE int32_t largest_lane(Ints a) {
  __m128i most = _mm_max_epi32(_mm256_castsi256_si128((__m256i)a), _mm256_extracti128_si256((__m256i)a, 1));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1)));
}

template <int kCount>
FUSEDRNN_INLINE void digits_of_row(uint8_t* to, const float* x, float scale, int64_t depth) {
  const int64_t digit = Digits::digit(depth);
  const auto eight = [&](int64_t k) __attribute__((always_inline)) {
    return _mm256_cvtps_epi32((__m256)(load<float>(x + k, depth - k).v * scale));
  };
  const __m256i zero = _mm256_setzero_si256();
  __m256i negative = zero;
  for (int64_t k = 0; k < depth; k += 32) {
    const __m256i low = _mm256_packs_epi32(eight(k), eight(k + 8)),
                  high = _mm256_packs_epi32(eight(k + 16), eight(k + 24));
    const __m256i q =
        _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    const __m256i magnitude = _mm256_abs_epi8(q), sign = _mm256_cmpgt_epi8(zero, q);
    negative = _mm256_add_epi64(negative, _mm256_sad_epu8(_mm256_and_si256(magnitude, sign), zero));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), magnitude);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + digit + k), sign);
  }
  int64_t sums[4];
  memcpy(sums, &negative, sizeof(sums));
  const int32_t sum = static_cast<int32_t>(sums[0] + sums[1] + sums[2] + sums[3]);
  memcpy(to + 2 * digit, &sum, sizeof(sum));
}

// The sums themselves wait for a cycle only; where they are few the loop would take as long as they do.
constexpr int ways_of_digits(int sums) { return sums >= 3 ? 1 : 4; }
// What the registers hold: the sums, |q|, its sign, a product and what adds up its halves.
constexpr int most_rows_of_digits(int, int vectors) { return vectors == 1 ? 8 : 12 / vectors; }

// |q| (-w - 1) is |q| too small.
template <int kCount, int kRows, int kVectors>
FUSEDRNN_INLINE void begin_digits(Ints* acc, const uint8_t* rows, int64_t row_bytes, const int8_t*, int64_t depth) {
  FUSEDRNN_UNROLL_ALL
  for (int r = 0; r < kRows; ++r) {
    int32_t negative;
    memcpy(&negative, rows + r * row_bytes + 2 * Digits::digit(depth), 4);
    FUSEDRNN_UNROLL_ALL
    for (int v = 0; v < kVectors; ++v) acc[r * kVectors + v] = negative - Ints{};
  }
}

template <int kCount, int kRows, int kVectors>
FUSEDRNN_INLINE void add_digits(Ints* acc, const uint8_t* rows, int64_t row_bytes, int64_t digit, const int8_t* panel,
                                int64_t k) {
  const __m256i ones = _mm256_set1_epi16(1);
  FUSEDRNN_UNROLL_ALL
  for (int r = 0; r < kRows; ++r) {
    int32_t magnitudes, signs;
    memcpy(&magnitudes, rows + r * row_bytes + 4 * k, 4);
    memcpy(&signs, rows + r * row_bytes + digit + 4 * k, 4);
    const __m256i magnitude = _mm256_set1_epi32(magnitudes), sign = _mm256_set1_epi32(signs);
    FUSEDRNN_UNROLL_ALL
    for (int v = 0; v < kVectors; ++v) {
      const __m256i weight = (__m256i)load_ints(panel + (k * kVectors + v) * 32);
      const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_xor_si256(weight, sign));
      // GCC 12 copies the accumulators of its intrinsic around.
      asm("vpaddd %1, %0, %0" : "+x"(acc[r * kVectors + v]) : "x"(_mm256_madd_epi16(pairs, ones)));
    }
  }
}

#endif

// The bits of the largest |x| of a row.
FUSEDRNN_INLINE int32_t largest_of(const float* x, int64_t depth) {
  Ints most = {};
  for (int64_t k = 0; k < depth; k += kLanes) {
    most = larger(most, (Ints)load<float>(x + k, depth - k).v & 0x7fffffff);
  }
  return largest_lane(most);
}

template <int kCount>
void to_digits(uint8_t* to, float* units, const float* const* rows, int64_t count, int64_t depth) {
  using Raw = Vec<float>::Raw;
  // A division takes as long for a vector of rows as for one.
  for (int64_t first = 0; first < count; first += kLanes) {
    const int64_t some = min(kLanes, count - first);
    alignas(64) int32_t largest[kLanes] = {};
    for (int64_t i = 0; i < some; ++i) largest[i] = largest_of(rows[first + i], depth);
    const Ints bits = load_ints(largest);
    Raw scale, unit;
    if constexpr (kCount == Digits::kRounded) {
      const Raw most = (Raw)larger(bits, (Ints)(kLeast - Raw{}));  // as whole numbers they have the same order
      scale = 127.0f / most;
      unit = most / 127.0f;
    } else {
      // Exponents of powers of two: the scale takes the largest to 2^22 or more, and below 2^23.
      const Ints up = 276 - (bits >> 23), exponent = up < 253 ? up : 253 - Ints{};
      scale = (Raw)(exponent << 23);
      unit = (Raw)((254 - exponent) << 23);
    }
    store(units + first, Vec<float>(bits < kInfinite ? unit : Raw{}), some);
    alignas(64) float scales[kLanes];
    store(scales, Vec<float>(scale));
    for (int64_t i = 0; i < some; ++i, to += Digits::row(kCount, depth)) {
      digits_of_row<kCount>(to, rows[first + i], scales[i], depth);
    }
  }
}

// sums[r][v] = rows, as digits `row_bytes` apart, times one panel times the scales.
template <int kCount, int kRows, int kVectors>
FUSEDRNN_COLD void multiply_digits(Vec<float>* sums, const uint8_t* rows, int64_t row_bytes, const float* units,
                                   const Vec<float>* scales, const int8_t* panel, int64_t depth) {
  constexpr int kLast = kCount - 1, kSums = kRows * kCount * kVectors, kWays = ways_of_digits(kSums);
  const int64_t fours = Digits::fours(depth), digit = Digits::digit(depth);
  Ints acc[kWays * kSums];
  FUSEDRNN_UNROLL_ALL
  for (int i = 0; i < kWays * kSums; ++i) acc[i] = Ints{};
  begin_digits<kCount, kRows, kVectors>(acc, rows, row_bytes, panel, depth);
  const auto add = [&](Ints* to, int64_t k) __attribute__((always_inline)) {
    add_digits<kCount, kRows, kVectors>(to, rows, row_bytes, digit, panel, k);
  };
  int64_t k = 0;
  for (; k + kWays <= fours; k += kWays) {
    FUSEDRNN_UNROLL_ALL
    for (int w = 0; w < kWays; ++w) add(acc + w * kSums, k + w);
  }
  if constexpr (kWays > 1) {
    for (; k < fours; ++k) add(acc, k);
    FUSEDRNN_UNROLL_ALL
    for (int i = kSums; i < kWays * kSums; ++i) acc[i % kSums] += acc[i];
  }
  FUSEDRNN_UNROLL_ALL
  for (int i = 0; i < kRows * kVectors; ++i) {
    const int r = i / kVectors, v = i % kVectors, at = r * kCount * kVectors + v;
    Vec<float>::Raw sum = __builtin_convertvector(acc[at + kLast * kVectors], Vec<float>::Raw);
    FUSEDRNN_UNROLL_ALL
    for (int j = kLast - 1; j >= 0; --j) {
      sum = sum * 256.0f + __builtin_convertvector(acc[at + j * kVectors], Vec<float>::Raw);
    }
    sums[i] = sum * units[r] * scales[v].v;
  }
}

template <int kCount, int kRows, int kVectors>
FUSEDRNN_INLINE void multiply_digit_rows(int64_t count, Vec<float>* sums, const uint8_t* rows, int64_t row_bytes,
                                         const float* units, const Vec<float>* scales, const int8_t* panel,
                                         int64_t depth) {
  if constexpr (kRows > 1) {
    if (count < kRows) {
      return multiply_digit_rows<kCount, kRows - 1, kVectors>(count, sums, rows, row_bytes, units, scales, panel,
                                                              depth);
    }
  }
  multiply_digits<kCount, kRows, kVectors>(sums, rows, row_bytes, units, scales, panel, depth);
}

// The same for a row of floats that are not all finite.
template <int kVectors>
FUSEDRNN_COLD void multiply_fours(Vec<float>* sums, const float* x, const Vec<float>* scales, const int8_t* panel,
                                  int64_t depth) {
  for (int v = 0; v < kVectors; ++v) {
    Vec<float> sum(0.0f);
    for (int64_t k = 0; k < depth; ++k) {
      const Ints four = load_ints(panel + (k / 4 * kVectors + v) * FUSEDRNN_VECTOR_BYTES);
      const Ints weight = (four << (24 - 8 * static_cast<int>(k % 4))) >> 24;
      sum.v += __builtin_convertvector(weight, Vec<float>::Raw) * x[k];
    }
    sums[v] = sum * scales[v];
  }
}

template <int kCount, int kVectors>
void product_of_digits(Vec<float>* sums, const float* const* rows, const uint8_t* digits, const float* units,
                       int64_t count, const Vec<float>* scales, const int8_t* panel, int64_t depth) {
  constexpr int kMost = most_rows_of_digits(kCount, kVectors);
  const int64_t row_bytes = Digits::row(kCount, depth), tile = divide_up(count, divide_up(count, kMost));
  for (int64_t i = 0; i < count; i += tile) {
    multiply_digit_rows<kCount, kMost, kVectors>(min(tile, count - i), sums + i * kVectors, digits + i * row_bytes,
                                                 row_bytes, units + i, scales, panel, depth);
  }
  for (int64_t i = 0; i < count; ++i) {
    if (units[i] == 0) multiply_fours<kVectors>(sums + i * kVectors, rows[i], scales, panel, depth);
  }
}

#endif

}  // namespace fusedrnn::FUSEDRNN_CAPABILITY
