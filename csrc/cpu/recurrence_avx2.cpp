#define FUSEDRNN_CAPABILITY avx2
#define FUSEDRNN_VECTOR_BYTES 32
#include "recurrence_kernels.h"
