// Accumulators of the tensor cores, as mma.sync and wgmma lay them over the lanes of a warp.
#pragma once
#include "ptx/math.cuh"

// acc[m][n][e]: row 16 m + lane / 4 + 8 (e / 2), column 8 n + 2 (lane % 4) + e % 2.
DEVICE int acc_row(int m, int e) { return 16 * m + lane_id() / 4 + e / 2 * 8; }
DEVICE int acc_col(int n, int e) { return 8 * n + lane_id() % 4 * 2 + e % 2; }

template <int kM, int kN>
DEVICE void clear(float (&acc)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; m++)
#pragma unroll
    for (int n = 0; n < kN; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[m][n][e] = 0.f;
}

// Calls f(value, m, n, e) for every accumulator.
template <int kM, int kN, class F>
DEVICE void for_each(float (&acc)[kM][kN][4], const F& f) {
#pragma unroll
  for (int m = 0; m < kM; m++)
#pragma unroll
    for (int n = 0; n < kN; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) f(acc[m][n][e], m, n, e);
}

// Packed to 16 bits, as the left operand of the next product: columns 16 k ... 16 k + 15 are one k
// step.
template <int kM, int kN>
DEVICE void pack_operand(u32 (&fragments)[kM][kN / 2][4], const float (&acc)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; m++)
#pragma unroll
    for (int k = 0; k < kN / 2; k++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float (&pair)[4] = acc[m][2 * k + i / 2];
        fragments[m][k][i] = pack<Element>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
      }
}
