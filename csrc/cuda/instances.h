// Which instances of a kernel there are: the kernels' files compile them, the launcher picks among them.
//
// X(Cell, dtype, size, rows) for each; step_linear has no cell. Its name is <file>_<Cell>_<dtype>_<size>_<rows>. size:
// in step the tiles of 8 batch rows of a block, in persistent the chunks of a row of weights. rows: `whole` rows begin
// at 16 bytes and hold whole packets, and in persistent they fill their chunks; others are `ragged`.
//
// Of a cell of one's own each instance is compiled at its first launch, alone: FUSEDRNN_OWN(X) says which.
#pragma once

#include "../cell_list.h"

#ifdef FUSEDRNN_OWN
#define FUSEDRNN_LIST(OF, X) FUSEDRNN_OWN(X)
#else
#define FUSEDRNN_LIST(OF, X) FUSEDRNN_EACH_CELL(OF, X)
#endif

#define FUSEDRNN_BOTH(X, size, ...) X(__VA_ARGS__, size, whole) X(__VA_ARGS__, size, ragged)
#define FUSEDRNN_SIZES_2(X, a, b, ...) FUSEDRNN_BOTH(X, a, __VA_ARGS__) FUSEDRNN_BOTH(X, b, __VA_ARGS__)
#define FUSEDRNN_SIZES_3(X, a, b, c, ...) FUSEDRNN_SIZES_2(X, a, b, __VA_ARGS__) FUSEDRNN_BOTH(X, c, __VA_ARGS__)
#define FUSEDRNN_SIZES_4(X, a, b, c, d, ...) \
  FUSEDRNN_SIZES_2(X, a, b, __VA_ARGS__) FUSEDRNN_SIZES_2(X, c, d, __VA_ARGS__)

// Two tiles of doubles, and the copy of them that some cells need, do not fit in the registers.
#define FUSEDRNN_STEP_FORWARD_OF(Cell, gates, X) \
  FUSEDRNN_SIZES_2(X, 2, 4, Cell, float32)       \
  FUSEDRNN_SIZES_2(X, 2, 4, Cell, tf32)          \
  FUSEDRNN_SIZES_2(X, 2, 4, Cell, bfloat16)      \
  FUSEDRNN_SIZES_2(X, 2, 4, Cell, float16)       \
  FUSEDRNN_BOTH(X, 1, Cell, float64)
#define FUSEDRNN_STEP_FORWARD(X) FUSEDRNN_LIST(FUSEDRNN_STEP_FORWARD_OF, X)

// A row of products needs no size, and begins anywhere; tf32 is for products alone.
#define FUSEDRNN_STEP_CELL_OF(Cell, gates, X) \
  X(Cell, float32, 1, ragged)                 \
  X(Cell, bfloat16, 1, ragged)                \
  X(Cell, float16, 1, ragged)                 \
  X(Cell, float64, 1, ragged)
#define FUSEDRNN_STEP_CELL(X) FUSEDRNN_LIST(FUSEDRNN_STEP_CELL_OF, X)

#define FUSEDRNN_STEP_BACKWARD_OF(Cell, gates, X) \
  FUSEDRNN_SIZES_2(X, 2, 4, Cell, float32)        \
  FUSEDRNN_SIZES_2(X, 2, 4, Cell, tf32)           \
  FUSEDRNN_SIZES_2(X, 2, 4, Cell, bfloat16)       \
  FUSEDRNN_SIZES_2(X, 2, 4, Cell, float16)        \
  FUSEDRNN_SIZES_2(X, 2, 4, Cell, float64)
#define FUSEDRNN_STEP_BACKWARD(X) FUSEDRNN_LIST(FUSEDRNN_STEP_BACKWARD_OF, X)

#define FUSEDRNN_STEP_LINEAR(X)       \
  FUSEDRNN_SIZES_2(X, 2, 4, float32)  \
  FUSEDRNN_SIZES_2(X, 2, 4, tf32)     \
  FUSEDRNN_SIZES_2(X, 2, 4, bfloat16) \
  FUSEDRNN_SIZES_2(X, 2, 4, float16)  \
  FUSEDRNN_SIZES_2(X, 2, 4, float64)

// Up to H = 1024.
#define FUSEDRNN_PERSISTENT_FORWARD_OF(Cell, gates, X) \
  FUSEDRNN_SIZES_4(X, 2, 4, 6, 8, Cell, float32)       \
  FUSEDRNN_SIZES_4(X, 2, 4, 6, 8, Cell, tf32)          \
  FUSEDRNN_SIZES_4(X, 1, 2, 3, 4, Cell, bfloat16)      \
  FUSEDRNN_SIZES_4(X, 1, 2, 3, 4, Cell, float16)
#define FUSEDRNN_PERSISTENT_FORWARD(X) FUSEDRNN_LIST(FUSEDRNN_PERSISTENT_FORWARD_OF, X)

// Twice the weights a block: up to H = 1024 in 16 bits, 512 in tf32.
#define FUSEDRNN_PERSISTENT_FORWARD_WIDE_OF(Cell, gates, X) \
  FUSEDRNN_SIZES_2(X, 2, 4, Cell, tf32)                     \
  FUSEDRNN_SIZES_4(X, 1, 2, 3, 4, Cell, bfloat16)           \
  FUSEDRNN_SIZES_4(X, 1, 2, 3, 4, Cell, float16)
#define FUSEDRNN_PERSISTENT_FORWARD_WIDE(X) FUSEDRNN_LIST(FUSEDRNN_PERSISTENT_FORWARD_WIDE_OF, X)

// By the number of gates: four chunks a gate, at least 8, at most what the registers hold; 3 gates end with a chunk
// where 4 would not.
#define FUSEDRNN_PERSISTENT_BACKWARD_1(Cell, X) \
  FUSEDRNN_SIZES_2(X, 4, 8, Cell, float32)      \
  FUSEDRNN_SIZES_2(X, 4, 8, Cell, tf32)         \
  FUSEDRNN_SIZES_2(X, 4, 8, Cell, bfloat16)     \
  FUSEDRNN_SIZES_2(X, 4, 8, Cell, float16)
#define FUSEDRNN_PERSISTENT_BACKWARD_2(Cell, X) FUSEDRNN_PERSISTENT_BACKWARD_1(Cell, X)
#define FUSEDRNN_PERSISTENT_BACKWARD_3(Cell, X)    \
  FUSEDRNN_SIZES_4(X, 3, 6, 9, 12, Cell, float32)  \
  FUSEDRNN_SIZES_4(X, 3, 6, 9, 12, Cell, tf32)     \
  FUSEDRNN_SIZES_4(X, 3, 6, 9, 12, Cell, bfloat16) \
  FUSEDRNN_SIZES_4(X, 3, 6, 9, 12, Cell, float16)
#define FUSEDRNN_PERSISTENT_BACKWARD_4(Cell, X)     \
  FUSEDRNN_SIZES_3(X, 4, 8, 12, Cell, float32)      \
  FUSEDRNN_SIZES_4(X, 4, 8, 12, 16, Cell, tf32)     \
  FUSEDRNN_SIZES_4(X, 4, 8, 12, 16, Cell, bfloat16) \
  FUSEDRNN_SIZES_4(X, 4, 8, 12, 16, Cell, float16)
#define FUSEDRNN_PERSISTENT_BACKWARD_OF(Cell, gates, X) FUSEDRNN_PERSISTENT_BACKWARD_##gates(Cell, X)
#define FUSEDRNN_PERSISTENT_BACKWARD(X) FUSEDRNN_LIST(FUSEDRNN_PERSISTENT_BACKWARD_OF, X)
