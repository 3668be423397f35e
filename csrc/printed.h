// Printed by `make cells` from fusedrnn/zoo.py, which is what to edit.
// clang-format off
#pragma once

#include "pointwise.h"

namespace fusedrnn {

struct Lstm {
  static constexpr const char* kName = "lstm";
  static constexpr int kGates = 4;  // i f g o
  static constexpr int kAccumulators = 4;  // i f g o
  static constexpr int kSaved = 4;  // i f g o
  static constexpr int kStates = 2;  // h c
  static constexpr int kParameters = 0, kInputs = 0;
  static constexpr bool kUsesH = false, kUsesHPrev = false, kDirectH = false;
  FUSEDRNN_HD static constexpr int x_acc(int gate) { return gate; }
  FUSEDRNN_HD static constexpr int h_acc(int gate) { return gate; }

  template <typename T>
  FUSEDRNN_HD static void forward(const T* acc, const T* prev, const T* parameters, const T* inputs, T* next,
                                  T* saved) {
    const T i = sigmoid(acc[0]);
    saved[0] = i;
    const T f = sigmoid(acc[1]);
    saved[1] = f;
    const T g = tanh(acc[2]);
    saved[2] = g;
    const T o = sigmoid(acc[3]);
    saved[3] = o;
    const T c = f * prev[1] + i * g;
    next[0] = o * tanh(c);
    next[1] = c;
  }

  template <typename T>
  FUSEDRNN_HD static void backward(const T* d, const T* saved, const T* next, const T* prev,
                                   const T* parameters, const T* inputs, T* dacc, T* dprev, T* dparameters,
                                   T* dinputs) {
    const T i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const T t0 = tanh(next[1]);
    const T t1 = d[1] + d[0] * o * (T(1.0f) - t0 * t0);
    dacc[0] = t1 * g * (i * (T(1.0f) - i));
    dacc[1] = t1 * prev[1] * (f * (T(1.0f) - f));
    dacc[2] = t1 * i * (T(1.0f) - g * g);
    dacc[3] = d[0] * t0 * (o * (T(1.0f) - o));
    dprev[1] = t1 * f;
  }

  template <typename T>
  FUSEDRNN_HD static T output(const T* saved, const T* next) {
    const T o = saved[3];
    return o * tanh(next[1]);
  }
};

struct Gru {
  static constexpr const char* kName = "gru";
  static constexpr int kGates = 3;  // r z n
  static constexpr int kAccumulators = 4;  // r z nx nh
  static constexpr int kSaved = 4;  // r z n nh
  static constexpr int kStates = 1;  // h
  static constexpr int kParameters = 0, kInputs = 0;
  static constexpr bool kUsesH = false, kUsesHPrev = true, kDirectH = true;
  FUSEDRNN_HD static constexpr int x_acc(int gate) { return gate; }
  FUSEDRNN_HD static constexpr int h_acc(int gate) { return gate == 2 ? 3 : gate; }

  template <typename T>
  FUSEDRNN_HD static void forward(const T* acc, const T* prev, const T* parameters, const T* inputs, T* next,
                                  T* saved) {
    const T r = sigmoid(acc[0]);
    saved[0] = r;
    const T z = sigmoid(acc[1]);
    saved[1] = z;
    const T n = tanh(acc[2] + r * acc[3]);
    saved[2] = n;
    saved[3] = acc[3];
    next[0] = n + z * (prev[0] - n);
  }

  template <typename T>
  FUSEDRNN_HD static void backward(const T* d, const T* saved, const T* next, const T* prev,
                                   const T* parameters, const T* inputs, T* dacc, T* dprev, T* dparameters,
                                   T* dinputs) {
    const T r = saved[0], z = saved[1], n = saved[2], nh = saved[3];
    const T t0 = T(1.0f) - z;
    const T t1 = d[0] * t0 * (T(1.0f) - n * n);
    dacc[0] = t1 * nh * (r * (T(1.0f) - r));
    dacc[1] = d[0] * (prev[0] - n) * (z * t0);
    dacc[2] = t1;
    dacc[3] = t1 * r;
    dprev[0] = d[0] * z;
  }
};

struct RnnTanh {
  static constexpr const char* kName = "rnn_tanh";
  static constexpr int kGates = 1;  // h
  static constexpr int kAccumulators = 1;  // h
  static constexpr int kSaved = 0;
  static constexpr int kStates = 1;  // h
  static constexpr int kParameters = 0, kInputs = 0;
  static constexpr bool kUsesH = true, kUsesHPrev = false, kDirectH = false;
  FUSEDRNN_HD static constexpr int x_acc(int gate) { return gate; }
  FUSEDRNN_HD static constexpr int h_acc(int gate) { return gate; }

  template <typename T>
  FUSEDRNN_HD static void forward(const T* acc, const T* prev, const T* parameters, const T* inputs, T* next,
                                  T* saved) {
    next[0] = tanh(acc[0]);
  }

  template <typename T>
  FUSEDRNN_HD static void backward(const T* d, const T* saved, const T* next, const T* prev,
                                   const T* parameters, const T* inputs, T* dacc, T* dprev, T* dparameters,
                                   T* dinputs) {
    dacc[0] = d[0] * (T(1.0f) - next[0] * next[0]);
  }
};

struct RnnRelu {
  static constexpr const char* kName = "rnn_relu";
  static constexpr int kGates = 1;  // h
  static constexpr int kAccumulators = 1;  // h
  static constexpr int kSaved = 0;
  static constexpr int kStates = 1;  // h
  static constexpr int kParameters = 0, kInputs = 0;
  static constexpr bool kUsesH = true, kUsesHPrev = false, kDirectH = false;
  FUSEDRNN_HD static constexpr int x_acc(int gate) { return gate; }
  FUSEDRNN_HD static constexpr int h_acc(int gate) { return gate; }

  template <typename T>
  FUSEDRNN_HD static void forward(const T* acc, const T* prev, const T* parameters, const T* inputs, T* next,
                                  T* saved) {
    next[0] = relu(acc[0]);
  }

  template <typename T>
  FUSEDRNN_HD static void backward(const T* d, const T* saved, const T* next, const T* prev,
                                   const T* parameters, const T* inputs, T* dacc, T* dprev, T* dparameters,
                                   T* dinputs) {
    dacc[0] = where(next[0] <= T(0.0f), T(0.0f), d[0]);
  }
};

struct Slstm {
  static constexpr const char* kName = "slstm";
  static constexpr int kGates = 4;  // i f z o
  static constexpr int kAccumulators = 4;  // i f z o
  static constexpr int kSaved = 4;  // i z o a_f
  static constexpr int kStates = 4;  // h c n m
  static constexpr int kParameters = 0, kInputs = 0;
  static constexpr bool kUsesH = false, kUsesHPrev = false, kDirectH = false;
  FUSEDRNN_HD static constexpr int x_acc(int gate) { return gate; }
  FUSEDRNN_HD static constexpr int h_acc(int gate) { return gate; }

  template <typename T>
  FUSEDRNN_HD static void forward(const T* acc, const T* prev, const T* parameters, const T* inputs, T* next,
                                  T* saved) {
    const T l = prev[3] + (at_most(T(0.0f), acc[1]) - log1p(exp(-abs(acc[1]))));
    const T m = where(prev[2] == T(0.0f), acc[0], maximum(acc[0], l));
    const T i = exp(acc[0] - m);
    saved[0] = i;
    const T z = tanh(acc[2]);
    saved[1] = z;
    const T o = sigmoid(acc[3]);
    saved[2] = o;
    saved[3] = acc[1];
    const T f = exp(at_most(T(80.0f), l - m));
    const T c = f * prev[1] + i * z;
    const T n = f * prev[2] + i;
    next[0] = o * c / n;
    next[1] = c;
    next[2] = n;
    next[3] = m;
  }

  template <typename T>
  FUSEDRNN_HD static void backward(const T* d, const T* saved, const T* next, const T* prev,
                                   const T* parameters, const T* inputs, T* dacc, T* dprev, T* dparameters,
                                   T* dinputs) {
    const T i = saved[0], z = saved[1], o = saved[2], a_f = saved[3];
    const T t0 = d[2] - d[0] * (o * next[1] / next[2] / next[2]);
    const T t1 = d[0] / next[2];
    const T t2 = d[1] + t1 * o;
    dacc[0] = (t0 + t2 * z) * i;
    const T t3 = exp(-abs(a_f));
    const T l = prev[3] + (at_most(T(0.0f), a_f) - log1p(t3));
    const T t4 = l - next[3];
    const T f = exp(at_most(T(80.0f), t4));
    const T t5 = where(t4 < T(80.0f), (t0 * prev[2] + t2 * prev[1]) * f, T(0.0f));
    const auto t6 = a_f < T(0.0f);
    dacc[1] = t5 * (where(t6, T(1.0f), T(0.0f)) - where(t6, T(1.0f), T(-1.0f)) * (t3 / (t3 + T(1.0f))));
    dacc[2] = t2 * i * (T(1.0f) - z * z);
    dacc[3] = t1 * next[1] * (o * (T(1.0f) - o));
    dprev[1] = t2 * f;
    dprev[2] = t0 * f;
    dprev[3] = t5;
  }

  template <typename T>
  FUSEDRNN_HD static T output(const T* saved, const T* next) {
    const T o = saved[2];
    return o * next[1] / next[2];
  }
};

}  // namespace fusedrnn
