#define FUSEDRNN_CAPABILITY avx2
#define FUSEDRNN_VECTOR_BYTES 32
#define FUSEDRNN_TILES 0
#include "recurrence_kernels.h"
