// A stack of layers of one direction that is fed a step or a few at a time: it keeps the states, weights that are
// packed once, and what lies between the layers. Raw pointers, rows without gaps; shapes as in recurrence.h.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "recurrence.h"

namespace fusedrnn {

class FUSEDRNN_API Stream {
 public:
  struct Sizes {
    Dtype dtype = Dtype::kFloat32;
    int64_t batch = 1, input = 1, hidden = 1;
    int64_t projection = 0;  // P, or 0: there is none
    // What w_ih, w_hh and w_hr are; kSame with every dtype, the others with float32. kInt8Both: x and h are rounded to
    // 8 bits too.
    fusedrnn::Weights weights = fusedrnn::Weights::kSame;
  };
  // Of one layer; w_ih has P columns, or H, from the second layer on.
  struct Weights {
    const void *w_ih, *w_hh;
    const void *b_ih = nullptr, *b_hh = nullptr;  // null: none
    const void* w_hr = nullptr;                   // with a projection only
    // With int8 what the rows of w_ih, w_hh and w_hr are multiplied by: [G*H], [G*H], [P].
    const float *scale_ih = nullptr, *scale_hh = nullptr, *scale_hr = nullptr;
  };

  // Copies the weights. Throws std::runtime_error where a size is wrong, or the cell is unknown.
  Stream(std::string_view cell, const Sizes& sizes, const std::vector<Weights>& layers);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  // x [T, B, I], y [T, B, P]; resets [T, B], or null: where true, that row's states of all layers are zero before the
  // step. Throws where another thread is in here.
  void run(const void* x, int64_t steps, const bool* resets, void* y);

  // [L, B, P] and [L, B, H], zeros at first, to be read and written; c is null where the cell has none.
  void* h();
  void* c();
  // What weights and packed weights take.
  int64_t bytes() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace fusedrnn
