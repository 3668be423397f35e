// The cells of own_cells.py, one of them compiled at a time: OWN_CELL names it.
#define FUSEDRNN_CAPABILITY own
#define FUSEDRNN_TILES 0
#define FUSEDRNN_CELL OWN_CELL
#include "cells.h"
#include "cpu/simd.h"

namespace fusedrnn {
namespace own {

// Exact enough at x <= 0, where the tests ask for it.
template <typename C>
FUSEDRNN_INLINE Vec<C> exp_of(Vec<C> x) {
  const Reduced<C> e = reduce(at_least(Format<C>::kUnderflow, x));
  return e.scale.v + e.scale.v * e.expm1.v;
}
template <typename C>
FUSEDRNN_INLINE Vec<C> larger(Vec<C> a, Vec<C> b) {
  return a.v > b.v ? a.v : b.v;
}

}  // namespace own

struct TestSlstm {
  static constexpr const char* kName = "test_slstm";
  static constexpr int kGates = 4, kAccumulators = 4, kSaved = 4, kStates = 4, kParameters = 0, kInputs = 0;
  static constexpr bool kUsesH = true, kUsesHPrev = false, kDirectH = false;
  static constexpr int x_acc(int gate) { return gate; }
  static constexpr int h_acc(int gate) { return gate; }

  template <typename T>
  static void forward(const T* acc, const T* prev, const T*, const T*, T* next, T* saved) {
    const T m = own::larger(acc[1] + prev[3], acc[0]);
    const T i = own::exp_of(acc[0] - m), f = own::exp_of(acc[1] + prev[3] - m), z = tanh(acc[2]), o = sigmoid(acc[3]);
    next[1] = f * prev[1] + i * z;
    next[2] = f * prev[2] + i;
    next[0] = o * next[1] / next[2];
    next[3] = m;
    saved[0] = i;
    saved[1] = f;
    saved[2] = z;
    saved[3] = o;
  }

  template <typename T>
  static void backward(const T* d, const T* saved, const T* next, const T* prev, const T*, const T*, T* dacc, T* dprev,
                       T*, T*) {
    const T one = T(1.0f), i = saved[0], f = saved[1], z = saved[2], o = saved[3];
    const T dc = d[1] + d[0] * o / next[2];
    const T dn = d[2] - d[0] * o * next[1] / (next[2] * next[2]);
    dacc[0] = (dc * z + dn) * i;
    dacc[1] = (dc * prev[1] + dn * prev[2]) * f;
    dacc[2] = dc * i * (one - z * z);
    dacc[3] = d[0] * next[1] / next[2] * o * (one - o);
    dprev[1] = dc * f;
    dprev[2] = dn * f;
    dprev[3] = T(0.0f);
  }
};

struct TestZoneout {
  static constexpr const char* kName = "test_zoneout";
  static constexpr int kGates = 4, kAccumulators = 4, kSaved = 4, kStates = 2, kParameters = 3, kInputs = 1;
  static constexpr bool kUsesH = false, kUsesHPrev = false, kDirectH = false;
  static constexpr int x_acc(int gate) { return gate; }
  static constexpr int h_acc(int gate) { return gate; }

  template <typename T>
  static void forward(const T* acc, const T* prev, const T* p, const T* given, T* next, T* saved) {
    const T i = sigmoid(acc[0] + p[0] * prev[1]), f = sigmoid(acc[1] + p[1] * prev[1]), g = tanh(acc[2]);
    next[1] = prev[1] + given[0] * (f * prev[1] + i * g - prev[1]);
    const T o = sigmoid(acc[3] + p[2] * next[1]);
    next[0] = o * tanh(next[1]);
    saved[0] = i;
    saved[1] = f;
    saved[2] = g;
    saved[3] = o;
  }

  template <typename T>
  static void backward(const T* d, const T* saved, const T* next, const T* prev, const T* p, const T* given, T* dacc,
                       T* dprev, T* dp, T* dgiven) {
    const T one = T(1.0f), i = saved[0], f = saved[1], g = saved[2], o = saved[3], c = prev[1];
    const T t = tanh(next[1]);
    dacc[3] = d[0] * t * o * (one - o);
    const T dc = d[1] + d[0] * o * (one - t * t) + dacc[3] * p[2];
    const T dnew = given[0] * dc;
    dacc[0] = dnew * g * i * (one - i);
    dacc[1] = dnew * c * f * (one - f);
    dacc[2] = dnew * i * (one - g * g);
    dprev[1] = dc - dnew + dnew * f + dacc[0] * p[0] + dacc[1] * p[1];
    dp[0] = dacc[0] * c;
    dp[1] = dacc[1] * c;
    dp[2] = dacc[3] * next[1];
    dgiven[0] = dc * (f * c + i * g - c);
  }
};

}  // namespace fusedrnn

#include "cpu/recurrence_kernels.h"
