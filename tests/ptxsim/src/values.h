// Reading and writing operands, 32 lanes at a time, and the templates that turn a lambda into a handler.
#pragma once

#include "machine.h"

namespace ptxsim {

u64 special_value(const Warp&, Special, int lane);

template <class To, class From>
inline void convert_lanes(To* to, const From* from) {
  for (int i = 0; i < kLanes; i++) to[i] = static_cast<To>(from[i]);
}

// The operand's value in every lane: in place if its register has T's width, else through `space`.
template <class T>
inline const T* read(Warp& w, const Operand& o, T* space) {
  using U = Bits<sizeof(T)>;
  if (o.kind == Operand::Register || o.kind == Operand::Immediate) {
    const u8* p = o.kind == Operand::Register ? w.registers + o.offset : o.lanes;
    if (o.width == sizeof(T)) return reinterpret_cast<const T*>(p);
    U* out = reinterpret_cast<U*>(space);
    switch (o.width) {
      case 1:
        convert_lanes(out, p);
        break;
      case 2:
        convert_lanes(out, reinterpret_cast<const u16*>(p));
        break;
      case 4:
        convert_lanes(out, reinterpret_cast<const u32*>(p));
        break;
      case 8:
        convert_lanes(out, reinterpret_cast<const u64*>(p));
        break;
      default:
        fail("operand width %d", o.width);
    }
    return space;
  }
  if (o.kind == Operand::SpecialRegister) {
    U* out = reinterpret_cast<U*>(space);
    for (int i = 0; i < kLanes; i++) out[i] = static_cast<U>(special_value(w, o.special, i));
    return space;
  }
  fail("operand cannot be read");
}

template <class D, class T>
inline void blend(D* d, const T* value, u32 mask) {
  if (mask == kFullMask) {
    for (int i = 0; i < kLanes; i++) d[i] = static_cast<D>(value[i]);
  } else {
    for (int i = 0; i < kLanes; i++) d[i] = (mask >> i & 1) ? static_cast<D>(value[i]) : d[i];
  }
}

template <class T>
inline void write(Warp& w, const Operand& o, u32 mask, const T* value, bool sign_extend = false) {
  if (o.kind == Operand::Sink) return;
  using U = Bits<sizeof(T)>;
  using S = std::make_signed_t<U>;
  u8* p = w.registers + o.offset;
  const U* u = reinterpret_cast<const U*>(value);
  const S* s = reinterpret_cast<const S*>(value);
  if (o.width == sizeof(T)) return blend(reinterpret_cast<U*>(p), u, mask);
  if (sign_extend && o.width > sizeof(T)) {
    if (o.width == 2)
      blend(reinterpret_cast<s16*>(p), s, mask);
    else if (o.width == 4)
      blend(reinterpret_cast<s32*>(p), s, mask);
    else
      blend(reinterpret_cast<s64*>(p), s, mask);
    return;
  }
  switch (o.width) {
    case 1:
      return blend(p, u, mask);
    case 2:
      return blend(reinterpret_cast<u16*>(p), u, mask);
    case 4:
      return blend(reinterpret_cast<u32*>(p), u, mask);
    default:
      return blend(reinterpret_cast<u64*>(p), u, mask);
  }
}

// A predicate operand as a mask of lanes.
inline u32 read_mask(Warp& w, const Operand& o) {
  u8 space[kLanes];
  const u8* p = read<u8>(w, o, space);
  u32 mask = 0;
  for (int i = 0; i < kLanes; i++) mask |= u32(p[i] & 1) << i;
  return o.negated ? ~mask : mask;
}

inline void write_mask(Warp& w, const Operand& o, u32 mask, u32 bits) {
  u8 out[kLanes];
  for (int i = 0; i < kLanes; i++) out[i] = bits >> i & 1;
  write<u8>(w, o, mask, out);
}

// ---- 9.7.3: .ftz flushes subnormal inputs and results to zero of the same sign; .sat clamps to [0, 1], NaN
// to 0

inline void flush_subnormals(float* x) {
  for (int i = 0; i < kLanes; i++) {
    u32 u = std::bit_cast<u32>(x[i]);
    u = (u & 0x7f800000u) ? u : u & 0x80000000u;
    x[i] = std::bit_cast<float>(u);
  }
}

template <class T>
inline const T* read_float(Warp& w, const Instruction& I, const Operand& o, T* space) {
  const T* p = read<T>(w, o, space);
  if constexpr (std::is_same_v<T, float>)
    if (I.ftz) {
      if (p != space) memcpy(space, p, sizeof(T) * kLanes);
      flush_subnormals(space);
      return space;
    }
  return p;
}

template <class T>
inline T clamp01(T x) {
  if constexpr (is_half<T>)
    return x.value() > 0 ? (x.value() < 1 ? x : T(1.0f)) : T(0.0f);
  else
    return x > 0 ? (x < 1 ? x : T(1)) : T(0);
}

template <class T>
inline void write_float(Warp& w, const Instruction& I, const Operand& o, u32 mask, T* value) {
  if constexpr (std::is_same_v<T, float>) {
    if (I.ftz) flush_subnormals(value);
    for (int i = 0; i < kLanes; i++) value[i] = value[i] == value[i] ? value[i] : std::bit_cast<float>(kNanF32);
  }
  if (I.saturate)
    for (int i = 0; i < kLanes; i++) value[i] = clamp01(value[i]);
  write<T>(w, o, mask, value);
}

// ---- handlers from lambdas. F is stateless, so a value of it can be made anywhere.

template <class F, class... T>
constexpr bool takes = std::is_invocable_v<F, T...>;

// kBits: the result keeps the bits of a NaN (neg, abs, integer types)
template <class T, class F, bool kBits>
void elementwise(Warp& w, const Instruction& I, u32 mask) {
  constexpr bool kFloat = std::is_floating_point_v<T> || is_half<T>;
  T s0[kLanes], s1[kLanes], s2[kLanes], r[kLanes];
  auto get = [&](int k, T* space) {
    if constexpr (kFloat)
      return read_float<T>(w, I, I.op[k], space);
    else
      return read<T>(w, I.op[k], space);
  };
  auto as_result = [](auto x) {
    if constexpr (is_half<T> && std::is_arithmetic_v<decltype(x)>)
      return T(x);
    else
      return static_cast<T>(x);
  };
  const T* a = get(1, s0);
  if constexpr (takes<F, T>) {
    for (int i = 0; i < kLanes; i++) r[i] = as_result(F{}(a[i]));
  } else if constexpr (takes<F, T, T>) {
    const T* b = get(2, s1);
    for (int i = 0; i < kLanes; i++) r[i] = as_result(F{}(a[i], b[i]));
  } else {
    const T* b = get(2, s1);
    const T* c = get(3, s2);
    for (int i = 0; i < kLanes; i++) r[i] = as_result(F{}(a[i], b[i], c[i]));
  }
  if constexpr (kFloat && !kBits)
    write_float<T>(w, I, I.op[0], mask, r);
  else {
    if constexpr (std::is_same_v<T, float>)
      if (I.ftz) flush_subnormals(r);
    write<T>(w, I.op[0], mask, r, std::is_signed_v<T>);
  }
}

// The same on both halves of 32-bit registers.
template <class H, class F>
void elementwise2(Warp& w, const Instruction& I, u32 mask) {
  u32 s[3][kLanes], r[kLanes];
  const u32* x[3] = {};
  for (int k = 1; k < I.operand_count; k++) x[k - 1] = read<u32>(w, I.op[k], s[k - 1]);
  auto one = [&](int i, int shift) {
    auto h = [&](int k) { return H::raw(x[k][i] >> shift); };
    H y;
    if constexpr (takes<F, H>)
      y = H(F{}(h(0)));
    else if constexpr (takes<F, H, H>)
      y = H(F{}(h(0), h(1)));
    else
      y = H(F{}(h(0), h(1), h(2)));
    return u32((I.saturate ? clamp01(y) : y).bits) << shift;
  };
  for (int i = 0; i < kLanes; i++) r[i] = one(i, 0) | one(i, 16);
  write<u32>(w, I.op[0], mask, r);
}

template <class F>
Handler integer_handler(Type t, F) {
  switch (t) {
    case Type::U8:
    case Type::B8:
    case Type::Pred:
      return elementwise<u8, F, true>;
    case Type::U16:
    case Type::B16:
      return elementwise<u16, F, true>;
    case Type::U32:
    case Type::B32:
      return elementwise<u32, F, true>;
    case Type::U64:
    case Type::B64:
      return elementwise<u64, F, true>;
    case Type::S8:
      return elementwise<s8, F, true>;
    case Type::S16:
      return elementwise<s16, F, true>;
    case Type::S32:
      return elementwise<s32, F, true>;
    case Type::S64:
      return elementwise<s64, F, true>;
    default:
      return nullptr;
  }
}

template <bool kBits = false, class F>
Handler float_handler(Type t, F) {
  switch (t) {
    case Type::F32:
      return elementwise<float, F, kBits>;
    case Type::F64:
      return elementwise<double, F, kBits>;
    case Type::F16:
      return elementwise<f16, F, kBits>;
    case Type::BF16:
      return elementwise<bf16, F, kBits>;
    case Type::F16X2:
      return elementwise2<f16, F>;
    case Type::BF16X2:
      return elementwise2<bf16, F>;
    default:
      return nullptr;
  }
}

inline Type unsigned_of(Type t) {
  switch (t) {
    case Type::S8:
      return Type::U8;
    case Type::S16:
      return Type::U16;
    case Type::S32:
      return Type::U32;
    case Type::S64:
      return Type::U64;
    default:
      return t;
  }
}

enum Rounding : u8 { kNearest, kZero, kDown, kUp, kAway };

// ---- decoding

struct Decoder {
  struct Parser& parser;
  Instruction& I;
  const Entry& entry;
  const std::vector<std::string>& words;     // of the opcode, split at dots
  const std::vector<std::string>& operands;  // text
  const std::vector<Type>& types;

  bool has(const char* word) const;
  const std::string* word_starting(const char* prefix) const;
  void operand(int slot, const std::string& text, Type t);
  void all(Type t);  // every operand, of one type
  void run(Handler h) { I.run = h; }
  [[noreturn]] void unsupported(const char* why) const;
};

}  // namespace ptxsim
