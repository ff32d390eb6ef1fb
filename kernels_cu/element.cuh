// The 16-bit element type of the call's arrays, which is a constant of the compilation.
#pragma once
#include "common.cuh"

#ifndef BFLOAT16
#define BFLOAT16 1
#endif

struct Half {
  static constexpr u32 kExponent = 0x7c00;  // all of its bits set: inf or NaN
};
struct BFloat16 {
  static constexpr u32 kExponent = 0x7f80;
};

template <bool kBFloat16>
struct ElementOf {
  typedef BFloat16 Type;
};
template <>
struct ElementOf<false> {
  typedef Half Type;
};
typedef ElementOf<BFLOAT16>::Type Element;

DEVICE bool is_finite(u16 bits) { return (bits & Element::kExponent) != Element::kExponent; }
