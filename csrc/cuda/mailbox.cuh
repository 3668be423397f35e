// The exchange between blocks of one launch. The only file with strong accesses to global memory.
//
// A mailbox is an output that every launch writes once: each packet of 16 bytes is filled with the sentinel
// (all bits one) before the launch, stored once by one thread, and read by any block until it is no longer
// the sentinel.
//
// Why this is right in PTX's memory model:
//  - Store and load are relaxed, at gpu scope, of the same location and the same size: morally strong, so no
//  data race.
//  - A vector access is a set of scalar accesses in no particular order, so each of the four words of a
//  packet carries
//    its own flag: a word is the sentinel or it is data. Nothing is concluded about any other location: no
//    fence, no acquire and no release is needed.
//  - Data never holds the sentinel: every value goes through encode(), whatever NaN the input holds.
//  - The fill comes from an earlier operation on the same stream, so it happens before the whole launch.
//
// Readers look at the words of every packet (missing()) before they multiply: nothing rests on what a product makes of
// the sentinel.
#pragma once

#include "arithmetic.cuh"

extern "C" __device__ void __assertfail(const char* message, const char* file, unsigned line, const char* function,
                                        size_t char_size) __attribute__((noreturn));

namespace fusedrnn::mailbox {

constexpr uint32_t kSentinel = 0xFFFFFFFFu;

// The packet `offset` bytes beyond an address.
template <int offset>
__device__ __forceinline__ Piece take(const void* at) {
  Piece p;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4+%5];"
               : "=r"(p.w[0]), "=r"(p.w[1]), "=r"(p.w[2]), "=r"(p.w[3])
               : "l"(at), "n"(offset)
               : "memory");
  return p;
}

__device__ __forceinline__ void put(void* at, const Piece& p) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(p.w[0]), "r"(p.w[1]), "r"(p.w[2]),
               "r"(p.w[3])
               : "memory");
}

// The sentinel, the largest of words, if a word of a packet has not arrived.
__device__ __forceinline__ uint32_t newest(const Piece& p) { return max(max(p.w[0], p.w[1]), max(p.w[2], p.w[3])); }
__device__ __forceinline__ bool missing(const Piece& p) { return newest(p) == kSentinel; }

// A result as it is stored. Bits that are all ones would be a NaN; cvt to 16 bits makes every NaN the
// canonical 0x7FFF (PTX ISA, cvt), so only float32 can keep the bits of a NaN that came in.
__device__ __forceinline__ Bfloat16 encode(Bfloat16 x) { return x; }
__device__ __forceinline__ Float16 encode(Float16 x) { return x; }
__device__ __forceinline__ float encode(float x) {
  return __float_as_uint(x) == kSentinel ? __uint_as_float(0x7FFFFFFFu) : x;
}

// A packet that never came: says where, and ends the launch. "Line" of the message is the step.
__device__ __forceinline__ void give_up(int32_t* fault, int64_t step, int packet) {
  fault[0] = int32_t(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
  fault[1] = int32_t(step);
  fault[2] = packet;
  fault[3] = 1;
  __threadfence_system();
  __assertfail("a packet of the previous step never came (file: mailbox, line: step)", "mailbox", unsigned(step),
               "take", 1);
}

}  // namespace fusedrnn::mailbox
