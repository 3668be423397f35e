#define FUSEDRNN_CAPABILITY avx512
#define FUSEDRNN_VECTOR_BYTES 64
#define FUSEDRNN_TILES 0
#include "recurrence_kernels.h"
