// A boolean array to bits, 32 keys to a word, one thread per word: what DenseLeaf reads.
#include "leaves.cuh"

#ifndef WARPS
#define WARPS 4
#endif

struct MaskBitsParams {
  const u8* booleans;
  i64 stride[4];  // bytes
  u32* words;     // (extent[0], extent[1], extent[2], ceil(extent[3] / 32))
  int extent[4];
};
#ifdef PARAMS_BYTES
static_assert(sizeof(MaskBitsParams) == PARAMS_BYTES, "MaskBitsParams differs from the packed one");
#endif

extern "C" __global__ void __launch_bounds__(WARPS* kWarpSize)
    mask_bits(const __grid_constant__ MaskBitsParams p) {
  const int words_per_row = ceil_div(p.extent[3], 32);
  const i64 index = (i64)blockIdx.x * WARPS * kWarpSize + threadIdx.x;
  i64 row = index / words_per_row;
  if (row >= (i64)p.extent[0] * p.extent[1] * p.extent[2]) return;
  const int key = index % words_per_row * 32;
  const u8* source = p.booleans + key * p.stride[3];
#pragma unroll
  for (int axis = 2; axis >= 0; axis--) {
    source += row % p.extent[axis] * p.stride[axis];
    row /= p.extent[axis];
  }
  u32 bits = 0;
#pragma unroll 4
  for (int k = 0; k < smaller(32, p.extent[3] - key); k++)
    bits |= (u32)(source[k * p.stride[3]] != 0) << k;
  p.words[index] = bits;
}
