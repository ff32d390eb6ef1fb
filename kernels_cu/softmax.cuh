// The online softmax over key tiles, in base 2 (Milakov and Gimelshein 2018; FlashAttention, Dao et
// al. 2022). Accumulator rows as in gemm.cuh.
#pragma once
#include "scores.cuh"

#ifndef SINKS
#define SINKS 0
#endif
constexpr bool kSinks = SINKS;

template <int kM>
struct OnlineSoftmax {
  float factor;
  float row_max[kM][2];
  float row_sum[kM][2];  // of this lane's columns only, until finish()
  float factors[kM][2];  // from the sums of the last maximum to those of this one

  DEVICE explicit OnlineSoftmax(float factor) : factor(factor) {
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int r = 0; r < 2; r++)
        row_max[m][r] = -infinity(), row_sum[m][r] = 0.f, factors[m][r] = 0.f;
  }

  // s_acc becomes exp(s - max); o_acc is behind until rescale().
  template <int kN>
  DEVICE void step(float (&s_acc)[kM][kN][4]) {
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float new_max = row_max[m][r];
#pragma unroll
        for (int n = 0; n < kN; n++)
          new_max = fmaxf(new_max, fmaxf(s_acc[m][n][2 * r], s_acc[m][n][2 * r + 1]));
        new_max = quad_max(new_max);
        // A row that has seen no key yet has the maximum -inf; exp2(-inf - 0) is the 0 that it
        // needs.
        const float shift = new_max == -infinity() ? 0.f : new_max * factor;
        factors[m][r] = exp2_approx(row_max[m][r] * factor - shift);
        row_max[m][r] = new_max;
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < kN; n++)
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; e++)
            sum += s_acc[m][n][e] = exp2_approx(s_acc[m][n][e] * factor - shift);
        row_sum[m][r] = row_sum[m][r] * factors[m][r] + sum;
      }
  }

  template <int kNV>
  DEVICE void rescale(float (&o_acc)[kM][kNV][4]) const {
    for_each(o_acc, [&](float& o, int m, int, int e) { o *= factors[m][e / 2]; });
  }

  // o_acc becomes the output; row_max becomes lse. A row without keys gives 0, and -inf or its
  // sink; sink(m, r) is that of a row, in base 2.
  template <int kNV, class Sink>
  DEVICE void finish(float (&o_acc)[kM][kNV][4], float scale, const Sink& sink) {
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float sum = quad_sum(row_sum[m][r]), top = row_max[m][r] * factor, kept = 1.f;
        if (kSinks) {
          const float extra = sink(m, r), both = fmaxf(top, extra);
          const float shift = both == -infinity() ? 0.f : both;
          kept = exp2_approx(top - shift);
          sum = sum * kept + exp2_approx(extra - shift);
          top = both;
        }
        const float normalize = sum == 0.f ? 0.f : scale * kept / sum;
        row_max[m][r] = sum == 0.f ? -infinity() : (top + log2_approx(sum)) * kLn2;
#pragma unroll
        for (int n = 0; n < kNV; n++) {
          o_acc[m][n][2 * r] *= normalize;
          o_acc[m][n][2 * r + 1] *= normalize;
        }
      }
  }
};

// Of query head `head`, in base 2.
DEVICE float sink_of(const Problem& p, int head) {
  return kSinks ? in_base_2(p.sinks[head]) : -infinity();
}
