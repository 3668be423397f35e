// The exchange between blocks of one launch. The only file with strong accesses to global memory.
//
// A mailbox is an output that every launch writes once: each packet of 16 bytes is filled with the sentinel (all bits
// one) before the launch, stored once by one thread, and read by any block until it is no longer the sentinel.
//
// Why this is right in PTX's memory model:
//  - Store and load are relaxed, at gpu scope, of the same location and the same size: morally strong, so no data race.
//  - A vector access is a set of scalar accesses of unspecified order, and 64 bits is the widest scalar the model speaks
//    of. So each 64-bit half carries its own flag: it is either the sentinel or data, and a packet is ready when both
//    halves are data. Nothing is concluded about any other location: no fence, no acquire, no release is needed.
//  - Data never looks like the sentinel: every value goes through encode(), so the first 32 bits of a half of data
//    are never all ones, whatever NaN the input holds.
//  - The fill comes from an earlier operation on the same stream, so it happens before the whole launch.
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
  asm volatile(
      "{\n\t.reg .b64 low, high;\n\t"
      "ld.relaxed.gpu.global.v2.b64 {low, high}, [%4+%5];\n\t"
      "mov.b64 {%0, %1}, low;\n\tmov.b64 {%2, %3}, high;\n\t}"
      : "=r"(p.w[0]), "=r"(p.w[1]), "=r"(p.w[2]), "=r"(p.w[3])
      : "l"(at), "n"(offset)
      : "memory");
  return p;
}

__device__ __forceinline__ void put(void* packet, const Piece& p) {
  asm volatile(
      "{\n\t.reg .b64 low, high;\n\t"
      "mov.b64 low, {%1, %2};\n\tmov.b64 high, {%3, %4};\n\t"
      "st.relaxed.gpu.global.v2.b64 [%0], {low, high};\n\t}" ::"l"(packet),
      "r"(p.w[0]), "r"(p.w[1]), "r"(p.w[2]), "r"(p.w[3])
      : "memory");
}

// Whether any of n packets has a half that has not arrived.
template <int n>
__device__ __forceinline__ bool pending(const Piece (&p)[n]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < n; ++i) largest = max(max(largest, p[i].w[0]), p[i].w[2]);
  return largest == kSentinel;
}

// A result as it is stored. Bits that are all ones would be a NaN; cvt to 16 bits makes every NaN the canonical 0x7FFF
// (PTX ISA, cvt), so only float32 can keep the bits of a NaN that came in.
__device__ __forceinline__ __nv_bfloat16 encode(__nv_bfloat16 x) { return x; }
__device__ __forceinline__ __half encode(__half x) { return x; }
__device__ __forceinline__ float encode(float x) {
  return __float_as_uint(x) == kSentinel ? __uint_as_float(0x7FFFFFFFu) : x;
}

// A packet that never came: says where, and ends the launch. "Line" of the message is the step.
__device__ __forceinline__ void give_up(int32_t* fault, int64_t step, int packet) {
  fault[0] = int32_t(blockIdx.x + blockIdx.y * gridDim.x);
  fault[1] = int32_t(step);
  fault[2] = packet;
  fault[3] = 1;
  __threadfence_system();
  __assertfail("a packet of the previous step never came (file: mailbox, line: step)", "mailbox", unsigned(step), "take", 1);
}

}  // namespace fusedrnn::mailbox
