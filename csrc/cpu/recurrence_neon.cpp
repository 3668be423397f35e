#define FUSEDRNN_CAPABILITY neon
#define FUSEDRNN_VECTOR_BYTES 16
#define FUSEDRNN_NEON 1
#define FUSEDRNN_TILES 0
#include "recurrence_kernels.h"
