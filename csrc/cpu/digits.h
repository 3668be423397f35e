// Products of float32 rows with int8 weights in whole numbers, where the processor has AVX512-VNNI: nothing is widened.
//
// A row becomes whole numbers of 24 bits, x = q * unit, the unit being 2^-22 or 2^-23 of its largest |x|: an error of
// at most 2^-23 of the largest, which is what the rounding of a float32 sum comes to. q + 2^23 has three digits of 8
// bits without a sign; the products of a digit with weights are summed in 32 bits, exactly. The panel has the weights
// of four of the depth side by side, [depth / 4][kVectors][16 lanes][4], and behind them the sums of its columns, int32
// [kVectors][16], for what was added to q.
//
// With Weights::kInt8Both the row is rounded to whole numbers of 8 bits, one digit: the unit is 1/127 of its largest
// |x|. Where nothing multiplies digits, the same whole numbers are multiplied as floats.
// Intel 64 and IA-32 Architectures Software Developer's Manual, VPDPBUSD.
#pragma once

#include <stdint.h>
#include <string.h>

#include "panels.h"

namespace fusedrnn::FUSEDRNN_CAPABILITY {

#if FUSEDRNN_VECTOR_BYTES == 64 && defined(__AVX512F__) && !FUSEDRNN_TILES && !defined(FUSEDRNN_CELL)
constexpr bool kDigits = true;
#else
constexpr bool kDigits = false;
#endif

struct Digits {
  static constexpr int kExact = 3, kRounded = 1;  // of a row
  // Sums of a longer depth might not fit.
  static constexpr int64_t kMostDepth = 1 << 16;
  static constexpr int64_t fours(int64_t depth) { return divide_up(depth, 4); }
  // Of a digit of a row, so that whole vectors can be written.
  static constexpr int64_t row(int64_t depth) { return divide_up(depth, 16) * 16; }
  static constexpr int64_t panel(int vectors, int64_t depth) { return (fours(depth) + 1) * vectors * 64; }
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

inline bool has_digits() {
#if defined(__x86_64__)
  return kDigits && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// The digits of rows, [kCount][row(depth)] each, and their units; where a row is not finite they are nothing, the unit
// 0.
template <int kCount>
void to_digits(uint8_t* to, float* units, const float* const* rows, int64_t count, int64_t depth);

// sums[count][kVectors] = rows times one panel times the scales of its columns; `digits` and `units` are those of the
// rows.
template <int kCount, int kVectors>
void product_of_digits(Vec<float>* sums, const float* const* rows, const uint8_t* digits, const float* units,
                       int64_t count, const Vec<float>* scales, const int8_t* panel, int64_t depth);

#if FUSEDRNN_VECTOR_BYTES == 64 && defined(__AVX512F__) && !FUSEDRNN_TILES && !defined(FUSEDRNN_CELL)

// Whole arrays of accumulators, so that they live in registers.
#if defined(__clang__)
#define FUSEDRNN_UNROLL_ALL _Pragma("unroll 64")
#else
#define FUSEDRNN_UNROLL_ALL _Pragma("GCC unroll 64")
#endif

// Vector v of a panel of weight^T: lane j at depth k is weight[j][k]; lanes beyond `count` are zero.
FUSEDRNN_COLD inline void pack_fours(int8_t* panel, int vectors, int v, const int8_t* weight, int64_t stride,
                                     int64_t count, int64_t depth) {
  int32_t sums[16] = {};
  const int64_t fours = Digits::fours(depth);
  for (int64_t k = 0; k < fours; ++k) {
    int8_t lanes[16][4] = {};
    for (int64_t j = 0; j < min(count, 16); ++j) {
      memcpy(lanes[j], weight + j * stride + 4 * k, static_cast<size_t>(min(4, depth - 4 * k)));
      sums[j] += lanes[j][0] + lanes[j][1] + lanes[j][2] + lanes[j][3];
    }
    memcpy(panel + (k * vectors + v) * 64, lanes, 64);
  }
  memcpy(panel + (fours * vectors + v) * 64, sums, 64);
}

// The bits of the largest |x| of a row.
FUSEDRNN_INLINE int32_t largest_of(const float* x, int64_t depth) {
  __m512i most = _mm512_setzero_si512();
  for (int64_t k = 0; k < depth; k += 16) {
    most = _mm512_max_epi32(most,
                            _mm512_and_si512((__m512i)load<float>(x + k, depth - k).v, _mm512_set1_epi32(0x7fffffff)));
  }
  return _mm512_reduce_max_epi32(most);
}

template <int kCount>
void to_digits(uint8_t* to, float* units, const float* const* rows, int64_t count, int64_t depth) {
  using Raw = Vec<float>::Raw;
  constexpr int32_t kSign = 1 << (8 * kCount - 1);
  const int64_t row = Digits::row(depth);
  // A division takes as long for 16 rows as for one.
  for (int64_t first = 0; first < count; first += 16) {
    const int64_t some = min(16, count - first);
    alignas(64) int32_t largest[16] = {};
    for (int64_t i = 0; i < some; ++i) largest[i] = largest_of(rows[first + i], depth);
    const __m512i bits = _mm512_load_si512(largest);
    Raw scale, unit;
    if constexpr (kCount == Digits::kRounded) {
      const Raw most = (Raw)_mm512_max_ps((__m512)bits, _mm512_set1_ps(kLeast));
      scale = 127.0f / most;
      unit = most / 127.0f;
    } else {
      // Exponents of powers of two: the scale takes the largest to 2^22 or more, and below 2^23.
      const __m512i up = _mm512_sub_epi32(_mm512_set1_epi32(276), _mm512_srli_epi32(bits, 23));
      const __m512i exponent = _mm512_min_epi32(up, _mm512_set1_epi32(253));
      scale = (Raw)_mm512_slli_epi32(exponent, 23);
      unit = (Raw)_mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(254), exponent), 23);
    }
    const __mmask16 finite = _mm512_cmplt_epi32_mask(bits, _mm512_set1_epi32(kInfinite));
    store(units + first, Vec<float>((Raw)_mm512_maskz_mov_ps(finite, (__m512)unit)), some);
    alignas(64) float scales[16];
    store(scales, Vec<float>(scale));
    for (int64_t i = 0; i < some; ++i, to += kCount * row) {
      for (int64_t k = 0; k < depth; k += 16) {
        const Raw scaled = load<float>(rows[first + i] + k, depth - k).v * scales[i];
        const __m512i rounded = _mm512_min_epi32(_mm512_cvtps_epi32((__m512)scaled), _mm512_set1_epi32(kSign - 1));
        const __m512i q = _mm512_add_epi32(rounded, _mm512_set1_epi32(kSign));
        FUSEDRNN_UNROLL
        for (int j = 0; j < kCount; ++j) {
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j * row + k),
                           _mm512_cvtepi32_epi8(_mm512_srli_epi32(q, 8 * j)));
        }
      }
    }
  }
}

// acc += four digits times four weights, in each lane. GCC 12 copies the accumulators of its intrinsic around.
FUSEDRNN_INLINE void multiply_four(__m512i& acc, __m512i digits, __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(digits), "v"(weights));
}

// sums[r][v] = rows, as digits `row_bytes` apart, times one panel times the scales.
template <int kCount, int kRows, int kVectors>
FUSEDRNN_COLD void multiply_digits(Vec<float>* sums, const uint8_t* rows, int64_t row_bytes, const float* units,
                                   const Vec<float>* scales, const int8_t* panel, int64_t depth) {
  // With few sums several run side by side: one alone would wait for its own previous addition.
  constexpr int kLast = kCount - 1, kSums = kRows * kCount * kVectors, kWays = kSums >= 8 ? 1 : kSums >= 3 ? 2 : 4;
  const int64_t fours = Digits::fours(depth), digit = Digits::row(depth);
  const int8_t* const columns = panel + fours * kVectors * 64;
  __m512i acc[kWays * kSums];
  FUSEDRNN_UNROLL_ALL
  for (int i = 0; i < kWays * kSums; ++i) acc[i] = _mm512_setzero_si512();
  // What was added to q, 128 in its highest digit, is taken away beforehand.
  FUSEDRNN_UNROLL_ALL
  for (int v = 0; v < kVectors; ++v) {
    const __m512i added = _mm512_slli_epi32(_mm512_loadu_si512(columns + v * 64), 7);
    FUSEDRNN_UNROLL_ALL
    for (int r = 0; r < kRows; ++r) {
      acc[(r * kCount + kLast) * kVectors + v] = _mm512_sub_epi32(_mm512_setzero_si512(), added);
    }
  }
  const auto add = [&](__m512i* to, int64_t k) __attribute__((always_inline)) {
    __m512i weight[kVectors];
    FUSEDRNN_UNROLL_ALL
    for (int v = 0; v < kVectors; ++v) weight[v] = _mm512_loadu_si512(panel + (k * kVectors + v) * 64);
    FUSEDRNN_UNROLL_ALL
    for (int i = 0; i < kRows * kCount; ++i) {
      int32_t four;
      memcpy(&four, rows + i / kCount * row_bytes + i % kCount * digit + 4 * k, 4);
      const __m512i x = _mm512_set1_epi32(four);
      FUSEDRNN_UNROLL_ALL
      for (int v = 0; v < kVectors; ++v) multiply_four(to[i * kVectors + v], x, weight[v]);
    }
  };
  int64_t k = 0;
  for (; k + kWays <= fours; k += kWays) {
    FUSEDRNN_UNROLL_ALL
    for (int w = 0; w < kWays; ++w) add(acc + w * kSums, k + w);
  }
  if constexpr (kWays > 1) {
    for (; k < fours; ++k) add(acc, k);
    FUSEDRNN_UNROLL_ALL
    for (int i = kSums; i < kWays * kSums; ++i) acc[i % kSums] = _mm512_add_epi32(acc[i % kSums], acc[i]);
  }
  FUSEDRNN_UNROLL_ALL
  for (int i = 0; i < kRows * kVectors; ++i) {
    const int r = i / kVectors, v = i % kVectors, at = r * kCount * kVectors + v;
    Vec<float>::Raw sum = (Vec<float>::Raw)_mm512_cvtepi32_ps(acc[at + kLast * kVectors]);
    FUSEDRNN_UNROLL_ALL
    for (int j = kLast - 1; j >= 0; --j) {
      sum = sum * 256.0f + (Vec<float>::Raw)_mm512_cvtepi32_ps(acc[at + j * kVectors]);
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
      const __m512i four = _mm512_loadu_si512(panel + (k / 4 * kVectors + v) * 64);
      const __m512i up = _mm512_sll_epi32(four, _mm_cvtsi32_si128(24 - 8 * static_cast<int>(k % 4)));
      sum.v += (Vec<float>::Raw)_mm512_cvtepi32_ps(_mm512_srai_epi32(up, 24)) * x[k];
    }
    sums[v] = sum * scales[v];
  }
}

template <int kCount, int kVectors>
void product_of_digits(Vec<float>* sums, const float* const* rows, const uint8_t* digits, const float* units,
                       int64_t count, const Vec<float>* scales, const int8_t* panel, int64_t depth) {
  // What the registers hold: the sums, a weight for each of them, and a digit.
  constexpr int64_t kMost = 24 / (kVectors == 3 && kCount > 1 ? 8 : kVectors * kCount);
  const int64_t row_bytes = kCount * Digits::row(depth), tile = divide_up(count, divide_up(count, kMost));
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
