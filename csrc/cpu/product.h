// Products of matrices, sums in float32, in 16 bits rounded once, whatever the operands hold and whatever their sizes.
//
// Both operands are widened as they are packed: rows of A into panels [depth][W], of which a tile uses the first
// kTileRows lanes at most, columns of B into panels [depth][2][W]. A tile of sums stays in registers for a block of
// the depth. The blocks are those of Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008.
#pragma once

#include "panels.h"

namespace fusedrnn::FUSEDRNN_CAPABILITY {

struct Blocks {
  static constexpr int kWidth = Vec<float>::kWidth;
  // What the registers hold: kTileRows * kVectors sums, a row of B, and what A is spread into.
  static constexpr int kVectors = 2, kTileRows = FUSEDRNN_VECTOR_BYTES == 64 ? 14 : FUSEDRNN_VECTOR_BYTES == 32 ? 6 : 4;
  static constexpr int kTileColumns = kVectors * kWidth;
  // A panel of A stays in the first-level cache, those of kColumns columns of B in the second-level one.
  static constexpr int64_t kDepth = 256, kColumns = 256;
  // So many elements of A are packed at once, for all columns; so many rows at most, and fewer where their sums wait in
  // memory while the depth goes on.
  static constexpr int64_t kPacked = 2048 * 1024, kRows = 2048, kRowsOfSums = 512;
  // Floats of a panel. A line more than it holds: panels a power of two apart would push each other out of the cache.
  static constexpr int64_t panel(int vectors, int64_t depth) { return (depth * vectors + 1) * kWidth; }
};

// Panels of `each` lanes at most, one behind the other; lanes that no row or column fills hold anything.
template <int kVectors, typename E>
void pack_panels(float* panels, int64_t each, const E* from, int64_t lane_stride, int64_t depth_stride, int64_t lanes,
                 int64_t depth) {
  constexpr int64_t kWidth = Blocks::kWidth, kStep = kVectors * kWidth;
  const int64_t panel = Blocks::panel(kVectors, depth);
  if (lane_stride == 1) {
    // Some panels at a time: what lies side by side is read at once, and no prefetcher foresees the next row.
    constexpr int64_t kGroup = 8, kAhead = 8;
    const int64_t group = kGroup * each;
    for (; lanes > 0; lanes -= group, from += group, panels += kGroup * panel) {
      const int64_t width = min(group, lanes);
      for (int64_t k = 0; k < depth; ++k) {
        const E* const row = from + k * depth_stride;
        for (int64_t lane = 0; lane < width && k + kAhead < depth; lane += 64 / sizeof(E)) {
          __builtin_prefetch(row + kAhead * depth_stride + lane);
        }
        float* at = panels + k * kStep;
        for (int64_t first = 0; first < width; first += each, at += panel) {
          for (int v = 0; v < kVectors; ++v) {
            const int64_t lane = first + v * kWidth;
            if (lane < width) store(at + v * kWidth, load<float>(row + lane, lanes - lane));
          }
        }
      }
    }
  } else {
    for (int64_t first = 0; first < lanes; first += each, panels += panel) {
      const int64_t count = min(each, lanes - first);
      for (int64_t lane = 0; lane < count; lane += kWidth) {
        pack_rows<float>(panels, kVectors, static_cast<int>(lane / kWidth), from + (first + lane) * lane_stride,
                         lane_stride, count - lane, depth);
      }
    }
  }
}

// sums[kRows][kVectors] (+)= a panel of A times a panel of B.
template <int kRows>
FUSEDRNN_COLD void multiply_tile(Vec<float>* sums, const float* a, const float* b, int64_t depth, bool add) {
  constexpr int kVectors = Blocks::kVectors, kWidth = Blocks::kWidth;
  Vec<float> acc[kRows][kVectors];
  FUSEDRNN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FUSEDRNN_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[r][v] = add ? sums[r * kVectors + v] : Vec<float>(0.0f);
  }
  for (int64_t k = 0; k < depth; ++k, a += kWidth, b += kVectors * kWidth) {
    Vec<float> row[kVectors];
    FUSEDRNN_UNROLL
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * kWidth);
    FUSEDRNN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FUSEDRNN_UNROLL
      for (int v = 0; v < kVectors; ++v) acc[r][v].v += row[v].v * a[r];
    }
  }
  FUSEDRNN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FUSEDRNN_UNROLL
    for (int v = 0; v < kVectors; ++v) sums[r * kVectors + v] = acc[r][v];
  }
}
template <int kRows>
FUSEDRNN_INLINE void multiply_tile_of(int64_t rows, Vec<float>* sums, const float* a, const float* b, int64_t depth,
                                      bool add) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return multiply_tile_of<kRows - 1>(rows, sums, a, b, depth, add);
  }
  multiply_tile<kRows>(sums, a, b, depth, add);
}

template <typename E>
class ProductRun {
 public:
  explicit ProductRun(const Product& problem)
      : p(problem),
        row_parts(p.count > 1 ? 1 : parts_of_rows()),
        column_parts(p.count > 1 ? 1 : problem.threads / row_parts),
        once(divide_up(p.columns, column_parts * Blocks::kTileColumns) <= kPanels),
        rows_at_once(min(once ? Blocks::kRows : max(Blocks::kPacked / p.depth, 8 * Blocks::kTileRows),
                         p.depth > Blocks::kDepth ? Blocks::kRowsOfSums : Blocks::kRows)),
        most_rows(min(divide_up(p.rows, row_parts), rows_at_once) + Blocks::kTileRows),
        most_columns(min(divide_up(p.columns, column_parts * Blocks::kTileColumns) + 1, kPanels) *
                     Blocks::kTileColumns),
        most_depth(min(p.depth, Blocks::kDepth)),
        a_size(divide_up(most_rows, Blocks::kTileRows) * (once ? 1 : depth_blocks()) * Blocks::panel(1, most_depth)),
        b_size(divide_up(most_columns, Blocks::kTileColumns) * Blocks::panel(Blocks::kVectors, most_depth)),
        sums_size(p.depth > Blocks::kDepth ? most_rows * kPanels * Blocks::kVectors : 0),
        a_panels(p.threads * a_size),
        b_panels(p.threads * b_size),
        all_sums(p.threads * sums_size) {}

  void run() {
    in_parallel(is_crowded() ? 1 : p.threads, [this](int thread, int threads) {
      // Fewer threads than asked for take the parts in turn.
      const int64_t parts = row_parts * column_parts;
      for (int64_t part = thread; part < p.count * parts; part += threads) {
        multiply(operands(part / parts), part % parts, thread);
      }
    });
  }

 private:
  static constexpr int64_t kPanels = Blocks::kColumns / Blocks::kTileColumns;
  const Product& p;
  const int64_t row_parts, column_parts;
  const bool once;  // a block of A meets one block of columns, and is packed just before
  const int64_t rows_at_once, most_rows, most_columns, most_depth, a_size, b_size, sums_size;
  Buffer<float> a_panels, b_panels;  // of each thread
  Buffer<Vec<float>> all_sums;       // of each thread: [tile][panel of columns][row of the tile][kVectors]

  int64_t depth_blocks() const { return divide_up(p.depth, Blocks::kDepth); }
  // Parts of the rows times parts of the columns are the threads; every part of the one packs all of the other.
  int64_t parts_of_rows() const {
    int64_t best = 1;
    const auto packed = [this](int64_t parts) { return parts * p.columns + p.threads / parts * p.rows; };
    for (int64_t parts = 2; parts <= p.threads; ++parts) {
      if (p.threads % parts == 0 && packed(parts) < packed(best)) best = parts;
    }
    return best;
  }

  // Where the operands of one of the products begin.
  struct Operands {
    const E *a, *b;
    E* c;
  };
  Operands operands(int64_t which) const {
    return {static_cast<const E*>(p.a) + which * p.a_next, static_cast<const E*>(p.b) + which % p.b_count * p.b_next,
            static_cast<E*>(p.c) + which * p.c_next};
  }

  void multiply(const Operands& of, int64_t part, int thread) {
    const int64_t i = part / column_parts, j = part % column_parts;
    const int64_t row_end = p.rows * (i + 1) / row_parts;
    const int64_t panels = divide_up(p.columns, Blocks::kTileColumns);
    const int64_t column_end = min(p.columns, panels * (j + 1) / column_parts * Blocks::kTileColumns);
    for (int64_t row = p.rows * i / row_parts; row < row_end; row += rows_at_once) {
      const int64_t rows = min(rows_at_once, row_end - row);
      const int64_t each = divide_up(rows, divide_up(rows, Blocks::kTileRows));
      const auto pack = [&](int64_t k) {
        pack_panels<1>(a_panel(thread, rows, each, k), each, of.a + row * p.a_row + k * p.a_depth, p.a_row, p.a_depth,
                       rows, min(Blocks::kDepth, p.depth - k));
      };
      for (int64_t k = 0; k < p.depth && !once; k += Blocks::kDepth) pack(k);
      for (int64_t c = panels * j / column_parts * Blocks::kTileColumns; c < column_end; c += Blocks::kColumns) {
        const int64_t columns = min(Blocks::kColumns, column_end - c);
        for (int64_t k = 0; k < p.depth; k += Blocks::kDepth) {
          if (once) pack(k);
          block(of, row, rows, each, c, columns, k, min(Blocks::kDepth, p.depth - k), thread);
        }
      }
    }
  }

  float* a_panel(int thread, int64_t rows, int64_t each, int64_t k) const {
    const int64_t blocks = once ? 0 : k / Blocks::kDepth;
    return a_panels + thread * a_size + divide_up(rows, each) * blocks * Blocks::panel(1, most_depth);
  }

  // The rows and columns of a block of the depth.
  void block(const Operands& of, int64_t row, int64_t rows, int64_t each, int64_t column, int64_t columns, int64_t k,
             int64_t depth, int thread) {
    constexpr int kVectors = Blocks::kVectors;
    float* const b = b_panels + thread * b_size;
    pack_panels<kVectors>(b, Blocks::kTileColumns, of.b + k * p.b_depth + column * p.b_column, p.b_column, p.b_depth,
                          columns, depth);
    const bool whole = p.depth <= Blocks::kDepth, last = k + depth == p.depth;
    Vec<float>* sums = all_sums + thread * sums_size;
    const float* tile = a_panel(thread, rows, each, k);
    for (int64_t r = 0; r < rows; r += each, tile += Blocks::panel(1, depth)) {
      const int64_t count = min(each, rows - r);
      for (int64_t j = 0; j < columns; j += Blocks::kTileColumns, sums += each * kVectors) {
        Vec<float> few[Blocks::kTileRows * kVectors];
        Vec<float>* const to = whole ? few : sums;
        multiply_tile_of<Blocks::kTileRows>(
            count, to, tile, b + j / Blocks::kTileColumns * Blocks::panel(kVectors, depth), depth, k > 0);
        if (last) write(of.c, to, row + r, count, column + j, min(Blocks::kTileColumns, columns - j));
      }
    }
  }

  void write(E* c, const Vec<float>* sums, int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    for (int64_t r = 0; r < rows; ++r) {
      E* const to = c + (row + r) * p.c_row + column;
      for (int v = 0; v < Blocks::kVectors && v * Blocks::kWidth < columns; ++v) {
        const int64_t some = columns - v * Blocks::kWidth;
        const Vec<float> sum = sums[r * Blocks::kVectors + v];
        store(to + v * Blocks::kWidth, p.add ? sum + load<float>(to + v * Blocks::kWidth, some) : sum, some);
      }
    }
  }
};

inline void run_product(const Product& problem) {
  if (problem.dtype == Dtype::kFloat32) return ProductRun<float>(problem).run();
  if (problem.dtype == Dtype::kBfloat16) return ProductRun<Bfloat16>(problem).run();
  ProductRun<Half>(problem).run();
}

}  // namespace fusedrnn::FUSEDRNN_CAPABILITY
