// One cooperative launch for a whole sequence. W_hh stays in registers; h (backward: dgates) goes through the mailbox.
#include <cuda_runtime.h>

#include "advance.cuh"
#include "mailbox.cuh"
#include "params.h"

namespace fusedrnn {
namespace {

// The rows of one time step that belong to a batch slice.
struct StepRows {
  int64_t offset;  // of the slice's first row
  int rows;
};

__device__ __forceinline__ StepRows step_rows(const int64_t* offsets, int64_t batch, int64_t t, int64_t first, int limit) {
  if (offsets == nullptr) return {t * batch + first, limit};
  const int64_t offset = offsets[t], rows = offsets[t + 1] - offset - first;
  return {offset + first, int(rows < 0 ? 0 : rows < limit ? rows : limit)};
}

// A lane's pieces of one row of h or dgates: n of them, 32 pieces apart, the first one piece0 of `pieces`.
template <int n>
struct Inbox {
  const char* at;
  bool wait;  // the row comes from another block of this launch

  __device__ __forceinline__ void fetch(Piece (&p)[n], int piece0, int pieces) const {
#pragma unroll
    for (int c = 0; c < n; ++c) {
      p[c] = Piece{};
      if (piece0 + 32 * c < pieces) p[c] = mailbox::take(at + 512 * c);
    }
  }

  template <typename Params>
  __device__ __forceinline__ void await(Piece (&p)[n], int piece0, int pieces, const Params& params, int64_t step, int row) const {
    uint32_t polls = 0;
    while (wait && mailbox::pending(p)) {
      if (++polls > params.poll_limit) mailbox::give_up(params.fault, step, row * pieces + piece0);
      fetch(p, piece0, pieces);
    }
    __syncwarp();
  }
};

// Tiles are 8 rows high, so is the room for their sums.
template <typename Sums>
__host__ __device__ constexpr int forward_buffer_bytes(int slice_rows) {
  return (slice_rows + 7) / 8 * 8 * Sums::kBytesPerRow;
}

// 16 bytes of a row's consecutive units, one unit a lane, gathered in the first of their lanes.
__device__ __forceinline__ Piece gather(uint16_t bits) {
  Piece p;
  const uint32_t pair = bits | __shfl_down_sync(~0u, uint32_t(bits), 1) << 16;
  p.w[0] = pair;
#pragma unroll
  for (int i = 1; i < 4; ++i) p.w[i] = __shfl_down_sync(~0u, pair, 2 * i);
  return p;
}
__device__ __forceinline__ Piece gather(uint32_t bits) {
  Piece p;
  p.w[0] = bits;
#pragma unroll
  for (int i = 1; i < 4; ++i) p.w[i] = __shfl_down_sync(~0u, bits, i);
  return p;
}

template <typename Cell, typename Type, int kChunks>
__global__ void __launch_bounds__(kThreads, 1) persistent_forward(const __grid_constant__ FusedrnnForward p) {
  using Math = Arithmetic<Type>;
  using Scalar = typename Math::Scalar;
  using Accumulator = typename Math::Accumulator;
  using Sums = ForwardSums<Cell, Accumulator>;
  constexpr int kPer = 16 / sizeof(Scalar), kGates = Cell::kGates, kAccs = Cell::kAccumulators, kMT = kMTiles<Cell>;
  constexpr int kElements = kForwardRows * kForwardUnits / kThreads;
  extern __shared__ __align__(16) unsigned char shared[];

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t hidden = p.hidden, pitch = (hidden + kPer - 1) / kPer * kPer;
  const int pieces = int(pitch / kPer), piece0 = 4 * warp + (lane & 3);
  const Scalar* const h0 = static_cast<const Scalar*>(p.h0) + piece0 * kPer;
  const Scalar* const y_in = static_cast<const Scalar*>(p.y) + piece0 * kPer;

  Piece weights[kChunks][2 * kMT];
  const int64_t lane_unit = int64_t(blockIdx.x) * kForwardUnits + (lane >> 2);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int a = 0; a < 2 * kMT; ++a) {
      const int gate = a < kAccs ? h_gate<Cell>(a) : -1;
      weights[c][a] = Piece{};
      if (gate >= 0 && lane_unit < hidden && piece0 + 32 * c < pieces) {
        const Scalar* row = static_cast<const Scalar*>(p.w_hh) + (gate * hidden + lane_unit) * pitch;
        weights[c][a] = load_piece<true>(row, int64_t(piece0 + 32 * c) * kPer, pitch);
        Math::prepare(weights[c][a]);
      }
    }
  }

  // From here on a thread is row element / 8 and unit element % 8 of the block, element = thread + 256 i.
  const int64_t unit = int64_t(blockIdx.x) * kForwardUnits + (threadIdx.x & 7);
  const bool real_unit = unit < hidden;
  const int my_row = threadIdx.x >> 3;
  Accumulator bias[kAccs];
#pragma unroll
  for (int a = 0; a < kAccs; ++a) {
    const int gate = h_gate<Cell>(a);
    bias[a] = 0;
    if (p.b_hh && gate >= 0 && real_unit) bias[a] = widen(static_cast<const Scalar*>(p.b_hh)[gate * hidden + unit]);
  }

  const int buffer_bytes = forward_buffer_bytes<Sums>(p.slice_rows);
  int buffer = 0;
  for (int64_t first = int64_t(blockIdx.y) * p.slice_rows; first < p.batch; first += int64_t(gridDim.y) * p.slice_rows) {
    const int limit = int(p.batch - first < p.slice_rows ? p.batch - first : p.slice_rows);
    Accumulator c[kElements], h_carried[kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int row = my_row + 32 * i;
      c[i] = h_carried[i] = 0;
      if (row < limit && real_unit) {
        if constexpr (Cell::kHasCellState) c[i] = widen(static_cast<const Scalar*>(p.c0)[(first + row) * hidden + unit]);
        if constexpr (Cell::kUsesHPrev) h_carried[i] = widen(static_cast<const Scalar*>(p.h0)[(first + row) * pitch + unit]);
      }
    }

    const int64_t last = p.steps - 1;
    StepRows before = {0, 0}, now = step_rows(p.offsets_device, p.batch, p.reverse ? last : 0, first, limit);
    for (int64_t s = 0; s <= last; ++s) {
      StepRows next = {0, 0};
      if (s < last) next = step_rows(p.offsets_device, p.batch, p.reverse ? last - s - 1 : s + 1, first, limit);

      Scalar inputs[kElements][kGates];
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const int row = my_row + 32 * i;
        const Scalar* x = static_cast<const Scalar*>(p.x) + (now.offset + row) * (kGates * hidden) + unit;
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          inputs[i][g] = Scalar(0.0f);
          if (row < now.rows && real_unit) inputs[i][g] = x[g * hidden];
        }
      }

      auto* sums = reinterpret_cast<typename Sums::Sum*>(shared + buffer * buffer_bytes);
      const int tiles = (now.rows + 7) >> 3;
      const auto inbox = [&](int tile) {
        int row = tile * 8 + (lane >> 2);
        row = row < now.rows ? row : now.rows - 1;
        const bool wait = row < before.rows;
        const Scalar* base = wait ? y_in + before.offset * pitch : h0 + first * pitch;
        return Inbox<kChunks>{reinterpret_cast<const char*>(base + row * pitch), wait};
      };
      const auto multiply = [&](int tile, Piece (&h)[kChunks]) {
        Accumulator acc[kMT][4] = {};
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          Math::prepare(h[c]);
#pragma unroll
          for (int m = 0; m < kMT; ++m) Math::multiply(acc[m], weights[c][2 * m], weights[c][2 * m + 1], h[c]);
        }
        Sums::store(sums, tile, acc);
      };
      if constexpr (kChunks <= 4) {
        // Two tiles in flight: the packets of the next one travel while this one is multiplied.
        Piece even[kChunks], odd[kChunks];
        Inbox<kChunks> even_box{}, odd_box{};
        if (tiles > 0) {
          even_box = inbox(0);
          even_box.fetch(even, piece0, pieces);
        }
        for (int tile = 0; tile < tiles; tile += 2) {
          if (tile + 1 < tiles) {
            odd_box = inbox(tile + 1);
            odd_box.fetch(odd, piece0, pieces);
          }
          even_box.await(even, piece0, pieces, p, s, tile * 8 + (lane >> 2));
          multiply(tile, even);
          if (tile + 1 < tiles) {
            if (tile + 2 < tiles) {
              even_box = inbox(tile + 2);
              even_box.fetch(even, piece0, pieces);
            }
            odd_box.await(odd, piece0, pieces, p, s, tile * 8 + 8 + (lane >> 2));
            multiply(tile + 1, odd);
          }
        }
      } else {
#pragma unroll 1
        for (int tile = 0; tile < tiles; ++tile) {
          Piece packets[kChunks];
          const Inbox<kChunks> box = inbox(tile);
          box.fetch(packets, piece0, pieces);
          box.await(packets, piece0, pieces, p, s, tile * 8 + (lane >> 2));
          multiply(tile, packets);
        }
      }
      __syncthreads();

#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const int row = my_row + 32 * i;
        if (4 * warp + 32 * i < now.rows) {  // the same for the whole warp: lanes of missing rows help to gather
          Accumulator acc[kAccs], h, c_now = 0, saved[kSavedOrOne<Cell>];
#pragma unroll
          for (int a = 0; a < kAccs; ++a) {
            acc[a] = bias[a];
            if (x_gate<Cell>(a) >= 0) acc[a] += widen(inputs[i][x_gate<Cell>(a) >= 0 ? x_gate<Cell>(a) : 0]);
          }
          advance<Cell, Accumulator>(sums, row, threadIdx.x & 7, acc, h_carried[i], c[i], h, c_now, saved);
          const Scalar stored = narrow<Scalar>(real_unit ? h : Accumulator(0));
          const Piece packet = gather(mailbox::encode(stored));
          const bool present = row < now.rows;
          const int64_t n = now.offset + row;
          if (present && (lane & (kPer - 1)) == 0 && unit < pitch)
            mailbox::put(static_cast<Scalar*>(p.y) + n * pitch + unit, packet);
          if (present && real_unit) {
            c[i] = c_now;
            h_carried[i] = widen(stored);
            if constexpr (Cell::kSaved > 0)
              if (p.gates)
                store_pack<Scalar, Accumulator, Cell::kSaved>(static_cast<Scalar*>(p.gates) + (n * hidden + unit) * Cell::kSaved, saved);
            if constexpr (Cell::kHasCellState)
              if (p.cells) static_cast<Accumulator*>(p.cells)[n * hidden + unit] = c_now;
            if (row >= next.rows) {
              static_cast<Scalar*>(p.h_n)[(first + row) * hidden + unit] = stored;
              if constexpr (Cell::kHasCellState)
                static_cast<Scalar*>(p.c_n)[(first + row) * hidden + unit] = narrow<Scalar>(c_now);
            }
          }
        }
      }
      buffer ^= 1;
      before = now;
      now = next;
    }
  }
}

template <typename Cell, typename Type, int kChunks>
__global__ void __launch_bounds__(kThreads, 1) persistent_backward(const __grid_constant__ FusedrnnBackward p) {
  using Math = Arithmetic<Type>;
  using Scalar = typename Math::Scalar;
  using Accumulator = typename Math::Accumulator;
  using Sums = BackwardSums<Accumulator>;
  constexpr int kPer = 16 / sizeof(Scalar), kAccs = Cell::kAccumulators;
  constexpr int kElements = kBackwardRows * kBackwardUnits / kThreads;
  constexpr int kStage = 2 * kAccs * kBackwardUnits;  // what a warp stages: 2 rows x accumulators x 16 units
  constexpr int kPackets = kStage / kPer;
  __shared__ __align__(16) Accumulator all_sums[2][Sums::kBytes / sizeof(Accumulator)];
  __shared__ __align__(16) Scalar stages[kWarps][kElements][kStage];

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t hidden = p.hidden, pitch = (hidden + kPer - 1) / kPer * kPer, row_size = kAccs * pitch;
  const int pieces = int(row_size / kPer), piece0 = 4 * warp + (lane & 3);
  const Scalar* const inbound = static_cast<const Scalar*>(p.dgates) + piece0 * kPer;

  Piece weights[kChunks][2];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t row = int64_t(blockIdx.x) * kBackwardUnits + (lane >> 2) + 8 * j;
      weights[c][j] = Piece{};
      if (row < hidden && piece0 + 32 * c < pieces) {
        weights[c][j] = load_piece<true>(static_cast<const Scalar*>(p.w_hh_t) + row * row_size, int64_t(piece0 + 32 * c) * kPer, row_size);
        Math::prepare(weights[c][j]);
      }
    }
  }

  // From here on a thread is row element / 16 and unit element % 16 of the block, element = thread + 256 i.
  const int64_t unit = int64_t(blockIdx.x) * kBackwardUnits + (threadIdx.x & 15);
  const bool real_unit = unit < hidden;
  const int my_row = threadIdx.x >> 4;
  // Packets leave by lane: row lane / (kPackets / 2), then accumulator, then packet of the 16 units.
  constexpr int kPerUnits = kBackwardUnits / kPer;

  int buffer = 0;
  for (int64_t first = int64_t(blockIdx.y) * p.slice_rows; first < p.batch; first += int64_t(gridDim.y) * p.slice_rows) {
    const int limit = int(p.batch - first < p.slice_rows ? p.batch - first : p.slice_rows);
    Accumulator c[kElements], dc[kElements], dh_direct[kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i) c[i] = dc[i] = dh_direct[i] = 0;

    const int64_t last = p.steps - 1;
    StepRows before = {0, 0}, now = step_rows(p.offsets_device, p.batch, p.reverse ? 0 : last, first, limit);
    for (int64_t s = 0; s <= last; ++s) {
      StepRows next = {0, 0};
      if (s < last) next = step_rows(p.offsets_device, p.batch, p.reverse ? s + 1 : last - s - 1, first, limit);

      // What does not come from another block of this launch, asked for before the wait.
      Accumulator dh[kElements], c_prev[kElements], h_prev[kElements], h[kElements];
      Pack<Scalar, kSavedOrOne<Cell>> gates[kElements];
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const int row = my_row + 16 * i;
        dh[i] = c_prev[i] = h_prev[i] = h[i] = 0;
        gates[i] = {};
        if (row < now.rows && real_unit) {
          const int64_t n = now.offset + row, at = n * hidden + unit, start = (first + row) * hidden + unit;
          if constexpr (Cell::kSaved > 0)
            gates[i] = *reinterpret_cast<const Pack<Scalar, kSavedOrOne<Cell>>*>(static_cast<const Scalar*>(p.gates) + at * Cell::kSaved);
          if (p.dy) dh[i] = widen(static_cast<const Scalar*>(p.dy)[at]);
          if (row >= before.rows) {
            if (p.dh_n) dh[i] += widen(static_cast<const Scalar*>(p.dh_n)[start]);
            if constexpr (Cell::kHasCellState) {
              c[i] = static_cast<const Accumulator*>(p.cells)[at];
              dc[i] = p.dc_n ? widen(static_cast<const Scalar*>(p.dc_n)[start]) : Accumulator(0);
            }
          }
          const int64_t at_next = (next.offset + row) * hidden + unit;
          if constexpr (Cell::kHasCellState)
            c_prev[i] = row < next.rows ? static_cast<const Accumulator*>(p.cells)[at_next]
                                        : Accumulator(widen(static_cast<const Scalar*>(p.c0)[start]));
          if constexpr (Cell::kUsesH) h[i] = widen(static_cast<const Scalar*>(p.y)[at]);
          if constexpr (Cell::kUsesHPrev)
            h_prev[i] = row < next.rows ? widen(static_cast<const Scalar*>(p.y)[at_next]) : widen(static_cast<const Scalar*>(p.h0)[start]);
        }
      }

      Accumulator* sums = all_sums[buffer];
      const int recurrent_rows = before.rows < now.rows ? before.rows : now.rows;
      const int tiles = (recurrent_rows + 7) >> 3;
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) {
        int row = tile * 8 + (lane >> 2);
        row = row < recurrent_rows ? row : recurrent_rows - 1;
        const Inbox<kChunks> box{reinterpret_cast<const char*>(inbound + (before.offset + row) * row_size), true};
        Piece pieces_in[kChunks];
        Accumulator acc[4] = {};
        box.fetch(pieces_in, piece0, pieces);
        box.await(pieces_in, piece0, pieces, p, s, row);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          Math::prepare(pieces_in[c]);
          Math::multiply(acc, weights[c][0], weights[c][1], pieces_in[c]);
        }
        Sums::store(sums, tile, acc);
      }
      __syncthreads();

#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const int row = my_row + 16 * i;
        if (2 * warp + 16 * i < now.rows) {  // the same for the whole warp
          Accumulator dacc[kAccs], saved[kSavedOrOne<Cell>], dh_prev = 0, dc_prev = 0;
#pragma unroll
          for (int k = 0; k < Cell::kSaved; ++k) saved[k] = widen(gates[i].v[k]);
          if constexpr (Cell::kDirectH)
            if (row < before.rows) dh[i] += dh_direct[i];
          advance_back<Cell, Accumulator>(sums, row, threadIdx.x & 15, row < recurrent_rows, dh[i], dc[i], saved, h[i], h_prev[i],
                                          c_prev[i], c[i], dacc, dh_prev, dc_prev);
          Scalar* stage = stages[warp][i];
#pragma unroll
          for (int a = 0; a < kAccs; ++a) {
            const auto bits = mailbox::encode(narrow<Scalar>(real_unit ? dacc[a] : Accumulator(0)));
            reinterpret_cast<decltype(mailbox::encode(Scalar()))*>(stage)[((lane >> 4) * kAccs + a) * kBackwardUnits + (lane & 15)] = bits;
          }
          __syncwarp();
#pragma unroll
          for (int k = lane; k < kPackets; k += 32) {
            const int packet_row = 2 * warp + 16 * i + k / (kPackets / 2), a = k / kPerUnits % kAccs;
            const int64_t packet_unit = int64_t(blockIdx.x) * kBackwardUnits + k % kPerUnits * kPer;
            if (packet_row < now.rows && packet_unit < pitch)
              mailbox::put(static_cast<Scalar*>(p.dgates) + (now.offset + packet_row) * row_size + a * pitch + packet_unit,
                           *reinterpret_cast<const Piece*>(stage + k * kPer));
          }
          if (row < now.rows && real_unit) {
            c[i] = c_prev[i];
            dc[i] = dc_prev;
            dh_direct[i] = dh_prev;
            if (row >= next.rows) {
              const int64_t start = (first + row) * hidden + unit;
              if constexpr (Cell::kHasCellState) static_cast<Scalar*>(p.dc0)[start] = narrow<Scalar>(dc_prev);
              if constexpr (Cell::kDirectH) static_cast<Accumulator*>(p.dh_direct)[start] = dh_prev;
            }
          }
        }
      }
      buffer ^= 1;
      before = now;
      now = next;
    }
  }
}

template <typename Params>
int launch(void (*kernel)(Params), const Params& params, int units, int shared, cudaStream_t stream) {
  const unsigned blocks = unsigned((params.hidden + units - 1) / units);
  if (shared > 0) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
  }
  Params copy = params;
  void* arguments[] = {&copy};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(blocks, unsigned(params.groups)), dim3(kThreads), arguments,
                                     size_t(shared), stream);
}

// Chunks of 64 bytes that a warp holds of every row of weights, rounded up to a size that is compiled.
int chunks_of(int64_t row_bytes) { return int((row_bytes + 64 * kWarps - 1) / (64 * kWarps)); }

template <typename Cell, typename Type>
int forward(const FusedrnnForward& p, cudaStream_t stream) {
  using Math = Arithmetic<Type>;
  constexpr int kSize = sizeof(typename Math::Scalar);
  const int shared = 2 * forward_buffer_bytes<ForwardSums<Cell, typename Math::Accumulator>>(p.slice_rows);
  const int chunks = chunks_of((p.hidden * kSize + 15) / 16 * 16);
  const auto run = [&](auto kernel) { return launch<FusedrnnForward>(kernel, p, kForwardUnits, shared, stream); };
  if (chunks <= 1) return run(persistent_forward<Cell, Type, 1>);
  if (chunks <= 2) return run(persistent_forward<Cell, Type, 2>);
  if (chunks <= 3) return run(persistent_forward<Cell, Type, 3>);
  if (chunks <= 4) return run(persistent_forward<Cell, Type, 4>);
  if constexpr (kSize == 4) {
    if (chunks <= 6) return run(persistent_forward<Cell, Type, 6>);
    if (chunks <= 8) return run(persistent_forward<Cell, Type, 8>);
  }
  return cudaErrorInvalidValue;
}

template <typename Cell, typename Type>
int backward(const FusedrnnBackward& p, cudaStream_t stream) {
  constexpr int kPer = 16 / int(sizeof(typename Arithmetic<Type>::Scalar));
  const int chunks = chunks_of((p.hidden + kPer - 1) / kPer * 16 * Cell::kAccumulators);
  const auto run = [&](auto kernel) { return launch<FusedrnnBackward>(kernel, p, kBackwardUnits, 0, stream); };
  if (chunks <= 2) return run(persistent_backward<Cell, Type, 2>);
  if (chunks <= 4) return run(persistent_backward<Cell, Type, 4>);
  if (chunks <= 8) return run(persistent_backward<Cell, Type, 8>);
  if (chunks <= 12) return run(persistent_backward<Cell, Type, 12>);
  if (chunks <= 16) return run(persistent_backward<Cell, Type, 16>);
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace fusedrnn

#define FUSEDRNN_DISPATCH(FUNCTION, CELL)                                         \
  switch (params->dtype) {                                                        \
    case kBfloat16:                                                               \
      return FUNCTION<CELL, __nv_bfloat16>(*params, static_cast<cudaStream_t>(stream)); \
    case kFloat16:                                                                \
      return FUNCTION<CELL, __half>(*params, static_cast<cudaStream_t>(stream));  \
    case kTf32:                                                                   \
      return FUNCTION<CELL, Tf32>(*params, static_cast<cudaStream_t>(stream));    \
    case kFloat32:                                                                \
      return FUNCTION<CELL, float>(*params, static_cast<cudaStream_t>(stream));   \
    default:                                                                      \
      return cudaErrorInvalidValue;                                               \
  }

extern "C" int fusedrnn_persistent_forward(const FusedrnnForward* params, void* stream) {
  using namespace fusedrnn;
  if (params->cell != kLstmCell) return cudaErrorInvalidValue;
  FUSEDRNN_DISPATCH(forward, Lstm)
}

extern "C" int fusedrnn_persistent_backward(const FusedrnnBackward* params, void* stream) {
  using namespace fusedrnn;
  if (params->cell != kLstmCell) return cudaErrorInvalidValue;
  FUSEDRNN_DISPATCH(backward, Lstm)
}

extern "C" const char* fusedrnn_error_string(int error) { return cudaGetErrorString(cudaError_t(error)); }
