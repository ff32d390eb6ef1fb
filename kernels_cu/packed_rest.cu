// Tokens of packed arrays that belong to no sequence, before the first and after the last, get out
// 0, lse and row_max -inf, row_sum 0. One warp a row, few blocks: mostly there is no such token.
#include "params.cuh"

#ifndef WARPS
#define WARPS 4
#endif

struct PackedRestParams {
  const int* edges;  // (sequences + 1,), as packed_tiles.cu has them
  Tensor out;        // (1, tokens, heads, head_dim_v)
  float* lse;        // (heads, tokens)
  float* row_max;    // likewise, or null
  float* row_sum;
  int sequences;
  int tokens;
  int heads;
  int head_dim_v;
};
#ifdef PARAMS_BYTES
static_assert(sizeof(PackedRestParams) == PARAMS_BYTES,
              "PackedRestParams differs from the packed one");
#endif

extern "C" __global__ void __launch_bounds__(WARPS* kWarpSize)
    packed_rest(const __grid_constant__ PackedRestParams p) {
  const int first = p.edges[0], last = p.edges[p.sequences];
  const i64 rows = (i64)(first + p.tokens - last) * p.heads;
#pragma unroll 1
  for (i64 row = (i64)blockIdx.x * WARPS + warp_id(); row < rows; row += (i64)gridDim.x * WARPS) {
    const int head = row % p.heads, index = row / p.heads;
    const int token = index < first ? index : last + (index - first);
    u16* out = (u16*)p.out.data + token * p.out.seq_stride + head * p.out.head_stride;
    for (int col = lane_id(); col < p.head_dim_v; col += kWarpSize) out[col] = 0;
    const i64 stat = (i64)head * p.tokens + token;
    if (lane_id() == 0) p.lse[stat] = -infinity();
    if (lane_id() == 0 && p.row_max) p.row_max[stat] = -infinity(), p.row_sum[stat] = 0.f;
  }
}
