// The ops' schemas and their kernels for CPU tensors, registered with torch when this library is loaded.
// fusedrnn/ops.py has the same schemas, for an installation without this library, and says what they mean.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "sequence.h"

namespace fusedrnn {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;
using Stack = StableIValue*;
using Held = std::optional<torch::stable::Tensor>;

#define FUSEDRNN_INPUTS                                                                             \
  "Tensor x, Tensor[] states, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, " \
  "Tensor[]? parameters, Tensor[]? inputs, Tensor? batch_sizes, Tensor? lengths, Tensor? resets, "  \
  "Tensor[]? reset_states, bool reverse, int heads, "
constexpr const char* kSequence = "sequence(str cell, " FUSEDRNN_INPUTS
                                  "str backend, str algorithm, bool keep_gates, bool keep_states)"
                                  " -> (Tensor y, Tensor[] final_states, Tensor gates, Tensor[] every_state)";
constexpr const char* kBackward =
    "sequence_backward(str cell, Tensor? dy, Tensor?[] dfinal_states, Tensor?[] devery_state, " FUSEDRNN_INPUTS
    "Tensor y, Tensor gates, Tensor[] every_state, str backend, str algorithm, bool[] needs)"
    " -> (Tensor dx, Tensor[] dstates, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh, Tensor dw_hr, "
    "Tensor[] dparameters, Tensor[] dinputs, Tensor[] dreset_states)";

Tensor borrow(const Held& held) { return held ? Tensor::borrow(held->get()) : Tensor(); }

StableIValue give(Tensor&& t) { return reinterpret_cast<uintptr_t>(t.release()); }

StableIValue give(std::vector<Tensor>&& tensors) {
  StableListHandle list = nullptr;
  FUSEDRNN_TORCH(torch_new_list_reserve_size(tensors.size(), &list));
  for (Tensor& t : tensors) FUSEDRNN_TORCH(torch_list_push_back(list, give(std::move(t))));
  return reinterpret_cast<uintptr_t>(list);
}

void borrow_all(const std::vector<torch::stable::Tensor>& from, std::vector<Tensor>& to) {
  for (const torch::stable::Tensor& t : from) to.push_back(Tensor::borrow(t.get()));
}

// The whole numbers of 8 bits and the scale of each row that float32 weights stand for; those that they were rounded
// to already are found again.
void to_int8(Tensor& w, Tensor& scale) {
  const Tensor from = w.contiguous();
  const int64_t rows = from.size(0), columns = from.size(1);
  Tensor to = Tensor::empty({rows, columns}, kInt8), scales = Tensor::empty({rows}, kFloat);
  for (int64_t row = 0; row < rows; ++row) {
    const float* const x = from.data<float>() + row * columns;
    int8_t* const q = static_cast<int8_t*>(to.writable()) + row * columns;
    float most = 0;
    for (int64_t k = 0; k < columns; ++k) {
      FUSEDRNN_CHECK(std::isfinite(x[k]), "fusedrnn::sequence: weights that become int8 must be finite");
      most = std::max(most, std::fabs(x[k]));
    }
    const float unit = most / 127;
    static_cast<float*>(scales.writable())[row] = unit;
    for (int64_t k = 0; k < columns; ++k) {
      const float rounded = unit > 0 ? std::nearbyint(x[k] / unit) : 0;
      q[k] = static_cast<int8_t>(std::clamp(rounded, -127.0f, 127.0f));
    }
  }
  w = std::move(to);
  scale = std::move(scales);
}

// The arguments that both ops share, taken from the stack.
struct Given {
  Held x, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, lengths, resets;
  std::vector<torch::stable::Tensor> states;
  // Absent and not empty: AOTInductor's executor hands an empty list over as None.
  std::optional<std::vector<torch::stable::Tensor>> parameters, inputs, reset_states;
  bool reverse;
  int64_t heads;

  explicit Given(Stack s)
      : x(to<torch::stable::Tensor>(s[0])),
        w_ih(to<torch::stable::Tensor>(s[2])),
        w_hh(to<torch::stable::Tensor>(s[3])),
        b_ih(to<Held>(s[4])),
        b_hh(to<Held>(s[5])),
        w_hr(to<Held>(s[6])),
        batch_sizes(to<Held>(s[9])),
        lengths(to<Held>(s[10])),
        resets(to<Held>(s[11])),
        states(to<std::vector<torch::stable::Tensor>>(s[1])),
        parameters(to<std::optional<std::vector<torch::stable::Tensor>>>(s[7])),
        inputs(to<std::optional<std::vector<torch::stable::Tensor>>>(s[8])),
        reset_states(to<std::optional<std::vector<torch::stable::Tensor>>>(s[12])),
        reverse(to<bool>(s[13])),
        heads(to<int64_t>(s[14])) {}

  Inputs read(const std::string& cell, const std::string& algorithm) const {
    const bool rounded = algorithm == "int8";
    FUSEDRNN_CHECK(algorithm == "auto" || algorithm == "persistent" || rounded, "algorithm '", algorithm,
                   "' of backend 'cpu' cannot run: it has persistent only");
    const Counts counts = counts_of(cell);
    const size_t wanted = static_cast<size_t>(counts.states);
    FUSEDRNN_CHECK(states.size() == wanted, "fusedrnn: ", cell, " has ", wanted, " states, got ", states.size());
    FUSEDRNN_CHECK((!reset_states || reset_states->empty()) && !lengths, "fusedrnn: the cell ", cell,
                   " of backend 'cpu' takes no lengths and no reset_states");
    for (const auto& [name, list, count] :
         {std::tuple("parameters", &parameters, counts.parameters), std::tuple("inputs", &inputs, counts.inputs)}) {
      const size_t got = *list ? (*list)->size() : 0;
      FUSEDRNN_CHECK(got == static_cast<size_t>(count), "fusedrnn: ", cell, " has ", count, " ", name, ", got ", got);
    }
    Inputs in{borrow(x),
              Tensor::borrow(states[0].get()),
              Tensor::borrow(wanted > 1 ? states[1].get() : nullptr),
              borrow(w_ih),
              borrow(w_hh),
              borrow(b_ih),
              borrow(b_hh),
              borrow(w_hr),
              borrow(batch_sizes),
              borrow(resets),
              reverse,
              heads,
              {},
              {},
              false,
              {},
              {},
              {},
              {},
              false};
    for (size_t k = 2; k < wanted; ++k) in.more.states.push_back(Tensor::borrow(states[k].get()));
    if (parameters) borrow_all(*parameters, in.more.parameters);
    if (inputs) borrow_all(*inputs, in.more.inputs);
    if (rounded) {
      for (const Tensor* t : {&in.w_ih, &in.w_hh, &in.w_hr}) {
        FUSEDRNN_CHECK(!*t || (t->dtype() == kFloat && t->dim() == 2 && t->on_cpu()),
                       "fusedrnn::sequence: algorithm 'int8' takes float32 weights of 2 dimensions");
      }
      to_int8(in.w_ih, in.scale_ih);
      to_int8(in.w_hh, in.scale_hh);
      if (in.w_hr) to_int8(in.w_hr, in.scale_hr);
      in.quantized = in.rounded = true;
    }
    return in;
  }
};
constexpr int kGiven = 15;

bool is_cpu(StableIValue backend) {
  const char* text = nullptr;
  FUSEDRNN_TORCH(torch_string_c_str(reinterpret_cast<StringHandle>(backend), &text));
  return std::string_view(text) == "cpu";
}

// What the op that Python registered for other backends answers: all outputs in one list. (Of several outputs of
// different types torch's C function takes the types in the wrong order: 2.14.1.)
std::vector<Tensor> elsewhere(const char* name, Stack stack) {
  check_torch(torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION), name);
  const auto list = reinterpret_cast<StableListHandle>(stack[0]);
  size_t count = 0;
  FUSEDRNN_TORCH(torch_list_size(list, &count));
  std::vector<Tensor> found(count);
  for (size_t k = 0; k < count; ++k) {
    StableIValue item = 0;
    FUSEDRNN_TORCH(torch_list_get_item(list, k, &item));
    found[k] = Tensor::own(reinterpret_cast<AtenTensorHandle>(item));
  }
  FUSEDRNN_TORCH(torch_delete_list(list));
  return found;
}

// The outputs y, h_n, c_n, gates, cells, then of the states after c the final ones and all, as the op returns them.
void give_outputs(Stack stack, std::vector<Tensor>& out, size_t states, bool keep_states) {
  std::vector<Tensor> finals, every;
  finals.push_back(std::move(out[1]));
  if (states > 1) finals.push_back(std::move(out[2]));
  if (states > 1 && keep_states) every.push_back(std::move(out[4]));
  for (size_t k = 2; k < states; ++k) {
    finals.push_back(std::move(out[3 + k]));
    if (keep_states) every.push_back(std::move(out[1 + states + k]));
  }
  stack[0] = give(std::move(out[0]));
  stack[1] = give(std::move(finals));
  stack[2] = give(std::move(out[3]));
  stack[3] = give(std::move(every));
}

// The gradients in the order of sequence.h, then those of the states after c, of parameters, of inputs.
void give_gradients(Stack stack, std::vector<Tensor>& d, size_t states, size_t parameters) {
  std::vector<Tensor> dstates, dparameters, dinputs;
  for (size_t k = 1; k < 2 + (states > 1); ++k) dstates.push_back(std::move(d[k]));
  size_t at = 8;
  for (size_t k = 2; k < states; ++k) dstates.push_back(std::move(d[at++]));
  for (size_t k = 0; k < parameters; ++k) dparameters.push_back(std::move(d[at++]));
  while (at < d.size()) dinputs.push_back(std::move(d[at++]));
  stack[0] = give(std::move(d[0]));
  stack[1] = give(std::move(dstates));
  for (int k = 3; k < 8; ++k) stack[k - 1] = give(std::move(d[k]));
  stack[7] = give(std::move(dparameters));
  stack[8] = give(std::move(dinputs));
  stack[9] = give(std::vector<Tensor>());
}

void append(std::vector<Tensor>& to, std::vector<Tensor>&& from) {
  for (Tensor& t : from) to.push_back(std::move(t));
}

size_t list_size(StableIValue list) {
  size_t count = 0;
  FUSEDRNN_TORCH(torch_list_size(reinterpret_cast<StableListHandle>(list), &count));
  return count;
}

// An optional list is a pointer to one, or null. Nothing is taken.
size_t optional_list_size(StableIValue list) {
  const auto* held = reinterpret_cast<const StableIValue*>(list);
  return held ? list_size(*held) : 0;
}

void sequence_op(Stack stack, uint64_t, uint64_t) {
  if (!is_cpu(stack[kGiven + 1])) {
    const size_t states = list_size(stack[2]);
    const bool keep_states = to<bool>(stack[kGiven + 4]);
    std::vector<Tensor> out = elsewhere("fusedrnn::sequence_python", stack);
    return give_outputs(stack, out, states, keep_states);
  }
  const auto cell = to<std::string>(stack[0]);
  const Given given(stack + 1);
  to<std::string>(stack[kGiven + 1]);
  const auto algorithm = to<std::string>(stack[kGiven + 2]);
  const bool keep_gates = to<bool>(stack[kGiven + 3]), keep_states = to<bool>(stack[kGiven + 4]);
  const Inputs in = given.read(cell, algorithm);
  Outputs out = sequence(cell, in, keep_gates, keep_states);
  std::vector<Tensor> found;
  for (Tensor* t : {&out.y, &out.h_n, &out.c_n, &out.gates, &out.cells}) found.push_back(std::move(*t));
  append(found, std::move(out.more_n));
  append(found, std::move(out.more_cells));
  give_outputs(stack, found, given.states.size(), keep_states);
}

void sequence_backward_op(Stack stack, uint64_t, uint64_t) {
  constexpr int kSaved = 4 + kGiven;
  if (!is_cpu(stack[kSaved + 3])) {
    const size_t states = list_size(stack[5]), parameters = optional_list_size(stack[11]);
    std::vector<Tensor> d = elsewhere("fusedrnn::sequence_backward_python", stack);
    return give_gradients(stack, d, states, parameters);
  }
  const auto cell = to<std::string>(stack[0]);
  const auto dy = to<Held>(stack[1]);
  const auto dfinals = to<std::vector<Held>>(stack[2]), devery = to<std::vector<Held>>(stack[3]);
  const Given given(stack + 4);
  const Held y = to<torch::stable::Tensor>(stack[kSaved]), gates = to<torch::stable::Tensor>(stack[kSaved + 1]);
  const auto every = to<std::vector<torch::stable::Tensor>>(stack[kSaved + 2]);
  to<std::string>(stack[kSaved + 3]);
  const auto algorithm = to<std::string>(stack[kSaved + 4]);
  const auto wanted = to<std::vector<bool>>(stack[kSaved + 5]);
  FUSEDRNN_CHECK(algorithm != "int8", "fusedrnn::sequence_backward: what is rounded to 8 bits has no gradient");
  const Inputs in = given.read(cell, algorithm);
  const size_t states = given.states.size();
  const size_t parameters = in.more.parameters.size(), inputs = in.more.inputs.size();
  FUSEDRNN_CHECK(dfinals.size() == states && devery.size() == states - 1,
                 "fusedrnn::sequence_backward: dfinal_states must have ", states, " entries and devery_state ",
                 states - 1, ", got ", dfinals.size(), " and ", devery.size());
  FUSEDRNN_CHECK(every.size() == states - 1, "fusedrnn::sequence_backward: every_state must have ", states - 1,
                 " entries, got ", every.size(), " (was forward run with keep_gates and keep_states?)");
  FUSEDRNN_CHECK(wanted.size() == 6 + states + parameters + inputs, "fusedrnn::sequence_backward: needs must have ",
                 6 + states + parameters + inputs, " entries, got ", wanted.size());
  std::array<bool, 8> needs{};
  MoreGradients more;
  size_t at = 0;
  for (size_t k = 0; k < 3; ++k) {
    if (k != 2 || states > 1) needs[k] = wanted[at++];
  }
  for (size_t k = 2; k < states; ++k) {
    more.states.push_back(wanted[at++]);
    more.dfinal.push_back(borrow(dfinals[k]));
    more.devery.push_back(borrow(devery[k - 1]));
    more.every.push_back(Tensor::borrow(every[k - 1].get()));
  }
  for (size_t k = 3; k < 8; ++k) needs[k] = wanted[at++];
  for (size_t k = 0; k < parameters; ++k) more.parameters.push_back(wanted[at++]);
  for (size_t k = 0; k < inputs; ++k) more.inputs.push_back(wanted[at++]);
  Gradients d = sequence_backward(cell, borrow(dy), borrow(dfinals[0]), states > 1 ? borrow(dfinals[1]) : Tensor(),
                                  states > 1 ? borrow(devery[0]) : Tensor(), in, borrow(y), borrow(gates),
                                  Tensor::borrow(states > 1 ? every[0].get() : nullptr), needs, &more);
  std::vector<Tensor> found;
  for (Tensor& t : d) found.push_back(std::move(t));
  append(found, std::move(more.found.states));
  append(found, std::move(more.found.parameters));
  append(found, std::move(more.found.inputs));
  give_gradients(stack, found, states, parameters);
}

// Tags are there since torch 2.12. What an op without them gets from a compiler is the same: strides are kept.
void define(TorchLibraryHandle library, const char* schema) {
  using Tag = int32_t (*)();
  const auto tag = [](const char* name) { return reinterpret_cast<Tag>(dlsym(RTLD_DEFAULT, name)); };
  const auto with_tags = reinterpret_cast<AOTITorchError (*)(TorchLibraryHandle, const char*, const int32_t*, int32_t)>(
      dlsym(RTLD_DEFAULT, "torch_library_def_with_tags"));
  const Tag compliant = tag("torch_tag_pt2_compliant_tag"), strides = tag("torch_tag_needs_fixed_stride_order");
  if (with_tags && compliant && strides) {
    const int32_t tags[] = {compliant(), strides()};
    check_torch(with_tags(library, schema, tags, 2), schema);
  } else {
    check_torch(aoti_torch_library_def(library, schema), schema);
  }
}

// As STABLE_TORCH_LIBRARY does it, whose object has no way to tags.
struct Registered {
  TorchLibraryHandle schemas = nullptr, kernels = nullptr;
  Registered() {
    FUSEDRNN_TORCH(aoti_torch_library_init_def("fusedrnn", __FILE__, __LINE__, &schemas));
    define(schemas, kSequence);
    define(schemas, kBackward);
    FUSEDRNN_TORCH(aoti_torch_library_init_impl("fusedrnn", "CPU", __FILE__, __LINE__, &kernels));
    FUSEDRNN_TORCH(torch_library_impl(kernels, "sequence", sequence_op, TORCH_ABI_VERSION));
    FUSEDRNN_TORCH(torch_library_impl(kernels, "sequence_backward", sequence_backward_op, TORCH_ABI_VERSION));
  }
  ~Registered() {
    aoti_torch_delete_library_object(kernels);
    aoti_torch_delete_library_object(schemas);
  }
};
const Registered registered;

}  // namespace
}  // namespace fusedrnn
