// Instructions of a whole warp: shuffles, votes, matrices; and the words of control flow, which the executor
// carries out.

#include <algorithm>

#include "parser.h"
#include "values.h"

namespace ptxsim {
namespace {

// ---- exchange between lanes. The executor has brought every lane of the member mask here.

void shuffle(Warp& w, const Instruction& I, u32 mask) {  // a: 0 up, 1 down, 2 bfly, 3 idx
  u32 s[3][kLanes], r[kLanes], ok = 0;
  const u32 *a = read(w, I.op[1], s[0]), *b = read(w, I.op[2], s[1]), *c = read(w, I.op[3], s[2]);
  w.launch->simulator->counters.shfl++;
  for (int lane = 0; lane < kLanes; lane++) {
    const u32 by = b[lane] & 31, clamp = c[lane] & 31, segment = c[lane] >> 8 & 31;
    const int high = (lane & segment) | (clamp & ~segment), low = lane & segment;
    int from;
    bool in;
    switch (I.a) {
      case 0:
        from = lane - int(by), in = from >= high;
        break;
      case 1:
        from = lane + by, in = from <= high;
        break;
      case 2:
        from = lane ^ by, in = from <= high;
        break;
      default:
        from = low | (by & ~segment), in = from <= high;
    }
    if (!in) from = lane;
    r[lane] = a[from & 31];
    if (in && !(mask >> (from & 31) & 1)) r[lane] = 0xdeadbeef;  // undefined: that lane takes no part
    ok |= u32(in) << lane;
  }
  write(w, I.part(I.op[0], 0), mask, r);
  if (I.op[0].kind == Operand::Vector) write_mask(w, I.parts[I.op[0].first + 1], mask, ok);
}

void vote(Warp& w, const Instruction& I, u32 mask) {  // a: 0 ballot, 1 any, 2 all, 3 uni
  u32 s[kLanes], r[kLanes], yes = 0;
  const u32 p = read_mask(w, I.op[1]);
  const u32* members = read(w, I.op[2], s);
  for (int lane = 0; lane < kLanes; lane++) {
    const u32 of = members[lane] & w.live, in = p & of;
    r[lane] = in;
    bool is = I.a == 1 ? in != 0 : I.a == 2 ? in == of : in == of || !in;
    yes |= u32(is) << lane;
  }
  if (I.a == 0)
    write(w, I.op[0], mask, r);
  else
    write_mask(w, I.op[0], mask, yes);
}

template <class T>
void match(Warp& w, const Instruction& I, u32 mask) {  // a: any, else all
  T s[kLanes];
  u32 t[kLanes], r[kLanes], every = 0;
  const T* a = read(w, I.op[1], s);
  const u32* members = read(w, I.op[2], t);
  for (int lane = 0; lane < kLanes; lane++) {
    const u32 of = members[lane] & w.live;
    u32 same = 0;
    for (u32 m = of; m; m &= m - 1)
      if (a[__builtin_ctz(m)] == a[lane]) same |= 1u << __builtin_ctz(m);
    r[lane] = I.a ? same : same == of ? of : 0;
    every |= u32(same == of) << lane;
  }
  write(w, I.part(I.op[0], 0), mask, r);
  if (I.op[0].kind == Operand::Vector) write_mask(w, I.parts[I.op[0].first + 1], mask, every);
}

template <class T>
void reduce(Warp& w, const Instruction& I, u32 mask) {  // a: add min max and or xor
  T s[kLanes], r[kLanes];
  u32 t[kLanes];
  const T* a = read(w, I.op[1], s);
  const u32* members = read(w, I.op[2], t);
  for (int lane = 0; lane < kLanes; lane++) {
    u32 of = members[lane] & w.live;
    if (!of) continue;
    T x = a[__builtin_ctz(of)];
    for (u32 m = of & (of - 1); m; m &= m - 1) {
      T y = a[__builtin_ctz(m)];
      switch (I.a) {
        case 0:
          x += y;
          break;
        case 1:
          x = std::min(x, y);
          break;
        case 2:
          x = std::max(x, y);
          break;
        case 3:
          x &= y;
          break;
        case 4:
          x |= y;
          break;
        default:
          x ^= y;
      }
    }
    r[lane] = x;
  }
  write(w, I.op[0], mask, r);
}

void active_mask(Warp& w, const Instruction& I, u32 mask) {
  u32 r[kLanes];
  std::fill(r, r + kLanes, mask);
  write(w, I.op[0], mask, r);
}

void elect(Warp& w, const Instruction& I, u32 mask) {
  u32 r[kLanes];
  const int leader = __builtin_ctz(mask);
  std::fill(r, r + kLanes, leader);
  write(w, I.part(I.op[0], 0), mask, r);
  if (I.op[0].kind == Operand::Vector) write_mask(w, I.parts[I.op[0].first + 1], mask, 1u << leader);
}

// ---- 8x8 matrices of 16-bit elements. a: how many, b: transposed. Lane l holds row l/4, columns 2(l%4) and
// the next.

void matrix_rows(Warp& w, const Instruction& I, const Operand& where, Access kind, u8* rows[4][8]) {
  Lanes lanes;
  addresses(w, where, lanes.address);
  const u32 mask = I.a == 4 ? kFullMask : (1u << (8 * I.a)) - 1;
  access(w, I, kind, Space::Shared, mask, 16, 2, lanes, kind == Access::Load ? "ldmatrix" : "stmatrix");
  for (int k = 0; k < I.a; k++)
    for (int row = 0; row < 8; row++) rows[k][row] = lanes.pointer[8 * k + row];
}

void load_matrix(Warp& w, const Instruction& I, u32 mask) {
  u8* rows[4][8];
  matrix_rows(w, I, I.op[1], Access::Load, rows);
  u32 r[4][kLanes];
  for (int k = 0; k < I.a; k++) {
    if (!I.b) {
      for (int row = 0; row < 8; row++) memcpy(&r[k][4 * row], rows[k][row], 16);
      continue;
    }
    u16 m[8][8];
    for (int row = 0; row < 8; row++) memcpy(m[row], rows[k][row], 16);
    for (int lane = 0; lane < kLanes; lane++) {
      int row = lane / 4, column = 2 * (lane % 4);
      r[k][lane] = m[column][row] | u32(m[column + 1][row]) << 16;
    }
  }
  for (int k = 0; k < I.a; k++) write(w, I.part(I.op[0], k), mask, r[k]);
}

void store_matrix(Warp& w, const Instruction& I, u32) {
  u8* rows[4][8];
  matrix_rows(w, I, I.op[0], Access::Store, rows);
  for (int k = 0; k < I.a; k++) {
    u32 s[kLanes];
    const u32* value = read(w, I.part(I.op[1], k), s);
    for (int lane = 0; lane < kLanes; lane++)
      for (int e = 0; e < 2; e++) {
        int row = lane / 4, column = 2 * (lane % 4) + e;
        if (I.b) std::swap(row, column);
        u16 x = value[lane] >> (16 * e);
        memcpy(rows[k][row] + 2 * column, &x, 2);
      }
  }
}

void transpose_matrix(Warp& w, const Instruction& I, u32 mask) {
  u32 s[kLanes], r[kLanes];
  u16 m[8][8];
  const u32* a = read(w, I.op[1], s);
  memcpy(m, a, sizeof m);
  for (int lane = 0; lane < kLanes; lane++) {
    int row = lane / 4, column = 2 * (lane % 4);
    r[lane] = m[column][row] | u32(m[column + 1][row]) << 16;
  }
  write(w, I.op[0], mask, r);
}

void decode_matrix(Decoder& d) {
  if (!d.has("m8n8")) d.unsupported("matrix shape");
  d.all(Type::B32);
  d.I.a = d.has("x4") ? 4 : d.has("x2") ? 2 : 1;
  d.I.b = d.has("trans");
  d.I.flow = Flow::WarpSync;
  d.run(d.words[0] == "ldmatrix" ? load_matrix : d.words[0] == "stmatrix" ? store_matrix : transpose_matrix);
}

// ---- mma. a, b, c: M, N, K. Products are exact and summed in double, then added to C and rounded once:
// hardware keeps fewer bits in between and does not say which, so tests against hardware need a tolerance.

void count_mma(Warp& w, const Instruction& I) {
  Counters& c = w.launch->simulator->counters;
  c.mma++;
  c.mma_flops += 2ull * I.a * I.b * I.c;
}

struct Tile {
  alignas(64) double a[16][16], b[16][8], c[16][8];
};

void multiply(Tile& t, int k_size) {
  for (int i = 0; i < 16; i++) {
    double sum[8] = {};
    for (int k = 0; k < k_size; k++)
      for (int j = 0; j < 8; j++) sum[j] = __builtin_fma(t.a[i][k], t.b[k][j], sum[j]);
    for (int j = 0; j < 8; j++) t.c[i][j] = sum[j] + t.c[i][j];
  }
}

// Row and column of accumulator register r in a lane.
int c_row(int lane, int r) { return (lane >> 2) + 8 * (r >> 1); }
int c_column(int lane, int r) { return 2 * (lane & 3) + (r & 1); }

void read_accumulators(Warp& w, const Instruction& I, bool f16_accumulators, Tile& t) {
  const Operand& o = I.op[3];
  if (!f16_accumulators) {
    for (int r = 0; r < 4; r++) {
      float s[kLanes];
      const float* p = read(w, I.part(o, r), s);
      for (int l = 0; l < kLanes; l++) t.c[c_row(l, r)][c_column(l, r)] = p[l];
    }
    return;
  }
  for (int r = 0; r < 2; r++) {
    u32 s[kLanes];
    const u32* p = read(w, I.part(o, r), s);
    for (int l = 0; l < kLanes; l++)
      for (int e = 0; e < 2; e++) t.c[(l >> 2) + 8 * r][2 * (l & 3) + e] = f16::raw(p[l] >> (16 * e)).value();
  }
}

void write_accumulators(Warp& w, const Instruction& I, bool f16_accumulators, u32 mask, const Tile& t) {
  const Operand& o = I.op[0];
  if (!f16_accumulators) {
    for (int r = 0; r < 4; r++) {
      float v[kLanes];
      for (int l = 0; l < kLanes; l++) {
        float x = static_cast<float>(t.c[c_row(l, r)][c_column(l, r)]);
        v[l] = x == x ? x : std::bit_cast<float>(kNanF32);
      }
      write(w, I.part(o, r), mask, v);
    }
    return;
  }
  for (int r = 0; r < 2; r++) {
    u32 v[kLanes];
    for (int l = 0; l < kLanes; l++) {
      const double* row = t.c[(l >> 2) + 8 * r];
      v[l] = f16(row[2 * (l & 3)]).bits | u32(f16(row[2 * (l & 3) + 1]).bits) << 16;
    }
    write(w, I.part(o, r), mask, v);
  }
}

// d: 1 if C and D are f16
template <class H>
void mma_16bit(Warp& w, const Instruction& I, u32 mask) {
  static Tile t;
  count_mma(w, I);
  u32 s[kLanes];
  u16 x[64];
  for (int r = 0; r < I.part_count(I.op[1]); r++) {  // in lane order a register of A is 8 rows of 8 elements
    memcpy(x, read(w, I.part(I.op[1], r), s), sizeof x);
    for (int i = 0; i < 8; i++)
      for (int k = 0; k < 8; k++) t.a[i + 8 * (r & 1)][k + 8 * (r >> 1)] = H::raw(x[8 * i + k]).value();
  }
  for (int r = 0; r < I.part_count(I.op[2]); r++) {  // and of B, 8 columns of 8
    memcpy(x, read(w, I.part(I.op[2], r), s), sizeof x);
    for (int j = 0; j < 8; j++)
      for (int k = 0; k < 8; k++) t.b[k + 8 * r][j] = H::raw(x[8 * j + k]).value();
  }
  read_accumulators(w, I, I.d, t);
  multiply(t, I.c);
  write_accumulators(w, I, I.d, mask, t);
}

void mma_tf32(Warp& w, const Instruction& I, u32 mask) {
  static Tile t;
  count_mma(w, I);
  u32 s[kLanes];
  auto value = [](u32 bits) { return double(std::bit_cast<float>(bits & ~0x1fffu)); };  // the low 13 bits are ignored
  for (int r = 0; r < I.part_count(I.op[1]); r++) {
    const u32* p = read(w, I.part(I.op[1], r), s);
    for (int l = 0; l < kLanes; l++) t.a[(l >> 2) + 8 * (r & 1)][(l & 3) + 4 * (r >> 1)] = value(p[l]);
  }
  for (int r = 0; r < I.part_count(I.op[2]); r++) {
    const u32* p = read(w, I.part(I.op[2], r), s);
    for (int l = 0; l < kLanes; l++) t.b[(l & 3) + 4 * r][l >> 2] = value(p[l]);
  }
  read_accumulators(w, I, false, t);
  multiply(t, I.c);
  write_accumulators(w, I, false, mask, t);
}

void mma_f64(Warp& w, const Instruction& I, u32 mask) {
  static Tile t;
  count_mma(w, I);
  double s[kLanes];
  const bool tall = I.a == 16;
  for (int r = 0; r < I.part_count(I.op[1]); r++) {
    const double* p = read(w, I.part(I.op[1], r), s);
    for (int l = 0; l < kLanes; l++) t.a[(l >> 2) + (tall ? 8 * (r & 1) : 0)][(l & 3) + 4 * (tall ? r >> 1 : r)] = p[l];
  }
  for (int r = 0; r < I.part_count(I.op[2]); r++) {
    const double* p = read(w, I.part(I.op[2], r), s);
    for (int l = 0; l < kLanes; l++) t.b[(l & 3) + 4 * r][l >> 2] = p[l];
  }
  const int accumulators = I.part_count(I.op[3]);
  for (int r = 0; r < accumulators; r++) {
    const double* p = read(w, I.part(I.op[3], r), s);
    for (int l = 0; l < kLanes; l++) t.c[c_row(l, r)][c_column(l, r)] = p[l];
  }
  for (int i = 0; i < I.a; i++)
    for (int j = 0; j < I.b; j++)
      for (int k = 0; k < I.c; k++) t.c[i][j] = __builtin_fma(t.a[i][k], t.b[k][j], t.c[i][j]);
  for (int r = 0; r < accumulators; r++) {
    double v[kLanes];
    for (int l = 0; l < kLanes; l++) v[l] = t.c[c_row(l, r)][c_column(l, r)];
    write(w, I.part(I.op[0], r), mask, v);
  }
}

void decode_mma(Decoder& d) {
  if (d.types.size() != 4) d.unsupported("mma needs four types");
  int m = 0, n = 0, k = 0;
  if (const std::string* shape = d.word_starting("m1"))
    sscanf(shape->c_str(), "m%dn%dk%d", &m, &n, &k);
  else if (const std::string* small = d.word_starting("m8"))
    sscanf(small->c_str(), "m%dn%dk%d", &m, &n, &k);
  const Type to = d.types[0], a = d.types[1], b = d.types[2], from = d.types[3];
  Instruction& I = d.I;
  I.a = m, I.b = n, I.c = k;
  I.flow = Flow::WarpSync;
  if (a != b || to != from || !d.has("row") || !d.has("col")) d.unsupported("mma of these types or layouts");
  d.all(a == Type::F64 ? Type::F64 : Type::B32);
  if (a == Type::F64) {
    if (n != 8 || !((m == 8 && k == 4) || (m == 16 && (k == 4 || k == 8 || k == 16)))) d.unsupported("shape");
    return d.run(mma_f64);
  }
  if (m != 16 || n != 8) d.unsupported("shape");
  I.d = to == Type::F16;
  if (to != Type::F32 && to != Type::F16) d.unsupported("accumulator type");
  if (a == Type::TF32 && (k == 4 || k == 8)) return d.run(mma_tf32);
  if (a == Type::F16 && (k == 8 || k == 16)) return d.run(mma_16bit<f16>);
  if (a == Type::BF16 && (k == 8 || k == 16)) return d.run(mma_16bit<bf16>);
  d.unsupported("element type or shape");
}

// ---- wmma. How elements lie in a fragment is not specified: here register r of lane l holds elements (l * n
// + r) * e and on, of the matrix in row-major order, again from the start when it is used up. a, b, c: M, N,
// K; d: row-major; vector: 0 A, 1 B, 2 C or D

struct Extent {
  int rows, columns, element;
};

Extent extent(const Instruction& I, int which, Type t) {
  return {which == 1 ? I.c : I.a, which == 0 ? I.c : I.b, size_of(t)};
}

// Moves the tile between memory and `tile`, 16 bytes a lane, neighbours side by side so that sectors count
// once.
void wmma_move(Warp& w, const Instruction& I, const Operand& where, const Extent& x, u64 stride, Access kind,
               u8* tile) {
  const bool row_major = I.d;
  const int lines = row_major ? x.rows : x.columns, bytes = (row_major ? x.columns : x.rows) * x.element;
  const int chunks = lines * bytes / 16, per_line = bytes / 16;
  u64 base[kLanes];
  addresses(w, where, base);
  for (int begin = 0; begin < chunks; begin += kLanes) {
    const int n = std::min(kLanes, chunks - begin);
    Lanes lanes;
    for (int i = 0; i < n; i++)
      lanes.address[i] = base[0] + (begin + i) / per_line * stride * x.element + 16 * ((begin + i) % per_line);
    access(w, I, kind, I.space, n == kLanes ? kFullMask : (1u << n) - 1, 16, x.element, lanes,
           kind == Access::Load ? "wmma.load" : "wmma.store");
    for (int i = 0; i < n; i++) {
      u8* mine = tile + 16 * (begin + i);
      kind == Access::Load ? memcpy(mine, lanes.pointer[i], 16) : memcpy(lanes.pointer[i], mine, 16);
    }
  }
}

u64 wmma_stride(Warp& w, const Instruction& I, int operand, const Extent& x) {
  if (I.operand_count <= operand) return I.d ? x.columns : x.rows;
  u32 s[kLanes];
  return read(w, I.op[operand], s)[0];
}

void wmma_load(Warp& w, const Instruction& I, u32 mask) {
  const Extent x = extent(I, I.vector, I.type);
  u8 tile[16 * 16 * 8];
  wmma_move(w, I, I.op[1], x, wmma_stride(w, I, 2, x), Access::Load, tile);
  const int registers = I.part_count(I.op[0]), packed = 4 / x.element, total = x.rows * x.columns;
  for (int r = 0; r < registers; r++) {
    u32 v[kLanes] = {};
    for (int l = 0; l < kLanes; l++)
      for (int e = 0; e < packed; e++) {
        const int k = ((l * registers + r) * packed + e) % total, i = k / x.columns, j = k % x.columns;
        const int at = I.d ? k : j * x.rows + i;
        u32 bits = 0;
        memcpy(&bits, tile + at * x.element, x.element);
        v[l] |= bits << (8 * x.element * e);
      }
    write(w, I.part(I.op[0], r), mask, v);
  }
}

void wmma_store(Warp& w, const Instruction& I, u32) {
  const Extent x = extent(I, 2, I.type);
  u8 tile[16 * 16 * 8];
  const int registers = I.part_count(I.op[1]), packed = 4 / x.element, total = x.rows * x.columns;
  for (int r = 0; r < registers; r++) {
    u32 s[kLanes];
    const u32* v = read(w, I.part(I.op[1], r), s);
    for (int l = 0; l < kLanes; l++)
      for (int e = 0; e < packed; e++) {
        const int k = ((l * registers + r) * packed + e) % total, i = k / x.columns, j = k % x.columns;
        const u32 bits = v[l] >> (8 * x.element * e % 32);
        memcpy(tile + (I.d ? k : j * x.rows + i) * x.element, &bits, x.element);
      }
  }
  wmma_move(w, I, I.op[0], x, wmma_stride(w, I, 2, x), Access::Store, tile);
}

double wmma_value(u32 bits, Type t) {
  switch (t) {
    case Type::F16:
      return f16::raw(bits).value();
    case Type::BF16:
      return bf16::raw(bits).value();
    case Type::TF32:
      return std::bit_cast<float>(bits & ~0x1fffu);
    default:
      return std::bit_cast<float>(bits);
  }
}

void wmma_fragment(Warp& w, const Instruction& I, int operand, int which, Type t, double* out) {
  const Extent x = extent(I, which, t);
  const int registers = I.part_count(I.op[operand]), packed = 4 / x.element, total = x.rows * x.columns;
  for (int r = 0; r < registers; r++) {
    u32 s[kLanes];
    const u32* v = read(w, I.part(I.op[operand], r), s);
    for (int l = 0; l < kLanes; l++)
      for (int e = 0; e < packed; e++)
        out[((l * registers + r) * packed + e) % total] = wmma_value(v[l] >> (8 * x.element * e % 32), t);
  }
}

void wmma_multiply(Warp& w, const Instruction& I, u32 mask) {  // type: D and C, type2: A and B
  count_mma(w, I);
  double a[32 * 16], b[32 * 16], c[32 * 32];
  wmma_fragment(w, I, 1, 0, I.type2, a);
  wmma_fragment(w, I, 2, 1, I.type2, b);
  wmma_fragment(w, I, 3, 2, I.type, c);
  for (int i = 0; i < I.a; i++) {
    double sum[32] = {};
    for (int k = 0; k < I.c; k++)
      for (int j = 0; j < I.b; j++) sum[j] += a[i * I.c + k] * b[k * I.b + j];
    for (int j = 0; j < I.b; j++) c[i * I.b + j] += sum[j];
  }
  const bool halves = I.type == Type::F16;
  const int registers = I.part_count(I.op[0]), packed = halves ? 2 : 1, total = I.a * I.b;
  for (int r = 0; r < registers; r++) {
    u32 v[kLanes] = {};
    for (int l = 0; l < kLanes; l++)
      for (int e = 0; e < packed; e++) {
        const double x = c[((l * registers + r) * packed + e) % total];
        const float f = static_cast<float>(x);
        v[l] |= halves ? u32(f16(x).bits) << (16 * e) : f == f ? std::bit_cast<u32>(f) : kNanF32;
      }
    write(w, I.part(I.op[0], r), mask, v);
  }
}

void decode_wmma(Decoder& d) {
  Instruction& I = d.I;
  int m = 0, n = 0, k = 0;
  for (const char* stem : {"m1", "m8", "m3"})
    if (const std::string* shape = d.word_starting(stem)) sscanf(shape->c_str(), "m%dn%dk%d", &m, &n, &k);
  I.a = m, I.b = n, I.c = k;
  I.flow = Flow::WarpSync;
  I.space = d.has("global") ? Space::Global : d.has("shared") ? Space::Shared : Space::Generic;
  d.all(Type::B32);
  if (d.words[1] == "mma") {
    I.type = d.types[0];
    I.type2 = d.types.size() == 4 ? d.types[1] : Type::F16;
    if (d.types.back() != I.type) d.unsupported("C and D of different types");
    return d.run(wmma_multiply);
  }
  I.d = d.has("row");
  I.vector = d.words[2] == "a" ? 0 : d.words[2] == "b" ? 1 : 2;
  d.run(d.words[1] == "load" ? wmma_load : wmma_store);
}

// ---- control flow

void nothing(Warp&, const Instruction&, u32) {}
void sync_lanes(Warp& w, const Instruction&, u32) { w.syncs++; }

void decode_sync(Decoder& d, Handler h, int member_mask_operand) {
  d.I.flow = Flow::WarpSync;
  d.I.has_member_mask = true;
  d.I.member_mask_operand = member_mask_operand;
  d.run(h);
}

// bar and barrier: op[0] result of red, op[1] barrier, op[2] threads, op[3] predicate. a: 0 sync, 1 arrive, 2
// red
void decode_barrier(Decoder& d) {
  Instruction& I = d.I;
  I.flow = Flow::Barrier;
  I.a = d.has("arrive") ? 1 : d.has("red") ? 2 : 0;
  I.b = d.has("popc") ? 0 : d.has("and") ? 1 : 2;
  size_t k = 0, end = d.operands.size();
  if (I.a == 2) {
    d.operand(0, d.operands[k++], Type::U32);
    d.operand(3, d.operands[--end], Type::Pred);
  }
  d.operand(1, d.operands[k++], Type::U32);
  if (k < end) d.operand(2, d.operands[k], Type::U32);
  d.run(nothing);
}

void decode_flow(Decoder& d, Flow flow) {
  d.I.flow = flow;
  d.run(nothing);
}

}  // namespace

extern const Entry kWarpTable[];
const Entry kWarpTable[] = {
    // opcode, types, modifiers, section of the PTX ISA, meaning
    {"shfl.sync", "b32", "up down bfly idx", "Data Movement and Conversion: shfl.sync",
     [](Decoder& d) {
       d.all(Type::B32);
       d.I.a = d.has("up") ? 0 : d.has("down") ? 1 : d.has("bfly") ? 2 : 3;
       decode_sync(d, shuffle, 4);
     }},
    {"vote.sync", "pred b32", "ballot any all uni", "Parallel Synchronization and Communication: vote.sync",
     [](Decoder& d) {
       d.all(Type::B32);
       d.I.a = d.has("ballot") ? 0 : d.has("any") ? 1 : d.has("all") ? 2 : 3;
       decode_sync(d, vote, 2);
     }},
    {"match", "b32 b64", "any all sync", "Parallel Synchronization and Communication: match.sync",
     [](Decoder& d) {
       d.all(d.types[0]);
       d.operand(2, d.operands[2], Type::U32);
       d.I.a = d.has("any");
       decode_sync(d, d.types[0] == Type::B32 ? match<u32> : match<u64>, 2);
     }},
    {"redux.sync", "u32 s32 b32", "add min max and or xor", "Parallel Synchronization and Communication: redux.sync",
     [](Decoder& d) {
       d.all(d.types[0]);
       d.I.a = d.has("add") ? 0 : d.has("min") ? 1 : d.has("max") ? 2 : d.has("and") ? 3 : d.has("or") ? 4 : 5;
       decode_sync(d, d.types[0] == Type::S32 ? reduce<s32> : reduce<u32>, 2);
     }},
    {"elect.sync", "", "", "Parallel Synchronization and Communication: elect.sync",
     [](Decoder& d) {
       d.all(Type::B32);
       decode_sync(d, elect, 1);
     }},
    {"activemask", "b32", "", "Parallel Synchronization and Communication: activemask",
     [](Decoder& d) {
       d.all(Type::B32);
       d.run(active_mask);
     }},
    {"bar.warp.sync", "", "", "Parallel Synchronization and Communication: bar.warp.sync",
     [](Decoder& d) {
       d.all(Type::U32);
       decode_sync(d, sync_lanes, 0);
     }},
    {"bar", "u32 pred", "cta sync arrive red popc and or aligned",
     "Parallel Synchronization and Communication: bar, barrier", decode_barrier},
    {"bar", "", "cta sync arrive aligned", "Parallel Synchronization and Communication: bar, barrier", decode_barrier},
    {"barrier", "u32 pred", "cta sync arrive red popc and or aligned",
     "Parallel Synchronization and Communication: bar, barrier", decode_barrier},
    {"barrier", "", "cta sync arrive aligned", "Parallel Synchronization and Communication: bar, barrier",
     decode_barrier},

    {"ldmatrix", "b16", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta", "Warp Level Matrix: ldmatrix",
     decode_matrix},
    {"stmatrix", "b16", "sync aligned m8n8 x1 x2 x4 trans shared shared::cta", "Warp Level Matrix: stmatrix",
     decode_matrix},
    {"movmatrix", "b16", "sync aligned m8n8 trans", "Warp Level Matrix: movmatrix", decode_matrix},
    {"mma", "f16 f32 f64", "sync aligned m16n8k4 m16n8k8 m16n8k16 m8n8k4 row col", "Warp Level Matrix: mma",
     decode_mma},
    {"wmma.load", "f16 bf16 tf32 f32",
     "a b c sync aligned row col m16n16k16 m32n8k16 m8n32k16 m16n16k8 global shared shared::cta",
     "Warp Level Matrix: wmma.load", decode_wmma},
    {"wmma.store", "f16 f32", "d sync aligned row col m16n16k16 m32n8k16 m8n32k16 m16n16k8 global shared shared::cta",
     "Warp Level Matrix: wmma.store", decode_wmma},
    {"wmma.mma", "f16 f32", "sync aligned row col m16n16k16 m32n8k16 m8n32k16 m16n16k8", "Warp Level Matrix: wmma.mma",
     decode_wmma},

    {"bra", "", "uni", "Control Flow",
     [](Decoder& d) {
       decode_flow(d, Flow::Branch);
       d.parser.branch(d.I, d.operands.at(0));
     }},
    {"brx.idx", "", "uni", "Control Flow",
     [](Decoder& d) {
       decode_flow(d, Flow::BranchTable);
       d.operand(0, d.operands[0], Type::U32);
       d.parser.branch_table(d.I, d.operands.at(1));
     }},
    {"call", "", "uni", "Control Flow",
     [](Decoder& d) {
       decode_flow(d, Flow::Call);
       d.parser.call(d.I, d.operands);
     }},
    {"ret", "", "uni", "Control Flow", [](Decoder& d) { decode_flow(d, Flow::Return); }},
    {"exit", "", "", "Control Flow", [](Decoder& d) { decode_flow(d, Flow::Exit); }},
    {"trap", "", "", "Miscellaneous", [](Decoder& d) { decode_flow(d, Flow::Trap); }},
    {"brkpt", "", "", "Miscellaneous", [](Decoder& d) { decode_flow(d, Flow::Trap); }},
    {"nanosleep", "u32", "", "Miscellaneous", [](Decoder& d) { decode_flow(d, Flow::Yield); }},
    {"pmevent", "", "mask", "Miscellaneous", [](Decoder& d) { d.run(nothing); }},
    {"griddepcontrol", "", "launch_dependents wait", "Parallel Synchronization and Communication: griddepcontrol",
     [](Decoder& d) { d.run(nothing); }},
    {"setmaxnreg", "u32", "inc dec sync aligned", "Miscellaneous", [](Decoder& d) { d.run(nothing); }},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

}  // namespace ptxsim
