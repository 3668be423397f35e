#define FUSEDRNN_CAPABILITY portable
#define FUSEDRNN_VECTOR_BYTES 16
#include "recurrence_kernels.h"
