#define FUSEDRNN_CAPABILITY portable
#define FUSEDRNN_VECTOR_BYTES 16
#define FUSEDRNN_TILES 0
#include "recurrence_kernels.h"
