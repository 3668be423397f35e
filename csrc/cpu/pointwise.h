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

// 2^n in two factors, either of which is normal where the product is subnormal or about to be infinite.
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
  const typename V::RawInt half = whole >> 1;
  const auto power = [](typename V::RawInt k) {
    return (typename V::Raw)((k + typename F::Int(F::kBias)) << F::kMantissa);
  };
  // |r| is at most ln(2) / 2: nothing is left to reduce.
  return (C(1) + reduce(r).expm1.v) * power(half) * power(whole - half);
}

template <typename C>
FUSEDRNN_INLINE Vec<C> expm1(Vec<C> x) {
  constexpr C kHigh = C(1), kLow = C(-40);
  const Reduced<C> e = reduce(at_least(kLow, at_most(kHigh, x)));
  const Vec<C> small = e.scale.v * e.expm1.v + (e.scale.v - C(1));
  return x.v > kHigh ? exp(x).v - C(1) : small.v;
}

// x = m 2^k with m in [sqrt(1/2), sqrt(2)); log m = 2 artanh(s) with s = (m - 1) / (m + 1).
template <typename C>
FUSEDRNN_INLINE Vec<C> log(Vec<C> x) {
  using F = Format<C>;
  using V = Vec<C>;
  using Raw = typename V::Raw;
  using RawInt = typename V::RawInt;
  constexpr C kLeast = sizeof(C) == 4 ? C(1.17549435e-38) : C(2.2250738585072014e-308);
  constexpr C kLift = C(typename F::Int(1) << F::kMantissa), kInfinity = C(__builtin_huge_val());
  const RawInt subnormal = x.v < kLeast;
  const Raw lifted = subnormal ? x.v * kLift : x.v;
  // The bits of sqrt(1/2) less, so that the exponent counts from there.
  const C root = C(0.70710678118654752440);
  typename F::Int root_bits;
  __builtin_memcpy(&root_bits, &root, sizeof(root));
  const RawInt bits = (RawInt)lifted;
  const RawInt k = (bits - root_bits) >> F::kMantissa;
  const Raw m = (Raw)(bits - (k << F::kMantissa));
  const Raw exponent = __builtin_convertvector(k, Raw) - (subnormal ? C(F::kMantissa) - Raw{} : Raw{});
  const Raw f = m - C(1);
  const Raw s = f / (C(2) + f), z = s * s;
  constexpr int kTerms = sizeof(C) == 4 ? 5 : 11;
  Raw p = C(2.0 / (2 * kTerms + 1)) - Raw{};
#pragma GCC unroll 16
  for (int j = kTerms - 1; j >= 1; --j) p = p * z + C(2.0 / (2 * j + 1));
  // 2 s = f - s f: the part that is large is exact.
  const Raw tail = s * (z * p - f);
  const Raw found = exponent * F::kLn2High + (f + (tail + exponent * F::kLn2Low));
  const Raw special = x.v == C(0) ? -kInfinity - Raw{} : kInfinity - Raw{};
  const Raw ordinary = x.v < C(0) ? (kInfinity - kInfinity) - Raw{} : found;
  return x.v == C(0) || x.v == kInfinity ? special : (x.v != x.v ? x.v : ordinary);
}

// log(u) x / (u - 1) with u = 1 + x rounded: the error of u is in both factors.
template <typename C>
FUSEDRNN_INLINE Vec<C> log1p(Vec<C> x) {
  const typename Vec<C>::Raw u = C(1) + x.v, d = u - C(1);
  const typename Vec<C>::Raw found = log(Vec<C>(u)).v * (x.v / d);
  return d == C(0) || x.v == C(__builtin_huge_val()) ? x.v : found;
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
