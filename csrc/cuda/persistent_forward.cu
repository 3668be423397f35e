#include "instances.h"
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

template <typename Cell, typename Type, int kChunks, bool kWhole>
__device__ __forceinline__ void persistent_forward(const FusedrnnForward& p) {
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
  const int buffer_sums = forward_buffer_bytes(p.slice_rows, Sums::kBytesPerRow) / int(sizeof(Sum));
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

}  // namespace fusedrnn

// Left to choose how many blocks share a multiprocessor, the compiler spills to fit one more.
#define FUSEDRNN_KERNEL(Cell, dtype, size, rows)                                                         \
  extern "C" __global__ void __launch_bounds__(fusedrnn::kThreads, 1)                                    \
      persistent_forward_##Cell##_##dtype##_##size##_##rows(const __grid_constant__ FusedrnnForward p) { \
    fusedrnn::persistent_forward<fusedrnn::Cell, fusedrnn::dtypes::dtype, size, fusedrnn::rows>(p);      \
  }
FUSEDRNN_PERSISTENT_FORWARD(FUSEDRNN_KERNEL)
