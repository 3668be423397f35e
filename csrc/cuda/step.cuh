// One launch a time step: the products of x and h and the cell, or the product of dgates and the cell's backward. A
// projection adds a second launch a step, a product only. Here is what the kernels of step share.
#pragma once

#include "advance.cuh"

namespace fusedrnn {

// Pieces straight from global memory, by all warps in turn, just as the product wants them: kRows rows of A,
// kTiles tiles of 8 rows of B, every pointer at its row's first k. kGaps: a null row of A counts as zeros.
template <typename Math, bool kGaps, int kRows, int kTiles, bool kWhole, typename Scalar, typename Accumulator>
__device__ __forceinline__ void accumulate(Accumulator (&acc)[kTiles][kRows / 2][4], const Scalar* const (&a)[kRows],
                                           const Scalar* const (&b)[kTiles], int k_size) {
  constexpr int kPer = 16 / sizeof(Scalar), kRound = 4 * kWarps * kPer;
  constexpr int kInFlight = Math::kExact ? 1 : 3;  // rounds whose loads travel together
  const auto multiply = [&](Piece(&left)[kRows], Piece(&right)[kTiles]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (kGaps && a[r] == nullptr) left[r] = Piece{};
      Math::prepare(left[r]);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      Math::prepare(right[tile]);
#pragma unroll
      for (int r = 0; r < kRows; r += 2) multiply_all<Math>(acc[tile][r / 2], left[r], left[r + 1], right[tile]);
    }
  };
  const auto row_of_a = [&](int r) { return kGaps && a[r] == nullptr ? b[0] : a[r]; };
  int k = int(4 * (threadIdx.x >> 5) + (threadIdx.x & 3)) * kPer, done = 0;
  if constexpr (kWhole) {
    const Scalar *left_at[kRows], *right_at[kTiles];
#pragma unroll
    for (int r = 0; r < kRows; ++r) left_at[r] = keep(row_of_a(r) + k);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) right_at[tile] = keep(b[tile] + k);
    const auto go_round = [&](auto index) {
      constexpr int kOffset = decltype(index)::value * kRound * int(sizeof(Scalar));
      Piece left[kRows], right[kTiles];
#pragma unroll
      for (int r = 0; r < kRows; ++r) left[r] = load_global<kOffset>(left_at[r]);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) right[tile] = load_global<kOffset>(right_at[tile]);
      multiply(left, right);
    };
    const auto advance_by = [&](int rounds) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) left_at[r] += rounds * kRound;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) right_at[tile] += rounds * kRound;
    };
    int rounds = unsigned(k_size) / kRound;
    for (; rounds >= kInFlight; rounds -= kInFlight) {
      unrolled<kInFlight>(go_round);
      advance_by(kInFlight);
    }
#pragma unroll 1
    for (; rounds > 0; --rounds) {
      unrolled<1>(go_round);
      advance_by(1);
    }
    done = unsigned(k_size) / kRound * kRound;
    k += done;
  }
  // What is left, or rows that do not hold whole pieces. All lanes of a warp go round equally often.
#pragma unroll 1
  for (; done < k_size; done += kRound, k += kRound) {
    Piece left[kRows], right[kTiles];
#pragma unroll
    for (int r = 0; r < kRows; ++r) left[r] = load_piece<kWhole>(row_of_a(r), k, k_size);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) right[tile] = load_piece<kWhole>(b[tile], k, k_size);
    __syncwarp();
    multiply(left, right);
  }
}

// One unit of one row of a step: the biases, what `add` adds to them, the cell, and all that is kept of it.
template <typename Cell, typename Scalar, typename Accumulator, typename Add>
__device__ __forceinline__ void advance_unit(const ForwardStepOf<Scalar, Accumulator>& p, int row, int unit,
                                             const Add& add) {
  constexpr int kAccs = Cell::kAccumulators;
  const int64_t at = keep(int64_t(row) * p.hidden + unit);
  int64_t of_state = 0, of_cells = 0;
  if constexpr (kOwn) of_state = p.of_state, of_cells = p.of_cells;
  Accumulator sum[kAccs] = {}, prev[kSlots<Cell>] = {}, next[kSlots<Cell>] = {}, saved[kSavedOrOne<Cell>];
  Accumulator parameters[kParameterSlots<Cell>], inputs[kInputSlots<Cell>];
  const auto add_bias = [&](const Scalar* bias, auto is_x) {
    if (bias == nullptr) return;
    const Scalar* of_unit = keep(bias + unit);
#pragma unroll
    for (int a = 0; a < kAccs; ++a) {
      const int gate = decltype(is_x)::value ? x_gate<Cell>(a) : h_gate<Cell>(a);
      if (gate >= 0) sum[a] += widen(of_unit[gate * p.hidden]);
    }
  };
  add_bias(p.b_ih, Constant<true>());
  add_bias(p.b_hh, Constant<false>());
  const bool joined = row < p.before_rows;
#pragma unroll
  for (int k = 1; k < Cell::kStates; ++k)
    prev[k] = joined ? p.c_before[at + (k - 1) * of_cells] : Accumulator(widen(p.c0[at + (k - 1) * of_state]));
  if constexpr (Cell::kUsesHPrev) prev[0] = widen((joined ? p.h_before : p.h0)[at]);
  if (p.resets && p.resets[row]) {
#pragma unroll
    for (int k = 0; k < kSlots<Cell>; ++k) prev[k] = 0;
  }
  if constexpr (kOwn) {
#pragma unroll
    for (int k = 0; k < Cell::kParameters; ++k) parameters[k] = widen(p.parameters[k * p.hidden + unit]);
#pragma unroll
    for (int k = 0; k < Cell::kInputs; ++k) inputs[k] = widen(p.inputs[k * p.of_rows + at]);
  }
  add(sum);
  Cell::template forward<Accumulator>(sum, prev, parameters, inputs, next, saved);
  const Scalar stored = narrow<Scalar>(next[0]);
  p.h[at] = stored;
  if constexpr (Cell::kSaved > 0)
    if (p.gates) store_pack<Scalar, Accumulator, Cell::kSaved>(p.gates + at * Cell::kSaved, saved);
#pragma unroll
  for (int k = 1; k < Cell::kStates; ++k)
    if (p.c) p.c[at + (k - 1) * of_cells] = next[k];
  if (row >= p.next_rows) {
    if (p.h_n) p.h_n[at] = stored;
#pragma unroll
    for (int k = 1; k < Cell::kStates; ++k) p.c_n[at + (k - 1) * of_state] = narrow<Scalar>(next[k]);
  }
}

// The matmul of a tile of 16 rows of A by kTiles * 8 rows of `from`, its sums in shared memory. kGap: rows of `from`
// have `skip` columns that A has not, in front of A's column `near`.
template <typename Math, int kTiles, bool kWhole, bool kGap = false, typename Scalar, typename Accumulator>
__device__ __forceinline__ void backward_sums(Accumulator* sums, const Scalar* weights, int64_t n, int64_t k,
                                              const Scalar* from, int rows, int64_t near = 0, int64_t skip = 0) {
  using Sums = BackwardSums<Accumulator>;
  const int lane = threadIdx.x & 31, first = int(blockIdx.x) * kTiles * 8;
  if (first < rows) {
    const Scalar *a[2], *b[kTiles];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t row = int64_t(blockIdx.y) * kBackwardUnits + (lane >> 2) + 8 * j;
      a[j] = weights + min(row, n - 1) * k;
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      b[tile] = from + int64_t(min(first + tile * 8 + (lane >> 2), rows - 1)) * (kGap ? k + skip : k);
    Accumulator acc[kTiles][1][4] = {};
    if constexpr (kGap) {
#pragma unroll 1
      for (int part = 0; part < 2; ++part) {
        accumulate<Math, false, 2, kTiles, kWhole>(acc, a, b, int(part == 0 ? near : k - near));
#pragma unroll
        for (int j = 0; j < 2; ++j) a[j] += near;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) b[tile] += near + skip;
      }
    } else {
      accumulate<Math, false, 2, kTiles, kWhole>(acc, a, b, int(k));
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      Sums::store(sums + Sums::lane_place() + tile * 8 * Sums::kPitch, acc[tile][0]);
  }
  __syncthreads();
}

// The same for a cell of one's own: of a block's head the columns of one gate after the other. A row of `weights` is
// that of a unit, [kGates, depth]; of `from` a row is [kAccumulators, hidden].
template <typename Cell, typename Math, int kTiles, bool kWhole, typename Scalar, typename Accumulator>
__device__ __forceinline__ void own_backward_sums(Accumulator* sums, const Scalar* weights, const BlockUnits& block,
                                                  int hidden, int depth, const Scalar* from, int rows) {
  using Sums = BackwardSums<Accumulator>;
  const int lane = threadIdx.x & 31, first = int(blockIdx.x) * kTiles * 8;
  if (first < rows) {
    Accumulator acc[kTiles][1][4] = {};
#pragma unroll 1
    for (int gate = 0; gate < Cell::kGates; ++gate) {
      const Scalar *a[2], *b[kTiles];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int unit = min(block.first + (lane >> 2) + 8 * j, block.end - 1);
        a[j] = weights + (int64_t(unit) * Cell::kGates + gate) * depth;
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
        b[tile] = from + int64_t(min(first + tile * 8 + (lane >> 2), rows - 1)) * Cell::kAccumulators * hidden +
                  Cell::h_acc(gate) * hidden + block.head;
      accumulate<Math, false, 2, kTiles, kWhole>(acc, a, b, depth);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      Sums::store(sums + Sums::lane_place() + tile * 8 * Sums::kPitch, acc[tile][0]);
  }
  __syncthreads();
}

}  // namespace fusedrnn
