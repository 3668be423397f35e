// The parameters of the CUDA kernels: raw pointers and sizes.
//
// T steps, B batch, I input, H hidden, P output (P = H without projection), G gates, A accumulators, S saved
// arrays, N rows of packed data (N = T * B when every step has B rows). Hp is H rounded up to a whole packet
// of 16 bytes. Row offsets: step t owns the rows offsets[t] .. offsets[t + 1] - 1; a null array means B rows
// a step. "T" below is the element type (dtype), "Acc" its accumulation type: double for float64, else float.
// fusedrnn/backends/cuda.py mirrors both structs field by field.
#pragma once

#include "../cell_list.h"
#include "integers.h"

enum FusedrnnDtype { kFloat64 = 0, kFloat32 = 1, kTf32 = 2, kBfloat16 = 3, kFloat16 = 4 };
#define FUSEDRNN_CELL_NUMBER(Cell) k##Cell##Cell,
enum FusedrnnCell { FUSEDRNN_CELLS(FUSEDRNN_CELL_NUMBER) };
#undef FUSEDRNN_CELL_NUMBER

typedef struct {
  int32_t cell, dtype, reverse, reserved;
  int64_t steps, batch, input, hidden, out;
  const int64_t* offsets_host;    // [T + 1] or null; step
  const int64_t* offsets_device;  // [T + 1] or null; persistent
  const void* x;                  // step: T [N, I]. persistent: T [N, G, Hp], x W_ih^T + b_ih
  const void* h0;                 // T [B, P]; persistent: [B, Hp], zeros beyond H
  const void* c0;                 // T [B, H]
  const void* w_ih;               // T [G * H, I]; step
  const void* w_hh;               // T [G * H, P]; persistent: [G * H, Hp], zeros beyond H
  const void* b_ih;               // T [G * H] or null; step
  const void* b_hh;               // T [G * H] or null
  const void* w_hr;               // T [P, H] or null; step
  const uint8_t* resets;          // [N] or null: 1 where the step starts from zero states; persistent: int32 [N]
  const void* zeros;              // T [P], zeros; step with resets
  void* y;                        // T [N, P]; persistent: [N, Hp], every byte 0xFF before the launch
  void* h_n;                      // T [B, P]
  void* c_n;                      // T [B, H]
  void* gates;          // T [N, H, S] or null: what backward needs of the gates, the S values of a unit side by side
  void* cells;          // Acc [N, H] or null
  void* state;          // Acc [B, H], scratch; step without cells
  void* unprojected;    // T [B, H], scratch; step with w_hr
  int32_t slice_rows;   // persistent: rows of a batch slice, at most 64, or 32 with 16 units
  int32_t groups;       // persistent: slices at work at once; group i takes slices i, i + groups, ...
  uint32_t poll_limit;  // persistent: polls of one packet before the kernel traps
  int32_t units;        // persistent: of a block, 8 or 16
  int32_t* fault;       // [4]: block, step, packet, 1 of the poll that gave up; persistent; the launcher's
} FusedrnnForward;

typedef struct {
  int32_t cell, dtype, reverse, reserved;
  int64_t steps, batch, hidden, out;
  const int64_t* offsets_host;
  const int64_t* offsets_device;
  const void* dy;         // T [N, P] or null; persistent: [N, Hp]
  const void* dh_n;       // T [B, P] or null
  const void* dc_n;       // T [B, H] or null
  const void* w_hh_t;     // T [P, G * H], W_hh transposed; persistent: [H, G, Hp], zeros beyond H
  const void* w_hr_t;     // T [H, P] or null, W_hr transposed; step
  const void* gates;      // T [N, H, S]
  const void* cells;      // Acc [N, H]
  const void* c0;         // T [B, H]
  const void* h0;         // T [B, P]; cells that read h_prev
  const void* y;          // T [N, P]; cells that read their own output; persistent: [N, Hp]
  const uint8_t* resets;  // [N] or null; persistent: int32 [N]
  const void* dcells;     // Acc [N, H] or null: the gradient of every c
  void* dgates;           // T [N, A * H]; persistent: [N, A, Hp], every byte 0xFF before the launch
  void* dc0;              // T [B, H]
  void* dh_direct;        // Acc [B, H]: what reaches h_prev past the matmul; cells that have it, else null
  void* state;            // Acc [B, H], scratch: carried dc; step
  void* dy_total;         // T [N, P]: gradient of y with the recurrent part; with w_hr, else null
  int32_t slice_rows;     // persistent: at most 32
  int32_t groups;
  uint32_t poll_limit;
  int32_t units;  // 16
  int32_t* fault;
} FusedrnnBackward;

// The same for cells of one's own. K states after h: c0, c_n, dc0, dc_n and what is c above hold one after the other,
// [K, B, H], [K, N, H]; state is [K, B, H]. With heads W_hh is [G * H, H / heads], w_hh_t [H, G, H / heads]; persistent
// pads each head to whole packets, and dgates is [N, heads, A, packets of H / heads].
typedef struct {
  FusedrnnForward plain;
  const void* parameters;  // T [parameters, H]
  const void* inputs;      // T [inputs, N, H]
  int64_t rows;            // N
  int64_t heads;
} FusedrnnOwnForward;

typedef struct {
  FusedrnnBackward plain;
  const void* parameters;
  const void* inputs;
  void* dparameters;  // T [parameters, N, H]: of every row
  void* dinputs;      // T [inputs, N, H]
  int64_t rows;
  int64_t heads;
} FusedrnnOwnBackward;

// One step whose products are there, of some of its rows. Of `step` x, w_ih and w_hh are not read, y is h before a
// projection, and cells may be null.
typedef struct {
  FusedrnnOwnForward step;
  const void* x_product;  // Acc [count, G * H]: x W_ih^T
  const void* h_product;  // Acc [count, G * H]: h W_hh^T, of h that is zero in rows that are reset
  int64_t first, count;   // rows
} FusedrnnCellStep;

// What is to be known of a cell of one's own.
typedef struct {
  const char* name;
  int32_t gates, accumulators, saved, states;
  int32_t gap;  // whether x alone feeds an accumulator
  int32_t reserved;
} FusedrnnOwnCell;
