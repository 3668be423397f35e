#include "instances.h"
#include "step.cuh"

namespace fusedrnn {

template <typename Cell, typename Type, int kTiles, bool kWhole>
__device__ __forceinline__ void step_forward(
    const ForwardStepOf<typename Arithmetic<Type>::Scalar, typename Arithmetic<Type>::Accumulator>& p) {
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
  int depth = p.out;  // of a row of W_hh
  if constexpr (kOwn) depth = p.depth;
  const BlockUnits block = units_of<kForwardUnits>(int(blockIdx.y), p.hidden, depth);
  const int lane_unit =
      kOwn ? min(block.first + octet, block.end - 1) : min(int(blockIdx.y) * kForwardUnits + octet, p.hidden - 1);
  Accumulator acc[kTiles][kMT][4] = {};
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    // Rows beyond the last unit or the last row of the batch repeat it: their sums are not read.
    const Scalar *a[2 * kMT], *b[kTiles];
    const int pitch = part == 0 ? p.input : p.out, k_size = kOwn && part == 1 ? depth : pitch;
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
      b[tile] = (part == 0 ? p.x : row < p.before_rows ? p.h_before : p.h0) + int64_t(row) * pitch;
      if (kOwn && part == 1) b[tile] += block.head;
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

  const int unit = (kOwn ? block.first : int(blockIdx.y) * kForwardUnits) + (threadIdx.x & 7);
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const int local = (threadIdx.x >> 3) + kStride * i, row = first + local;
    if (local >= kTiles * 8 || row >= p.rows || unit >= (kOwn ? block.end : p.hidden)) continue;
    advance_unit<Cell>(p, row, unit,
                       [&](Accumulator* sum) { Sums::add_up(sums + Sums::place(local, 0, threadIdx.x & 7), sum); });
  }
}

}  // namespace fusedrnn

// Left to choose how many blocks share a multiprocessor, the compiler spills to fit one more.
#define FUSEDRNN_KERNEL(Cell, dtype, size, rows)                                                                       \
  extern "C" __global__ void __launch_bounds__(fusedrnn::kThreads, 1) step_forward_##Cell##_##dtype##_##size##_##rows( \
      const __grid_constant__ fusedrnn::ForwardStepOf<fusedrnn::Arithmetic<fusedrnn::dtypes::dtype>::Scalar,           \
                                                      fusedrnn::Arithmetic<fusedrnn::dtypes::dtype>::Accumulator>      \
          p) {                                                                                                         \
    fusedrnn::step_forward<fusedrnn::Cell, fusedrnn::dtypes::dtype, size, fusedrnn::rows>(p);                          \
  }
FUSEDRNN_STEP_FORWARD(FUSEDRNN_KERNEL)
