#define FUSEDRNN_CAPABILITY amx
#define FUSEDRNN_VECTOR_BYTES 64
#define FUSEDRNN_TILES 1
#include "recurrence_kernels.h"
