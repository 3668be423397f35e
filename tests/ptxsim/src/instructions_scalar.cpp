// Instructions that work lane by lane: arithmetic, logic, comparison, conversion, moves.

#include <algorithm>
#include <cfenv>

#include "values.h"

namespace ptxsim {
namespace {

// ---- integers

template <class T>
T multiply_high(T a, T b) {
  if constexpr (std::is_signed_v<T>)
    return static_cast<T>((static_cast<__int128>(a) * b) >> (8 * sizeof(T)));
  else
    return static_cast<T>((static_cast<u128>(a) * b) >> (8 * sizeof(T)));
}

// mul.wide and mad.wide: operands of half the result's width.
template <class Narrow, class Wide>
void multiply_wide(Warp& w, const Instruction& I, u32 mask) {
  Narrow sa[kLanes], sb[kLanes];
  Wide sc[kLanes], r[kLanes];
  const Narrow *a = read(w, I.op[1], sa), *b = read(w, I.op[2], sb);
  for (int i = 0; i < kLanes; i++) r[i] = static_cast<Wide>(a[i]) * static_cast<Wide>(b[i]);
  if (I.operand_count == 4) {
    const Wide* c = read(w, I.op[3], sc);
    for (int i = 0; i < kLanes; i++) r[i] += c[i];
  }
  write(w, I.op[0], mask, r);
}

Handler wide_handler(Type t) {
  switch (t) {
    case Type::U16:
      return multiply_wide<u16, u32>;
    case Type::S16:
      return multiply_wide<s16, s32>;
    case Type::U32:
      return multiply_wide<u32, u64>;
    case Type::S32:
      return multiply_wide<s32, s64>;
    default:
      return nullptr;
  }
}

void decode_wide(Decoder& d) {
  Type wide = size_of(d.types[0]) == 2 ? Type::U32 : Type::U64;
  d.all(d.types[0]);
  d.operand(0, d.operands[0], wide);
  if (d.operands.size() == 4) d.operand(3, d.operands[3], wide);
  d.run(wide_handler(d.types[0]));
}

// add.cc, addc, sub.cc, subc. a: subtract, b: takes the carry, c: sets it
template <class T>
void add_carry(Warp& w, const Instruction& I, u32 mask) {
  T sa[kLanes], sb[kLanes], r[kLanes];
  const T *a = read(w, I.op[1], sa), *b = read(w, I.op[2], sb);
  u32 carry = 0;
  for (int i = 0; i < kLanes; i++) {
    u32 in = I.b ? (w.carry >> i & 1) : 0;
    u128 x = I.a ? u128(a[i]) - b[i] - in : u128(a[i]) + b[i] + in;
    r[i] = static_cast<T>(x);
    carry |= static_cast<u32>((x >> (8 * sizeof(T))) & 1) << i;
  }
  if (I.c) w.carry = (w.carry & ~mask) | (carry & mask);
  write(w, I.op[0], mask, r);
}

// mad.cc and madc. b, c as above, d: high half of the product
template <class T>
void mad_carry(Warp& w, const Instruction& I, u32 mask) {
  T sa[kLanes], sb[kLanes], sc[kLanes], r[kLanes];
  const T *a = read(w, I.op[1], sa), *b = read(w, I.op[2], sb), *c = read(w, I.op[3], sc);
  u32 carry = 0;
  for (int i = 0; i < kLanes; i++) {
    T product = I.d ? multiply_high(a[i], b[i]) : static_cast<T>(a[i] * b[i]);
    u128 x = u128(product) + c[i] + (I.b ? (w.carry >> i & 1) : 0);
    r[i] = static_cast<T>(x);
    carry |= static_cast<u32>((x >> (8 * sizeof(T))) & 1) << i;
  }
  if (I.c) w.carry = (w.carry & ~mask) | (carry & mask);
  write(w, I.op[0], mask, r);
}

void decode_carry(Decoder& d) {
  const std::string& op = d.words[0];
  d.all(d.types[0]);
  d.I.a = op == "sub" || op == "subc";
  d.I.b = op == "addc" || op == "subc" || op == "madc";
  d.I.c = d.has("cc");
  d.I.d = d.has("hi");
  bool wide = size_of(d.types[0]) == 8;
  if (op == "mad" || op == "madc") {
    if (d.I.d && is_signed(d.types[0])) d.unsupported("signed high product with carry");
    d.run(wide ? mad_carry<u64> : mad_carry<u32>);
  } else {
    d.run(wide ? add_carry<u64> : add_carry<u32>);
  }
}

template <class T>
void shift(Warp& w, const Instruction& I, u32 mask) {
  T s[kLanes], r[kLanes];
  u32 t[kLanes];
  const T* a = read(w, I.op[1], s);
  const u32* n = read(w, I.op[2], t);
  constexpr u32 kBits = 8 * sizeof(T);
  for (int i = 0; i < kLanes; i++) {
    if (I.a)
      r[i] = n[i] >= kBits ? T(0) : static_cast<T>(a[i] << n[i]);
    else
      r[i] = static_cast<T>(a[i] >> std::min(n[i], kBits - 1));
    if (!I.a && !std::is_signed_v<T> && n[i] >= kBits) r[i] = 0;
  }
  write(w, I.op[0], mask, r, std::is_signed_v<T>);
}

Handler shift_handler(Type t) {
  switch (t) {
    case Type::U16:
    case Type::B16:
      return shift<u16>;
    case Type::U32:
    case Type::B32:
      return shift<u32>;
    case Type::U64:
    case Type::B64:
      return shift<u64>;
    case Type::S16:
      return shift<s16>;
    case Type::S32:
      return shift<s32>;
    case Type::S64:
      return shift<s64>;
    default:
      return nullptr;
  }
}

void funnel_shift(Warp& w, const Instruction& I, u32 mask) {  // a: left, b: wrap
  u32 s[3][kLanes], r[kLanes];
  const u32 *lo = read(w, I.op[1], s[0]), *hi = read(w, I.op[2], s[1]), *n = read(w, I.op[3], s[2]);
  for (int i = 0; i < kLanes; i++) {
    u32 by = I.b ? n[i] & 31 : std::min(n[i], 32u);
    u64 both = u64(hi[i]) << 32 | lo[i];
    r[i] = static_cast<u32>(I.a ? (both << by) >> 32 : both >> by);
  }
  write(w, I.op[0], mask, r);
}

void lop3(Warp& w, const Instruction& I, u32 mask) {
  u32 s[3][kLanes], r[kLanes] = {};
  const u32 *a = read(w, I.op[1], s[0]), *b = read(w, I.op[2], s[1]), *c = read(w, I.op[3], s[2]);
  const u32 table = static_cast<u32>(I.op[4].immediate);
  for (int k = 0; k < 8; k++) {
    if (!(table >> k & 1)) continue;
    u32 na = k & 4 ? 0 : ~0u, nb = k & 2 ? 0 : ~0u, nc = k & 1 ? 0 : ~0u;
    for (int i = 0; i < kLanes; i++) r[i] |= (a[i] ^ na) & (b[i] ^ nb) & (c[i] ^ nc);
  }
  write(w, I.op[0], mask, r);
}

void prmt(Warp& w, const Instruction& I, u32 mask) {  // a: mode, 0 generic, then f4e b4e rc8 ecl ecr rc16
  u32 s[3][kLanes], r[kLanes];
  const u32 *a = read(w, I.op[1], s[0]), *b = read(w, I.op[2], s[1]), *c = read(w, I.op[3], s[2]);
  for (int i = 0; i < kLanes; i++) {
    u64 both = u64(b[i]) << 32 | a[i];
    u32 out = 0, n = c[i] & 3;
    for (u32 k = 0; k < 4; k++) {
      u32 select = c[i] >> (4 * k) & 15;
      switch (I.a) {
        case 1:
          select = (n + k) & 7;
          break;
        case 2:
          select = (n - k) & 7;
          break;
        case 3:
          select = n;
          break;
        case 4:
          select = std::max(n, k);
          break;
        case 5:
          select = std::min(n, k);
          break;
        case 6:
          select = (n & 1 ? 2 : 0) + (k & 1);
          break;
        default:
          break;
      }
      u32 byte = both >> (8 * (select & 7)) & 255;
      if (select & 8) byte = byte & 128 ? 255 : 0;
      out |= byte << (8 * k);
    }
    r[i] = out;
  }
  write(w, I.op[0], mask, r);
}

template <class T>
void extract_bits(Warp& w, const Instruction& I, u32 mask) {
  T s[kLanes], r[kLanes];
  u32 t[2][kLanes];
  const T* a = read(w, I.op[1], s);
  const u32 *position = read(w, I.op[2], t[0]), *length = read(w, I.op[3], t[1]);
  constexpr u32 kTop = 8 * sizeof(T) - 1;
  using U = std::make_unsigned_t<T>;
  for (int i = 0; i < kLanes; i++) {
    u32 p = position[i] & 255, n = length[i] & 255;
    U sign = std::is_signed_v<T> && n ? (U(a[i]) >> std::min(p + n - 1, kTop)) & 1 : 0;
    U kept = p > kTop ? 0 : U(a[i]) >> p;
    u32 have = p > kTop ? 0 : std::min(n, kTop + 1 - p);
    U low = have > kTop ? ~U(0) : (U(1) << have) - 1;
    r[i] = static_cast<T>((kept & low) | (sign ? ~low : 0));
    if (!n) r[i] = 0;
  }
  write(w, I.op[0], mask, r);
}

template <class T>
void insert_bits(Warp& w, const Instruction& I, u32 mask) {
  T s[2][kLanes], r[kLanes];
  u32 t[2][kLanes];
  const T *a = read(w, I.op[1], s[0]), *b = read(w, I.op[2], s[1]);
  const u32 *position = read(w, I.op[3], t[0]), *length = read(w, I.op[4], t[1]);
  constexpr u32 kBits = 8 * sizeof(T);
  for (int i = 0; i < kLanes; i++) {
    u32 p = position[i] & 255, n = length[i] & 255;
    T field = n >= kBits ? ~T(0) : (T(1) << n) - 1;
    r[i] = p >= kBits ? b[i] : static_cast<T>((b[i] & ~(field << p)) | ((a[i] & field) << p));
  }
  write(w, I.op[0], mask, r);
}

// Results are 32 bits whatever the operand.
template <class T, class F>
void count_bits(Warp& w, const Instruction& I, u32 mask) {
  T s[kLanes];
  u32 r[kLanes];
  const T* a = read(w, I.op[1], s);
  for (int i = 0; i < kLanes; i++) r[i] = F{}(a[i], I.a);
  write(w, I.op[0], mask, r);
}

template <class F>
void decode_count_bits(Decoder& d, F) {
  d.all(d.types[0]);
  d.I.a = d.has("shiftamt");
  switch (d.types[0]) {
    case Type::U32:
    case Type::B32:
      return d.run(count_bits<u32, F>);
    case Type::S32:
      return d.run(count_bits<s32, F>);
    case Type::U64:
    case Type::B64:
      return d.run(count_bits<u64, F>);
    default:
      return d.run(count_bits<s64, F>);
  }
}

template <class T>
u32 find_bit(T a, bool shift_amount) {
  using U = std::make_unsigned_t<T>;
  U x = std::is_signed_v<T> && a < 0 ? ~U(a) : U(a);
  if (!x) return ~0u;
  u32 at = std::bit_width(x) - 1;
  return shift_amount ? 8 * sizeof(T) - 1 - at : at;
}

void dot4(Warp& w, const Instruction& I, u32 mask) {
  u32 s[3][kLanes], r[kLanes];
  const u32 *a = read(w, I.op[1], s[0]), *b = read(w, I.op[2], s[1]), *c = read(w, I.op[3], s[2]);
  auto byte = [](u32 x, int k, Type t) { return t == Type::S32 ? s32(s8(x >> (8 * k))) : s32(u8(x >> (8 * k))); };
  for (int i = 0; i < kLanes; i++) {
    s32 sum = c[i];
    for (int k = 0; k < 4; k++) sum += byte(a[i], k, I.type) * byte(b[i], k, I.type2);
    r[i] = sum;
  }
  write(w, I.op[0], mask, r);
}

// ---- floats

// Runs with the processor's own rounding mode; noipa keeps the compiler from moving arithmetic out of it.
template <class T, class F>
[[gnu::noipa]] void under_rounding_mode(T* r, const T* a, const T* b, const T* c) {
  for (int i = 0; i < kLanes; i++) r[i] = F{}(a[i], b[i], c[i]);
}

struct RoundingScope {
  int before = std::fegetround();
  explicit RoundingScope(u8 r) {
    std::fesetround(r == kZero ? FE_TOWARDZERO : r == kDown ? FE_DOWNWARD : r == kUp ? FE_UPWARD : FE_TONEAREST);
  }
  ~RoundingScope() { std::fesetround(before); }
};

template <class T, class F>
void directed(Warp& w, const Instruction& I, u32 mask) {
  T s[3][kLanes], r[kLanes];
  const T* a = read_float<T>(w, I, I.op[1], s[0]);
  const T* b = I.operand_count > 2 ? read_float<T>(w, I, I.op[2], s[1]) : a;
  const T* c = I.operand_count > 3 ? read_float<T>(w, I, I.op[3], s[2]) : a;
  {
    RoundingScope scope(I.rounding);
    under_rounding_mode<T, F>(r, a, b, c);
  }
  write_float<T>(w, I, I.op[0], mask, r);
}

// G: the operation on three numbers of one type (unused ones are ignored), in float or double.
// 16-bit.
template <class F, class G>
void decode_float(Decoder& d, F rounded_to_nearest, G) {
  d.all(d.types[0]);
  if (d.I.rounding != kNearest) {
    if (d.types[0] == Type::F32) return d.run(directed<float, G>);
    if (d.types[0] == Type::F64) return d.run(directed<double, G>);
    d.unsupported("rounding mode of a 16-bit operation");
  }
  d.run(float_handler(d.types[0], rounded_to_nearest));
}

template <class T>
auto fused_multiply_add(T a, T b, T c) {
  if constexpr (std::is_same_v<T, float>) {
    return __builtin_fmaf(a, b, c);
  } else if constexpr (std::is_same_v<T, double>) {
    return __builtin_fma(a, b, c);
  } else {
    double product = widen(a) * widen(b), sum = product + widen(c);
    if (std::isnan(sum) || std::isinf(sum)) return sum;
    // round to odd: what the sum lost (two-sum) decides its last bit, then rounding to 16 bits is right
    double back = sum - product, lost = (product - (sum - back)) + (widen(c) - back);
    if (lost != 0 && !(std::bit_cast<u64>(sum) & 1)) {
      bool away = (lost > 0) == (sum > 0);
      sum = std::bit_cast<double>(std::bit_cast<u64>(sum) + (away ? 1 : -1));
    }
    return sum;
  }
}

template <class T>
T minimum(T a, T b, bool nan, bool maximum) {
  auto x = widen(a), y = widen(b);
  if (std::isnan(x)) return nan ? a : b;
  if (std::isnan(y)) return nan ? b : a;
  if (x == y) return std::signbit(x) != maximum ? a : b;
  return (x < y) != maximum ? a : b;
}

template <class T>
auto through_double(T a, double (*f)(double)) {
  if constexpr (std::is_same_v<T, float>)
    return static_cast<float>(f(a));
  else
    return f(widen(a));
}

template <class F>
void decode_sfu(Decoder& d, F f) {
  d.all(d.types[0]);
  d.run(float_handler(d.types[0], f));
}

// Counts lanes of a special function unit, then runs the handler kept in a table slot.
template <u64 Counters::* kCounter, Handler kRun>
void counted(Warp& w, const Instruction& I, u32 mask) {
  bool pair = I.type == Type::F16X2 || I.type == Type::BF16X2;
  w.launch->simulator->counters.*kCounter += u64(__builtin_popcount(mask)) << pair;
  kRun(w, I, mask);
}

template <u64 Counters::* kCounter, class F>
void decode_counted(Decoder& d, F) {
  d.all(d.types[0]);
  switch (d.types[0]) {
    case Type::F32:
      return d.run(counted<kCounter, elementwise<float, F, false>>);
    case Type::F64:
      return d.run(counted<kCounter, elementwise<double, F, false>>);
    case Type::F16:
      return d.run(counted<kCounter, elementwise<f16, F, false>>);
    case Type::BF16:
      return d.run(counted<kCounter, elementwise<bf16, F, false>>);
    case Type::F16X2:
      return d.run(counted<kCounter, elementwise2<f16, F>>);
    default:
      return d.run(counted<kCounter, elementwise2<bf16, F>>);
  }
}

template <u64 Counters::* kCounter, class F, class G>
void decode_counted_rounding(Decoder& d, F f, G) {
  if (d.I.rounding == kNearest) return decode_counted<kCounter>(d, f);
  d.all(d.types[0]);
  d.run(d.types[0] == Type::F32 ? counted<kCounter, directed<float, G>> : counted<kCounter, directed<double, G>>);
}

template <class T>
void test_property(Warp& w, const Instruction& I, u32 mask) {
  T s[kLanes];
  u8 r[kLanes];
  const T* x = read(w, I.op[1], s);
  for (int i = 0; i < kLanes; i++) switch (I.a) {
      case 0:
        r[i] = std::isfinite(x[i]);
        break;
      case 1:
        r[i] = std::isinf(x[i]);
        break;
      case 2:
        r[i] = !std::isnan(x[i]);
        break;
      case 3:
        r[i] = std::isnan(x[i]);
        break;
      case 4:
        r[i] = std::isnormal(x[i]);
        break;
      default:
        r[i] = std::fpclassify(x[i]) == FP_SUBNORMAL;
    }
  write(w, I.op[0], mask, r);
}

// ---- comparison

const char* const kComparisons[] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge", "equ", "neu", "ltu",
                                    "leu", "gtu", "geu", "num", "nan", "lo", "ls",  "hi",  "hs"};

int comparison(const Decoder& d) {
  for (int i = 0; i < 18; i++)
    if (d.has(kComparisons[i])) return i < 14 ? i : i - 14 + 2;
  d.unsupported("no comparison");
}

template <class T>
void compare(u8* r, int how, const T* a, const T* b) {
  auto each = [&](auto f) {
    for (int i = 0; i < kLanes; i++) {
      bool unordered = false;
      if constexpr (std::is_floating_point_v<T>) unordered = a[i] != a[i] || b[i] != b[i];
      r[i] = f(a[i], b[i], unordered);
    }
  };
  switch (how) {
    case 0:
      return each([](T x, T y, bool) { return x == y; });
    case 1:
      return each([](T x, T y, bool u) { return !u && x != y; });
    case 2:
      return each([](T x, T y, bool) { return x < y; });
    case 3:
      return each([](T x, T y, bool) { return x <= y; });
    case 4:
      return each([](T x, T y, bool) { return x > y; });
    case 5:
      return each([](T x, T y, bool) { return x >= y; });
    case 6:
      return each([](T x, T y, bool u) { return u || x == y; });
    case 7:
      return each([](T x, T y, bool u) { return u || x != y; });
    case 8:
      return each([](T x, T y, bool u) { return u || x < y; });
    case 9:
      return each([](T x, T y, bool u) { return u || x <= y; });
    case 10:
      return each([](T x, T y, bool u) { return u || x > y; });
    case 11:
      return each([](T x, T y, bool u) { return u || x >= y; });
    case 12:
      return each([](T, T, bool u) { return !u; });
    default:
      return each([](T, T, bool u) { return u; });
  }
}

template <class T>
void compare_operands(Warp& w, const Instruction& I, u8* r) {
  T s[2][kLanes];
  const T *a = read_float<T>(w, I, I.op[1], s[0]), *b = read_float<T>(w, I, I.op[2], s[1]);
  if constexpr (is_half<T>) {
    float x[kLanes], y[kLanes];
    for (int i = 0; i < kLanes; i++) x[i] = a[i].value(), y[i] = b[i].value();
    compare(r, I.a, x, y);
  } else {
    compare(r, I.a, a, b);
  }
}

void combine(Warp& w, const Instruction& I, u8* r) {  // b: 1 and, 2 or, 3 xor with the third source
  if (!I.b) return;
  u32 c = read_mask(w, I.op[3]);
  for (int i = 0; i < kLanes; i++) {
    u8 x = c >> i & 1;
    r[i] = I.b == 1 ? r[i] & x : I.b == 2 ? r[i] | x : r[i] ^ x;
  }
}

template <class T>
void setp(Warp& w, const Instruction& I, u32 mask) {
  u8 r[kLanes], not_r[kLanes];
  compare_operands<T>(w, I, r);
  for (int i = 0; i < kLanes; i++) not_r[i] = !r[i];
  combine(w, I, r);
  if (I.op[0].kind != Operand::Vector) return write(w, I.op[0], mask, r);
  combine(w, I, not_r);
  write(w, I.parts[I.op[0].first], mask, r);
  write(w, I.parts[I.op[0].first + 1], mask, not_r);
}

template <class H>
void setp2(Warp& w, const Instruction& I, u32 mask) {  // p|q: low half, high half
  u32 s[2][kLanes];
  const u32 *a = read(w, I.op[1], s[0]), *b = read(w, I.op[2], s[1]);
  for (int half = 0; half < 2; half++) {
    float x[kLanes], y[kLanes];
    u8 r[kLanes];
    for (int i = 0; i < kLanes; i++)
      x[i] = H::raw(a[i] >> (16 * half)).value(), y[i] = H::raw(b[i] >> (16 * half)).value();
    compare(r, I.a, x, y);
    combine(w, I, r);
    if (I.op[0].kind == Operand::Vector)
      write(w, I.parts[I.op[0].first + half], mask, r);
    else if (!half)
      write(w, I.op[0], mask, r);
  }
}

void decode_setp(Decoder& d) {
  d.all(d.types[0]);
  d.I.a = comparison(d);
  d.I.b = d.has("and") ? 1 : d.has("or") ? 2 : d.has("xor") ? 3 : 0;
  switch (d.types[0]) {
    case Type::U16:
    case Type::B16:
      return d.run(setp<u16>);
    case Type::S16:
      return d.run(setp<s16>);
    case Type::U32:
    case Type::B32:
      return d.run(setp<u32>);
    case Type::S32:
      return d.run(setp<s32>);
    case Type::U64:
    case Type::B64:
      return d.run(setp<u64>);
    case Type::S64:
      return d.run(setp<s64>);
    case Type::F32:
      return d.run(setp<float>);
    case Type::F64:
      return d.run(setp<double>);
    case Type::F16:
      return d.run(setp<f16>);
    case Type::BF16:
      return d.run(setp<bf16>);
    case Type::F16X2:
      return d.run(setp2<f16>);
    default:
      return d.run(setp2<bf16>);
  }
}

template <class T>
void set(Warp& w, const Instruction& I, u32 mask) {
  u8 r[kLanes];
  compare_operands<T>(w, I, r);
  combine(w, I, r);
  u32 out[kLanes];
  const u32 yes = I.type == Type::F32    ? 0x3f800000u
                  : I.type == Type::F16  ? 0x3c00u
                  : I.type == Type::BF16 ? 0x3f80u
                                         : ~0u;
  for (int i = 0; i < kLanes; i++) out[i] = r[i] ? yes : 0;
  write(w, I.op[0], mask, out);
}

void decode_set(Decoder& d) {
  if (d.types.size() < 2) d.unsupported("set needs two types");
  d.all(d.types[1]);
  d.operand(0, d.operands[0], d.types[0]);
  d.I.a = comparison(d);
  d.I.b = d.has("and") ? 1 : d.has("or") ? 2 : d.has("xor") ? 3 : 0;
  switch (d.types[1]) {
    case Type::U16:
    case Type::B16:
      return d.run(set<u16>);
    case Type::S16:
      return d.run(set<s16>);
    case Type::U32:
    case Type::B32:
      return d.run(set<u32>);
    case Type::S32:
      return d.run(set<s32>);
    case Type::U64:
    case Type::B64:
      return d.run(set<u64>);
    case Type::S64:
      return d.run(set<s64>);
    case Type::F32:
      return d.run(set<float>);
    case Type::F64:
      return d.run(set<double>);
    case Type::F16:
      return d.run(set<f16>);
    case Type::BF16:
      return d.run(set<bf16>);
    default:
      d.unsupported("set of packed halves");
  }
}

template <class T>
void selp(Warp& w, const Instruction& I, u32 mask) {
  T s[2][kLanes], r[kLanes];
  const T *a = read(w, I.op[1], s[0]), *b = read(w, I.op[2], s[1]);
  u32 c = read_mask(w, I.op[3]);
  for (int i = 0; i < kLanes; i++) r[i] = (c >> i & 1) ? a[i] : b[i];
  write(w, I.op[0], mask, r);
}

template <class C>
void slct(Warp& w, const Instruction& I, u32 mask) {
  u32 s[2][kLanes], r[kLanes];
  C t[kLanes];
  const u32 *a = read(w, I.op[1], s[0]), *b = read(w, I.op[2], s[1]);
  const C* c = read(w, I.op[3], t);
  for (int i = 0; i < kLanes; i++) r[i] = c[i] >= 0 ? a[i] : b[i];
  write(w, I.op[0], mask, r);
}

// ---- moves

template <class T>
void move(Warp& w, const Instruction& I, u32 mask) {
  T s[kLanes];
  write(w, I.op[0], mask, read(w, I.op[1], s));
}

// mov with a vector on one side or both: packs and unpacks; .b128 registers are a pair of 64-bit ones.
void move_packed(Warp& w, const Instruction& I, u32 mask) {
  const int bytes = size_of(I.type);
  u64 whole[2][kLanes] = {};
  const Operand &d = I.op[0], &s = I.op[1];
  const int from = I.part_count(s), to = I.part_count(d);
  for (int k = 0; k < from; k++) {
    u64 space[kLanes];
    const u64* p = read(w, I.part(s, k), space);
    const int bits = 8 * bytes / from, at = k * bits;
    const u64 keep = bits >= 64 ? ~0ull : (1ull << bits) - 1;
    for (int i = 0; i < kLanes; i++) whole[at / 64][i] |= (p[i] & keep) << (at % 64);
  }
  for (int k = 0; k < to; k++) {
    u64 out[kLanes];
    const int bits = 8 * bytes / to, at = k * bits;
    const u64 keep = bits >= 64 ? ~0ull : (1ull << bits) - 1;
    for (int i = 0; i < kLanes; i++) out[i] = whole[at / 64][i] >> (at % 64) & keep;
    write(w, I.part(d, k), mask, out);
  }
}

void decode_mov(Decoder& d) {
  d.all(d.types[0]);
  if (d.I.op[0].kind == Operand::Vector || d.I.op[1].kind == Operand::Vector) return d.run(move_packed);
  switch (size_of(d.types[0])) {
    case 1:
      return d.run(move<u8>);
    case 2:
      return d.run(move<u16>);
    case 4:
      return d.run(move<u32>);
    default:
      return d.run(move<u64>);
  }
}

// ---- conversion

// x rounded to a format with `fraction` bits after the point and exponents down to `min_exponent`.
double round_to_format(double x, int fraction, int min_exponent, double max, u8 how) {
  if (x == 0 || std::isnan(x) || std::isinf(x)) return x;
  int exponent = std::max(std::ilogb(x), min_exponent);
  double scaled = std::ldexp(x, fraction - exponent), r;
  switch (how) {
    case kZero:
      r = std::trunc(scaled);
      break;
    case kDown:
      r = std::floor(scaled);
      break;
    case kUp:
      r = std::ceil(scaled);
      break;
    case kAway:
      r = std::round(scaled);
      break;
    default:
      r = std::nearbyint(scaled);
  }
  r = std::copysign(std::ldexp(r, exponent - fraction), x);
  if (std::fabs(r) <= max) return r;
  bool stays = how == kZero || (how == kDown && x > 0) || (how == kUp && x < 0);
  return std::copysign(stays ? max : INFINITY, x);
}

constexpr double kMaxF16 = 65504, kMaxF32 = std::numeric_limits<float>::max();
const double kMaxBf16 = std::ldexp(255, 120);

u16 to_f16(double x, u8 rounding) {
  return f16(rounding == kNearest ? x : round_to_format(x, 10, -14, kMaxF16, rounding)).bits;
}
u16 to_bf16(double x, u8 rounding) {
  return bf16(rounding == kNearest ? x : round_to_format(x, 7, -126, kMaxBf16, rounding)).bits;
}

enum ConvertFlags : u8 { kRelu = 1, kFinite = 2, kToIntegral = 4 };

double adjust(double x, const Instruction& I, double max) {
  if ((I.b & kRelu) && x < 0) x = 0;
  if ((I.b & kRelu) && x == 0) x = 0;
  if ((I.b & kFinite) && std::fabs(x) > max) x = std::copysign(max, x);
  return I.saturate ? clamp01(x) : x;
}

void float_sources(Warp& w, const Instruction& I, const Operand& o, Type t, double* out) {
  switch (t) {
    case Type::F64: {
      double s[kLanes];
      memcpy(out, read(w, o, s), sizeof s);
      return;
    }
    case Type::F32: {
      float s[kLanes];
      const float* p = read_float<float>(w, I, o, s);
      for (int i = 0; i < kLanes; i++) out[i] = p[i];
      return;
    }
    case Type::F16: {
      f16 s[kLanes];
      const f16* p = read(w, o, s);
      for (int i = 0; i < kLanes; i++) out[i] = p[i].value();
      return;
    }
    default: {
      bf16 s[kLanes];
      const bf16* p = read(w, o, s);
      for (int i = 0; i < kLanes; i++) out[i] = p[i].value();
    }
  }
}

double integral(double x, u8 rounding) {
  switch (rounding) {
    case kZero:
      return std::trunc(x);
    case kDown:
      return std::floor(x);
    case kUp:
      return std::ceil(x);
    default:
      return std::nearbyint(x);
  }
}

void convert_float_to_float(Warp& w, const Instruction& I, u32 mask) {
  double x[kLanes];
  float_sources(w, I, I.op[1], I.type2, x);
  u8 rounding = I.rounding;
  if (I.b & kToIntegral) {
    for (double& v : x) v = integral(v, rounding);
    rounding = kNearest;
  }
  switch (I.type) {
    case Type::F64:
      for (double& v : x) v = adjust(v, I, INFINITY);
      return write(w, I.op[0], mask, x);
    case Type::F32: {
      float r[kLanes];
      for (int i = 0; i < kLanes; i++) {
        double v = adjust(x[i], I, kMaxF32);
        r[i] = static_cast<float>(rounding == kNearest ? v : round_to_format(v, 23, -126, kMaxF32, rounding));
        if (r[i] != r[i]) r[i] = std::bit_cast<float>(kNanF32);
      }
      if (I.ftz) flush_subnormals(r);
      return write(w, I.op[0], mask, r);
    }
    case Type::TF32: {
      u32 r[kLanes];
      for (int i = 0; i < kLanes; i++) {
        double v = adjust(x[i], I, std::ldexp(2047, 117));
        float f = static_cast<float>(round_to_format(v, 10, -126, std::ldexp(2047, 117), rounding));
        r[i] = f == f ? std::bit_cast<u32>(f) : kNanF32;
      }
      return write(w, I.op[0], mask, r);
    }
    case Type::F16: {
      u16 r[kLanes];
      for (int i = 0; i < kLanes; i++) r[i] = to_f16(adjust(x[i], I, kMaxF16), rounding);
      return write(w, I.op[0], mask, r);
    }
    default: {
      u16 r[kLanes];
      for (int i = 0; i < kLanes; i++) r[i] = to_bf16(adjust(x[i], I, kMaxBf16), rounding);
      return write(w, I.op[0], mask, r);
    }
  }
}

// cvt.f16x2.f32 d, a, b: a goes to the high half
template <class H>
void convert_pair(Warp& w, const Instruction& I, u32 mask) {
  float s[2][kLanes];
  u32 r[kLanes];
  const float *hi = read_float<float>(w, I, I.op[1], s[0]), *lo = read_float<float>(w, I, I.op[2], s[1]);
  if (I.rounding == kNearest && !I.b) {
    for (int i = 0; i < kLanes; i++) r[i] = u32(H(hi[i]).bits) << 16 | H(lo[i]).bits;
    return write(w, I.op[0], mask, r);
  }
  constexpr bool kF16 = std::is_same_v<H, f16>;
  auto one = [&](float x) {
    double v = adjust(x, I, kF16 ? kMaxF16 : kMaxBf16);
    return kF16 ? to_f16(v, I.rounding) : to_bf16(v, I.rounding);
  };
  for (int i = 0; i < kLanes; i++) r[i] = u32(one(hi[i])) << 16 | one(lo[i]);
  write(w, I.op[0], mask, r);
}

template <class H>
void half_to_float(Warp& w, const Instruction& I, u32 mask) {
  H s[kLanes];
  float r[kLanes];
  const H* a = read(w, I.op[1], s);
  for (int i = 0; i < kLanes; i++) r[i] = a[i].value();
  write_float(w, I, I.op[0], mask, r);
}

template <class H>
void float_to_half(Warp& w, const Instruction& I, u32 mask) {
  float s[kLanes];
  u16 r[kLanes];
  const float* a = read_float<float>(w, I, I.op[1], s);
  for (int i = 0; i < kLanes; i++) r[i] = H(a[i]).bits;
  write(w, I.op[0], mask, r);
}

void convert_float_to_integer(Warp& w, const Instruction& I, u32 mask) {
  double x[kLanes];
  u64 r[kLanes];
  float_sources(w, I, I.op[1], I.type2, x);
  const int bits = 8 * size_of(I.type);
  const bool sign = is_signed(I.type);
  const double high = std::ldexp(1, bits - sign),
               low = sign ? -high : 0;  // first value too large; lowest value
  for (int i = 0; i < kLanes; i++) {
    double v = integral(x[i], I.rounding);
    if (std::isnan(v))
      r[i] = bits == 64 ? 0x8000000000000000ull : 0;
    else if (v >= high)
      r[i] = sign ? (1ull << (bits - 1)) - 1 : bits == 64 ? ~0ull : (1ull << bits) - 1;
    else if (v <= low)
      r[i] = sign ? ~0ull << (bits - 1) : 0;
    else
      r[i] = sign ? u64(s64(v)) : u64(v);
  }
  write(w, I.op[0], mask, r);
}

// Integers of any width as 64 bits.
void integer_sources(Warp& w, const Operand& o, Type t, s64* out) {
  auto get = [&](auto zero) {
    using T = decltype(zero);
    T s[kLanes];
    const T* p = read(w, o, s);
    for (int i = 0; i < kLanes; i++) out[i] = static_cast<s64>(p[i]);
  };
  switch (t) {
    case Type::U8:
    case Type::B8:
      return get(u8());
    case Type::U16:
    case Type::B16:
      return get(u16());
    case Type::U32:
    case Type::B32:
      return get(u32());
    case Type::S8:
      return get(s8());
    case Type::S16:
      return get(s16());
    case Type::S32:
      return get(s32());
    default:
      return get(u64());
  }
}

void convert_integer_to_integer(Warp& w, const Instruction& I, u32 mask) {
  s64 x[kLanes];
  integer_sources(w, I.op[1], I.type2, x);
  if (I.saturate) {
    const int bits = 8 * size_of(I.type);
    const bool from_unsigned = !is_signed(I.type2), to_signed = is_signed(I.type);
    for (s64& v : x) {
      __int128 wide = from_unsigned ? __int128(u64(v)) : __int128(v);
      __int128 high = (__int128(1) << (bits - to_signed)) - 1, low = to_signed ? -high - 1 : 0;
      v = static_cast<s64>(std::clamp(wide, low, high));
    }
  }
  // a wider register takes the extended value: truncate to the type first
  auto put = [&](auto zero) {
    using T = decltype(zero);
    T r[kLanes];
    for (int i = 0; i < kLanes; i++) r[i] = static_cast<T>(x[i]);
    write(w, I.op[0], mask, r, std::is_signed_v<T>);
  };
  switch (I.type) {
    case Type::U8:
    case Type::B8:
      return put(u8());
    case Type::U16:
    case Type::B16:
      return put(u16());
    case Type::U32:
    case Type::B32:
      return put(u32());
    case Type::S8:
      return put(s8());
    case Type::S16:
      return put(s16());
    case Type::S32:
      return put(s32());
    default:
      return put(u64());
  }
}

template <class T>
[[gnu::noipa]] void integers_to_floats(T* r, const s64* x, bool is_unsigned) {
  for (int i = 0; i < kLanes; i++) r[i] = is_unsigned ? static_cast<T>(static_cast<u64>(x[i])) : static_cast<T>(x[i]);
}

void convert_integer_to_float(Warp& w, const Instruction& I, u32 mask) {
  s64 x[kLanes];
  integer_sources(w, I.op[1], I.type2, x);
  const bool is_unsigned = !is_signed(I.type2);
  if (I.type == Type::F32) {
    float r[kLanes];
    {
      RoundingScope scope(I.rounding);
      integers_to_floats(r, x, is_unsigned);
    }
    return write_float(w, I, I.op[0], mask, r);
  }
  double r[kLanes];
  {
    RoundingScope scope(I.rounding);
    integers_to_floats(r, x, is_unsigned);
  }
  if (I.type == Type::F64) return write(w, I.op[0], mask, r);
  u16 h[kLanes];
  for (int i = 0; i < kLanes; i++) h[i] = I.type == Type::F16 ? to_f16(r[i], I.rounding) : to_bf16(r[i], I.rounding);
  write(w, I.op[0], mask, h);
}

void decode_cvt(Decoder& d) {
  if (d.types.size() != 2) d.unsupported("cvt needs two types");
  Instruction& I = d.I;
  const Type to = d.types[0], from = d.types[1];
  d.all(from);
  I.b = (d.has("relu") ? kRelu : 0) | (d.has("satfinite") ? kFinite : 0);
  if (d.has("rni") || d.has("rzi") || d.has("rmi") || d.has("rpi")) I.b |= kToIntegral;
  I.saturate = d.has("sat");
  const bool plain = I.rounding == kNearest && !I.b && !I.saturate;
  if (to == Type::F16X2 || to == Type::BF16X2) {
    if (d.operands.size() != 3 || from != Type::F32) d.unsupported("packed conversion from this type");
    return d.run(to == Type::F16X2 ? convert_pair<f16> : convert_pair<bf16>);
  }
  if (is_float(from) && is_float(to)) {
    if (to == Type::F32 && from == Type::F16 && plain) return d.run(half_to_float<f16>);
    if (to == Type::F32 && from == Type::BF16 && plain) return d.run(half_to_float<bf16>);
    if (to == Type::F16 && from == Type::F32 && plain) return d.run(float_to_half<f16>);
    if (to == Type::BF16 && from == Type::F32 && plain) return d.run(float_to_half<bf16>);
    return d.run(convert_float_to_float);
  }
  if (is_float(from)) return d.run(convert_float_to_integer);
  if (is_float(to)) return d.run(convert_integer_to_float);
  d.run(convert_integer_to_integer);
}

constexpr const char* kInteger = "u16 u32 u64 s16 s32 s64";
constexpr const char* kFloat = "f32 f64 f16 bf16 f16x2 bf16x2";
constexpr const char* kRounding = "rn rz rm rp ftz sat";

// What a row of the table below says with one lambda: it becomes a decoder of its own.

using Decode = void (*)(Decoder&);

template <class F>
Decode integer(F) {
  return [](Decoder& d) {
    d.all(d.types[0]);
    d.run(integer_handler(d.types[0], F{}));
  };
}

// Integers modulo 2^n: signed as unsigned.
template <class F>
Decode modular(F) {
  return [](Decoder& d) {
    d.all(d.types[0]);
    d.run(integer_handler(unsigned_of(d.types[0]), F{}));
  };
}

template <class F>
Decode saturating(F) {
  return [](Decoder& d) {
    d.I.saturate = false;
    d.all(Type::S32);
    d.run(integer_handler(Type::S32, F{}));
  };
}

template <class F>
Decode counting(F) {
  return [](Decoder& d) { decode_count_bits(d, F{}); };
}

// Floats that keep the bits of a NaN.
template <class F>
Decode float_bits(F) {
  return [](Decoder& d) {
    d.all(d.types[0]);
    d.run(float_handler<true>(d.types[0], F{}));
  };
}

template <class F>
Decode floating(F) {
  return [](Decoder& d) {
    d.all(d.types[0]);
    d.run(float_handler(d.types[0], F{}));
  };
}

// With rounding modes: three(a, b, c) is the operation in the type itself.
template <class F, class G>
Decode floating(F, G) {
  return [](Decoder& d) { decode_float(d, F{}, G{}); };
}

template <u64 Counters::* kCounter, class F>
Decode special(F) {
  return [](Decoder& d) { decode_counted<kCounter>(d, F{}); };
}

template <u64 Counters::* kCounter, class F, class G>
Decode special(F, G) {
  return [](Decoder& d) { decode_counted_rounding<kCounter>(d, F{}, G{}); };
}

constexpr const char* kComparing = "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor ftz";
constexpr auto kFma = [](auto a, auto b, auto c) { return fused_multiply_add(a, b, c); };

}  // namespace

extern const Entry kIntegerTable[];
const Entry kIntegerTable[] = {
    // opcode, types, modifiers, section of the PTX ISA, meaning
    {"add", kInteger, "", "Integer Arithmetic", modular([](auto a, auto b) { return a + b; })},
    {"add.sat", "s32", "", "Integer Arithmetic",
     saturating([](auto a, auto b) { return std::clamp<s64>(s64(a) + s64(b), INT32_MIN, INT32_MAX); })},
    {"sub", kInteger, "", "Integer Arithmetic", modular([](auto a, auto b) { return a - b; })},
    {"sub.sat", "s32", "", "Integer Arithmetic",
     saturating([](auto a, auto b) { return std::clamp<s64>(s64(a) - s64(b), INT32_MIN, INT32_MAX); })},
    {"mul.wide", "u16 s16 u32 s32", "", "Integer Arithmetic", decode_wide},
    {"mad.wide", "u16 s16 u32 s32", "", "Integer Arithmetic", decode_wide},
    {"mul.hi", kInteger, "", "Integer Arithmetic", integer([](auto a, auto b) { return multiply_high(a, b); })},
    {"mul.lo", kInteger, "", "Integer Arithmetic", modular([](auto a, auto b) { return a * b; })},
    {"mad.lo", kInteger, "", "Integer Arithmetic", modular([](auto a, auto b, auto c) { return a * b + c; })},
    {"mad.hi", kInteger, "", "Integer Arithmetic",
     integer([](auto a, auto b, auto c) { return static_cast<decltype(a)>(multiply_high(a, b) + c); })},
    {"mul24.lo", "u32", "", "Integer Arithmetic",
     integer([](auto a, auto b) { return (a & 0xffffff) * (b & 0xffffff); })},
    {"mul24.lo", "s32", "", "Integer Arithmetic",
     integer([](auto a, auto b) { return ((s32)((u32)a << 8) >> 8) * ((s32)((u32)b << 8) >> 8); })},
    {"sad", kInteger, "", "Integer Arithmetic",
     integer([](auto a, auto b, auto c) { return c + (a < b ? b - a : a - b); })},
    {"div", kInteger, "", "Integer Arithmetic", integer([](auto a, auto b) {
       using T = decltype(a);
       if (b == 0) return static_cast<T>(-1);
       return std::is_signed_v<T> && b == static_cast<T>(-1) ? static_cast<T>(0 - a) : static_cast<T>(a / b);
     })},
    {"rem", kInteger, "", "Integer Arithmetic", integer([](auto a, auto b) {
       using T = decltype(a);
       if (b == 0) return a;
       return std::is_signed_v<T> && b == static_cast<T>(-1) ? static_cast<T>(0) : static_cast<T>(a % b);
     })},
    {"abs", "s16 s32 s64", "", "Integer Arithmetic", integer([](auto a) { return a < 0 ? -a : a; })},
    {"neg", "s16 s32 s64", "", "Integer Arithmetic", integer([](auto a) { return -a; })},
    {"min", kInteger, "", "Integer Arithmetic", integer([](auto a, auto b) { return a < b ? a : b; })},
    {"max", kInteger, "", "Integer Arithmetic", integer([](auto a, auto b) { return a > b ? a : b; })},
    {"popc", "b32 b64", "", "Integer Arithmetic",
     counting([](auto a, bool) { return u32(std::popcount(std::make_unsigned_t<decltype(a)>(a))); })},
    {"clz", "b32 b64", "", "Integer Arithmetic",
     counting([](auto a, bool) { return u32(std::countl_zero(std::make_unsigned_t<decltype(a)>(a))); })},
    {"bfind", "u32 u64 s32 s64", "shiftamt", "Integer Arithmetic",
     counting([](auto a, bool amount) { return find_bit(a, amount); })},
    {"brev", "b32 b64", "", "Integer Arithmetic", integer([](auto a) {
       decltype(a) r = 0;
       for (size_t i = 0; i < 8 * sizeof a; i++) r |= ((a >> i) & 1) << (8 * sizeof a - 1 - i);
       return r;
     })},
    {"bfe", "u32 s32 u64 s64", "", "Integer Arithmetic",
     [](Decoder& d) {
       d.all(d.types[0]);
       d.operand(2, d.operands[2], Type::U32);
       d.operand(3, d.operands[3], Type::U32);
       Type t = d.types[0];
       d.run(t == Type::U32   ? extract_bits<u32>
             : t == Type::S32 ? extract_bits<s32>
             : t == Type::U64 ? extract_bits<u64>
                              : extract_bits<s64>);
     }},
    {"bfi", "b32 b64", "", "Integer Arithmetic",
     [](Decoder& d) {
       d.all(d.types[0]);
       d.operand(3, d.operands[3], Type::U32);
       d.operand(4, d.operands[4], Type::U32);
       d.run(d.types[0] == Type::B32 ? insert_bits<u32> : insert_bits<u64>);
     }},
    {"dp4a", "u32 s32", "", "Integer Arithmetic",
     [](Decoder& d) {
       d.all(Type::B32);
       d.I.type2 = d.types.size() > 1 ? d.types[1] : d.types[0];
       d.run(dot4);
     }},
    {"add.cc", "u32 s32 u64 s64", "", "Extended-Precision Integer Arithmetic", decode_carry},
    {"addc", "u32 s32 u64 s64", "cc", "Extended-Precision Integer Arithmetic", decode_carry},
    {"sub.cc", "u32 s32 u64 s64", "", "Extended-Precision Integer Arithmetic", decode_carry},
    {"subc", "u32 s32 u64 s64", "cc", "Extended-Precision Integer Arithmetic", decode_carry},
    {"mad.lo.cc", "u32 s32 u64 s64", "", "Extended-Precision Integer Arithmetic", decode_carry},
    {"mad.hi.cc", "u32 s32 u64 s64", "", "Extended-Precision Integer Arithmetic", decode_carry},
    {"madc", "u32 s32 u64 s64", "lo hi cc", "Extended-Precision Integer Arithmetic", decode_carry},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

extern const Entry kFloatTable[];
const Entry kFloatTable[] = {
    {"testp", "f32 f64", "finite infinite number notanumber normal subnormal", "Floating-Point",
     [](Decoder& d) {
       d.all(d.types[0]);
       d.I.a = d.has("finite")       ? 0
               : d.has("infinite")   ? 1
               : d.has("number")     ? 2
               : d.has("notanumber") ? 3
               : d.has("normal")     ? 4
                                     : 5;
       d.run(d.types[0] == Type::F32 ? test_property<float> : test_property<double>);
     }},
    {"copysign", "f32 f64", "", "Floating-Point", float_bits([](auto a, auto b) {
       if constexpr (is_half<decltype(a)>)
         return a;
       else
         return std::copysign(b, a);
     })},
    {"add", kFloat, kRounding, "Floating-Point, Half Precision",
     floating([](auto a, auto b) { return widen(a) + widen(b); }, [](auto a, auto b, auto) { return a + b; })},
    {"sub", kFloat, kRounding, "Floating-Point, Half Precision",
     floating([](auto a, auto b) { return widen(a) - widen(b); }, [](auto a, auto b, auto) { return a - b; })},
    {"mul", kFloat, kRounding, "Floating-Point, Half Precision",
     floating([](auto a, auto b) { return widen(a) * widen(b); }, [](auto a, auto b, auto) { return a * b; })},
    {"fma", kFloat, kRounding, "Floating-Point, Half Precision", floating(kFma, kFma)},
    {"mad", "f32 f64", kRounding, "Floating-Point", floating(kFma, kFma)},
    {"div", "f32 f64", "rn rz rm rp ftz approx full", "Floating-Point",
     special<&Counters::div>([](auto a, auto b) { return widen(a) / widen(b); },
                             [](auto a, auto b, auto) { return a / b; })},
    {"abs", kFloat, "ftz", "Floating-Point, Half Precision", float_bits([](auto a) {
       if constexpr (is_half<decltype(a)>)
         return decltype(a)::raw(a.bits & 0x7fff);
       else
         return std::fabs(a);
     })},
    {"neg", kFloat, "ftz", "Floating-Point, Half Precision", float_bits([](auto a) {
       if constexpr (is_half<decltype(a)>)
         return decltype(a)::raw(a.bits ^ 0x8000);
       else
         return -a;
     })},
    {"min.NaN", kFloat, "ftz", "Floating-Point, Half Precision",
     floating([](auto a, auto b) { return minimum(a, b, true, false); })},
    {"max.NaN", kFloat, "ftz", "Floating-Point, Half Precision",
     floating([](auto a, auto b) { return minimum(a, b, true, true); })},
    {"min.ftz.NaN", "f32", "", "Floating-Point", floating([](auto a, auto b) { return minimum(a, b, true, false); })},
    {"max.ftz.NaN", "f32", "", "Floating-Point", floating([](auto a, auto b) { return minimum(a, b, true, true); })},
    {"min", kFloat, "ftz", "Floating-Point, Half Precision",
     floating([](auto a, auto b) { return minimum(a, b, false, false); })},
    {"max", kFloat, "ftz", "Floating-Point, Half Precision",
     floating([](auto a, auto b) { return minimum(a, b, false, true); })},
    {"rcp", "f32 f64", "rn rz rm rp approx ftz", "Floating-Point",
     special<&Counters::rcp>([](auto a) { return 1 / widen(a); }, [](auto a, auto, auto) { return 1 / a; })},
    {"sqrt", "f32 f64", "rn rz rm rp approx ftz", "Floating-Point",
     special<&Counters::sfu_other>([](auto a) { return std::sqrt(widen(a)); },
                                   [](auto a, auto, auto) { return std::sqrt(a); })},
    {"rsqrt", "f32 f64", "approx ftz", "Floating-Point", special<&Counters::sfu_other>([](auto a) {
       return through_double(a, [](double x) { return 1 / std::sqrt(x); });
     })},
    {"sin", "f32", "approx ftz", "Floating-Point",
     special<&Counters::sfu_other>([](auto a) { return through_double(a, std::sin); })},
    {"cos", "f32", "approx ftz", "Floating-Point",
     special<&Counters::sfu_other>([](auto a) { return through_double(a, std::cos); })},
    {"lg2", "f32", "approx ftz", "Floating-Point",
     special<&Counters::sfu_other>([](auto a) { return through_double(a, std::log2); })},
    {"ex2", "f32 f16 bf16 f16x2 bf16x2", "approx ftz", "Floating-Point, Half Precision",
     special<&Counters::ex2>([](auto a) {
       if constexpr (std::is_same_v<decltype(a), float>)
         return exp2f(a);
       else
         return through_double(a, std::exp2);
     })},
    {"tanh", "f32 f16 bf16 f16x2 bf16x2", "approx", "Floating-Point, Half Precision",
     special<&Counters::tanh>([](auto a) { return through_double(a, std::tanh); })},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

extern const Entry kLogicTable[];
const Entry kLogicTable[] = {
    {"setp", "u16 u32 u64 s16 s32 s64 b16 b32 b64 f32 f64 f16 bf16 f16x2 bf16x2", kComparing,
     "Comparison and Selection", decode_setp},
    {"set", "u32 s32 f32 f16 bf16", kComparing, "Comparison and Selection", decode_set},
    {"selp", "u16 u32 u64 s16 s32 s64 b16 b32 b64 f32 f64", "", "Comparison and Selection",
     [](Decoder& d) {
       d.all(d.types[0]);
       int n = size_of(d.types[0]);
       d.run(n == 2 ? selp<u16> : n == 4 ? selp<u32> : selp<u64>);
     }},
    {"slct", "u32 s32 b32 f32", "ftz", "Comparison and Selection",
     [](Decoder& d) {
       d.all(d.types[0]);
       d.operand(3, d.operands[3], d.types.at(1));
       d.run(d.types[1] == Type::F32 ? slct<float> : slct<s32>);
     }},

    {"and", "pred b16 b32 b64", "", "Logic and Shift", integer([](auto a, auto b) { return a & b; })},
    {"or", "pred b16 b32 b64", "", "Logic and Shift", integer([](auto a, auto b) { return a | b; })},
    {"xor", "pred b16 b32 b64", "", "Logic and Shift", integer([](auto a, auto b) { return a ^ b; })},
    {"not", "pred", "", "Logic and Shift", integer([](auto a) { return a ^ 1; })},
    {"not", "b16 b32 b64", "", "Logic and Shift", integer([](auto a) { return ~a; })},
    {"cnot", "b16 b32 b64", "", "Logic and Shift", integer([](auto a) { return a == 0; })},
    {"lop3", "b32", "", "Logic and Shift",
     [](Decoder& d) {
       d.all(Type::B32);
       if (d.operands.size() != 5) d.unsupported("lop3 with a predicate");
       d.run(lop3);
     }},
    {"shf", "b32", "l r wrap clamp", "Logic and Shift",
     [](Decoder& d) {
       d.all(Type::B32);
       d.I.a = d.has("l");
       d.I.b = d.has("wrap");
       d.run(funnel_shift);
     }},
    {"shl", "b16 b32 b64", "", "Logic and Shift",
     [](Decoder& d) {
       d.all(d.types[0]);
       d.operand(2, d.operands[2], Type::U32);
       d.I.a = 1;
       d.run(shift_handler(d.types[0]));
     }},
    {"shr", "b16 b32 b64 u16 u32 u64 s16 s32 s64", "", "Logic and Shift",
     [](Decoder& d) {
       d.all(d.types[0]);
       d.operand(2, d.operands[2], Type::U32);
       d.run(shift_handler(d.types[0]));
     }},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

extern const Entry kMoveTable[];
const Entry kMoveTable[] = {
    {"mov", "pred b16 b32 b64 b128 u16 u32 u64 s16 s32 s64 f32 f64", "", "Data Movement and Conversion", decode_mov},
    {"prmt", "b32", "f4e b4e rc8 ecl ecr rc16", "Data Movement and Conversion",
     [](Decoder& d) {
       d.all(Type::B32);
       d.I.a = d.has("f4e")    ? 1
               : d.has("b4e")  ? 2
               : d.has("rc8")  ? 3
               : d.has("ecl")  ? 4
               : d.has("ecr")  ? 5
               : d.has("rc16") ? 6
                               : 0;
       d.run(prmt);
     }},
    {"cvt", "u8 u16 u32 u64 s8 s16 s32 s64 f16 bf16 f16x2 bf16x2 f32 f64 tf32",
     "rn rz rm rp rna rni rzi rmi rpi ftz sat satfinite relu", "Data Movement and Conversion", decode_cvt},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

}  // namespace ptxsim
