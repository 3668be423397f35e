// Persistent forward: a block owns 8 or 16 units. With 16 it holds twice the weights, and h crosses L2 half as often.
#pragma once

#include "persistent.cuh"

namespace fusedrnn {

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

template <typename Cell, typename Type, int kUnits, int kChunks, bool kWhole, typename Params>
__device__ __forceinline__ void persistent_forward(const Directions<Params>& all) {
  const Params& given = all.of[blockIdx.z];
  const FusedrnnForward& p = plain(given);
  using Math = Arithmetic<Type>;
  using Scalar = typename Math::Scalar;
  using Accumulator = typename Math::Accumulator;
  using Sums = ForwardSums<Cell, Accumulator, kUnits>;
  using Sum = typename Sums::Sum;
  constexpr int kPer = 16 / sizeof(Scalar), kGates = Cell::kGates, kAccs = Cell::kAccumulators;
  // A lane's rows of weights, two an m-tile: of each of its units those of the accumulators that h feeds.
  constexpr int kEights = kUnits / 8, kFed = fed_by_h<Cell>(), kRows = kEights * kFed, kMT = (kRows + 1) / 2;
  // What the registers hold beside the weights: tiles of 8 rows that are multiplied side by side, packets in flight.
  constexpr int kTiles = kChunks <= (kEights == 1 ? 4 : 3) && !Math::kExact ? 2 : 1;
  constexpr bool kOverlap = !Math::kExact && kChunks <= 6;  // packets are asked for while others are multiplied
  constexpr bool kFull = kChunks * kEights == 8;            // of weights
  constexpr int kPart = Math::kExact ? 2 : kChunks <= 6 ? kChunks : kChunks / 2;
  constexpr bool kLate = kOverlap || Math::kExact;  // gates are stored after all packets: what the registers allow
  constexpr int kElements = forward_rows(kUnits) * kUnits / kThreads, kStride = kThreads / kUnits;
  // Where weights leave few registers, the compiler may compute addresses again, and what both directions have in
  // common is read from the first: its place takes no register. Which step it is follows from how many are left.
  constexpr bool kTight = kFull && Math::kExact, kKeepsBias = !kTight;
  const FusedrnnForward& common = plain(all.of[kTight ? 0 : blockIdx.z]);
  const auto keep = [](auto value) { return kTight ? value : fusedrnn::keep(value); };
  extern __shared__ __align__(16) unsigned char shared[];

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Share<kPer, kWhole, kUnits> share(all.of[kTight ? 0 : blockIdx.z]);
  const uint32_t hidden = share.hidden, pitch = share.pitch;  // unsigned: half of a product of 64 bits is zero
  const int length = share.length, pieces = length / kPer, piece0 = 4 * warp + (lane & 3);
  const Inbox<kWhole, kChunks> inbox{Inbox<kWhole, kChunks>::count(piece0, pieces)};

  const uint32_t row_bytes = keep(pitch * uint32_t(sizeof(Scalar)));

  Piece weights[kChunks][2 * kMT];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int a = 0; a < 2 * kMT; ++a) {
      const int gate = h_gate<Cell>(fed_accumulator<Cell>(a % kFed));
      const int lane_unit = share.first + 8 * (a / kFed) + (lane >> 2);
      weights[c][a] = Piece{};
      if (a < kRows && lane_unit < share.depth && piece0 + 32 * c < pieces) {
        const Scalar* row =
            static_cast<const Scalar*>(p.w_hh) + (int64_t(gate) * hidden + share.head_unit + lane_unit) * length;
        weights[c][a] = load_piece<true>(row, (piece0 + 32 * c) * kPer, length);
        Math::prepare(weights[c][a]);
      }
    }
  }

  // From here on a thread is row my_row + kStride i and unit `own` of the block.
  const int own = int(threadIdx.x) % kUnits;
  const int in_head = keep(share.first + own), my_row = keep(int(threadIdx.x) / kUnits);
  // Of all units, and of all with each head padded to whole packets.
  const int unit = in_head + share.head_unit, place = in_head + share.head_place;
  const bool real_unit = in_head < share.depth, sends = (lane & (kPer - 1)) == 0 && in_head < length;
  const auto bias_of = [&](int a) {
    const int gate = h_gate<Cell>(a);
    return p.b_hh && gate >= 0 && real_unit
               ? Accumulator(widen(static_cast<const Scalar*>(p.b_hh)[int64_t(gate) * hidden + unit]))
               : Accumulator(0);
  };
  Accumulator bias[kAccs];
  if constexpr (kKeepsBias) {
#pragma unroll
    for (int a = 0; a < kAccs; ++a) bias[a] = bias_of(a);
  }
  int64_t of_state = 0, of_rows = 0;
  Accumulator parameters[kParameterSlots<Cell>];
  const Scalar* inputs_at = nullptr;
  if constexpr (kOwn) {
    of_state = common.batch * hidden, of_rows = given.rows * hidden;
    inputs_at = static_cast<const Scalar*>(given.inputs);
#pragma unroll
    for (int k = 0; k < Cell::kParameters; ++k)
      parameters[k] = real_unit ? Accumulator(widen(static_cast<const Scalar*>(given.parameters)[k * hidden + unit]))
                                : Accumulator(0);
  }
  Sum* const all_sums = reinterpret_cast<Sum*>(shared);
  const int with_resets = keep(int(p.resets != nullptr));
  const int sums_out = keep(Sums::lane_place()), sums_in = keep(Sums::place(my_row, 0, own));
  const int from_run = sums_out - warp * kUnits;  // beyond the beginning of what a warp has of a row
  const int buffer_sums = forward_buffer_bytes(common.slice_rows, Sums::kBytesPerRow) / int(sizeof(Sum));
  int parity = 0;  // of the step

  // Copied ahead: [2][gate][row][unit], [2][row] resets, [2][warp] offsets. A row's lanes copy a packet each.
  constexpr int kPackets = kUnits / kPer;  // of a gate
  const int stage_rows = (common.slice_rows + 7) & ~7, stage_size = stage_rows * kGates * kUnits;
  Scalar* const stage = reinterpret_cast<Scalar*>(all_sums + 2 * buffer_sums);
  int32_t* const reset_stage = reinterpret_cast<int32_t*>(stage + 2 * stage_size);
  unsigned char* const offset_stage =
      reinterpret_cast<unsigned char*>(reset_stage + 2 * stage_rows) + 2 * warp * kOffsetsOfStep;
  const int copied_gate = own / kPackets, copied_unit = own % kPackets * kPer;
  const bool copies = copied_gate < kGates && share.first + copied_unit < length;
  const char* const x_at = keep(reinterpret_cast<const char*>(static_cast<const Scalar*>(p.x) +
                                                              (int64_t(my_row) * kGates + copied_gate) * pitch +
                                                              share.head_place + share.first + copied_unit));
  const uint32_t shared_base = shared_address(shared);
  const auto address_of = [&](const void* at) {
    return shared_base + uint32_t(static_cast<const unsigned char*>(at) - shared);
  };
  const uint32_t x_to = address_of(stage + (copied_gate * stage_rows + my_row) * kUnits + copied_unit),
                 reset_to = address_of(reset_stage + my_row), offsets_to = address_of(offset_stage);
  const uint32_t x_row = kGates * pitch * uint32_t(sizeof(Scalar));
  const auto copy_ahead = [&](const StepRows& step, int parity) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if (my_row + kStride * i < step.rows) {
        if (copies)
          copy_async<16>(x_to + (parity * stage_size + i * kStride * kUnits) * int(sizeof(Scalar)),
                         x_at + (step.offset + kStride * i) * x_row);
        if (with_resets && own == 0)
          copy_async<4>(reset_to + (parity * stage_rows + kStride * i) * 4,
                        reinterpret_cast<const int32_t*>(p.resets) + step.offset + my_row + kStride * i);
      }
    }
  };

  for (int64_t first = int64_t(blockIdx.y) * common.slice_rows; first < common.batch;
       first += int64_t(kTight ? common.groups : int(gridDim.y)) * common.slice_rows) {
    const int limit = int(common.batch - first < common.slice_rows ? common.batch - first : common.slice_rows);
    const Timeline timeline{p.offsets_device, common.batch, first, limit};
    const int64_t in_slice = keep(int64_t(my_row) * hidden + unit), in_batch = first * hidden + in_slice;
    Accumulator carried[kElements][kSlots<Cell>];  // h, c and other states
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
#pragma unroll
      for (int k = 0; k < kSlots<Cell>; ++k) carried[i][k] = 0;
      if (my_row + kStride * i < limit && real_unit) {
#pragma unroll
        for (int k = 1; k < Cell::kStates; ++k)
          carried[i][k] = widen(static_cast<const Scalar*>(p.c0)[in_batch + i * kStride * hidden + (k - 1) * of_state]);
        if constexpr (Cell::kUsesHPrev)
          carried[i][0] = widen(static_cast<const Scalar*>(p.h0)[(first + my_row + kStride * i) * pitch + place]);
      }
    }
    const char* const h0_at = keep(reinterpret_cast<const char*>(static_cast<const Scalar*>(p.h0) + first * pitch +
                                                                 share.head_place + piece0 * kPer));
    const char* const y_at =
        keep(reinterpret_cast<const char*>(static_cast<const Scalar*>(p.y) + share.head_place + piece0 * kPer));

    const int direction = keep(p.reverse ? -1 : 1);
    int t = p.reverse ? int(common.steps) - 1 : 0;
    StepRows before, now = timeline.at(t), next;
    if (common.steps > 1) next = timeline.at(t + direction);
    __syncwarp();
    copy_ahead(now, parity);
    if (common.steps > 2) timeline.copy_ahead(t + 2 * direction, offsets_to + parity * kOffsetsOfStep);
    end_group();
    const auto step_at = [&](int left) { return p.reverse ? left : int(common.steps) - 1 - left; };
    for (int left = int(common.steps) - 1; left >= 0; --left) {
      t += direction;
      __syncwarp();  // all lanes have read what is overwritten
      copy_ahead(next, parity ^ 1);
      if (left > 2)
        timeline.copy_ahead(kTight ? step_at(left - 3) : t + 2 * direction, offsets_to + (parity ^ 1) * kOffsetsOfStep);
      end_group();

      const int step = kTight ? step_at(left) : t - direction;
      const char* const h_at = keep(y_at + before.offset * row_bytes);
      const int last_row = now.rows - 1;
      const auto aim = [&](Flight<kPart>& f, int row) {
        row = min(row, last_row);
        f.recurrent = row < before.rows;
        f.at = (f.recurrent ? h_at : h0_at) + int64_t(row) * row_bytes;
      };
      const int buffer = parity * buffer_sums;
      Sum* sums = all_sums + (sums_out + buffer);
      Flight<kPart> flights[kTiles];
      // The product of one or two tiles of rows; where packets leave a register, those of the next tiles are asked for.
      const auto multiply = [&](auto tiles, int next_tile) {
        constexpr int n = decltype(tiles)::value,
                      kSplit = kOverlap && n * kEights == 1 ? 2 : 1;  // chains of mma side by side
        Accumulator acc[n][kSplit][kMT][4] = {};
        [[maybe_unused]] ExactTile<kRows> exact;
        bool more[n];
#pragma unroll
        for (int i = 0; i < n; ++i) more[i] = next_tile + 8 * i < now.rows;
        unrolled<kChunks / kPart>([&](auto portion) {
          constexpr int begin = decltype(portion)::value * kPart, next = (begin + kPart) % kChunks;
          if constexpr (n == 2)
            inbox.template settle<begin>(p, step, flights[0], flights[kTiles - 1]);
          else
            inbox.template settle<begin>(p, step, flights[0]);
          if constexpr (next == 0)
#pragma unroll
            for (int i = 0; i < n; ++i)
              if (more[i]) aim(flights[i], next_tile + 8 * i + (lane >> 2));
          const auto fetch = [&](auto index) {
            constexpr int c = decltype(index)::value;
            unrolled<n>([&](auto tile) {
              constexpr int i = decltype(tile)::value;
              if (next > 0 || more[i]) inbox.template fetch<next + c>(flights[i].at, flights[i].p[c]);
            });
          };
          unrolled<kPart>([&](auto index) {
            constexpr int c = decltype(index)::value;
            if constexpr (Math::kExact) {
              unsigned char* const rows = reinterpret_cast<unsigned char*>(sums - from_run);
              exact.template stage<Sums::kBytesPerRow>(flights[0].p[c], rows);
              fetch(index);
              exact.template multiply<Sums::kBytesPerRow>(weights[begin + c], rows);
            } else {
#pragma unroll
              for (int i = 0; i < n; ++i) Math::prepare(flights[i].p[c]);
#pragma unroll
              for (int part = 0; part < Math::kParts; ++part)
#pragma unroll
                for (int i = 0; i < n; ++i)
#pragma unroll
                  for (int m = 0; m < kMT; ++m)
                    Math::multiply_part(part, acc[i][(c * Math::kParts + part) % kSplit][m], weights[begin + c][2 * m],
                                        weights[begin + c][2 * m + 1], flights[i].p[c]);
            }
            if constexpr (kOverlap) fetch(index);
          });
          if constexpr (!kOverlap && !Math::kExact) unrolled<kPart>(fetch);
        });
        if constexpr (Math::kExact) exact.add_up(acc[0][0]);
#pragma unroll
        for (int i = 0; i < n; ++i) {
#pragma unroll
          for (int m = 0; m < kMT; ++m)
#pragma unroll
            for (int j = 0; j < 4 * (kSplit - 1); ++j) acc[i][0][m][j] += acc[i][kSplit - 1][m][j];
          Accumulator of[kEights * kMTiles<Cell>][4] = {};
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const int a = fed_accumulator<Cell>(r % kFed);
#pragma unroll
            for (int j = 0; j < 2; ++j)
              of[r / kFed * kMTiles<Cell> + a / 2][2 * (a % 2) + j] = acc[i][0][r / 2][2 * (r % 2) + j];
          }
          Sums::store(sums, of);
          sums += 8 * kWarps * kUnits;
        }
      };
      if (now.rows > 0) {
        aim(flights[0], lane >> 2);
        inbox.first(flights[0], p, step);
        if (kTiles > 1 && now.rows > 8) {
          aim(flights[kTiles - 1], 8 + (lane >> 2));
          unrolled<kPart>([&](auto index) {
            inbox.template fetch<decltype(index)::value>(flights[kTiles - 1].at, flights[kTiles - 1].p[index.value]);
          });
        }
      }
#pragma unroll 1
      for (int tile = 0; tile < now.rows; tile += 8 * kTiles) {
        if (kTiles > 1 && tile + 8 < now.rows) {
          multiply(Constant<kTiles>(), tile + 8 * kTiles);
        } else {
          multiply(Constant<1>(), tile + 8 * kTiles);
        }
      }
      __syncthreads();
      await_groups<1>();

      if (with_resets) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          const int row = my_row + kStride * i;
          if (row < now.rows && reset_stage[parity * stage_rows + row]) {
#pragma unroll
            for (int k = 0; k < kSlots<Cell>; ++k) carried[i][k] = 0;
            Sums::clear(all_sums + (sums_in + buffer) + i * kStride * kWarps * kUnits);
          }
        }
      }
      Pack<Scalar, kSavedOrOne<Cell>> saved[kElements] = {};
      const auto store = [&](int i) {  // nobody waits for this
        const int row = my_row + kStride * i;
        if (row >= now.rows || !real_unit) return;
        const int64_t at = (now.offset + kStride * i) * hidden + in_slice;
        if constexpr (Cell::kSaved > 0)
          if (p.gates) reinterpret_cast<Pack<Scalar, Cell::kSaved>*>(static_cast<Scalar*>(p.gates))[at] = saved[i];
#pragma unroll
        for (int k = 1; k < Cell::kStates; ++k)
          if (p.cells) static_cast<Accumulator*>(p.cells)[at + (k - 1) * of_rows] = carried[i][k];
      };
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const int row = my_row + kStride * i;
        if (32 / kUnits * warp + kStride * i <
            now.rows) {  // the same for the whole warp: lanes of missing rows help to gather
          Accumulator acc[kAccs], now_is[kSlots<Cell>] = {}, kept[kSavedOrOne<Cell>], inputs[kInputSlots<Cell>] = {};
          const Scalar* const staged = stage + (parity * stage_size + row * kUnits) + own;
          Scalar x[kGates];
#pragma unroll
          for (int g = 0; g < kGates; ++g) x[g] = staged[g * stage_rows * kUnits];
#pragma unroll
          for (int a = 0; a < kAccs; ++a) {
            constexpr auto gate = [](int acc) { return x_gate<Cell>(acc); };
            acc[a] = kKeepsBias ? bias[a] : bias_of(a);
            if (gate(a) >= 0) acc[a] += widen(x[gate(a) >= 0 ? gate(a) : 0]);
          }
          if constexpr (Cell::kInputs > 0) {
            if (row < now.rows && real_unit)
#pragma unroll
              for (int k = 0; k < Cell::kInputs; ++k)
                inputs[k] = widen(inputs_at[(now.offset + kStride * i) * hidden + in_slice + k * of_rows]);
          }
          advance<Cell, Accumulator, kUnits>(all_sums + (sums_in + buffer) + i * kStride * kWarps * kUnits, acc,
                                             carried[i], parameters, inputs, now_is, kept);
          const Scalar stored = mailbox::encode(narrow<Scalar>(real_unit ? now_is[0] : Accumulator(0)));
          const Piece packet = gather(stored);
          if (row < now.rows && sends) {
            const int64_t at =
                kWhole ? (now.offset + kStride * i) * hidden + in_slice : (now.offset + row) * pitch + place;
            mailbox::put(static_cast<Scalar*>(p.y) + at, packet);
          }
          if (row < now.rows && real_unit) {
#pragma unroll
            for (int k = 1; k < kSlots<Cell>; ++k) carried[i][k] = now_is[k];
            if constexpr (Cell::kUsesHPrev) carried[i][0] = widen(stored);
#pragma unroll
            for (int k = 0; k < Cell::kSaved; ++k) saved[i].v[k] = narrow<Scalar>(kept[k]);
            if (row >= next.rows) {  // rows that end here, which are few
              const int64_t last = here(in_batch) + i * kStride * hidden;
              static_cast<Scalar*>(p.h_n)[last] = stored;
#pragma unroll
              for (int k = 1; k < Cell::kStates; ++k)
                static_cast<Scalar*>(p.c_n)[last + (k - 1) * of_state] = narrow<Scalar>(carried[i][k]);
            }
          }
          if constexpr (!kLate) store(i);
        }
      }
      if constexpr (kLate) unrolled<kElements>([&](auto index) { store(index.value); });
      before = now;
      now = next;
      next = left > 1 ? timeline.copied(t + direction, offset_stage + parity * kOffsetsOfStep) : StepRows();
      parity ^= 1;
    }
  }
}

}  // namespace fusedrnn
