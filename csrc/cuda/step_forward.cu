#include "instances.h"
#include "step.cuh"

namespace fusedrnn {

template <typename Cell, typename Type, int kTiles, bool kWhole>
__device__ __forceinline__ void step_forward(
    const ForwardStep<typename Arithmetic<Type>::Scalar, typename Arithmetic<Type>::Accumulator>& p) {
  using Math = Arithmetic<Type>;
  using Scalar = typename Math::Scalar;
  using Accumulator = typename Math::Accumulator;
  using Sums = ForwardSums<Cell, Accumulator>;
  using Sum = typename Sums::Sum;
  constexpr int kAccs = Cell::kAccumulators, kMT = kMTiles<Cell>;
  constexpr int kElements = (kTiles * 8 * kForwardUnits + kThreads - 1) / kThreads, kStride = kThreads / kForwardUnits;
  extern __shared__ __align__(16) unsigned char shared[];
  Sum* const sums = reinterpret_cast<Sum*>(shared);

  const int octet = keep(int(threadIdx.x & 31) >> 2), first = keep(int(blockIdx.x) * kTiles * 8);
  const int lane_unit = min(int(blockIdx.y) * kForwardUnits + octet, p.hidden - 1);
  Accumulator acc[kTiles][kMT][4] = {};
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    // Rows beyond the last unit or the last row of the batch repeat it: their sums are not read.
    const Scalar *a[2 * kMT], *b[kTiles];
    const int k_size = part == 0 ? p.input : p.out;
    const Scalar* const weights = (part == 0 ? p.w_ih : p.w_hh) + int64_t(lane_unit) * k_size;
    const int64_t gate_size = int64_t(p.hidden) * k_size;
#pragma unroll
    for (int i = 0; i < 2 * kMT; ++i) {
      const int gate = i >= kAccs ? -1 : part == 0 ? x_gate<Cell>(i) : h_gate<Cell>(i);
      a[i] = gate >= 0 ? weights + gate * gate_size : nullptr;
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int row = min(first + tile * 8 + octet, p.rows - 1);
      b[tile] = (part == 0 ? p.x : row < p.before_rows ? p.h_before : p.h0) + int64_t(row) * k_size;
    }
    if (part == 1 && p.resets) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
        if (p.resets[min(first + tile * 8 + octet, p.rows - 1)]) b[tile] = p.zeros;
    }
    Accumulator before[kTiles][kMT][4];
    if constexpr (has_gaps<Cell>()) memcpy(before, acc, sizeof(acc));
    accumulate<Math, has_gaps<Cell>(), 2 * kMT, kTiles, kWhole>(acc, a, b, k_size);
    if constexpr (has_gaps<Cell>()) {
      // Zeros times an infinite x or h are NaN, but these sums have no such part.
#pragma unroll
      for (int i = 0; i < kAccs; ++i)
#pragma unroll
        for (int j = 0; j < 2 * kTiles; ++j)
          if (a[i] == nullptr) acc[j / 2][i / 2][2 * (i % 2) + j % 2] = before[j / 2][i / 2][2 * (i % 2) + j % 2];
    }
  }
  Sum* const lane_sums = sums + keep(Sums::lane_place());
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) Sums::store(lane_sums + tile * 8 * kWarps * kForwardUnits, acc[tile]);
  __syncthreads();

  const int unit = int(blockIdx.y) * kForwardUnits + (threadIdx.x & 7);
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const int local = (threadIdx.x >> 3) + kStride * i, row = first + local;
    if (local >= kTiles * 8 || row >= p.rows || unit >= p.hidden) continue;
    const int64_t at = keep(int64_t(row) * p.hidden + unit);
    Accumulator sum[kAccs] = {}, h, h_prev = 0, c = 0, c_prev = 0, saved[kSavedOrOne<Cell>];
    const auto add_bias = [&](const Scalar* bias, auto is_x) {
      if (bias == nullptr) return;
      const Scalar* of_unit = keep(bias + unit);
#pragma unroll
      for (int a = 0; a < kAccs; ++a) {
        const int gate = decltype(is_x)::value ? x_gate<Cell>(a) : h_gate<Cell>(a);
        if (gate >= 0) sum[a] += widen(of_unit[gate * p.hidden]);
      }
    };
    add_bias(p.b_ih, Constant<true>());
    add_bias(p.b_hh, Constant<false>());
    const bool joined = row < p.before_rows;
    if constexpr (kHasCellState<Cell>) c_prev = joined ? p.c_before[at] : Accumulator(widen(p.c0[at]));
    if constexpr (Cell::kUsesHPrev) h_prev = widen((joined ? p.h_before : p.h0)[at]);
    if (p.resets && p.resets[row]) h_prev = c_prev = 0;
    advance<Cell, Accumulator>(sums + Sums::place(local, 0, threadIdx.x & 7), sum, h_prev, c_prev, h, c, saved);
    const Scalar stored = narrow<Scalar>(h);
    p.h[at] = stored;
    if constexpr (Cell::kSaved > 0)
      if (p.gates) store_pack<Scalar, Accumulator, Cell::kSaved>(p.gates + at * Cell::kSaved, saved);
    if constexpr (kHasCellState<Cell>) p.c[at] = c;
    if (row >= p.next_rows) {
      if (p.h_n) p.h_n[at] = stored;
      if constexpr (kHasCellState<Cell>) p.c_n[at] = narrow<Scalar>(c);
    }
  }
}

}  // namespace fusedrnn

// Left to choose how many blocks share a multiprocessor, the compiler spills to fit one more.
#define FUSEDRNN_KERNEL(Cell, dtype, size, rows)                                                                       \
  extern "C" __global__ void __launch_bounds__(fusedrnn::kThreads, 1) step_forward_##Cell##_##dtype##_##size##_##rows( \
      const __grid_constant__ fusedrnn::ForwardStep<fusedrnn::Arithmetic<fusedrnn::dtypes::dtype>::Scalar,             \
                                                    fusedrnn::Arithmetic<fusedrnn::dtypes::dtype>::Accumulator>        \
          p) {                                                                                                         \
    fusedrnn::step_forward<fusedrnn::Cell, fusedrnn::dtypes::dtype, size, fusedrnn::rows>(p);                          \
  }
FUSEDRNN_STEP_FORWARD(FUSEDRNN_KERNEL)
