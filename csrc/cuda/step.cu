#include <cuda_runtime.h>
#include "params.h"
extern "C" int fusedrnn_step_forward(const FusedrnnForward*, void*) { return cudaErrorInvalidValue; }
extern "C" int fusedrnn_step_backward(const FusedrnnBackward*, void*) { return cudaErrorInvalidValue; }
