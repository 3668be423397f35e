// What step and persistent share: how a block's tile is laid out, how its warps' partial sums meet, and the
// cell.
//
// A block has 8 warps that split k. Forward, it owns 8 units: the rows of W_hh of one unit's accumulators sit
// in one lane's share of the m-tiles (rows 0..7 of m-tile m are accumulator 2 m of the 8 units, rows 8..15
// accumulator 2 m + 1), so a lane ends up with all accumulators of unit l / 4 for two batch rows. Backward,
// it owns 16 units: one m-tile.
#pragma once

#include "arithmetic.cuh"
#include "layout.h"

namespace fusedrnn {

// The gate whose part of W_ih or W_hh feeds an accumulator; -1 if none does.
template <typename Cell>
__device__ constexpr int x_gate(int accumulator) {
  for (int gate = 0; gate < Cell::kGates; ++gate)
    if (Cell::x_acc(gate) == accumulator) return gate;
  return -1;
}
template <typename Cell>
__device__ constexpr int h_gate(int accumulator) {
  for (int gate = 0; gate < Cell::kGates; ++gate)
    if (Cell::h_acc(gate) == accumulator) return gate;
  return -1;
}

// How many accumulators h feeds, and which one is their `rank`th.
template <typename Cell>
__device__ constexpr int fed_by_h() {
  int count = 0;
  for (int a = 0; a < Cell::kAccumulators; ++a) count += h_gate<Cell>(a) >= 0;
  return count;
}
template <typename Cell>
__device__ constexpr int fed_accumulator(int rank) {
  for (int a = 0; a < Cell::kAccumulators; ++a)
    if (h_gate<Cell>(a) >= 0 && rank-- == 0) return a;
  return -1;
}

// Whether some accumulator has no part of x or of h, or a block's last m-tile is half empty.
template <typename Cell>
__device__ constexpr bool has_gaps() {
  for (int a = 0; a < Cell::kAccumulators; ++a)
    if (x_gate<Cell>(a) < 0 || h_gate<Cell>(a) < 0) return true;
  return Cell::kAccumulators % 2 != 0;
}

template <typename Cell>
constexpr int kMTiles = (Cell::kAccumulators + 1) / 2;
template <typename Cell>
constexpr int kSavedOrOne = Cell::kSaved > 0 ? Cell::kSaved : 1;
template <typename Cell>
constexpr bool kHasCellState = Cell::kStates > 1;
// Room for arrays that may be empty.
template <typename Cell>
constexpr int kSlots = Cell::kStates > 2 ? Cell::kStates : 2;  // states: h, c and others
template <typename Cell>
constexpr int kParameterSlots = Cell::kParameters > 0 ? Cell::kParameters : 1;
template <typename Cell>
constexpr int kInputSlots = Cell::kInputs > 0 ? Cell::kInputs : 1;

// The units of a block: from `first` to before `end`, those of a head, whose first is `head`; `block` counts in it.
struct BlockUnits {
  int first, head, end, block;
};
template <int kUnits>
__device__ __forceinline__ BlockUnits units_of(int block, int hidden, int depth) {
  if constexpr (!kOwn) return {block * kUnits, 0, hidden, block};
  const int blocks = (depth + kUnits - 1) / kUnits, head = block / blocks, within = block % blocks;
  return {head * depth + within * kUnits, head * depth, (head + 1) * depth, within};
}

// Partial sums of a forward block in shared memory: [row][warp][unit], all accumulators of a (row, unit) side
// by side. Units are permuted by row so that neither the stores nor the loads of a quarter warp meet in a
// bank.
template <typename Cell, typename Accumulator, int kUnits = kForwardUnits>
struct ForwardSums {
  using Sum = Pack<Accumulator, 2 * kMTiles<Cell>>;
  static constexpr int kBytesPerRow = forward_bytes_per_row(Cell::kAccumulators, sizeof(Accumulator), kUnits);
  static_assert(kBytesPerRow == kWarps * kUnits * int(sizeof(Sum)));

  __device__ static __forceinline__ int place(int row, int warp, int unit) {
    return (row * kWarps + warp) * kUnits + (unit ^ (row & 6));
  }

  // Where a lane's sums of tile 0 go; row + 1 is kWarps * kUnits on, the next tile 8 times as far.
  __device__ static __forceinline__ int lane_place() {
    const int lane = threadIdx.x & 31;
    return place(2 * (lane & 3), threadIdx.x >> 5, lane >> 2);
  }

  __device__ static __forceinline__ void store(Sum* at, const Accumulator (&acc)[kUnits / 8 * kMTiles<Cell>][4]) {
#pragma unroll
    for (int i = 0; i < kUnits / 4; ++i) {
      const int j = i % 2, e = i / 2;  // row; eight of units
      Sum sum;
#pragma unroll
      for (int m = 0; m < kMTiles<Cell>; ++m) {
        sum.v[2 * m] = acc[e * kMTiles<Cell> + m][j];
        sum.v[2 * m + 1] = acc[e * kMTiles<Cell> + m][2 + j];
      }
      at[j * kWarps * kUnits + 8 * e] = sum;
    }
  }

  // `at` is place(row, 0, unit).
  __device__ static __forceinline__ void add_up(const Sum* at, Accumulator* total) {
    constexpr int kAtOnce = kWarps / 2;
#pragma unroll
    for (int first = 0; first < kWarps; first += kAtOnce) {
      Sum sums[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sums[i] = at[(first + i) * kUnits];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int a = 0; a < Cell::kAccumulators; ++a) total[a] += sums[i].v[a];
    }
  }

  // For a row that starts from zeros: the thread that will add up forgets the sums.
  __device__ static __forceinline__ void clear(Sum* at) {
#pragma unroll 1
    for (int warp = 0; warp < kWarps; ++warp) at[warp * kUnits] = Sum{};
  }
};

// Partial sums of a backward block: [warp][row][unit]. A thread takes two units of a row at a time.
template <typename Accumulator>
struct BackwardSums {
  using Pair = Pack<Accumulator, 2>;
  static constexpr int kPitch = kBackwardPitch;
  static constexpr int kSize = kBackwardSums;

  __device__ static __forceinline__ int place(int row, int warp, int unit) {
    return (warp * kBackwardRows + row) * kPitch + unit;
  }

  __device__ static __forceinline__ int lane_place() {
    const int lane = threadIdx.x & 31;
    return place(2 * (lane & 3), threadIdx.x >> 5, lane >> 2);
  }

  __device__ static __forceinline__ void store(Accumulator* at, const Accumulator (&acc)[4]) {
    at[0] = acc[0];
    at[kPitch] = acc[1];
    at[8] = acc[2];
    at[kPitch + 8] = acc[3];
  }

  // `at` is place(row, 0, unit), unit even.
  __device__ static __forceinline__ void add_up(const Accumulator* at, Accumulator (&total)[2]) {
    Pair sums[kWarps];
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp)
      sums[warp] = *reinterpret_cast<const Pair*>(at + warp * kBackwardRows * kPitch);
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      total[0] += sums[warp].v[0];
      total[1] += sums[warp].v[1];
    }
  }

  __device__ static __forceinline__ void clear(Accumulator* at) {
#pragma unroll 1
    for (int warp = 0; warp < kWarps; ++warp) *reinterpret_cast<Pair*>(at + warp * kBackwardRows * kPitch) = Pair{};
  }
};

// One unit of one row, one step on: the sums of all warps, then the cell. acc holds what the sums start from:
// biases and the hoisted input part.
template <typename Cell, typename Accumulator, int kUnits = kForwardUnits>
__device__ __forceinline__ void advance(const typename ForwardSums<Cell, Accumulator, kUnits>::Sum* at,
                                        Accumulator* acc, const Accumulator* prev, const Accumulator* parameters,
                                        const Accumulator* inputs, Accumulator* next, Accumulator* saved) {
  ForwardSums<Cell, Accumulator, kUnits>::add_up(at, acc);
  Cell::template forward<Accumulator>(acc, prev, parameters, inputs, next, saved);
}

// What a thread knows of its two units of a row in a backward step.
template <typename Cell, typename Accumulator>
struct BackwardUnits {
  // Of h, c and other states. d[0] is dy, or dy + dh_n, and what passed the matmul on the way back.
  Accumulator d[kSlots<Cell>][2], next[kSlots<Cell>][2], prev[kSlots<Cell>][2], dprev[kSlots<Cell>][2];
  Accumulator saved[2][kSavedOrOne<Cell>], dacc[Cell::kAccumulators][2];
  Accumulator parameters[kParameterSlots<Cell>][2], inputs[kInputSlots<Cell>][2];
  Accumulator dparameters[kParameterSlots<Cell>][2], dinputs[kInputSlots<Cell>][2];

  // Nothing goes further back.
  __device__ __forceinline__ void stop() {
#pragma unroll
    for (int k = 0; k < kSlots<Cell>; ++k) dprev[k][0] = dprev[k][1] = 0;
  }

  // Unit j's place in arrays of T [parameters, H] and [inputs, N, H].
  template <typename Scalar>
  __device__ __forceinline__ void load_own(int j, const Scalar* parameters_at, int64_t hidden, const Scalar* inputs_at,
                                           int64_t of_rows) {
#pragma unroll
    for (int k = 0; k < Cell::kParameters; ++k) parameters[k][j] = widen(parameters_at[k * hidden]);
#pragma unroll
    for (int k = 0; k < Cell::kInputs; ++k) inputs[k][j] = widen(inputs_at[k * of_rows]);
  }
  template <typename Scalar>
  __device__ __forceinline__ void store_own(int j, Scalar* parameters_to, Scalar* inputs_to, int64_t of_rows) const {
#pragma unroll
    for (int k = 0; k < Cell::kParameters; ++k) parameters_to[k * of_rows] = narrow<Scalar>(dparameters[k][j]);
#pragma unroll
    for (int k = 0; k < Cell::kInputs; ++k) inputs_to[k * of_rows] = narrow<Scalar>(dinputs[k][j]);
  }
};

// Two units of one row, one step back: the sums of all warps, then the cell.
template <typename Cell, typename Accumulator>
__device__ __forceinline__ void advance_back(const Accumulator* at, bool recurrent,
                                             BackwardUnits<Cell, Accumulator>& u) {
  constexpr int kStates = kSlots<Cell>, kParameters = kParameterSlots<Cell>, kInputs = kInputSlots<Cell>;
  if (recurrent) BackwardSums<Accumulator>::add_up(at, u.d[0]);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    Accumulator d[kStates], next[kStates], prev[kStates], parameters[kParameters], inputs[kInputs];
#pragma unroll
    for (int k = 0; k < kStates; ++k) d[k] = u.d[k][j], next[k] = u.next[k][j], prev[k] = u.prev[k][j];
#pragma unroll
    for (int k = 0; k < Cell::kParameters; ++k) parameters[k] = u.parameters[k][j];
#pragma unroll
    for (int k = 0; k < Cell::kInputs; ++k) inputs[k] = u.inputs[k][j];
    Accumulator dacc[Cell::kAccumulators], dprev[kStates] = {}, dparameters[kParameters], dinputs[kInputs];
    Cell::template backward<Accumulator>(d, u.saved[j], next, prev, parameters, inputs, dacc, dprev, dparameters,
                                         dinputs);
#pragma unroll
    for (int k = 0; k < kStates; ++k) u.dprev[k][j] = dprev[k];
#pragma unroll
    for (int a = 0; a < Cell::kAccumulators; ++a) u.dacc[a][j] = dacc[a];
#pragma unroll
    for (int k = 0; k < Cell::kParameters; ++k) u.dparameters[k][j] = dparameters[k];
#pragma unroll
    for (int k = 0; k < Cell::kInputs; ++k) u.dinputs[k][j] = dinputs[k];
  }
}

template <typename Scalar, typename Accumulator, int N>
__device__ __forceinline__ void store_pack(Scalar* to, const Accumulator* from) {
  Pack<Scalar, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.v[i] = narrow<Scalar>(from[i]);
  *reinterpret_cast<Pack<Scalar, N>*>(to) = pack;
}

template <typename Scalar>
__device__ __forceinline__ Pack<Scalar, 2> pair_at(const Scalar* from) {
  return *reinterpret_cast<const Pack<Scalar, 2>*>(from);
}

template <typename Scalar, typename Accumulator, int N>
__device__ __forceinline__ void load_pack(const Scalar* from, Accumulator* to) {
  const Pack<Scalar, N> pack = *reinterpret_cast<const Pack<Scalar, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = widen(pack.v[i]);
}

}  // namespace fusedrnn
