// One launch a time step: the matmuls of x and h and the cell, or the matmul of dgates and the cell's
// backward. A projection adds a second launch a step, a matmul only.
#include <cuda_runtime.h>

#include <type_traits>

#include "advance.cuh"
#include "dispatch.cuh"
#include "params.h"

namespace fusedrnn {
namespace {

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
      for (int r = 0; r < kRows; r += 2) Math::multiply(acc[tile][r / 2], left[r], left[r + 1], right[tile]);
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

// A step's rows, and where its predecessor in the order of the loop left its own.
struct Rows {
  int64_t offset, before_offset;
  int rows, before_rows, next_rows;
};

// What a step of forward touches, every array at the first row of the step.
template <typename Scalar, typename Accumulator>
struct ForwardStep {
  const Scalar *x, *h_before, *h0, *c0, *w_ih, *w_hh, *b_ih, *b_hh;
  const uint8_t* resets;  // null without
  const Scalar* zeros;
  const Accumulator* c_before;
  Accumulator* c;
  Scalar *h, *gates, *h_n, *c_n;  // gates and h_n may be null
  int input, hidden, out, rows, before_rows, next_rows;
};

// Left to choose how many blocks share a multiprocessor, the compiler spills to fit one more.
template <typename Cell, typename Type, int kTiles, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1) step_forward(
    const __grid_constant__ ForwardStep<typename Arithmetic<Type>::Scalar, typename Arithmetic<Type>::Accumulator> p) {
  using Math = Arithmetic<Type>;
  using Scalar = typename Math::Scalar;
  using Accumulator = typename Math::Accumulator;
  using Sums = ForwardSums<Cell, Accumulator>;
  using Sum = typename Sums::Sum;
  constexpr int kAccs = Cell::kAccumulators, kMT = kMTiles<Cell>;
  constexpr int kElements = (kTiles * 8 * kForwardUnits + kThreads - 1) / kThreads, kStride = kThreads / kForwardUnits;
  extern __shared__ __align__(16) unsigned char shared[];
  Sum* const sums = reinterpret_cast<Sum*>(shared);

  const int octet = keep(int(threadIdx.x & 31) >> 2), first = keep(int(blockIdx.y) * kTiles * 8);
  const int lane_unit = min(int(blockIdx.x) * kForwardUnits + octet, p.hidden - 1);
  Accumulator acc[kTiles][kMT][4] = {};
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    // Rows beyond the last unit or the last row of the batch repeat it: their sums are not read.
    const Scalar *a[2 * kMT], *b[kTiles];
    const int k_size = part == 0 ? p.input : p.out;
    const Scalar* const weights = (part == 0 ? p.w_ih : p.w_hh) + int64_t(lane_unit) * k_size;
    const int64_t gate_size = int64_t(p.hidden) * k_size;
#pragma unroll
    for (int i = 0; i < 2 * kMT; ++i) {
      const int gate = i >= kAccs ? -1 : part == 0 ? x_gate<Cell>(i) : h_gate<Cell>(i);
      a[i] = gate >= 0 ? weights + gate * gate_size : nullptr;
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int row = min(first + tile * 8 + octet, p.rows - 1);
      b[tile] = (part == 0 ? p.x : row < p.before_rows ? p.h_before : p.h0) + int64_t(row) * k_size;
    }
    if (part == 1 && p.resets) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
        if (p.resets[min(first + tile * 8 + octet, p.rows - 1)]) b[tile] = p.zeros;
    }
    Accumulator before[kTiles][kMT][4];
    if constexpr (has_gaps<Cell>()) memcpy(before, acc, sizeof(acc));
    accumulate<Math, has_gaps<Cell>(), 2 * kMT, kTiles, kWhole>(acc, a, b, k_size);
    if constexpr (has_gaps<Cell>()) {
      // Zeros times an infinite x or h are NaN, but these sums have no such part.
#pragma unroll
      for (int i = 0; i < kAccs; ++i)
#pragma unroll
        for (int j = 0; j < 2 * kTiles; ++j)
          if (a[i] == nullptr) acc[j / 2][i / 2][2 * (i % 2) + j % 2] = before[j / 2][i / 2][2 * (i % 2) + j % 2];
    }
  }
  Sum* const lane_sums = sums + keep(Sums::lane_place());
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) Sums::store(lane_sums + tile * 8 * kWarps * kForwardUnits, acc[tile]);
  __syncthreads();

  const int unit = int(blockIdx.x) * kForwardUnits + (threadIdx.x & 7);
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const int local = (threadIdx.x >> 3) + kStride * i, row = first + local;
    if (local >= kTiles * 8 || row >= p.rows || unit >= p.hidden) continue;
    const int64_t at = keep(int64_t(row) * p.hidden + unit);
    Accumulator sum[kAccs] = {}, h, h_prev = 0, c = 0, c_prev = 0, saved[kSavedOrOne<Cell>];
    const auto add_bias = [&](const Scalar* bias, auto is_x) {
      if (bias == nullptr) return;
      const Scalar* of_unit = keep(bias + unit);
#pragma unroll
      for (int a = 0; a < kAccs; ++a) {
        const int gate = decltype(is_x)::value ? x_gate<Cell>(a) : h_gate<Cell>(a);
        if (gate >= 0) sum[a] += widen(of_unit[gate * p.hidden]);
      }
    };
    add_bias(p.b_ih, std::true_type());
    add_bias(p.b_hh, std::false_type());
    const bool joined = row < p.before_rows;
    if constexpr (Cell::kHasCellState) c_prev = joined ? p.c_before[at] : Accumulator(widen(p.c0[at]));
    if constexpr (Cell::kUsesHPrev) h_prev = widen((joined ? p.h_before : p.h0)[at]);
    if (p.resets && p.resets[row]) h_prev = c_prev = 0;
    advance<Cell, Accumulator>(sums + Sums::place(local, 0, threadIdx.x & 7), sum, h_prev, c_prev, h, c, saved);
    const Scalar stored = narrow<Scalar>(h);
    p.h[at] = stored;
    if constexpr (Cell::kSaved > 0)
      if (p.gates) store_pack<Scalar, Accumulator, Cell::kSaved>(p.gates + at * Cell::kSaved, saved);
    if constexpr (Cell::kHasCellState) p.c[at] = c;
    if (row >= p.next_rows) {
      if (p.h_n) p.h_n[at] = stored;
      if constexpr (Cell::kHasCellState) p.c_n[at] = narrow<Scalar>(c);
    }
  }
}

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

// The matmul of a tile of 16 rows of A by kTiles * 8 rows of `from`, its sums in shared memory. kGap: rows of `from`
// have `skip` columns that A has not, in front of A's column `near`.
template <typename Math, int kTiles, bool kWhole, bool kGap = false, typename Scalar, typename Accumulator>
__device__ __forceinline__ void backward_sums(Accumulator* sums, const Scalar* weights, int64_t n, int64_t k,
                                              const Scalar* from, int rows, int64_t near = 0, int64_t skip = 0) {
  using Sums = BackwardSums<Accumulator>;
  const int lane = threadIdx.x & 31, first = int(blockIdx.y) * kTiles * 8;
  if (first < rows) {
    const Scalar *a[2], *b[kTiles];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t row = int64_t(blockIdx.x) * kBackwardUnits + (lane >> 2) + 8 * j;
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

template <typename Type, int kTiles, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1) step_linear(const Linear<typename Arithmetic<Type>::Scalar> p) {
  using Math = Arithmetic<Type>;
  using Scalar = typename Math::Scalar;
  using Accumulator = typename Math::Accumulator;
  using Sums = BackwardSums<Accumulator>;
  extern __shared__ __align__(16) unsigned char shared[];
  Accumulator* const sums = reinterpret_cast<Accumulator*>(shared);
  backward_sums<Math, kTiles, kWhole>(sums, p.a, p.n, p.k, p.from, p.matmul_rows);
  const int local = threadIdx.x >> 3, row = int(blockIdx.y) * kTiles * 8 + local;
  if (local >= kTiles * 8 || row >= p.rows) return;
  const int64_t unit = int64_t(blockIdx.x) * kBackwardUnits + 2 * (threadIdx.x & 7);
  Accumulator total[2] = {};
  if (row < p.matmul_rows && !(p.cut && p.cut[row]))
    Sums::add_up(sums + Sums::place(local, 0, 2 * (threadIdx.x & 7)), total);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (unit + j >= p.n) continue;
    const int64_t at = row * p.n + unit + j;
    if (row >= p.matmul_rows && p.start) total[j] = widen(p.start[at]);
    if (p.plus) total[j] += widen(p.plus[at]);
    p.to[at] = narrow<Scalar>(total[j]);
    if (row >= p.also_from) p.also_to[at] = p.to[at];
  }
}

// What the backward of one step reads its dh from: the product A from[r] for matmul_rows rows, plus plus[r],
// or start[r]. Nothing comes back from rows that `cut` names (or null).
template <typename Scalar>
struct Upstream {
  const Scalar *a, *from, *plus, *start;
  const uint8_t* cut;
  int64_t k;
  int matmul_rows;
};

template <typename Cell, typename Type, int kTiles, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1)
    step_backward(const __grid_constant__ FusedrnnBackward p, const Rows step, int64_t next_offset,
                  const Upstream<typename Arithmetic<Type>::Scalar> up) {
  using Math = Arithmetic<Type>;
  using Scalar = typename Math::Scalar;
  using Accumulator = typename Math::Accumulator;
  using Sums = BackwardSums<Accumulator>;
  constexpr int kAccs = Cell::kAccumulators;
  extern __shared__ __align__(16) unsigned char shared[];
  Accumulator* const sums = reinterpret_cast<Accumulator*>(shared);
  // What W_hh does not multiply is passed over: zeros times an infinite gradient would be NaN.
  backward_sums<Math, kTiles, kWhole, Gap<Cell>::kAny>(sums, up.a, p.hidden, up.k, up.from, up.matmul_rows,
                                                       Gap<Cell>::kFirst * p.hidden, Gap<Cell>::kWidth * p.hidden);

  const int local = threadIdx.x >> 3, row = int(blockIdx.y) * kTiles * 8 + local;
  if (local >= kTiles * 8 || row >= step.rows) return;
  const int64_t hidden = p.hidden, unit = int64_t(blockIdx.x) * kBackwardUnits + 2 * (threadIdx.x & 7);
  const bool recurrent = row < step.before_rows, goes_on = row < step.next_rows;
  const bool reset = p.resets && p.resets[step.offset + row];
  BackwardUnits<Cell, Accumulator> u;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    u.dh[j] = u.dc[j] = u.h[j] = u.h_prev[j] = u.c[j] = u.c_prev[j] = 0;
#pragma unroll
    for (int k = 0; k < kSavedOrOne<Cell>; ++k) u.saved[j][k] = 0;
    if (unit + j >= hidden) continue;
    const int64_t in_batch = row * hidden + unit + j, at = step.offset * hidden + in_batch,
                  at_next = next_offset * hidden + in_batch;
    if (row >= up.matmul_rows && up.start) u.dh[j] = widen(up.start[in_batch]);
    if (up.plus) u.dh[j] += widen(up.plus[in_batch]);
    if constexpr (Cell::kDirectH)
      if (recurrent) u.dh[j] += static_cast<const Accumulator*>(p.dh_direct)[in_batch];
    if constexpr (Cell::kSaved > 0)
      load_pack<Scalar, Accumulator, Cell::kSaved>(static_cast<const Scalar*>(p.gates) + at * Cell::kSaved, u.saved[j]);
    if constexpr (Cell::kHasCellState) {
      u.c[j] = static_cast<const Accumulator*>(p.cells)[at];
      if (!reset)
        u.c_prev[j] = goes_on ? static_cast<const Accumulator*>(p.cells)[at_next]
                              : Accumulator(widen(static_cast<const Scalar*>(p.c0)[in_batch]));
      if (recurrent)
        u.dc[j] = static_cast<const Accumulator*>(p.state)[in_batch];
      else if (p.dc_n)
        u.dc[j] = widen(static_cast<const Scalar*>(p.dc_n)[in_batch]);
      if (p.dcells) u.dc[j] += static_cast<const Accumulator*>(p.dcells)[at];
    }
    if constexpr (Cell::kUsesH) u.h[j] = widen(static_cast<const Scalar*>(p.y)[at]);
    if constexpr (Cell::kUsesHPrev)
      if (!reset)
        u.h_prev[j] =
            widen(goes_on ? static_cast<const Scalar*>(p.y)[at_next] : static_cast<const Scalar*>(p.h0)[in_batch]);
  }
  advance_back<Cell, Accumulator>(sums + Sums::place(local, 0, 2 * (threadIdx.x & 7)),
                                  row < up.matmul_rows && !(up.cut && up.cut[row]), u);
  if (reset) u.stop();
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (unit + j >= hidden) continue;
    const int64_t in_batch = row * hidden + unit + j;
#pragma unroll
    for (int a = 0; a < kAccs; ++a)
      static_cast<Scalar*>(p.dgates)[(step.offset + row) * kAccs * hidden + a * hidden + unit + j] =
          narrow<Scalar>(u.dacc[a][j]);
    if constexpr (Cell::kHasCellState) {
      static_cast<Accumulator*>(p.state)[in_batch] = u.dc_prev[j];
      if (!goes_on) static_cast<Scalar*>(p.dc0)[in_batch] = narrow<Scalar>(u.dc_prev[j]);
    }
    if constexpr (Cell::kDirectH) static_cast<Accumulator*>(p.dh_direct)[in_batch] = u.dh_prev[j];
  }
}

// Host: the rows of step t, counted from B rows a step or from offsets.
struct Timeline {
  const int64_t* offsets;
  int64_t batch, steps;
  int64_t offset(int64_t t) const { return t < 0 || t >= steps ? 0 : offsets ? offsets[t] : t * batch; }
  int rows(int64_t t) const { return t < 0 || t >= steps ? 0 : int(offsets ? offsets[t + 1] - offsets[t] : batch); }
};

bool whole(const void* pointer, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && row_bytes % 16 == 0;
}

dim3 grid(int64_t columns, int units, int rows, int tiles) {
  return dim3(unsigned((columns + units - 1) / units), unsigned((rows + tiles * 8 - 1) / (tiles * 8)));
}

// run(tiles, whole): 16 or 32 rows of the batch a block.
template <typename Run>
int with_tile(int rows, bool is_whole, const Run& run) {
  using Two = std::integral_constant<int, 2>;
  using Four = std::integral_constant<int, 4>;
  if (rows <= 16) return is_whole ? run(Two(), std::true_type()) : run(Two(), std::false_type());
  return is_whole ? run(Four(), std::true_type()) : run(Four(), std::false_type());
}

template <typename Kernel, typename... Arguments>
int launch(Kernel kernel, dim3 blocks, int shared, cudaStream_t stream, const Arguments&... arguments) {
  if (shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  kernel<<<blocks, kThreads, shared, stream>>>(arguments...);
  return cudaGetLastError();
}

template <typename Type>
int linear(const Linear<typename Arithmetic<Type>::Scalar>& p, cudaStream_t stream) {
  using Math = Arithmetic<Type>;
  constexpr int kSize = sizeof(typename Math::Scalar),
                kShared = BackwardSums<typename Math::Accumulator>::kSize * int(sizeof(typename Math::Accumulator));
  return with_tile(p.rows, whole(p.a, p.k * kSize) && whole(p.from, 0), [&](auto tiles, auto is_whole) {
    constexpr int kTiles = decltype(tiles)::value;
    return launch(step_linear<Type, kTiles, decltype(is_whole)::value>, grid(p.n, kBackwardUnits, p.rows, kTiles),
                  kShared, stream, p);
  });
}

template <typename Cell, typename Type>
int forward(const FusedrnnForward& p, cudaStream_t stream) {
  using Scalar = typename Arithmetic<Type>::Scalar;
  using Accumulator = typename Arithmetic<Type>::Accumulator;
  constexpr int kSize = sizeof(Scalar);
  const Timeline timeline{p.offsets_host, p.batch, p.steps};
  const bool is_whole = whole(p.x, p.input * kSize) && whole(p.w_ih, 0) && whole(p.w_hh, p.out * kSize) &&
                        whole(p.h0, 0) && whole(p.y, 0);
  const int direction = p.reverse ? -1 : 1;
  for (int64_t s = 0, t = p.reverse ? p.steps - 1 : 0; s < p.steps; ++s, t += direction) {
    const Rows step{timeline.offset(t), timeline.offset(t - direction), timeline.rows(t), timeline.rows(t - direction),
                    timeline.rows(t + direction)};
    ForwardStep<Scalar, Accumulator> now{};
    now.x = static_cast<const Scalar*>(p.x) + step.offset * p.input;
    now.h_before = static_cast<const Scalar*>(p.y) + step.before_offset * p.out;
    now.h0 = static_cast<const Scalar*>(p.h0);
    now.c0 = static_cast<const Scalar*>(p.c0);
    now.resets = p.resets ? p.resets + step.offset : nullptr;
    now.zeros = static_cast<const Scalar*>(p.zeros);
    now.w_ih = static_cast<const Scalar*>(p.w_ih);
    now.w_hh = static_cast<const Scalar*>(p.w_hh);
    now.b_ih = static_cast<const Scalar*>(p.b_ih);
    now.b_hh = static_cast<const Scalar*>(p.b_hh);
    now.c_before = p.cells ? static_cast<const Accumulator*>(p.cells) + step.before_offset * p.hidden
                           : static_cast<const Accumulator*>(p.state);
    now.c = p.cells ? static_cast<Accumulator*>(p.cells) + step.offset * p.hidden : static_cast<Accumulator*>(p.state);
    now.h = p.w_hr ? static_cast<Scalar*>(p.unprojected) : static_cast<Scalar*>(p.y) + step.offset * p.out;
    now.gates = p.gates ? static_cast<Scalar*>(p.gates) + step.offset * p.hidden * Cell::kSaved : nullptr;
    now.h_n = p.w_hr ? nullptr : static_cast<Scalar*>(p.h_n);
    now.c_n = static_cast<Scalar*>(p.c_n);
    now.input = int(p.input);
    now.hidden = int(p.hidden);
    now.out = int(p.out);
    now.rows = step.rows;
    now.before_rows = step.before_rows;
    now.next_rows = step.next_rows;
    int error = with_tile(step.rows, is_whole, [&](auto tiles, auto is_whole) {
      // Two tiles of doubles and a copy of them do not fit in the registers.
      constexpr int kTiles = sizeof(Scalar) == 8 && has_gaps<Cell>() ? 1 : decltype(tiles)::value;
      const int shared = kTiles * 8 * ForwardSums<Cell, Accumulator>::kBytesPerRow;
      return launch(step_forward<Cell, Type, kTiles, decltype(is_whole)::value>,
                    grid(p.hidden, kForwardUnits, step.rows, kTiles), shared, stream, now);
    });
    if (error == cudaSuccess && p.w_hr) {
      Linear<Scalar> project{};
      project.a = static_cast<const Scalar*>(p.w_hr);
      project.from = static_cast<const Scalar*>(p.unprojected);
      project.to = static_cast<Scalar*>(p.y) + step.offset * p.out;
      project.also_to = static_cast<Scalar*>(p.h_n);
      project.n = p.out;
      project.k = p.hidden;
      project.rows = project.matmul_rows = step.rows;
      project.also_from = step.next_rows;
      error = linear<Type>(project, stream);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename Cell, typename Type>
int backward(const FusedrnnBackward& p, cudaStream_t stream) {
  using Math = Arithmetic<Type>;
  using Scalar = typename Math::Scalar;
  constexpr int kSize = sizeof(Scalar),
                kShared = BackwardSums<typename Math::Accumulator>::kSize * int(sizeof(typename Math::Accumulator));
  const Timeline timeline{p.offsets_host, p.batch, p.steps};
  const int direction = p.reverse ? 1 : -1;
  const int64_t gate_columns = Cell::kAccumulators * p.hidden;
  for (int64_t s = 0, t = p.reverse ? 0 : p.steps - 1; s < p.steps; ++s, t += direction) {
    const Rows step{timeline.offset(t), timeline.offset(t - direction), timeline.rows(t), timeline.rows(t - direction),
                    timeline.rows(t + direction)};
    const int recurrent_rows = step.rows < step.before_rows ? step.rows : step.before_rows;
    Upstream<Scalar> up{};
    up.a = static_cast<const Scalar*>(p.w_hh_t);
    up.from = static_cast<const Scalar*>(p.dgates) + step.before_offset * gate_columns;
    up.plus = p.dy ? static_cast<const Scalar*>(p.dy) + step.offset * p.out : nullptr;
    up.start = static_cast<const Scalar*>(p.dh_n);
    up.cut = p.resets ? p.resets + step.before_offset : nullptr;
    up.k = Cell::kGates * p.hidden;
    up.matmul_rows = recurrent_rows;
    int error = cudaSuccess;
    if (p.w_hr_t) {
      Linear<Scalar> total{};
      total.a = up.a;
      total.from = up.from;
      total.plus = up.plus;
      total.start = up.start;
      total.cut = up.cut;
      total.to = static_cast<Scalar*>(p.dy_total) + step.offset * p.out;
      total.n = p.out;
      total.k = up.k;
      total.rows = total.also_from = step.rows;
      total.matmul_rows = recurrent_rows;
      error = linear<Type>(total, stream);
      up.a = static_cast<const Scalar*>(p.w_hr_t);
      up.from = total.to;
      up.plus = up.start = nullptr;
      up.cut = nullptr;
      up.k = p.out;
      up.matmul_rows = step.rows;
    }
    const bool is_whole = whole(up.a, (Gap<Cell>::kAny ? p.hidden : up.k) * kSize) && whole(up.from, 0);
    if (error == cudaSuccess)
      error = with_tile(step.rows, is_whole, [&](auto tiles, auto is_whole) {
        constexpr int kTiles = decltype(tiles)::value;
        return launch(step_backward<Cell, Type, kTiles, decltype(is_whole)::value>,
                      grid(p.hidden, kBackwardUnits, step.rows, kTiles), kShared, stream, p, step,
                      timeline.offset(t + direction), up);
      });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace
}  // namespace fusedrnn

extern "C" int fusedrnn_step_forward(const FusedrnnForward* params, void* stream) {
  return fusedrnn::dispatch<true>(*params, [&](auto cell, auto type) {
    return fusedrnn::forward<typename decltype(cell)::Of, typename decltype(type)::Of>(
        *params, static_cast<cudaStream_t>(stream));
  });
}

extern "C" int fusedrnn_step_backward(const FusedrnnBackward* params, void* stream) {
  return fusedrnn::dispatch<true>(*params, [&](auto cell, auto type) {
    return fusedrnn::backward<typename decltype(cell)::Of, typename decltype(type)::Of>(
        *params, static_cast<cudaStream_t>(stream));
  });
}
