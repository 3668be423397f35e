// One cooperative launch for a whole sequence. W_hh stays in registers; h (backward: dgates) goes through the mailbox.
// Here is what the kernels of persistent share.
#pragma once

#include "advance.cuh"
#include "mailbox.cuh"

namespace fusedrnn {

// Exact products of kRows rows of weights a lane by a tile of 8 rows. A lane multiplies the pieces of its own rows of
// weights, which never leave it, by the same pieces of all 8 rows, which the warp hands around in shared memory; the
// four lanes of a row of weights add up once, at the end of a tile.
template <int kRows>
struct ExactTile {
  static constexpr int kMT = (kRows + 1) / 2;
  float sums[kRows][8] = {};

  // b: this lane's piece of row lane / 4. rows: where the warp stages those of a tile, `pitch` bytes from one to the
  // next.
  template <int pitch>
  __device__ __forceinline__ static void stage(const Piece& b, unsigned char* rows) {
    const int lane = threadIdx.x & 31;
    __syncwarp();
    *reinterpret_cast<Piece*>(rows + (lane >> 2) * pitch + 16 * (lane & 3)) = b;
    __syncwarp();
  }

  template <int pitch>
  __device__ __forceinline__ void multiply(const Piece (&weights)[2 * kMT], const unsigned char* rows) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const Piece b = *reinterpret_cast<const Piece*>(rows + n * pitch + 16 * (threadIdx.x & 3));
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int a = 0; a < kRows; ++a)
          sums[a][n] = fma(__uint_as_float(weights[a].w[i]), __uint_as_float(b.w[i]), sums[a][n]);
    }
  }

  // As a product of tensor cores leaves them. Nobody of the warp reads staged rows any more: their place is free.
  __device__ __forceinline__ void add_up(float (&acc)[kMT][4]) const {
    const bool last_four = threadIdx.x & 2, last_two = threadIdx.x & 1;
#pragma unroll
    for (int a = 0; a < kRows; ++a) {
      const float (&of)[8] = sums[a];
      float four[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        four[i] = (last_four ? of[i + 4] : of[i]) + __shfl_xor_sync(~0u, last_four ? of[i] : of[i + 4], 2);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        acc[a / 2][2 * (a % 2) + i] =
            (last_two ? four[i + 2] : four[i]) + __shfl_xor_sync(~0u, last_two ? four[i] : four[i + 2], 1);
    }
    __syncwarp();
  }
};

// What a step needs of HBM is copied into shared memory while the step before waits for its packets: a load would share
// a scoreboard with those, and whoever waits for one waits for both. Each step makes one group of copies; after its
// block barrier all but the last group have landed.
__device__ __forceinline__ uint32_t shared_address(const void* at) {
  uint32_t address;
  asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(address) : "l"(at));
  return address;
}
template <int bytes>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from) {
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(bytes) : "memory");
}
// The same for any number of bytes that both addresses are aligned to as far as it allows; what is no multiple of 4
// bytes is copied at once.
template <int bytes>
__device__ __forceinline__ void copy_bytes(uint32_t to, const void* from) {
  constexpr int kOne = pack_alignment(bytes);
  if constexpr (kOne >= 4) {
#pragma unroll
    for (int i = 0; i < bytes; i += kOne) copy_async<kOne>(to + i, static_cast<const char*>(from) + i);
  } else {
#pragma unroll
    for (int i = 0; i < bytes; i += 2)
      asm volatile("st.shared.u16 [%0], %1;" ::"r"(to + i),
                   "h"(*reinterpret_cast<const uint16_t*>(static_cast<const char*>(from) + i))
                   : "memory");
  }
}
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int left>
__device__ __forceinline__ void await_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
  __syncwarp();
}

__device__ __forceinline__ const FusedrnnForward& plain(const FusedrnnForward& p) { return p; }
__device__ __forceinline__ const FusedrnnForward& plain(const FusedrnnOwnForward& p) { return p.plain; }
__device__ __forceinline__ const FusedrnnBackward& plain(const FusedrnnBackward& p) { return p; }
__device__ __forceinline__ const FusedrnnBackward& plain(const FusedrnnOwnBackward& p) { return p.plain; }

// A block's share of the units: from `first` on of its head, which has `depth` of them, `length` with its padding to
// whole packets. Its head begins at unit head_unit, in rows with padding at head_place.
template <int kPer, bool kWhole, int kUnits>
struct Share {
  int hidden, depth, length, pitch, first, head = 0, head_unit = 0, head_place = 0;

  template <typename Params>
  __device__ __forceinline__ explicit Share(const Params& given) {
    hidden = depth = int(plain(given).hidden);
    if constexpr (kOwn) depth = hidden / int(given.heads);
    length = pitch = kWhole ? depth : (depth + kPer - 1) / kPer * kPer;
    first = int(blockIdx.x) * kUnits;
    if constexpr (kOwn) {
      const int blocks = (depth + kUnits - 1) / kUnits;
      head = int(blockIdx.x) / blocks;
      pitch = int(given.heads) * length;
      first = int(blockIdx.x) % blocks * kUnits;
      head_unit = head * depth;
      head_place = head * length;
    }
  }
};

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
    return between(offsets[t], offsets[t + 1]);
  }

  // The same, a warp's offsets of step t copied ahead.
  __device__ __forceinline__ void copy_ahead(int t, uint32_t to) const {
    if (offsets == nullptr || (threadIdx.x & 31) != 0) return;
    copy_async<8>(to, offsets + t);
    copy_async<8>(to + 8, offsets + t + 1);
  }
  __device__ __forceinline__ StepRows copied(int t, const unsigned char* from) const {
    if (offsets == nullptr) return {t * batch + first, limit};
    const int64_t* const two = reinterpret_cast<const int64_t*>(from);
    return between(two[0], two[1]);
  }

 private:
  __device__ __forceinline__ StepRows between(int64_t offset, int64_t end) const {
    const int64_t rows = end - offset - first;
    return {offset + first, int(rows < 0 ? 0 : rows < limit ? rows : limit)};
  }
};

// Through which array blocks exchange.
__device__ __forceinline__ const void* exchanged(const FusedrnnForward& p) { return p.y; }
__device__ __forceinline__ const void* exchanged(const FusedrnnBackward& p) { return p.dgates; }

// A lane's packets of a row that are on their way, or have come: n at a time.
template <int n>
struct Flight {
  const char* at;  // the row
  bool recurrent;  // else the row comes from h0: it is not waited for and may hold any bits
  Piece p[n];
};

// Where a lane's pieces of a row lie: piece c of n at 512 bytes * c, from piece `near` on `gap` bytes further; the row
// holds them if c < held. kWhole: every lane's row holds all n.
template <bool kWhole, int n, bool kGap = false>
struct Inbox {
  int held, near = n;
  uint32_t gap = 0;

  __device__ static __forceinline__ int count(int piece0, int pieces) { return (pieces - piece0 + 31) >> 5; }

  __device__ __forceinline__ const char* side(const char* at, int c) const {
    return at + (kGap && c >= near ? gap : 0u);
  }

  template <int c>
  __device__ __forceinline__ void fetch(const char* at, Piece& p) const {
    if constexpr (kWhole) {
      p = mailbox::take<512 * c>(side(at, c));
    } else {
      p = Piece{};
      if (c < held) p = mailbox::take<512 * c>(side(at, c));
    }
  }

  // Of every row of a step, one packet is polled until it has come; the others are near then, and asked for in one
  // flight. All that is missing, polled by all warps, would be more than L2 can give in the time of an answer.
  template <int m, typename Params>
  __device__ __forceinline__ void first(Flight<m>& f, const Params& params, int step) const {
    uint32_t polls = 0;
    bool waits;
#pragma unroll 1
    do {
      fetch<0>(f.at, f.p[0]);
      waits = f.recurrent && mailbox::missing(f.p[0]);
    } while (__any_sync(~0u, waits) && ++polls <= params.poll_limit);
    if (waits) give_up(f.at, 0, params, step);
    unrolled<m - 1>([&](auto index) { fetch<index.value + 1>(f.at, f.p[index.value + 1]); });
  }

  // Until all packets from `begin` on that are in flight have come: what is missing is asked for again, nothing else.
  // Products begin only then.
  template <int begin, int m, typename Params, typename... More>
  __device__ __forceinline__ void settle(const Params& params, int step, Flight<m>& f, More&... more) const {
    uint32_t polls = 0;
    while (__any_sync(~0u, (waits(f) || ... || waits(more)))) {
      again<begin>(f);
      (again<begin>(more), ...);
      if (++polls > params.poll_limit) {
        stop<begin>(f, params, step);
        (stop<begin>(more, params, step), ...);
      }
    }
  }

 private:
  template <int m>
  __device__ __forceinline__ static bool waits(const Flight<m>& f) {
    uint32_t any[m];
#pragma unroll
    for (int i = 0; i < m; ++i) any[i] = mailbox::newest(f.p[i]);
#pragma unroll
    for (int k = 1; k < m; k *= 2)
#pragma unroll
      for (int i = 0; i + k < m; i += 2 * k) any[i] = max(any[i], any[i + k]);
    return f.recurrent && any[0] == mailbox::kSentinel;
  }

  template <int begin, int m>
  __device__ __forceinline__ void again(Flight<m>& f) const {
    unrolled<m>([&](auto index) {
      if (f.recurrent && mailbox::missing(f.p[index.value])) fetch<begin + index.value>(f.at, f.p[index.value]);
    });
  }

  template <int begin, int m, typename Params>
  __device__ __forceinline__ void stop(const Flight<m>& f, const Params& params, int step) const {
    unrolled<m>([&](auto index) {
      if (f.recurrent && mailbox::missing(f.p[index.value])) give_up(f.at, begin + index.value, params, step);
    });
  }

  template <typename Params>
  __device__ __forceinline__ void give_up(const char* at, int c, const Params& params, int step) const {
    const char* const packet = side(at, c) + 512 * c;
    mailbox::give_up(params.fault, step, int((packet - static_cast<const char*>(exchanged(params))) / 16));
  }
};

}  // namespace fusedrnn
