#define FUSEDRNN_CAPABILITY avx512_bf16
#define FUSEDRNN_VECTOR_BYTES 64
#define FUSEDRNN_TILES 0
#define FUSEDRNN_DOTS 1
#include "recurrence_kernels.h"
