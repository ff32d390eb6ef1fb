// Number formats of the GPU. Registers and memory hold raw bits; as<T> and bits<T> go between bits
// and values.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace emu {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using u128 = unsigned __int128;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;
using i128 = __int128;

struct F16 {
  u16 raw;
  F16() = default;
  F16(float x) : raw(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)) {}
  static F16 truncated(float x) {
    F16 y;
    y.raw = _cvtss_sh(x, _MM_FROUND_TO_ZERO);
    return y;
  }
  operator float() const { return _cvtsh_ss(raw); }
};

struct BF16 {
  u16 raw;
  BF16() = default;
  BF16(float x) {
    const u32 b = std::bit_cast<u32>(x);
    raw = x != x ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;  // round to nearest even
  }
  static BF16 truncated(float x) {
    BF16 y;
    y.raw = x != x ? 0x7fff : std::bit_cast<u32>(x) >> 16;
    return y;
  }
  operator float() const { return std::bit_cast<float>(u32{raw} << 16); }
};

// 8-bit floats: from float they round to nearest even and saturate to the largest finite value.
template <int kMantissa, int kBias, bool kHasInfinity>
struct F8 {
  u8 raw;
  F8() = default;
  F8(float x) {
    const u8 sign = std::bit_cast<u32>(x) >> 31 << 7, largest = kHasInfinity ? 0x7b : 0x7e;
    const float magnitude = std::fabs(x);
    if (magnitude != magnitude) {
      raw = 0x7f;
      return;
    }
    if (magnitude >= decode(largest)) {
      raw = sign | largest;
      return;
    }
    int exponent;
    std::frexp(magnitude, &exponent);
    exponent = std::max(exponent - 1, 1 - kBias);
    u32 m = std::nearbyint(std::ldexp(magnitude, kMantissa - exponent));  // with the hidden bit
    if (m >= 2u << kMantissa) m >>= 1, exponent++;
    raw = sign | (m < 1u << kMantissa ? m : (exponent + kBias - 1) * (1 << kMantissa) + m);
  }
  operator float() const { return table[raw]; }

  static float decode(u8 raw) {
    const int exponent = (raw & 0x7f) >> kMantissa, m = raw & ((1 << kMantissa) - 1);
    const bool special = kHasInfinity ? exponent == 31 : (raw & 0x7f) == 0x7f;
    float x = exponent ? std::ldexp(m + (1 << kMantissa), exponent - kBias - kMantissa)
                       : std::ldexp(m, 1 - kBias - kMantissa);
    if (special) x = kHasInfinity && m == 0 ? INFINITY : NAN;
    return raw & 0x80 ? -x : x;
  }
  inline static const std::array<float, 256> table = [] {
    std::array<float, 256> t{};
    for (int i = 0; i < 256; i++) t[i] = decode(i);
    return t;
  }();
};
using E4M3 = F8<3, 7, false>;
using E5M2 = F8<2, 15, true>;

struct TF32 {  // an f32 of which the tensor core reads the upper 19 bits
  u32 raw;
  TF32() = default;
  TF32(float x) : raw((std::bit_cast<u32>(x) + 0x1000) & ~0x1fffu) {}  // nearest, ties away
  operator float() const { return std::bit_cast<float>(raw & ~0x1fffu); }
};

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<1> {
  using type = u8;
};
template <>
struct BitsOf<2> {
  using type = u16;
};
template <>
struct BitsOf<4> {
  using type = u32;
};
template <>
struct BitsOf<8> {
  using type = u64;
};
template <>
struct BitsOf<16> {
  using type = u128;
};
template <class T>
using Bits = typename BitsOf<sizeof(T)>::type;
template <class T>
constexpr bool is_integer =
    std::is_integral_v<T> || std::is_same_v<T, u128> || std::is_same_v<T, i128>;

template <class T, class Raw>
inline T as(Raw raw) {
  if constexpr (is_integer<T>)
    return static_cast<T>(raw);
  else
    return std::bit_cast<T>(static_cast<Bits<T>>(raw));
}

// Signed integers keep their sign, so that a wider register gets the sign extension.
template <class T>
inline auto bits(T value) {
  if constexpr (is_integer<T>)
    return value;
  else
    return std::bit_cast<Bits<T>>(value);
}

// Applies f to both halves of packed registers (f16x2, bf16x2, f32x2).
template <class T, class F, class... Raw>
inline auto pairs(F f, Raw... raw) {
  using Packed = typename BitsOf<2 * sizeof(T)>::type;
  constexpr int half = 8 * sizeof(T);
  const Packed low = bits<T>(f(as<T>(Packed(raw))...));
  const Packed high = bits<T>(f(as<T>(Packed(raw) >> half)...));
  return Packed(low | high << half);
}

}  // namespace emu
