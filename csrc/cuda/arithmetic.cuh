// Element types and the one matrix product: 16 rows of A by 8 rows of B, both contiguous along k.
//
// A piece is 16 bytes of consecutive k of one row. Lane l of a warp holds piece l % 4 of a chunk of 64 bytes:
// of row l / 4 and row l / 4 + 8 of A, and of row l / 4 of B. mma.sync wants other k in that lane, but a sum
// does not care about the order of its terms, so A and B are permuted alike by reading them in whole pieces,
// straight from memory.
#pragma once

#include "integers.h"

namespace fusedrnn {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

struct alignas(16) Piece {
  uint32_t w[4];
};

struct Tf32 {};  // float32 in memory, rounded to tf32 in the product

// By the names that the instances of kernels have.
namespace dtypes {
using float64 = double;
using float32 = float;
using tf32 = Tf32;
using bfloat16 = Bfloat16;
using float16 = Float16;
}  // namespace dtypes
constexpr bool whole = true, ragged = false;

__device__ __forceinline__ uint32_t to_tf32(uint32_t x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(__uint_as_float(x)));
  return r;
}

#define FUSEDRNN_MMA(SHAPE)                                                                                 \
  asm("mma.sync.aligned." SHAPE " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"                \
      : "=f"(acc[0]), "=f"(acc[1]), "=f"(acc[2]), "=f"(acc[3])                                              \
      : "r"(low.w[i]), "r"(high.w[i]), "r"(low.w[i + 1]), "r"(high.w[i + 1]), "r"(b.w[i]), "r"(b.w[i + 1]), \
        "f"(acc[0]), "f"(acc[1]), "f"(acc[2]), "f"(acc[3]))

// acc[0..1]: row l / 4 of A by rows 2 (l % 4) and 2 (l % 4) + 1 of B; acc[2..3]: row l / 4 + 8 of A.
template <typename Scalar, typename Accumulator>
__device__ __forceinline__ void multiply_exactly(Accumulator (&acc)[4], const Piece& low, const Piece& high,
                                                 const Piece& b) {
  constexpr int kPer = 16 / sizeof(Scalar);
  const int lane = threadIdx.x & 31, row = lane & 28, column = 8 * (lane & 3);
  const Scalar* l = reinterpret_cast<const Scalar*>(low.w);
  const Scalar* h = reinterpret_cast<const Scalar*>(high.w);
  const Scalar* r = reinterpret_cast<const Scalar*>(b.w);
#pragma unroll
  for (int q = 0; q < 4; ++q) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const Scalar a0 = __shfl_sync(~0u, l[i], row + q), a1 = __shfl_sync(~0u, h[i], row + q);
      const Scalar b0 = __shfl_sync(~0u, r[i], column + q), b1 = __shfl_sync(~0u, r[i], column + 4 + q);
      acc[0] = fma(a0, b0, acc[0]);
      acc[1] = fma(a0, b1, acc[1]);
      acc[2] = fma(a1, b0, acc[2]);
      acc[3] = fma(a1, b1, acc[3]);
    }
  }
}

// A value the compiler shall compute once and keep: it cannot see where it came from.
template <typename Value>
__device__ __forceinline__ Value keep(Value x) {
  if constexpr (sizeof(Value) == 8)
    asm("" : "+l"(x));
  else
    asm("" : "+r"(x));
  return x;
}

// A value from which nothing is computed before this place is reached: what is needed seldom shall hold no register.
__device__ __forceinline__ int64_t here(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}

template <int i>
struct Constant {
  static constexpr int value = i;
};

// f(0), f(1), ... f(n - 1), the argument a compile-time constant.
template <int n, int i = 0, typename F>
__device__ __forceinline__ void unrolled(const F& f) {
  if constexpr (i < n) {
    f(Constant<i>());
    unrolled<n, i + 1>(f);
  }
}

// kExact: IEEE products and sums, without tensor cores. A product has kParts, which follow one another in the sums.
template <typename Type>
struct Arithmetic;

template <>
struct Arithmetic<Bfloat16> {
  using Scalar = Bfloat16;
  using Accumulator = float;
  static constexpr bool kExact = false;
  static constexpr int kParts = 2;
  __device__ static void prepare(Piece&) {}
  __device__ static __forceinline__ void multiply_part(int part, float (&acc)[4], const Piece& low, const Piece& high,
                                                       const Piece& b) {
    const int i = 2 * part;
    FUSEDRNN_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  }
};

template <>
struct Arithmetic<Float16> {
  using Scalar = Float16;
  using Accumulator = float;
  static constexpr bool kExact = false;
  static constexpr int kParts = 2;
  __device__ static void prepare(Piece&) {}
  __device__ static __forceinline__ void multiply_part(int part, float (&acc)[4], const Piece& low, const Piece& high,
                                                       const Piece& b) {
    const int i = 2 * part;
    FUSEDRNN_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  }
};

template <>
struct Arithmetic<Tf32> {
  using Scalar = float;
  using Accumulator = float;
  static constexpr bool kExact = false;
  static constexpr int kParts = 2;
  __device__ static __forceinline__ void prepare(Piece& p) {
#pragma unroll
    for (int i = 0; i < 4; ++i) p.w[i] = to_tf32(p.w[i]);
  }
  __device__ static __forceinline__ void multiply_part(int part, float (&acc)[4], const Piece& low, const Piece& high,
                                                       const Piece& b) {
    const int i = 2 * part;
    FUSEDRNN_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
};

template <>
struct Arithmetic<float> {
  using Scalar = float;
  using Accumulator = float;
  static constexpr bool kExact = true;
  static constexpr int kParts = 1;
  __device__ static void prepare(Piece&) {}
  __device__ static __forceinline__ void multiply_part(int, float (&acc)[4], const Piece& low, const Piece& high,
                                                       const Piece& b) {
    multiply_exactly<float>(acc, low, high, b);
  }
};

template <>
struct Arithmetic<double> {
  using Scalar = double;
  using Accumulator = double;
  static constexpr bool kExact = true;
  static constexpr int kParts = 1;
  __device__ static void prepare(Piece&) {}
  __device__ static __forceinline__ void multiply_part(int, double (&acc)[4], const Piece& low, const Piece& high,
                                                       const Piece& b) {
    multiply_exactly<double>(acc, low, high, b);
  }
};
#undef FUSEDRNN_MMA

template <typename Math, typename Accumulator>
__device__ __forceinline__ void multiply_all(Accumulator (&acc)[4], const Piece& low, const Piece& high,
                                             const Piece& b) {
#pragma unroll
  for (int part = 0; part < Math::kParts; ++part) Math::multiply_part(part, acc, low, high, b);
}

__device__ __forceinline__ float widen(Bfloat16 x) {
  float r;
  asm("mov.b32 %0, {%1, %2};" : "=f"(r) : "h"(uint16_t(0)), "h"(x.bits));
  return r;
}
__device__ __forceinline__ float widen(Float16 x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
  return r;
}
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }

template <typename Scalar>
__device__ __forceinline__ Scalar narrow(float x);
template <>
__device__ __forceinline__ Bfloat16 narrow<Bfloat16>(float x) {
  Bfloat16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
  return r;
}
template <>
__device__ __forceinline__ Float16 narrow<Float16>(float x) {
  Float16 r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
  return r;
}
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <typename Scalar>
__device__ __forceinline__ double narrow(double x) {
  return x;
}

// 16 bytes that no block of this launch writes.
template <int offset>
__device__ __forceinline__ Piece load_global(const void* at) {
  Piece p;
  asm("ld.global.v4.b32 {%0, %1, %2, %3}, [%4+%5];"
      : "=r"(p.w[0]), "=r"(p.w[1]), "=r"(p.w[2]), "=r"(p.w[3])
      : "l"(at), "n"(offset));
  return p;
}

// Piece k .. of a row of n elements, zeros beyond its end. kWhole: rows begin at 16 bytes and hold whole
// pieces.
template <bool kWhole, typename Scalar>
__device__ __forceinline__ Piece load_piece(const Scalar* row, int64_t k, int64_t n) {
  Piece p{};
  if constexpr (kWhole) {
    if (k < n) p = *reinterpret_cast<const Piece*>(row + k);
  } else {
    Scalar* element = reinterpret_cast<Scalar*>(p.w);
#pragma unroll
    for (int i = 0; i < int(16 / sizeof(Scalar)); ++i)
      if (k + i < n) element[i] = row[k + i];
  }
  return p;
}

// N values side by side, moved in accesses as wide as their size allows: the largest power of 2 that divides it.
__host__ __device__ constexpr int pack_alignment(int bytes) { return bytes % 16 == 0 ? 16 : bytes & -bytes; }
template <typename Scalar, int N>
struct alignas(pack_alignment(sizeof(Scalar) * N)) Pack {
  Scalar v[N];
};

}  // namespace fusedrnn
