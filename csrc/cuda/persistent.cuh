// One cooperative launch for a whole sequence. W_hh stays in registers; h (backward: dgates) goes through the mailbox.
// Here is what the kernels of persistent share.
#pragma once

#include "advance.cuh"
#include "mailbox.cuh"

namespace fusedrnn {

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

// Through which array blocks exchange.
__device__ __forceinline__ const void* exchanged(const FusedrnnForward& p) { return p.y; }
__device__ __forceinline__ const void* exchanged(const FusedrnnBackward& p) { return p.dgates; }

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
            mailbox::give_up(params.fault, step, int((packet - static_cast<const char*>(exchanged(params))) / 16));
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

}  // namespace fusedrnn
