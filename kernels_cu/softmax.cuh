// Scores in base 2 and the online softmax over key tiles (Milakov and Gimelshein 2018;
// FlashAttention, Dao et al. 2022). Accumulator rows as in gemm.cuh.
#pragma once
#include "accumulator.cuh"
#include "params.cuh"

#ifndef SOFTCAP
#define SOFTCAP 0
#endif
#ifndef SCALE_FIRST
#define SCALE_FIRST 0
#endif
constexpr bool kSoftcap = SOFTCAP;
// A scale of zero or less reverses or removes the order of the scores: apply it before the row
// maximum.
constexpr bool kScaleFirst = SCALE_FIRST;

// q kᵀ to scores, up to `factor`, a positive number: score log2(e) = factor x what transform()
// leaves.
struct Scores {
  float scale_log2, softcap_in, softcap_log2;

  DEVICE explicit Scores(const Problem& p)
      : scale_log2(p.scale_log2), softcap_in(p.softcap_in), softcap_log2(p.softcap_log2) {}

  DEVICE float factor() const { return kSoftcap ? softcap_log2 : kScaleFirst ? 1.f : scale_log2; }

  template <int kM, int kN>
  DEVICE void transform(float (&s_acc)[kM][kN][4]) const {
    if constexpr (kSoftcap)
      for_each(s_acc, [&](float& s, int, int, int) { s = tanh(s * softcap_in); });
    else if constexpr (kScaleFirst)
      for_each(s_acc, [&](float& s, int, int, int) { s *= scale_log2; });
  }

  // Accurate relative to its value: 1 - 2 / (1 + e^2x) cancels near 0, where a series takes over.
  static DEVICE float tanh(float x) {
    const float square = x * x;
    const float series =
        x + x * square *
                (-1.f / 3 + square * (2.f / 15 + square * (-17.f / 315 + square * 62.f / 2835)));
    const float quotient = 1.f - 2.f * reciprocal_approx(1.f + exp2_approx(2.f * kLog2e * x));
    return square < 1.f / 16 ? series : quotient;
  }

  // d score / d (scale q kᵀ), from a transformed score.
  DEVICE float derivative(float s) const { return kSoftcap ? 1.f - s * s : 1.f; }
};

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

  // o_acc becomes the output; row_max becomes lse. A row without keys gives 0 and -inf.
  template <int kNV>
  DEVICE void finish(float (&o_acc)[kM][kNV][4]) {
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float sum = quad_sum(row_sum[m][r]);
        const float normalize = sum == 0.f ? 0.f : 1.f / sum;
        row_max[m][r] =
            sum == 0.f ? -infinity() : (row_max[m][r] * factor + log2_approx(sum)) * kLn2;
#pragma unroll
        for (int n = 0; n < kNV; n++) {
          o_acc[m][n][2 * r] *= normalize;
          o_acc[m][n][2 * r + 1] *= normalize;
        }
      }
  }
};
