// The CPU kernels without torch, for processors that torch is not here for: problems of csrc/cpu/recurrence.h from
// stdin, what the kernels made of them to stdout. Everything is arrays, each the number of its bytes and these bytes;
// 0 bytes are a null pointer. What a kernel writes comes in as well, so that nobody has to know its size.
// Each problem is computed twice; a difference between the two ends this with 1.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu/recurrence.h"

namespace {

using namespace fusedrnn;

struct Array {
  int64_t bytes = 0;
  char* data = nullptr;  // aligned as new aligns, and no further
};

bool read_array(Array& to) {
  if (fread(&to.bytes, sizeof(to.bytes), 1, stdin) != 1) return false;
  free(to.data);
  to.data = to.bytes ? static_cast<char*>(malloc(to.bytes)) : nullptr;
  return fread(to.data, 1, to.bytes, stdin) == static_cast<size_t>(to.bytes);
}

enum Name {
  kSizes,
  kOffsets,
  kResets,
  kGatesX,
  kX,
  kWIh,
  kH0,
  kC0,
  kWHh,
  kBIh,
  kBHh,
  kWHr,
  kDy,
  kDhN,
  kDcN,
  kDcells,
  // What is written.
  kY,
  kHN,
  kCN,
  kGates,
  kCells,
  kDgates,
  kDh0,
  kDc0,
  kDyTotal,
  kH,
  kNames
};

void compute(Array (&a)[kNames]) {
  const int64_t* n = reinterpret_cast<const int64_t*>(a[kSizes].data);
  const Dtype dtype = static_cast<Dtype>(n[1]);
  if (n[0] < 0) {  // a product: of X and W_ih, into Y
    kernels().product({dtype, n[2], n[3], n[4], a[kX].data, n[5], n[6], a[kWIh].data, n[7], n[8], a[kY].data, n[3],
                       static_cast<int>(n[9])});
    return;
  }
  // The one state beside h; cells without it look at none.
  const void *c0[] = {a[kC0].data}, *dc_n[] = {a[kDcN].data}, *dcells[] = {a[kDcells].data};
  const void* cells[] = {a[kCells].data};
  void *c_n[] = {a[kCN].data}, *every[] = {a[kCells].data}, *dc0[] = {a[kDc0].data};
  Forward forward{};
  forward.shape = {static_cast<CellKind>(n[0]),
                   dtype,
                   n[2],
                   n[3],
                   n[5],
                   n[6],
                   reinterpret_cast<const int64_t*>(a[kOffsets].data),
                   reinterpret_cast<const bool*>(a[kResets].data),
                   n[7] != 0,
                   1,
                   static_cast<int>(n[8]),
                   1 << 20};
  forward.gates_x = a[kGatesX].data;
  forward.x = a[kX].data;
  forward.w_ih = a[kWIh].data;
  forward.input = n[4];
  forward.h0 = a[kH0].data;
  forward.states0 = c0;
  forward.w_hh = a[kWHh].data;
  forward.b_ih = a[kBIh].data;
  forward.b_hh = a[kBHh].data;
  forward.w_hr = a[kWHr].data;
  forward.y = a[kY].data;
  forward.h_n = a[kHN].data;
  forward.states_n = c_n;
  forward.gates = a[kGates].data;
  forward.every_state = a[kCells].data ? every : nullptr;
  kernels().forward(forward);
  Backward backward{};
  backward.shape = forward.shape;
  backward.dy = a[kDy].data;
  backward.dh_n = a[kDhN].data;
  backward.dstates_n = dc_n;
  backward.devery_state = dcells;
  backward.h0 = a[kH0].data;
  backward.states0 = c0;
  backward.w_hh = a[kWHh].data;
  backward.w_hr = a[kWHr].data;
  backward.y = a[kY].data;
  backward.gates = a[kGates].data;
  backward.every_state = cells;
  backward.dgates = a[kDgates].data;
  backward.dh0 = a[kDh0].data;
  backward.dstates0 = dc0;
  backward.dy_total = a[kDyTotal].data;
  backward.h = a[kH].data;
  kernels().backward(backward);
}

}  // namespace

int main() {
  Array arrays[kNames];
  while (read_array(arrays[0])) {
    for (int i = 1; i < kNames; ++i) {
      if (!read_array(arrays[i])) return 2;
    }
    char* first[kNames] = {};
    for (int i = kY; i < kNames; ++i) {
      first[i] = static_cast<char*>(malloc(arrays[i].bytes + 1));
      memcpy(first[i], arrays[i].data ? arrays[i].data : "", arrays[i].bytes);
    }
    compute(arrays);
    for (int i = kY; i < kNames; ++i) {
      char* const again = static_cast<char*>(malloc(arrays[i].bytes + 1));
      memcpy(again, first[i], arrays[i].bytes);
      memcpy(first[i], arrays[i].data ? arrays[i].data : "", arrays[i].bytes);
      if (arrays[i].data) memcpy(arrays[i].data, again, arrays[i].bytes);
      free(again);
    }
    compute(arrays);
    for (int i = kY; i < kNames; ++i) {
      if (arrays[i].bytes && memcmp(first[i], arrays[i].data, arrays[i].bytes) != 0) return 1;
      fwrite(arrays[i].data, 1, arrays[i].bytes, stdout);
      free(first[i]);
    }
    fflush(stdout);
  }
  fprintf(stderr, "%s", kernels().name);
  return 0;
}
