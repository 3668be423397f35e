// The cell of a step whose products were made before, by GEMMs: worth it where the rows are many.
#include "instances.h"
#include "step.cuh"

namespace fusedrnn {

// A warp takes 32 units of a row.
template <typename Cell, typename Type>
__device__ __forceinline__ void step_cell(
    const ForwardStepOf<typename Arithmetic<Type>::Scalar, typename Arithmetic<Type>::Accumulator>& p) {
  using Accumulator = typename Arithmetic<Type>::Accumulator;
  const int row = int(blockIdx.x) * kWarps + int(threadIdx.x >> 5), unit = int(blockIdx.y) * 32 + (threadIdx.x & 31);
  if (row >= p.rows || unit >= p.hidden) return;
  const int64_t at = int64_t(row) * Cell::kGates * p.hidden + unit;
  advance_unit<Cell>(p, row, unit, [&](Accumulator* sum) {
#pragma unroll
    for (int a = 0; a < Cell::kAccumulators; ++a) {
      if (x_gate<Cell>(a) >= 0) sum[a] += p.x_product[at + x_gate<Cell>(a) * p.hidden];
      if (h_gate<Cell>(a) >= 0) sum[a] += p.h_product[at + h_gate<Cell>(a) * p.hidden];
    }
  });
}

}  // namespace fusedrnn

#define FUSEDRNN_KERNEL(Cell, dtype, size, rows)                                                                  \
  extern "C" __global__ void __launch_bounds__(fusedrnn::kThreads) step_cell_##Cell##_##dtype##_##size##_##rows(  \
      const __grid_constant__ fusedrnn::ForwardStepOf<fusedrnn::Arithmetic<fusedrnn::dtypes::dtype>::Scalar,      \
                                                      fusedrnn::Arithmetic<fusedrnn::dtypes::dtype>::Accumulator> \
          p) {                                                                                                    \
    fusedrnn::step_cell<fusedrnn::Cell, fusedrnn::dtypes::dtype>(p);                                              \
  }
FUSEDRNN_STEP_CELL(FUSEDRNN_KERNEL)
