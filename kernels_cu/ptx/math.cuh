// Arithmetic that C++ has no name for: approximate exp2, log2 and reciprocal, packed 16-bit
// conversions.
#pragma once
#include "element.cuh"

DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The smaller one; NaN if either is.
DEVICE float min_or_nan(float x, float y) {
  float smaller;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(smaller) : "f"(x), "f"(y));
  return smaller;
}

// Two floats to a pair of 16-bit elements, the first in the low half, rounded to nearest even.
template <class Element>
DEVICE u32 pack(float low, float high);
template <>
DEVICE u32 pack<BFloat16>(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
DEVICE u32 pack<Half>(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <class Element>
DEVICE float to_float(u16 bits);
template <>
DEVICE float to_float<BFloat16>(u16 bits) {
  return __uint_as_float((u32)bits << 16);
}
template <>
DEVICE float to_float<Half>(u16 bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

// a b + c of pairs of 16-bit elements.
template <class Element>
DEVICE u32 fma_pair(u32 a, u32 b, u32 c);
template <>
DEVICE u32 fma_pair<BFloat16>(u32 a, u32 b, u32 c) {
  u32 pair;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
  return pair;
}
template <>
DEVICE u32 fma_pair<Half>(u32 a, u32 b, u32 c) {
  u32 pair;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
  return pair;
}
