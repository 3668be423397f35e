// The C interface of the launchers: raw pointers, sizes and a stream. No allocation, no synchronisation; the first
// launch of a kind loads its code.
#pragma once

#include "params.h"

#ifdef __cplusplus
extern "C" {
#endif

#define FUSEDRNN_API __attribute__((visibility("default")))

// Kernels and the driver that runs them. driver: the library that has its functions, "libcuda.so.1"; folder: where the
// device code lies, <file>.sm_80.cubin, <file>.compute_80.ptx, ... for each file of kernels. Null: fusedrnn_error()
// says why. Lives until the process ends; every thread may use it at once.
typedef struct FusedrnnKernels FusedrnnKernels;
FUSEDRNN_API FusedrnnKernels* fusedrnn_open(const char* driver, const char* folder);

// 0, or what the driver returned (999 where it was not asked) and fusedrnn_error() says why. Launches on a stream of a
// device's primary context, or of the context that is current if that is of this device.
FUSEDRNN_API int fusedrnn_step_forward(FusedrnnKernels*, const FusedrnnForward*, int device, void* stream);
FUSEDRNN_API int fusedrnn_step_backward(FusedrnnKernels*, const FusedrnnBackward*, int device, void* stream);
FUSEDRNN_API int fusedrnn_step_cell(FusedrnnKernels*, const FusedrnnCellStep*, int device, void* stream);
// count: 1, or 2 for an array with both directions of a layer, which have everything but pointers and `reverse` in
// common.
FUSEDRNN_API int fusedrnn_persistent_forward(FusedrnnKernels*, const FusedrnnForward*, int count, int device,
                                             void* stream);
FUSEDRNN_API int fusedrnn_persistent_backward(FusedrnnKernels*, const FusedrnnBackward*, int count, int device,
                                              void* stream);
// Whether a device of that number can launch blocks that wait for each other.
FUSEDRNN_API int fusedrnn_cooperative(FusedrnnKernels*, int device);
// Which packet never came, if a persistent kernel gave up; it traps, and its context is dead, so that the call that
// notices may be anybody's. Empty where none did since it was asked, or a launch failed, last. Valid until the next
// call of this thread.
FUSEDRNN_API const char* fusedrnn_fault(FusedrnnKernels*);
// What the last call of this thread that failed said.
FUSEDRNN_API const char* fusedrnn_error(void);
// The images in a folder that a card of a compute capability may take, the best first, with spaces between them. Asks
// no driver. Valid until the next call of this thread.
FUSEDRNN_API const char* fusedrnn_images(const char* folder, int major, int minor);
// The number of a cell of one's own; -1: fusedrnn_error() says why. Its calls take FusedrnnOwnForward and
// FusedrnnOwnBackward, of which they are given the beginning. A call that needs a kernel which has no code yet returns
// FUSEDRNN_NO_CODE, fusedrnn_error() is its name, and the call may be made again when it has.
#define FUSEDRNN_NO_CODE 998
FUSEDRNN_API int fusedrnn_add_cell(FusedrnnKernels*, const FusedrnnOwnCell*);
// An image of such a kernel; of several the first that the driver takes is loaded. 0, or 999 and fusedrnn_error() says
// why.
FUSEDRNN_API int fusedrnn_add_code(FusedrnnKernels*, int cell, const char* kernel, const char* path);
// The name of the built-in cell of that number; null after the last.
FUSEDRNN_API const char* fusedrnn_cell_name(int cell);

#ifdef __cplusplus
}
#endif
