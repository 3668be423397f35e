// From the cell and the dtype of a call's parameters to the types of its kernels.
#pragma once

#include "../cells.h"
#include "arithmetic.cuh"
#include "params.h"

namespace fusedrnn {
namespace {

template <typename T>
struct Type {
  using Of = T;
};

// run(Type<Cell>()) for a cell's number.
template <typename Run>
int with_cell(int cell, const Run& run) {
  switch (cell) {
#define FUSEDRNN_CASE(Cell) \
  case k##Cell##Cell:       \
    return run(Type<Cell>());
    FUSEDRNN_CELLS(FUSEDRNN_CASE)
#undef FUSEDRNN_CASE
  }
  return cudaErrorInvalidValue;
}

// run(Type<dtype>()).
template <bool kWithFloat64, typename Run>
int with_dtype(int dtype, const Run& run) {
  switch (dtype) {
    case kFloat32:
      return run(Type<float>());
    case kTf32:
      return run(Type<Tf32>());
    case kBfloat16:
      return run(Type<__nv_bfloat16>());
    case kFloat16:
      return run(Type<__half>());
    case kFloat64:
      if constexpr (kWithFloat64) return run(Type<double>());
  }
  return cudaErrorInvalidValue;
}

// run(Type<Cell>(), Type<dtype>()).
template <bool kWithFloat64, typename Params, typename Run>
int dispatch(const Params& p, const Run& run) {
  return with_cell(
      p.cell, [&](auto cell) { return with_dtype<kWithFloat64>(p.dtype, [&](auto type) { return run(cell, type); }); });
}

}  // namespace
}  // namespace fusedrnn
