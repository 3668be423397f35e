// Functions of one number that cells are made of, for host and device; csrc/cpu/pointwise.h has them for vectors.
// They are exact about infinities and NaN, as torch's.
#pragma once

#ifndef __CUDACC_RTC__  // NVRTC has no headers, and needs none
#include <math.h>
#endif

#ifdef __CUDACC__
#define FUSEDRNN_HD __host__ __device__ __forceinline__
#else
#define FUSEDRNN_HD inline __attribute__((always_inline))
#endif

#define FUSEDRNN_INFINITY __builtin_huge_val()
#define FUSEDRNN_NAN (__builtin_huge_val() - __builtin_huge_val())

namespace fusedrnn {

// exp(-x) may overflow to infinity; 1 / (1 + infinity) is still 0.
FUSEDRNN_HD float sigmoid(float x) {
#ifdef __CUDA_ARCH__
  return __fdividef(1.0f, 1.0f + __expf(-x));
#else
  return 1.0f / (1.0f + expf(-x));
#endif
}
FUSEDRNN_HD double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }
FUSEDRNN_HD float tanh(float x) { return ::tanhf(x); }
FUSEDRNN_HD double tanh(double x) { return ::tanh(x); }
template <typename T>
FUSEDRNN_HD T relu(T x) {
  return x < T(0) ? T(0) : x;
}

#define FUSEDRNN_FUNCTION(name)                            \
  FUSEDRNN_HD float name(float x) { return ::name##f(x); } \
  FUSEDRNN_HD double name(double x) { return ::name(x); }
FUSEDRNN_FUNCTION(exp)
FUSEDRNN_FUNCTION(expm1)
FUSEDRNN_FUNCTION(log)
FUSEDRNN_FUNCTION(log1p)
FUSEDRNN_FUNCTION(sqrt)
FUSEDRNN_FUNCTION(sin)
FUSEDRNN_FUNCTION(cos)
FUSEDRNN_FUNCTION(erf)
FUSEDRNN_FUNCTION(floor)
FUSEDRNN_FUNCTION(ceil)
#undef FUSEDRNN_FUNCTION
FUSEDRNN_HD float abs(float x) { return ::fabsf(x); }
FUSEDRNN_HD double abs(double x) { return ::fabs(x); }

template <typename T>
FUSEDRNN_HD T where(bool condition, T a, T b) {
  return condition ? a : b;
}
// Of a limit, which is a number, and x; NaN passes.
template <typename T>
FUSEDRNN_HD T at_least(T limit, T x) {
  return limit > x ? limit : x;
}
template <typename T>
FUSEDRNN_HD T at_most(T limit, T x) {
  return limit < x ? limit : x;
}
// A NaN of either passes.
template <typename T>
FUSEDRNN_HD T maximum(T a, T b) {
  return a > b || a != a ? a : b;
}
template <typename T>
FUSEDRNN_HD T minimum(T a, T b) {
  return a < b || a != a ? a : b;
}

}  // namespace fusedrnn
