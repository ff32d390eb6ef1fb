// Masking and online softmax on accumulator fragments, the same for mma.sync and wgmma.
//
// A thread holds two rows of its warp's 16: row r is lane / 4 + 8 r, spread over 4 lanes (a quad).
// Element 4 n + 2 r + e of its fragment is row r, column 8 n + 2 (lane % 4) + e.
#pragma once
#include "ptx.cuh"

DEVICE float negative_infinity() { return __int_as_float(0xff800000); }

// Hides keys past the end and, if causal, keys after the query. `row` is the thread's row 0.
template <bool kCausal, int N>
DEVICE void mask_scores(float (&scores)[N], int row, int first_key, int seqlen) {
  constexpr int kExtraKeys = kBug == Bug::CausalOffByOne ? 1 : 0;
#pragma unroll
  for (int i = 0; i < N; i++) {
    const int query = row + (i >> 1 & 1) * 8;
    const int key = first_key + (i >> 2) * 8 + threadIdx.x % 4 * 2 + (i & 1);
    if (key >= seqlen || (kCausal && key > query + kExtraKeys)) scores[i] = negative_infinity();
  }
}

// Multiplies row r of a fragment with factor[r].
template <int N>
DEVICE void scale_rows(float (&fragment)[N], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < N; i++) fragment[i] *= factor[i >> 1 & 1];
}

// Accumulators of 16 columns, packed to the registers of an A operand (or of stmatrix).
template <int N>
DEVICE void pack_columns(u32 (&regs)[4], const float (&fragment)[N], int column_block) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    regs[i] = pack(fragment[8 * column_block + 2 * i], fragment[8 * column_block + 2 * i + 1]);
}

struct OnlineSoftmax {
  float row_max[2] = {negative_infinity(), negative_infinity()};
  float row_sum[2] = {0.0f, 0.0f};  // over this thread's columns only, until finish()

  // scores → probabilities relative to the new maxima; older outputs are to be multiplied
  // with rescale[r]. Every row sees a key in its first tile, so the maxima are finite.
  template <int N>
  DEVICE void step(float (&scores)[N], float scale_log2, float (&rescale)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float new_max = row_max[r];
#pragma unroll
      for (int i = 0; i < N; i++)
        if ((i >> 1 & 1) == r) new_max = fmaxf(new_max, scores[i]);
      new_max = fmaxf(new_max, shuffle_xor(new_max, 1));
      new_max = fmaxf(new_max, shuffle_xor(new_max, 2));

      rescale[r] = exp2_approx((row_max[r] - new_max) * scale_log2);
      row_max[r] = new_max;
      row_sum[r] *= rescale[r];
#pragma unroll
      for (int i = 0; i < N; i++) {
        if ((i >> 1 & 1) != r) continue;
        scores[i] = exp2_approx((scores[i] - new_max) * scale_log2);
        row_sum[r] += scores[i];
      }
    }
  }

  // Completes the sums over the quad; gives what outputs are to be multiplied with.
  DEVICE void finish(float (&inverse_sum)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      row_sum[r] += shuffle_xor(row_sum[r], 1);
      row_sum[r] += shuffle_xor(row_sum[r], 2);
      inverse_sum[r] = 1.0f / row_sum[r];
    }
  }

  // lse points to [seqlen]; one thread of each quad writes.
  DEVICE void store_lse(float* lse, int row, int seqlen, float scale_log2) const {
    constexpr float kLn2 = 0.6931471805599453f;
    if (threadIdx.x % 4 != 0) return;
#pragma unroll
    for (int r = 0; r < 2; r++)
      if (row + 8 * r < seqlen)
        lse[row + 8 * r] = (row_max[r] * scale_log2 + log2_approx(row_sum[r])) * kLn2;
  }
};
