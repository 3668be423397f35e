// What step and persistent share: how a block's tile is laid out, how its warps' partial sums meet, and the cell.
//
// A block has 8 warps that split k. Forward, it owns 8 units: the rows of W_hh of one unit's accumulators sit in one
// lane's share of the m-tiles (rows 0..7 of m-tile m are accumulator 2 m of the 8 units, rows 8..15 accumulator 2 m + 1),
// so a lane ends up with all accumulators of unit l / 4 for two batch rows. Backward, it owns 16 units: one m-tile.
#pragma once

#include "../cells.h"
#include "arithmetic.cuh"

namespace fusedrnn {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kForwardUnits = 8;
constexpr int kBackwardUnits = 16;
constexpr int kForwardRows = 64;   // most rows of a block
constexpr int kBackwardRows = 32;

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

template <typename Cell>
constexpr int kMTiles = (Cell::kAccumulators + 1) / 2;
template <typename Cell>
constexpr int kSavedOrOne = Cell::kSaved > 0 ? Cell::kSaved : 1;

// Partial sums of a forward block in shared memory: [row][warp][unit], all accumulators of a (row, unit) side by side.
// Units are permuted by row so that neither the stores nor the loads of a quarter warp meet in a bank.
template <typename Cell, typename Accumulator>
struct ForwardSums {
  using Sum = Pack<Accumulator, 2 * kMTiles<Cell>>;
  static constexpr int kBytesPerRow = kWarps * kForwardUnits * int(sizeof(Sum));

  __device__ static __forceinline__ int place(int row, int warp, int unit) {
    return (row * kWarps + warp) * kForwardUnits + (unit ^ (row & 6));
  }

  __device__ static __forceinline__ void store(Sum* sums, int tile, const Accumulator (&acc)[kMTiles<Cell>][4]) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      Sum sum;
#pragma unroll
      for (int m = 0; m < kMTiles<Cell>; ++m) {
        sum.v[2 * m] = acc[m][j];
        sum.v[2 * m + 1] = acc[m][2 + j];
      }
      sums[place(tile * 8 + 2 * (lane & 3) + j, warp, lane >> 2)] = sum;
    }
  }

  __device__ static __forceinline__ void add_up(const Sum* sums, int row, int unit, Accumulator* total) {
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const Sum sum = sums[place(row, warp, unit)];
#pragma unroll
      for (int a = 0; a < Cell::kAccumulators; ++a) total[a] += sum.v[a];
    }
  }
};

// Partial sums of a backward block: [warp][unit][row], rows permuted by unit for the same reason.
template <typename Accumulator>
struct BackwardSums {
  static constexpr int kBytes = kWarps * kBackwardUnits * kBackwardRows * int(sizeof(Accumulator));

  __device__ static __forceinline__ int place(int row, int warp, int unit) {
    return (warp * kBackwardUnits + unit) * kBackwardRows + (row ^ ((unit & 3) << 3 | (unit >> 2) << 1));
  }

  __device__ static __forceinline__ void store(Accumulator* sums, int tile, const Accumulator (&acc)[4]) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row = tile * 8 + 2 * (lane & 3);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const Pack<Accumulator, 2> pair = {acc[2 * j], acc[2 * j + 1]};
      *reinterpret_cast<Pack<Accumulator, 2>*>(sums + place(row, warp, (lane >> 2) + 8 * j)) = pair;
    }
  }

  __device__ static __forceinline__ Accumulator add_up(const Accumulator* sums, int row, int unit) {
    Accumulator total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += sums[place(row, warp, unit)];
    return total;
  }
};

// One unit of one row, one step on. acc holds what the sums start from: biases and the hoisted input part.
template <typename Cell, typename Accumulator>
__device__ __forceinline__ void advance(const typename ForwardSums<Cell, Accumulator>::Sum* sums, int row, int unit,
                                        Accumulator* acc, Accumulator h_prev, Accumulator c_prev, Accumulator& h,
                                        Accumulator& c, Accumulator* saved) {
  ForwardSums<Cell, Accumulator>::add_up(sums, row, unit, acc);
  Cell::forward(acc, h_prev, c_prev, h, c, saved);
}

// One unit of one row, one step back. dh holds what the sum starts from: dy, or dy + dh_n.
template <typename Cell, typename Accumulator>
__device__ __forceinline__ void advance_back(const Accumulator* sums, int row, int unit, bool recurrent, Accumulator dh,
                                             Accumulator dc, const Accumulator* saved, Accumulator h, Accumulator h_prev,
                                             Accumulator c_prev, Accumulator c, Accumulator* dacc, Accumulator& dh_prev,
                                             Accumulator& dc_prev) {
  if (recurrent) dh += BackwardSums<Accumulator>::add_up(sums, row, unit);
  Cell::backward(dh, dc, saved, h, h_prev, c_prev, c, dacc, dh_prev, dc_prev);
}

template <typename Scalar, typename Accumulator, int N>
__device__ __forceinline__ void store_pack(Scalar* to, const Accumulator* from) {
  Pack<Scalar, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.v[i] = narrow<Scalar>(from[i]);
  *reinterpret_cast<Pack<Scalar, N>*>(to) = pack;
}

template <typename Scalar, typename Accumulator, int N>
__device__ __forceinline__ void load_pack(const Scalar* from, Accumulator* to) {
  const Pack<Scalar, N> pack = *reinterpret_cast<const Pack<Scalar, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = widen(pack.v[i]);
}

}  // namespace fusedrnn
