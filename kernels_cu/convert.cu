// A strided array of numbers to one without gaps, of another type: one thread per element. Integers
// become 64-bit ones, floats floats of any width.
#include "ptx/math.cuh"

#ifndef FROM
#define FROM 6
#endif
#ifndef TO
#define TO 7
#endif
#ifndef WARPS
#define WARPS 4
#endif

// What memory holds of a type, and its value. The numbers are places in _convert.py's TYPES.
template <class T>
struct Plain {
  typedef T Bits;
  static DEVICE T value(T x) { return x; }
  template <class Value>
  static DEVICE T bits(Value x) {
    return (T)x;
  }
};
template <class Element>
struct Short {
  typedef u16 Bits;
  static DEVICE float value(u16 x) { return to_float<Element>(x); }
  static DEVICE u16 bits(float x) { return (u16)pack<Element>(x, 0.f); }
};
template <int kType>
struct Number;
template <>
struct Number<0> : Plain<u8> {};
template <>
struct Number<1> : Plain<u16> {};
template <>
struct Number<2> : Plain<u32> {};
template <>
struct Number<3> : Plain<u64> {};
template <>
struct Number<4> : Plain<signed char> {};
template <>
struct Number<5> : Plain<short> {};
template <>
struct Number<6> : Plain<int> {};
template <>
struct Number<7> : Plain<i64> {};
template <>
struct Number<8> : Short<Half> {};
template <>
struct Number<9> : Short<BFloat16> {};
template <>
struct Number<10> : Plain<float> {};
template <>
struct Number<11> : Plain<double> {};

struct ConvertParams {
  const u8* source;
  i64 stride[4];  // bytes
  void* target;
  i64 extent[4];
};
#ifdef PARAMS_BYTES
static_assert(sizeof(ConvertParams) == PARAMS_BYTES, "ConvertParams differs from the packed one");
#endif

extern "C" __global__ void __launch_bounds__(WARPS* kWarpSize)
    convert(const __grid_constant__ ConvertParams p) {
  const i64 index = (i64)blockIdx.x * WARPS * kWarpSize + threadIdx.x;
  const u8* source = p.source;
  i64 rest = index;
#pragma unroll
  for (int axis = 3; axis >= 0; axis--) {
    source += rest % p.extent[axis] * p.stride[axis];
    rest /= p.extent[axis];
  }
  if (rest) return;  // past the last element
  typedef Number<FROM> From;
  typedef Number<TO> To;
  ((To::Bits*)p.target)[index] = To::bits(From::value(*(const From::Bits*)source));
}
