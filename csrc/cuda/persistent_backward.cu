#include "instances.h"
#include "persistent.cuh"

namespace fusedrnn {

template <typename Cell, typename Type, int kChunks, bool kWhole, typename Params>
__device__ __forceinline__ void persistent_backward(const Directions<Params>& all) {
  const Params& given = all.of[blockIdx.z];
  const FusedrnnBackward& p = plain(given);
  using Math = Arithmetic<Type>;
  using Scalar = typename Math::Scalar;
  using Accumulator = typename Math::Accumulator;
  using Sums = BackwardSums<Accumulator>;
  using Units = BackwardUnits<Cell, Accumulator>;
  constexpr int kPer = 16 / sizeof(Scalar), kAccs = Cell::kAccumulators, kSaved = kSavedOrOne<Cell>;
  using SavedPack = Pack<Scalar, kSaved>;
  constexpr int kPackets = kBackwardUnits / kPer;  // of 16 units
  // Packets in flight, and chains of mma side by side: what the registers allow.
  constexpr bool kFull = kChunks > 12 || (kChunks == 12 && (Math::kExact || (Gap<Cell>::kAny && !kWhole)));
  constexpr int kPart = !kFull ? kChunks : Math::kExact ? 2 : sizeof(Scalar) == 4 ? kChunks / 4 : kChunks / 2;
  constexpr int kChains = Math::kExact ? 1 : kFull && (sizeof(Scalar) == 4 || !kWhole) ? 2 : 4;
  constexpr int kStage = 4 * kAccs * kBackwardUnits;  // what a warp stages: 4 rows x accumulators x 16 units
  extern __shared__ __align__(16) unsigned char shared[];
  Accumulator* const all_sums = reinterpret_cast<Accumulator*>(shared);

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Share<kPer, kWhole, kBackwardUnits> share(given);
  const uint32_t hidden = share.hidden, pitch = share.pitch, row_size = kAccs * pitch;
  const int length = share.length, weight_size = Cell::kGates * length;
  const int pieces = weight_size / kPer, piece0 = 4 * warp + (lane & 3);
  using DgatesBox = Inbox<kWhole, kChunks, Gap<Cell>::kAny>;
  constexpr bool kEven = kWhole && kChunks % Cell::kGates == 0;  // a gate's block ends with a chunk
  const DgatesBox inbox{
      DgatesBox::count(piece0, pieces),
      kEven ? kChunks / Cell::kGates * Gap<Cell>::kFirst
            : DgatesBox::count(piece0, Gap<Cell>::kFirst * (length / kPer)),
      uint32_t(Gap<Cell>::kWidth) * (kEven ? 512 * (kChunks / Cell::kGates) : length * int(sizeof(Scalar)))};
  const char* const inbound = keep(reinterpret_cast<const char*>(static_cast<const Scalar*>(p.dgates) +
                                                                 share.head * kAccs * length + piece0 * kPer));
  const uint32_t row_bytes = keep(row_size * uint32_t(sizeof(Scalar)));

  Piece weights[kChunks][2];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = share.first + (lane >> 2) + 8 * j;
      weights[c][j] = Piece{};
      if (row < share.depth && piece0 + 32 * c < pieces) {
        weights[c][j] =
            load_piece<true>(static_cast<const Scalar*>(p.w_hh_t) + int64_t(share.head_unit + row) * weight_size,
                             (piece0 + 32 * c) * kPer, weight_size);
        Math::prepare(weights[c][j]);
      }
    }
  }

  // From here on a thread is row threadIdx / 8 and units 2 (threadIdx % 8) and the next of the block.
  const int in_head = keep(share.first + 2 * (threadIdx.x & 7)), row = keep(int(threadIdx.x >> 3));
  const int unit = in_head + share.head_unit, place = in_head + share.head_place;
  const bool real[2] = {in_head < share.depth, in_head + 1 < share.depth};
  // A lane sends one packet of some rows of the warp's 4: rows, then accumulators, then packets of the 16
  // units by lane.
  constexpr int kRowsAtOnce = 32 / (kAccs * kPackets) < 4 ? 32 / (kAccs * kPackets) : 4;
  const int packet_row = keep(4 * warp + lane / (kAccs * kPackets)), packet_unit = share.first + lane % kPackets * kPer;
  const bool sends = packet_unit < length && lane < kRowsAtOnce * kAccs * kPackets;
  char* const packet_at =
      keep(reinterpret_cast<char*>(static_cast<Scalar*>(p.dgates) + int64_t(packet_row) * row_size +
                                   (share.head * kAccs + lane / kPackets % kAccs) * length + packet_unit));
  Scalar* const stage = reinterpret_cast<Scalar*>(all_sums + 2 * Sums::kSize) + warp * kStage;
  const int with_options = keep(int(p.resets != nullptr || p.dcells != nullptr));
  const int sums_out = keep(Sums::lane_place()), sums_in = keep(Sums::place(row, 0, 2 * (threadIdx.x & 7)));
  const int from_run = sums_out - Sums::place(0, warp, 0);  // beyond the beginning of what a warp has of a tile
  int parity = 0;                                           // of the step
  constexpr int kOthers = backward_states(Cell::kStates);
  int64_t of_state = 0, of_rows = 0;
  if constexpr (kOwn) of_state = p.batch * hidden, of_rows = given.rows * hidden;

  // Copied ahead, in two buffers: of a thread's two units side by side what is saved, dy, h, h', every dcells and c';
  // resets by row; offsets by warp.
  using Two = Pack<Scalar, 2>;
  using TwoWide = Pack<Accumulator, 2>;
  constexpr int kUnitBytes = Cell::kSaved * int(sizeof(Scalar));  // saved of a unit
  constexpr int kAhead = backward_ahead_bytes(Cell::kSaved, kOthers, sizeof(Scalar), sizeof(Accumulator)) / 2;
  unsigned char* const ahead =
      reinterpret_cast<unsigned char*>(all_sums + 2 * Sums::kSize) + backward_stage_bytes(kAccs, sizeof(Scalar));
  unsigned char* const my_saved = ahead + threadIdx.x * (2 * kUnitBytes);
  TwoWide* const my_wide = reinterpret_cast<TwoWide*>(ahead + kThreads * 2 * kUnitBytes) + threadIdx.x;
  Two* const my_twos =
      reinterpret_cast<Two*>(ahead + kThreads * 2 * (kUnitBytes + 2 * kOthers * int(sizeof(Accumulator)))) +
      threadIdx.x;
  int32_t* const my_reset = reinterpret_cast<int32_t*>(ahead + kAhead - kWarps * kOffsetsOfStep) - kBackwardRows + row;
  unsigned char* const offset_stage = ahead + kAhead + (warp - kWarps) * kOffsetsOfStep;
  const uint32_t shared_base = shared_address(shared);
  const auto address_of = [&](const void* at) {
    return shared_base + uint32_t(static_cast<const unsigned char*>(at) - shared);
  };
  const uint32_t saved_to = address_of(my_saved), wide_to = address_of(my_wide), twos_to = address_of(my_twos),
                 reset_to = address_of(my_reset), offsets_to = address_of(offset_stage);
  constexpr int kWide = kThreads * int(sizeof(TwoWide)), kTwos = kThreads * int(sizeof(Two));
  // Where they are in a buffer: of the wide ones every dcells, then every c'; of the others dy, h, h'.
  const auto saved_of = [&](int parity, int j) {
    return reinterpret_cast<const SavedPack*>(my_saved + parity * kAhead + j * kUnitBytes);
  };
  const auto wide_of = [&](int parity, int which) {
    return reinterpret_cast<const TwoWide*>(reinterpret_cast<unsigned char*>(my_wide) + parity * kAhead +
                                            which * kWide);
  };
  const auto two_of = [&](int parity, int which) {
    return reinterpret_cast<const Two*>(reinterpret_cast<unsigned char*>(my_twos) + parity * kAhead + which * kTwos);
  };
  const auto reset_of = [&](int parity) { return my_reset[parity * (kAhead / 4)]; };

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
  const auto read_two = [](const auto* from, Accumulator(&to)[2]) {
    to[0] = widen(from->v[0]);
    to[1] = widen(from->v[1]);
  };
  const auto copy_wide = [&](uint32_t to, const Accumulator* from) {
    if constexpr (kWhole) {
      copy_async<sizeof(TwoWide)>(to, from);
    } else {
      copy_async<sizeof(Accumulator)>(to, from);
      if (real[1]) copy_async<sizeof(Accumulator)>(to + int(sizeof(Accumulator)), from + 1);
    }
  };

  for (int64_t first = int64_t(blockIdx.y) * p.slice_rows; first < p.batch;
       first += int64_t(Math::kExact ? p.groups : int(gridDim.y)) * p.slice_rows) {
    const int limit = int(p.batch - first < p.slice_rows ? p.batch - first : p.slice_rows);
    const Timeline timeline{p.offsets_device, p.batch, first, limit};
    const int64_t in_slice = keep(int64_t(row) * hidden + unit), in_batch = first * hidden + in_slice;
    Accumulator carried[kOthers][2] = {}, d_carried[kSlots<Cell>][2] = {};
    bool reset = false;  // the step done last

    const int direction = keep(p.reverse ? 1 : -1);
    int t = p.reverse ? 0 : int(p.steps) - 1;
    // For `step`, that `then` follows in the order of this loop.
    const auto copy_ahead = [&](const StepRows& step, const StepRows& then, int parity) {
      if (row >= step.rows) return;
      const int buffer = parity * kAhead;
      if (p.resets && (threadIdx.x & 7) == 0)
        copy_async<4>(reset_to + buffer, reinterpret_cast<const int32_t*>(p.resets) + step.offset + row);
      if (!real[0]) return;
      const int64_t at = step.offset * hidden + in_slice, at_then = then.offset * hidden + in_slice;
      const int64_t padded = kWhole ? at : (step.offset + row) * pitch + place,
                    padded_then = kWhole ? at_then : (then.offset + row) * pitch + place;
      if constexpr (Cell::kSaved > 0) {
        const char* const from = static_cast<const char*>(p.gates) + at * kUnitBytes;
        if constexpr (kWhole) {
          copy_bytes<2 * kUnitBytes>(saved_to + buffer, from);
        } else {
          copy_bytes<kUnitBytes>(saved_to + buffer, from);
          if (real[1]) copy_bytes<kUnitBytes>(saved_to + buffer + kUnitBytes, from + kUnitBytes);
        }
      }
      if (p.dy) copy_async<sizeof(Two)>(twos_to + buffer, static_cast<const Scalar*>(p.dy) + padded);
      if constexpr (Cell::kUsesH)
        copy_async<sizeof(Two)>(twos_to + buffer + kTwos, static_cast<const Scalar*>(p.y) + padded);
      if constexpr (Cell::kUsesHPrev)
        if (row < then.rows)
          copy_async<sizeof(Two)>(twos_to + buffer + 2 * kTwos, static_cast<const Scalar*>(p.y) + padded_then);
#pragma unroll
      for (int k = 0; k < Cell::kStates - 1; ++k) {
        const int64_t on = k * of_rows;
        if (p.dcells) copy_wide(wide_to + buffer + k * kWide, static_cast<const Accumulator*>(p.dcells) + at + on);
        if (row < then.rows)
          copy_wide(wide_to + buffer + (kOthers + k) * kWide, static_cast<const Accumulator*>(p.cells) + at_then + on);
      }
    };

    StepRows before, now = timeline.at(t), next, then;
    if (p.steps > 1) next = timeline.at(t + direction);
    if (p.steps > 2) then = timeline.at(t + 2 * direction);
    __syncwarp();
    copy_ahead(now, next, parity);
    if (p.steps > 3) timeline.copy_ahead(t + 3 * direction, offsets_to + parity * kAhead);
    end_group();
    for (int left = int(p.steps) - 1; left >= 0; --left) {
      t += direction;
      __syncwarp();  // all lanes have read what is overwritten
      copy_ahead(next, then, parity ^ 1);
      if (left > 3) timeline.copy_ahead(t + 3 * direction, offsets_to + (parity ^ 1) * kAhead);
      end_group();

      const int recurrent_rows = keep(min(before.rows, now.rows)), tiled_rows = (recurrent_rows + 7) & ~7;
      const char* const dgates_at = keep(inbound + before.offset * row_bytes);
      const int buffer = parity * Sums::kSize;
      Accumulator* sums = all_sums + (sums_out + buffer);
      const auto row_at = [&](int row) { return dgates_at + int64_t(min(row, recurrent_rows - 1)) * row_bytes; };
      Flight<kPart> flight;
      flight.recurrent = true;
      if (tiled_rows > 0) {
        flight.at = row_at(lane >> 2);
        inbox.first(flight, p, t - direction);
      }
#pragma unroll 1
      for (int tile = 0; tile < tiled_rows; tile += 8) {
        Accumulator acc[kChains][4] = {};
        [[maybe_unused]] ExactTile<2> exact;
        const char* const next_at = row_at(tile + 8 + (lane >> 2));
        const bool more = tile + 8 < tiled_rows;
        unrolled<kChunks / kPart>([&](auto part) {
          constexpr int begin = decltype(part)::value * kPart, next = (begin + kPart) % kChunks;
          inbox.template settle<begin>(p, t - direction, flight);
          if (next == 0) flight.at = next_at;
          // Where a packet leaves its register, the one that is multiplied there next is asked for.
          unrolled<kPart>([&](auto index) {
            constexpr int c = decltype(index)::value;
            if constexpr (Math::kExact) {
              unsigned char* const rows = reinterpret_cast<unsigned char*>(sums - from_run);
              exact.template stage<Sums::kPitch* int(sizeof(Accumulator))>(flight.p[c], rows);
              if (next > 0 || more) inbox.template fetch<next + c>(flight.at, flight.p[c]);
              exact.template multiply<Sums::kPitch* int(sizeof(Accumulator))>(weights[begin + c], rows);
            } else {
              Math::prepare(flight.p[c]);
#pragma unroll
              for (int part = 0; part < Math::kParts; ++part)
                Math::multiply_part(part, acc[(c * Math::kParts + part) % kChains], weights[begin + c][0],
                                    weights[begin + c][1], flight.p[c]);
              if (next > 0 || more) inbox.template fetch<next + c>(flight.at, flight.p[c]);
            }
          });
        });
        if constexpr (Math::kExact) exact.add_up(reinterpret_cast<Accumulator(&)[1][4]>(acc[0]));
#pragma unroll
        for (int k = kChains / 2; k > 0; k /= 2)
#pragma unroll
          for (int i = 0; i < k; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) acc[i][j] += acc[i + k][j];
        Sums::store(sums, acc[0]);
        sums += 8 * Sums::kPitch;
      }
      __syncthreads();
      await_groups<1>();

      if (4 * warp < now.rows) {  // the same for the whole warp
        Units u;
        const bool mine = row < now.rows && real[0];
        if (mine) {
          Accumulator dy[2] = {};
          if (p.dy) read_two(two_of(parity, 0), dy);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            u.d[0][j] = dy[j];
#pragma unroll
            for (int k = 1; k < kSlots<Cell>; ++k) {
              u.next[k][j] = carried[k - 1][j];
              u.d[k][j] = d_carried[k][j];
            }
#pragma unroll
            for (int k = 0; k < Cell::kSaved; ++k) u.saved[j][k] = widen(saved_of(parity, j)->v[k]);
          }
          if (row >= before.rows) {  // rows that begin here, which are few
            Accumulator more[2] = {};
            if (p.dh_n) load_two(static_cast<const Scalar*>(p.dh_n) + in_batch, more);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              u.d[0][j] += more[j];
#pragma unroll
              for (int k = 1; k < kSlots<Cell>; ++k) u.d[k][j] = 0;
            }
#pragma unroll
            for (int k = 1; k < Cell::kStates; ++k) {
              load_two(static_cast<const Accumulator*>(p.cells) + now.offset * hidden + in_slice + (k - 1) * of_rows,
                       u.next[k]);
              if (p.dc_n) load_two(static_cast<const Scalar*>(p.dc_n) + in_batch + (k - 1) * of_state, u.d[k]);
            }
          } else if constexpr (Cell::kDirectH) {
#pragma unroll
            for (int j = 0; j < 2; ++j) u.d[0][j] += d_carried[0][j];
          }
#pragma unroll
          for (int k = 1; k < Cell::kStates; ++k) {
            if (row < next.rows)
              read_two(wide_of(parity, kOthers + k - 1), u.prev[k]);
            else
              load_two(static_cast<const Scalar*>(p.c0) + in_batch + (k - 1) * of_state, u.prev[k]);
#pragma unroll
            for (int j = 0; j < 2; ++j) carried[k - 1][j] = u.prev[k][j];
          }
          if constexpr (Cell::kUsesH) read_two(two_of(parity, 1), u.next[0]);
          if constexpr (Cell::kUsesHPrev) {
            if (row < next.rows)
              read_two(two_of(parity, 2), u.prev[0]);
            else
              load_two(static_cast<const Scalar*>(p.h0) + in_batch, u.prev[0]);
          }
          if (with_options) {
            if (reset && row < before.rows) {
              // Nothing came back from there.
              Sums::clear(all_sums + (sums_in + buffer));
#pragma unroll
              for (int j = 0; j < 2; ++j) {
                u.d[0][j] = dy[j];
#pragma unroll
                for (int k = 1; k < kSlots<Cell>; ++k) u.d[k][j] = 0;
              }
            }
            reset = p.resets && reset_of(parity);
            if (reset) {
#pragma unroll
              for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int k = 0; k < kSlots<Cell>; ++k) u.prev[k][j] = 0;
            }
            if (kHasCellState<Cell> && p.dcells) {
#pragma unroll
              for (int k = 1; k < Cell::kStates; ++k) {
                Accumulator more[2];
                read_two(wide_of(parity, k - 1), more);
#pragma unroll
                for (int j = 0; j < 2; ++j) u.d[k][j] += more[j];
              }
            }
          }
          if constexpr (kOwn) {
            const int64_t at = now.offset * hidden + in_slice;
#pragma unroll
            for (int j = 0; j < 2; ++j)
              if (real[j])
                u.load_own(j, static_cast<const Scalar*>(given.parameters) + unit + j, hidden,
                           static_cast<const Scalar*>(given.inputs) + at + j, of_rows);
          }
          advance_back<Cell, Accumulator>(all_sums + (sums_in + buffer), row < recurrent_rows, u);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int k = 0; k < kSlots<Cell>; ++k) d_carried[k][j] = u.dprev[k][j];
            if constexpr (kOwn) {
              const int64_t at = now.offset * hidden + in_slice + j;
              if (real[j])
                u.store_own(j, static_cast<Scalar*>(given.dparameters) + at, static_cast<Scalar*>(given.dinputs) + at,
                            of_rows);
            }
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
#pragma unroll
            for (int k = 1; k < Cell::kStates; ++k)
              static_cast<Scalar*>(p.dc0)[in_batch + j + (k - 1) * of_state] =
                  narrow<Scalar>(reset ? Accumulator(0) : u.dprev[k][j]);
            if constexpr (Cell::kDirectH)
              static_cast<Accumulator*>(p.dh_direct)[in_batch + j] = reset ? Accumulator(0) : u.dprev[0][j];
          }
        }
      }
      before = now;
      now = next;
      next = then;
      then = left > 2 ? timeline.copied(t + 2 * direction, offset_stage + parity * kAhead) : StepRows();
      parity ^= 1;
    }
  }
}

}  // namespace fusedrnn

// Left to choose how many blocks share a multiprocessor, the compiler spills to fit one more.
#define FUSEDRNN_KERNEL(Cell, dtype, size, rows)                                                     \
  extern "C" __global__ void __launch_bounds__(fusedrnn::kThreads, 1)                                \
      persistent_backward_##Cell##_##dtype##_##size##_##rows(                                        \
          const __grid_constant__ fusedrnn::Directions<fusedrnn::BackwardOf> p) {                    \
    fusedrnn::persistent_backward<fusedrnn::Cell, fusedrnn::dtypes::dtype, size, fusedrnn::rows>(p); \
  }
FUSEDRNN_PERSISTENT_BACKWARD(FUSEDRNN_KERNEL)
