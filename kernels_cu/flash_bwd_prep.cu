// Before a backward pass: one block per (query tile, head of Rows, batch entry), one warp per row.
//
//   delta = sum over Dv of dout out, less dlse;  lse in base 2, +inf for rows that see no key
//
// so that the main kernel's p = exp2(s - lse) and ds = p (dp - delta) need no case for such rows.
// Says whether a row's scores are too large for that. Clears this tile's part of dq_acc and its
// turn; the first block clears the work counter.
//
// Method: FlashAttention-2 (Dao 2023), section 3.1.2.
#include "backward.cuh"

DEVICE float dot_of_pairs(u32 x, u32 y) {
  return to_float<Element>((u16)x) * to_float<Element>((u16)y) +
         to_float<Element>(x >> 16) * to_float<Element>(y >> 16);
}

// Sum of x y over `cols` elements, by one warp: in pieces of 16 bytes, or in pairs, where the
// alignment allows.
DEVICE float dot(const u16* x, const u16* y, int cols) {
  constexpr int kElements = kVec == 8 ? 8 : smaller(kVec, 2);
  float sum = 0.f;
  for (int col = lane_id() * kElements; col < cols; col += kWarpSize * kElements) {
    if (kElements == 8 && col + 8 <= cols) {
      const uint4 a = *(const uint4*)(x + col), b = *(const uint4*)(y + col);
      sum += dot_of_pairs(a.x, b.x) + dot_of_pairs(a.y, b.y);
      sum += dot_of_pairs(a.z, b.z) + dot_of_pairs(a.w, b.w);
    } else if (kElements == 2 && col + 2 <= cols) {
      sum += dot_of_pairs(*(const u32*)(x + col), *(const u32*)(y + col));
    } else {
      for (int e = col; e < smaller(col + kElements, cols); e++)
        sum += to_float<Element>(x[e]) * to_float<Element>(y[e]);
    }
  }
#pragma unroll
  for (int lane = kWarpSize / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffff, sum, lane);
  return sum;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    flash_bwd_prep(const __grid_constant__ BackwardParams p) {
  const Rows rows(p.problem);
  if (threadIdx.x == 0 && blockIdx.x == 0) p.turns[0] = 0;
  const Work work = row_tile(p.problem, rows, kBlockQ, blockIdx.x);
  if (!work.exists()) return;
  const Mask mask(p.problem, work.batch);
  const int head_q = rows.head_q(work.head);
  const i64 stats = mask.stats(head_q);
  const i64 workspace = workspace_tile(p.problem, work.batch, work.head, work.tile);
  const u16* out = mask.queries(p.out, head_q);
  const u16* dout = mask.queries(p.dout, head_q);

  bool any_large = false;
  for (int i = warp_id(); i < kBlockQ; i += kWarps) {
    const int row = work.tile * kBlockQ + i;
    RowStats row_stats(infinity(), 0.f);
    float delta = 0.f;
    if (row < mask.valid_rows()) {
      const i64 index = stats + rows.stat_index(p.problem, row);
      row_stats = RowStats(p.row_max, p.row_sum, index);
      any_large |= row_stats.large();
      if (row_stats.sees_keys()) {
        delta = dot(rows.pointer(out, p.out, row), rows.pointer(dout, p.dout, row),
                    p.problem.head_dim_v);
        if (p.dlse) delta -= p.dlse[index];
      }
    }
    if (lane_id() == 0) {
      float* of_row = p.row_stats + workspace * kRowStats * kBlockQ + i;
      of_row[0] = row_stats.lse_log2();
      of_row[kBlockQ] = row_stats.largest;
      of_row[2 * kBlockQ] = row_stats.sum_log2;
      p.delta[workspace * kBlockQ + i] = delta;
    }
  }
  any_large = __syncthreads_or(any_large);
  if (threadIdx.x == 0) p.large[workspace] = any_large;

  float4* dq_acc = (float4*)(p.dq_acc + workspace * kBlockQ * kHeadDim);
  for (int i = threadIdx.x; i < kBlockQ * kHeadDim / 4; i += kThreads)
    dq_acc[i] = make_float4(0.f, 0.f, 0.f, 0.f);
  if (threadIdx.x == 0) p.turns[1 + workspace] = 0;
}
