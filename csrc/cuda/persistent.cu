// One cooperative launch for a whole sequence. W_hh stays in registers; h (backward: dgates) goes through the
// mailbox.
#include <cuda_runtime.h>

#include <type_traits>

#include "advance.cuh"
#include "dispatch.cuh"
#include "mailbox.cuh"
#include "params.h"

namespace fusedrnn {
namespace {

// The rows of one time step that belong to a batch slice.
struct StepRows {
  int64_t offset = 0;  // of the slice's first row
  int rows = 0;
};

struct Timeline {
  const int64_t* offsets;
  int64_t batch, first;
  int limit;

  __device__ __forceinline__ StepRows at(int t) const {
    if (offsets == nullptr) return {t * batch + first, limit};
    const int64_t offset = offsets[t], rows = offsets[t + 1] - offset - first;
    return {offset + first, int(rows < 0 ? 0 : rows < limit ? rows : limit)};
  }
};

// Where a lane's pieces of a row lie: piece c of n at 512 bytes * c, from piece `near` on `gap` bytes further; the row
// holds them if c < held. kWhole: every lane's row holds all n.
template <bool kWhole, int n, bool kGap = false>
struct Inbox {
  int held, near = n, gap = 0;

  __device__ static __forceinline__ int count(int piece0, int pieces) { return (pieces - piece0 + 31) >> 5; }

  __device__ __forceinline__ const char* side(const char* at, int c) const { return kGap && c >= near ? at + gap : at; }

  template <int c, int end>
  __device__ __forceinline__ void fetch(const char* at, Piece (&p)[n]) const {
    if constexpr (c < end) {
      if constexpr (kWhole) {
        p[c] = mailbox::take<512 * c>(side(at, c));
      } else {
        p[c] = Piece{};
        if (c < held) p[c] = mailbox::take<512 * c>(side(at, c));
      }
      fetch<c + 1, end>(at, p);
    }
  }

  // Waits before the product where that is the better way round.
  template <bool kNow, typename Params>
  __device__ __forceinline__ bool complete(const char* at, Piece (&p)[n], bool recurrent, const Params& params,
                                           int step) const {
    if constexpr (kNow) {
      bool gap = false;
#pragma unroll
      for (int c = 0; c < n; ++c) gap |= mailbox::missing(p[c]);
      if (__any_sync(~0u, gap && recurrent)) {
        await(at, recurrent, params, step);
        fetch<0, n>(at, p);
      }
    }
    return kNow;
  }

  // Until every packet of the row is there. A row that is not `recurrent` comes from h0 and may hold any
  // bits.
  template <typename Params>
  __device__ __forceinline__ void await(const char* at, bool recurrent, const Params& params, int step) const {
    if (recurrent) {
      uint32_t polls = 0;
#pragma unroll 1
      for (int c = 0; c < (kWhole ? n : min(n, held)); ++c) {
        const char* const packet = side(at, c) + 512 * c;
        while (mailbox::missing(mailbox::take<0>(packet)))
          if (++polls > params.poll_limit)
            mailbox::give_up(params.fault, step,
                             int((packet - static_cast<const char*>(Params::exchanged(params))) / 16));
      }
    }
    __syncwarp();
  }
};

// Whether a sum of this warp is NaN, in any row of B; rows of A need no look, since a NaN in B makes all of
// them NaN.
template <typename Accumulator>
__device__ __forceinline__ bool any_nan(const Accumulator (&acc)[4]) {
  const Accumulator either = acc[0] + acc[1];
  return __any_sync(~0u, either != either);
}

struct Forward : FusedrnnForward {
  __device__ static const void* exchanged(const Forward& p) { return p.y; }
};
struct Backward : FusedrnnBackward {
  __device__ static const void* exchanged(const Backward& p) { return p.dgates; }
};

// Tiles are 8 rows high, so is the room for their sums.
template <typename Sums>
__host__ __device__ constexpr int forward_buffer_bytes(int slice_rows) {
  return (slice_rows + 7) / 8 * 8 * Sums::kBytesPerRow;
}

// 16 bytes of a row's consecutive units, one unit a lane, gathered in the first of their lanes.
template <typename Scalar>
__device__ __forceinline__ Piece gather(Scalar x) {
  Piece p;
  if constexpr (sizeof(Scalar) == 2) {
    const uint32_t bits = *reinterpret_cast<const uint16_t*>(&x);
    p.w[0] = bits | __shfl_down_sync(~0u, bits, 1) << 16;
#pragma unroll
    for (int i = 1; i < 4; ++i) p.w[i] = __shfl_down_sync(~0u, p.w[0], 2 * i);
  } else {
    p.w[0] = __float_as_uint(x);
#pragma unroll
    for (int i = 1; i < 4; ++i) p.w[i] = __shfl_down_sync(~0u, p.w[0], i);
  }
  return p;
}

template <typename Cell, typename Type, int kChunks, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1) persistent_forward(const __grid_constant__ Forward p) {
  using Math = Arithmetic<Type>;
  using Scalar = typename Math::Scalar;
  using Accumulator = typename Math::Accumulator;
  using Sums = ForwardSums<Cell, Accumulator>;
  using Sum = typename Sums::Sum;
  constexpr int kPer = 16 / sizeof(Scalar), kGates = Cell::kGates, kAccs = Cell::kAccumulators, kMT = kMTiles<Cell>;
  constexpr int kElements = kForwardRows * kForwardUnits / kThreads, kStride = kForwardRows / kElements;
  extern __shared__ __align__(16) unsigned char shared[];

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int hidden = int(p.hidden), pitch = kWhole ? hidden : (hidden + kPer - 1) / kPer * kPer;
  const int pieces = pitch / kPer, piece0 = 4 * warp + (lane & 3);
  const Inbox<kWhole, kChunks> inbox{Inbox<kWhole, kChunks>::count(piece0, pieces)};

  const int row_bytes = keep(pitch * int(sizeof(Scalar)));

  Piece weights[kChunks][2 * kMT];
  const int lane_unit = int(blockIdx.x) * kForwardUnits + (lane >> 2);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int a = 0; a < 2 * kMT; ++a) {
      const int gate = a < kAccs ? h_gate<Cell>(a) : -1;
      weights[c][a] = Piece{};
      if (gate >= 0 && lane_unit < hidden && piece0 + 32 * c < pieces) {
        const Scalar* row = static_cast<const Scalar*>(p.w_hh) + (int64_t(gate) * hidden + lane_unit) * pitch;
        weights[c][a] = load_piece<true>(row, (piece0 + 32 * c) * kPer, pitch);
        Math::prepare(weights[c][a]);
      }
    }
  }

  // From here on a thread is row my_row + kStride i and unit threadIdx % 8 of the block.
  const int unit = keep(int(blockIdx.x) * kForwardUnits + (threadIdx.x & 7)), my_row = keep(int(threadIdx.x >> 3));
  const bool real_unit = unit < hidden, sends = (lane & (kPer - 1)) == 0 && unit < pitch;
  Accumulator bias[kAccs];
#pragma unroll
  for (int a = 0; a < kAccs; ++a) {
    const int gate = h_gate<Cell>(a);
    bias[a] = 0;
    if (p.b_hh && gate >= 0 && real_unit)
      bias[a] = widen(static_cast<const Scalar*>(p.b_hh)[int64_t(gate) * hidden + unit]);
  }
  Sum* const all_sums = reinterpret_cast<Sum*>(shared);
  const int with_resets = keep(int(p.resets != nullptr));
  const int sums_out = keep(Sums::lane_place()), sums_in = keep(Sums::place(my_row, 0, threadIdx.x & 7));
  const int buffer_sums = forward_buffer_bytes<Sums>(p.slice_rows) / int(sizeof(Sum));
  int buffer = 0;

  for (int64_t first = int64_t(blockIdx.y) * p.slice_rows; first < p.batch;
       first += int64_t(gridDim.y) * p.slice_rows) {
    const int limit = int(p.batch - first < p.slice_rows ? p.batch - first : p.slice_rows);
    const Timeline timeline{p.offsets_device, p.batch, first, limit};
    const int64_t in_slice = keep(int64_t(my_row) * hidden + unit), in_batch = first * hidden + in_slice;
    Accumulator c[kElements], h_carried[kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      c[i] = h_carried[i] = 0;
      if (my_row + kStride * i < limit && real_unit) {
        if constexpr (Cell::kHasCellState)
          c[i] = widen(static_cast<const Scalar*>(p.c0)[in_batch + i * kStride * hidden]);
        if constexpr (Cell::kUsesHPrev)
          h_carried[i] = widen(static_cast<const Scalar*>(p.h0)[(first + my_row + kStride * i) * pitch + unit]);
      }
    }
    const char* const h0_at =
        keep(reinterpret_cast<const char*>(static_cast<const Scalar*>(p.h0) + first * pitch + piece0 * kPer));
    const char* const y_at = keep(reinterpret_cast<const char*>(static_cast<const Scalar*>(p.y) + piece0 * kPer));
    const Scalar* const x_at = keep(static_cast<const Scalar*>(p.x) + int64_t(my_row) * (kGates * hidden) + unit);

    const int direction = keep(p.reverse ? -1 : 1);
    int t = p.reverse ? int(p.steps) - 1 : 0;
    StepRows before, now = timeline.at(t);
    for (int left = int(p.steps) - 1; left >= 0; --left) {
      t += direction;
      StepRows next;
      if (left > 0) next = timeline.at(t);

      Scalar inputs[kElements][kGates];
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        if (my_row + kStride * i < now.rows && real_unit) {
          const Scalar* x = x_at + (now.offset + kStride * i) * (kGates * hidden);
#pragma unroll
          for (int g = 0; g < kGates; ++g) inputs[i][g] = x[g * hidden];
        }
      }

      const char* const h_at = keep(y_at + before.offset * row_bytes);
      const int last_row = now.rows - 1;
      const auto source = [&](int row) {
        row = min(row, last_row);
        return (row < before.rows ? h_at : h0_at) + int64_t(row) * row_bytes;
      };
      Sum* sums = all_sums + (sums_out + buffer);
      const auto multiply = [&](Piece(&h)[kChunks], const char* at, int row) {
        Accumulator acc[kMT][4];
        const bool recurrent = min(row, last_row) < before.rows;
        for (bool complete = inbox.template complete<Math::kExact>(at, h, recurrent, p, t - direction);;
             complete = true) {
#pragma unroll
          for (int m = 0; m < kMT; ++m)
#pragma unroll
            for (int j = 0; j < 4; ++j) acc[m][j] = 0;
#pragma unroll
          for (int c = 0; c < kChunks; ++c) {
            Math::prepare(h[c]);
#pragma unroll
            for (int m = 0; m < kMT; ++m) Math::multiply(acc[m], weights[c][2 * m], weights[c][2 * m + 1], h[c]);
          }
          if (complete || !any_nan(acc[0])) break;
          inbox.await(at, recurrent, p, t - direction);
          inbox.template fetch<0, kChunks>(at, h);
        }
#pragma unroll
        for (int a = 0; a < kAccs; ++a)
          if (h_gate<Cell>(a) < 0)  // zeros times an infinite h0 are NaN
            acc[a / 2][2 * (a % 2)] = acc[a / 2][2 * (a % 2) + 1] = 0;
        Sums::store(sums, acc);
        sums += 8 * kWarps * kForwardUnits;
      };
      if constexpr (kChunks <= 4) {
        // Two tiles in flight: the packets of the next one travel while this one is multiplied.
        Piece even[kChunks], odd[kChunks];
        const char *even_at = source(lane >> 2), *odd_at;
        if (now.rows > 0) inbox.template fetch<0, kChunks>(even_at, even);
        for (int row = lane >> 2, tile = 0; tile < now.rows; tile += 16, row += 16) {
          if (tile + 8 < now.rows) {
            odd_at = source(row + 8);
            inbox.template fetch<0, kChunks>(odd_at, odd);
          }
          multiply(even, even_at, row);
          if (tile + 8 < now.rows) {
            if (tile + 16 < now.rows) {
              even_at = source(row + 16);
              inbox.template fetch<0, kChunks>(even_at, even);
            }
            multiply(odd, odd_at, row + 8);
          }
        }
      } else {
#pragma unroll 1
        for (int row = lane >> 2, tile = 0; tile < now.rows; tile += 8, row += 8) {
          Piece packets[kChunks];
          const char* at = source(row);
          inbox.template fetch<0, kChunks>(at, packets);
          multiply(packets, at, row);
        }
      }
      __syncthreads();

      if (with_resets) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          const int row = my_row + kStride * i;
          if (row < now.rows && p.resets[now.offset + row]) {
            h_carried[i] = c[i] = 0;
            Sums::clear(all_sums + (sums_in + buffer) + i * kStride * kWarps * kForwardUnits);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const int row = my_row + kStride * i;
        if (4 * warp + kStride * i < now.rows) {  // the same for the whole warp: lanes of missing rows help to gather
          Accumulator acc[kAccs], h, c_now = 0, saved[kSavedOrOne<Cell>];
#pragma unroll
          for (int a = 0; a < kAccs; ++a) {
            constexpr auto gate = [](int acc) { return x_gate<Cell>(acc); };
            acc[a] = gate(a) >= 0 ? bias[a] + widen(inputs[i][gate(a) >= 0 ? gate(a) : 0]) : bias[a];
          }
          advance<Cell, Accumulator>(all_sums + (sums_in + buffer) + i * kStride * kWarps * kForwardUnits, acc,
                                     h_carried[i], c[i], h, c_now, saved);
          const Scalar stored = mailbox::encode(narrow<Scalar>(real_unit ? h : Accumulator(0)));
          const Piece packet = gather(stored);
          if (row < now.rows) {
            const int64_t at = (now.offset + kStride * i) * hidden + in_slice;
            if (sends) {
              const int64_t y_index = kWhole ? at : (now.offset + row) * pitch + unit;
              mailbox::put(static_cast<Scalar*>(p.y) + y_index, packet);
            }
            if (real_unit) {
              c[i] = c_now;
              h_carried[i] = widen(stored);
              if constexpr (Cell::kSaved > 0)
                if (p.gates)
                  store_pack<Scalar, Accumulator, Cell::kSaved>(static_cast<Scalar*>(p.gates) + at * Cell::kSaved,
                                                                saved);
              if constexpr (Cell::kHasCellState)
                if (p.cells) static_cast<Accumulator*>(p.cells)[at] = c_now;
              if (row >= next.rows) {
                static_cast<Scalar*>(p.h_n)[in_batch + i * kStride * hidden] = stored;
                if constexpr (Cell::kHasCellState)
                  static_cast<Scalar*>(p.c_n)[in_batch + i * kStride * hidden] = narrow<Scalar>(c_now);
              }
            }
          }
        }
      }
      buffer = buffer_sums - buffer;
      before = now;
      now = next;
    }
  }
}

template <typename Cell, typename Type, int kChunks, bool kWhole>
__global__ void __launch_bounds__(kThreads, 1) persistent_backward(const __grid_constant__ Backward p) {
  using Math = Arithmetic<Type>;
  using Scalar = typename Math::Scalar;
  using Accumulator = typename Math::Accumulator;
  using Sums = BackwardSums<Accumulator>;
  using Units = BackwardUnits<Cell, Accumulator>;
  constexpr int kPer = 16 / sizeof(Scalar), kAccs = Cell::kAccumulators, kSaved = kSavedOrOne<Cell>;
  constexpr int kPackets = kBackwardUnits / kPer;  // of 16 units
  // Packets in flight: what the registers allow.
  constexpr int kAhead = Math::kExact || kChunks <= 12 ? kChunks : kWhole ? 12 : 7;
  constexpr int kStage = 4 * kAccs * kBackwardUnits;  // what a warp stages: 4 rows x accumulators x 16 units
  __shared__ __align__(16) Accumulator all_sums[2 * Sums::kSize];
  __shared__ __align__(16) Scalar stages[kWarps][kStage];

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int hidden = int(p.hidden), pitch = kWhole ? hidden : (hidden + kPer - 1) / kPer * kPer,
            row_size = kAccs * pitch, weight_size = Cell::kGates * pitch;
  const int pieces = weight_size / kPer, piece0 = 4 * warp + (lane & 3);
  using DgatesBox = Inbox<kWhole, kChunks, Gap<Cell>::kAny>;
  constexpr bool kEven = kWhole && kChunks % Cell::kGates == 0;  // a gate's block ends with a chunk
  const DgatesBox inbox{
      DgatesBox::count(piece0, pieces),
      kEven ? kChunks / Cell::kGates * Gap<Cell>::kFirst : DgatesBox::count(piece0, Gap<Cell>::kFirst * (pitch / kPer)),
      Gap<Cell>::kWidth * (kEven ? 512 * (kChunks / Cell::kGates) : pitch * int(sizeof(Scalar)))};
  const char* const inbound = keep(reinterpret_cast<const char*>(static_cast<const Scalar*>(p.dgates) + piece0 * kPer));
  const int row_bytes = keep(row_size * int(sizeof(Scalar)));

  Piece weights[kChunks][2];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = int(blockIdx.x) * kBackwardUnits + (lane >> 2) + 8 * j;
      weights[c][j] = Piece{};
      if (row < hidden && piece0 + 32 * c < pieces) {
        weights[c][j] = load_piece<true>(static_cast<const Scalar*>(p.w_hh_t) + int64_t(row) * weight_size,
                                         (piece0 + 32 * c) * kPer, weight_size);
        Math::prepare(weights[c][j]);
      }
    }
  }

  // From here on a thread is row threadIdx / 8 and units 2 (threadIdx % 8) and the next of the block.
  const int unit = keep(int(blockIdx.x) * kBackwardUnits + 2 * (threadIdx.x & 7)), row = keep(int(threadIdx.x >> 3));
  const bool real[2] = {unit < hidden, unit + 1 < hidden};
  // A lane sends one packet of some rows of the warp's 4: rows, then accumulators, then packets of the 16
  // units by lane.
  constexpr int kRowsAtOnce = 32 / (kAccs * kPackets) < 4 ? 32 / (kAccs * kPackets) : 4;
  const int packet_row = keep(4 * warp + lane / (kAccs * kPackets)),
            packet_unit = int(blockIdx.x) * kBackwardUnits + lane % kPackets * kPer;
  const bool sends = packet_unit < pitch && lane < kRowsAtOnce * kAccs * kPackets;
  char* const packet_at = keep(reinterpret_cast<char*>(static_cast<Scalar*>(p.dgates) + int64_t(packet_row) * row_size +
                                                       lane / kPackets % kAccs * pitch + packet_unit));
  Scalar* const stage = stages[warp];
  const int with_options = keep(int(p.resets != nullptr || p.dcells != nullptr));
  const int sums_out = keep(Sums::lane_place()), sums_in = keep(Sums::place(row, 0, 2 * (threadIdx.x & 7)));
  int buffer = 0;

  // Two neighbours of a [rows, H] array; one access where both exist and the row length is even.
  const auto load_two = [&](const auto* from, Accumulator(&to)[2]) {
    using Element = std::remove_cv_t<std::remove_reference_t<decltype(*from)>>;
    if (kWhole) {
      const auto pair = *reinterpret_cast<const Pack<Element, 2>*>(from);
      to[0] = widen(pair.v[0]);
      to[1] = widen(pair.v[1]);
    } else {
#pragma unroll
      for (int j = 0; j < 2; ++j) to[j] = real[j] ? Accumulator(widen(from[j])) : Accumulator(0);
    }
  };

  for (int64_t first = int64_t(blockIdx.y) * p.slice_rows; first < p.batch;
       first += int64_t(gridDim.y) * p.slice_rows) {
    const int limit = int(p.batch - first < p.slice_rows ? p.batch - first : p.slice_rows);
    const Timeline timeline{p.offsets_device, p.batch, first, limit};
    const int64_t in_slice = keep(int64_t(row) * hidden + unit), in_batch = first * hidden + in_slice;
    Accumulator c_carried[2] = {}, dc_carried[2] = {}, dh_carried[2] = {};
    bool reset = false;  // the step done last

    const int direction = keep(p.reverse ? 1 : -1);
    int t = p.reverse ? 0 : int(p.steps) - 1;
    StepRows before, now = timeline.at(t);
    for (int left = int(p.steps) - 1; left >= 0; --left) {
      t += direction;
      StepRows next;
      if (left > 0) next = timeline.at(t);

      // What does not come from another block of this launch, asked for before the wait.
      Units u;
      Pack<Scalar, kWhole ? 2 * kSaved : kSaved> gates[kWhole ? 1 : 2];
      const int64_t at = now.offset * hidden + in_slice;
      const bool mine = row < now.rows && real[0];
      if (mine) {
        if constexpr (Cell::kSaved > 0) {
          const auto* from = reinterpret_cast<const std::remove_reference_t<decltype(gates[0])>*>(
              static_cast<const Scalar*>(p.gates) + at * kSaved);
          gates[0] = from[0];
          if constexpr (!kWhole) gates[1] = from[real[1] ? 1 : 0];
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          u.dh[j] = 0;
          u.c[j] = c_carried[j];
          u.dc[j] = dc_carried[j];
        }
        if (p.dy) load_two(static_cast<const Scalar*>(p.dy) + at, u.dh);
        if (row >= before.rows) {
          Accumulator more[2] = {};
          if (p.dh_n) load_two(static_cast<const Scalar*>(p.dh_n) + in_batch, more);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            u.dh[j] += more[j];
            u.dc[j] = 0;
          }
          if constexpr (Cell::kHasCellState) {
            load_two(static_cast<const Accumulator*>(p.cells) + at, u.c);
            if (p.dc_n) load_two(static_cast<const Scalar*>(p.dc_n) + in_batch, u.dc);
          }
        } else if constexpr (Cell::kDirectH) {
#pragma unroll
          for (int j = 0; j < 2; ++j) u.dh[j] += dh_carried[j];
        }
        const int64_t at_next = next.offset * hidden + in_slice;
        if constexpr (Cell::kHasCellState) {
          if (row < next.rows)
            load_two(static_cast<const Accumulator*>(p.cells) + at_next, u.c_prev);
          else
            load_two(static_cast<const Scalar*>(p.c0) + in_batch, u.c_prev);
#pragma unroll
          for (int j = 0; j < 2; ++j) c_carried[j] = u.c_prev[j];
        }
        if constexpr (Cell::kUsesH) load_two(static_cast<const Scalar*>(p.y) + at, u.h);
        if constexpr (Cell::kUsesHPrev) {
          if (row < next.rows)
            load_two(static_cast<const Scalar*>(p.y) + at_next, u.h_prev);
          else
            load_two(static_cast<const Scalar*>(p.h0) + in_batch, u.h_prev);
        }
      }

      const int recurrent_rows = keep(min(before.rows, now.rows)), tiled_rows = (recurrent_rows + 7) & ~7;
      const char* const dgates_at = keep(inbound + before.offset * row_bytes);
      Accumulator* sums = all_sums + (sums_out + buffer);
#pragma unroll 1
      for (int wanted = lane >> 2; wanted < tiled_rows; wanted += 8) {
        const char* from = dgates_at + int64_t(min(wanted, recurrent_rows - 1)) * row_bytes;
        Accumulator acc[4];
        Piece packets[kChunks];
        inbox.template fetch<0, kAhead>(from, packets);
        for (bool complete = inbox.template complete<Math::kExact>(from, packets, true, p, t - direction);;
             complete = true) {
#pragma unroll
          for (int j = 0; j < 4; ++j) acc[j] = 0;
          unrolled<kChunks>([&](auto index) {
            constexpr int c = decltype(index)::value;
            Math::prepare(packets[c]);
            Math::multiply(acc, weights[c][0], weights[c][1], packets[c]);
            if constexpr (c + kAhead < kChunks) inbox.template fetch<c + kAhead, c + kAhead + 1>(from, packets);
          });
          if (complete || !any_nan(acc)) break;
          inbox.await(from, true, p, t - direction);
          inbox.template fetch<0, kAhead>(from, packets);
        }
        Sums::store(sums, acc);
        sums += 8 * Sums::kPitch;
      }
      __syncthreads();

      if (4 * warp < now.rows) {  // the same for the whole warp
        if (mine) {
#pragma unroll
          for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int k = 0; k < Cell::kSaved; ++k)
              u.saved[j][k] = widen(kWhole ? gates[0].v[j * kSaved + k] : gates[kWhole ? 0 : j].v[k]);
          if (with_options) {
            if (reset && row < before.rows) {
              // Nothing came back from there.
              Sums::clear(all_sums + (sums_in + buffer));
#pragma unroll
              for (int j = 0; j < 2; ++j) u.dh[j] = u.dc[j] = 0;
              if (p.dy) load_two(static_cast<const Scalar*>(p.dy) + at, u.dh);
            }
            reset = p.resets && p.resets[now.offset + row];
            if (reset) {
#pragma unroll
              for (int j = 0; j < 2; ++j) u.c_prev[j] = u.h_prev[j] = 0;
            }
            if (Cell::kHasCellState && p.dcells) {
              Accumulator more[2];
              load_two(static_cast<const Accumulator*>(p.dcells) + at, more);
#pragma unroll
              for (int j = 0; j < 2; ++j) u.dc[j] += more[j];
            }
          }
          advance_back<Cell, Accumulator>(all_sums + (sums_in + buffer), row < recurrent_rows, u);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            dc_carried[j] = u.dc_prev[j];
            dh_carried[j] = u.dh_prev[j];
          }
        }
#pragma unroll
        for (int a = 0; a < kAccs; ++a) {
          Pack<Scalar, 2> pair;
#pragma unroll
          for (int j = 0; j < 2; ++j)
            pair.v[j] = mailbox::encode(narrow<Scalar>(kWhole || real[j] ? u.dacc[a][j] : Accumulator(0)));
          *reinterpret_cast<Pack<Scalar, 2>*>(stage + ((lane >> 3) * kAccs + a) * kBackwardUnits + 2 * (lane & 7)) =
              pair;
        }
        __syncwarp();
#pragma unroll
        for (int k = 0; k < 4; k += kRowsAtOnce)
          if (sends && packet_row + k < now.rows)
            mailbox::put(packet_at + (now.offset + k) * row_bytes,
                         *reinterpret_cast<const Piece*>(stage + (lane + k * kAccs * kPackets) * kPer));
        if (mine && row >= next.rows) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            if (!real[j]) continue;
            if constexpr (Cell::kHasCellState)
              static_cast<Scalar*>(p.dc0)[in_batch + j] = narrow<Scalar>(reset ? Accumulator(0) : u.dc_prev[j]);
            if constexpr (Cell::kDirectH)
              static_cast<Accumulator*>(p.dh_direct)[in_batch + j] = reset ? Accumulator(0) : u.dh_prev[j];
          }
        }
      }
      buffer = Sums::kSize - buffer;
      before = now;
      now = next;
    }
  }
}

template <typename Kernel, typename Params>
int launch(Kernel kernel, const Params& params, int units, int shared, cudaStream_t stream) {
  const unsigned blocks = unsigned((params.hidden + units - 1) / units);
  if (shared > 0) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  Params copy = params;
  void* arguments[] = {&copy};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(blocks, unsigned(params.groups)),
                                     dim3(kThreads), arguments, size_t(shared), stream);
}

// Calls run(chunks, whole) with the smallest compiled number of chunks that holds a row of weights. even: H is a
// multiple of a packet.
template <int... kCompiled, typename Run>
int with_chunks(int64_t row_bytes, bool even, const Run& run) {
  int result = cudaErrorInvalidValue;
  constexpr int kChunkBytes = 64 * kWarps;
  (void)((row_bytes <= kCompiled * kChunkBytes &&
          (result = even && row_bytes == kCompiled * kChunkBytes
                        ? run(std::integral_constant<int, kCompiled>(), std::true_type())
                        : run(std::integral_constant<int, kCompiled>(), std::false_type()),
           true)) ||
         ...);
  return result;
}

template <typename Cell, typename Type>
int forward(const Forward& p, cudaStream_t stream) {
  using Math = Arithmetic<Type>;
  const int shared = 2 * forward_buffer_bytes<ForwardSums<Cell, typename Math::Accumulator>>(p.slice_rows);
  const auto run = [&](auto chunks, auto whole) {
    return launch(persistent_forward<Cell, Type, chunks(), whole()>, p, kForwardUnits, shared, stream);
  };
  constexpr int kPer = 16 / int(sizeof(typename Math::Scalar));
  const int64_t row_bytes = (p.hidden + kPer - 1) / kPer * 16;
  const bool even = p.hidden % kPer == 0;
  if constexpr (kPer == 8)
    return with_chunks<1, 2, 3, 4>(row_bytes, even, run);
  else
    return with_chunks<2, 4, 6, 8>(row_bytes, even, run);
}

template <typename Cell, typename Type>
int backward(const Backward& p, cudaStream_t stream) {
  constexpr int kPer = 16 / int(sizeof(typename Arithmetic<Type>::Scalar));
  const auto run = [&](auto chunks, auto whole) {
    return launch(persistent_backward<Cell, Type, chunks(), whole()>, p, kBackwardUnits, 0, stream);
  };
  const int64_t row_bytes = (p.hidden + kPer - 1) / kPer * 16 * Cell::kGates;
  // Four chunks a gate, at least 8, at most what the registers hold; 3 gates end with a chunk where 4 would not.
  constexpr int kStep = Cell::kGates == 3 ? 3 : 4, kHeld = Arithmetic<Type>::kExact ? 12 : 16;
  constexpr int kMost = Cell::kGates == 4 ? kHeld : Cell::kGates == 3 ? 12 : 8;
  return with_chunks<kStep, 2 * kStep, kMost - kStep, kMost>(row_bytes, p.hidden % kPer == 0, run);
}

}  // namespace
}  // namespace fusedrnn

extern "C" int fusedrnn_persistent_forward(const FusedrnnForward* params, void* stream) {
  return fusedrnn::dispatch<false>(*params, [&](auto cell, auto type) {
    return fusedrnn::forward<typename decltype(cell)::Of, typename decltype(type)::Of>(
        fusedrnn::Forward{*params}, static_cast<cudaStream_t>(stream));
  });
}

extern "C" int fusedrnn_persistent_backward(const FusedrnnBackward* params, void* stream) {
  return fusedrnn::dispatch<false>(*params, [&](auto cell, auto type) {
    return fusedrnn::backward<typename decltype(cell)::Of, typename decltype(type)::Of>(
        fusedrnn::Backward{*params}, static_cast<cudaStream_t>(stream));
  });
}

extern "C" const char* fusedrnn_cell_name(int cell) {
#define FUSEDRNN_NAME(Cell) fusedrnn::Cell::kName,
  static const char* const names[] = {FUSEDRNN_CELLS(FUSEDRNN_NAME) nullptr};
#undef FUSEDRNN_NAME
  return names[cell];
}

extern "C" const char* fusedrnn_error_string(int error) { return cudaGetErrorString(cudaError_t(error)); }
