// Arithmetic of PTX where it differs from an operator of C++.
#pragma once
#include "numbers.h"

namespace emu {

inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
inline float saturate(float x) { return x > 0 ? std::min(x, 1.f) : 0.f; }
inline double saturate(double x) { return x > 0 ? std::min(x, 1.0) : 0.0; }
inline float fused(float a, float b, float c) { return std::fmaf(a, b, c); }
inline double fused(double a, double b, double c) { return std::fma(a, b, c); }

// Runs f, which reads volatile operands, under another rounding mode.
template <unsigned kMode, class F>
inline auto rounded(F f) {
  const unsigned before = _MM_GET_ROUNDING_MODE();
  _MM_SET_ROUNDING_MODE(kMode);
  volatile auto result = f();
  _MM_SET_ROUNDING_MODE(before);
  return result;
}

template <class T>
inline T minimum(T a, T b) {
  if constexpr (is_integer<T>)
    return a < b ? a : b;
  else
    return std::fmin(a, b);
}
template <class T>
inline T maximum(T a, T b) {
  if constexpr (is_integer<T>)
    return a > b ? a : b;
  else
    return std::fmax(a, b);
}
template <class T>
inline T minimum_nan(T a, T b) {
  return a != a || b != b ? NAN : std::fmin(a, b);
}
template <class T>
inline T maximum_nan(T a, T b) {
  return a != a || b != b ? NAN : std::fmax(a, b);
}
template <class T>
inline T absolute(T a) {
  if constexpr (is_integer<T>)
    return a < 0 ? -a : a;
  else
    return std::fabs(a);
}

// Division by zero gives all ones on the GPU's integer units; it must not trap here.
template <class T>
inline T quotient(T a, T b) {
  if constexpr (is_integer<T>) {
    if (b == 0) return T(~T(0));
    if (std::is_signed_v<T> && b == T(-1)) return T(0) - a;
  }
  return a / b;
}
template <class T>
inline T remainder(T a, T b) {
  if (b == 0) return a;
  return std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
}

template <class T>
using Wide = std::conditional_t<
    sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, i32, u32>,
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, i64, u64>,
                       std::conditional_t<std::is_signed_v<T>, i128, u128>>>;
template <class T>
inline T high_product(T a, T b) {
  return Wide<T>(Wide<T>(a) * b) >> 8 * sizeof(T);
}

template <class T>
inline T shift_left(T a, u32 n) {
  return n >= 8 * sizeof(T) ? T(0) : T(a << n);
}
template <class T>
inline T shift_right(T a, u32 n) {
  constexpr u32 width = 8 * sizeof(T);
  if constexpr (std::is_signed_v<T>)
    return a >> std::min(n, width - 1);
  else
    return n >= width ? T(0) : T(a >> n);
}
inline u32 funnel_left(u32 low, u32 high, u32 n) { return (u64{high} << 32 | low) << n >> 32; }
inline u32 funnel_right(u32 low, u32 high, u32 n) { return (u64{high} << 32 | low) >> n; }

template <class T>
inline T extract_bits(T a, u32 position, u32 length) {
  constexpr u32 width = 8 * sizeof(T);
  using U = Bits<T>;
  position &= 255, length &= 255;
  if (length == 0) return 0;
  const bool sign = std::is_signed_v<T> && (U(a) >> std::min(position + length - 1, width - 1) & 1);
  const U field = position >= width ? U(0) : U(U(a) >> position);
  const u32 kept = std::min(length, position >= width ? 0 : width - position);
  const U mask = kept >= width ? ~U(0) : U((U(1) << kept) - 1);
  return T((field & mask) | (sign ? U(~mask) : U(0)));
}
template <class T>
inline T insert_bits(T a, T b, u32 position, u32 length) {
  constexpr u32 width = 8 * sizeof(T);
  position &= 255, length &= 255;
  if (position >= width || length == 0) return b;
  const T mask = (length >= width ? ~T(0) : T((T(1) << length) - 1)) << position;
  return (a << position & mask) | (b & ~mask);
}
template <class T>
inline T reverse_bits(T a) {
  T r = 0;
  for (u32 i = 0; i < 8 * sizeof(T); i++) r = r << 1 | (a >> i & 1);
  return r;
}
template <class T>
inline u32 find_top(T a) {  // highest bit that differs from the sign; ~0 if there is none
  const Bits<T> b = std::is_signed_v<T> && a < 0 ? ~a : a;
  return b ? 8 * sizeof(T) - 1 - std::countl_zero(b) : ~0u;
}
inline u32 permute_bytes(u32 a, u32 b, u32 selector) {
  const u64 bytes = u64{b} << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    const u32 s = selector >> 4 * i & 15;
    u8 v = bytes >> 8 * (s & 7);
    if (s & 8) v = v & 0x80 ? 0xff : 0;  // replicate the sign
    r |= u32{v} << 8 * i;
  }
  return r;
}
inline u32 lop3(u32 a, u32 b, u32 c, u32 table) {
  u32 r = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}

// Float to integer: saturates; NaN becomes 0.
template <class T, class S>
inline T to_integer(S x) {
  using Limits = std::numeric_limits<T>;
  if (x != x) return 0;
  if (x <= S(Limits::min())) return Limits::min();
  return x >= S(Limits::max()) ? Limits::max() : T(x);
}
template <class T, class S>
inline T clamp_integer(S x) {
  using Limits = std::numeric_limits<T>;
  return T(std::clamp<i128>(x, Limits::min(), Limits::max()));
}

enum class Atomic { add, min, max, and_, or_, xor_, exch, cas, inc, dec };
template <Atomic kOp, class T>
inline T combine(T old, T x, T y) {
  if constexpr (kOp == Atomic::add) return old + x;
  if constexpr (kOp == Atomic::min) return minimum(old, x);
  if constexpr (kOp == Atomic::max) return maximum(old, x);
  if constexpr (kOp == Atomic::exch) return x;
  if constexpr (kOp == Atomic::cas) return bits(old) == bits(x) ? y : old;
  if constexpr (is_integer<T>) {
    if constexpr (kOp == Atomic::and_) return old & x;
    if constexpr (kOp == Atomic::or_) return old | x;
    if constexpr (kOp == Atomic::xor_) return old ^ x;
    if constexpr (kOp == Atomic::inc) return old >= x ? T(0) : T(old + 1);
    if constexpr (kOp == Atomic::dec) return old == 0 || old > x ? x : T(old - 1);
  }
}
struct F16x2 {
  F16 low, high;
};
struct BF16x2 {
  BF16 low, high;
};
inline F16x2 operator+(F16x2 a, F16x2 b) { return {a.low + b.low, a.high + b.high}; }
inline BF16x2 operator+(BF16x2 a, BF16x2 b) { return {a.low + b.low, a.high + b.high}; }

template <Atomic kOp, class T>
inline T atomic(void* address, T x, T y = T{}) {
  auto* p = static_cast<Bits<T>*>(address);
  Bits<T> old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, bits<T>(combine<kOp, T>(as<T>(old), x, y)), false,
                                      __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
  }
  return as<T>(old);
}

}  // namespace emu
