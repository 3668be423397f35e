#include "instances.h"
#include "step.cuh"

namespace fusedrnn {

template <typename Cell, typename Type, int kTiles, bool kWhole>
__device__ __forceinline__ void step_backward(const BackwardStep<typename Arithmetic<Type>::Scalar>& all) {
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
  // What W_hh does not multiply is passed over: zeros times an infinite gradient would be NaN.
  backward_sums<Math, kTiles, kWhole, Gap<Cell>::kAny>(sums, up.a, p.hidden, up.k, up.from, up.matmul_rows,
                                                       Gap<Cell>::kFirst * p.hidden, Gap<Cell>::kWidth * p.hidden);

  const int local = threadIdx.x >> 3, row = int(blockIdx.x) * kTiles * 8 + local;
  if (local >= kTiles * 8 || row >= step.rows) return;
  const int64_t hidden = p.hidden, unit = int64_t(blockIdx.y) * kBackwardUnits + 2 * (threadIdx.x & 7);
  const bool recurrent = row < step.before_rows, goes_on = row < step.next_rows;
  const bool reset = p.resets && p.resets[step.offset + row];
  BackwardUnits<Cell, Accumulator> u;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    u.dh[j] = u.dc[j] = u.h[j] = u.h_prev[j] = u.c[j] = u.c_prev[j] = 0;
#pragma unroll
    for (int k = 0; k < kSavedOrOne<Cell>; ++k) u.saved[j][k] = 0;
    if (unit + j >= hidden) continue;
    const int64_t in_batch = row * hidden + unit + j, at = step.offset * hidden + in_batch,
                  at_next = all.next_offset * hidden + in_batch;
    if (row >= up.matmul_rows && up.start) u.dh[j] = widen(up.start[in_batch]);
    if (up.plus) u.dh[j] += widen(up.plus[in_batch]);
    if constexpr (Cell::kDirectH)
      if (recurrent) u.dh[j] += static_cast<const Accumulator*>(p.dh_direct)[in_batch];
    if constexpr (Cell::kSaved > 0)
      load_pack<Scalar, Accumulator, Cell::kSaved>(static_cast<const Scalar*>(p.gates) + at * Cell::kSaved, u.saved[j]);
    if constexpr (kHasCellState<Cell>) {
      u.c[j] = static_cast<const Accumulator*>(p.cells)[at];
      if (!reset)
        u.c_prev[j] = goes_on ? static_cast<const Accumulator*>(p.cells)[at_next]
                              : Accumulator(widen(static_cast<const Scalar*>(p.c0)[in_batch]));
      if (recurrent)
        u.dc[j] = static_cast<const Accumulator*>(p.state)[in_batch];
      else if (p.dc_n)
        u.dc[j] = widen(static_cast<const Scalar*>(p.dc_n)[in_batch]);
      if (p.dcells) u.dc[j] += static_cast<const Accumulator*>(p.dcells)[at];
    }
    if constexpr (Cell::kUsesH) u.h[j] = widen(static_cast<const Scalar*>(p.y)[at]);
    if constexpr (Cell::kUsesHPrev)
      if (!reset)
        u.h_prev[j] =
            widen(goes_on ? static_cast<const Scalar*>(p.y)[at_next] : static_cast<const Scalar*>(p.h0)[in_batch]);
  }
  advance_back<Cell, Accumulator>(sums + Sums::place(local, 0, 2 * (threadIdx.x & 7)),
                                  row < up.matmul_rows && !(up.cut && up.cut[row]), u);
  if (reset) u.stop();
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (unit + j >= hidden) continue;
    const int64_t in_batch = row * hidden + unit + j;
#pragma unroll
    for (int a = 0; a < kAccs; ++a)
      static_cast<Scalar*>(p.dgates)[(step.offset + row) * kAccs * hidden + a * hidden + unit + j] =
          narrow<Scalar>(u.dacc[a][j]);
    if constexpr (kHasCellState<Cell>) {
      static_cast<Accumulator*>(p.state)[in_batch] = u.dc_prev[j];
      if (!goes_on) static_cast<Scalar*>(p.dc0)[in_batch] = narrow<Scalar>(u.dc_prev[j]);
    }
    if constexpr (Cell::kDirectH) static_cast<Accumulator*>(p.dh_direct)[in_batch] = u.dh_prev[j];
  }
}

}  // namespace fusedrnn

// Left to choose how many blocks share a multiprocessor, the compiler spills to fit one more.
#define FUSEDRNN_KERNEL(Cell, dtype, size, rows)                                                                     \
  extern "C" __global__ void __launch_bounds__(fusedrnn::kThreads, 1)                                                \
      step_backward_##Cell##_##dtype##_##size##_##rows(                                                              \
          const __grid_constant__ fusedrnn::BackwardStep<fusedrnn::Arithmetic<fusedrnn::dtypes::dtype>::Scalar> p) { \
    fusedrnn::step_backward<fusedrnn::Cell, fusedrnn::dtypes::dtype, size, fusedrnn::rows>(p);                       \
  }
FUSEDRNN_STEP_BACKWARD(FUSEDRNN_KERNEL)
