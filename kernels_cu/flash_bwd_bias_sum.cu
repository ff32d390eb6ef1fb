// The parts of a bias's gradient (flash_bwd_bias.cu) in one, in the bias's type: one thread per
// element, in the order of the splits.
#include "ptx/math.cuh"

#ifndef BIAS_BYTES
#define BIAS_BYTES 4
#endif
#ifndef WARPS
#define WARPS 8
#endif

struct BiasSumParams {
  const float* sums;  // (splits, size)
  void* dbias;        // (size,)
  i64 size;
  i64 splits;
};
#ifdef PARAMS_BYTES
static_assert(sizeof(BiasSumParams) == PARAMS_BYTES, "BiasSumParams differs from the packed one");
#endif

extern "C" __global__ void __launch_bounds__(WARPS* kWarpSize)
    flash_bwd_bias_sum(const __grid_constant__ BiasSumParams p) {
  const i64 index = (i64)blockIdx.x * WARPS * kWarpSize + threadIdx.x;
  if (index >= p.size) return;
  float sum = 0.f;
#pragma unroll 1
  for (i64 split = 0; split < p.splits; split++) sum += p.sums[split * p.size + index];
  if (BIAS_BYTES == 4)
    ((float*)p.dbias)[index] = sum;
  else
    ((u16*)p.dbias)[index] = (u16)pack<Element>(sum, 0.f);
}
