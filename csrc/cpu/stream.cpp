#include "stream.h"

#include <atomic>
#include <cstring>

#include "sequence.h"

namespace fusedrnn {
namespace {

int32_t scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return kFloat;
    case Dtype::kFloat64:
      return kDouble;
    case Dtype::kBfloat16:
      return kBFloat16;
    default:
      return kHalf;
  }
}

int64_t bytes_of(const Tensor& t) { return t ? t.numel() * t.element_size() : 0; }

Tensor copy_of(const void* from, ::fusedrnn::Sizes sizes, int32_t dtype) {
  Tensor t = Tensor::empty(sizes, dtype);
  std::memcpy(t.writable(), from, static_cast<size_t>(bytes_of(t)));
  return t;
}

}  // namespace

struct Stream::State {
  std::string cell;
  Sizes sizes;
  int32_t dtype;
  int64_t out;
  std::vector<Inputs> layers;  // x and resets are put in at each call
  Tensor h, c;
  // Of the last length that came.
  int64_t steps = 0;
  Tensor x, between[2], y, resets;
  std::atomic_flag busy;

  int64_t bytes() const {
    int64_t sum = 0;
    for (const Inputs& in : layers) {
      for (const Tensor* t : {&in.w_ih, &in.w_hh, &in.b_ih, &in.b_hh, &in.w_hr, &in.panels, &in.panels_ih, &in.scale_ih,
                              &in.scale_hh, &in.scale_hr}) {
        sum += bytes_of(*t);
      }
    }
    return sum;
  }

  void make_room(int64_t for_steps) {
    if (steps == for_steps) return;
    steps = 0;
    x = Tensor::empty({for_steps, sizes.batch, sizes.input}, dtype);
    for (size_t k = 0; k < 2 && k + 1 < layers.size(); ++k) {
      between[k] = Tensor::empty({for_steps, sizes.batch, out}, dtype);
    }
    resets = Tensor::empty({for_steps, sizes.batch}, kBool);
    steps = for_steps;
  }

  void run(const void* from, const bool* reset, void* to) {
    std::memcpy(x.writable(), from, static_cast<size_t>(bytes_of(x)));
    if (reset) std::memcpy(resets.writable(), reset, static_cast<size_t>(resets.numel()));
    const int64_t h_bytes = sizes.batch * out * h.element_size(),
                  c_bytes = sizes.batch * sizes.hidden * h.element_size();
    for (size_t k = 0; k < layers.size(); ++k) {
      Inputs& in = layers[k];
      const Tensor& input = k ? between[(k - 1) % 2] : x;
      in.x = input.with_dims(3);
      in.resets = reset ? resets.with_dims(2) : Tensor();
      void* const result = k + 1 < layers.size() ? between[k % 2].writable() : to;
      // The kernel has read the states when it writes them.
      const int64_t at = static_cast<int64_t>(k);
      sequence_into(cell, in, result, static_cast<char*>(h.writable()) + at * h_bytes,
                    c ? static_cast<char*>(c.writable()) + at * c_bytes : nullptr);
    }
  }
};

Stream::Stream(std::string_view cell, const Sizes& sizes, const std::vector<Weights>& layers)
    : state_(std::make_unique<State>()) {
  State& s = *state_;
  const auto [gates, has_c] = gates_and_c(cell);
  FUSEDRNN_CHECK(sizes.batch >= 1 && sizes.input >= 1 && sizes.hidden >= 1 && sizes.projection >= 0,
                 "fusedrnn: a stream's batch, input and hidden must be positive, got ", sizes.batch, ", ", sizes.input,
                 " and ", sizes.hidden);
  FUSEDRNN_CHECK(!layers.empty(), "fusedrnn: a stream needs a layer");
  s.cell = cell;
  s.sizes = sizes;
  s.dtype = scalar_type(sizes.dtype);
  const bool rounded = sizes.weights == fusedrnn::Weights::kInt8Both;
  const bool scaled = rounded || sizes.weights == fusedrnn::Weights::kInt8;
  FUSEDRNN_CHECK(sizes.weights == fusedrnn::Weights::kSame || s.dtype == kFloat,
                 "fusedrnn: a stream with quantized weights must be float32, got ", name_of(s.dtype));
  const int32_t of_weights = scaled ? kInt8 : sizes.weights == fusedrnn::Weights::kBfloat16 ? kBFloat16 : s.dtype;
  s.out = sizes.projection ? sizes.projection : sizes.hidden;
  const int64_t count = static_cast<int64_t>(layers.size()), rows = gates * sizes.hidden;
  const auto states = [&](int64_t last) {
    Tensor t = Tensor::empty({count, sizes.batch, last}, s.dtype);
    std::memset(t.writable(), 0, static_cast<size_t>(bytes_of(t)));
    return t;
  };
  s.h = states(s.out);
  if (has_c) s.c = states(sizes.hidden);
  for (int64_t k = 0; k < count; ++k) {
    const Weights& w = layers[k];
    FUSEDRNN_CHECK(w.w_ih && w.w_hh && (w.w_hr != nullptr) == (sizes.projection > 0),
                   "fusedrnn: a layer of a stream needs w_ih and w_hh, and w_hr exactly where there is a projection");
    FUSEDRNN_CHECK(!scaled || (w.scale_ih && w.scale_hh && (w.scale_hr != nullptr) == (w.w_hr != nullptr)),
                   "fusedrnn: int8 weights of a stream need scale_ih and scale_hh, and with a projection scale_hr");
    Inputs in;
    in.w_ih = copy_of(w.w_ih, {rows, k ? s.out : sizes.input}, of_weights);
    in.w_hh = copy_of(w.w_hh, {rows, s.out}, of_weights);
    if (scaled) {
      in.scale_ih = copy_of(w.scale_ih, {rows}, kFloat);
      in.scale_hh = copy_of(w.scale_hh, {rows}, kFloat);
      if (w.w_hr) in.scale_hr = copy_of(w.scale_hr, {s.out}, kFloat);
    }
    if (w.b_ih) in.b_ih = copy_of(w.b_ih, {rows}, s.dtype);
    if (w.b_hh) in.b_hh = copy_of(w.b_hh, {rows}, s.dtype);
    if (w.w_hr) in.w_hr = copy_of(w.w_hr, {s.out, sizes.hidden}, of_weights);
    in.quantized = of_weights != s.dtype;
    in.rounded = rounded;
    in.panels = pack(cell, in.w_hh, in.quantized, 1, rounded);
    if (packs_input(cell, s.dtype)) in.panels_ih = pack(cell, in.w_ih, in.quantized, 1, rounded);
    in.h0 = s.h.select(k);
    if (has_c) in.c0 = s.c.select(k);
    s.layers.push_back(std::move(in));
  }
}

Stream::~Stream() = default;

void Stream::run(const void* x, int64_t steps, const bool* resets, void* y) {
  FUSEDRNN_CHECK(steps >= 1, "Expected sequence length to be larger than 0 in RNN");
  FUSEDRNN_CHECK(!state_->busy.test_and_set(std::memory_order_acquire),
                 "fusedrnn: this stream is being run by another thread; a stream is for one at a time");
  struct Leave {
    std::atomic_flag& busy;
    ~Leave() { busy.clear(std::memory_order_release); }
  } const leave{state_->busy};
  state_->make_room(steps);
  state_->run(x, resets, y);
}

void* Stream::h() { return state_->h.writable(); }
void* Stream::c() { return state_->c.writable(); }
int64_t Stream::bytes() const { return state_->bytes(); }

}  // namespace fusedrnn
