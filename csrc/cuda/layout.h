// What kernels and launcher agree on: how a block's tile is laid out, which instances of a kernel there are and what
// they are called, and the arguments of step. For the host and the device; needs no header.
#pragma once

#include "../cells.h"
#include "params.h"

namespace fusedrnn {

// Whether this is compiled for a cell of one's own, with any number of states, parameters, inputs and heads.
#ifdef FUSEDRNN_OWN
constexpr bool kOwn = true;
#else
constexpr bool kOwn = false;
#endif

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kForwardUnits = 8;
constexpr int kBackwardUnits = 16;
constexpr int kWideUnits = 16;  // of a persistent forward block that holds more weights
// Most rows of a forward block.
FUSEDRNN_HD constexpr int forward_rows(int units) { return units == kWideUnits ? 32 : 64; }
constexpr int kBackwardRows = 32;
constexpr int kChunkBytes = 64 * kWarps;  // of a row of weights that all warps hold one piece a lane of

// Bytes of a forward block's partial sums, a row: accumulators are kept in pairs.
FUSEDRNN_HD constexpr int forward_bytes_per_row(int accumulators, int accumulator_bytes, int units) {
  return kWarps * units * (accumulators + accumulators % 2) * accumulator_bytes;
}
// Tiles are 8 rows high, so is the room for their sums.
FUSEDRNN_HD constexpr int forward_buffer_bytes(int rows, int bytes_per_row) {
  return (rows + 7) / 8 * 8 * bytes_per_row;
}

// What a persistent block copies ahead of the steps that need it, in two buffers. Forward, of a row: the gates of its
// units and a reset; of a warp: the offsets of two steps.
constexpr int kOffsetsOfStep = 2 * 8;  // bytes: of the step and of the next one
FUSEDRNN_HD constexpr int forward_ahead_bytes(int rows, int gates, int scalar_bytes, int units) {
  return 2 * ((rows + 7) / 8 * 8 * (gates * units * scalar_bytes + 4) + kWarps * kOffsetsOfStep);
}

// A backward block's partial sums: rows are kBackwardPitch apart so that the stores of a warp spread over the banks.
constexpr int kBackwardPitch = kBackwardUnits + 4;
constexpr int kBackwardSums = kWarps * kBackwardRows * kBackwardPitch;

// Shared memory of a persistent backward block: two buffers of sums, the packets that warps stage, and two buffers of
// what is copied ahead. A thread's share of those, of its two units: what is saved, dy, h, h', dcells, c' (and those of
// other states); of a row a reset.
FUSEDRNN_HD constexpr int backward_stage_bytes(int accumulators, int scalar_bytes) {
  return kThreads / 8 * accumulators * kBackwardUnits * scalar_bytes;
}
FUSEDRNN_HD constexpr int backward_ahead_bytes(int saved, int states, int scalar_bytes, int accumulator_bytes) {
  return 2 * (kThreads * 2 * ((saved + 3) * scalar_bytes + 2 * states * accumulator_bytes) + kBackwardRows * 4 +
              kWarps * kOffsetsOfStep);
}
// The states after h that there is room for.
FUSEDRNN_HD constexpr int backward_states(int states) { return states > 2 ? states - 1 : 1; }

// The blocks of a row of dgates that W_hh multiplies: gate g's is block g, from gate kFirst on kWidth blocks on.
template <typename Cell>
struct Gap {
  static constexpr int kFirst = [] {
    int gate = 0;
    while (gate < Cell::kGates && Cell::h_acc(gate) == gate) ++gate;
    return gate;
  }();
  static constexpr bool kAny = kFirst < Cell::kGates;
  static constexpr int kWidth = kAny ? Cell::h_acc(kFirst) - kFirst : 0;
  static constexpr bool kOnlyOne = [] {
    for (int gate = kFirst; gate < Cell::kGates; ++gate)
      if (Cell::h_acc(gate) != gate + kWidth) return false;
    return true;
  }();
  static_assert(kOwn || kOnlyOne, "accumulators that h feeds are in the order of the gates, with at most one gap");
};

// The arguments of step. The launcher knows no element types: there Scalar and Accumulator are void.

// A step's rows, and where its predecessor in the order of the loop left its own.
struct Rows {
  int64_t offset, before_offset;
  int rows, before_rows, next_rows;
};

// What a step of forward touches, every array at the first row of the step. In step_cell the products are there, x
// W_ih^T and h W_hh^T [rows, G * H], in place of x and the weights.
template <typename Scalar, typename Accumulator>
struct ForwardStep {
  const Scalar *x, *h_before, *h0, *c0, *w_ih, *w_hh, *b_ih, *b_hh;
  const Accumulator *x_product, *h_product;
  const uint8_t* resets;  // null without
  const Scalar* zeros;
  const Accumulator* c_before;
  Accumulator* c;
  Scalar *h, *gates, *h_n, *c_n;  // gates and h_n may be null, in step_cell c too
  int input, hidden, out, rows, before_rows, next_rows;
};

// to[r] = from[r] A^T + plus[r], and also_to[r] for rows from also_from on. r counts rows; A is [n, k].
// Rows from `matmul_rows` on take start[r] in place of the product, rows that `cut` names (or null) none.
template <typename Scalar>
struct Linear {
  const Scalar *a, *from, *plus, *start;
  const uint8_t* cut;
  Scalar *to, *also_to;
  int64_t n, k;
  int rows, matmul_rows, also_from;
};

// What the backward of one step reads its dh from: the product A from[r] for matmul_rows rows, plus plus[r],
// or start[r]. Nothing comes back from rows that `cut` names (or null).
template <typename Scalar>
struct Upstream {
  const Scalar *a, *from, *plus, *start;
  const uint8_t* cut;
  int64_t k;
  int matmul_rows;
};

template <typename Scalar>
struct BackwardStep {
  FusedrnnBackward call;
  Rows step;
  int64_t next_offset;
  Upstream<Scalar> up;
};

// Of a cell of one's own. From an array of a state to the next one's it is of_state elements where there are B rows,
// of_cells in forward's c, of_rows where there are N; depth is the units of a head.
template <typename Scalar, typename Accumulator>
struct OwnForwardStep : ForwardStep<Scalar, Accumulator> {
  const Scalar *parameters, *inputs;  // inputs at the first row of the step
  int64_t of_state, of_cells, of_rows;
  int depth;
};

template <typename Scalar>
struct OwnBackwardStep : BackwardStep<Scalar> {
  const Scalar *parameters, *inputs;
  Scalar *dparameters, *dinputs;
  int64_t of_state, of_rows;
  int depth;
};

// The arguments of a kernel.
#ifdef FUSEDRNN_OWN
template <typename Scalar, typename Accumulator>
using ForwardStepOf = OwnForwardStep<Scalar, Accumulator>;
template <typename Scalar>
using BackwardStepOf = OwnBackwardStep<Scalar>;
using ForwardOf = FusedrnnOwnForward;
using BackwardOf = FusedrnnOwnBackward;
#else
template <typename Scalar, typename Accumulator>
using ForwardStepOf = ForwardStep<Scalar, Accumulator>;
template <typename Scalar>
using BackwardStepOf = BackwardStep<Scalar>;
using ForwardOf = FusedrnnForward;
using BackwardOf = FusedrnnBackward;
#endif

// The arguments of a kernel of persistent: one direction of a layer, or both, of which blockIdx.z is one. It reads them
// from the constant bank at an offset that is in a register.
template <typename Params>
struct Directions {
  Params of[2];
};

}  // namespace fusedrnn
