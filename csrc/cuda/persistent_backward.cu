#include "instances.h"
#include "persistent.cuh"

namespace fusedrnn {

template <typename Cell, typename Type, int kChunks, bool kWhole>
__device__ __forceinline__ void persistent_backward(const FusedrnnBackward& p) {
  using Math = Arithmetic<Type>;
  using Scalar = typename Math::Scalar;
  using Accumulator = typename Math::Accumulator;
  using Sums = BackwardSums<Accumulator>;
  using Units = BackwardUnits<Cell, Accumulator>;
  constexpr int kPer = 16 / sizeof(Scalar), kAccs = Cell::kAccumulators, kSaved = kSavedOrOne<Cell>;
  using SavedPack = Pack<Scalar, kWhole ? 2 * kSaved : kSaved>;  // of one access
  constexpr int kPackets = kBackwardUnits / kPer;                // of 16 units
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
    if (kWhole) {
      const auto pair = pair_at(from);
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
      SavedPack gates[kWhole ? 1 : 2];
      const int64_t at = now.offset * hidden + in_slice;
      const bool mine = row < now.rows && real[0];
      if (mine) {
        if constexpr (Cell::kSaved > 0) {
          const auto* from = reinterpret_cast<const SavedPack*>(static_cast<const Scalar*>(p.gates) + at * kSaved);
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

}  // namespace fusedrnn

// Left to choose how many blocks share a multiprocessor, the compiler spills to fit one more.
#define FUSEDRNN_KERNEL(Cell, dtype, size, rows)                                                           \
  extern "C" __global__ void __launch_bounds__(fusedrnn::kThreads, 1)                                      \
      persistent_backward_##Cell##_##dtype##_##size##_##rows(const __grid_constant__ FusedrnnBackward p) { \
    fusedrnn::persistent_backward<fusedrnn::Cell, fusedrnn::dtypes::dtype, size, fusedrnn::rows>(p);       \
  }
FUSEDRNN_PERSISTENT_BACKWARD(FUSEDRNN_KERNEL)
