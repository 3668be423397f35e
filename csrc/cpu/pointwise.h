// The functions of csrc/pointwise.h for vectors.
#pragma once

#include <math.h>

#include "simd.h"

namespace fusedrnn::FUSEDRNN_CAPABILITY {

#define FUSEDRNN_COMPARISON(sign)                          \
  template <typename C>                                    \
  FUSEDRNN_INLINE auto operator sign(Vec<C> a, Vec<C> b) { \
    return a.v sign b.v;                                   \
  }
FUSEDRNN_COMPARISON(<)
FUSEDRNN_COMPARISON(<=)
FUSEDRNN_COMPARISON(>)
FUSEDRNN_COMPARISON(>=)
FUSEDRNN_COMPARISON(==)
FUSEDRNN_COMPARISON(!=)
#undef FUSEDRNN_COMPARISON

template <typename Mask, typename C>
FUSEDRNN_INLINE Vec<C> where(Mask condition, Vec<C> a, Vec<C> b) {
  return condition ? a.v : b.v;
}
template <typename C>
FUSEDRNN_INLINE Vec<C> operator-(Vec<C> x) {
  return -x.v;
}
template <typename C>
FUSEDRNN_INLINE Vec<C> abs(Vec<C> x) {
  using Int = typename Vec<C>::Int;
  constexpr Int kSign = Int(1) << (sizeof(C) * 8 - 1);
  return (typename Vec<C>::Raw)((typename Vec<C>::RawInt)x.v & ~kSign);
}
template <typename C>
FUSEDRNN_INLINE Vec<C> at_least(Vec<C> limit, Vec<C> x) {
  return limit.v > x.v ? limit.v : x.v;
}
template <typename C>
FUSEDRNN_INLINE Vec<C> at_most(Vec<C> limit, Vec<C> x) {
  return limit.v < x.v ? limit.v : x.v;
}
template <typename C>
FUSEDRNN_INLINE Vec<C> maximum(Vec<C> a, Vec<C> b) {
  return (a.v > b.v) | (a.v != a.v) ? a.v : b.v;
}
template <typename C>
FUSEDRNN_INLINE Vec<C> minimum(Vec<C> a, Vec<C> b) {
  return (a.v < b.v) | (a.v != a.v) ? a.v : b.v;
}

// x 2^n: in two factors, either of which is normal where the product is subnormal or about to be infinite.
template <typename C>
FUSEDRNN_INLINE Vec<C> scaled(Vec<C> x, typename Vec<C>::RawInt n, typename Vec<C>::Raw) {
  using F = Format<C>;
  const typename Vec<C>::RawInt half = n >> 1;
  const auto power = [](typename Vec<C>::RawInt k) {
    return (typename Vec<C>::Raw)((k + typename F::Int(F::kBias)) << F::kMantissa);
  };
  return x.v * power(half) * power(n - half);
}
#if FUSEDRNN_VECTOR_BYTES == 64 && defined(__AVX512F__)
FUSEDRNN_INLINE Vec<float> scaled(Vec<float> x, Vec<float>::RawInt, Vec<float>::Raw n) {
  return (Vec<float>::Raw)_mm512_scalef_ps((__m512)x.v, (__m512)n);
}
#endif

template <typename C>
FUSEDRNN_INLINE Vec<C> exp(Vec<C> x) {
  using F = Format<C>;
  using V = Vec<C>;
  constexpr C kHigh = sizeof(C) == 4 ? C(90) : C(711), kLow = sizeof(C) == 4 ? C(-110) : C(-750);
  const V m = at_least(kLow, at_most(kHigh, x));
  const C magic = C(3) * C(typename F::Int(1) << (F::kMantissa - 1));
  const typename V::Raw shifted = m.v * C(1.44269504088896340736) + magic;
  const typename V::Raw n = shifted - magic;
  const V r = (m.v - n * F::kLn2High) - n * F::kLn2Low;
  const typename V::RawInt whole = (typename V::RawInt)shifted - (typename V::RawInt)(magic - typename V::Raw{});
  return scaled(Vec<C>(C(1) + expm1_of_reduced(r).v), whole, n);
}

template <typename C>
FUSEDRNN_INLINE Vec<C> expm1(Vec<C> x) {
  constexpr C kHigh = C(1), kLow = C(-40);
  const Reduced<C> e = reduce(at_least(kLow, at_most(kHigh, x)));
  const Vec<C> small = e.scale.v * e.expm1.v + (e.scale.v - C(1));
  return x.v > kHigh ? exp(x).v - C(1) : small.v;
}

// x = m 2^k with m in [sqrt(1/2), sqrt(2)), x normal and positive.
template <typename C>
struct Split {
  Vec<C> m;
  typename Vec<C>::RawInt k;
};
template <typename C>
FUSEDRNN_INLINE Split<C> split(Vec<C> x) {
  using F = Format<C>;
  using RawInt = typename Vec<C>::RawInt;
  // The bits of sqrt(1/2) less, so that the exponent counts from there.
  const C root = C(0.70710678118654752440);
  typename F::Int root_bits;
  __builtin_memcpy(&root_bits, &root, sizeof(root));
  const RawInt bits = (RawInt)x.v, k = (bits - root_bits) >> F::kMantissa;
  return {Vec<C>((typename Vec<C>::Raw)(bits - (k << F::kMantissa))), k};
}
// log((1 + f) 2^k) for 1 + f of those; log(1 + f) = 2 artanh(s) with s = f / (2 + f).
template <typename C>
FUSEDRNN_INLINE Vec<C> log_of(Vec<C> f, typename Vec<C>::Raw k) {
  using F = Format<C>;
  using Raw = typename Vec<C>::Raw;
  const Raw s = quotient(f, Vec<C>(C(2) + f.v)).v, z = s * s;
  constexpr int kTerms = sizeof(C) == 4 ? 5 : 11;
  Raw p = C(2.0 / (2 * kTerms + 1)) - Raw{};
#pragma GCC unroll 16
  for (int j = kTerms - 1; j >= 1; --j) p = p * z + C(2.0 / (2 * j + 1));
  // 2 s = f - s f: the part that is large is exact.
  const Raw tail = s * (z * p - f.v);
  return k * F::kLn2High + (f.v + (tail + k * F::kLn2Low));
}

template <typename C>
FUSEDRNN_INLINE Vec<C> log(Vec<C> x) {
  using F = Format<C>;
  using Raw = typename Vec<C>::Raw;
  constexpr C kLeast = sizeof(C) == 4 ? C(1.17549435e-38) : C(2.2250738585072014e-308);
  constexpr C kLift = C(typename F::Int(1) << F::kMantissa), kInfinity = C(__builtin_huge_val());
  const typename Vec<C>::RawInt subnormal = x.v < kLeast;
  const Split<C> of = split(Vec<C>(subnormal ? x.v * kLift : x.v));
  const Raw k = __builtin_convertvector(of.k, Raw) - (subnormal ? C(F::kMantissa) - Raw{} : Raw{});
  const Raw found = log_of(Vec<C>(of.m.v - C(1)), k).v;
  const Raw special = x.v == C(0) ? -kInfinity - Raw{} : kInfinity - Raw{};
  const Raw ordinary = x.v < C(0) ? (kInfinity - kInfinity) - Raw{} : found;
  return x.v == C(0) || x.v == kInfinity ? special : (x.v != x.v ? x.v : ordinary);
}

// Of u = 1 + x rounded, and what the rounding lost: f takes it up again.
template <typename C>
FUSEDRNN_INLINE Vec<C> log1p(Vec<C> x) {
  using F = Format<C>;
  using Raw = typename Vec<C>::Raw;
  using RawInt = typename Vec<C>::RawInt;
  constexpr C kInfinity = C(__builtin_huge_val());
  constexpr typename F::Int kMost = 2 * F::kMantissa;  // with a larger k it is nothing
  const Raw u = C(1) + x.v, lost = x.v > C(1) ? C(1) - (u - x.v) : x.v - (u - C(1));
  const Split<C> of = split(Vec<C>(u));
  const RawInt k = of.k > kMost ? kMost - RawInt{} : of.k;
  const Raw back = (Raw)((typename F::Int(F::kBias) - k) << F::kMantissa);
  const Raw found = log_of(Vec<C>((of.m.v - C(1)) + lost * back), __builtin_convertvector(of.k, Raw)).v;
  const Raw special = x.v == C(-1) ? -kInfinity - Raw{} : (x.v < C(-1) ? (kInfinity - kInfinity) - Raw{} : x.v);
  return x.v > C(-1) && x.v < kInfinity ? found : special;
}

#define FUSEDRNN_LANES(name)                                                         \
  template <typename C>                                                              \
  FUSEDRNN_INLINE Vec<C> name(Vec<C> x) {                                            \
    for (int i = 0; i < Vec<C>::kWidth; ++i) {                                       \
      const C lane = x.v[i];                                                         \
      x.v[i] = sizeof(C) == 4 ? C(::name##f(float(lane))) : C(::name(double(lane))); \
    }                                                                                \
    return x;                                                                        \
  }
FUSEDRNN_LANES(sqrt)
FUSEDRNN_LANES(sin)
FUSEDRNN_LANES(cos)
FUSEDRNN_LANES(erf)
FUSEDRNN_LANES(floor)
FUSEDRNN_LANES(ceil)
#undef FUSEDRNN_LANES

}  // namespace fusedrnn::FUSEDRNN_CAPABILITY
