// fusedrnn::sequence and fusedrnn::sequence_backward on the CPU; shapes as in recurrence.h and fusedrnn/ops.py.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <utility>

namespace fusedrnn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Of a cell: how many gates, and whether there is a c. An unknown name raises.
std::pair<int64_t, bool> gates_and_c(c10::string_view cell);

Outputs sequence_cpu(c10::string_view cell, const Tensor& x, const Tensor& h0, const OptionalTensor& c0,
                     const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                     const OptionalTensor& w_hr, const OptionalTensor& batch_sizes, const OptionalTensor& resets,
                     bool reverse, c10::string_view backend, c10::string_view algorithm, bool keep_gates,
                     bool keep_cells);

Gradients sequence_backward_cpu(c10::string_view cell, const OptionalTensor& dy, const OptionalTensor& dh_n,
                                const OptionalTensor& dc_n, const OptionalTensor& dcells, const Tensor& x,
                                const Tensor& h0, const OptionalTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                                const OptionalTensor& b_ih, const OptionalTensor& b_hh, const OptionalTensor& w_hr,
                                const OptionalTensor& batch_sizes, const OptionalTensor& resets, bool reverse,
                                const Tensor& y, const Tensor& gates, const Tensor& cells, c10::string_view backend,
                                c10::string_view algorithm, c10::List<bool> needs);

}  // namespace fusedrnn
