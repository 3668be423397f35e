// Registers the CPU kernels of the ops (their schemas are in fusedrnn/ops.py) and tells how this file was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
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
    const auto products = [](fusedrnn::Dtype dtype) { return fusedrnn::host_multiplies(dtype) ? "host" : "panels"; };
    pybind11::dict by_dtype;
    by_dtype["bfloat16"] = products(fusedrnn::Dtype::kBfloat16);
    by_dtype["float16"] = products(fusedrnn::Dtype::kFloat16);
    facts["cpu_products"] = by_dtype;
    facts["cpu_capabilities_built"] = pybind11::str(fusedrnn::compiled_capabilities()).attr("split")();
    return facts;
  });
  // The choice alone, for the tests: of any processor.
  m.def("cpu_products", [](const char* capability, bool has_bfloat16, std::optional<std::string> onednn_limit,
                           bool of_bfloat16, std::optional<std::string> forced) {
    const fusedrnn::Processor processor{capability, has_bfloat16, onednn_limit ? onednn_limit->c_str() : nullptr};
    const auto dtype = of_bfloat16 ? fusedrnn::Dtype::kBfloat16 : fusedrnn::Dtype::kFloat16;
    return fusedrnn::host_multiplies(processor, dtype, forced ? forced->c_str() : nullptr) ? "host" : "panels";
  });
}
