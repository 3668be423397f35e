// What tests/test_cells_printed.py calls: cells on numbers of the host and on vectors.
#pragma once

#include <math.h>

#include "cpu/pointwise.h"
#include "pointwise.h"

namespace fusedrnn {

template <typename Cell, typename T, typename C>
void step(const C* const* in, C* const* out, int64_t count, int width) {
  for (int64_t i = 0; i < count; i += width) {
    T acc[Cell::kAccumulators], prev[Cell::kStates], parameters[Cell::kParameters + 1], inputs[Cell::kInputs + 1];
    T d[Cell::kStates], next[Cell::kStates], saved[Cell::kSaved + 1];
    T dacc[Cell::kAccumulators], dprev[Cell::kStates], dp[Cell::kParameters + 1], di[Cell::kInputs + 1];
    const C* const* from = in;
    const auto take = [&](T* to, int n) {
      for (int k = 0; k < n; ++k) __builtin_memcpy(&to[k], *from++ + i, sizeof(T));
    };
    take(acc, Cell::kAccumulators);
    take(prev, Cell::kStates);
    take(parameters, Cell::kParameters);
    take(inputs, Cell::kInputs);
    take(d, Cell::kStates);
    Cell::template forward<T>(acc, prev, parameters, inputs, next, saved);
    T seen[Cell::kStates];
    for (int k = 0; k < Cell::kStates; ++k) seen[k] = k || Cell::kUsesH ? next[k] : T(C(NAN));
    if (!Cell::kUsesHPrev) prev[0] = T(C(NAN));
    dprev[0] = T(C(0));
    Cell::template backward<T>(d, saved, seen, prev, parameters, inputs, dacc, dprev, dp, di);
    C* const* to = out;
    const auto give = [&](const T* f, int n) {
      for (int k = 0; k < n; ++k) __builtin_memcpy(*to++ + i, &f[k], sizeof(T));
    };
    give(next, Cell::kStates);
    give(saved, Cell::kSaved);
    give(dacc, Cell::kAccumulators);
    give(dprev, Cell::kStates);
    give(dp, Cell::kParameters);
    give(di, Cell::kInputs);
  }
}
// A cell by its name: arrays of `count` numbers in, arrays out.
#define CELL(name)                                                                         \
  extern "C" void name##_double(const double* const* i, double* const* o, int64_t n) {     \
    step<name, double, double>(i, o, n, 1);                                                \
  }                                                                                        \
  extern "C" void name##_float(const float* const* i, float* const* o, int64_t n) {        \
    step<name, float, float>(i, o, n, 1);                                                  \
  }                                                                                        \
  extern "C" void name##_vec_double(const double* const* i, double* const* o, int64_t n) { \
    using V = here::Vec<double>;                                                           \
    step<name, V, double>(i, o, n, V::kWidth);                                             \
  }                                                                                        \
  extern "C" void name##_vec_float(const float* const* i, float* const* o, int64_t n) {    \
    using V = here::Vec<float>;                                                            \
    step<name, V, float>(i, o, n, V::kWidth);                                              \
  }
// The same of a function of one number.
#define ONE(f)                                                                     \
  extern "C" void f##_of_double(const double* a, double* b, int64_t n) {           \
    for (int64_t i = 0; i < n; ++i) b[i] = f(a[i]);                                \
  }                                                                                \
  extern "C" void f##_of_float(const float* a, float* b, int64_t n) {              \
    for (int64_t i = 0; i < n; ++i) b[i] = f(a[i]);                                \
  }                                                                                \
  extern "C" void f##_of_vec_double(const double* a, double* b, int64_t n) {       \
    using V = here::Vec<double>;                                                   \
    for (int64_t i = 0; i < n; i += V::kWidth) store(b + i, f(here::load(a + i))); \
  }                                                                                \
  extern "C" void f##_of_vec_float(const float* a, float* b, int64_t n) {          \
    using V = here::Vec<float>;                                                    \
    for (int64_t i = 0; i < n; i += V::kWidth) store(b + i, f(here::load(a + i))); \
  }

ONE(exp)
ONE(expm1)
ONE(log) ONE(log1p) ONE(sqrt) ONE(abs) ONE(sigmoid) ONE(tanh) ONE(relu) ONE(sin) ONE(cos) ONE(erf) ONE(floor) ONE(ceil)

}  // namespace fusedrnn
