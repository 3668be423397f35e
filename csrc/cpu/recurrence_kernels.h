// The skeleton of a recurrence, compiled once per instruction set: one parallel region for the whole sequence.
//
// A weight matrix is repacked into panels, [block of columns][k][kVectors][W lanes], so that a step streams it
// once from front to back. Two ways to share the work:
//   by rows   W_hh fits each core's own cache: a thread runs its rows of the batch through all steps, no barrier;
//   by units  each thread keeps its panels in its own cache and all rows; a barrier after each step.
// Either way a thread only ever touches its own part of the carried c and dc.
// Where too few steps follow to pay for the repacking, the weights are read where they lie: dot products along their
// rows in forward, sums of their rows in backward.
// With FUSEDRNN_TILES the products with W_hh run in the tile registers of AMX, with FUSEDRNN_DOTS in the dot products
// of AVX512-BF16; only bfloat16 is compiled then.
#pragma once

#include <sched.h>
#include <string.h>

#include <type_traits>

#include "../cells.h"
#include "digits.h"
#include "panels.h"
#include "pointwise.h"
#include "recurrence.h"
#include "simd.h"
#include "tiles.h"
#define FUSEDRNN_ONLY_BFLOAT16 (FUSEDRNN_TILES || FUSEDRNN_DOTS)
#if !FUSEDRNN_ONLY_BFLOAT16 && !defined(FUSEDRNN_CELL)
#include "product.h"
#endif

namespace fusedrnn::FUSEDRNN_CAPABILITY {

template <typename E>
struct Compute {
  using Type = float;
};
template <>
struct Compute<double> {
  using Type = double;
};

// What the rows that W_hh multiplies are: those of the tensors, or widened.
constexpr bool kTiles = FUSEDRNN_TILES;
template <typename E>
using Operand = std::conditional_t<FUSEDRNN_ONLY_BFLOAT16, E, typename Compute<E>::Type>;
// What panels of weights hold: half the bytes, where widening takes an instruction or two.
#if FUSEDRNN_VECTOR_BYTES > 16 || defined(FUSEDRNN_NEON)
constexpr bool kWidensHalf = true;
#else
constexpr bool kWidensHalf = false;
#endif
template <typename E>
using Packed = std::conditional_t<std::is_same_v<E, Half> && !kWidensHalf, float, E>;

// Spins briefly, then gives the core away: a thread of ours may be waiting for it.
class Barrier {
 public:
  void wait(int thread, int threads) {
    if (threads == 1) return;
    const int round = __atomic_load_n(&round_, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == threads) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&round_, round + 1, __ATOMIC_RELEASE);
      return;
    }
    int64_t since = 0;
    for (int spins = 0; __atomic_load_n(&round_, __ATOMIC_ACQUIRE) == round; ++spins) {
      if (spins < 1000) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
      } else {
        if (!since) since = nanoseconds();
        sched_yield();
      }
    }
    if (since && thread == 0) waited_ += nanoseconds() - since;
  }

  // Nanoseconds that the first thread has waited past spinning.
  int64_t waited() const { return waited_; }

 private:
  int64_t waited_ = 0;
  alignas(64) int arrived_ = 0;
  alignas(64) int round_ = 0;
};

// How many rows of a batch go through a panel at once: what the registers hold.
template <int kVectors, typename E>
constexpr int max_rows() {
#if FUSEDRNN_MANY_REGISTERS
  return kVectors >= 3 ? 6 : 8;
#elif FUSEDRNN_VECTOR_BYTES == 32
  return kVectors >= 5 ? 2 : kVectors >= 4 && kPairs<E> ? 3 : kVectors == 2 ? 6 : 4;
#else
  return kVectors >= 3 ? 2 : 4;
#endif
}
// Four rows of four vectors are more than 16 registers hold: three of the vectors go first, then the last one.
template <int kRows, int kVectors>
constexpr int kFirstVectors = FUSEDRNN_VECTOR_BYTES == 32 && kRows == 4 && kVectors == 4 ? 3 : kVectors;
// The rows of the next tile, of `left`. Three such rows take less time each than four, which in turn take less than
// three and a single one.
template <int kVectors, typename E>
FUSEDRNN_INLINE int64_t next_rows(int64_t left, int64_t tile) {
  constexpr int kMost = max_rows<kVectors, E>();
  if constexpr (kFirstVectors<kMost, kVectors> < kVectors) {
    return left % 3 && left >= 4 * (left % 3) ? 4 : min(3, left);
  }
  return min(tile, left);
}
// Panels of one vector are multiplied some at a time: what a row is spread into then serves all of them.
constexpr bool kJoinsPanels = FUSEDRNN_VECTOR_BYTES == 32;

// How many sums of a product run side by side, of which one would wait for its own previous addition.
template <int kRows, int kVectors>
constexpr int kWays = kRows * kVectors >= 8 ? 1 : (kRows * kVectors >= 4 ? 2 : 4);

// The sums of a vector stand `row` apart from one row to the next, those of a row `column` apart.
template <int kSets, int kRows, int kVectors, typename C>
FUSEDRNN_INLINE void begin_sums(Vec<C> (&acc)[kSets][kRows][kVectors], const Vec<C>* sums, int64_t row = kVectors,
                                int64_t column = 1) {
  FUSEDRNN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FUSEDRNN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      acc[0][r][v] = sums[r * row + v * column];
      FUSEDRNN_UNROLL
      for (int w = 1; w < kSets; ++w) acc[w][r][v] = Vec<C>(C(0));
    }
  }
}
template <int kSets, int kRows, int kVectors, typename C>
FUSEDRNN_INLINE void end_sums(Vec<C>* sums, Vec<C> (&acc)[kSets][kRows][kVectors], int64_t row = kVectors,
                              int64_t column = 1) {
  FUSEDRNN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FUSEDRNN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      FUSEDRNN_UNROLL
      for (int w = 1; w < kSets; ++w) acc[0][r][v].v += acc[w][r][v].v;
      sums[r * row + v * column] = acc[0][r][v];
    }
  }
}

template <int kRows, int kVectors, typename C, typename E>
FUSEDRNN_INLINE void multiply_depth(Vec<C> (&acc)[kRows][kVectors], const C* const (&x)[kRows], int64_t k,
                                    const E* panel, int64_t apart = Vec<C>::kWidth) {
  Vec<C> weight[kVectors];
  FUSEDRNN_UNROLL
  for (int v = 0; v < kVectors; ++v) weight[v] = load(panel + v * apart);
  FUSEDRNN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FUSEDRNN_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[r][v].v += weight[v].v * x[r][k];
  }
}

// sums[r][v] += sum over k < depth of rows[r][skip + k] * panel[k][v]; depths are kStep elements apart, or `step` where
// that is 0, sums of a row kOf from those of the next.
template <int kRows, int kVectors, int kOf, int kStep, typename C, typename E>
FUSEDRNN_COLD void multiply(Vec<C>* sums, const C* const* rows, int64_t skip, const E* panel, int64_t step,
                            int64_t depth) {
  if constexpr (kStep > 0) step = kStep;
  constexpr int kAtOnce = kWays<kRows, kVectors>;
  // Local, so that they live in registers.
  Vec<C> acc[kAtOnce][kRows][kVectors];
  const C* x[kRows];
  begin_sums(acc, sums, kOf);
  FUSEDRNN_UNROLL
  for (int r = 0; r < kRows; ++r) x[r] = rows[r] + skip;
  int64_t k = 0;
  for (; k + kAtOnce <= depth; k += kAtOnce, panel += kAtOnce * step) {
    FUSEDRNN_UNROLL
    for (int w = 0; w < kAtOnce; ++w) multiply_depth(acc[w], x, k + w, panel + w * step);
  }
  for (; k < depth; ++k, panel += step) multiply_depth(acc[0], x, k, panel);
  end_sums(sums, acc, kOf);
}

// As multiply, of kPanels panels of one vector each, `apart` from each other; the sums of a panel are `column` from
// those of the next.
template <int kRows, int kPanels, typename C, typename E>
FUSEDRNN_COLD void multiply_joined(Vec<C>* sums, int64_t column, const C* const* rows, int64_t skip, const E* panel,
                                   int64_t apart, int64_t depth) {
  constexpr int kAtOnce = kWays<kRows, kPanels>, kStep = Vec<C>::kWidth;
  Vec<C> acc[kAtOnce][kRows][kPanels];
  const C* x[kRows];
  begin_sums(acc, sums, 1, column);
  FUSEDRNN_UNROLL
  for (int r = 0; r < kRows; ++r) x[r] = rows[r] + skip;
  int64_t k = 0;
  for (; k + kAtOnce <= depth; k += kAtOnce, panel += kAtOnce * kStep) {
    FUSEDRNN_UNROLL
    for (int w = 0; w < kAtOnce; ++w) multiply_depth(acc[w], x, k + w, panel + w * kStep, apart);
  }
  for (; k < depth; ++k, panel += kStep) multiply_depth(acc[0], x, k, panel, apart);
  end_sums(sums, acc, 1, column);
}

// acc += a pair of the depth, of the panel and of a row, the second of it zero where `odd` is.
template <int kRows, int kVectors, int kSets>
FUSEDRNN_INLINE void multiply_pair(Vec<float> (&acc)[kSets][kRows][kVectors], int set, const float* const (&x)[kRows],
                                   int64_t k, const Bfloat16* panel, bool odd) {
  constexpr int kBoth = 2 * Vec<float>::kWidth;
  FUSEDRNN_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const Vec<float> weight = load_pair(panel + v * kBoth).even;
    FUSEDRNN_UNROLL
    for (int r = 0; r < kRows; ++r) acc[set % kSets][r][v].v += weight.v * x[r][k];
  }
  if (odd) return;
  FUSEDRNN_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const Vec<float> weight = load_pair(panel + v * kBoth).odd;
    FUSEDRNN_UNROLL
    for (int r = 0; r < kRows; ++r) acc[(set + 1) % kSets][r][v].v += weight.v * x[r][k + 1];
  }
}
#if FUSEDRNN_DOTS
// acc += pairs times pairs, in each lane. Intel 64 and IA-32 Architectures Software Developer's Manual, VDPBF16PS. As
// an intrinsic it needs a flag that not all compilers have.
FUSEDRNN_INLINE void multiply_dots(Vec<float>& acc, __m512i left, __m512i right) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc.v) : "v"(left), "v"(right));
}
template <int kRows, int kVectors, int kSets>
FUSEDRNN_INLINE void multiply_pair(Vec<float> (&acc)[kSets][kRows][kVectors], int set,
                                   const Bfloat16* const (&x)[kRows], int64_t k, const Bfloat16* panel, bool odd) {
  constexpr int kBoth = 2 * Vec<float>::kWidth;
  __m512i weight[kVectors];
  FUSEDRNN_UNROLL
  for (int v = 0; v < kVectors; ++v) weight[v] = _mm512_loadu_si512(panel + v * kBoth);
  FUSEDRNN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    int32_t both = 0;
    odd ? memcpy(&both, x[r] + k, sizeof(Bfloat16)) : memcpy(&both, x[r] + k, sizeof(both));
    const __m512i pair = _mm512_set1_epi32(both);
    FUSEDRNN_UNROLL
    for (int v = 0; v < kVectors; ++v) multiply_dots(acc[set][r][v], weight[v], pair);
  }
}
#endif
// As multiply, with a panel of pairs.
template <int kRows, int kVectors, typename R>
FUSEDRNN_COLD void multiply_pairs(Vec<float>* sums, const R* const* rows, int64_t skip, const Bfloat16* panel,
                                  int64_t depth) {
  constexpr int kStep = 2 * kVectors * Vec<float>::kWidth, kSets = kWays<kRows, kVectors>;
  // A pair takes one of the sums, or two where it is widened.
  constexpr int kEach = std::is_same_v<R, float> && kSets > 1 ? 2 : 1, kAtOnce = kSets / kEach;
  Vec<float> acc[kSets][kRows][kVectors];
  const R* x[kRows];
  begin_sums(acc, sums);
  FUSEDRNN_UNROLL
  for (int r = 0; r < kRows; ++r) x[r] = rows[r] + skip;
  int64_t k = 0;
  for (; k + 2 * kAtOnce <= depth; k += 2 * kAtOnce, panel += kAtOnce * kStep) {
    FUSEDRNN_UNROLL
    for (int w = 0; w < kAtOnce; ++w) multiply_pair(acc, w * kEach, x, k + 2 * w, panel + w * kStep, false);
  }
  for (; k + 2 <= depth; k += 2, panel += kStep) multiply_pair(acc, 0, x, k, panel, false);
  if (k < depth) multiply_pair(acc, 0, x, k, panel, true);
  end_sums(sums, acc);
}

template <int kRows, int kVectors, int kStep, typename C, typename R, typename E>
FUSEDRNN_INLINE void multiply_rows(int64_t count, Vec<C>* sums, const R* const* rows, int64_t skip, const E* panel,
                                   int64_t step, int64_t depth) {
  if constexpr (kRows > 1) {
    if (count < kRows) return multiply_rows<kRows - 1, kVectors, kStep>(count, sums, rows, skip, panel, step, depth);
  }
  if constexpr (kPairs<E> && kStep > 0) {
    multiply_pairs<kRows, kVectors>(sums, rows, skip, panel, depth);
  } else {
    constexpr int kFirst = kFirstVectors<kRows, kVectors>;
    multiply<kRows, kFirst, kVectors, kStep>(sums, rows, skip, panel, step, depth);
    if constexpr (kFirst < kVectors) {
      multiply<kRows, kVectors - kFirst, kVectors, kStep>(sums + kFirst, rows, skip, panel + kFirst * Vec<C>::kWidth,
                                                          step, depth);
    }
  }
}

// At most so many rows of sums wait in the first-level cache, beside a piece of the panel (two pairs of tiles).
constexpr int64_t kGroup = kTiles ? 64 : 48;
constexpr int64_t kPieceBytes = 24 * 1024;

// As multiply, for any number of rows; with a kStep the panel is one of ours.
template <int kVectors, int kStep, typename C, typename R, typename E>
void accumulate(Vec<C>* sums, const R* const* rows, int64_t count, int64_t skip, const E* panel, int64_t step,
                int64_t depth) {
  constexpr int64_t kMost = max_rows<kVectors, E>();
  if (count == 0) return;
  const int64_t tile = divide_up(count, divide_up(count, kMost));
  for (int64_t r = 0; r < count;) {
    const int64_t some = next_rows<kVectors, E>(count - r, tile);
    multiply_rows<kMost, kVectors, kStep>(some, sums + r * kVectors, rows + r, skip, panel, step, depth);
    r += some;
  }
}

template <int kVectors, typename C, typename E>
FUSEDRNN_INLINE void widen(C* to, const E* panel, int64_t depth) {
  constexpr int kWidth = Vec<C>::kWidth, kStep = kVectors * kWidth;
  if constexpr (kPairs<E>) {
    for (int64_t k = 0; k < depth; k += 2) {
      FUSEDRNN_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const Pair both = load_pair(panel + k * kStep + 2 * v * kWidth);
        store(to + k * kStep + v * kWidth, both.even);
        store(to + (k + 1) * kStep + v * kWidth, both.odd);
      }
    }
  } else {
    for (int64_t j = 0; j < depth * kStep; j += kWidth) store(to + j, load(panel + j));
  }
}

// sums[count][kVectors] = rows times one panel. The depth comes in kSegments of `depth`, segment i of a row begins
// at skip[i]. A piece of the panel is fetched, and where it is narrow widened, once for all rows.
template <int kVectors, int kSegments, typename C, typename R, typename E>
void product(Vec<C>* sums, const R* const* rows, int64_t count, const E* panel, int64_t depth,
             const int64_t (&skip)[kSegments]) {
  constexpr int kStep = kVectors * Vec<C>::kWidth;
  constexpr int64_t kPiece = kPieceBytes / (kVectors * FUSEDRNN_VECTOR_BYTES) * (sizeof(C) / sizeof(R));
  static_assert(kPiece % 2 == 0);
  for (int64_t i = 0; i < count * kVectors; ++i) sums[i] = Vec<C>(C(0));
  const bool few = count <= max_rows<kVectors, E>();
  const int64_t piece = few ? depth : kPiece;
  for (int i = 0; i < kSegments; ++i) {
    for (int64_t k = 0; k < depth; k += piece) {
      const E* const from = panel + (i * padded_depth<E>(depth) + k) * kStep;
      const int64_t some = min(piece, depth - k);
      if constexpr (sizeof(E) < sizeof(R)) {
        if (!few) {
          alignas(64) C wide[kPiece * kStep];
          widen<kVectors>(wide, from, some);
          accumulate<kVectors, kStep>(sums, rows, count, skip[i] + k, static_cast<const C*>(wide), kStep, some);
          continue;
        }
      }
      accumulate<kVectors, kStep>(sums, rows, count, skip[i] + k, from, kStep, some);
    }
  }
}

// As product, of kPanels panels of one vector each, `apart` from each other: sums[kPanels][count].
template <int kRows, int kPanels, typename C, typename E>
FUSEDRNN_INLINE void multiply_joined_rows(int64_t count, Vec<C>* sums, int64_t column, const C* const* rows,
                                          int64_t skip, const E* panel, int64_t apart, int64_t depth) {
  if constexpr (kRows > 1) {
    if (count < kRows) {
      return multiply_joined_rows<kRows - 1, kPanels>(count, sums, column, rows, skip, panel, apart, depth);
    }
  }
  multiply_joined<kRows, kPanels>(sums, column, rows, skip, panel, apart, depth);
}
template <int kPanels, typename C, typename E>
void product_joined(Vec<C>* sums, const C* const* rows, int64_t count, const E* panel, int64_t apart, int64_t depth,
                    int64_t skip) {
  constexpr int64_t kMost = max_rows<kPanels, E>();
  constexpr int64_t kPiece = kPieceBytes / (kPanels * FUSEDRNN_VECTOR_BYTES);
  for (int64_t i = 0; i < count * kPanels; ++i) sums[i] = Vec<C>(C(0));
  const int64_t piece = count <= kMost ? depth : kPiece, tile = divide_up(count, divide_up(count, kMost));
  for (int64_t k = 0; k < depth; k += piece, panel += piece * Vec<C>::kWidth) {
    for (int64_t r = 0; r < count; r += tile) {
      multiply_joined_rows<kMost, kPanels>(min(tile, count - r), sums + r, count, rows + r, skip + k, panel, apart,
                                           min(piece, depth - k));
    }
  }
}

// partial[r][j], for kUnits of j from `unit` on: a vector whose lanes add up to rows[r] times row j of weight.
template <int kRows, int kUnits, typename C, typename E, typename R>
FUSEDRNN_COLD void dot(Vec<C> (*partial)[Vec<C>::kWidth], int unit, const R* const* rows, const E* const* weight,
                       int64_t depth) {
  constexpr int kWidth = Vec<C>::kWidth;
  Vec<C> acc[kRows][kUnits];
  const E* w[kUnits];
  const R* x[kRows];
  FUSEDRNN_UNROLL
  for (int j = 0; j < kUnits; ++j) w[j] = weight[unit + j];
  FUSEDRNN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    x[r] = rows[r];
    FUSEDRNN_UNROLL
    for (int j = 0; j < kUnits; ++j) acc[r][j] = Vec<C>(C(0));
  }
  int64_t k = 0;
#if FUSEDRNN_DOTS
  for (; k < depth; k += 2 * kWidth) {
    const __mmask32 both = k + 2 * kWidth <= depth ? ~__mmask32{0} : (__mmask32{1} << (depth - k)) - 1;
    __m512i h[kRows];
    FUSEDRNN_UNROLL
    for (int r = 0; r < kRows; ++r) h[r] = _mm512_maskz_loadu_epi16(both, x[r] + k);
    FUSEDRNN_UNROLL
    for (int j = 0; j < kUnits; ++j) {
      __builtin_prefetch(w[j] + kUnits * depth + k);
      const __m512i one = _mm512_maskz_loadu_epi16(both, w[j] + k);
      FUSEDRNN_UNROLL
      for (int r = 0; r < kRows; ++r) multiply_dots(acc[r][j], one, h[r]);
    }
  }
#endif
  for (; k + kWidth <= depth; k += kWidth) {
    Vec<C> h[kRows];
    FUSEDRNN_UNROLL
    for (int r = 0; r < kRows; ++r) h[r] = load(x[r] + k);
    FUSEDRNN_UNROLL
    for (int j = 0; j < kUnits; ++j) {
      // The rows that come next: those of 16 bits are too short for a prefetcher to get into its stride.
      if constexpr (sizeof(E) < sizeof(C)) __builtin_prefetch(w[j] + kUnits * depth + k);
      const Vec<C> one = load(w[j] + k);
      FUSEDRNN_UNROLL
      for (int r = 0; r < kRows; ++r) acc[r][j].v += one.v * h[r].v;
    }
  }
  if (k < depth) {
    for (int j = 0; j < kUnits; ++j) {
      const Vec<C> one = load<C>(w[j] + k, depth - k);
      for (int r = 0; r < kRows; ++r) acc[r][j].v += one.v * load<C>(x[r] + k, depth - k).v;
    }
  }
  FUSEDRNN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FUSEDRNN_UNROLL
    for (int j = 0; j < kUnits; ++j) partial[r][unit + j] = acc[r][j];
  }
}

// How many rows a row of a weight is read for at once; kDotUnits of its rows run side by side.
constexpr int kDotRows = 4;
template <int kRows>
constexpr int kDotUnits = FUSEDRNN_MANY_REGISTERS ? (kRows == 1 ? 8 : 16 / kRows) : (kRows > 2 ? 2 : 4);

template <int kRows, typename C, typename E, typename R>
FUSEDRNN_INLINE void dot_rows(int64_t count, Vec<C>* sums, int64_t stride, const R* const* rows, const E* const* weight,
                              int64_t depth) {
  constexpr int kWidth = Vec<C>::kWidth, kUnits = min(kDotUnits < kRows == 3 ? 4 : kRows >, kWidth);
  if constexpr (kRows > 1) {
    if (count < kRows) return dot_rows<kRows - 1>(count, sums, stride, rows, weight, depth);
  }
  Vec<C> partial[kRows][kWidth];
  for (int unit = 0; unit < kWidth; unit += kUnits) dot<kRows, kUnits>(partial, unit, rows, weight, depth);
  for (int r = 0; r < kRows; ++r) sums[r * stride] = sums[r * stride] + fold<1, kWidth>(partial[r]);
}

// sums[i * stride] lane j += rows[i] times row j of weight [units][depth]; lanes from `units` on mean nothing.
template <typename C, typename E, typename R>
void dots(Vec<C>* sums, int64_t stride, const R* const* rows, int64_t count, const E* weight, int64_t units,
          int64_t depth) {
  constexpr int kWidth = Vec<C>::kWidth;
  const E* of_unit[kWidth];
  for (int64_t j = 0; j < kWidth; ++j) of_unit[j] = weight + min(j, units - 1) * depth;
  for (int64_t i = 0; i < count; i += kDotRows) {
    dot_rows<kDotRows>(count - i, sums + i * stride, stride, rows + i, of_unit, depth);
  }
}

template <typename C, typename E>
void convert(C* to, const E* from, int64_t count) {
  constexpr int kWidth = Vec<C>::kWidth;
  for (int64_t i = 0; i < count; i += kWidth) {
    store(to + i, from ? load<C>(from + i, count - i) : Vec<C>(C(0)), count - i);
  }
}

// W_hh of heads is small, so that what is packed is soon read again.
FUSEDRNN_INLINE bool is_short(const Shape& s) {
  return s.steps * s.batch * s.heads <= (kTiles ? kFewRowsOfTiles : kFewRows);
}
// So many rows of a weight are read for all columns before the next ones.
constexpr int64_t kRowsAtOnce = 64;

// Whether a cell can say its h again from what was saved, which a projection needs.
template <typename Cell>
constexpr bool kProjects = requires(const float* x) { Cell::template output<float>(x, x); };

// What is never projected has no code for it.
struct NeverProjected {
  explicit NeverProjected(bool) {}
  constexpr operator bool() const { return false; }
};

// What forward and backward share: sizes, the order of steps, and who does what. "W" is the type of the weights.
template <typename Cell, typename E, typename W = E>
struct Skeleton {
  using C = typename Compute<E>::Type;
  using O = Operand<E>;
  using V = Vec<C>;
  static constexpr int kWidth = V::kWidth;
  static constexpr int kG = Cell::kGates;
  static constexpr int kA = Cell::kAccumulators;
  static constexpr int kS = Cell::kSaved;
  static constexpr int kN = Cell::kStates;
  static constexpr int kPlain = 2;  // vectors of a panel whose columns are units or outputs, not gates
  static constexpr int64_t kLine = 64 / sizeof(int64_t);
  static constexpr bool kWide = sizeof(E) == sizeof(O);  // products take h and dgates where they are stored

  const Shape& shape;
  const int64_t steps, batch, hidden, out;
  const int64_t heads, head_units, head_out;  // of each head; H and P if it is one
  const int64_t padded;  // H, every head rounded up to whole vectors: the row length of carried state
  const std::conditional_t<kProjects<Cell>, bool, NeverProjected> projected;
  const bool direct;  // the recurrent weights are read where they lie
  bool by_rows;
  const int64_t laid_out_size;  // of a thread's rows as tiles
  Buffer<O> laid_out;           // [threads][kGroup / 16][depth / 32][16][32], with tiles only
  const int64_t row_groups;
  Buffer<int64_t> begun;  // [2][row_groups][threads] lines: how many blocks of a thread's share are begun, in a step
  Barrier barrier;

  // depth: that of the products with W_hh, in `segments`.
  Skeleton(const Shape& s, bool projected, bool direct, int segments, int64_t depth)
      : shape(s),
        steps(s.steps),
        batch(s.batch),
        hidden(s.hidden),
        out(s.out),
        heads(s.heads),
        head_units(s.hidden / s.heads),
        head_out(s.out / s.heads),
        padded(heads * divide_up(head_units, kPlain * kWidth) * kPlain * kWidth),
        projected(projected),
        direct(direct),
        laid_out_size(kTiles ? segments * chunks(depth) * Tile::kDepth * kGroup : 0),
        laid_out(s.threads * laid_out_size),
        row_groups(divide_up(s.batch, kGroup)),
        begun(s.threads > 1 ? 2 * row_groups * s.threads * kLine : 0) {
    for (int64_t step = 0; step < 2; ++step) {
      for (int thread = 0; thread < s.threads; ++thread) begin_step(step, thread);
    }
    const int64_t weight_bytes = kG * padded * head_out * static_cast<int64_t>(sizeof(Packed<W>));
    by_rows = !direct && s.threads > 1 && s.batch >= 16 * s.threads && weight_bytes <= s.cache_bytes / 4 * 3;
  }

  Way way(int64_t panel_elements) const {
    return {direct, by_rows, kTiles, shape.threads, panel_elements * static_cast<int64_t>(sizeof(Packed<W>)), false};
  }

  static int64_t chunks(int64_t depth) { return divide_up(depth, Tile::kDepth); }
  // Elements of a panel of `vectors` columns of vectors whose depth comes in `segments` of `depth`.
  static int64_t panel_size(int vectors, int segments, int64_t depth) {
    if constexpr (kTiles) return segments * chunks(depth) * vectors * Tile::kSize;
    return segments * padded_depth<Packed<W>>(depth) * vectors * kWidth;
  }
  O* laid_out_by(int thread) const { return laid_out + thread * laid_out_size; }

  // Where a vector of a block of units (or outputs) stands. A block does not reach into the next head.
  struct Place {
    int64_t head;
    int64_t unit;   // its first one
    int64_t at;     // its place in a row of carried state, [padded]
    int64_t count;  // how many of its head are left from there on, perhaps none
  };
  // of_head: units of a head.
  FUSEDRNN_INLINE Place place(int64_t block, int64_t vectors, int64_t v, int64_t of_head) const {
    const int64_t at = (block * vectors + v) * kWidth;
    if (heads == 1) return {0, at, at, of_head - at};
    const int64_t blocks = divide_up(of_head, vectors * kWidth), head = block / blocks;
    const int64_t inside = at - head * blocks * vectors * kWidth;
    return {head, head * of_head + inside, at, of_head - inside};
  }

  int64_t offset(int64_t t) const { return shape.offsets[t]; }
  int64_t rows_at(int64_t t) const { return t < 0 || t >= steps ? 0 : shape.offsets[t + 1] - shape.offsets[t]; }
  bool reset(int64_t row) const { return shape.resets && shape.resets[row]; }
  int64_t before(int64_t t) const { return shape.reverse ? t + 1 : t - 1; }
  int64_t after(int64_t t) const { return shape.reverse ? t - 1 : t + 1; }
  // The row of sequence b in the step where it starts (ends).
  int64_t edge_row(int64_t b, bool start) const {
    if (start != shape.reverse) return b;
    int64_t t = steps - 1;
    while (rows_at(t) <= b) --t;
    return offset(t) + b;
  }

  struct Range {
    int64_t begin, end;
  };
  // This thread's share of `count` things that the barrier mode hands out.
  static Range share_of(int64_t count, int thread, int threads) {
    return {count * thread / threads, count * (thread + 1) / threads};
  }
  Range blocks(int64_t count, int thread, int threads) const {
    return by_rows ? Range{0, count} : share_of(count, thread, threads);
  }

  // This thread's rows below `end`, in groups: f(first row, distance of rows, how many). By rows they are dealt out
  // one by one, since sequences of a packed batch end at different steps.
  template <typename F>
  FUSEDRNN_INLINE void groups(int64_t end, int thread, int threads, F f) const {
    const int64_t first = by_rows ? thread : 0, stride = by_rows ? threads : 1;
    const int64_t mine = end > first ? divide_up(end - first, stride) : 0;
    for (int64_t i = 0; i < mine; i += kGroup) f(first + i * stride, stride, min(kGroup, mine - i));
  }
  // f(block), there and back in turn: what the last step used last is still in the cache.
  template <typename F>
  FUSEDRNN_INLINE static void sweep(Range blocks, int64_t s, F f) {
    for (int64_t i = 0; i < blocks.end - blocks.begin; ++i) f(of_sweep(blocks, s, i));
  }
  FUSEDRNN_INLINE static int64_t of_sweep(Range blocks, int64_t s, int64_t i) {
    return s & 1 ? blocks.end - 1 - i : blocks.begin + i;
  }
  // f(blocks, first, end): the blocks of the sweep that this thread computes. All are those of its share; where a step
  // ends with a barrier and a block takes long enough, who is through takes what others have not begun.
  template <typename F>
  FUSEDRNN_INLINE void share_sweep(Range own, int64_t all, int64_t s, int64_t first, int thread, int threads,
                                   int64_t operations, int64_t chunk, F f) {
    constexpr int64_t kWorthIt = 50'000;
    if (waits_for_no_one(threads) || threads == 1 || operations < kWorthIt) return f(own, 0, own.end - own.begin);
    for (int i = 0; i < threads; ++i) {
      const int owner = (thread + i) % threads;
      const Range blocks = share_of(all, owner, threads);
      const int64_t count = blocks.end - blocks.begin;
      int64_t* const next = begun_by(s, first / kGroup, owner);
      for (int64_t k = 0; (k = __atomic_fetch_add(next, chunk, __ATOMIC_RELAXED)) < count;) {
        f(blocks, k, min(count, k + chunk));
      }
    }
  }
  int64_t* begun_by(int64_t s, int64_t group, int owner) const {
    return begun + (((s & 1) * row_groups + group) * shape.threads + owner) * kLine;
  }
  // Behind the barrier in front of step s: nobody looks at the counts of the next one before the next barrier.
  void begin_step(int64_t s, int thread) const {
    for (int64_t group = 0; group < row_groups && shape.threads > 1; ++group) {
      __atomic_store_n(begun_by(s + 1, group, thread), int64_t{0}, __ATOMIC_RELAXED);
    }
  }
  void barrier_of_step(int thread, int threads) {
    if (!waits_for_no_one(threads)) barrier.wait(thread, threads);
  }
  // Rows are apart from each other, and so are heads that have one thread each.
  bool waits_for_no_one(int threads) const { return by_rows || heads % threads == 0; }
  // f(blocks), or where nobody waits f(blocks of a few heads) for all: through all steps W_hh of those stays in the
  // cache.
  template <typename F>
  FUSEDRNN_INLINE void head_by_head(Range blocks, int64_t of_all, int threads, F f) const {
    if (heads == 1 || !waits_for_no_one(threads)) return f(blocks);
    const int64_t bytes = kG * head_units * head_out * static_cast<int64_t>(sizeof(Packed<W>));
    const int64_t some = max(int64_t{1}, shape.cache_bytes / 2 / bytes) * (of_all / heads);
    for (int64_t i = blocks.begin; i < blocks.end; i += some) f(Range{i, min(i + some, blocks.end)});
  }
  // Each of `phases` as f(thread, threads); all threads are through one before the next begins. Who works alone takes
  // the rows of each thread in turn, so that the numbers are the same.
  template <typename... Phases>
  void in_phases(Phases... phases) {
    if (shape.threads > 1 && is_crowded()) {
      [[maybe_unused]] const TileRegisters registers;
      const int shares = by_rows ? shape.threads : 1;
      const auto all = [shares](auto phase) {
        for (int thread = 0; thread < shares; ++thread) phase(thread, shares);
      };
      (all(phases), ...);
      return;
    }
    const int64_t begin = shape.threads > 1 ? nanoseconds() : 0;
    int64_t own_end = 0;
    in_parallel(shape.threads, [&](int thread, int threads) {
      [[maybe_unused]] const TileRegisters registers;
      size_t left = sizeof...(Phases);
      ((phases(thread, threads), --left ? barrier.wait(thread, threads) : void()), ...);
      if (thread == 0 && threads > 1) own_end = nanoseconds();
    });
    if (!own_end) return;
    const int64_t end = nanoseconds();
    late_partners(end - begin, barrier.waited() + end - own_end);
  }
};

// The parameters and inputs of a vector of units from `u` on; those of the row begin at `row`.
template <typename Cell, typename E>
struct PerUnit {
  using C = typename Compute<E>::Type;
  Vec<C> parameters[max(Cell::kParameters, 1)], inputs[max(Cell::kInputs, 1)];

  template <typename Problem>
  FUSEDRNN_INLINE PerUnit(const Problem& p, int64_t row, int64_t u, int64_t count) {
    FUSEDRNN_UNROLL
    for (int k = 0; k < Cell::kParameters; ++k) {
      parameters[k] = load<C>(static_cast<const E*>(p.parameters[k]) + u, count);
    }
    FUSEDRNN_UNROLL
    for (int k = 0; k < Cell::kInputs; ++k) inputs[k] = load<C>(static_cast<const E*>(p.inputs[k]) + row + u, count);
  }
};

template <typename Cell, typename E, typename W = E>
struct ForwardRun : Skeleton<Cell, E, W> {
  using Base = Skeleton<Cell, E, W>;
  using Base::batch, Base::head_out, Base::head_units, Base::heads, Base::hidden, Base::kA, Base::kG, Base::kN,
      Base::kPlain, Base::kS, Base::kWide, Base::kWidth, Base::out, Base::padded, Base::projected, Base::steps;
  using Place = typename Base::Place;
  using C = typename Base::C;
  using O = typename Base::O;
  using V = typename Base::V;
  const Forward& p;
  const int64_t unit_blocks, out_blocks, y_row;
  Buffer<Packed<W>> panels;      // [unit block][P][G][lanes], or tiles; where none are given
  Packed<W>* const packed;       // those or the given ones
  Buffer<Packed<W>> out_panels;  // [out block][H][kPlain][lanes]
  Buffer<C> bias;                // [A][padded]
  Buffer<C> others;              // [states beside h][B][padded]
  Buffer<C> h;                   // [B][padded]: unprojected, with w_hr only
  Buffer<O> exchange;            // [3][B][P]: h of the last two steps and h0, where E is narrower than O
  Buffer<O> x_wide;              // [N][I]: x, where it is multiplied here and E is narrower than O
  Buffer<O> zeros;               // [P]: what a row that is reset starts from, at least [padded]
  Buffer<E> input_gates;         // [N][G*H]: x W_ih^T, where it is computed here for all steps
  const E* const gates_x;        // those or the given ones, or null
  Buffer<uint8_t> digits;        // [threads][kGroup] rows of P or I, with digits only
  Buffer<float> whole_rows;      // [threads][kGroup][P or I]: rows rounded to 8 bits, where there are no digits
  Buffer<float> units;           // [threads][kGroup], of either

  explicit ForwardRun(const Forward& problem)
      : Base(problem.shape, problem.w_hr != nullptr, reads_weights(problem), 1, problem.shape.out),
        p(problem),
        unit_blocks(heads * divide_up(head_units, kWidth)),
        out_blocks(projected ? divide_up(out, kPlain * kWidth) : 0),
        y_row(problem.y_row ? problem.y_row : out),
        panels(this->direct || is_packed(problem) ? 0 : packed_size()),
        packed(problem.pack_into ? static_cast<Packed<W>*>(problem.pack_into)
               : problem.panels  ? static_cast<Packed<W>*>(const_cast<void*>(problem.panels))
                                 : panels),
        out_panels(out_blocks * plain_panel(hidden)),
        bias(kA * padded),
        others((kN - 1) * batch * padded),
        h(projected ? batch * padded : 0),
        exchange(kWide ? 0 : 3 * batch * out),
        x_wide(kWide || problem.gates_x ? 0 : problem.shape.offsets[steps] * problem.input),
        zeros(problem.shape.resets ? max(padded, out) : 0),
        input_gates(multiplies_input(problem) ? problem.shape.offsets[steps] * kG * hidden : 0),
        gates_x(multiplies_input(problem) ? input_gates : static_cast<const E*>(problem.gates_x)),
        digits(multiplies_digits() ? problem.shape.threads * digits_of_a_thread() : 0),
        whole_rows(rounds() && !p.way ? problem.shape.threads * whole_of_a_thread() : 0),
        units(multiplies_digits() || rounds() ? problem.shape.threads * kGroup : 0) {
    if (problem.shape.resets) memset(zeros, 0, max(padded, out) * sizeof(O));
  }

  // Whether the recurrent weights are read where they lie, if at all.
  static bool reads_weights(const Forward& problem) {
    return problem.gates_h || (is_short(problem.shape) && !is_packed(problem) && !rounds(problem));
  }
  // Whether rows of x and h are rounded to 8 bits.
  static bool rounds(const Forward& problem) { return kWhole && problem.weights == Weights::kInt8Both; }
  static bool is_packed(const Forward& problem) { return problem.panels || problem.pack_into; }
  static bool multiplies_input(const Forward& problem) {
    return kWide && !problem.gates_x && problem.panels_ih && !problem.way && !multiplies_in_steps(problem);
  }
  // Whether x meets the panels of W_ih step by step, without what comes of it going through memory: as many rows at
  // once as before the loop, or one step.
  static bool multiplies_in_steps(const Forward& problem) {
    constexpr int64_t kRows = 32;
    const Shape& s = problem.shape;
    return kWide && !problem.gates_x && problem.panels_ih && (s.steps == 1 || s.batch >= kRows * s.threads) &&
           !in_digits(problem, problem.shape.out) && !in_digits(problem, problem.input) && !rounds(problem);
  }

  void run() {
    if (p.way) {
      *p.way = this->way(packed_size());
      p.way->digits = !this->direct && in_digits(out);
      return;
    }
    if (p.pack_into) {
      for (int64_t block = 0; block < unit_blocks; ++block) pack(block);
      return;
    }
    if (p.beside && !is_crowded()) return run_beside(*p.beside);
    run_alone();
    if (p.beside) ForwardRun(*p.beside).run_alone();
  }

 private:
  void run_alone() {
    this->in_phases([this](int thread, int threads) { prepare(thread, threads); },
                    [this](int thread, int threads) { step_by_step(thread, threads); },
                    [this](int thread, int threads) { finish(thread, threads); });
  }
  // This one and another, each by as many threads as its shape says: nobody waits for those of the other but at the
  // end.
  void run_beside(const Forward& problem) {
    ForwardRun other(problem);
    const int own = this->shape.threads, all = own + other.shape.threads;
    const auto work = [](ForwardRun& run, int thread, int threads) {
      run.prepare(thread, threads);
      run.barrier.wait(thread, threads);
      run.step_by_step(thread, threads);
      run.barrier.wait(thread, threads);
      run.finish(thread, threads);
    };
    const int64_t begin = nanoseconds();
    int64_t own_end = 0;
    in_parallel(all, [&](int thread, int threads) {
      [[maybe_unused]] const TileRegisters registers;
      if (threads < all) {
        if (thread == 0) work(*this, 0, 1), work(other, 0, 1);
        return;
      }
      thread < own ? work(*this, thread, own) : work(other, thread - own, all - own);
      if (thread == 0) own_end = nanoseconds();
    });
    if (!own_end) return;
    const int64_t end = nanoseconds();
    late_partners(end - begin, this->barrier.waited() + end - own_end);
  }

  static constexpr bool kWhole = std::is_same_v<W, int8_t>;

  // Whether panels of that depth are for products of digits.
  static bool in_digits(const Forward& problem, int64_t depth) {
    return kWhole && has_digits(rounds(problem)) && depth <= Digits::kMostDepth;
  }
  bool in_digits(int64_t depth) const { return in_digits(p, depth); }
  int64_t panel_elements(int64_t depth) const {
    return in_digits(depth) ? Digits::panel(kG, depth) : Base::panel_size(kG, 1, depth);
  }
  bool multiplies_digits() const {
    return !p.way && ((!this->direct && in_digits(out)) || (p.panels_ih && in_digits(p.input)));
  }
  bool rounds() const { return rounds(p); }
  int count_of_digits() const { return rounds() ? Digits::kRounded : Digits::kMost; }
  int64_t digits_of_a_thread() const {
    return min(kGroup, this->offset(steps)) * Digits::row(count_of_digits(), max(out, p.input));
  }
  int64_t whole_of_a_thread() const {
    const int64_t depth = max(in_digits(out) ? 0 : out, in_digits(p.input) ? 0 : p.input);
    return min(kGroup, this->offset(steps)) * depth;
  }

  // What multiply_panel needs of rows.
  void prepare_rows(const O* const* rows, int64_t count, int64_t depth, int thread) {
    if constexpr (kTiles) lay_out(this->laid_out_by(thread), rows, count, depth, {0});
    if constexpr (kWhole) {
      float* const unit = units + thread * kGroup;
      if constexpr (kDigits) {
        if (in_digits(depth)) {
          uint8_t* const to = digits + thread * digits_of_a_thread();
          const auto make = rounds() ? to_digits<Digits::kRounded> : to_digits<Digits::kMost>;
          return make(to, unit, rows, count, depth);
        }
      }
      if (!rounds()) return;
      for (int64_t i = 0; i < count; ++i) to_whole(whole_row(thread, i, depth), unit + i, rows[i], depth);
    }
  }
  float* whole_row(int thread, int64_t i, int64_t depth) const {
    return whole_rows + thread * whole_of_a_thread() + i * depth;
  }
  // sums[count][kG] = rows from `skip` on times a panel; `scale` is that of the weight's rows, if they are int8.
  void multiply_panel(V* sums, const O* const* rows, int64_t count, int64_t skip, const Packed<W>* panel, int64_t depth,
                      int thread, [[maybe_unused]] const float* scale, [[maybe_unused]] const Place& at) const {
    if constexpr (kTiles) {
      product<kG>(sums, this->laid_out_by(thread), count, panel, Base::chunks(depth));
    } else if constexpr (kWhole) {
      V scales[kG];
      scales_of(scales, scale, at);
      const float* const unit = units + thread * kGroup;
      if constexpr (kDigits) {
        if (in_digits(depth)) {
          const auto multiply =
              rounds() ? product_of_digits<Digits::kRounded, kG> : product_of_digits<Digits::kMost, kG>;
          return multiply(sums, rows, digits + thread * digits_of_a_thread(), unit, count, scales, panel, depth);
        }
      }
      const O* whole[kGroup];
      for (int64_t i = 0; i < count && rounds(); ++i) whole[i] = whole_row(thread, i, depth);
      product<kG>(sums, rounds() ? whole : rows, count, panel, depth, {skip});
      for (int64_t i = 0; i < count * kG; ++i) {
        if (rounds()) sums[i] = sums[i] * V(unit[i / kG]);
        sums[i] = sums[i] * scales[i % kG];
      }
    } else {
      product<kG>(sums, rows, count, panel, depth, {skip});
    }
  }

  // Cells of one gate have panels of one vector, of which some go together.
  static constexpr bool kJoins = kJoinsPanels && kG == 1 && std::is_same_v<Packed<W>, C>;
  static constexpr int64_t kMostSums = kGroup * kG * (kJoins ? 2 : 1);
  // How many blocks from the jth of a sweep on, of which so many are left, are multiplied at once, for `count` rows.
  FUSEDRNN_INLINE int64_t joined(typename Base::Range units, int64_t s, int64_t j, int64_t left, int64_t count) const {
    if constexpr (kJoins) {
      for (int64_t n = count <= 3 ? 4 : 2; n > 1; n /= 2) {
        if (n > left) continue;
        const int64_t first = Base::of_sweep(units, s, j), last = Base::of_sweep(units, s, j + n - 1);
        if (place_of(first).head == place_of(last).head) return n;
      }
    }
    return 1;
  }
  // As multiply_panel, of n blocks, whose sums follow each other.
  void multiply_panels(V* sums, const O* const* rows, int64_t count, int64_t skip, const Packed<W>* panel,
                       [[maybe_unused]] int64_t apart, [[maybe_unused]] int64_t n, int64_t depth, int thread,
                       const float* scale, const Place& at) const {
    if constexpr (kJoins) {
      if (n == 2) return product_joined<2>(sums, rows, count, panel, apart, depth, skip);
      if (n == 4) return product_joined<4>(sums, rows, count, panel, apart, depth, skip);
    }
    multiply_panel(sums, rows, count, skip, panel, depth, thread, scale, at);
  }

  // x W_ih^T of all rows, for some units.
  void multiply_input(typename Base::Range units, int thread) {
    const int64_t rows = this->offset(steps), groups = divide_up(rows, kGroup);
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t row = rows * group / groups, count = rows * (group + 1) / groups - row;
      const O* x[kGroup];
      for (int64_t i = 0; i < count; ++i) x[i] = x_row(row + i);
      prepare_rows(x, count, p.input, thread);
      int64_t n = 0;
      for (int64_t j = 0; j < units.end - units.begin; j += n) {
        V sums[kMostSums];
        n = joined(units, group, j, units.end - units.begin - j, count);
        multiply_input_of(sums, x, count, units, group, j, n, thread);
        for (int64_t k = 0; k < n; ++k) {
          const Place at = place_of(Base::of_sweep(units, group, j + k));
          for (int64_t i = 0; i < count * kG; ++i) {
            const int64_t column = ((row + i / kG) * kG + i % kG) * hidden + at.unit;
            store(input_gates + column, sums[k * count * kG + i], at.count);
          }
        }
      }
    }
  }
  // x times the panels of W_ih of n blocks, from the jth of a sweep on.
  FUSEDRNN_INLINE void multiply_input_of(V* sums, const O* const* x, int64_t count, typename Base::Range units,
                                         int64_t s, int64_t j, int64_t n, int thread) const {
    const int64_t block = Base::of_sweep(units, s, j), next = Base::of_sweep(units, s, j + 1);
    multiply_panels(sums, x, count, 0, input_panel_of(block), (next - block) * panel_elements(p.input), n, p.input,
                    thread, p.scale_ih, place_of(block));
  }
  const Packed<W>* input_panel_of(int64_t block) const {
    return static_cast<const Packed<W>*>(p.panels_ih) + block * panel_elements(p.input);
  }
  // Of the gates of some units what the whole numbers of their rows of a weight are multiplied by.
  FUSEDRNN_INLINE void scales_of(V* scales, const float* scale, const Place& at) const {
    for (int g = 0; g < kG; ++g) scales[g] = load<C>(scale + g * hidden + at.unit, at.count);
  }

  void step_by_step(int thread, int threads) {
    const auto outs = this->blocks(out_blocks, thread, threads);
    const auto all = this->blocks(unit_blocks, thread, threads);
    this->head_by_head(all, unit_blocks, threads, [&](typename Base::Range units) {
      for (int64_t s = 0; s < steps; ++s) {
        const int64_t t = this->shape.reverse ? steps - 1 - s : s;
        const int64_t rows = this->rows_at(t);
        this->begin_step(s, thread);
        this->groups(rows, thread, threads, [&](int64_t first, int64_t stride, int64_t count) {
          advance(t, s, thread, threads, units, first, stride, count);
        });
        if (projected) {
          this->barrier_of_step(thread, threads);
          this->groups(rows, thread, threads, [&](int64_t first, int64_t stride, int64_t count) {
            project(t, s, outs, first, stride, count);
          });
        }
        if (s + 1 < steps) this->barrier_of_step(thread, threads);  // behind the last one the phase ends
      }
    });
  }

  void finish(int thread, int threads) {
    for (int64_t b = thread; b < batch; b += threads) {
      memcpy(static_cast<E*>(p.h_n) + b * out, static_cast<const E*>(p.y) + this->edge_row(b, false) * y_row,
             out * sizeof(E));
      for (int k = 1; k < kN; ++k) {
        for (int64_t block = 0; block < unit_blocks; ++block) {
          const Place at = place_of(block);
          store(static_cast<E*>(p.states_n[k - 1]) + b * hidden + at.unit, load(other(k, b) + at.at), at.count);
        }
      }
    }
  }

  void prepare(int thread, int threads) {
    // In barrier mode every thread packs what it will use: the pages and the cache lines are then its own.
    const auto units = Base::share_of(unit_blocks, thread, threads);
    for (int64_t block = units.begin; block < units.end; ++block) {
      const Place at = place_of(block);
      if (!this->direct && !p.panels) pack(block);
      for (int a = 0; a < kA; ++a) store(bias + a * padded + at.at, V(C(0)));
      for (int g = 0; g < kG; ++g) {
        add_bias(Cell::x_acc(g) * padded + at.at, p.b_ih, g * hidden + at.unit, at.count);
        add_bias(Cell::h_acc(g) * padded + at.at, p.b_hh, g * hidden + at.unit, at.count);
      }
      for (int k = 1; k < kN; ++k) {
        const E* from = static_cast<const E*>(p.states0[k - 1]);
        for (int64_t b = 0; b < batch; ++b) {
          store(other(k, b) + at.at, load<C>(from + b * hidden + at.unit, at.count));
        }
      }
    }
    if constexpr (kWide) {
      if (multiplies_input(p)) multiply_input(units, thread);
    }
    const auto outs = Base::share_of(out_blocks, thread, threads);
    for (int64_t block = outs.begin; block < outs.end; ++block) {
      Packed<W>* panel = out_panels + block * plain_panel(hidden);
      for (int v = 0; v < kPlain; ++v) {
        const int64_t first = (block * kPlain + v) * kWidth;
        pack_rows<C>(panel, kPlain, v, static_cast<const W*>(p.w_hr) + first * hidden, hidden, out - first, hidden);
      }
    }
    if constexpr (!kWide) {
      for (int64_t b = thread; b < batch; b += threads) {
        convert(exchange + (2 * batch + b) * out, static_cast<const E*>(p.h0) + b * out, out);
      }
      const int64_t rows = p.gates_x ? 0 : this->offset(steps);
      for (int64_t row = thread; row < rows; row += threads) {
        convert(x_wide + row * p.input, static_cast<const E*>(p.x) + row * p.input, p.input);
      }
    }
  }

  void pack(int64_t block) const {
    const Place at = place_of(block);
    for (int g = 0; g < kG; ++g) {
      const W* of_gate = static_cast<const W*>(p.w_hh) + (g * hidden + at.unit) * head_out;
      if constexpr (kTiles) {
        tiles_of_rows(panel_of(block) + g * Tile::kSize, kG, of_gate, head_out, at.count, head_out);
      } else {
        if constexpr (kWhole && kDigits) {
          if (in_digits(head_out)) {
            pack_fours(panel_of(block), kG, g, of_gate, head_out, at.count, head_out);
            continue;
          }
        }
        pack_rows<C>(panel_of(block), kG, g, of_gate, head_out, at.count, head_out);
      }
    }
  }

  void add_bias(int64_t at, const void* b, int64_t from, int64_t count) {
    if (b) store(bias + at, load(bias + at) + load<C>(static_cast<const E*>(b) + from, count));
  }

  static int64_t plain_panel(int64_t depth) { return padded_depth<Packed<W>>(depth) * kPlain * kWidth; }
  int64_t packed_size() const { return unit_blocks * panel_elements(head_out); }
  Packed<W>* panel_of(int64_t block) const { return packed + block * panel_elements(head_out); }
  FUSEDRNN_INLINE Place place_of(int64_t block) const { return this->place(block, 1, 0, head_units); }
  FUSEDRNN_INLINE C* other(int k, int64_t b) const { return others + ((k - 1) * batch + b) * padded; }

  // h that row b of step t starts from.
  FUSEDRNN_INLINE const O* h_before(int64_t t, int64_t s, int64_t b) const {
    const int64_t previous = this->before(t);
    const bool carried = b < this->rows_at(previous);
    if (this->reset(this->offset(t) + b)) return zeros;
    if constexpr (kWide) {
      return carried ? static_cast<const O*>(p.y) + (this->offset(previous) + b) * y_row
                     : static_cast<const O*>(p.h0) + b * out;
    } else {
      return exchange + ((carried ? (s - 1) & 1 : 2) * batch + b) * out;
    }
  }

  FUSEDRNN_INLINE const O* x_row(int64_t row) const {
    if constexpr (kWide) {
      return static_cast<const O*>(p.x) + row * p.input;
    } else {
      return x_wide + row * p.input;
    }
  }

  // All gates of a block of units: `rows` from `skip` on times a weight [G*H, depth] that is read where it lies.
  void all_gates(V* sums, const O* const* rows, int64_t skip, int64_t count, const void* weight,
                 [[maybe_unused]] const float* scale, const Place& at, int64_t depth) const {
    const O* moved[kGroup];
    for (int64_t i = 0; i < count && skip; ++i) moved[i] = rows[i] + skip;
    for (int64_t i = 0; i < count * kG; ++i) sums[i] = V(C(0));
    for (int g = 0; g < kG; ++g) {
      const W* of_gate = static_cast<const W*>(weight) + (g * hidden + at.unit) * depth;
      dots(sums + g, kG, skip ? moved : rows, count, of_gate, at.count, depth);
    }
    if constexpr (kWhole) {
      V scales[kG];
      scales_of(scales, scale, at);
      for (int64_t i = 0; i < count * kG; ++i) sums[i] = sums[i] * scales[i % kG];
    }
  }

  // One step of `count` rows: for a block of units the matmul of all gates, then the cell.
  void advance(int64_t t, int64_t s, int thread, int threads, typename Base::Range units, int64_t first, int64_t stride,
               int64_t count) {
    const O* before[kGroup];
    const O* x[kGroup];
    for (int64_t i = 0; i < count; ++i) {
      before[i] = h_before(t, s, first + i * stride);
      if (!gates_x) x[i] = x_row(this->offset(t) + first + i * stride);
    }
    if (!this->direct) prepare_rows(before, count, out, thread);
    const int64_t operations = count * kG * kWidth * (head_out + (gates_x ? 0 : p.input));
    this->share_sweep(units, unit_blocks, s, first, thread, threads, operations, kJoins ? 2 : 1,
                      [&](typename Base::Range blocks, int64_t begin, int64_t end) {
                        advance_blocks(t, s, thread, blocks, begin, end, before, x, first, stride, count);
                      });
  }
  // From the kth block of a sweep to the one before `all`.
  void advance_blocks(int64_t t, int64_t s, int thread, typename Base::Range units, int64_t k, int64_t all,
                      const O* const* before, const O* const* x, int64_t first, int64_t stride, int64_t count) {
    // The cell of one row would wait for its own arithmetic: the products of some blocks come first, then their cells,
    // side by side.
    V sums[kMostSums], sums_x[kMostSums];
    const int64_t some = 8 / max(int64_t{1}, count);
    while (k < all) {
      int64_t end = k, at = 0;
      do {
        const int64_t n = this->direct || p.gates_h ? 1 : joined(units, s, end, all - end, count);
        multiply_blocks(t, thread, units, s, end, n, before, x, first, stride, count, sums + at, sums_x + at);
        end += n;
        at += n * count * kG;
      } while (end < min(all, k + some));
      at = 0;
      for (; k < end; ++k) {
        const Place place = place_of(Base::of_sweep(units, s, k));
        for (int64_t i = 0; i < count; ++i, at += kG) {
          apply_cell(t, s, first + i * stride, place, before[i], sums_x + at, sums + at);
        }
      }
    }
  }

  // The matmul of all gates of n blocks of units, from the jth of a sweep on: h W_hh^T, and x W_ih^T where it is not
  // there yet.
  FUSEDRNN_INLINE void multiply_blocks(int64_t t, int thread, typename Base::Range units, int64_t s, int64_t j,
                                       int64_t n, const O* const* before, const O* const* x, int64_t first,
                                       int64_t stride, int64_t count, V* sums, V* sums_x) const {
    const bool by_panels = kWide && p.panels_ih;
    for (int64_t k = 0; k < n; ++k) {
      const Place at = place_of(Base::of_sweep(units, s, j + k));
      // The cell reads a line here and a line there, which no prefetcher foresees.
      for (int64_t i = 0; i < count && gates_x; ++i) {
        const int64_t row = this->offset(t) + first + i * stride;
        for (int g = 0; g < kG; ++g) __builtin_prefetch(gates_x + (row * kG + g) * hidden + at.unit);
      }
      if (!gates_x && !by_panels) {
        all_gates(sums_x + k * count * kG, x, 0, count, p.w_ih, p.scale_ih, at, p.input);
      }
    }
    if (!gates_x && by_panels) multiply_input_of(sums_x, x, count, units, s, j, n, thread);
    const int64_t block = Base::of_sweep(units, s, j), next = Base::of_sweep(units, s, j + 1);
    const Place at = place_of(block);
    if (p.gates_h) {
      for (int64_t i = 0; i < count * kG; ++i) {
        const int64_t column = ((first + i / kG * stride) * kG + i % kG) * hidden + at.unit;
        sums[i] = load<C>(static_cast<const E*>(p.gates_h) + column, at.count);
      }
    } else if (this->direct) {
      all_gates(sums, before, at.head * head_out, count, p.w_hh, p.scale_hh, at, head_out);
    } else {
      multiply_panels(sums, before, count, at.head * head_out, panel_of(block),
                      (next - block) * panel_elements(head_out), n, head_out, thread, p.scale_hh, at);
    }
  }

  void apply_cell(int64_t t, int64_t s, int64_t b, const Place& at, const O* before, const V* sums_x, const V* sums) {
    const int64_t row = this->offset(t) + b, u = at.unit, count = at.count;
    V acc[kA], saved[kS > 0 ? kS : 1], prev[kN], next[kN];
    FUSEDRNN_UNROLL
    for (int a = 0; a < kA; ++a) acc[a] = load(bias + a * padded + at.at);
    FUSEDRNN_UNROLL
    for (int g = 0; g < kG; ++g) {
      const E* gate_x = gates_x + (row * kG + g) * hidden + u;
      acc[Cell::x_acc(g)] = acc[Cell::x_acc(g)] + (gates_x ? load<C>(gate_x, count) : sums_x[g]);
    }
    FUSEDRNN_UNROLL
    for (int g = 0; g < kG; ++g) acc[Cell::h_acc(g)] = acc[Cell::h_acc(g)] + sums[g];
    if constexpr (Cell::kUsesHPrev) prev[0] = load<C>(before + u, count);
    FUSEDRNN_UNROLL
    for (int k = 1; k < kN; ++k) prev[k] = this->reset(row) ? V(C(0)) : load(other(k, b) + at.at);
    const PerUnit<Cell, E> given(p, row * hidden, u, count);
    Cell::template forward<V>(acc, prev, given.parameters, given.inputs, next, saved);
    FUSEDRNN_UNROLL
    for (int k = 1; k < kN; ++k) {
      store(other(k, b) + at.at, next[k]);
      if (p.every_state) store(static_cast<C*>(p.every_state[k - 1]) + row * hidden + u, next[k], count);
    }
    if (p.gates) {
      FUSEDRNN_UNROLL
      for (int i = 0; i < kS; ++i) store(static_cast<E*>(p.gates) + (row * kS + i) * hidden + u, saved[i], count);
    }
    if (projected) {
      store(h + b * padded + at.at, next[0]);
    } else {
      emit(row, s, b, u, next[0], count);
    }
  }

  void project(int64_t t, int64_t s, typename Base::Range outs, int64_t first, int64_t stride, int64_t count) {
    const C* rows[kGroup];
    for (int64_t i = 0; i < count; ++i) rows[i] = h + (first + i * stride) * padded;
    this->sweep(outs, s, [&](int64_t block) {
      V sums[kGroup * kPlain];
      product<kPlain>(sums, rows, count, out_panels + block * plain_panel(hidden), hidden, {0});
      for (int64_t i = 0; i < count; ++i) {
        for (int v = 0; v < kPlain; ++v) {
          const int64_t u = (block * kPlain + v) * kWidth, b = first + i * stride;
          V sum = sums[i * kPlain + v];
          if (u >= out) continue;
          if constexpr (std::is_same_v<W, int8_t>) sum = sum * load<C>(p.scale_hr + u, out - u);
          emit(this->offset(t) + b, s, b, u, sum, out - u);
        }
      }
    });
  }

  FUSEDRNN_INLINE void emit(int64_t row, int64_t s, int64_t b, int64_t u, V value, int64_t count) {
    store(static_cast<E*>(p.y) + row * y_row + u, value, count);
    if constexpr (!kWide) store(exchange + ((s & 1) * batch + b) * out + u, rounded<E>(value), count);
  }
};

template <typename Cell, typename E>
struct BackwardRun : Skeleton<Cell, E> {
  using Base = Skeleton<Cell, E>;
  using Base::batch, Base::head_out, Base::head_units, Base::heads, Base::hidden, Base::kA, Base::kG, Base::kN,
      Base::kPlain, Base::kS, Base::kWide, Base::kWidth, Base::out, Base::padded, Base::projected, Base::steps;
  using Place = typename Base::Place;
  using C = typename Base::C;
  using O = typename Base::O;
  using V = typename Base::V;
  const Backward& p;
  const int64_t unit_blocks, out_blocks;
  const int64_t first_packed;   // blocks below it are read where they lie: whole ones, if any is read at all
  Buffer<Packed<E>> panels;     // [out block - first_packed][G*H][kPlain][W] of W_hh, or tiles
  Buffer<V> recurred;           // [out block][kGroup][kPlain]: dgates W_hh of a step, where W_hh is read directly
  Buffer<Packed<E>> hr_panels;  // [unit block][P][kPlain][W] of W_hr
  Buffer<C> dothers;            // [states beside h][B][padded]
  Buffer<C> dy;                 // [B][P]: with w_hr only, the step's dy with what the recurrence brings back
  Buffer<C> dh_direct;          // [B][padded]: with kDirectH only
  Buffer<O> exchange;           // [2][B][A*H]: dgates of the last two steps, where E is narrower than O
  Buffer<O> zeros;              // [A*H]: what comes back from a step that was reset

  explicit BackwardRun(const Backward& problem)
      : Base(problem.shape, problem.w_hr != nullptr, reads_weights(problem), kG, problem.shape.hidden),
        p(problem),
        unit_blocks(heads * divide_up(head_units, kPlain * kWidth)),
        out_blocks(heads * divide_up(head_out, kPlain * kWidth)),
        first_packed(steps == 1 && !problem.dh0 ? out_blocks : (this->direct ? out / (kPlain * kWidth) : 0)),
        panels((out_blocks - first_packed) * Base::panel_size(kPlain, kG, head_units)),
        recurred(this->direct ? out_blocks * kGroup * kPlain : 0),
        hr_panels(projected ? unit_blocks * plain_panel(out) : 0),
        dothers((kN - 1) * batch * padded),
        dy(projected ? batch * out : 0),
        dh_direct(Cell::kDirectH ? batch * padded : 0),
        exchange(kWide ? 0 : 2 * batch * kA * hidden),
        zeros(problem.shape.resets ? kA * hidden : 0) {
    if (problem.shape.resets) memset(zeros, 0, kA * hidden * sizeof(O));
  }

  static bool reads_weights(const Backward& problem) {
    return is_short(problem.shape) && problem.shape.steps <= 4 * problem.shape.batch && problem.shape.heads == 1;
  }

  void run() {
    if (p.way) {
      *p.way = this->way((out_blocks - first_packed) * Base::panel_size(kPlain, kG, head_units));
      return;
    }
    this->in_phases([this](int thread, int threads) { prepare(thread, threads); },
                    [this](int thread, int threads) { step_by_step(thread, threads); },
                    [this](int thread, int threads) { widen_last(thread, threads); },
                    [this](int thread, int threads) { finish(thread, threads); });
  }

 private:
  void step_by_step(int thread, int threads) {
    const auto units = this->blocks(unit_blocks, thread, threads);
    const auto all = this->blocks(out_blocks, thread, threads);
    this->head_by_head(all, out_blocks, threads, [&](typename Base::Range outs) {
      for (int64_t s = 0; s < steps; ++s) {
        const int64_t t = this->shape.reverse ? s : steps - 1 - s;
        const int64_t rows = this->rows_at(t);
        const int64_t chained = min(rows, this->rows_at(this->after(t)));
        // Rows that a later step follows take its dgates, the others dh_n.
        this->begin_step(s, thread);
        this->groups(rows, thread, threads, [&](int64_t first, int64_t stride, int64_t count) {
          gather(t, s, thread, threads, outs, first, stride, count, chained);
        });
        if (projected) {
          this->barrier_of_step(thread, threads);
          this->groups(rows, thread, threads, [&](int64_t first, int64_t stride, int64_t count) {
            unproject(t, s, units, first, stride, count);
          });
        }
        this->barrier_of_step(thread, threads);
      }
    });
  }

  void prepare(int thread, int threads) {
    const auto outs = Base::share_of(out_blocks, thread, threads);
    for (int64_t block = max(outs.begin, first_packed); block < outs.end; ++block) {
      if constexpr (kTiles) {
        const int64_t u = block * kPlain * kWidth;
        for (int i = 0; i < kG * kPlain; ++i) {
          const int64_t g = i / kPlain, v = i % kPlain, first = u + v * kWidth;
          Packed<E>* const panel = panel_of(block) + Base::panel_size(kPlain, g, hidden) + v * Tile::kSize;
          const E* const of_gate = static_cast<const E*>(p.w_hh) + g * hidden * out;
          tiles_of_columns(panel, kPlain, of_gate + min(first, out), out, out - first, hidden);
        }
      } else {
        const Place at = this->place(block, kPlain, 0, head_out);
        const E* const of_head = static_cast<const E*>(p.w_hh) + at.unit - at.head * head_out;
        for (int g = 0; g < kG; ++g) {
          pack_columns<kPlain, C>(panel_of(block) + Base::panel_size(kPlain, g, head_units),
                                  of_head + (g * hidden + at.head * head_units) * head_out, head_out, at.count,
                                  head_units);
        }
      }
    }
    const auto units = Base::share_of(unit_blocks, thread, threads);
    for (int64_t block = units.begin; block < units.end; ++block) {
      const int64_t u = block * kPlain * kWidth;
      if (projected) {
        pack_columns<kPlain, C>(hr_panels + block * plain_panel(out), static_cast<const E*>(p.w_hr) + u, hidden,
                                hidden - u, out);
      }
      for (int64_t b = 0; b < batch; ++b) {
        for (int v = 0; v < kPlain; ++v) {
          const Place at = this->place(block, kPlain, v, head_units);
          for (int k = 1; k < kN; ++k) {
            const E* dn = static_cast<const E*>(p.dstates_n[k - 1]);
            store(dother(k, b) + at.at, dn && at.count > 0 ? load<C>(dn + b * hidden + at.unit, at.count) : V(C(0)));
          }
          if constexpr (Cell::kDirectH) store(dh_direct + b * padded + at.at, V(C(0)));
        }
      }
    }
  }

  FUSEDRNN_INLINE C* dother(int k, int64_t b) const { return dothers + ((k - 1) * batch + b) * padded; }

  // Before recur: what it needs of all rows whose dgates begin at rows[i].
  void prepare_rows(const O* const* rows, int64_t count, int thread, typename Base::Range outs) const {
    if constexpr (kTiles) {
      lay_out(this->laid_out_by(thread), rows, count, hidden, skip_of_gates(0).of);
    } else if constexpr (std::is_same_v<O, C>) {
      if (this->direct) recur_direct(rows, count, outs);
    }
  }
  // dgates W_hh of those rows.
  void recur(V* sums, const O* const* rows, int64_t count, int thread, int64_t block) const {
    if constexpr (kTiles) {
      product<kPlain>(sums, this->laid_out_by(thread), count, panel_of(block), kG * Base::chunks(hidden));
    } else if (this->direct) {
      for (int64_t i = 0; i < count * kPlain; ++i) sums[i] = recurred[block * kGroup * kPlain + i];
    } else {
      const int64_t head = this->place(block, kPlain, 0, head_out).head;
      product<kPlain>(sums, rows, count, panel_of(block), head_units, skip_of_gates(head).of);
    }
  }
  struct Skips {
    int64_t of[kG];
  };
  Skips skip_of_gates(int64_t head) const {
    Skips skip;
    for (int g = 0; g < kG; ++g) skip.of[g] = Cell::h_acc(g) * hidden + head * head_units;
    return skip;
  }
  // The same for all of `outs`, into recurred. A few rows of W_hh are read for all columns before the next ones, so
  // their pages stay at hand.
  void recur_direct(const C* const* rows, int64_t count, typename Base::Range outs) const {
    for (int64_t i = outs.begin * kGroup * kPlain; i < outs.end * kGroup * kPlain; ++i) recurred[i] = V(C(0));
    for (int g = 0; g < kG; ++g) {
      for (int64_t k = 0; k < hidden; k += kRowsAtOnce) {
        const int64_t depth = min(kRowsAtOnce, hidden - k), row = g * hidden + k, skip = Cell::h_acc(g) * hidden + k;
        for (int64_t block = outs.begin; block < outs.end; ++block) {
          V* sums = recurred + block * kGroup * kPlain;
          if (block < first_packed) {
            const E* from = static_cast<const E*>(p.w_hh) + row * out + block * kPlain * kWidth;
            accumulate<kPlain, 0>(sums, rows, count, skip, from, out, depth);
          } else {
            constexpr int kStep = kPlain * kWidth;
            const Packed<E>* const panel = panel_of(block) + Base::panel_size(kPlain, g, hidden) + k * kStep;
            accumulate<kPlain, kStep>(sums, rows, count, skip, panel, kStep, depth);
          }
        }
      }
    }
  }
  static int64_t plain_panel(int64_t depth) { return padded_depth<Packed<E>>(depth) * kPlain * kWidth; }
  Packed<E>* panel_of(int64_t block) const {
    return panels + (block - first_packed) * Base::panel_size(kPlain, kG, head_units);
  }

  FUSEDRNN_INLINE const O* dgates_of(int64_t row, int64_t slot, int64_t b) const {
    if constexpr (kWide) {
      return static_cast<const O*>(p.dgates) + row * kA * hidden;
    } else {
      return exchange + (slot * batch + b) * kA * hidden;
    }
  }

  // The gradient of y of this step, and without projection at once the cell's backward.
  void gather(int64_t t, int64_t s, int thread, int threads, typename Base::Range outs, int64_t first, int64_t stride,
              int64_t count, int64_t chained) {
    const int64_t with = min(count, chained > first ? divide_up(chained - first, stride) : 0);
    const O* rows[kGroup];
    for (int64_t i = 0; i < with; ++i) {
      const int64_t b = first + i * stride;
      const int64_t row = this->offset(this->after(t)) + b;
      rows[i] = this->reset(row) ? zeros : dgates_of(row, (s - 1) & 1, b);
    }
    prepare_rows(rows, with, thread, outs);
    const auto gather_block = [&](int64_t block) {
      for (int64_t i = 0; i < count; ++i) foresee(t, first + i * stride, this->place(block, kPlain, 0, head_out).unit);
      V sums[kGroup * kPlain];
      recur(sums, rows, with, thread, block);
      for (int64_t i = with * kPlain; i < count * kPlain; ++i) sums[i] = V(C(0));
      for (int64_t i = 0; i < count; ++i) take(t, s, first + i * stride, block, sums + i * kPlain, i < with);
    };
    // What is read where it lies was multiplied for the blocks of this thread.
    const int64_t operations = this->direct ? 0 : with * kPlain * kWidth * kG * head_units;
    this->share_sweep(outs, out_blocks, s, first, thread, threads, operations, 1,
                      [&](typename Base::Range blocks, int64_t begin, int64_t end) {
                        for (int64_t i = begin; i < end; ++i) gather_block(Base::of_sweep(blocks, s, i));
                      });
  }

  // Fetches what `take` will read, while the product runs.
  FUSEDRNN_INLINE void foresee(int64_t t, int64_t b, int64_t u) const {
    const int64_t row = this->offset(t) + b, previous = this->before(t);
    for (int v = 0; v < kPlain; ++v, u += kWidth) {
      if (p.dy) __builtin_prefetch(static_cast<const E*>(p.dy) + row * out + u);
      for (int i = 0; i < kS; ++i) __builtin_prefetch(static_cast<const E*>(p.gates) + (row * kS + i) * hidden + u);
      for (int k = 1; k < kN && b < this->rows_at(previous); ++k) {
        __builtin_prefetch(static_cast<const C*>(p.every_state[k - 1]) + (this->offset(previous) + b) * hidden + u);
      }
    }
  }

  void take(int64_t t, int64_t s, int64_t b, int64_t block, const V* sums, bool chain) {
    const int64_t row = this->offset(t) + b;
    for (int v = 0; v < kPlain; ++v) {
      const Place at = this->place(block, kPlain, v, head_out);
      const int64_t u = at.unit, count = at.count;
      if (count <= 0) break;
      V dh = sums[v];
      if (p.dy) dh = dh + load<C>(static_cast<const E*>(p.dy) + row * out + u, count);
      if (!chain && p.dh_n) dh = dh + load<C>(static_cast<const E*>(p.dh_n) + b * out + u, count);
      if (projected) {
        store(dy + b * out + u, dh, count);
        store(static_cast<E*>(p.dy_total) + row * out + u, dh, count);
      } else {
        if constexpr (Cell::kDirectH) dh = dh + load(dh_direct + b * padded + at.at);
        retreat(t, s, b, at, dh);
      }
    }
  }

  void unproject(int64_t t, int64_t s, typename Base::Range units, int64_t first, int64_t stride, int64_t count) {
    const C* rows[kGroup];
    for (int64_t i = 0; i < count; ++i) rows[i] = dy + (first + i * stride) * out;
    this->sweep(units, s, [&](int64_t block) {
      V sums[kGroup * kPlain];
      product<kPlain>(sums, rows, count, hr_panels + block * plain_panel(out), out, {0});
      for (int64_t i = 0; i < count; ++i) {
        for (int v = 0; v < kPlain; ++v) {
          const Place at = this->place(block, kPlain, v, head_units);
          if (at.count > 0) retreat(t, s, first + i * stride, at, sums[i * kPlain + v]);
        }
      }
    });
  }

  // The cell's backward for a vector of units of sequence b.
  void retreat(int64_t t, int64_t s, int64_t b, const Place& at, V dh) {
    const int64_t u = at.unit, count = at.count, row = this->offset(t) + b;
    const int64_t previous = this->before(t);
    const bool carried = b < this->rows_at(previous), reset = this->reset(row);
    const int64_t row_before = carried ? this->offset(previous) + b : 0;
    V saved[kS > 0 ? kS : 1], dacc[kA], d[kN], next[kN], prev[kN], dprev[kN];
    d[0] = dh;
    FUSEDRNN_UNROLL
    for (int i = 0; i < kS; ++i) {
      saved[i] = load<C>(static_cast<const E*>(p.gates) + (row * kS + i) * hidden + u, count);
    }
    FUSEDRNN_UNROLL
    for (int k = 1; k < kN; ++k) {
      const C* const every = static_cast<const C*>(p.every_state[k - 1]);
      next[k] = load<C>(every + row * hidden + u, count);
      prev[k] = carried ? load<C>(every + row_before * hidden + u, count)
                        : load<C>(static_cast<const E*>(p.states0[k - 1]) + b * hidden + u, count);
      if (reset) prev[k] = V(C(0));
      d[k] = load(dother(k, b) + at.at);
      const C* const more = static_cast<const C*>(p.devery_state[k - 1]);
      if (more) d[k] = d[k] + load<C>(more + row * hidden + u, count);
    }
    if constexpr (kProjects<Cell>) {
      if (projected) {
        store(static_cast<E*>(p.h) + row * hidden + u, Cell::template output<V>(saved, next), count);
      }
    }
    if constexpr (Cell::kUsesH) next[0] = load<C>(static_cast<const E*>(p.y) + row * hidden + u, count);
    if constexpr (Cell::kUsesHPrev) {
      prev[0] = load<C>(
          carried ? static_cast<const E*>(p.y) + row_before * hidden + u : static_cast<const E*>(p.h0) + b * hidden + u,
          count);
      if (reset) prev[0] = V(C(0));
    }
    const PerUnit<Cell, E> given(p, row * hidden, u, count);
    V dparameters[max(Cell::kParameters, 1)], dinputs[max(Cell::kInputs, 1)];
    Cell::template backward<V>(d, saved, next, prev, given.parameters, given.inputs, dacc, dprev, dparameters, dinputs);
    FUSEDRNN_UNROLL
    for (int k = 1; k < kN; ++k) store(dother(k, b) + at.at, reset ? V(C(0)) : dprev[k]);
    if constexpr (Cell::kDirectH) store(dh_direct + b * padded + at.at, reset ? V(C(0)) : dprev[0]);
    FUSEDRNN_UNROLL
    for (int k = 0; k < Cell::kParameters; ++k) {
      if (p.dparameters[k]) store(static_cast<E*>(p.dparameters[k]) + row * hidden + u, dparameters[k], count);
    }
    FUSEDRNN_UNROLL
    for (int k = 0; k < Cell::kInputs; ++k) {
      if (p.dinputs[k]) store(static_cast<E*>(p.dinputs[k]) + row * hidden + u, dinputs[k], count);
    }
    FUSEDRNN_UNROLL
    for (int a = 0; a < kA; ++a) {
      store(static_cast<E*>(p.dgates) + (row * kA + a) * hidden + u, dacc[a], count);
      if constexpr (!kWide) {
        store(exchange + (((s & 1) * batch + b) * kA + a) * hidden + u, rounded<E>(dacc[a]), count);
      }
    }
  }

  // For finish: dgates of the first step of every sequence.
  void widen_last([[maybe_unused]] int thread, [[maybe_unused]] int threads) {
    if constexpr (!kWide) {
      for (int64_t b = thread; b < batch; b += threads) {
        const int64_t row = this->edge_row(b, true);
        convert(exchange + b * kA * hidden, static_cast<const E*>(p.dgates) + row * kA * hidden, kA * hidden);
      }
    }
  }

  // What leaves the first step of every sequence: dh0 and dc0.
  void finish(int thread, int threads) {
    if (p.dh0) {
      const auto outs = this->blocks(out_blocks, thread, threads);
      this->groups(batch, thread, threads,
                   [&](int64_t first, int64_t stride, int64_t count) { start(thread, outs, first, stride, count); });
    }
    for (int k = 1; k < kN; ++k) {
      if (!p.dstates0[k - 1]) continue;
      for (int64_t b = thread; b < batch; b += threads) {
        for (int64_t i = 0; i < unit_blocks * kPlain; ++i) {
          const Place at = this->place(i / kPlain, kPlain, i % kPlain, head_units);
          if (at.count <= 0) continue;
          store(static_cast<E*>(p.dstates0[k - 1]) + b * hidden + at.unit, load(dother(k, b) + at.at), at.count);
        }
      }
    }
  }

  void start(int thread, typename Base::Range outs, int64_t first, int64_t stride, int64_t count) {
    const O* rows[kGroup];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t b = first + i * stride;
      const int64_t row = this->edge_row(b, true);
      rows[i] = this->reset(row) ? zeros : dgates_of(kWide ? row : 0, 0, b);
    }
    prepare_rows(rows, count, thread, outs);
    this->sweep(outs, steps, [&](int64_t block) {
      V sums[kGroup * kPlain];
      recur(sums, rows, count, thread, block);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t b = first + i * stride;
        for (int v = 0; v < kPlain; ++v) {
          const Place at = this->place(block, kPlain, v, head_out);
          if (at.count <= 0) break;
          V dh = sums[i * kPlain + v];
          if constexpr (Cell::kDirectH) dh = dh + load(dh_direct + b * padded + at.at);
          store(static_cast<E*>(p.dh0) + b * out + at.unit, dh, at.count);
        }
      }
    });
  }
};

#if FUSEDRNN_ONLY_BFLOAT16
#if FUSEDRNN_TILES
constexpr const Kernels& kOthers = avx512_bf16::kernels;
#else
constexpr const Kernels& kOthers = avx512::kernels;
#endif
inline void run_elsewhere(const Forward& problem) { kOthers.forward(problem); }
inline void run_elsewhere(const Backward& problem) { kOthers.backward(problem); }
inline void run_product(const Product& problem) { kOthers.product(problem); }
inline void run_widening(const Widening& problem) { kOthers.widen(problem); }
inline bool digits_here() { return kOthers.digits(); }
#endif

template <template <typename...> class Run, typename Cell, typename Problem>
void run_dtype(const Problem& problem) {
#if FUSEDRNN_ONLY_BFLOAT16
  // Of few rows dgates are widened, and tiles would be empty.
  constexpr bool kReads = FUSEDRNN_DOTS && std::is_same_v<Problem, Forward>;
  if (problem.shape.dtype != Dtype::kBfloat16 || (kTiles && problem.shape.heads > 1) ||
      (!kReads && Run<Cell, Bfloat16>::reads_weights(problem))) {
    return run_elsewhere(problem);
  }
  return Run<Cell, Bfloat16>(problem).run();
#else
  switch (problem.shape.dtype) {
    case Dtype::kFloat32:
#ifndef FUSEDRNN_CELL
      if constexpr (std::is_same_v<Problem, Forward>) {
        if (problem.weights == Weights::kBfloat16) return Run<Cell, float, Bfloat16>(problem).run();
        if (problem.weights != Weights::kSame) return Run<Cell, float, int8_t>(problem).run();
      }
#endif
      return Run<Cell, float>(problem).run();
    case Dtype::kFloat64:
      return Run<Cell, double>(problem).run();
    case Dtype::kBfloat16:
      return Run<Cell, Bfloat16>(problem).run();
    case Dtype::kFloat16:
      return Run<Cell, Half>(problem).run();
  }
#endif
}

#ifndef FUSEDRNN_CELL
#if !FUSEDRNN_ONLY_BFLOAT16
template <typename W>
void widen(const Widening& p) {
  constexpr int kWidth = Vec<float>::kWidth;
  in_parallel(is_crowded() ? 1 : p.threads, [&p](int thread, int threads) {
    for (int64_t row = p.rows * thread / threads; row < p.rows * (thread + 1) / threads; ++row) {
      const W* from = static_cast<const W*>(p.from) + row * p.columns;
      float* to = p.to + row * p.columns;
      const Vec<float> scale(p.scale ? p.scale[row] : 1.0f);
      for (int64_t k = 0; k < p.columns; k += kWidth) {
        store(to + k, load<float>(from + k, p.columns - k) * scale, p.columns - k);
      }
    }
  });
}
inline void run_widening(const Widening& problem) {
  problem.weights == Weights::kBfloat16 ? widen<Bfloat16>(problem) : widen<int8_t>(problem);
}
inline bool digits_here() { return has_digits(false); }
#endif

template <template <typename...> class Run, typename Problem>
void run_cell(const Problem& problem) {
  switch (problem.shape.cell) {
#define FUSEDRNN_CASE(Cell) \
  case CellKind::k##Cell:   \
    return run_dtype<Run, Cell>(problem);
    FUSEDRNN_CELLS(FUSEDRNN_CASE)
#undef FUSEDRNN_CASE
  }
}

#define FUSEDRNN_STRING(name) #name
#define FUSEDRNN_NAME(name) FUSEDRNN_STRING(name)

extern const Kernels kernels = {
    FUSEDRNN_NAME(FUSEDRNN_CAPABILITY), kTiles,      FUSEDRNN_DOTS, run_cell<ForwardRun, Forward>,
    run_cell<BackwardRun, Backward>,    run_product, run_widening,  digits_here};

#else

extern "C" __attribute__((visibility("default"))) const OwnCell* fusedrnn_cell() {
  using Cell = FUSEDRNN_CELL;
  struct Map {
    int64_t of[Cell::kGates];
    explicit Map(int (*acc)(int)) {
      for (int g = 0; g < Cell::kGates; ++g) of[g] = acc(g);
    }
  };
  static const Map x_acc([](int g) { return Cell::x_acc(g); }), h_acc([](int g) { return Cell::h_acc(g); });
  static const OwnCell cell = {kOwnCell,
                               Cell::kName,
                               Cell::kGates,
                               Cell::kAccumulators,
                               Cell::kSaved,
                               Cell::kStates,
                               Cell::kParameters,
                               Cell::kInputs,
                               kProjects<Cell>,
                               x_acc.of,
                               h_acc.of,
                               run_dtype<ForwardRun, Cell, Forward>,
                               run_dtype<BackwardRun, Cell, Backward>};
  return &cell;
}
#endif

}  // namespace fusedrnn::FUSEDRNN_CAPABILITY
