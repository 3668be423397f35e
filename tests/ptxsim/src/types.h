// Scalar types of PTX, 16-bit floats and the error every check throws.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace ptxsim {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using u128 = unsigned __int128;

constexpr int kLanes = 32;
constexpr u32 kFullMask = 0xffffffffu;

struct Error : std::runtime_error {
  using runtime_error::runtime_error;
};

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

enum class Type : u8 {
  None,
  U8,
  U16,
  U32,
  U64,
  S8,
  S16,
  S32,
  S64,
  B8,
  B16,
  B32,
  B64,
  B128,
  F16,
  BF16,
  F16X2,
  BF16X2,
  F32,
  F64,
  TF32,
  Pred
};

constexpr int size_of(Type t) {
  switch (t) {
    case Type::U8:
    case Type::S8:
    case Type::B8:
    case Type::Pred:
      return 1;
    case Type::U16:
    case Type::S16:
    case Type::B16:
    case Type::F16:
    case Type::BF16:
      return 2;
    case Type::U64:
    case Type::S64:
    case Type::B64:
    case Type::F64:
      return 8;
    case Type::B128:
      return 16;
    default:
      return 4;
  }
}

constexpr bool is_signed(Type t) { return t == Type::S8 || t == Type::S16 || t == Type::S32 || t == Type::S64; }
constexpr bool is_float(Type t) {
  return t == Type::F16 || t == Type::BF16 || t == Type::F32 || t == Type::F64 || t == Type::TF32;
}

Type type_named(const std::string& name);  // Type::None if there is no such type

// The unsigned integer with as many bytes.
template <int kBytes>
using Bits = std::conditional_t<kBytes == 1, u8,
                                std::conditional_t<kBytes == 2, u16, std::conditional_t<kBytes == 4, u32, u64>>>;

// PTX, 9.7.3 and 9.7.4: a NaN result is the canonical NaN of its type.
constexpr u32 kNanF32 = 0x7fffffffu;
constexpr u16 kNan16 = 0x7fffu;

// `wide` to float so that a later rounding to fewer bits is right: inexact results get an odd last bit.
inline float round_to_odd(double wide) {
  float f = static_cast<float>(wide);
  if (std::isnan(f) || std::isinf(wide) || static_cast<double>(f) == wide) return f;
  if (std::isinf(f)) return std::copysign(std::numeric_limits<float>::max(), f);
  u32 bits = std::bit_cast<u32>(f);
  if (std::fabs(static_cast<double>(f)) > std::fabs(wide)) bits--;
  return std::bit_cast<float>(bits | 1u);
}

struct f16 {
  u16 bits;
  f16() = default;
  explicit f16(float x) : bits(std::isnan(x) ? kNan16 : std::bit_cast<u16>(static_cast<_Float16>(x))) {}
  explicit f16(double x) : bits(std::isnan(x) ? kNan16 : std::bit_cast<u16>(static_cast<_Float16>(x))) {}
  static f16 raw(u32 x) {
    f16 h;
    h.bits = static_cast<u16>(x);
    return h;
  }
  float value() const { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
};

struct bf16 {
  u16 bits;
  bf16() = default;
  explicit bf16(float x) {
    u32 u = std::bit_cast<u32>(x);
    bits = std::isnan(x) ? kNan16 : static_cast<u16>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  explicit bf16(double x) : bf16(round_to_odd(x)) {}
  static bf16 raw(u32 x) {
    bf16 h;
    h.bits = static_cast<u16>(x);
    return h;
  }
  float value() const { return std::bit_cast<float>(static_cast<u32>(bits) << 16); }
};

template <class T>
constexpr bool is_half = std::is_same_v<T, f16> || std::is_same_v<T, bf16>;

// What arithmetic on T is done in: doubles hold every 16-bit sum, product and quotient so well that rounding
// once is right.
template <class T>
auto widen(T x) {
  if constexpr (is_half<T>)
    return static_cast<double>(x.value());
  else
    return x;
}

}  // namespace ptxsim
