// Types and small device helpers that every kernel uses. No header of CUDA or of anybody else is
// included.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE __device__ __forceinline__

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kWarpSize = 32;

constexpr DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }
template <class T>
constexpr DEVICE T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
constexpr DEVICE T larger(T a, T b) {
  return a > b ? a : b;
}
// x, of which the compiler then knows nothing: what is computed from it inside a loop stays inside.
DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
DEVICE float infinity() { return __int_as_float(0x7f800000); }
DEVICE float not_a_number() { return __int_as_float(0x7fffffff); }

DEVICE int lane_id() { return threadIdx.x % kWarpSize; }
DEVICE int warp_id() { return threadIdx.x / kWarpSize; }

// Over the four lanes that share an accumulator row.
DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}
