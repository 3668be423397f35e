#include "instances.h"
#include "persistent_forward.cuh"

// Left to choose how many blocks share a multiprocessor, the compiler spills to fit one more.
#define FUSEDRNN_KERNEL(Cell, dtype, size, rows)                                                       \
  extern "C" __global__ void __launch_bounds__(fusedrnn::kThreads, 1)                                  \
      persistent_forward_##Cell##_##dtype##_##size##_##rows(                                           \
          const __grid_constant__ fusedrnn::Directions<fusedrnn::ForwardOf> p) {                       \
    fusedrnn::persistent_forward<fusedrnn::Cell, fusedrnn::dtypes::dtype, 8, size, fusedrnn::rows>(p); \
  }
FUSEDRNN_PERSISTENT_FORWARD(FUSEDRNN_KERNEL)
