// fusedrnn._direct: whole calls of layers and cells in one call of C++, autograd included. It needs torch's C++
// headers, so it fits the one torch that it was built for, and is used with that one only; fusedrnn._C does the same
// for any torch where no gradient is asked for.
//
// Each call computes one call of a module on the backend "cpu", and answers None where something is not plain (a tensor
// subclass, a transform, autocast, shapes that do not fit): the way through Python then computes it, or says what is
// wrong.
//   cell(cell, module, names, input, h0, c0): h, and c of a cell that has one.
//   layers(cell, module, names, input, h0, c0, bias, num_layers, directions, batch_first): y, h_n, and c_n likewise.
// module is a module's __dict__, names those of its weights; h0 and c0 may be None, which is zeros.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/python_numbers.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <vector>

#include "cpu/sequence.h"

namespace fusedrnn::direct {

using at::Tensor;  // the names without `fusedrnn::` are torch's
using OptionalTensor = std::optional<Tensor>;

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr; undefined where there is none. x is [T, B, I], or [B, I] or [I] of a cell;
// states are [B, .], or [1, B, .] of a layer, or [.] of a cell.
using Tensors = std::array<Tensor, 8>;

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

fusedrnn::Tensor borrow(const Tensor& t) {
  return t.defined() ? fusedrnn::Tensor::borrow(reinterpret_cast<AtenTensorHandle>(const_cast<Tensor*>(&t)))
                     : fusedrnn::Tensor();
}

Tensor take(fusedrnn::Tensor&& t) { return t ? std::move(*reinterpret_cast<Tensor*>(t.handle())) : Tensor(); }

// t with dimensions of one element put in front, or taken away there.
Tensor with_dims(Tensor t, int64_t dims) {
  while (t.defined() && t.dim() < dims) t = t.unsqueeze(0);
  while (t.defined() && t.dim() > dims) t = t.select(0, 0);
  return t;
}

// Dense, on the CPU, and nothing that only torch's dispatcher understands.
bool is_plain(const Tensor& t) {
  static const c10::DispatchKeySet cpu(c10::DispatchKey::CPU);
  static const c10::DispatchKeySet recorded =
      cpu | c10::DispatchKeySet({c10::DispatchKey::AutogradCPU, c10::DispatchKey::ADInplaceOrView});
  const c10::DispatchKeySet keys = t.key_set() - c10::autocast_dispatch_keyset;
  return keys == recorded || keys == cpu;
}

// Counts what changes y in place, as the y that the caller has does; it does not hold its memory. The y that is saved
// is another tensor in the same memory, so that a changed one is no error: it is computed again. A tensor, because
// compiled autograd passes those on.
Tensor watch(const Tensor& y) {
  auto nothing = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), 0, at::DataPtr(), nullptr,
                                                       /*resizable=*/false);
  auto found = c10::make_intrusive<c10::TensorImpl>(c10::Storage(std::move(nothing)),
                                                    c10::DispatchKeySet(c10::DispatchKey::CPU), y.dtype());
  found->set_version_counter(torch::autograd::impl::version_counter(y));
  return Tensor(std::move(found));
}

// Changes the shape of a result in place, and it is no view then, which could not be detached in place.
Tensor transposed_in_place(Tensor t) {
  const c10::impl::ExcludeDispatchKeyGuard no_view(c10::DispatchKey::ADInplaceOrView);
  return t.transpose_(0, 1);
}

// What the kernels take; `t` outlives it.
Inputs inputs_of(const Tensors& t, bool reverse) {
  Inputs in;
  in.x = borrow(t[0]).with_dims(3);
  in.h0 = borrow(t[1]).with_dims(2);
  if (t[2].defined()) in.c0 = borrow(t[2]).with_dims(2);
  in.w_ih = borrow(t[3]);
  in.w_hh = borrow(t[4]);
  in.b_ih = borrow(t[5]);
  in.b_hh = borrow(t[6]);
  in.w_hr = borrow(t[7]);
  in.reverse = reverse;
  return in;
}

// y, h_n, c_n, gates, cells, with the states in the shape they came in.
std::array<Tensor, 5> run(c10::string_view cell, const Tensors& t, bool reverse, bool keep) {
  // Nothing in here is recorded: neither operations nor that a result is a view.
  const at::AutoDispatchBelowADInplaceOrView unrecorded;
  // As the profiler shows the op, which this is not.
  RECORD_FUNCTION("fusedrnn::sequence", at::ArrayRef<const c10::IValue>({t[0], t[1], t[3], t[4]}));
  Outputs found = sequence(cell, inputs_of(t, reverse), keep, keep);
  return {take(std::move(found.y)), with_dims(take(std::move(found.h_n)), t[1].dim()),
          t[2].defined() ? with_dims(take(std::move(found.c_n)), t[2].dim()) : Tensor(), take(std::move(found.gates)),
          take(std::move(found.cells))};
}

// A fused operation would drop a tangent without a word. There is one level of dual tensors at most.
void check_no_tangent(const Tensor& t) {
  TORCH_CHECK_NOT_IMPLEMENTED(!t.defined() || !t._fw_grad(0).defined(),
                              "fusedrnn: forward mode (jvp) reaches neither torch.ops.fusedrnn.* nor the gradient of a "
                              "layer that was called outside of it; call the layer inside");
}

pybind11::object wrap(const Tensor& t) {
  return t.defined() ? pybind11::reinterpret_steal<pybind11::object>(THPVariable_Wrap(t)) : pybind11::none();
}

// The gradient as a Function of Python, whose own backward goes through the reference.
std::vector<Tensor> differentiable_gradient(const std::string& cell, const std::array<Tensor, 3>& grads,
                                            const Tensors& t, bool reverse, const variable_list& kept,
                                            const std::array<bool, 8>& needs) {
  const pybind11::gil_scoped_acquire gil;
  try {
    pybind11::list arguments;
    for (const Tensor& g : grads) arguments.append(wrap(g));
    arguments.append(pybind11::none());
    for (const Tensor& input : t) arguments.append(wrap(input));
    arguments.append(pybind11::none());
    arguments.append(pybind11::none());
    arguments.append(reverse);
    for (const Tensor& k : kept) arguments.append(wrap(k));
    arguments.append(cell);
    arguments.append("cpu");
    arguments.append("auto");
    arguments.append(false);
    arguments.append(needs);
    const auto function = pybind11::module_::import("fusedrnn.autograd").attr("RecurrenceBackwardFunction");
    std::vector<Tensor> found;
    for (const pybind11::handle g : pybind11::tuple(function.attr("apply")(*arguments))) {
      found.push_back(THPVariable_Unpack(g.ptr()));
    }
    return found;
  } catch (pybind11::error_already_set& error) {
    error.restore();
    python_error raised;
    raised.persist();
    throw raised;
  }
}

}  // namespace

// One direction of one layer: y (not of a cell's call), h_n, c_n (if there is a c). Its name is seen as grad_fn.
struct Recurrence : torch::autograd::Function<Recurrence> {
  // Whether y was changed is asked when backward runs, not when compiled autograd looks at it.
  static constexpr bool is_traceable = false;

  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& h0, const OptionalTensor& c0,
                               const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
                               const OptionalTensor& b_hh, const OptionalTensor& w_hr, c10::string_view cell,
                               bool reverse) {
    const auto given = [](const OptionalTensor& t) { return t.value_or(Tensor()); };
    const Tensors t{x, h0, given(c0), w_ih, w_hh, given(b_ih), given(b_hh), given(w_hr)};
    const auto [y, h_n, c_n, gates, cells] = run(cell, t, reverse, true);
    ctx->set_materialize_grads(false);
    ctx->saved_data["cell"] = std::string(cell);
    ctx->saved_data["reverse"] = reverse;
    variable_list saved(t.begin(), t.end());
    variable_list outputs;
    if (x.dim() == 3) {
      outputs.push_back(y);
      ctx->saved_data["watch"] = watch(y);
    }
    saved.insert(saved.end(), {x.dim() == 3 ? y.variable_data() : y, gates, cells});
    ctx->save_for_backward(std::move(saved));
    outputs.push_back(h_n);
    if (c0) outputs.push_back(c_n);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(10);
    variable_list saved = ctx->get_saved_variables();
    Tensors t;
    std::array<bool, 8> needs{};
    std::array<int64_t, 3> dims{};
    size_t edge = 0;
    for (size_t k = 0; k < 8; ++k) {
      t[k] = saved[k];
      // The edges are those of the tensors there are.
      if (t[k].defined()) needs[k] = ctx->needs_input_grad(edge++);
      if (t[k].defined() && k < 3) dims[k] = t[k].dim();
    }
    std::array<Tensor, 3> d;
    bool any = false, plain = true;
    for (const Tensor& each : saved) plain &= !each.defined() || is_plain(each);
    for (size_t k = dims[0] == 3 ? 0 : 1, g = 0; g < grads.size(); ++k, ++g) {
      d[k] = grads[g];
      any |= d[k].defined();
      plain &= !d[k].defined() || is_plain(d[k]);
      check_no_tangent(d[k]);
    }
    if (!any) return result;
    const auto watch = ctx->saved_data.find("watch");
    // A result that nobody has yet was not changed: it begins at 0.
    const bool changed = watch != ctx->saved_data.end() && watch->second.toTensor()._version() != 0;
    const std::string& cell = ctx->saved_data["cell"].toStringRef();
    const bool reverse = ctx->saved_data["reverse"].toBool();
    // Or mapped by vmap, or what a hook made of a saved tensor.
    const bool recorded = at::GradMode::is_enabled() || !plain;
    std::optional<at::AutoDispatchBelowADInplaceOrView> guard;
    if (!recorded) guard.emplace();
    for (size_t k = 0; k < 3; ++k) t[k] = with_dims(t[k], k ? 2 : 3);
    for (size_t k = 1; k < 3; ++k) d[k] = with_dims(d[k], 2);
    std::vector<Tensor> found;
    if (recorded) {
      found = differentiable_gradient(cell, d, t, reverse, {changed ? Tensor() : saved[8], saved[9], saved[10]}, needs);
    } else {
      if (changed) saved[8] = run(cell, t, reverse, false)[0];
      RECORD_FUNCTION("fusedrnn::sequence_backward", at::ArrayRef<const c10::IValue>({d[0], t[0], t[3], t[4]}));
      Gradients gradients = sequence_backward(cell, borrow(d[0]), borrow(d[1]), borrow(d[2]), {}, inputs_of(t, reverse),
                                              borrow(saved[8]), borrow(saved[9]), borrow(saved[10]), needs);
      for (fusedrnn::Tensor& each : gradients) found.push_back(take(std::move(each)));
    }
    for (size_t k = 0; k < 8; ++k) {
      if (needs[k]) result[k] = k < 3 ? with_dims(found[k], dims[k]) : found[k];
    }
    return result;
  }
};

namespace {

// y (undefined of a cell's call), h_n, c_n (undefined if there is no c).
std::array<Tensor, 3> recurrence(c10::string_view cell, const Tensors& t, bool reverse) {
  bool recorded = false;
  for (const Tensor& each : t) recorded |= each.defined() && each.requires_grad();
  if (!recorded || !at::GradMode::is_enabled()) {
    const auto [y, h_n, c_n, gates, cells] = run(cell, t, reverse, false);
    return {t[0].dim() == 3 ? y : Tensor(), h_n, t[2].defined() ? c_n : Tensor()};
  }
  const variable_list found = Recurrence::apply(t[0], t[1], optional(t[2]), t[3], t[4], optional(t[5]), optional(t[6]),
                                                optional(t[7]), cell, reverse);
  std::array<Tensor, 3> result;
  for (size_t k = t[0].dim() == 3 ? 0 : 1, g = 0; g < found.size(); ++k, ++g) result[k] = found[g];
  return result;
}

// No transform, mode, tracer or autocast, and nobody who forces a backend.
bool nothing_special() {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  const char* forced = std::getenv("FUSEDRNN_BACKEND");
  return (keys.included_ - c10::default_included_set).empty() && keys.excluded_.has(c10::DispatchKey::AutocastCPU) &&
         !(at::GradMode::is_enabled() && keys.excluded_.has(c10::DispatchKey::AutogradCPU)) &&
         !at::impl::torch_function_mode_enabled() && (forced == nullptr || *forced == '\0');
}

// A Tensor or Parameter of no subclass, plain, and such that it may be saved for backward.
bool is_plain(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return false;
  const Tensor& t = THPVariable_Unpack(object);
  return is_plain(t) && !(t.is_inference() && at::GradMode::is_enabled());
}

// What a module's __dict__ has under a name, or nullptr.
PyObject* attribute(PyObject* module, PyObject* name) {
  PyObject* found = PyDict_GetItemWithError(module, name);
  if (found == nullptr && PyErr_Occurred()) throw python_error();
  return found;
}

// A module's integer; -1 where it is none.
int64_t size_attribute(PyObject* module, PyObject* name) {
  PyObject* found = attribute(module, name);
  return found != nullptr && THPUtils_checkLong(found) ? THPUtils_unpackLong(found) : -1;
}

bool has_shape(const Tensor& t, at::IntArrayRef shape, const Tensor& x) {
  return t.sizes() == shape && t.scalar_type() == x.scalar_type();
}

// The arguments that both calls begin with.
struct Call {
  c10::string_view cell;
  int64_t gates, hidden_size;
  bool has_c;
  Tensor x, h0, c0;
  std::vector<Tensor> weights;

  // False where something is not plain.
  bool read(PyObject* const* arguments) {
    Py_ssize_t length = 0;
    const char* name = PyUnicode_AsUTF8AndSize(arguments[0], &length);
    if (name == nullptr) throw python_error();
    cell = {name, static_cast<size_t>(length)};
    std::tie(gates, has_c) = gates_and_c(cell);
    static PyObject* const parameters_name = PyUnicode_InternFromString("_parameters");
    static PyObject* const hidden_size_name = PyUnicode_InternFromString("hidden_size");
    PyObject* module = arguments[1];
    if (!nothing_special() || !PyDict_CheckExact(module) || !is_plain(arguments[3])) return false;
    PyObject* parameters = attribute(module, parameters_name);
    if (parameters == nullptr || !PyDict_CheckExact(parameters)) return false;
    hidden_size = size_attribute(module, hidden_size_name);
    x = THPVariable_Unpack(arguments[3]);
    const auto dtype = x.scalar_type();
    if (dtype != at::kFloat && dtype != at::kDouble && dtype != at::kBFloat16 && dtype != at::kHalf) return false;
    for (const auto& [state, object] : {std::pair{&h0, arguments[4]}, {&c0, arguments[5]}}) {
      if (object == Py_None) continue;
      if (!is_plain(object)) return false;
      *state = THPVariable_Unpack(object);
    }
    if (c0.defined() != (has_c && h0.defined())) return false;
    const pybind11::object names =
        pybind11::reinterpret_steal<pybind11::object>(PySequence_Fast(arguments[2], "names must be a list or tuple"));
    if (!names) throw python_error();
    static PyObject* const flat_weights_name = PyUnicode_InternFromString("_flat_weights");
    // What torch.nn reads the weights from: a wrapper may have put its own there.
    PyObject* flat = attribute(module, flat_weights_name);
    if (flat != nullptr &&
        (!PyList_CheckExact(flat) || PyList_GET_SIZE(flat) != PySequence_Fast_GET_SIZE(names.ptr()))) {
      return false;
    }
    weights.reserve(PySequence_Fast_GET_SIZE(names.ptr()));
    for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(names.ptr()); ++k) {
      // No parameter: a parametrization computes it. An attribute of that name comes before the parameter.
      PyObject* name = PySequence_Fast_GET_ITEM(names.ptr(), k);
      PyObject* weight = attribute(parameters, name);
      if (weight == nullptr || !(weight == Py_None || is_plain(weight)) || attribute(module, name) != nullptr) {
        return false;
      }
      if (flat != nullptr && PyList_GET_ITEM(flat, k) != weight) return false;
      weights.push_back(weight == Py_None ? Tensor() : THPVariable_Unpack(weight));
    }
    return weights.size() >= 2 && weights[0].defined() && weights[1].defined() && weights[1].dim() == 2 &&
           weights[1].size(1) > 0 && x.numel() > 0;
  }

  // The states [lead..., B, .] as they should be, or zeros where none came.
  bool settle_states(std::vector<int64_t> lead, int64_t out, int64_t hidden) {
    std::vector<int64_t> shape = std::move(lead);
    shape.push_back(out);
    if (!h0.defined()) h0 = at::zeros(shape, x.options());
    if (!has_shape(h0, shape, x)) return false;
    shape.back() = hidden;
    if (has_c && !c0.defined()) c0 = at::zeros(shape, x.options());
    return !has_c || has_shape(c0, shape, x);
  }
};

// Whether the weights fit an input of so many features.
bool weights_fit(const Tensors& t, int64_t gates, int64_t input) {
  const Tensor &x = t[0], &w_hh = t[4], &w_hr = t[7];
  const int64_t rows = w_hh.size(0), hidden = rows / gates, out = w_hh.size(1);
  if (hidden * gates != rows || hidden == 0 || !has_shape(t[3], {rows, input}, x) || !has_shape(w_hh, {rows, out}, x)) {
    return false;
  }
  for (const Tensor& bias : {t[5], t[6]}) {
    if (bias.defined() && !has_shape(bias, {rows}, x)) return false;
  }
  return w_hr.defined() ? has_shape(w_hr, {out, hidden}, x) : out == hidden;
}

PyObject* tuple_of(const std::array<Tensor, 3>& tensors) {
  const auto defined = [](const Tensor& t) { return t.defined(); };
  pybind11::tuple found(std::count_if(tensors.begin(), tensors.end(), defined));
  size_t k = 0;
  for (const Tensor& t : tensors) {
    if (t.defined()) found[k++] = wrap(t);
  }
  return found.release().ptr();
}

PyObject* cell(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6, "cell takes 6 arguments, got ", count);
  Call call;
  if (!call.read(arguments) || call.weights.size() != 4) Py_RETURN_NONE;
  const int64_t dims = call.x.dim();
  if (dims != 1 && dims != 2) Py_RETURN_NONE;
  const Tensor& w_hh = call.weights[1];
  // Zeros have the size that the module says.
  if (!call.h0.defined() && call.hidden_size != w_hh.size(1)) Py_RETURN_NONE;
  std::vector<int64_t> lead;
  if (dims == 2) lead.push_back(call.x.size(0));
  if (!call.settle_states(lead, w_hh.size(1), w_hh.size(1))) Py_RETURN_NONE;
  const auto& w = call.weights;
  const Tensors t{call.x, call.h0, call.c0, w[0], w[1], w[2], w[3], {}};
  if (!weights_fit(t, call.gates, call.x.size(-1))) Py_RETURN_NONE;
  std::array<Tensor, 3> found;
  {
    const pybind11::gil_scoped_release no_gil;
    found = recurrence(call.cell, t, false);
  }
  return call.has_c ? tuple_of(found) : THPVariable_Wrap(found[1]);
  END_HANDLE_TH_ERRORS
}

PyObject* layers(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 10, "layers takes 10 arguments, got ", count);
  Call call;
  if (!call.read(arguments) || call.x.dim() != 3) Py_RETURN_NONE;
  const bool bias = arguments[6] == Py_True, batch_first = arguments[9] == Py_True;
  const int64_t num_layers = THPUtils_unpackLong(arguments[7]), directions = THPUtils_unpackLong(arguments[8]);
  if (num_layers < 1 || directions < 1) Py_RETURN_NONE;
  const int64_t all = num_layers * directions, per = static_cast<int64_t>(call.weights.size()) / all;
  const int64_t out = call.weights[1].size(1), hidden = call.weights[1].size(0) / call.gates;
  const bool projection = per == 3 + 2 * bias;
  if (per * all != static_cast<int64_t>(call.weights.size()) || per != 2 + 2 * bias + projection) Py_RETURN_NONE;
  static PyObject* const input_size_name = PyUnicode_InternFromString("input_size");
  static PyObject* const proj_size_name = PyUnicode_InternFromString("proj_size");
  const int64_t projected = size_attribute(arguments[1], proj_size_name);
  if (size_attribute(arguments[1], input_size_name) != call.x.size(2) || call.hidden_size != hidden ||
      (projected ? projected : hidden) != out) {
    Py_RETURN_NONE;
  }
  if (!call.settle_states({all, call.x.size(batch_first ? 0 : 1)}, out, hidden)) Py_RETURN_NONE;
  std::vector<Tensors> sequences;
  for (int64_t k = 0; k < all; ++k) {
    const Tensor* w = &call.weights[k * per];
    Tensors t{call.x, {}, {}, w[0], w[1]};
    if (bias) t[5] = w[2], t[6] = w[3];
    if (projection) t[7] = w[per - 1];
    const int64_t input = k < directions ? call.x.size(2) : directions * out;
    if (std::any_of(w, w + per, [](const Tensor& each) { return !each.defined(); })) Py_RETURN_NONE;
    if (!weights_fit(t, call.gates, input)) Py_RETURN_NONE;
    if (t[4].size(0) != call.gates * hidden || t[4].size(1) != out) Py_RETURN_NONE;
    sequences.push_back(std::move(t));
  }
  std::array<Tensor, 3> result;
  {
    const pybind11::gil_scoped_release no_gil;
    Tensor x = batch_first ? call.x.transpose(0, 1) : call.x;
    std::vector<Tensor> ys, h_n, c_n;
    for (int64_t k = 0; k < all; ++k) {
      Tensors& t = sequences[k];
      t[0] = x;
      t[1] = all == 1 ? call.h0 : call.h0.select(0, k);
      if (call.has_c) t[2] = all == 1 ? call.c0 : call.c0.select(0, k);
      const auto [y, h, c] = recurrence(call.cell, t, k % directions == 1);
      ys.push_back(y);
      h_n.push_back(h);
      c_n.push_back(c);
      if ((k + 1) % directions == 0) {
        x = directions == 1 ? y : at::cat(ys, -1);
        ys.clear();
      }
    }
    const auto together = [all](const std::vector<Tensor>& states) { return all == 1 ? states[0] : at::stack(states); };
    result = {batch_first ? transposed_in_place(x) : x, together(h_n), call.has_c ? together(c_n) : Tensor()};
  }
  return tuple_of(result);
  END_HANDLE_TH_ERRORS
}

PyMethodDef direct_calls[] = {
    {"cell", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(cell)), METH_FASTCALL, nullptr},
    {"layers", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(layers)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace
}  // namespace fusedrnn::direct

PYBIND11_MODULE(_direct, m) { PyModule_AddFunctions(m.ptr(), fusedrnn::direct::direct_calls); }
