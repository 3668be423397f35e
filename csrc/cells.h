// Every cell's pointwise forward and backward, written once for host and device.
//
// T is float or double, or on the CPU a SIMD vector of them: sigmoid(T) and tanh(T) are found by overload.
// A cell has kGates gates (torch's order), kAccumulators pre-activation sums, kSaved arrays kept for backward, kStates
// states, of which the first is h, kParameters numbers of each unit and kInputs of each unit and step.
// Gate g of x W_ih^T goes into accumulator x_acc(g), gate g of h W_hh^T into h_acc(g); an accumulator that only
// h feeds starts from b_hh alone.
//
//   forward   acc[kAccumulators], prev[kStates], parameters, inputs -> next[kStates], saved[kSaved]
//   backward  d[kStates], the whole gradients of the new states; saved, next, prev, parameters, inputs
//             -> dacc, dprev[kStates], of which dprev[0] is only what reaches h past the product, dparameters, dinputs
//   output    h before a projection, from what was saved
//
// What the flags say is not used need not be there: next[0] without kUsesH, prev[0] without kUsesHPrev (in forward as
// well); without kDirectH dprev[0] is not written.
#pragma once

#ifndef __CUDACC_RTC__  // NVRTC has no headers, and needs none
#include <math.h>
#endif

#ifdef __CUDACC__
#define FUSEDRNN_HD __host__ __device__ __forceinline__
#else
#define FUSEDRNN_HD inline __attribute__((always_inline))
#endif

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
template <typename T>
FUSEDRNN_HD T relu_backward(T dy, T y) {
  return y <= T(0) ? T(0) : dy;
}

struct Lstm {
  static constexpr const char* kName = "lstm";
  static constexpr int kGates = 4;         // i f g o
  static constexpr int kAccumulators = 4;  // i f g o
  static constexpr int kSaved = 4;         // i f g o, after the activation
  static constexpr int kStates = 2;        // h c
  static constexpr int kParameters = 0, kInputs = 0;
  static constexpr bool kUsesH = false;      // backward reads its own output h
  static constexpr bool kUsesHPrev = false;  // forward and backward read h_prev beyond the matmul
  static constexpr bool kDirectH = false;    // backward has a dh_prev besides dacc W_hh
  FUSEDRNN_HD static constexpr int x_acc(int gate) { return gate; }
  FUSEDRNN_HD static constexpr int h_acc(int gate) { return gate; }

  template <typename T>
  FUSEDRNN_HD static void forward(const T* acc, const T* prev, const T* /*parameters*/, const T* /*inputs*/, T* next,
                                  T* saved) {
    const T i = sigmoid(acc[0]);
    const T f = sigmoid(acc[1]);
    const T g = tanh(acc[2]);
    const T o = sigmoid(acc[3]);
    next[1] = f * prev[1] + i * g;
    next[0] = o * tanh(next[1]);
    saved[0] = i;
    saved[1] = f;
    saved[2] = g;
    saved[3] = o;
  }

  template <typename T>
  FUSEDRNN_HD static void backward(const T* d, const T* saved, const T* next, const T* prev, const T* /*parameters*/,
                                   const T* /*inputs*/, T* dacc, T* dprev, T* /*dparameters*/, T* /*dinputs*/) {
    const T one = T(1.0f);
    const T i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const T tanh_c = tanh(next[1]);
    const T dc_total = d[1] + d[0] * o * (one - tanh_c * tanh_c);
    dacc[0] = dc_total * g * i * (one - i);
    dacc[1] = dc_total * prev[1] * f * (one - f);
    dacc[2] = dc_total * i * (one - g * g);
    dacc[3] = d[0] * tanh_c * o * (one - o);
    dprev[1] = dc_total * f;
  }

  template <typename T>
  FUSEDRNN_HD static T output(const T* saved, const T* next) {
    return saved[3] * tanh(next[1]);
  }
};

// torch's form: the reset gate multiplies the recurrent product, so the candidate has an input and a hidden part.
struct Gru {
  static constexpr const char* kName = "gru";
  static constexpr int kGates = 3;         // r z n
  static constexpr int kAccumulators = 4;  // r z nx nh
  static constexpr int kSaved = 4;         // r z n after the activation, nh before
  static constexpr int kStates = 1, kParameters = 0, kInputs = 0;
  static constexpr bool kUsesH = false;
  static constexpr bool kUsesHPrev = true;
  static constexpr bool kDirectH = true;
  FUSEDRNN_HD static constexpr int x_acc(int gate) { return gate; }
  FUSEDRNN_HD static constexpr int h_acc(int gate) { return gate == 2 ? 3 : gate; }

  template <typename T>
  FUSEDRNN_HD static void forward(const T* acc, const T* prev, const T* /*parameters*/, const T* /*inputs*/, T* next,
                                  T* saved) {
    const T r = sigmoid(acc[0]);
    const T z = sigmoid(acc[1]);
    const T n = tanh(acc[2] + r * acc[3]);
    next[0] = n + z * (prev[0] - n);
    saved[0] = r;
    saved[1] = z;
    saved[2] = n;
    saved[3] = acc[3];
  }

  template <typename T>
  FUSEDRNN_HD static void backward(const T* d, const T* saved, const T* /*next*/, const T* prev,
                                   const T* /*parameters*/, const T* /*inputs*/, T* dacc, T* dprev, T* /*dparameters*/,
                                   T* /*dinputs*/) {
    const T one = T(1.0f);
    const T r = saved[0], z = saved[1], n = saved[2], nh = saved[3];
    const T dn = d[0] * (one - z) * (one - n * n);
    dacc[0] = dn * nh * r * (one - r);
    dacc[1] = d[0] * (prev[0] - n) * z * (one - z);
    dacc[2] = dn;
    dacc[3] = dn * r;
    dprev[0] = d[0] * z;
  }
};

template <bool kTanh>
struct Rnn {
  static constexpr const char* kName = kTanh ? "rnn_tanh" : "rnn_relu";
  static constexpr int kGates = 1, kAccumulators = 1, kSaved = 0;
  static constexpr int kStates = 1, kParameters = 0, kInputs = 0;
  static constexpr bool kUsesH = true, kUsesHPrev = false, kDirectH = false;
  FUSEDRNN_HD static constexpr int x_acc(int gate) { return gate; }
  FUSEDRNN_HD static constexpr int h_acc(int gate) { return gate; }

  template <typename T>
  FUSEDRNN_HD static void forward(const T* acc, const T* /*prev*/, const T* /*parameters*/, const T* /*inputs*/,
                                  T* next, T* /*saved*/) {
    next[0] = kTanh ? tanh(acc[0]) : relu(acc[0]);
  }

  template <typename T>
  FUSEDRNN_HD static void backward(const T* d, const T* /*saved*/, const T* next, const T* /*prev*/,
                                   const T* /*parameters*/, const T* /*inputs*/, T* dacc, T* /*dprev*/,
                                   T* /*dparameters*/, T* /*dinputs*/) {
    dacc[0] = kTanh ? d[0] * (T(1.0f) - next[0] * next[0]) : relu_backward(d[0], next[0]);
  }
};
using RnnTanh = Rnn<true>;
using RnnRelu = Rnn<false>;

}  // namespace fusedrnn
