#include "instances.h"
#include "step.cuh"

namespace fusedrnn {

template <typename Cell, typename Type, int kTiles, bool kWhole>
__device__ __forceinline__ void step_backward(const BackwardStepOf<typename Arithmetic<Type>::Scalar>& all) {
  const FusedrnnBackward& p = all.call;
  const Rows& step = all.step;
  const Upstream<typename Arithmetic<Type>::Scalar>& up = all.up;
  using Math = Arithmetic<Type>;
  using Scalar = typename Math::Scalar;
  using Accumulator = typename Math::Accumulator;
  using Sums = BackwardSums<Accumulator>;
  constexpr int kAccs = Cell::kAccumulators;
  extern __shared__ __align__(16) unsigned char shared[];
  Accumulator* const sums = reinterpret_cast<Accumulator*>(shared);
  int64_t of_state = 0, of_rows = 0;
  int depth = int(p.hidden);
  if constexpr (kOwn) of_state = all.of_state, of_rows = all.of_rows, depth = all.depth;
  const BlockUnits block = units_of<kBackwardUnits>(int(blockIdx.y), int(p.hidden), depth);
  // What W_hh does not multiply is passed over: zeros times an infinite gradient would be NaN.
  if constexpr (kOwn)
    own_backward_sums<Cell, Math, kTiles, kWhole>(sums, up.a, block, int(p.hidden), depth, up.from, up.matmul_rows);
  else
    backward_sums<Math, kTiles, kWhole, Gap<Cell>::kAny>(sums, up.a, p.hidden, up.k, up.from, up.matmul_rows,
                                                         Gap<Cell>::kFirst * p.hidden, Gap<Cell>::kWidth * p.hidden);

  const int local = threadIdx.x >> 3, row = int(blockIdx.x) * kTiles * 8 + local;
  if (local >= kTiles * 8 || row >= step.rows) return;
  const int64_t hidden = p.hidden, first = kOwn ? block.first : int64_t(blockIdx.y) * kBackwardUnits,
                unit = first + 2 * (threadIdx.x & 7);
  const int64_t end = kOwn ? block.end : hidden;
  const bool recurrent = row < step.before_rows, goes_on = row < step.next_rows;
  const bool reset = p.resets && p.resets[step.offset + row];
  BackwardUnits<Cell, Accumulator> u;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int k = 0; k < kSlots<Cell>; ++k) u.d[k][j] = u.next[k][j] = u.prev[k][j] = 0;
#pragma unroll
    for (int k = 0; k < kSavedOrOne<Cell>; ++k) u.saved[j][k] = 0;
    if (unit + j >= end) continue;
    const int64_t in_batch = row * hidden + unit + j, at = step.offset * hidden + in_batch,
                  at_next = all.next_offset * hidden + in_batch;
    if (row >= up.matmul_rows && up.start) u.d[0][j] = widen(up.start[in_batch]);
    if (up.plus) u.d[0][j] += widen(up.plus[in_batch]);
    if constexpr (Cell::kDirectH)
      if (recurrent) u.d[0][j] += static_cast<const Accumulator*>(p.dh_direct)[in_batch];
    if constexpr (Cell::kSaved > 0)
      load_pack<Scalar, Accumulator, Cell::kSaved>(static_cast<const Scalar*>(p.gates) + at * Cell::kSaved, u.saved[j]);
#pragma unroll
    for (int k = 1; k < Cell::kStates; ++k) {
      const int64_t rows_on = (k - 1) * of_rows, on = (k - 1) * of_state;
      u.next[k][j] = static_cast<const Accumulator*>(p.cells)[at + rows_on];
      if (!reset)
        u.prev[k][j] = goes_on ? static_cast<const Accumulator*>(p.cells)[at_next + rows_on]
                               : Accumulator(widen(static_cast<const Scalar*>(p.c0)[in_batch + on]));
      if (recurrent)
        u.d[k][j] = static_cast<const Accumulator*>(p.state)[in_batch + on];
      else if (p.dc_n)
        u.d[k][j] = widen(static_cast<const Scalar*>(p.dc_n)[in_batch + on]);
      if (p.dcells) u.d[k][j] += static_cast<const Accumulator*>(p.dcells)[at + rows_on];
    }
    if constexpr (kOwn) u.load_own(j, all.parameters + unit + j, hidden, all.inputs + at, of_rows);
    if constexpr (Cell::kUsesH) u.next[0][j] = widen(static_cast<const Scalar*>(p.y)[at]);
    if constexpr (Cell::kUsesHPrev)
      if (!reset)
        u.prev[0][j] =
            widen(goes_on ? static_cast<const Scalar*>(p.y)[at_next] : static_cast<const Scalar*>(p.h0)[in_batch]);
  }
  advance_back<Cell, Accumulator>(sums + Sums::place(local, 0, 2 * (threadIdx.x & 7)),
                                  row < up.matmul_rows && !(up.cut && up.cut[row]), u);
  if (reset) u.stop();
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (unit + j >= end) continue;
    const int64_t in_batch = row * hidden + unit + j;
#pragma unroll
    for (int a = 0; a < kAccs; ++a)
      static_cast<Scalar*>(p.dgates)[(step.offset + row) * kAccs * hidden + a * hidden + unit + j] =
          narrow<Scalar>(u.dacc[a][j]);
#pragma unroll
    for (int k = 1; k < Cell::kStates; ++k) {
      const int64_t on = in_batch + (k - 1) * of_state;
      static_cast<Accumulator*>(p.state)[on] = u.dprev[k][j];
      if (!goes_on) static_cast<Scalar*>(p.dc0)[on] = narrow<Scalar>(u.dprev[k][j]);
    }
    if constexpr (Cell::kDirectH) static_cast<Accumulator*>(p.dh_direct)[in_batch] = u.dprev[0][j];
    if constexpr (kOwn) {
      const int64_t at = step.offset * hidden + in_batch;
      u.store_own(j, all.dparameters + at, all.dinputs + at, of_rows);
    }
  }
}

}  // namespace fusedrnn

// Left to choose how many blocks share a multiprocessor, the compiler spills to fit one more.
#define FUSEDRNN_KERNEL(Cell, dtype, size, rows)                                                                       \
  extern "C" __global__ void __launch_bounds__(fusedrnn::kThreads, 1)                                                  \
      step_backward_##Cell##_##dtype##_##size##_##rows(                                                                \
          const __grid_constant__ fusedrnn::BackwardStepOf<fusedrnn::Arithmetic<fusedrnn::dtypes::dtype>::Scalar> p) { \
    fusedrnn::step_backward<fusedrnn::Cell, fusedrnn::dtypes::dtype, size, fusedrnn::rows>(p);                         \
  }
FUSEDRNN_STEP_BACKWARD(FUSEDRNN_KERNEL)
