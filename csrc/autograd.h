// Autograd in C++: the ops called directly, and whole calls of layers and cells.
#pragma once

#include <ATen/core/boxing/KernelFunction.h>
#include <Python.h>

namespace fusedrnn {

// The ops' kernel for autograd: passes on; what depends on an input that requires grad raises in backward.
void not_differentiable(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack);

// Methods of the Python module. Each computes one call of a module on the backend "cpu", and answers None where
// something is not plain (a tensor subclass, a transform, autocast, shapes that do not fit): the way through Python
// then computes it, or says what is wrong.
//   cell(cell, module, names, input, h0, c0): h, and c of a cell that has one.
//   layers(cell, module, names, input, h0, c0, bias, num_layers, directions, batch_first): y, h_n, and c_n likewise.
// module is a module's __dict__, names those of its weights; h0 and c0 may be None, which is zeros.
extern PyMethodDef direct_calls[];

}  // namespace fusedrnn
