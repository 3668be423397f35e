// fusedrnn._C, in the limited C API of Python 3.10: what was built, and the CPU kernels below torch's dispatcher, for
// calls that need nothing of what lies between: a small call takes less time than torch's way to an op.
//
// Each call answers None where something is not plain (a tensor subclass, a transform, autocast, gradients of more than
// one sequence, shapes that do not fit), and where torch, before 2.14, does not hand out its tensors; the op then
// computes it, or says what is wrong.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "cpu/recurrence.h"
#include "cpu/sequence.h"
#include "cpu/stream.h"

namespace {

using namespace fusedrnn;

struct PythonError {};  // the error is set

class Object {
 public:
  Object() = default;
  explicit Object(PyObject* object) : object_(object) {  // takes the reference
    if (!object) throw PythonError();
  }
  Object(Object&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Object& operator=(Object&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Object() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_ = nullptr;
};

// Kept for the life of the process.
PyObject* name(const char* text) { return Object(PyUnicode_InternFromString(text)).release(); }
PyObject* attribute_of(const char* module, const char* path) {
  Object found(PyImport_ImportModule(module));
  for (const char* at = path; *at;) {
    const char* dot = std::strchr(at, '.');
    const std::string part = dot ? std::string(at, dot) : std::string(at);
    found = Object(PyObject_GetAttrString(found.get(), part.c_str()));
    at = dot ? dot + 1 : at + part.size();
  }
  return found.release();
}

bool is_true(PyObject* object) {
  const int truth = PyObject_IsTrue(object);
  if (truth < 0) throw PythonError();
  return truth != 0;
}

unsigned long long integer(const Object& object) {
  const unsigned long long value = PyLong_AsUnsignedLongLong(object.get());
  if (value == static_cast<unsigned long long>(-1) && PyErr_Occurred()) throw PythonError();
  return value;
}

// What torch says of its state; looked up once.
struct Torch {
  AOTITorchError (*from_python)(void*, AtenTensorHandle*) = nullptr;
  AOTITorchError (*to_python)(AtenTensorHandle, void*, void**) = nullptr;
  PyObject *tensor_type, *parameter_type;
  PyObject *included, *function_modes, *any_autocast;
  PyObject *raw_repr, *is_neg, *is_inference, *requires_grad;
  unsigned long long plain, inference;

  Torch() {
    from_python = reinterpret_cast<decltype(from_python)>(dlsym(RTLD_DEFAULT, "torch_tensor_from_pyobject"));
    to_python = reinterpret_cast<decltype(to_python)>(dlsym(RTLD_DEFAULT, "torch_tensor_to_pyobject"));
    tensor_type = attribute_of("torch", "Tensor");
    parameter_type = attribute_of("torch", "nn.Parameter");
    included = attribute_of("torch", "_C._dispatch_tls_local_include_set");
    function_modes = attribute_of("torch", "_C._len_torch_function_stack");
    any_autocast = attribute_of("torch", "_C._is_any_autocast_enabled");
    raw_repr = name("raw_repr");
    is_neg = name("is_neg");
    is_inference = name("is_inference");
    requires_grad = name("requires_grad");
    // What torch has included where nobody asked for anything, outside and inside of inference_mode.
    const Object keys(attribute_of("torch", "_C.DispatchKey"));
    const Object backend_select(PyObject_GetAttrString(keys.get(), "BackendSelect"));
    const Object in_place_or_view(PyObject_GetAttrString(keys.get(), "ADInplaceOrView"));
    const Object set(attribute_of("torch", "_C.DispatchKeySet"));
    const Object one(PyObject_CallFunctionObjArgs(set.get(), backend_select.get(), nullptr));
    const Object both(PyObject_CallMethod(one.get(), "add", "O", in_place_or_view.get()));
    inference = repr(one);
    plain = repr(both);
  }

  unsigned long long repr(const Object& keys) const {
    return integer(Object(PyObject_CallMethodObjArgs(keys.get(), raw_repr, nullptr)));
  }

  bool available() const { return from_python && to_python; }

  // No transform, mode, tracer or autocast, and nobody who forces another backend.
  bool nothing_special() const {
    const char* forced = std::getenv("FUSEDRNN_BACKEND");
    if (forced && *forced && std::string_view(forced) != "cpu") return false;
    const unsigned long long keys = repr(Object(PyObject_CallObject(included, nullptr)));
    return (keys == plain || keys == inference) && integer(Object(PyObject_CallObject(function_modes, nullptr))) == 0 &&
           !is_true(Object(PyObject_CallObject(any_autocast, nullptr)).get());
  }
};

const Torch& torch_state() {
  static const Torch state;
  return state;
}

struct NotPlain {};

// What becomes of a tensor that a gradient will be asked of.
enum class Recorded { kRefused, kKept };

// Arguments of one call; what they hold lives as long as this.
class Arguments {
 public:
  explicit Arguments(Recorded recorded) : recorded_(recorded) {}
  ~Arguments() {
    for (const AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
  }

  // Whether a gradient will be asked of one that was taken.
  bool need_gradient() const { return need_gradient_; }

  // A Tensor or Parameter, of no subclass, dense, on the CPU; None: no tensor.
  Tensor take(PyObject* object) {
    if (object == Py_None) return {};
    const Torch& torch = torch_state();
    const auto type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != torch.tensor_type && type != torch.parameter_type) throw NotPlain();
    if (grad_mode_ && is_true(Object(PyObject_GetAttr(object, torch.requires_grad)).get())) {
      if (recorded_ == Recorded::kRefused) throw NotPlain();
      need_gradient_ = true;
    }
    // Autograd saves none of these.
    if (grad_mode_ && recorded_ == Recorded::kKept && says(object, torch.is_inference)) throw NotPlain();
    // A tensor whose memory holds its negative.
    if (says(object, torch.is_neg)) throw NotPlain();
    AtenTensorHandle handle = nullptr;
    FUSEDRNN_TORCH(torch.from_python(object, &handle));
    handles_.push_back(handle);
    Tensor t;
    try {
      t = Tensor::borrow(handle);
    } catch (const std::exception&) {  // a nested tensor has no sizes
      throw NotPlain();
    }
    if (!t.is_strided() || !t.on_cpu() || t.dim() > Tensor::kDims || (t.numel() && !t.data())) throw NotPlain();
    return t;
  }

  std::vector<Tensor> take_all(PyObject* tuple) {
    const Py_ssize_t count = PyTuple_Size(tuple);
    if (count < 0) throw PythonError();
    std::vector<Tensor> found;
    found.reserve(count);
    for (Py_ssize_t k = 0; k < count; ++k) found.push_back(take(PyTuple_GetItem(tuple, k)));
    return found;
  }

 private:
  static bool says(PyObject* object, PyObject* method) {
    return is_true(Object(PyObject_CallMethodObjArgs(object, method, nullptr)).get());
  }

  Recorded recorded_;
  bool grad_mode_ = aoti_torch_grad_mode_is_enabled(), need_gradient_ = false;
  std::vector<AtenTensorHandle> handles_;
};

Object wrap(const Tensor& t) {
  void* object = nullptr;
  FUSEDRNN_TORCH(torch_state().to_python(t.handle(), nullptr, &object));
  return Object(static_cast<PyObject*>(object));
}

Object none() {
  Py_INCREF(Py_None);
  return Object(Py_None);
}

class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

std::string_view text(PyObject* object) {
  Py_ssize_t length = 0;
  const char* data = PyUnicode_AsUTF8AndSize(object, &length);
  if (!data) throw PythonError();
  return {data, static_cast<size_t>(length)};
}

template <PyObject* (*kCall)(PyObject* const*), Py_ssize_t kCount>
PyObject* guarded(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  try {
    if (count != kCount) {
      PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", kCount, count);
      return nullptr;
    }
    return kCall(arguments);
  } catch (const NotPlain&) {
    Py_RETURN_NONE;
  } catch (const PythonError&) {
    return nullptr;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

long integer(PyObject* object) {
  const long value = PyLong_AsLong(object);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return value;
}

void require(bool plain) {
  if (!plain) throw NotPlain();
}
void require_plain() {
  if (!torch_state().available() || !torch_state().nothing_special()) throw NotPlain();
}

Object tuple_of(const std::vector<const Tensor*>& tensors) {
  Object found(PyTuple_New(static_cast<Py_ssize_t>(tensors.size())));
  Py_ssize_t k = 0;
  for (const Tensor* t : tensors) PyTuple_SetItem(found.get(), k++, wrap(*t).release());
  return found;
}

// Of those that there are.
Object list_of(const std::vector<const Tensor*>& tensors) {
  Object found(PyList_New(0));
  for (const Tensor* t : tensors) {
    if (*t && PyList_Append(found.get(), wrap(*t).get())) throw PythonError();
  }
  return found;
}

Tensor zeros_of(Sizes sizes, int32_t dtype) {
  Tensor t = Tensor::empty(sizes, dtype);
  if (t.numel()) std::memset(t.writable(), 0, t.numel() * t.element_size());
  return t;
}

// The tensors of a call of a cell, in the order of fusedrnn/ops.py: `differentiable`, then batch_sizes and resets.
struct Order {
  const Counts counts;
  const size_t after_c, differentiable, all, gradients, saved;

  explicit Order(std::string_view cell)
      : counts(counts_of(cell)),
        after_c(counts.states > 2 ? counts.states - 2 : 0),
        differentiable(8 + after_c + counts.parameters + counts.inputs),
        all(differentiable + 2),
        gradients(4 + 2 * after_c),
        saved(3 + after_c) {}

  // `t` outlives it.
  Inputs inputs(const Tensor* t) const {
    const auto next = [&] {
      const Tensor& one = *t++;
      return one.with_dims(one.dim());
    };
    Inputs in;
    for (Tensor* to : {&in.x, &in.h0, &in.c0, &in.w_ih, &in.w_hh, &in.b_ih, &in.b_hh, &in.w_hr}) *to = next();
    for (size_t k = 0; k < after_c; ++k) in.more.states.push_back(next());
    for (int64_t k = 0; k < counts.parameters; ++k) in.more.parameters.push_back(next());
    for (int64_t k = 0; k < counts.inputs; ++k) in.more.inputs.push_back(next());
    return in;
  }

  // What the gradient is given of the states after c (the tensors outlive it), and of which inputs it is wanted.
  MoreGradients more(const Tensor* dfinal, const Tensor* devery, const Tensor* every, PyObject* needs,
                     std::array<bool, 8>& of_plain) const {
    require(PySequence_Size(needs) == static_cast<Py_ssize_t>(differentiable));
    Py_ssize_t at = 0;
    const auto need = [&] { return is_true(Object(PySequence_GetItem(needs, at++)).get()); };
    MoreGradients found;
    for (bool& wanted : of_plain) wanted = need();
    for (size_t k = 0; k < after_c; ++k) {
      found.dfinal.push_back(dfinal[k].with_dims(dfinal[k] ? 2 : 0));
      found.devery.push_back(devery ? devery[k].with_dims(devery[k].dim()) : Tensor());
      found.every.push_back(every[k].with_dims(every[k].dim()));
      found.states.push_back(need());
    }
    for (int64_t k = 0; k < counts.parameters; ++k) found.parameters.push_back(need());
    for (int64_t k = 0; k < counts.inputs; ++k) found.inputs.push_back(need());
    return found;
  }

  // The gradients in one list.
  static std::vector<Tensor> joined(Gradients&& d, More&& more) {
    std::vector<Tensor> found;
    for (Tensor& t : d) found.push_back(std::move(t));
    for (auto* list : {&more.states, &more.parameters, &more.inputs}) {
      for (Tensor& t : *list) found.push_back(std::move(t));
    }
    return found;
  }
};

// (cell, the tensors, reverse, heads, keep_gates, keep_states): y, h_n, c_n, gates, cells, then of the states after c
// the final ones and all that are kept.
PyObject* call_sequence(PyObject* const* a) {
  require_plain();
  Arguments held(Recorded::kRefused);
  const std::string_view cell = text(a[0]);
  const Order order(cell);
  const std::vector<Tensor> given = held.take_all(a[1]);
  require(given.size() == order.all);
  Inputs in = order.inputs(given.data());
  in.batch_sizes = given[order.differentiable].with_dims(given[order.differentiable].dim());
  in.resets = given[order.differentiable + 1].with_dims(given[order.differentiable + 1].dim());
  in.reverse = is_true(a[2]);
  in.heads = integer(a[3]);
  const bool keep_gates = is_true(a[4]), keep_states = is_true(a[5]);
  Outputs out;
  {
    const WithoutGil released;
    out = sequence(cell, in, keep_gates, keep_states);
  }
  std::vector<const Tensor*> found = {&out.y, &out.h_n, &out.c_n, &out.gates, &out.cells};
  for (const auto* list : {&out.more_n, &out.more_cells}) {
    for (const Tensor& t : *list) found.push_back(&t);
  }
  return tuple_of(found).release();
}

// (cell, tensors, reverse, heads, needs): the gradients. The tensors: dy, dh_n, dc_n, dcells, of the states after c the
// gradients of the final ones and of all; those of the call; y, gates, cells and the other states that were kept.
PyObject* call_sequence_backward(PyObject* const* a) {
  require_plain();
  Arguments held(Recorded::kRefused);
  const std::string_view cell = text(a[0]);
  const Order order(cell);
  const std::vector<Tensor> tensors = held.take_all(a[1]);
  require(tensors.size() == order.gradients + order.all + order.saved);
  const Tensor *const grads = tensors.data(), *const given = grads + order.gradients, *const saved = given + order.all;
  Inputs in = order.inputs(given);
  in.batch_sizes = given[order.differentiable].with_dims(given[order.differentiable].dim());
  in.resets = given[order.differentiable + 1].with_dims(given[order.differentiable + 1].dim());
  in.reverse = is_true(a[2]);
  in.heads = integer(a[3]);
  std::array<bool, 8> needs{};
  MoreGradients more = order.more(grads + 4, grads + 4 + order.after_c, saved + 3, a[4], needs);
  Gradients d;
  {
    const WithoutGil released;
    d = sequence_backward(cell, grads[0], grads[1], grads[2], grads[3], in, saved[0], saved[1], saved[2], needs, &more);
  }
  const std::vector<Tensor> all = Order::joined(std::move(d), std::move(more.found));
  std::vector<const Tensor*> found;
  for (const Tensor& t : all) found.push_back(&t);
  return tuple_of(found).release();
}

// What a module's __dict__ has under a name, or nullptr.
PyObject* attribute(PyObject* module, PyObject* name) {
  PyObject* found = PyDict_GetItemWithError(module, name);
  if (!found && PyErr_Occurred()) throw PythonError();
  return found;
}

// A module's integer; -1 where it is none.
int64_t size_attribute(PyObject* module, PyObject* name) {
  PyObject* found = attribute(module, name);
  return found && PyLong_CheckExact(found) ? integer(found) : -1;
}

bool fits(const Tensor& t, Sizes sizes, const Tensor& x) { return t && t.has_sizes(sizes) && t.dtype() == x.dtype(); }

// The arguments that the calls of whole modules begin with: (cell, the module's __dict__, the names of its weights,
// input, h0, c0).
struct Call {
  Arguments held;
  std::string_view cell;
  int64_t gates = 0, hidden_size = 0;
  bool has_c = false;
  Tensor x, h0, c0;
  std::vector<Tensor> weights;

  explicit Call(PyObject* const* a, Recorded recorded = Recorded::kRefused) : held(recorded), cell(text(a[0])) {
    std::tie(gates, has_c) = gates_and_c(cell);
    static PyObject *const parameters_name = name("_parameters"), *const hidden_size_name = name("hidden_size");
    PyObject* module = a[1];
    require_plain();
    require(PyDict_CheckExact(module));
    PyObject* parameters = attribute(module, parameters_name);
    require(parameters && PyDict_CheckExact(parameters));
    hidden_size = size_attribute(module, hidden_size_name);
    x = held.take(a[3]);
    require(static_cast<bool>(x) && x.numel() > 0);
    const int32_t dtype = x.dtype();
    require(dtype == kFloat || dtype == kDouble || dtype == kBFloat16 || dtype == kHalf);
    h0 = held.take(a[4]);
    c0 = held.take(a[5]);
    require(static_cast<bool>(c0) == (has_c && h0));
    const bool is_list = PyList_CheckExact(a[2]);
    require(is_list || PyTuple_CheckExact(a[2]));
    const Py_ssize_t count = is_list ? PyList_Size(a[2]) : PyTuple_Size(a[2]);
    static PyObject* const flat_weights_name = name("_flat_weights");
    // What torch.nn reads the weights from: a wrapper may have put its own there.
    PyObject* flat = attribute(module, flat_weights_name);
    require(!flat || (PyList_CheckExact(flat) && PyList_Size(flat) == count));
    weights.reserve(count);
    for (Py_ssize_t k = 0; k < count; ++k) {
      // No parameter: a parametrization computes it. An attribute of that name comes before the parameter.
      PyObject* name = is_list ? PyList_GetItem(a[2], k) : PyTuple_GetItem(a[2], k);
      PyObject* weight = attribute(parameters, name);
      require(weight && !attribute(module, name) && (!flat || PyList_GetItem(flat, k) == weight));
      weights.push_back(held.take(weight));
    }
    require(count >= 2 && weights[0] && weights[1] && weights[1].dim() == 2 && weights[1].size(1) > 0);
  }

  // The states [lead..., .] as they should be, or zeros where none came; `zeros` then holds them.
  void settle_states(std::vector<int64_t> lead, int64_t out, int64_t hidden, Tensor (&zeros)[2]) {
    lead.push_back(out);
    if (!h0) {
      for (int k = 0; k < 1 + has_c; ++k) {
        lead.back() = k ? hidden : out;
        zeros[k] = zeros_of(lead, x.dtype());
        (k ? c0 : h0) = zeros[k].with_dims(zeros[k].dim());
      }
      return;
    }
    require(fits(h0, lead, x));
    lead.back() = hidden;
    require(!has_c || fits(c0, lead, x));
  }

  // What a frozen layer or cell holds for each sequence: a tuple of panels of W_hh and of W_ih, and of a quantized one
  // also of the scales of W_ih, W_hh and W_hr, each perhaps None, and whether x and h are rounded.
  void settle_packed(Inputs& in, PyObject* packed) {
    require(PyTuple_Check(packed));
    Tensor* const to[] = {&in.panels, &in.panels_ih, &in.scale_ih, &in.scale_hh, &in.scale_hr};
    const int64_t count = PyTuple_Size(packed);
    require(count == 2 || count == 6);
    for (int64_t k = 0; k < count && k < 5; ++k) *to[k] = held.take(PyTuple_GetItem(packed, k));
    in.quantized = count == 6;
    in.rounded = in.quantized && is_true(PyTuple_GetItem(packed, 5));
  }

  // Weights `w` as those of one sequence with so many input features.
  void settle_weights(Inputs& in, const Tensor* w, bool bias, const Tensor& w_hr, int64_t input) const {
    const int64_t rows = w[1].size(0), hidden = rows / gates, out = w[1].size(1);
    const Tensor& like = in.quantized ? w[1] : x;
    require(hidden * gates == rows && hidden > 0 && fits(w[0], {rows, input}, like) && fits(w[1], {rows, out}, like));
    in.w_ih = w[0].with_dims(2);
    in.w_hh = w[1].with_dims(2);
    for (int k = 0; bias && k < 2; ++k) {
      require(!w[2 + k] || fits(w[2 + k], {rows}, x));
      (k ? in.b_hh : in.b_ih) = w[2 + k].with_dims(w[2 + k].dim());
    }
    require(w_hr ? fits(w_hr, {out, hidden}, like) : out == hidden);
    in.w_hr = w_hr.with_dims(w_hr.dim());
  }
};

// The list `_packed` of a frozen layer, an entry for each of `count` sequences; null: there is none.
PyObject* packed_of(PyObject* module, Py_ssize_t count) {
  static PyObject* const packed_name = name("_packed");
  PyObject* const kept = attribute(module, packed_name);
  require(!kept || (PyList_CheckExact(kept) && PyList_Size(kept) == count));
  return kept;
}

// `t` as a tensor of these sizes, in one piece.
Tensor reshaped(Tensor&& t, Sizes sizes) {
  if (t.dim() == sizes.count) return std::move(t);
  std::vector<int64_t> strides(sizes.count, 1);
  for (int64_t k = sizes.count - 2; k >= 0; --k) strides[k] = strides[k + 1] * sizes.data[k + 1];
  AtenTensorHandle view = nullptr;
  FUSEDRNN_TORCH(aoti_torch__reinterpret_tensor(t.handle(), sizes.count, sizes.data, strides.data(), 0, &view));
  return Tensor::own(view);
}

// Another tensor of torch in the memory of `t`.
Tensor same_memory(const Tensor& t) {
  const Sizes sizes = t.sizes();
  int64_t strides[Tensor::kDims];
  for (int64_t k = 0; k < sizes.count; ++k) strides[k] = t.stride(k);
  AtenTensorHandle found = nullptr;
  FUSEDRNN_TORCH(aoti_torch__reinterpret_tensor(t.handle(), sizes.count, sizes.data, strides, t.offset(), &found));
  return Tensor::own(found);
}

// A sequence of any cell: (cell, x, states, w_ih, w_hh, b_ih, b_hh, w_hr, parameters, inputs, batch_sizes, resets,
// reverse, heads, w_hh packed and w_ih packed, or None), the groups as tuples: y, then the final states. Of dense x
// states may be [1, B, H] as a layer has them, or none, which is zeros; so are the final ones. Where a gradient of such
// a call will be asked for, a list of these, and of y, gates and every other state for backward; nothing of it is
// recorded.
PyObject* call_sequence_of_states(PyObject* const* a) {
  require_plain();
  Arguments held(Recorded::kKept);
  const std::string_view cell = text(a[0]);
  Inputs in;
  in.x = held.take(a[1]);
  std::vector<Tensor> states = held.take_all(a[2]);
  Tensor* const weights[] = {&in.w_ih, &in.w_hh, &in.b_ih, &in.b_hh, &in.w_hr};
  for (int k = 0; k < 5; ++k) *weights[k] = held.take(a[3 + k]);
  in.more.parameters = held.take_all(a[8]);
  in.more.inputs = held.take_all(a[9]);
  in.batch_sizes = held.take(a[10]);
  in.resets = held.take(a[11]);
  in.reverse = is_true(a[12]);
  in.heads = integer(a[13]);
  in.panels = held.take(a[14]);
  in.panels_ih = held.take(a[15]);
  for (const auto& [panels, w] : {std::pair(&in.panels, &in.w_hh), std::pair(&in.panels_ih, &in.w_ih)}) {
    require(*w && (!*panels || panels->numel() >= w->numel() * w->element_size()));
  }
  const auto [gates, has_c] = gates_and_c(cell);
  const bool of_layer = states.empty() || (states[0] && states[0].dim() == 3);
  if (of_layer) {
    require(in.x && in.x.dim() == 3 && in.w_hh.dim() == 2);
    const int64_t batch = in.x.size(1), hidden = in.w_hh.size(0) / gates;
    const auto count = static_cast<size_t>(counts_of(cell).states);
    require(states.empty() || states.size() == count);
    for (size_t k = 0; k < count; ++k) {
      const int64_t size = k ? hidden : in.w_hh.size(1) * in.heads;
      if (states.size() <= k) {
        states.push_back(zeros_of({batch, size}, in.x.dtype()));
      } else {
        require(fits(states[k], {1, batch, size}, in.x));
        states[k] = states[k].select(0);
      }
    }
  }
  Tensor* const first[] = {&in.h0, &in.c0};
  for (size_t k = 0; k < states.size(); ++k) {
    if (k < 2) {
      *first[k] = std::move(states[k]);
    } else {
      in.more.states.push_back(std::move(states[k]));
    }
  }
  const bool recorded = held.need_gradient();
  require(!recorded || (of_layer && !in.resets && !in.panels && !in.panels_ih));
  Outputs out;
  {
    const WithoutGil released;
    out = sequence(cell, in, recorded, recorded);
  }
  std::vector<Tensor*> finals = {&out.h_n};
  if (has_c) finals.push_back(&out.c_n);
  for (Tensor& t : out.more_n) finals.push_back(&t);
  const Tensor y = recorded ? same_memory(out.y) : Tensor();
  std::vector<const Tensor*> found = {recorded ? &y : &out.y};
  for (Tensor* t : finals) {
    if (of_layer) *t = reshaped(std::move(*t), {1, t->size(0), t->size(1)});
    found.push_back(t);
  }
  if (!recorded) return tuple_of(found).release();
  for (const Tensor* t : {&out.y, &out.gates, &out.cells}) found.push_back(t);
  for (const Tensor& t : out.more_cells) found.push_back(&t);
  return list_of(found).release();
}

// A Cell's call, input [B, I] or [I]: h, and c of a cell that has one, in a tuple then. Where a gradient will be asked
// for, a list of these, and of y, gates and cells for backward; nothing of it is recorded.
PyObject* call_cell(PyObject* const* a) {
  Call call(a, Recorded::kKept);
  const int64_t dims = call.x.dim(), out = call.weights[1].size(1);
  require(call.weights.size() == 4 && (dims == 1 || dims == 2));
  // Zeros have the size that the module says.
  require(call.h0 || call.hidden_size == out);
  std::vector<int64_t> lead;
  if (dims == 2) lead.push_back(call.x.size(0));
  Tensor zeros[2];
  call.settle_states(lead, out, out, zeros);
  Inputs in;
  PyObject* const kept = packed_of(a[1], 1);
  if (kept) call.settle_packed(in, PyList_GetItem(kept, 0));
  call.settle_weights(in, call.weights.data(), true, {}, call.x.size(-1));
  in.x = call.x.with_dims(3);
  in.h0 = call.h0.with_dims(2);
  if (call.has_c) in.c0 = call.c0.with_dims(2);
  lead.push_back(out);
  if (call.held.need_gradient()) {
    require(!kept);
    Outputs found;
    {
      const WithoutGil released;
      found = sequence(call.cell, in, true, true);
    }
    const Tensor h = reshaped(std::move(found.h_n), lead);
    const Tensor c = call.has_c ? reshaped(std::move(found.c_n), lead) : Tensor();
    return list_of({&h, &c, &found.y, &found.gates, &found.cells}).release();
  }
  Tensor h = Tensor::empty(lead, call.x.dtype()), c;
  if (call.has_c) c = Tensor::empty(lead, call.x.dtype());
  const Tensor y = Tensor::empty(lead, call.x.dtype());
  {
    const WithoutGil released;
    sequence_into(call.cell, in, y.writable(), h.writable(), c.writable());
  }
  return (call.has_c ? tuple_of({&h, &c}) : wrap(h)).release();
}

// (cell, batch_first, reverse, heads, grads, saved, needs): of a call that answered a list the gradients, None where it
// is not needed. grads are those of the results; saved are the tensors of the call that are differentiable, a state
// None for zeros, then the end of that list.
PyObject* call_backward(PyObject* const* a) {
  require_plain();
  Arguments held(Recorded::kRefused);
  const std::string_view cell = text(a[0]);
  const auto [gates, has_c] = gates_and_c(cell);
  const Order order(cell);
  const bool batch_first = a[1] == Py_True;
  const std::vector<Tensor> results = held.take_all(a[4]), tensors = held.take_all(a[5]);
  require(tensors.size() == order.differentiable + order.saved);
  const Tensor *const given = tensors.data(), *const saved = given + order.differentiable;
  require(given[0] && given[4] && given[4].dim() == 2);
  const bool has_y = given[0].dim() == 3;  // a Cell's call has none
  require(results.size() == static_cast<size_t>(has_y + order.counts.states));
  const auto time_first = [&](const Tensor& t) { return batch_first && t ? t.transposed() : t.with_dims(t ? 3 : 0); };
  Inputs in = order.inputs(given);
  in.reverse = a[2] == Py_True;
  in.heads = integer(a[3]);
  in.x = time_first(given[0]);
  std::vector<Tensor*> states = {&in.h0};
  if (has_c) states.push_back(&in.c0);
  for (Tensor& t : in.more.states) states.push_back(&t);
  std::vector<Tensor> zeros(states.size());
  for (size_t k = 0; k < states.size(); ++k) {
    const int64_t size = k ? given[4].size(0) / gates : given[4].size(1) * in.heads;
    if (!*states[k]) zeros[k] = zeros_of({in.x.size(1), size}, in.x.dtype());
    *states[k] = (zeros[k] ? zeros[k] : *states[k]).with_dims(2);
  }
  const Tensor* const dfinals = results.data() + has_y;
  std::array<bool, 8> needs{};
  MoreGradients more = order.more(dfinals + 2, nullptr, saved + 3, a[6], needs);
  const auto of_state = [](const Tensor& t) { return t.with_dims(t ? 2 : 0); };
  const Tensor dy = has_y ? time_first(results[0]) : Tensor(), dc = has_c ? of_state(dfinals[1]) : Tensor();
  Gradients d;
  {
    const WithoutGil released;
    d = sequence_backward(cell, dy, of_state(dfinals[0]), dc, {}, in, saved[0], saved[1], saved[2], needs, &more);
  }
  std::vector<Tensor> all = Order::joined(std::move(d), std::move(more.found));
  Object found(PyTuple_New(static_cast<Py_ssize_t>(all.size())));
  for (size_t k = 0; k < all.size(); ++k) {
    const bool needed = is_true(Object(PySequence_GetItem(a[6], static_cast<Py_ssize_t>(k))).get());
    Object each = !needed                 ? none()
                  : k == 0 && batch_first ? wrap(same_memory(all[k].transposed()))
                                          : wrap(reshaped(std::move(all[k]), given[k].sizes()));
    PyTuple_SetItem(found.get(), static_cast<Py_ssize_t>(k), each.release());
  }
  return found.release();
}

// (cell, w_hh, quantized, heads, whether x and h are rounded): W_hh packed for this processor, what the list `_packed`
// of a frozen layer holds. Quantized: W_hh or W_ih, bfloat16 or int8, of a layer in float32.
PyObject* call_pack(PyObject* const* a) {
  require_plain();
  Arguments held(Recorded::kRefused);
  const Tensor w_hh = held.take(a[1]);
  require(w_hh && w_hh.dim() == 2 && w_hh.numel() > 0);
  return wrap(pack(text(a[0]), w_hh, is_true(a[2]), integer(a[3]), is_true(a[4]))).release();
}

// (cell, w_ih): whether such a W_ih is packed as well.
PyObject* call_packs_input(PyObject* const* a) {
  Arguments held(Recorded::kRefused);
  return PyBool_FromLong(packs_input(text(a[0]), held.take(a[1]).dtype()));
}

// A layer's call, its answer as a Cell's with y in front; after what Call takes: bias, num_layers, directions,
// batch_first, batch_sizes of packed input or None, resets of one direction or None. y, h_n, and c_n where there is a
// c.
PyObject* call_layers(PyObject* const* a) {
  Call call(a, Recorded::kKept);
  const Tensor batch_sizes = call.held.take(a[10]), resets = call.held.take(a[11]);
  const bool packed = static_cast<bool>(batch_sizes);
  require(call.x.dim() == (packed ? 2 : 3));
  const bool bias = a[6] == Py_True, batch_first = a[9] == Py_True && !packed;
  const int64_t num_layers = integer(a[7]), directions = integer(a[8]);
  require(num_layers >= 1 && (directions == 1 || directions == 2));
  const int64_t all = num_layers * directions, per = static_cast<int64_t>(call.weights.size()) / all;
  const int64_t out = call.weights[1].size(1), hidden = call.weights[1].size(0) / call.gates;
  const bool projection = per == 3 + 2 * bias;
  require(per * all == static_cast<int64_t>(call.weights.size()) && per == 2 + 2 * bias + projection);
  static PyObject *const input_size_name = name("input_size"), *const proj_size_name = name("proj_size");
  const int64_t projected = size_attribute(a[1], proj_size_name);
  require(size_attribute(a[1], input_size_name) == call.x.size(-1) && call.hidden_size == hidden &&
          (projected ? projected : hidden) == out);
  const Tensor input = batch_first ? call.x.transposed() : call.x.with_dims(call.x.dim());
  if (packed) {
    require(batch_sizes.dim() == 1 && batch_sizes.dtype() == kInt64 && batch_sizes.numel() > 0);
  }
  const int64_t batch = packed ? batch_sizes.data<int64_t>()[0] : input.size(1), width = directions * out;
  const int64_t rows = packed ? input.size(0) : input.size(0) * batch;
  require(batch > 0);
  // What a second direction is reset by is another mask.
  if (resets) require(!packed && directions == 1 && resets.dtype() == kBool);
  const Tensor mask = resets && batch_first && resets.dim() == 2 ? resets.transposed() : resets.with_dims(resets.dim());
  if (resets) require(mask.has_sizes({input.size(0), batch}));
  const auto lead = [&](int64_t last) {
    return packed ? std::vector<int64_t>{rows, last} : std::vector<int64_t>{input.size(0), batch, last};
  };
  const int32_t dtype = call.x.dtype();
  Tensor zeros[2];
  call.settle_states({all, batch}, out, hidden, zeros);
  std::vector<Inputs> sequences(all);
  PyObject* const kept = packed_of(a[1], all);
  for (int64_t k = 0; k < all; ++k) {
    if (kept) call.settle_packed(sequences[k], PyList_GetItem(kept, k));
    const Tensor* w = &call.weights[k * per];
    for (int64_t j = 0; j < per; ++j) require(static_cast<bool>(w[j]));
    call.settle_weights(sequences[k], w, bias, projection ? w[per - 1].with_dims(2) : Tensor(),
                        k < directions ? call.x.size(-1) : width);
    require(w[1].size(0) == call.gates * hidden && w[1].size(1) == out);
    const Inputs& in = sequences[k];
    require(!in.panels || in.panels.numel() >= w[1].numel() * w[1].element_size());
    require(!in.panels_ih || in.panels_ih.numel() >= w[0].numel() * w[0].element_size());
  }
  if (call.held.need_gradient()) {
    require(all == 1 && !packed && !resets && !kept);
    Inputs& in = sequences[0];
    in.x = input.with_dims(3);
    in.h0 = call.h0.select(0);
    if (call.has_c) in.c0 = call.c0.select(0);
    Outputs found;
    {
      const WithoutGil released;
      found = sequence(call.cell, in, true, true);
    }
    const Tensor y = same_memory(batch_first ? found.y.transposed() : found.y.with_dims(3));
    const Tensor h = reshaped(std::move(found.h_n), {1, batch, out});
    const Tensor c = call.has_c ? reshaped(std::move(found.c_n), {1, batch, hidden}) : Tensor();
    return list_of({&y, &h, &c, &found.y, &found.gates, &found.cells}).release();
  }
  Tensor h_n = Tensor::empty({all, batch, out}, dtype), c_n;
  if (call.has_c) c_n = Tensor::empty({all, batch, hidden}, dtype);
  Tensor y;
  {
    const WithoutGil released;
    // Two at a time: the directions of a layer, or two layers of one direction. What a later layer has read is written
    // to again.
    Tensor between, spare;
    for (int64_t k = 0; k < all; k += 2) {
      const int64_t count = std::min<int64_t>(2, all - k);
      if (directions == 1 && count == 2 && !between) between = Tensor::empty(lead(out), dtype);
      if (count == 1 && !spare) spare = std::move(between);
      Tensor result = spare ? std::move(spare) : Tensor::empty(lead(width), dtype);
      Inputs given[2];
      Into to[2];
      for (int64_t d = 0; d < count; ++d) {
        Inputs& in = given[d] = std::move(sequences[k + d]);
        const Tensor& x = d && directions == 1 ? between : k ? y : input;
        in.x = x.with_dims(x.dim());
        in.batch_sizes = batch_sizes.with_dims(batch_sizes.dim());
        in.resets = mask.with_dims(mask.dim());
        in.h0 = call.h0.select(k + d);
        if (call.has_c) in.c0 = call.c0.select(k + d);
        in.reverse = d == 1 && directions == 2;
        to[d] = {result.writable(), h_n.select(k + d).writable(), call.has_c ? c_n.select(k + d).writable() : nullptr};
      }
      if (directions == 2) {
        to[1].y = static_cast<char*>(to[1].y) + out * result.element_size();
        directions_into(call.cell, given, to);
      } else if (count == 2) {
        to[0].y = between.writable();
        layers_into(call.cell, given, to);
      } else {
        sequence_into(call.cell, given[0], to[0].y, to[0].h_n, to[0].c_n);
      }
      spare = std::move(y);
      y = std::move(result);
    }
  }
  if (batch_first) y = same_memory(y.transposed());
  return (call.has_c ? tuple_of({&y, &h_n, &c_n}) : tuple_of({&y, &h_n})).release();
}

// (cell, dtype, T, B, I, H, P or 0, heads, states beside h and c, parameters, inputs, packed, backward, dtype of
// quantized weights or None, whether x and h are rounded): how the CPU goes about it. The tensors made here are not
// written, so no memory is taken.
PyObject* call_plan(PyObject* const* a) {
  const std::string_view cell = text(a[0]);
  const auto [gates, has_c] = gates_and_c(cell);
  const int32_t dtype = static_cast<int32_t>(integer(a[1]));
  const int64_t steps = integer(a[2]), batch = integer(a[3]), input = integer(a[4]), hidden = integer(a[5]),
                projection = integer(a[6]), heads = integer(a[7]), out = projection ? projection : hidden;
  Inputs in;
  in.x = Tensor::empty({steps, batch, input}, dtype);
  in.h0 = Tensor::empty({batch, out}, dtype);
  if (has_c) in.c0 = Tensor::empty({batch, hidden}, dtype);
  in.quantized = a[13] != Py_None;
  in.rounded = is_true(a[14]);
  const int32_t of_weights = in.quantized ? static_cast<int32_t>(integer(a[13])) : dtype;
  in.w_ih = Tensor::empty({gates * hidden, input}, of_weights);
  in.w_hh = Tensor::empty({gates * hidden, out / heads}, of_weights);
  if (projection) in.w_hr = Tensor::empty({out, hidden}, of_weights);
  if (of_weights == kInt8) {
    in.scale_ih = Tensor::empty({gates * hidden}, kFloat);
    in.scale_hh = Tensor::empty({gates * hidden}, kFloat);
    if (projection) in.scale_hr = Tensor::empty({out}, kFloat);
  }
  in.heads = heads;
  for (long k = 0; k < integer(a[8]); ++k) in.more.states.push_back(Tensor::empty({batch, hidden}, dtype));
  for (long k = 0; k < integer(a[9]); ++k) in.more.parameters.push_back(Tensor::empty({hidden}, dtype));
  for (long k = 0; k < integer(a[10]); ++k) in.more.inputs.push_back(Tensor::empty({steps, batch, hidden}, dtype));
  if (is_true(a[11])) in.panels = Tensor::empty({1}, kUint8);
  if (is_true(a[11]) && packs_input(cell, dtype) && heads == 1) in.panels_ih = Tensor::empty({1}, kUint8);
  const Plan found = plan(cell, in, is_true(a[12]));
  return Py_BuildValue(
      "{s:s, s:O, s:O, s:O, s:O, s:i, s:L, s:s, s:s, s:O, s:O}", "capability", found.capability, "direct",
      found.way.direct ? Py_True : Py_False, "by_rows", found.way.by_rows ? Py_True : Py_False, "tiles",
      found.way.tiles ? Py_True : Py_False, "digits", found.way.digits ? Py_True : Py_False, "threads",
      found.way.threads, "panel_bytes", static_cast<long long>(found.way.panel_bytes), "input_product",
      found.input_product, "state_product", found.state_product, "directions_beside",
      found.directions_beside ? Py_True : Py_False, "layers_beside", found.layers_beside ? Py_True : Py_False);
}

// As if others had come late, for the tests: one thread does the work of all for a while.
PyObject* call_crowd(PyObject* const*) {
  // Once may be threads that slept.
  for (int k = 0; k < 2; ++k) late_partners(1'000'000'000, 1'000'000'000);
  Py_RETURN_NONE;
}

Dtype dtype_named(PyObject* object) {
  const std::string_view name = text(object);
  return name == "float32"    ? Dtype::kFloat32
         : name == "float64"  ? Dtype::kFloat64
         : name == "bfloat16" ? Dtype::kBfloat16
                              : Dtype::kFloat16;
}

// An address, as data_ptr of a tensor gives it: of torch, before 2.14 too. None: null.
void* address(PyObject* object) {
  if (object == Py_None) return nullptr;
  void* found = PyLong_AsVoidPtr(object);
  if (!found && PyErr_Occurred()) throw PythonError();
  return found;
}

constexpr char kStream[] = "fusedrnn.stream";
Stream& stream_in(PyObject* capsule) {
  void* found = PyCapsule_GetPointer(capsule, kStream);
  if (!found) throw PythonError();
  return *static_cast<Stream*>(found);
}

// (cell, dtype, batch, input, hidden, projection, dtype of quantized weights or None, whether x and h are rounded,
// eight addresses or None of each layer): a stream, and the addresses of its h and c, and its bytes.
PyObject* call_stream(PyObject* const* a) {
  const bool narrow = a[6] != Py_None, int8 = narrow && text(a[6]) == "int8";
  const Weights weights = !narrow         ? Weights::kSame
                          : !int8         ? Weights::kBfloat16
                          : is_true(a[7]) ? Weights::kInt8Both
                                          : Weights::kInt8;
  const Stream::Sizes sizes{dtype_named(a[1]), integer(a[2]), integer(a[3]), integer(a[4]), integer(a[5]), weights};
  std::vector<Stream::Weights> layers;
  for (Py_ssize_t k = 0; k < PyTuple_Size(a[8]); ++k) {
    PyObject* of = PyTuple_GetItem(a[8], k);
    const auto part = [&](Py_ssize_t i) { return address(PyTuple_GetItem(of, i)); };
    const auto scale = [&](Py_ssize_t i) { return static_cast<const float*>(part(i)); };
    layers.push_back({part(0), part(1), part(2), part(3), part(4), scale(5), scale(6), scale(7)});
  }
  auto stream = std::make_unique<Stream>(text(a[0]), sizes, layers);
  Object capsule(PyCapsule_New(stream.get(), kStream, [](PyObject* object) {
    delete static_cast<Stream*>(PyCapsule_GetPointer(object, kStream));
  }));
  Stream& s = *stream.release();  // the capsule's
  return Py_BuildValue("(ONNL)", capsule.get(), PyLong_FromVoidPtr(s.h()), PyLong_FromVoidPtr(s.c()),
                       static_cast<long long>(s.bytes()));
}

// (stream, address of x, steps, of resets or None, of y)
PyObject* call_stream_run(PyObject* const* a) {
  Stream& stream = stream_in(a[0]);
  const void* x = address(a[1]);
  const long steps = integer(a[2]);
  const bool* resets = static_cast<const bool*>(address(a[3]));
  void* y = address(a[4]);
  {
    const WithoutGil released;
    stream.run(x, steps, resets, y);
  }
  Py_RETURN_NONE;
}

const char* products(Dtype dtype) { return host_multiplies(dtype) ? "host" : "panels"; }

PyObject* facts(PyObject* const*) {
  return Py_BuildValue("{s:s, s:s, s:s, s:{s:s, s:s, s:s}}", "compiler", __VERSION__, "cpu_capability", kernels().name,
                       "cpu_capabilities_built", compiled_capabilities(), "cpu_products", "float32",
                       products(Dtype::kFloat32), "bfloat16", products(Dtype::kBfloat16), "float16",
                       products(Dtype::kFloat16));
}

// Whether this torch hands its tensors to C: whether `sequence`, `cell` and the others ever answer.
PyObject* small_calls(PyObject* const*) { return PyBool_FromLong(torch_state().available()); }

// (capability, is_intel, has_bfloat16, onednn_limit or None, dtype, forced or None): who multiplies, of any processor;
// for the tests.
PyObject* cpu_products(PyObject* const* a) {
  const auto optional_text = [](PyObject* object) {
    return object == Py_None ? std::optional<std::string>() : std::string(text(object));
  };
  const std::string capability(text(a[0]));
  const auto limit = optional_text(a[3]), forced = optional_text(a[5]);
  const Processor processor{capability.c_str(), is_true(a[1]), is_true(a[2]), limit ? limit->c_str() : nullptr};
  const bool host = host_multiplies(processor, dtype_named(a[4]), forced ? forced->c_str() : nullptr);
  return PyUnicode_FromString(host ? "host" : "panels");
}

template <PyObject* (*kCall)(PyObject* const*), Py_ssize_t kCount>
PyMethodDef method(const char* name) {
  PyObject* (*const function)(PyObject*, PyObject* const*, Py_ssize_t) = guarded<kCall, kCount>;
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    method<call_sequence, 6>("sequence"),
    method<call_sequence_backward, 5>("sequence_backward"),
    method<call_cell, 6>("cell"),
    method<call_backward, 7>("backward"),
    method<call_layers, 12>("layers"),
    method<call_sequence_of_states, 16>("sequence_of_states"),
    method<call_pack, 5>("pack"),
    method<call_packs_input, 2>("packs_input"),
    method<facts, 0>("facts"),
    method<small_calls, 0>("small_calls"),
    method<cpu_products, 6>("cpu_products"),
    method<call_plan, 15>("plan"),
    method<call_crowd, 0>("crowd"),
    method<call_stream, 9>("stream"),
    method<call_stream_run, 5>("stream_run"),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "fusedrnn._C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
