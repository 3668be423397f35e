// fusedrnn::sequence and fusedrnn::sequence_backward on the CPU, below torch's dispatcher; shapes as in recurrence.h
// and fusedrnn/ops.py. What is wrong with the arguments is a std::runtime_error.
#pragma once

#include <array>
#include <string_view>
#include <utility>
#include <vector>

#include "recurrence.h"
#include "tensor.h"

namespace fusedrnn {

// What some cells have beside h, c and weights: states after c, parameters [H], inputs [T, B, H] or [N, H].
struct More {
  std::vector<Tensor> states, parameters, inputs;
};

// None where there is none; batch_sizes and resets as well. Where w_ih is [G*H, 0], x [., ., G*H] is x W_ih^T itself.
struct Inputs {
  Tensor x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, resets;
  bool reverse = false;
  int64_t heads = 1;
  More more;
  Tensor panels;  // of w_hh, as `pack` gave them: w_hh is not packed again
  // w_ih, w_hh and w_hr are bfloat16, or int8 times these [G*H], [G*H] and [P]; x and all others are float32.
  bool quantized = false;
  Tensor scale_ih, scale_hh, scale_hr;
  Tensor panels_ih;      // of w_ih, as `pack` gave them, or none
  bool rounded = false;  // of int8 weights: x and h are rounded to 8 bits as well
};

// Of what was not kept, and of a c that there is not, a tensor without elements.
struct Outputs {
  Tensor y, h_n, c_n, gates, cells;
  std::vector<Tensor> more_n, more_cells;  // of the states after c
};

// Of x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr.
using Gradients = std::array<Tensor, 8>;

// Of what is in Inputs::more: what backward is given (None: zero), what is wanted, and what it answers.
struct MoreGradients {
  std::vector<Tensor> dfinal, devery, every;  // of the states after c
  std::vector<bool> states, parameters, inputs;
  More found;
};

// Of a cell: how many gates, and whether there is a c. An unknown name raises.
FUSEDRNN_API std::pair<int64_t, bool> gates_and_c(std::string_view cell);

struct Counts {
  int64_t states, parameters, inputs;
};
FUSEDRNN_API Counts counts_of(std::string_view cell);

// W_hh [G*H, P / heads] of a cell as the kernels of this processor want it: bytes that Inputs::panels takes. The same
// of W_ih [G*H, I] of one head, where it `packs_input` of such a dtype or it is `quantized`, for Inputs::panels_ih.
// rounded: those that meet rows rounded to 8 bits.
FUSEDRNN_API Tensor pack(std::string_view cell, const Tensor& w_hh, bool quantized = false, int64_t heads = 1,
                         bool rounded = false);
FUSEDRNN_API bool packs_input(std::string_view cell, int32_t dtype);

// What would be done: the kernels of `capability` go that way; the products of all rows with W_ih, and of a single step
// with W_hh, are the "kernel"'s, the "host"'s GEMM or ours of "panels".
struct Plan {
  const char* capability;
  Way way;
  const char *input_product, *state_product;
  bool directions_beside, layers_beside;  // where there is another and nothing is kept for backward
};
FUSEDRNN_API Plan plan(std::string_view cell, const Inputs& in, bool backward);

FUSEDRNN_API Outputs sequence(std::string_view cell, const Inputs& in, bool keep_gates, bool keep_cells);

// Without anything kept, into memory of the caller: y [T, B, P], h_n [B, P] and c_n [B, H] in one piece each.
FUSEDRNN_API void sequence_into(std::string_view cell, const Inputs& in, void* y, void* h_n, void* c_n);

struct Into {
  void *y, *h_n, *c_n;
};
// The two directions of a layer, side by side where that pays; rows of y are 2 P apart, to hold both.
FUSEDRNN_API void directions_into(std::string_view cell, const Inputs (&in)[2], const Into (&to)[2]);
// Two layers, the x of the second being the y of the first; where it pays the second is some steps behind.
FUSEDRNN_API void layers_into(std::string_view cell, const Inputs (&in)[2], const Into (&to)[2]);

// dcells: the gradient of every c. y, gates and cells as forward gave them.
FUSEDRNN_API Gradients sequence_backward(std::string_view cell, const Tensor& dy, const Tensor& dh_n,
                                         const Tensor& dc_n, const Tensor& dcells, const Inputs& in, const Tensor& y,
                                         const Tensor& gates, const Tensor& cells, const std::array<bool, 8>& needs,
                                         MoreGradients* more = nullptr);

}  // namespace fusedrnn
