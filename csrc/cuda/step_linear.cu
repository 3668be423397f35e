#include "instances.h"
#include "step.cuh"

namespace fusedrnn {

template <typename Type, int kTiles, bool kWhole>
__device__ __forceinline__ void step_linear(const Linear<typename Arithmetic<Type>::Scalar>& p) {
  using Math = Arithmetic<Type>;
  using Scalar = typename Math::Scalar;
  using Accumulator = typename Math::Accumulator;
  using Sums = BackwardSums<Accumulator>;
  extern __shared__ __align__(16) unsigned char shared[];
  Accumulator* const sums = reinterpret_cast<Accumulator*>(shared);
  backward_sums<Math, kTiles, kWhole>(sums, p.a, p.n, p.k, p.from, p.matmul_rows);
  const int local = threadIdx.x >> 3, row = int(blockIdx.x) * kTiles * 8 + local;
  if (local >= kTiles * 8 || row >= p.rows) return;
  const int64_t unit = int64_t(blockIdx.y) * kBackwardUnits + 2 * (threadIdx.x & 7);
  Accumulator total[2] = {};
  if (row < p.matmul_rows && !(p.cut && p.cut[row]))
    Sums::add_up(sums + Sums::place(local, 0, 2 * (threadIdx.x & 7)), total);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (unit + j >= p.n) continue;
    const int64_t at = row * p.n + unit + j;
    if (row >= p.matmul_rows && p.start) total[j] = widen(p.start[at]);
    if (p.plus) total[j] += widen(p.plus[at]);
    p.to[at] = narrow<Scalar>(total[j]);
    if (row >= p.also_from) p.also_to[at] = p.to[at];
  }
}

}  // namespace fusedrnn

// Left to choose how many blocks share a multiprocessor, the compiler spills to fit one more.
#define FUSEDRNN_KERNEL(dtype, size, rows)                                                                   \
  extern "C" __global__ void __launch_bounds__(fusedrnn::kThreads, 1) step_linear_##dtype##_##size##_##rows( \
      const __grid_constant__ fusedrnn::Linear<fusedrnn::Arithmetic<fusedrnn::dtypes::dtype>::Scalar> p) {   \
    fusedrnn::step_linear<fusedrnn::dtypes::dtype, size, fusedrnn::rows>(p);                                 \
  }
FUSEDRNN_STEP_LINEAR(FUSEDRNN_KERNEL)
