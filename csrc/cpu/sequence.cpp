#include "sequence.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../cells.h"
#include "recurrence.h"

namespace fusedrnn {
namespace {

// The table of cells, as far as sizes go.
struct CellEntry {
  const char* name;
  CellKind kind;
  int64_t gates, accumulators, saved;
  bool has_cell_state;
  std::vector<int64_t> x_acc, h_acc;
};

template <typename Cell>
CellEntry entry(CellKind kind) {
  CellEntry e{Cell::kName, kind, Cell::kGates, Cell::kAccumulators, Cell::kSaved, Cell::kHasCellState, {}, {}};
  for (int g = 0; g < Cell::kGates; ++g) {
    e.x_acc.push_back(Cell::x_acc(g));
    e.h_acc.push_back(Cell::h_acc(g));
  }
  return e;
}

const CellEntry& find_cell(c10::string_view name) {
#define FUSEDRNN_ENTRY(Cell) entry<Cell>(CellKind::k##Cell),
  static const std::vector<CellEntry> cells = {FUSEDRNN_CELLS(FUSEDRNN_ENTRY)};
#undef FUSEDRNN_ENTRY
  for (const CellEntry& cell : cells) {
    if (name == cell.name) return cell;
  }
  TORCH_CHECK(false, "the cpu backend has no cell '", name, "'");
}

void check_algorithm(c10::string_view algorithm) {
  TORCH_CHECK(algorithm == "auto" || algorithm == "persistent", "algorithm '", algorithm,
              "' of backend 'cpu' cannot run: it has persistent only");
}

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kBFloat16:
      return Dtype::kBfloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      TORCH_CHECK(false, "x must be float32, float64, bfloat16 or float16, got ", x.scalar_type());
  }
}

at::ScalarType compute_dtype(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

int64_t cache_bytes() {
  static const int64_t bytes = [] {
#ifdef _SC_LEVEL2_CACHE_SIZE
    const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (found > 0) return static_cast<int64_t>(found);
#endif
    return int64_t{1} << 20;
  }();
  return bytes;
}

void check_tensor(const char* name, const Tensor& t, at::IntArrayRef shape, at::ScalarType dtype) {
  TORCH_CHECK(t.sizes() == shape, "fusedrnn: ", name, " must have shape ", shape, ", got ", t.sizes());
  TORCH_CHECK(t.scalar_type() == dtype, "fusedrnn: ", name, " must be ", dtype, ", got ", t.scalar_type());
  TORCH_CHECK(t.device().is_cpu(), "fusedrnn: ", name, " must be on the CPU, got ", t.device());
}
void check_tensor(const char* name, const OptionalTensor& t, at::IntArrayRef shape, at::ScalarType dtype) {
  if (t) check_tensor(name, *t, shape, dtype);
}

// The sizes of a call; building one checks the inputs that forward and backward share.
struct Sizes {
  const CellEntry& cell;
  int64_t steps, batch, rows, input, hidden, out;
  std::vector<int64_t> offsets;
  std::vector<int64_t> lead;  // of x, y, gates, cells: [T, B] or [N]

  Sizes(c10::string_view cell_name, const Tensor& x, const Tensor& h0, const OptionalTensor& c0, const Tensor& w_ih,
        const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh, const OptionalTensor& w_hr,
        const OptionalTensor& batch_sizes, const OptionalTensor& resets)
      : cell(find_cell(cell_name)) {
    const int64_t dims = batch_sizes ? 2 : 3;
    TORCH_CHECK(x.dim() == dims, "fusedrnn: x must have ", dims, " dimensions, got ", x.dim());
    TORCH_CHECK(h0.dim() == 2, "fusedrnn: h0 must have 2 dimensions, got ", h0.dim());
    TORCH_CHECK(w_hh.dim() == 2 && w_hh.size(0) > 0 && w_hh.size(1) > 0 && w_hh.size(0) % cell.gates == 0,
                "fusedrnn: w_hh must have shape [", cell.gates, " * hidden_size, output size], got ", w_hh.sizes());
    dtype_of(x);
    const at::ScalarType dtype = x.scalar_type();
    input = x.size(-1);
    hidden = w_hh.size(0) / cell.gates;
    out = w_hh.size(1);
    batch = h0.size(0);
    TORCH_CHECK(w_hr || out == hidden, "fusedrnn: w_hh must have shape [", cell.gates * hidden, ", ", hidden, "], got ",
                w_hh.sizes());
    TORCH_CHECK(!w_hr || cell.has_cell_state, "fusedrnn: w_hr (projection) exists only for the LSTM");
    TORCH_CHECK(c0.has_value() == cell.has_cell_state, "fusedrnn: c0 must ", cell.has_cell_state ? "" : "not ",
                "be given for the cell ", cell.name);
    check_tensor("x", x, x.sizes(), dtype);
    check_tensor("h0", h0, {batch, out}, dtype);
    check_tensor("c0", c0, {batch, hidden}, dtype);
    check_tensor("w_ih", w_ih, {cell.gates * hidden, input}, dtype);
    check_tensor("w_hh", w_hh, {cell.gates * hidden, out}, dtype);
    check_tensor("b_ih", b_ih, {cell.gates * hidden}, dtype);
    check_tensor("b_hh", b_hh, {cell.gates * hidden}, dtype);
    check_tensor("w_hr", w_hr, {out, hidden}, dtype);
    if (batch_sizes) {
      packed(x, *batch_sizes);
    } else {
      dense(x);
    }
    check_tensor("resets", resets, lead, at::kBool);
  }

  void dense(const Tensor& x) {
    steps = x.size(0);
    TORCH_CHECK(steps > 0, "Expected sequence length to be larger than 0 in RNN");
    TORCH_CHECK(x.size(1) == batch, "fusedrnn: h0 must have batch size ", x.size(1), ", got ", batch);
    rows = steps * batch;
    lead = {steps, batch};
    offsets.resize(steps + 1);
    for (int64_t t = 0; t <= steps; ++t) offsets[t] = t * batch;
  }

  void packed(const Tensor& x, const Tensor& sizes) {
    TORCH_CHECK(sizes.dim() == 1 && sizes.scalar_type() == at::kLong && sizes.device().is_cpu(),
                "fusedrnn: batch_sizes must be a 1-D int64 tensor on the CPU, got ", sizes.dim(), "-D ",
                sizes.scalar_type(), " on ", sizes.device());
    steps = sizes.size(0);
    TORCH_CHECK(steps > 0, "Expected sequence length to be larger than 0 in RNN");
    const Tensor contiguous = sizes.contiguous();
    const int64_t* size = contiguous.const_data_ptr<int64_t>();
    TORCH_CHECK(size[0] == batch, "fusedrnn: h0 must have batch size ", size[0], ", got ", batch);
    rows = x.size(0);
    lead = {rows};
    offsets.reserve(steps + 1);
    offsets.push_back(0);
    for (int64_t t = 0; t < steps; ++t) {
      TORCH_CHECK(size[t] >= 1 && size[t] <= size[t ? t - 1 : 0],
                  "fusedrnn: batch_sizes must not increase and must be at least 1, got ", size[t], " at step ", t);
      TORCH_CHECK(size[t] <= rows - offsets.back(), "fusedrnn: batch_sizes add up to more than the ", rows,
                  " rows of x");
      offsets.push_back(offsets.back() + size[t]);
    }
    TORCH_CHECK(offsets.back() == rows, "fusedrnn: batch_sizes must add up to the ", rows, " rows of x, got ",
                offsets.back());
  }

  std::vector<int64_t> shape(int64_t last) const {
    std::vector<int64_t> s = lead;
    s.push_back(last);
    return s;
  }

  // A step too small for several cores gains nothing from them; with few rows there is a barrier to pay for as well,
  // and on a busy machine that costs a time slice.
  Shape problem(const Tensor& x, const OptionalTensor& resets, bool reverse) const {
    const double step = static_cast<double>(batch) * cell.gates * hidden * out;
    int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    if (step < (batch >= 2 * threads ? 32768.0 : (steps == 1 ? 65536.0 : 200000.0))) threads = 1;
    const bool* reset = resets ? resets->const_data_ptr<bool>() : nullptr;
    return {cell.kind, dtype_of(x), steps, batch, hidden, out, offsets.data(), reset, reverse, threads, cache_bytes()};
  }
};

const void* pointer(const Tensor& t) { return t.numel() ? t.const_data_ptr() : nullptr; }
const void* pointer(const OptionalTensor& t) { return t ? pointer(*t) : nullptr; }
void* writable(const Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; }

OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : std::nullopt; }

Tensor rows_of(const Tensor& t) { return t.contiguous().flatten(0, -2); }

// Every product of two matrices outside of the loop comes through here.
void product_out(Tensor& c, const Tensor& a, const Tensor& b) {
  if (c.element_size() > 2 || c.numel() == 0 || a.size(1) == 0) {
    at::mm_out(c, a, b);
    return;
  }
  const int64_t rows = a.size(0), depth = a.size(1), columns = b.size(1);
  const int64_t work = rows * depth * columns;
  const bool large = std::min({rows, depth, columns}) >= kHostLeast && work >= kHostWork;
  if (host_multiplies(dtype_of(c)) && large && at::globalContext().userEnabledMkldnn()) {
    // It takes the depth in pairs: the last of an odd one would have a NaN of the next row beside it.
    const bool odd = depth % 2;
    at::mm_out(c, odd ? at::constant_pad_nd(a, {0, 1}) : a, odd ? at::constant_pad_nd(b, {0, 0, 0, 1}) : b);
    return;
  }
  const auto with_unit_stride = [](const Tensor& t) {
    return t.stride(0) == 1 || t.stride(1) == 1 ? t : t.contiguous();
  };
  const Tensor left = with_unit_stride(a), right = with_unit_stride(b);
  const bool alone = at::in_parallel_region() || work < 65536;
  kernels().product({dtype_of(c), rows, columns, depth, pointer(left), left.stride(0), left.stride(1), pointer(right),
                     right.stride(0), right.stride(1), writable(c), c.stride(0), alone ? 1 : at::get_num_threads()});
}

Tensor product(const Tensor& a, const Tensor& b) {
  Tensor c = at::empty({a.size(0), b.size(1)}, a.options());
  product_out(c, a, b);
  return c;
}

// For every row the h its step started from.
Tensor previous_rows(const Sizes& sizes, const Tensor& h0, const Tensor& y, const OptionalTensor& resets,
                     bool reverse) {
  const Tensor result = at::empty({sizes.rows, sizes.out}, y.options());
  const size_t row_bytes = static_cast<size_t>(sizes.out * y.element_size());
  char* to = static_cast<char*>(result.mutable_data_ptr());
  const char* from_y = static_cast<const char*>(y.const_data_ptr());
  const char* from_h0 = static_cast<const char*>(h0.const_data_ptr());
  for (int64_t t = 0; t < sizes.steps; ++t) {
    const int64_t before = reverse ? t + 1 : t - 1;
    const int64_t count = sizes.offsets[t + 1] - sizes.offsets[t];
    const bool inside = before >= 0 && before < sizes.steps;
    const int64_t carried = inside ? std::min(count, sizes.offsets[before + 1] - sizes.offsets[before]) : 0;
    char* row = to + sizes.offsets[t] * row_bytes;
    if (carried) std::memcpy(row, from_y + sizes.offsets[before] * row_bytes, carried * row_bytes);
    if (count > carried) {
      std::memcpy(row + carried * row_bytes, from_h0 + carried * row_bytes, (count - carried) * row_bytes);
    }
  }
  if (resets) {
    const bool* reset = resets->const_data_ptr<bool>();
    for (int64_t row = 0; row < sizes.rows; ++row) {
      if (reset[row]) std::memset(to + row * row_bytes, 0, row_bytes);
    }
  }
  return result;
}

// dgates^T times what each step started from. In 16 bits one GEMM over a copy: adding two would round twice.
Tensor recurrent_gradient(const Sizes& s, const Tensor& dgates, const Tensor& h0, const Tensor& y,
                          const OptionalTensor& resets, bool reverse) {
  const bool dense = s.lead.size() == 2;
  if (!dense || resets || dgates.element_size() == 2) {
    return product(dgates.t(), previous_rows(s, h0, y, resets, reverse));
  }
  const int64_t inner = s.rows - s.batch;
  const Tensor started = dgates.narrow(0, reverse ? inner : 0, s.batch);
  Tensor result = at::mm(started.t(), h0);
  const Tensor y_rows = y.view({s.rows, s.out}).narrow(0, reverse ? s.batch : 0, inner);
  return inner ? result.addmm_(dgates.narrow(0, reverse ? 0 : s.batch, inner).t(), y_rows) : result;
}

// Columns of dgates in the order of the gates.
Tensor gate_columns(const Tensor& dgates, const std::vector<int64_t>& accumulators, int64_t hidden) {
  bool in_order = true;
  for (size_t g = 0; g < accumulators.size(); ++g) in_order &= accumulators[g] == static_cast<int64_t>(g);
  if (in_order) return dgates.narrow(1, 0, static_cast<int64_t>(accumulators.size()) * hidden);
  std::vector<Tensor> columns;
  for (const int64_t a : accumulators) columns.push_back(dgates.narrow(1, a * hidden, hidden));
  return at::cat(columns, 1);
}

}  // namespace

std::pair<int64_t, bool> gates_and_c(c10::string_view cell) {
  const CellEntry& found = find_cell(cell);
  return {found.gates, found.has_cell_state};
}

Outputs sequence_cpu(c10::string_view cell, const Tensor& x, const Tensor& h0, const OptionalTensor& c0,
                     const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                     const OptionalTensor& w_hr, const OptionalTensor& batch_sizes, const OptionalTensor& resets,
                     bool reverse, c10::string_view backend, c10::string_view algorithm, bool keep_gates,
                     bool keep_cells) {
  // The tensors have the dtype they shall have; autocast would round the operands of the products here.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  if (backend != "cpu") {
    static const auto python =
        c10::Dispatcher::singleton().findSchemaOrThrow("fusedrnn::sequence_python", "").typed<decltype(sequence_cpu)>();
    return python.call(cell, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, resets, reverse, backend, algorithm,
                       keep_gates, keep_cells);
  }
  check_algorithm(algorithm);
  const Sizes s(cell, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, resets);
  const auto options = x.options();
  const auto compute = options.dtype(compute_dtype(x));
  const Tensor y = at::empty(s.shape(s.out), options);
  const Tensor h_n = at::empty({s.batch, s.out}, options);
  const Tensor c_n = s.cell.has_cell_state ? at::empty({s.batch, s.hidden}, options) : at::empty({0}, options);
  const bool save_gates = keep_gates && s.cell.saved > 0, save_cells = keep_cells && s.cell.has_cell_state;
  const Tensor gates = save_gates ? at::empty(s.shape(s.cell.saved * s.hidden), options) : at::empty({0}, options);
  const Tensor cells = save_cells ? at::empty(s.shape(s.hidden), compute) : at::empty({0}, compute);
  if (s.rows == 0) return {y, h_n, c_n, gates, cells};

  // Where as many gates are saved as come in, the cell replaces the one by the other in place.
  const bool in_place = save_gates && s.cell.saved == s.cell.gates;
  // In a step of few rows the kernel multiplies x by W_ih as well: a GEMM of its own would take longer.
  const bool in_tiles = kernels().tiles && x.scalar_type() == at::kBFloat16;
  const bool one_kernel = s.steps == 1 && s.batch <= (in_tiles ? kFewRowsOfTiles : kFewRows);
  // With more rows both products are GEMMs; 16 bits would round the second.
  const bool two_products = s.steps == 1 && !one_kernel && x.element_size() > 2 && !resets;
  Tensor gates_x =
      in_place ? gates.view({s.rows, -1}) : at::empty({one_kernel ? 0 : s.rows, s.cell.gates * s.hidden}, options);
  const Tensor xc = one_kernel ? x.contiguous() : x, w_ihc = one_kernel ? w_ih.contiguous() : w_ih;
  if (!one_kernel) product_out(gates_x, rows_of(x), w_ih.t());
  const Tensor h0c = h0.contiguous(), w_hhc = w_hh.contiguous();
  const Tensor gates_h = two_products ? at::mm(h0c, w_hh.t()) : at::empty({0}, options);
  const OptionalTensor c0c = contiguous(c0), b_ihc = contiguous(b_ih), b_hhc = contiguous(b_hh),
                       w_hrc = contiguous(w_hr);
  const OptionalTensor resetsc = contiguous(resets);
  kernels().forward({s.problem(x, resetsc, reverse), one_kernel ? nullptr : pointer(gates_x),
                     two_products ? pointer(gates_h) : nullptr, pointer(xc), pointer(w_ihc), s.input, pointer(h0c),
                     pointer(c0c), pointer(w_hhc), pointer(b_ihc), pointer(b_hhc), pointer(w_hrc), writable(y),
                     writable(h_n), writable(c_n), writable(gates), writable(cells)});
  return {y, h_n, c_n, gates, cells};
}

Gradients sequence_backward_cpu(c10::string_view cell, const OptionalTensor& dy, const OptionalTensor& dh_n,
                                const OptionalTensor& dc_n, const OptionalTensor& dcells, const Tensor& x,
                                const Tensor& h0, const OptionalTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                                const OptionalTensor& b_ih, const OptionalTensor& b_hh, const OptionalTensor& w_hr,
                                const OptionalTensor& batch_sizes, const OptionalTensor& resets, bool reverse,
                                const Tensor& y, const Tensor& gates, const Tensor& cells, c10::string_view backend,
                                c10::string_view algorithm, c10::List<bool> needs) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  if (backend != "cpu") {
    static const auto python = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("fusedrnn::sequence_backward_python", "")
                                   .typed<decltype(sequence_backward_cpu)>();
    return python.call(cell, dy, dh_n, dc_n, dcells, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, resets,
                       reverse, y, gates, cells, backend, algorithm, needs);
  }
  check_algorithm(algorithm);
  const Sizes s(cell, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, resets);
  const at::ScalarType dtype = x.scalar_type();
  TORCH_CHECK(needs.size() == 8, "fusedrnn: needs must have 8 entries, got ", needs.size());
  check_tensor("y", y, s.shape(s.out), dtype);
  check_tensor("dy", dy, s.shape(s.out), dtype);
  check_tensor("dh_n", dh_n, {s.batch, s.out}, dtype);
  TORCH_CHECK(s.cell.has_cell_state || !dc_n, "fusedrnn: dc_n exists only for cells with a cell state");
  check_tensor("dc_n", dc_n, {s.batch, s.hidden}, dtype);
  TORCH_CHECK(s.cell.has_cell_state || !dcells, "fusedrnn: dcells exists only for cells with a cell state");
  check_tensor("dcells", dcells, s.shape(s.hidden), compute_dtype(x));
  if (s.cell.saved) check_tensor("gates (saved by forward)", gates, s.shape(s.cell.saved * s.hidden), dtype);
  if (s.cell.has_cell_state) check_tensor("cells (saved by forward)", cells, s.shape(s.hidden), compute_dtype(x));

  const auto options = x.options();
  const Tensor dgates = at::empty({s.rows, s.cell.accumulators * s.hidden}, options);
  const Tensor none = at::empty({0}, options);
  const auto output = [&](int index, at::IntArrayRef shape) {
    return needs.get(index) ? at::empty(shape, options) : at::empty({0}, options);
  };
  const Tensor dh0 = output(1, {s.batch, s.out});
  const Tensor dc0 = s.cell.has_cell_state ? output(2, {s.batch, s.hidden}) : none;
  const Tensor dy_total = w_hr ? at::empty({s.rows, s.out}, options) : none;
  const Tensor h = w_hr ? at::empty({s.rows, s.hidden}, options) : none;
  const Tensor yc = y.contiguous(), h0c = h0.contiguous();
  const OptionalTensor resetsc = contiguous(resets);
  if (s.rows > 0) {
    const Tensor w_hhc = w_hh.contiguous(), gatesc = gates.contiguous(), cellsc = cells.contiguous();
    const OptionalTensor dyc = contiguous(dy), dh_nc = contiguous(dh_n), dc_nc = contiguous(dc_n), c0c = contiguous(c0),
                         w_hrc = contiguous(w_hr), dcellsc = contiguous(dcells);
    kernels().backward({s.problem(x, resetsc, reverse), pointer(dyc), pointer(dh_nc), pointer(dc_nc), pointer(dcellsc),
                        pointer(h0c), pointer(c0c), pointer(w_hhc), pointer(w_hrc), pointer(yc), pointer(gatesc),
                        pointer(cellsc), writable(dgates), writable(dh0), writable(dc0), writable(dy_total),
                        writable(h)});
  }

  const bool same = s.cell.x_acc == s.cell.h_acc;
  const Tensor dgates_x = gate_columns(dgates, s.cell.x_acc, s.hidden);
  const Tensor dgates_h = same ? dgates_x : gate_columns(dgates, s.cell.h_acc, s.hidden);
  Tensor dx = none, dw_ih = none, dw_hh = none, db_ih = none, db_hh = none, dw_hr = none;
  if (needs.get(0)) dx = product(dgates_x, w_ih).view(x.sizes());
  if (needs.get(3)) dw_ih = product(dgates_x.t(), rows_of(x));
  if (needs.get(4)) dw_hh = recurrent_gradient(s, dgates_h, h0c, yc, resetsc, reverse);
  if (needs.get(5) && b_ih) db_ih = dgates_x.sum(0);
  if (needs.get(6) && b_hh) db_hh = same && db_ih.numel() ? db_ih.clone() : dgates_h.sum(0);
  if (needs.get(7) && w_hr) dw_hr = product(dy_total.t(), h);
  // Outputs of an op may not alias each other.
  const auto own = [&](const Tensor& t) { return t.is_same(none) ? at::empty({0}, options) : t; };
  return {own(dx), dh0, own(dc0), own(dw_ih), own(dw_hh), own(db_ih), own(db_hh), own(dw_hr)};
}

}  // namespace fusedrnn
