// Matrices repacked into panels, [depth][vectors][W lanes]: what a kernel streams once from front to back. Of bfloat16
// two of the depth stand side by side, [depth / 2][vectors][W lanes][2], zeros behind an odd depth: one load gives
// both.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <type_traits>

#include "recurrence.h"
#include "simd.h"

// What GCC makes of "#pragma omp parallel", called by name: every compiler then shares the threads of the OpenMP that
// torch brings. LLVM's has these functions too.
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
extern "C" int omp_get_thread_num();
extern "C" int omp_get_num_threads();

namespace fusedrnn::FUSEDRNN_CAPABILITY {

FUSEDRNN_INLINE constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FUSEDRNN_INLINE constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
FUSEDRNN_INLINE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Throws where memory runs out, so it has to be built outside of the parallel region: nothing in there may throw.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    if (count == 0) return;
    const int64_t bytes = divide_up(count * sizeof(T), 64) * 64;
    data_ = static_cast<T*>(aligned_alloc(64, static_cast<size_t>(bytes)));
    if (!data_) out_of_memory(bytes);
  }
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_ = nullptr;
};

template <typename P>
constexpr bool kPairs = std::is_same_v<P, Bfloat16>;
template <typename P>
FUSEDRNN_INLINE constexpr int64_t padded_depth(int64_t depth) {
  return kPairs<P> ? divide_up(depth, 2) * 2 : depth;
}

// Vector v of `vectors` of a panel of weight^T: lane j at depth k is weight[j][k]; lanes beyond `count` are zero.
FUSEDRNN_COLD inline void pack_rows_in_pairs(Bfloat16* panel, int vectors, int v, const Bfloat16* weight,
                                             int64_t stride, int64_t count, int64_t depth) {
  constexpr int kWidth = Vec<float>::kWidth, kBoth = 2 * kWidth;
  panel += v * kBoth;
  for (int64_t k = 0; k < depth; k += kBoth) {
    const int64_t width = min(kBoth, depth - k);
    // Pairs move as one float.
    Vec<float> tile[kWidth];
    for (int j = 0; j < kWidth; ++j) {
      Bfloat16 padded[kBoth] = {};
      if (j < count) memcpy(padded, weight + j * stride + k, static_cast<size_t>(width) * sizeof(Bfloat16));
      tile[j] = load(reinterpret_cast<const float*>(padded));
    }
    transpose<1, kWidth>(tile);
    for (int64_t j = 0; j < divide_up(width, 2); ++j) {
      store(reinterpret_cast<float*>(panel + (k / 2 + j) * vectors * kBoth), tile[j]);
    }
  }
}
template <typename C, typename P, typename E>
FUSEDRNN_COLD void pack_rows(P* panel, int vectors, int v, const E* weight, int64_t stride, int64_t count,
                             int64_t depth) {
  if constexpr (kPairs<P>) return pack_rows_in_pairs(panel, vectors, v, weight, stride, count, depth);
  constexpr int kWidth = Vec<C>::kWidth;
  panel += v * kWidth;
  for (int64_t k = 0; k < depth; k += kWidth) {
    const int64_t width = min(kWidth, depth - k);
    Vec<C> tile[kWidth];
    for (int j = 0; j < kWidth; ++j) tile[j] = j < count ? load<C>(weight + j * stride + k, width) : Vec<C>(C(0));
    transpose<1, kWidth>(tile);
    for (int64_t j = 0; j < width; ++j) store_exact(panel + (k + j) * vectors * kWidth, tile[j]);
  }
}

// One panel of weight: lane j of vector v at depth k is weight[k][v * W + j]; columns beyond `count` are zero.
template <int kVectors, typename C, typename P, typename E>
FUSEDRNN_COLD void pack_columns(P* panel, const E* weight, int64_t stride, int64_t count, int64_t depth) {
  constexpr int kWidth = Vec<C>::kWidth;
  const auto part = [&](int64_t k, int v) {
    const int64_t left = count - v * kWidth;
    return left > 0 && k < depth ? load<C>(weight + k * stride + v * kWidth, left) : Vec<C>(C(0));
  };
  for (int64_t k = 0; k < depth; k += 1 + kPairs<P>) {
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kPairs<P>) {
        store_pair(panel + (k * kVectors + 2 * v) * kWidth, {part(k, v), part(k + 1, v)});
      } else {
        store_exact(panel + (k * kVectors + v) * kWidth, part(k, v));
      }
    }
  }
}

// f(thread, threads) on up to `threads` threads.
template <typename F>
void in_parallel(int threads, F f) {
  if (threads == 1) return f(0, 1);
  const auto body = [](void* data) { (*static_cast<F*>(data))(omp_get_thread_num(), omp_get_num_threads()); };
  GOMP_parallel(body, &f, static_cast<unsigned>(threads), 0);
}

}  // namespace fusedrnn::FUSEDRNN_CAPABILITY
