// The recurrence of one direction of one layer on the CPU: raw pointers in, no torch.
//
// T steps, B batch, H hidden, P output (P = H without projection), G gates, A accumulators, S saved arrays,
// N rows. Everything is rows, step t's rows are offsets[t] .. offsets[t + 1]; a dense batch is the case where
// every step has B rows. Row b of a step belongs to sequence b; batch sizes do not increase with t.
// "E" is the dtype of the tensors, "C" the type of the math: double for double, else float.
#pragma once

#include <stdint.h>

#include "../api.h"
#include "../cell_list.h"

namespace fusedrnn {

#define FUSEDRNN_KIND(Cell) k##Cell,
enum class CellKind { FUSEDRNN_CELLS(FUSEDRNN_KIND) };
#undef FUSEDRNN_KIND
// A cell of one's own has no kind: its kernels are its entry's, see OwnCell.
enum class Dtype { kFloat32, kFloat64, kBfloat16, kFloat16 };
// What W_ih, W_hh and W_hr are: as the other tensors, or, those being float32, of fewer bits. kInt8Both: int8, and the
// rows of x and h that W_ih and W_hh multiply are rounded to 8 bits as well, at every step.
enum class Weights { kSame, kBfloat16, kInt8, kInt8Both };

struct Shape {
  CellKind cell;
  Dtype dtype;
  int64_t steps, batch, hidden, out;
  const int64_t* offsets;  // [T + 1]
  const bool* resets;      // [N], or null: where true, the step starts from zero states
  bool reverse;
  int64_t heads;        // W_hh has a block for each: unit j of h reaches units of its own head only
  int threads;          // at most
  int64_t cache_bytes;  // of one core's own cache
};

// Lists are of the states beside h, of parameters or of inputs, in the order of the cell.
using In = const void* const*;
using Out = void* const*;

// How a kernel goes about a problem.
struct Way {
  bool direct;          // W_hh is read where it lies
  bool by_rows;         // else by units
  bool tiles;           // in tile registers
  int threads;          // that share the work
  int64_t panel_bytes;  // of W_hh, repacked
  bool digits;          // in whole numbers
};

struct Forward {
  Shape shape;
  const void* gates_x;  // E [N, G*H]: x W_ih^T without bias; null: computed here, from x and w_ih
  const void* gates_h;  // E [N, G*H]: h0 W_hh^T, of a single step; null: computed here
  const void* x;        // E [N, I], or null
  const void* w_ih;     // E [G*H, I], or null
  int64_t input;        // I
  const void* h0;       // E [B, P]
  In states0;           // E [B, H] each
  const void* w_hh;     // E [G*H, P / heads]
  const void* b_ih;     // E [G*H], or null
  const void* b_hh;     // E [G*H], or null
  const void* w_hr;     // E [P, H], or null
  In parameters;        // E [H] each
  In inputs;            // E [N, H] each
  void* y;              // E [N, P]
  void* h_n;            // E [B, P]
  Out states_n;         // E [B, H] each
  void* gates;          // E [N, S*H], or null: not saved
  Out every_state;      // C [N, H] each, null: not saved
  const void* panels;  // W_hh as `pack_into` once got it, aligned to 64 bytes; null: packed here, or read where it lies
  void* pack_into;     // where given, W_hh is written there as panels, and nothing is computed
  Way* way;            // where given, it is filled, and nothing is computed

  Weights weights;        // of w_ih, w_hh, w_hr and their panels; not kSame with one head only
  const float* scale_ih;  // [G*H], of int8: what a row of w_ih is multiplied by, else null
  const float* scale_hh;  // [G*H]
  const float* scale_hr;  // [P]
  const void* panels_ih;  // of w_ih, as `panels`, or null: where gates_x is null, x is multiplied by them

  // Another sequence of the same cell, dtype and weights, done at the same time by threads of its own; or null.
  const Forward* beside;
  int64_t y_row;  // elements from one row of y to the next; 0: P
};

struct Backward {
  Shape shape;
  const void* dy;     // E [N, P], or null: zero
  const void* dh_n;   // E [B, P], or null: zero
  In dstates_n;       // E [B, H] each, null: zero
  In devery_state;    // C [N, H] each, null: zero
  const void* h0;     // E [B, P]
  In states0;         // E [B, H] each
  const void* w_hh;   // E [G*H, P / heads]
  const void* w_hr;   // E [P, H], or null
  const void* y;      // E [N, P]
  const void* gates;  // E [N, S*H]
  In every_state;     // C [N, H] each
  In parameters;      // E [H] each
  In inputs;          // E [N, H] each
  void* dgates;       // E [N, A*H]
  void* dh0;          // E [B, P], or null: not needed
  Out dstates0;       // E [B, H] each, null: not needed
  Out dparameters;    // E [N, H] each, null: not needed; to be summed
  Out dinputs;        // E [N, H] each, null: not needed
  void* dy_total;     // E [N, P]: dy with what came back through the recurrence; with w_hr only
  void* h;            // E [N, H]: the unprojected output; with w_hr only
  Way* way;           // where given, it is filled, and nothing is computed
};

// C = A B, sums in float32, in 16 bits rounded once. Strides are in elements; of each operand one of the two is 1.
struct Product {
  Dtype dtype;  // float32, bfloat16 or float16
  int64_t rows, columns, depth;
  const void* a;  // [rows, depth]
  int64_t a_row, a_depth;
  const void* b;  // [depth, columns]
  int64_t b_depth, b_column;
  void* c;  // [rows, columns]
  int64_t c_row;
  int threads;  // at most
  bool add;     // C += A B, in float32 only
  // So many products of these sizes, side by side; from one to the next so many elements. Of B there are `b_count`,
  // in turn.
  int64_t count = 1, b_count = 1;
  int64_t a_next = 0, b_next = 0, c_next = 0;
};

// to = from times scale, row by row.
struct Widening {
  Weights weights;     // not kSame
  const void* from;    // [rows, columns]
  const float* scale;  // [rows], of int8
  int64_t rows, columns;
  float* to;  // [rows, columns]
  int threads;
};

// Up to so many rows, steps times batch, reading the weights where they lie beats repacking them.
constexpr int64_t kFewRows = 64, kFewRowsOfTiles = 8;

// The host's GEMM multiplies 16-bit matrices that are at least so large each way and take so many multiplications, if
// it does at all: oneDNN leaves the smallest to others, and a call of it takes 30 us.
constexpr int64_t kHostLeast = 32, kHostWork = 1 << 22;

struct Kernels {
  const char* name;
  bool tiles, dots;  // of bfloat16
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
  void (*product)(const Product&);
  void (*widen)(const Widening&);
  bool (*digits)();  // whether rows that are not rounded meet panels of int8 in whole numbers, see digits.h
};

// A cell that is compiled apart from this library, for one instruction set: what csrc/cells.h says of it, and its
// kernels. recurrence_kernels.h makes it of a struct that FUSEDRNN_CELL names, and a function fusedrnn_cell that
// returns it.
struct OwnCell {
  int64_t version;  // kOwnCell of the header that it was compiled with
  const char* name;
  int64_t gates, accumulators, saved, states, parameters, inputs, projects;
  const int64_t *x_acc, *h_acc;  // [G]
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
};
constexpr int64_t kOwnCell = 5;
// At most so many states, parameters and inputs each.
constexpr int64_t kMostArrays = 16;

// One per instruction set, each compiled with its own flags.
namespace portable {
extern const Kernels kernels;
}
namespace neon {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {  // bfloat16 in dot products, else as avx512
extern const Kernels kernels;
}
namespace amx {  // bfloat16 in tile registers, else as avx512_bf16
extern const Kernels kernels;
}

// The best one that was compiled in and that this processor runs; FUSEDRNN_CPU_CAPABILITY lowers it. Throws
// std::runtime_error where that names none.
FUSEDRNN_API const Kernels& kernels();

// Who multiplies two matrices. In 16 bits the host's GEMM, where the processor has instructions for it and oneDNN,
// which uses them, is right; in float32 the host's but on processors with AVX2 or AVX-512 of others than Intel, where
// MKL, which torch.mm asks, is slower than the kernels that torch.nn uses; else Kernels::product.
struct Processor {
  const char* capability;    // Kernels::name
  bool intel;                // as the processor says itself
  bool bfloat16;             // products of bfloat16: AVX512-BF16, or AMX
  const char* onednn_limit;  // ONEDNN_MAX_CPU_ISA, or null
};
FUSEDRNN_API bool host_multiplies(const Processor& processor, Dtype dtype, const char* forced);
// The same of this processor; FUSEDRNN_CPU_PRODUCTS, "host" or "panels", forces it.
FUSEDRNN_API bool host_multiplies(Dtype dtype);

// Whether one thread should do the work of all: not long ago others came so late that the one which waited could have
// done it. `late_partners` says that it happened: of `total` nanoseconds a call waited so many.
FUSEDRNN_API bool is_crowded();
FUSEDRNN_API void late_partners(int64_t total, int64_t waited);
FUSEDRNN_API int64_t nanoseconds();  // of a clock that only goes on

// Names of those compiled in, separated by spaces.
FUSEDRNN_API const char* compiled_capabilities();
// Throws. Compiled without an instruction set's flags, as all code that is shared has to be.
[[noreturn]] FUSEDRNN_API void out_of_memory(int64_t bytes);

}  // namespace fusedrnn

// Makes the cell known to the ops under its name, in place of one that had it (not of a built-in one): null, or what is
// wrong with it. What it points to has to stay.
extern "C" FUSEDRNN_API const char* fusedrnn_add_cell(const fusedrnn::OwnCell* cell);
