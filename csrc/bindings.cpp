// Registers the CPU kernels of the ops (their schemas are in fusedrnn/ops.py) and tells how this file was built.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include "autograd.h"
#include "cpu/recurrence.h"
#include "cpu/sequence.h"

#ifndef FUSEDRNN_TORCH_VERSION
#define FUSEDRNN_TORCH_VERSION ""
#endif

TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) {
  m.impl("sequence", fusedrnn::sequence_cpu);
  m.impl("sequence_backward", fusedrnn::sequence_backward_cpu);
}

TORCH_LIBRARY_IMPL(fusedrnn, Autograd, m) {
  m.impl("sequence", torch::CppFunction::makeFromBoxedFunction<&fusedrnn::not_differentiable>());
  m.impl("sequence_backward", torch::CppFunction::makeFromBoxedFunction<&fusedrnn::not_differentiable>());
}

PYBIND11_MODULE(_C, m) {
  PyModule_AddFunctions(m.ptr(), fusedrnn::direct_calls);
  m.def("facts", [] {
    pybind11::dict facts;
    facts["torch_built"] = FUSEDRNN_TORCH_VERSION;
    facts["compiler"] = __VERSION__;
    facts["cpu_capability"] = fusedrnn::kernels().name;
    facts["cpu_capabilities_built"] = pybind11::str(fusedrnn::compiled_capabilities()).attr("split")();
    return facts;
  });
}
