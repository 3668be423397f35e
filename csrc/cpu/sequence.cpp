#include "sequence.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "../cells.h"
#include "recurrence.h"

namespace fusedrnn {
namespace {

// The table of cells, as far as sizes go.
struct CellEntry {
  std::string name;
  CellKind kind;
  int64_t gates, accumulators, saved, states, parameters, inputs;
  bool projects;
  std::vector<int64_t> x_acc, h_acc;
  // Of a cell of one's own, else null: this library has kernels for its kind.
  void (*forward)(const Forward&) = nullptr;
  void (*backward)(const Backward&) = nullptr;

  bool has_cell_state() const { return states > 1; }
};

template <typename Cell>
CellEntry entry(CellKind kind) {
  CellEntry e{Cell::kName,
              kind,
              Cell::kGates,
              Cell::kAccumulators,
              Cell::kSaved,
              Cell::kStates,
              Cell::kParameters,
              Cell::kInputs,
              false,
              {},
              {}};
  e.projects = requires(const float* x) { Cell::template output<float>(x, x); };
  for (int g = 0; g < Cell::kGates; ++g) {
    e.x_acc.push_back(Cell::x_acc(g));
    e.h_acc.push_back(Cell::h_acc(g));
  }
  return e;
}

const std::vector<CellEntry>& built_in_cells() {
#define FUSEDRNN_ENTRY(Cell) entry<Cell>(CellKind::k##Cell),
  static const std::vector<CellEntry> cells = {FUSEDRNN_CELLS(FUSEDRNN_ENTRY)};
#undef FUSEDRNN_ENTRY
  return cells;
}

const CellEntry* find_built_in(std::string_view name) {
  for (const CellEntry& cell : built_in_cells()) {
    if (name == cell.name) return &cell;
  }
  return nullptr;
}

// Entries stay where they are for as long as the process runs: another thread may be computing with one.
struct OwnCells {
  std::mutex mutex;
  std::deque<CellEntry> entries;
};
OwnCells& own_cells() {
  static OwnCells cells;
  return cells;
}

const CellEntry& find_cell(std::string_view name) {
  if (const CellEntry* found = find_built_in(name)) return *found;
  OwnCells& own = own_cells();
  const std::lock_guard<std::mutex> lock(own.mutex);
  for (auto cell = own.entries.rbegin(); cell != own.entries.rend(); ++cell) {
    if (name == cell->name) return *cell;
  }
  fail("the cpu backend has no cell '", name, "'");
}

Dtype dtype_of(int32_t dtype) {
  switch (dtype) {
    case kFloat:
      return Dtype::kFloat32;
    case kDouble:
      return Dtype::kFloat64;
    case kBFloat16:
      return Dtype::kBfloat16;
    case kHalf:
      return Dtype::kFloat16;
    default:
      fail("x must be float32, float64, bfloat16 or float16, got ", name_of(dtype));
  }
}

Weights weights_of(const Tensor& w, bool quantized) {
  if (!quantized) return Weights::kSame;
  FUSEDRNN_CHECK(w.dtype() == kInt8 || w.dtype() == kBFloat16,
                 "fusedrnn: quantized weights must be int8 or bfloat16, got ", name_of(w.dtype()));
  return w.dtype() == kInt8 ? Weights::kInt8 : Weights::kBfloat16;
}
Weights weights_of(const Inputs& in) { return in.rounded ? Weights::kInt8Both : weights_of(in.w_hh, in.quantized); }

int32_t compute_dtype(const Tensor& x) { return x.dtype() == kDouble ? kDouble : kFloat; }

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

void check_tensor(const char* name, const Tensor& t, Sizes shape, int32_t dtype) {
  if (!t) return;
  FUSEDRNN_CHECK(t.has_sizes(shape), "fusedrnn: ", name, " must have shape ", shape, ", got ", t.sizes());
  FUSEDRNN_CHECK(t.dtype() == dtype, "fusedrnn: ", name, " must be ", name_of(dtype), ", got ", name_of(t.dtype()));
  FUSEDRNN_CHECK(t.is_strided(), "fusedrnn: ", name, " must be a dense tensor");
  FUSEDRNN_CHECK(t.on_cpu(), "fusedrnn: ", name, " must be on the CPU");
}

// The sizes of a call; building one checks the inputs that forward and backward share.
struct Problem {
  const CellEntry& cell;
  int64_t steps, batch, rows, input, hidden, out, heads;
  bool multiplied;  // x is x W_ih^T itself: W_ih has no columns
  std::vector<int64_t> offsets;
  std::vector<int64_t> lead;  // of x, y, gates, cells: [T, B] or [N]

  Problem(std::string_view cell_name, const Inputs& in) : cell(find_cell(cell_name)) {
    const Tensor &x = in.x, &h0 = in.h0, &w_hh = in.w_hh;
    FUSEDRNN_CHECK(x && h0 && in.w_ih && w_hh, "fusedrnn: x, h0, w_ih and w_hh must be tensors");
    const int64_t dims = in.batch_sizes ? 2 : 3;
    FUSEDRNN_CHECK(x.dim() == dims, "fusedrnn: x must have ", dims, " dimensions, got ", x.dim());
    FUSEDRNN_CHECK(h0.dim() == 2, "fusedrnn: h0 must have 2 dimensions, got ", h0.dim());
    heads = in.heads;
    FUSEDRNN_CHECK(heads >= 1, "fusedrnn: heads must be positive, got ", heads);
    FUSEDRNN_CHECK(w_hh.dim() == 2 && w_hh.size(0) > 0 && w_hh.size(1) > 0 && w_hh.size(0) % cell.gates == 0,
                   "fusedrnn: w_hh must have shape [", cell.gates, " * hidden_size, output size], got ", w_hh.sizes());
    dtype_of(x.dtype());
    const int32_t dtype = x.dtype();
    input = x.size(-1);
    hidden = w_hh.size(0) / cell.gates;
    out = w_hh.size(1) * heads;
    batch = h0.size(0);
    FUSEDRNN_CHECK(hidden % heads == 0, "fusedrnn: heads must divide hidden_size, ", hidden, ", got ", heads);
    FUSEDRNN_CHECK(!in.w_hr || heads == 1, "fusedrnn: w_hr (projection) goes with one head, got ", heads);
    FUSEDRNN_CHECK(in.w_hr || out == hidden, "fusedrnn: w_hh must have shape [", cell.gates * hidden, ", ",
                   hidden / heads, "], got ", w_hh.sizes());
    FUSEDRNN_CHECK(!in.w_hr || cell.projects, "fusedrnn: w_hr (projection) exists only for the LSTM, not for ",
                   cell.name);
    FUSEDRNN_CHECK(static_cast<bool>(in.c0) == cell.has_cell_state(), "fusedrnn: c0 must ",
                   cell.has_cell_state() ? "" : "not ", "be given for the cell ", cell.name);
    check_count("states", 1 + cell.has_cell_state() + in.more.states.size(), cell.states);
    check_count("parameters", in.more.parameters.size(), cell.parameters);
    check_count("inputs", in.more.inputs.size(), cell.inputs);
    check_tensor("x", x, x.sizes(), dtype);
    check_tensor("h0", h0, {batch, out}, dtype);
    check_tensor("c0", in.c0, {batch, hidden}, dtype);
    const int32_t of_weights = in.quantized ? w_hh.dtype() : dtype;
    multiplied = in.w_ih.dim() == 2 && in.w_ih.size(1) == 0 && input == cell.gates * hidden;
    check_tensor("w_ih", in.w_ih, {cell.gates * hidden, multiplied ? 0 : input}, of_weights);
    check_tensor("w_hh", w_hh, {cell.gates * hidden, w_hh.size(1)}, of_weights);
    check_tensor("b_ih", in.b_ih, {cell.gates * hidden}, dtype);
    check_tensor("b_hh", in.b_hh, {cell.gates * hidden}, dtype);
    check_tensor("w_hr", in.w_hr, {out, hidden}, of_weights);
    if (in.quantized) check_quantized(in);
    if (in.batch_sizes) {
      packed(x, in.batch_sizes);
    } else {
      dense(x);
    }
    check_tensor("resets", in.resets, lead, kBool);
    for (const Tensor& t : in.more.states) check_given("states", t, {batch, hidden}, dtype);
    for (const Tensor& t : in.more.parameters) check_given("parameters", t, {hidden}, dtype);
    for (const Tensor& t : in.more.inputs) check_given("inputs", t, shape(hidden), dtype);
  }

  void check_quantized(const Inputs& in) const {
    const bool scaled = weights_of(in.w_hh, true) == Weights::kInt8;
    FUSEDRNN_CHECK(scaled || !in.rounded, "fusedrnn: x and h are rounded with weights of int8 only");
    FUSEDRNN_CHECK(in.x.dtype() == kFloat && heads == 1 && !cell.forward,
                   "fusedrnn: quantized weights are those of a built-in cell in float32 of one head, got ", cell.name,
                   " in ", name_of(in.x.dtype()), " of ", heads);
    FUSEDRNN_CHECK(static_cast<bool>(in.scale_ih) == scaled && static_cast<bool>(in.scale_hh) == scaled &&
                       static_cast<bool>(in.scale_hr) == (scaled && in.w_hr),
                   "fusedrnn: int8 weights, and no others, must have scales");
    check_tensor("scale_ih", in.scale_ih, {cell.gates * hidden}, kFloat);
    check_tensor("scale_hh", in.scale_hh, {cell.gates * hidden}, kFloat);
    check_tensor("scale_hr", in.scale_hr, {out}, kFloat);
  }

  void check_count(const char* name, size_t given, int64_t wanted) const {
    FUSEDRNN_CHECK(static_cast<int64_t>(given) == wanted, "fusedrnn: ", cell.name, " has ", wanted, " ", name, ", got ",
                   given);
  }
  static void check_given(const char* name, const Tensor& t, Sizes sizes, int32_t dtype) {
    FUSEDRNN_CHECK(static_cast<bool>(t), "fusedrnn: ", name, " must be tensors");
    check_tensor(name, t, sizes, dtype);
  }

  void dense(const Tensor& x) {
    steps = x.size(0);
    FUSEDRNN_CHECK(steps > 0, "Expected sequence length to be larger than 0 in RNN");
    FUSEDRNN_CHECK(x.size(1) == batch, "fusedrnn: h0 must have batch size ", x.size(1), ", got ", batch);
    rows = steps * batch;
    lead = {steps, batch};
    offsets.resize(steps + 1);
    for (int64_t t = 0; t <= steps; ++t) offsets[t] = t * batch;
  }

  void packed(const Tensor& x, const Tensor& sizes) {
    FUSEDRNN_CHECK(sizes.dim() == 1 && sizes.dtype() == kInt64 && sizes.is_strided() && sizes.on_cpu(),
                   "fusedrnn: batch_sizes must be a 1-D int64 tensor on the CPU, got ", sizes.dim(), "-D ",
                   name_of(sizes.dtype()));
    steps = sizes.size(0);
    FUSEDRNN_CHECK(steps > 0, "Expected sequence length to be larger than 0 in RNN");
    const int64_t* first = sizes.data<int64_t>();
    const auto size = [&](int64_t t) { return first[t * sizes.stride(0)]; };
    FUSEDRNN_CHECK(size(0) == batch, "fusedrnn: h0 must have batch size ", size(0), ", got ", batch);
    rows = x.size(0);
    lead = {rows};
    offsets.reserve(steps + 1);
    offsets.push_back(0);
    for (int64_t t = 0; t < steps; ++t) {
      FUSEDRNN_CHECK(size(t) >= 1 && size(t) <= size(t ? t - 1 : 0),
                     "fusedrnn: batch_sizes must not increase and must be at least 1, got ", size(t), " at step ", t);
      FUSEDRNN_CHECK(size(t) <= rows - offsets.back(), "fusedrnn: batch_sizes add up to more than the ", rows,
                     " rows of x");
      offsets.push_back(offsets.back() + size(t));
    }
    FUSEDRNN_CHECK(offsets.back() == rows, "fusedrnn: batch_sizes must add up to the ", rows, " rows of x, got ",
                   offsets.back());
  }

  std::vector<int64_t> shape(int64_t last) const {
    std::vector<int64_t> s = lead;
    s.push_back(last);
    return s;
  }

  // A step too small for several cores gains nothing from them; with few rows there is a barrier to pay for as well,
  // and on a busy machine that costs a time slice.
  Shape shape_of(const Tensor& x, const Tensor& resets, bool reverse) const {
    const double step = static_cast<double>(batch) * cell.gates * hidden * out / heads;
    int threads = in_parallel_region() ? 1 : torch_threads();
    if (step < (batch >= 2 * threads ? 32768.0 : (steps == 1 ? 65536.0 : 200000.0))) threads = 1;
    return {cell.kind,      dtype_of(x.dtype()), steps,   batch, hidden,  out,
            offsets.data(), resets.data<bool>(), reverse, heads, threads, cache_bytes()};
  }

  // Whether two such sequences take less time side by side, each by half of the threads, than one after the other:
  // where a core's own cache holds all of W_hh, or its panels are read once.
  bool goes_beside(int32_t dtype) const {
    if (heads > 1 || in_parallel_region() || torch_threads() < 2) return false;
    return steps == 1 || cell.gates * hidden * out * bytes_of(dtype) <= cache_bytes() / 4 * 3;
  }
};

// Up to so many rows kept panels of W_ih are multiplied; with more a GEMM pays for packing W_ih, or for widening it.
constexpr int64_t kRowsOfPanels = 256;

// How forward goes about a problem: in a step of few rows the kernel multiplies x by W_ih as well, where a GEMM of its
// own would take longer; with more rows both products are GEMMs, but in 16 bits, which would round the second.
struct Products {
  bool one_kernel, two_products;
  // x is multiplied by the kept panels of W_ih; quantized weights, else, by W_ih in float32.
  bool by_panels, widened;

  Products(const Problem& s, const Inputs& in) {
    const bool in_tiles = kernels().tiles && in.x.dtype() == kBFloat16 && !s.cell.forward;
    const bool many =
        in.quantized ? in.w_ih.dtype() == kInt8 && kernels().digits() : !host_multiplies(dtype_of(in.x.dtype()));
    const bool kept = in.panels_ih && (many || s.rows <= kRowsOfPanels);
    by_panels = !s.multiplied && (in.rounded ? s.input > 0 : kept);
    one_kernel = !by_panels && !s.multiplied && s.steps == 1 && s.batch <= (in_tiles ? kFewRowsOfTiles : kFewRows);
    two_products = s.steps == 1 && !one_kernel && !by_panels && !s.multiplied && bytes_of(in.x.dtype()) > 2 &&
                   !in.resets && s.heads == 1 && !in.quantized;
    widened = in.quantized && !one_kernel && !by_panels;
  }
};

Tensor none(int32_t dtype) { return Tensor::empty({0}, dtype); }

// Every product of two matrices outside of the loop comes through here. With `add`, not in 16 bits, c += a b; false
// where this torch has no way to that.
bool product_out(const Matrix& c, const Matrix& a, const Matrix& b, bool add = false) {
  const int64_t rows = a.rows, depth = a.columns, columns = b.columns;
  if (c.dtype() == kDouble || rows * columns == 0 || depth == 0 ||
      (c.dtype() == kFloat && host_multiplies(Dtype::kFloat32) && !is_forked())) {
    if (add) return torch_addmm(c, a, b);
    torch_mm_out(c, a, b);
    return true;
  }
  const int64_t work = rows * depth * columns;
  const bool large = std::min({rows, depth, columns}) >= kHostLeast && work >= kHostWork;
  if (c.dtype() != kFloat && host_multiplies(dtype_of(c.dtype())) && large && !is_forked()) {
    if (depth % 2 == 0) {
      torch_mm_out(c, a, b);
      return true;
    }
    // It takes the depth in pairs: the last of an odd one would have a NaN of the next row beside it.
    const Tensor left = Tensor::empty({rows, depth + 1}, c.dtype()),
                 right = Tensor::empty({depth + 1, columns}, c.dtype());
    const Matrix padded_left = Matrix::rows_of(left), padded_right = Matrix::rows_of(right);
    for (int64_t row = 0; row < rows; ++row) {
      std::memset(static_cast<char*>(left.writable()) + 2 * (row * (depth + 1) + depth), 0, 2);
    }
    std::memset(static_cast<char*>(right.writable()) + 2 * depth * columns, 0, 2 * columns);
    torch_copy(padded_left.narrow_columns(0, depth), a);
    torch_copy(padded_right.narrow_rows(0, depth), b);
    torch_mm_out(c, padded_left, padded_right);
    return true;
  }
  // Where neither stride is 1, a copy.
  Tensor copies[2];
  const auto with_unit_stride = [&](const Matrix& m, Tensor& copy) {
    if (m.row_stride == 1 || m.column_stride == 1) return m;
    copy = Tensor::empty({m.rows, m.columns}, m.dtype());
    const Matrix to = Matrix::rows_of(copy);
    torch_copy(to, m);
    return to;
  };
  const Matrix left = with_unit_stride(a, copies[0]), right = with_unit_stride(b, copies[1]);
  const bool alone = in_parallel_region() || work < 65536;
  kernels().product({dtype_of(c.dtype()), rows, columns, depth, left.data(), left.row_stride, left.column_stride,
                     right.data(), right.row_stride, right.column_stride, c.data(), c.row_stride,
                     alone ? 1 : torch_threads(), add});
  return true;
}

Tensor product(const Matrix& a, const Matrix& b) {
  Tensor c = Tensor::empty({a.rows, b.columns}, a.dtype());
  product_out(Matrix::rows_of(c), a, b);
  return c;
}

Matrix matrix(const Tensor& t) { return {&t, t.size(0), t.size(1), t.stride(0), t.stride(1)}; }

// For every row the h its step started from.
Tensor previous_rows(const Problem& s, const Tensor& h0, const Tensor& y, const Tensor& resets, bool reverse) {
  Tensor result = Tensor::empty({s.rows, s.out}, y.dtype());
  const size_t row_bytes = static_cast<size_t>(s.out * y.element_size());
  char* to = static_cast<char*>(result.writable());
  const char *from_y = y.data<char>(), *from_h0 = h0.data<char>();
  for (int64_t t = 0; t < s.steps; ++t) {
    const int64_t before = reverse ? t + 1 : t - 1;
    const int64_t count = s.offsets[t + 1] - s.offsets[t];
    const bool inside = before >= 0 && before < s.steps;
    const int64_t carried = inside ? std::min(count, s.offsets[before + 1] - s.offsets[before]) : 0;
    char* row = to + s.offsets[t] * row_bytes;
    if (carried) std::memcpy(row, from_y + s.offsets[before] * row_bytes, carried * row_bytes);
    if (count > carried) {
      std::memcpy(row + carried * row_bytes, from_h0 + carried * row_bytes, (count - carried) * row_bytes);
    }
  }
  if (resets) {
    const bool* reset = resets.data<bool>();
    for (int64_t row = 0; row < s.rows; ++row) {
      if (reset[row]) std::memset(to + row * row_bytes, 0, row_bytes);
    }
  }
  return result;
}

// Whether products of that dtype are our own kernels' whatever their size.
bool multiplies_here(int32_t dtype) { return dtype == kFloat && (!host_multiplies(Dtype::kFloat32) || is_forked()); }

// For each gate and head its columns of dgates^T times those of the head in `started`, or added to what is there.
void products_of_heads(const Problem& s, const Tensor& result, const Matrix& dgates, const Matrix& started, bool add) {
  const int64_t units = s.hidden / s.heads, blocks = s.cell.gates * s.heads;
  if (multiplies_here(dgates.dtype()) && dgates.column_stride == 1 && started.column_stride == 1 && dgates.rows > 0) {
    const bool alone = in_parallel_region() || dgates.rows * dgates.columns * units < 65536;
    kernels().product({Dtype::kFloat32, units, units, dgates.rows, dgates.data(), 1, dgates.row_stride, started.data(),
                       started.row_stride, 1, result.writable(), units, alone ? 1 : torch_threads(), add, blocks,
                       s.heads, units, units, units * units});
    return;
  }
  for (int64_t block = 0; block < blocks; ++block) {
    product_out(matrix(result).narrow_rows(block * units, units), dgates.narrow_columns(block * units, units).t(),
                started.narrow_columns(block % s.heads * units, units), add);
  }
}

// dgates^T times what each step started from, for each head its own. In 16 bits one GEMM over a copy: adding two would
// round twice.
Tensor recurrent_gradient(const Problem& s, const Matrix& dgates, const Tensor& h0, const Tensor& y,
                          const Tensor& resets, bool reverse) {
  const int64_t inner = s.rows - s.batch;
  const bool dense = s.lead.size() == 2 && !resets;
  if (s.heads > 1) {
    const int64_t units = s.hidden / s.heads;
    Tensor result = Tensor::empty({s.cell.gates * s.hidden, units}, dgates.dtype());
    // To go over the result twice takes less than a copy of y where it is the smaller one.
    if (dense && multiplies_here(dgates.dtype()) && s.rows > 4 * s.cell.gates * units && inner > 0) {
      products_of_heads(s, result, dgates.narrow_rows(reverse ? inner : 0, s.batch), matrix(h0), false);
      products_of_heads(s, result, dgates.narrow_rows(reverse ? 0 : s.batch, inner),
                        Matrix::rows_of(y).narrow_rows(reverse ? s.batch : 0, inner), true);
    } else {
      const Tensor started = previous_rows(s, h0, y, resets, reverse);
      products_of_heads(s, result, dgates, matrix(started), false);
    }
    return result;
  }
  if (dense && bytes_of(dgates.dtype()) > 2 && s.rows > 0) {
    Tensor result = product(dgates.narrow_rows(reverse ? inner : 0, s.batch).t(), matrix(h0));
    if (inner == 0) return result;
    const Matrix y_rows = Matrix::rows_of(y).narrow_rows(reverse ? s.batch : 0, inner);
    if (product_out(matrix(result), dgates.narrow_rows(reverse ? 0 : s.batch, inner).t(), y_rows, true)) return result;
  }
  const Tensor started = previous_rows(s, h0, y, resets, reverse);
  return product(dgates.t(), matrix(started));
}

// Columns of dgates in the order of the gates: a part of it, or a copy, which `copy` then holds.
Matrix gate_columns(const Tensor& dgates, const std::vector<int64_t>& accumulators, int64_t hidden, Tensor& copy) {
  bool in_order = true;
  for (size_t g = 0; g < accumulators.size(); ++g) in_order &= accumulators[g] == static_cast<int64_t>(g);
  const int64_t gates = static_cast<int64_t>(accumulators.size()), rows = dgates.size(0), columns = dgates.size(1);
  if (in_order) return matrix(dgates).narrow_columns(0, gates * hidden);
  copy = Tensor::empty({rows, gates * hidden}, dgates.dtype());
  const int64_t bytes = dgates.element_size();
  const char* from = dgates.data<char>();
  char* to = static_cast<char*>(copy.writable());
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t g = 0; g < gates; ++g) {
      std::memcpy(to + (row * gates + g) * hidden * bytes, from + (row * columns + accumulators[g] * hidden) * bytes,
                  static_cast<size_t>(hidden * bytes));
    }
  }
  return matrix(copy);
}

// Of tensors that are there in one piece each, perhaps as copies, the addresses: of `first`, where there is one or
// `always`, then of `others`.
struct Addresses {
  Tensor one;
  std::vector<Tensor> held;
  const void* of[kMostArrays] = {};

  explicit Addresses(const std::vector<Tensor>& others) { add(0, others); }
  Addresses(const Tensor& first, const std::vector<Tensor>& others, bool always = false) {
    const bool leads = first || always;
    if (leads) one = first.contiguous();
    of[0] = one.data();
    add(leads ? 1 : 0, others);
  }
  void add(size_t at, const std::vector<Tensor>& tensors) {
    for (const Tensor& t : tensors) {
      held.push_back(t.contiguous());
      of[at++] = held.back().data();
    }
  }
};

// The same of tensors to write to.
struct Targets {
  void* of[kMostArrays] = {};
  int64_t count = 0;

  void add(const Tensor& t) { of[count++] = t.writable(); }
  void add(const std::vector<Tensor>& tensors) {
    for (const Tensor& t : tensors) add(t);
  }
};

// W_ih, quantized, in float32.
Tensor widened_input_weight(const Inputs& in) {
  const Tensor w = in.w_ih.contiguous(), scale = in.scale_ih.contiguous();
  const int64_t rows = w.size(0), columns = w.size(1);
  Tensor wide = Tensor::empty({rows, columns}, kFloat);
  const int threads = in_parallel_region() || rows * columns < 65536 ? 1 : torch_threads();
  kernels().widen({weights_of(w, true), w.data(), scale.data<float>(), rows, columns,
                   static_cast<float*>(wide.writable()), threads});
  return wide;
}

// A call of the kernels, its tensors in one piece each. gates and every_state are where they are kept, or have no
// elements.
struct Call {
  const Tensor x, w_ih, h0, w_hh, b_ih, b_hh, w_hr, resets, scale_ih, scale_hh, scale_hr, panels_ih;
  const Addresses states0, parameters, inputs;
  Tensor gates_x, gates_h;
  void (*const run)(const Forward&);
  Forward forward;

  Call(const Problem& s, const Inputs& in, void* y, void* h_n, const Targets& states_n, const Tensor& gates,
       const Targets* every_state, const Products& products, int64_t y_row = 0)
      : x(in.x.contiguous()),
        w_ih(products.one_kernel ? in.w_ih.contiguous() : in.w_ih.with_dims(2)),
        h0(in.h0.contiguous()),
        w_hh(in.w_hh.contiguous()),
        b_ih(in.b_ih.contiguous()),
        b_hh(in.b_hh.contiguous()),
        w_hr(in.w_hr.contiguous()),
        resets(in.resets.contiguous()),
        scale_ih(in.scale_ih.contiguous()),
        scale_hh(in.scale_hh.contiguous()),
        scale_hr(in.scale_hr.contiguous()),
        // What is rounded meets panels only.
        panels_ih(products.by_panels && !in.panels_ih ? pack(s.cell.name, in.w_ih, true, 1, true)
                                                      : in.panels_ih.contiguous()),
        states0(in.c0, in.more.states),
        parameters(in.more.parameters),
        inputs(in.more.inputs),
        run(s.cell.forward ? s.cell.forward : kernels().forward) {
    const int32_t dtype = in.x.dtype();
    // Where as many gates are saved as come in, the cell replaces the one by the other in place.
    const bool in_place = gates.numel() > 0 && s.cell.saved == s.cell.gates;
    const void* of_x = nullptr;
    if (s.multiplied) {
      of_x = x.data();
    } else if (!products.one_kernel && !products.by_panels) {
      if (!in_place) gates_x = Tensor::empty({s.rows, s.cell.gates * s.hidden}, dtype);
      const Matrix to = Matrix::rows_of(in_place ? gates : gates_x);
      const Tensor wide = products.widened ? widened_input_weight(in) : w_ih.with_dims(2);
      product_out(to, Matrix::rows_of(x), matrix(wide).t());
      of_x = to.data();
    }
    if (products.two_products) gates_h = product(matrix(h0), matrix(w_hh).t());
    forward = {s.shape_of(x, resets, in.reverse),
               of_x,
               gates_h.data(),
               x.data(),
               w_ih.data(),
               s.input,
               h0.data(),
               states0.of,
               w_hh.data(),
               b_ih.data(),
               b_hh.data(),
               w_hr.data(),
               parameters.of,
               inputs.of,
               y,
               h_n,
               states_n.of,
               gates.writable(),
               every_state ? every_state->of : nullptr,
               in.panels.data(),
               nullptr,
               nullptr,
               weights_of(in),
               scale_ih.data<float>(),
               scale_hh.data<float>(),
               scale_hr.data<float>(),
               panels_ih.data(),
               nullptr,
               y_row};
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
};

// So many rows at once have a product with W_ih that stays in the cache, and a GEMM of its best size.
constexpr int64_t kPieceBytes = 4 << 20, kPieceRows = 512;

int64_t rows_of_piece(const Problem& s, int32_t dtype) {
  return std::max(kPieceRows, kPieceBytes / (s.cell.gates * s.hidden * bytes_of(dtype)));
}

// A sequence of which nothing is kept, some steps at a time: a long one then takes no more memory than x and y.
class Pieces {
 public:
  // Pieces have `rows` or, at the end, fewer; with `many` so many that W_ih is packed as well. y_row: as in Forward.
  Pieces(const Problem& problem, const Inputs& in, void* y, void* h_n, const Targets& states_n, int64_t rows,
         bool many = false, int64_t y_row = 0)
      : s(problem),
        rows_(rows),
        x(in.x.contiguous()),
        resets(in.resets.contiguous()),
        sizes(in.batch_sizes.contiguous()),
        h(copy_of(in.h0)),
        c(in.c0 ? copy_of(in.c0) : Tensor()),
        y_(static_cast<char*>(y)),
        h_n_(h_n),
        to_(states_n),
        y_row_(y_row ? y_row : s.out),
        first(in.reverse ? s.steps : 0),
        last(first) {
    for (const auto member : {&Inputs::w_ih, &Inputs::w_hh, &Inputs::b_ih, &Inputs::b_hh, &Inputs::w_hr,
                              &Inputs::scale_ih, &Inputs::scale_hh, &Inputs::scale_hr, &Inputs::panels_ih}) {
      part.*member = (in.*member).with_dims((in.*member).dim());
    }
    part.quantized = in.quantized;
    part.rounded = in.rounded;
    part.reverse = in.reverse;
    part.heads = in.heads;
    for (const Tensor& t : in.more.states) others.push_back(copy_of(t));
    for (const Tensor& t : in.more.inputs) inputs.push_back(t.contiguous());
    for (const Tensor& t : in.more.parameters) part.more.parameters.push_back(t.with_dims(1));
    part.panels = in.panels ? in.panels.with_dims(1) : pack(s.cell.name, in.w_hh, in.quantized, in.heads, in.rounded);
    if ((many || in.rounded) && !in.panels_ih && x.dtype() == kFloat)
      part.panels_ih = pack(s.cell.name, in.w_ih, in.quantized, 1, in.rounded);
    states.add(c);
    states.add(others);
  }

  // The next piece, whose products outside of the loop are done; null behind the last one.
  Call* next() {
    call.reset();
    if (part.reverse ? first == 0 : last == s.steps) {
      finish(h_n_, h);
      if (c) finish(to_.of[0], c);
      for (size_t k = 0; k < others.size(); ++k) finish(to_.of[1 + k], others[k]);
      return nullptr;
    }
    if (part.reverse) {
      last = first;
      for (first = last - 1; first > 0 && s.offsets[last] - s.offsets[first] < rows_; --first) {
      }
    } else {
      first = last;
      for (last = first + 1; last < s.steps && s.offsets[last] - s.offsets[first] < rows_; ++last) {
      }
    }
    const int64_t batch = s.offsets[first + 1] - s.offsets[first];
    part.x = some(x);
    part.resets = some(resets);
    part.batch_sizes = sizes.narrow(first, last - first);
    part.h0 = h.narrow(0, batch);
    part.c0 = c.narrow(0, batch);
    part.more.states.clear();
    part.more.inputs.clear();
    for (const Tensor& t : others) part.more.states.push_back(t.narrow(0, batch));
    for (const Tensor& t : inputs) part.more.inputs.push_back(some(t));
    here.emplace(s.cell.name, part);
    // The kernel has read the states when it writes them.
    call.emplace(*here, part, y_ + s.offsets[first] * y_row_ * bytes_of(x.dtype()), h.writable(), states, Tensor(),
                 nullptr, Products(*here, part), y_row_);
    return &*call;
  }

 private:
  static Tensor copy_of(const Tensor& from) {
    Tensor to = Tensor::empty(from.sizes(), from.dtype());
    const Tensor dense = from.contiguous();
    if (to.numel()) std::memcpy(to.writable(), dense.data(), static_cast<size_t>(to.numel() * to.element_size()));
    return to;
  }
  static void finish(void* to, const Tensor& from) {
    std::memcpy(to, from.data(), static_cast<size_t>(from.numel() * from.element_size()));
  }
  Tensor some(const Tensor& t) const {
    return s.lead.size() == 2 ? t.narrow(first, last - first)
                              : t.narrow(s.offsets[first], s.offsets[last] - s.offsets[first]);
  }

  const Problem& s;
  const int64_t rows_;
  const Tensor x, resets, sizes, h, c;
  char* const y_;
  void* const h_n_;
  const Targets& to_;
  const int64_t y_row_;
  std::vector<Tensor> others, inputs;  // the states after c, and what is in Inputs::more
  int64_t first, last;                 // the steps of the piece
  Inputs part;
  Targets states;
  std::optional<Problem> here;
  std::optional<Call> call;
};

// gates and every_state are where they are kept, or have no elements.
void forward(const Problem& s, const Inputs& in, void* y, void* h_n, const Targets& states_n, const Tensor& gates,
             const Targets* every_state, int64_t y_row = 0) {
  if (s.rows == 0) return;
  const int64_t piece = rows_of_piece(s, in.x.dtype());
  if (gates.numel() == 0 && !every_state && s.rows > 2 * piece && s.steps > 1) {
    Pieces pieces(s, in, y, h_n, states_n, piece, false, y_row);
    while (const Call* call = pieces.next()) call->run(call->forward);
    return;
  }
  const Call call(s, in, y, h_n, states_n, gates, every_state, Products(s, in), y_row);
  call.run(call.forward);
}

// So many steps two layers have at least that go side by side; more where their weights are yet to be packed.
constexpr int64_t kStepsBeside = 32, kStepsOfUnpacked = 256;

// Whether a layer and the next go side by side: their steps are too small to share.
bool two_layers_beside(const Problem& s, const Inputs& in) {
  const int64_t least = in.panels && in.panels_ih ? kStepsBeside : kStepsOfUnpacked;
  return s.goes_beside(in.x.dtype()) && s.steps >= least && s.shape_of(in.x, {}, false).threads == 1;
}

// Both at the same time, each by half of the threads; where one of them is null, the other by all.
void run_beside(Call* one, Call* other) {
  if (!one || !other) {
    if (Call* const left = one ? one : other) left->run(left->forward);
    return;
  }
  const int all = std::max(one->forward.shape.threads, other->forward.shape.threads);
  one->forward.shape.threads = std::max(1, all / 2);
  other->forward.shape.threads = std::max(1, all - all / 2);
  one->forward.beside = &other->forward;
  one->run(one->forward);
}

}  // namespace

std::pair<int64_t, bool> gates_and_c(std::string_view cell) {
  const CellEntry& found = find_cell(cell);
  return {found.gates, found.has_cell_state()};
}

Counts counts_of(std::string_view cell) {
  const CellEntry& found = find_cell(cell);
  return {found.states, found.parameters, found.inputs};
}

bool packs_input(std::string_view cell, int32_t dtype) {
  return dtype == kFloat || (dtype == kBFloat16 && kernels().dots && !find_cell(cell).forward);
}

Tensor pack(std::string_view cell, const Tensor& w_hh, bool quantized, int64_t heads, bool rounded) {
  const CellEntry& found = find_cell(cell);
  const auto run = found.forward ? found.forward : kernels().forward;
  const Tensor w = w_hh.contiguous();
  const int64_t offsets[] = {0, 0};
  Forward problem{};
  problem.shape.cell = found.kind;
  problem.shape.dtype = quantized ? Dtype::kFloat32 : dtype_of(w.dtype());
  problem.weights = rounded ? Weights::kInt8Both : weights_of(w, quantized);
  problem.shape.hidden = w.size(0) / found.gates;
  problem.shape.out = w.size(1) * heads;
  problem.shape.heads = heads;
  problem.shape.threads = 1;
  problem.shape.offsets = offsets;
  problem.gates_x = problem.w_hh = w.data();
  Way way;
  problem.way = &way;
  problem.pack_into = &way;  // packed, whatever the length
  run(problem);
  Tensor panels = Tensor::empty({way.panel_bytes}, kUint8);
  problem.way = nullptr;
  problem.pack_into = panels.writable();
  if (way.panel_bytes) run(problem);
  return panels;
}

Plan plan(std::string_view cell, const Inputs& in, bool backward) {
  const Problem s(cell, in);
  const Products products(s, in);
  const char address = 0;
  Way way{};
  Plan found{
      kernels().name, way, "", "", !backward && s.goes_beside(in.x.dtype()), !backward && two_layers_beside(s, in)};
  const Shape shape = s.shape_of(in.x, {}, false);
  if (backward) {
    Backward problem{};
    problem.shape = shape;
    problem.w_hr = in.w_hr ? &address : nullptr;
    problem.dh0 = const_cast<char*>(&address);
    problem.way = &found.way;
    (s.cell.backward ? s.cell.backward : kernels().backward)(problem);
  } else {
    Forward problem{};
    problem.shape = shape;
    problem.w_hr = in.w_hr ? &address : nullptr;
    problem.gates_x = products.one_kernel || products.by_panels ? nullptr : &address;
    problem.gates_h = products.two_products ? &address : nullptr;
    problem.panels = in.panels.data();
    problem.weights = weights_of(in);
    problem.panels_ih = products.by_panels ? &address : nullptr;
    problem.input = s.input;
    problem.way = &found.way;
    (s.cell.forward ? s.cell.forward : kernels().forward)(problem);
  }
  const bool host = in.x.dtype() == kDouble || host_multiplies(dtype_of(in.x.dtype()));
  const bool in_kernel = !backward && (products.one_kernel || products.by_panels);
  found.input_product = in_kernel ? "kernel" : host ? "host" : "panels";
  found.state_product = !backward && products.two_products ? found.input_product : "kernel";
  return found;
}

Outputs sequence(std::string_view cell, const Inputs& in, bool keep_gates, bool keep_cells) {
  const Problem s(cell, in);
  const int32_t dtype = in.x.dtype(), compute = compute_dtype(in.x);
  const bool has_c = s.cell.has_cell_state(), save_gates = keep_gates && s.cell.saved > 0;
  const bool save_cells = keep_cells && has_c;
  Outputs out{Tensor::empty(s.shape(s.out), dtype),
              Tensor::empty({s.batch, s.out}, dtype),
              has_c ? Tensor::empty({s.batch, s.hidden}, dtype) : none(dtype),
              save_gates ? Tensor::empty(s.shape(s.cell.saved * s.hidden), dtype) : none(dtype),
              save_cells ? Tensor::empty(s.shape(s.hidden), compute) : none(compute),
              {},
              {}};
  for (size_t k = 0; k < in.more.states.size(); ++k) {
    out.more_n.push_back(Tensor::empty({s.batch, s.hidden}, dtype));
    if (save_cells) out.more_cells.push_back(Tensor::empty(s.shape(s.hidden), compute));
  }
  Targets states_n, every;
  states_n.add(out.c_n);
  states_n.add(out.more_n);
  every.add(out.cells);
  every.add(out.more_cells);
  forward(s, in, out.y.writable(), out.h_n.writable(), states_n, out.gates, save_cells ? &every : nullptr);
  return out;
}

void sequence_into(std::string_view cell, const Inputs& in, void* y, void* h_n, void* c_n) {
  Targets states_n;
  states_n.of[0] = c_n;
  forward(Problem(cell, in), in, y, h_n, states_n, {}, nullptr);
}

void layers_into(std::string_view cell, const Inputs (&in)[2], const Into (&to)[2]) {
  const Problem s[] = {Problem(cell, in[0]), Problem(cell, in[1])};
  Targets states_n[2];
  for (int k = 0; k < 2; ++k) states_n[k].of[0] = to[k].c_n;
  if (s[0].rows == 0) return;
  if (in[0].reverse || in[1].reverse || !two_layers_beside(s[0], in[0]) || !two_layers_beside(s[1], in[1])) {
    for (int k = 0; k < 2; ++k) forward(s[k], in[k], to[k].y, to[k].h_n, states_n[k], {}, nullptr);
    return;
  }
  const int64_t steps = std::max(kStepsBeside / 4, s[0].steps / 8);
  const int64_t rows = std::min(steps * s[0].batch, rows_of_piece(s[0], in[0].x.dtype()));
  Pieces lower(s[0], in[0], to[0].y, to[0].h_n, states_n[0], rows, true),
      upper(s[1], in[1], to[1].y, to[1].h_n, states_n[1], rows, true);
  run_beside(lower.next(), nullptr);
  for (;;) {
    Call *const below = lower.next(), *const above = upper.next();
    if (!above) return;
    run_beside(below, above);
  }
}

void directions_into(std::string_view cell, const Inputs (&in)[2], const Into (&to)[2]) {
  const Problem s[] = {Problem(cell, in[0]), Problem(cell, in[1])};
  Targets states_n[2];
  for (int k = 0; k < 2; ++k) states_n[k].of[0] = to[k].c_n;
  if (s[0].rows == 0) return;
  const int64_t y_row = 2 * s[0].out;
  if (!s[0].goes_beside(in[0].x.dtype())) {
    for (int k = 0; k < 2; ++k) forward(s[k], in[k], to[k].y, to[k].h_n, states_n[k], {}, nullptr, y_row);
    return;
  }
  const int64_t piece = rows_of_piece(s[0], in[0].x.dtype());
  if (s[0].rows > 2 * piece && s[0].steps > 1) {
    Pieces one(s[0], in[0], to[0].y, to[0].h_n, states_n[0], piece, false, y_row),
        other(s[1], in[1], to[1].y, to[1].h_n, states_n[1], piece, false, y_row);
    for (;;) {
      Call *const a = one.next(), *const b = other.next();
      if (!a && !b) return;
      run_beside(a, b);
    }
  }
  Call one(s[0], in[0], to[0].y, to[0].h_n, states_n[0], {}, nullptr, Products(s[0], in[0]), y_row),
      other(s[1], in[1], to[1].y, to[1].h_n, states_n[1], {}, nullptr, Products(s[1], in[1]), y_row);
  run_beside(&one, &other);
}

Gradients sequence_backward(std::string_view cell, const Tensor& dy, const Tensor& dh_n, const Tensor& dc_n,
                            const Tensor& dcells, const Inputs& in, const Tensor& y, const Tensor& gates,
                            const Tensor& cells, const std::array<bool, 8>& needs, MoreGradients* given) {
  const Problem s(cell, in);
  MoreGradients none_given;
  MoreGradients& more = given ? *given : none_given;
  const int32_t dtype = in.x.dtype(), compute = compute_dtype(in.x);
  check_tensor("y", y, s.shape(s.out), dtype);
  check_tensor("dy", dy, s.shape(s.out), dtype);
  check_tensor("dh_n", dh_n, {s.batch, s.out}, dtype);
  FUSEDRNN_CHECK(s.cell.has_cell_state() || !dc_n, "fusedrnn: dc_n exists only for cells with a cell state");
  check_tensor("dc_n", dc_n, {s.batch, s.hidden}, dtype);
  FUSEDRNN_CHECK(s.cell.has_cell_state() || !dcells, "fusedrnn: dcells exists only for cells with a cell state");
  check_tensor("dcells", dcells, s.shape(s.hidden), compute);
  if (s.cell.saved) check_tensor("gates (saved by forward)", gates, s.shape(s.cell.saved * s.hidden), dtype);
  if (s.cell.has_cell_state()) check_tensor("cells (saved by forward)", cells, s.shape(s.hidden), compute);

  const size_t after_c = in.more.states.size();
  FUSEDRNN_CHECK(more.dfinal.size() == after_c && more.devery.size() == after_c && more.every.size() == after_c &&
                     more.states.size() == after_c && more.parameters.size() == in.more.parameters.size() &&
                     more.inputs.size() == in.more.inputs.size(),
                 "fusedrnn: the gradients of ", s.cell.name, "'s states, parameters and inputs must be all there");
  for (size_t k = 0; k < after_c; ++k) {
    check_tensor("dfinal_states", more.dfinal[k], {s.batch, s.hidden}, dtype);
    check_tensor("devery_state", more.devery[k], s.shape(s.hidden), compute);
    Problem::check_given("every_state (saved by forward)", more.every[k], s.shape(s.hidden), compute);
  }

  const Tensor dgates = Tensor::empty({s.rows, s.cell.accumulators * s.hidden}, dtype);
  Gradients d;
  if (needs[1]) d[1] = Tensor::empty({s.batch, s.out}, dtype);
  if (needs[2] && s.cell.has_cell_state()) d[2] = Tensor::empty({s.batch, s.hidden}, dtype);
  Tensor dy_total, h;
  if (in.w_hr) dy_total = Tensor::empty({s.rows, s.out}, dtype), h = Tensor::empty({s.rows, s.hidden}, dtype);
  const auto wanted = [&](const std::vector<bool>& needs_of, Sizes sizes) {
    std::vector<Tensor> made;
    for (const bool need : needs_of) made.push_back(need ? Tensor::empty(sizes, dtype) : Tensor());
    return made;
  };
  more.found.states = wanted(more.states, {s.batch, s.hidden});
  more.found.inputs = wanted(more.inputs, s.shape(s.hidden));
  const std::vector<Tensor> dparameters = wanted(more.parameters, {s.rows, s.hidden});
  const Tensor yc = y.contiguous(), h0 = in.h0.contiguous(), resets = in.resets.contiguous();
  if (s.rows > 0) {
    const Tensor w_hh = in.w_hh.contiguous(), gatesc = gates.contiguous();
    const Tensor dyc = dy.contiguous(), dh_nc = dh_n.contiguous(), w_hr = in.w_hr.contiguous();
    const Addresses dstates_n(dc_n, more.dfinal, s.cell.has_cell_state()),
        devery(dcells, more.devery, s.cell.has_cell_state()), states0(in.c0, in.more.states),
        every(cells, more.every, s.cell.has_cell_state()), parameters(in.more.parameters), inputs(in.more.inputs);
    Targets dstates0, of_parameters, of_inputs;
    dstates0.add(d[2]);
    dstates0.add(more.found.states);
    of_parameters.add(dparameters);
    of_inputs.add(more.found.inputs);
    const auto run = s.cell.backward ? s.cell.backward : kernels().backward;
    run({s.shape_of(in.x, resets, in.reverse),
         dyc.data(),
         dh_nc.data(),
         dstates_n.of,
         devery.of,
         h0.data(),
         states0.of,
         w_hh.data(),
         w_hr.data(),
         yc.data(),
         gatesc.data(),
         every.of,
         parameters.of,
         inputs.of,
         dgates.writable(),
         d[1].writable(),
         dstates0.of,
         of_parameters.of,
         of_inputs.of,
         dy_total.writable(),
         h.writable(),
         nullptr});
  }
  for (const Tensor& t : dparameters) more.found.parameters.push_back(t ? torch_sum_rows(matrix(t)) : none(dtype));
  for (auto* list : {&more.found.states, &more.found.inputs}) {
    for (Tensor& t : *list) {
      if (!t) t = none(dtype);
    }
  }

  const bool same = s.cell.x_acc == s.cell.h_acc;
  Tensor copies[2];
  const Matrix dgates_x = gate_columns(dgates, s.cell.x_acc, s.hidden, copies[0]);
  const Matrix dgates_h = same ? dgates_x : gate_columns(dgates, s.cell.h_acc, s.hidden, copies[1]);
  if (needs[0]) {
    d[0] = Tensor::empty(in.x.sizes(), dtype);
    if (s.multiplied) {
      torch_copy(Matrix::rows_of(d[0]), dgates_x);
    } else {
      product_out(Matrix::rows_of(d[0]), dgates_x, matrix(in.w_ih));
    }
  }
  if (needs[3] && s.multiplied) {
    d[3] = Tensor::empty(in.w_ih.sizes(), dtype);
  } else if (needs[3]) {
    const Tensor x = in.x.contiguous();
    d[3] = product(dgates_x.t(), Matrix::rows_of(x));
  }
  if (needs[4]) d[4] = recurrent_gradient(s, dgates_h, h0, yc, resets, in.reverse);
  if (needs[5] && in.b_ih) d[5] = torch_sum_rows(dgates_x);
  if (needs[6] && in.b_hh) {
    if (same && d[5]) {
      d[6] = Tensor::empty(d[5].sizes(), dtype);
      if (d[5].numel()) std::memcpy(d[6].writable(), d[5].data(), d[5].numel() * d[5].element_size());
    } else {
      d[6] = torch_sum_rows(dgates_h);
    }
  }
  if (needs[7] && in.w_hr) d[7] = product(matrix(dy_total).t(), matrix(h));
  for (Tensor& t : d) {
    if (!t) t = none(dtype);
  }
  return d;
}

}  // namespace fusedrnn

extern "C" const char* fusedrnn_add_cell(const fusedrnn::OwnCell* cell) {
  using namespace fusedrnn;
  if (!cell || cell->version != kOwnCell) return "it was compiled with other headers than this library";
  if (find_built_in(cell->name)) return "a built-in cell has that name";
  for (const int64_t count : {cell->states, cell->parameters, cell->inputs}) {
    if (count > kMostArrays) return "it has more than 16 states, parameters or inputs";
  }
  CellEntry entry{cell->name,
                  {},
                  cell->gates,
                  cell->accumulators,
                  cell->saved,
                  cell->states,
                  cell->parameters,
                  cell->inputs,
                  cell->projects != 0,
                  {cell->x_acc, cell->x_acc + cell->gates},
                  {cell->h_acc, cell->h_acc + cell->gates},
                  cell->forward,
                  cell->backward};
  OwnCells& own = own_cells();
  const std::lock_guard<std::mutex> lock(own.mutex);
  own.entries.push_back(std::move(entry));
  return nullptr;
}
