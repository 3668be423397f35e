// Products of bfloat16 matrices in the tile registers of AMX: 16 rows by 32 of depth times 32 by 16 columns, sums in
// float32. The panel of a weight and the rows that it multiplies are laid out as tiles first, [32 of depth] of
//   rows    [16 rows][32]       what no row fills is left as it is: its sums are never read
//   panel   [kVectors][16][16 columns][2 of depth]
// with zeros where the depth of a segment is no multiple of 32.
// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "simd.h"

namespace fusedrnn::FUSEDRNN_CAPABILITY {

struct Tile {
  static constexpr int64_t kRows = 16, kDepth = 32, kSize = kRows * kDepth;
};

#if FUSEDRNN_TILES

// A thread's tile registers, all of the full size, for as long as this lives. What another library configured before
// is put back.
class TileRegisters {
 public:
  TileRegisters() {
    asm volatile("sttilecfg %0" : "=m"(before_));
    Configuration all{};
    all.palette = 1;
    for (int i = 0; i < 8; ++i) {
      all.row_bytes[i] = 64;
      all.rows[i] = 16;
    }
    asm volatile("ldtilecfg %0" : : "m"(all));
  }
  ~TileRegisters() {
    if (before_.palette) {
      asm volatile("ldtilecfg %0" : : "m"(before_));
    } else {
      asm volatile("tilerelease");
    }
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  struct alignas(64) Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  Configuration before_;
};

template <int kTile>
FUSEDRNN_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kTile>
FUSEDRNN_INLINE void tile_load(const Bfloat16* from) {
  asm volatile("tileloadd (%1, %2), %%tmm%c0" : : "i"(kTile), "r"(from), "r"(int64_t{64}) : "memory");
}
template <int kTile>
FUSEDRNN_INLINE void tile_store(Vec<float>* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1, %2)" : : "i"(kTile), "r"(to), "r"(stride * 64) : "memory");
}
template <int kSum, int kLeft, int kRight>
FUSEDRNN_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
}

// f(0), f(1) and so on, as constants.
template <int kCount, int i = 0, typename F>
FUSEDRNN_INLINE void repeat(F f) {
  if constexpr (i < kCount) {
    f(std::integral_constant<int, i>());
    repeat<kCount, i + 1>(f);
  }
}

// kRowTiles by kVectors tiles of sums, over `chunks` of depth. Registers 0 to 3 hold sums, 4 and 5 rows, 6 and 7 the
// panel. With few sums several ways through the depth run side by side: one sum alone waits for its own last addition.
template <int kRowTiles, int kVectors>
FUSEDRNN_COLD void multiply_tiles(Vec<float>* sums, int64_t stride, const Bfloat16* rows, int64_t rows_step,
                                  const Bfloat16* panel, int64_t panel_step, int64_t chunks) {
  constexpr int kSums = kRowTiles * kVectors, kWays = kSums == 1 ? 4 : kSums == 2 ? 2 : 1;
  static_assert(kSums * kWays <= 4);
  repeat<kSums * kWays>([](auto i) { tile_zero<i>(); });
  const auto multiply = [&](auto way, int64_t chunk) __attribute__((always_inline)) {
    constexpr int kFirst = decltype(way)::value * kSums;
    repeat<kRowTiles>([&](auto r) { tile_load<4 + r>(rows + r * rows_step + chunk * Tile::kSize); });
    repeat<kVectors>([&](auto v) {
      constexpr int kV = decltype(v)::value;
      tile_load<6 + kV % 2>(panel + chunk * panel_step + kV * Tile::kSize);
      repeat<kRowTiles>([&](auto r) { tile_multiply<kFirst + r * kVectors + kV, 4 + r, 6 + kV % 2>(); });
    });
  };
  int64_t chunk = 0;
  for (; chunk + kWays <= chunks; chunk += kWays) repeat<kWays>([&](auto way) { multiply(way, chunk + way); });
  for (; chunk < chunks; ++chunk) multiply(std::integral_constant<int, 0>(), chunk);
  repeat<kWays * kSums>([&](auto i) {
    constexpr int kSum = i % kSums;
    Vec<float>* to = sums + kSum / kVectors * Tile::kRows * stride + kSum % kVectors;
    if constexpr (i < kSums) {
      tile_store<i>(to, stride);
    } else {
      Vec<float> more[Tile::kRows];
      tile_store<i>(more, 1);
      for (int row = 0; row < Tile::kRows; ++row) to[row * stride] = to[row * stride] + more[row];
    }
  });
}

// kVectors of a panel for one or two tiles of rows; `all` of them stand side by side in the panel and in the sums.
template <int kRowTiles, int all, int v = 0>
FUSEDRNN_INLINE void multiply_panel(Vec<float>* sums, const Bfloat16* rows, const Bfloat16* panel, int64_t chunks) {
  constexpr int kVectors = all - v < 4 / kRowTiles ? all - v : 4 / kRowTiles;
  if constexpr (kVectors > 0) {
    multiply_tiles<kRowTiles, kVectors>(sums + v, all, rows, chunks * Tile::kSize, panel + v * Tile::kSize,
                                        all * Tile::kSize, chunks);
    multiply_panel<kRowTiles, all, v + kVectors>(sums, rows, panel, chunks);
  }
}

// sums[count rounded up to tiles][kVectors] = rows times one panel.
template <int kVectors>
void product(Vec<float>* sums, const Bfloat16* rows, int64_t count, const Bfloat16* panel, int64_t chunks) {
  for (int64_t i = 0; i < count; i += 2 * Tile::kRows) {
    const Bfloat16* const tile = rows + i * chunks * Tile::kDepth;
    if (count - i > Tile::kRows) {
      multiply_panel<2, kVectors>(sums + i * kVectors, tile, panel, chunks);
    } else {
      multiply_panel<1, kVectors>(sums + i * kVectors, tile, panel, chunks);
    }
  }
}

// Rows as tiles: of each kSegments of `depth`, segment i of a row begins at skip[i].
template <int kSegments>
void lay_out(Bfloat16* to, const Bfloat16* const* rows, int64_t count, int64_t depth,
             const int64_t (&skip)[kSegments]) {
  const int64_t chunks = (depth + Tile::kDepth - 1) / Tile::kDepth;
  for (int64_t row = 0; row < count; ++row) {
    Bfloat16* at = to + row / Tile::kRows * kSegments * chunks * Tile::kSize + row % Tile::kRows * Tile::kDepth;
    for (int i = 0; i < kSegments; ++i) {
      const Bfloat16* from = rows[row] + skip[i];
      int64_t k = 0;
      for (; k + Tile::kDepth <= depth; k += Tile::kDepth, at += Tile::kSize) memcpy(at, from + k, 64);
      if (k < depth) {
        memset(at, 0, 64);
        memcpy(at, from + k, (depth - k) * sizeof(Bfloat16));
        at += Tile::kSize;
      }
    }
  }
}

// One of `vectors` of a panel of weight^T: column j at depth k is weight[j][k]; columns beyond `count` are zero.
FUSEDRNN_COLD inline void tiles_of_rows(Bfloat16* panel, int vectors, const Bfloat16* weight, int64_t stride,
                                        int64_t count, int64_t depth) {
  for (int64_t k = 0; k < depth; k += Tile::kDepth, panel += vectors * Tile::kSize) {
    // Pairs of depth move as one float.
    Vec<float> tile[16];
    for (int j = 0; j < 16; ++j) {
      Bfloat16 padded[Tile::kDepth] = {};
      const int64_t width = j < count ? (depth - k < Tile::kDepth ? depth - k : Tile::kDepth) : 0;
      memcpy(padded, weight + (j < count ? j * stride + k : 0), width * sizeof(Bfloat16));
      tile[j] = load(reinterpret_cast<const float*>(padded));
    }
    transpose<1, 16>(tile);
    for (int j = 0; j < 16; ++j) store(reinterpret_cast<float*>(panel) + j * 16, tile[j]);
  }
}

// One of `vectors` of a panel of weight: column j at depth k is weight[k][j]; columns beyond `count` are zero.
FUSEDRNN_COLD inline void tiles_of_columns(Bfloat16* panel, int vectors, const Bfloat16* weight, int64_t stride,
                                           int64_t count, int64_t depth) {
  const int64_t width = count < 0 ? 0 : count < 16 ? count : 16;
  for (int64_t k = 0; k < depth; k += Tile::kDepth, panel += vectors * Tile::kSize) {
    for (int pair = 0; pair < 16; ++pair) {
      uint16_t rows[2][16] = {};
      for (int i = 0; i < 2 && k + 2 * pair + i < depth; ++i) {
        memcpy(rows[i], weight + (k + 2 * pair + i) * stride, width * sizeof(uint16_t));
      }
      for (int j = 0; j < 16; ++j) {
        panel[(pair * 16 + j) * 2].bits = rows[0][j];
        panel[(pair * 16 + j) * 2 + 1].bits = rows[1][j];
      }
    }
  }
}

#else

struct TileRegisters {};

#endif

}  // namespace fusedrnn::FUSEDRNN_CAPABILITY
