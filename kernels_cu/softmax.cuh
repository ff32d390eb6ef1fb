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
  float unit;            // a score is unit x an accumulator, ...
  float unit_log2;       // ... and this in base 2
  float row_max[kM][2];  // of the accumulators; after finish() the largest score
  float row_sum[kM][2];  // of exp(score - largest), in this lane's columns only until finish()
  float factors[kM][2];  // from the sums of the last maximum to those of this one

  DEVICE explicit OnlineSoftmax(const Scores& scores)
      : unit(scores.unit()), unit_log2(scores.unit_log2()) {
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int r = 0; r < 2; r++)
        row_max[m][r] = -infinity(), row_sum[m][r] = 0.f, factors[m][r] = 0.f;
  }

  // s_acc becomes exp(s - max); o_acc still uses the old maximum until rescale() is called.
  template <int kN>
  DEVICE void step(float (&s_acc)[kM][kN][4]) {
    float shifts[kM][2], slope = unit_log2;
    bool large = false;
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float new_max = row_max[m][r];
#pragma unroll
        for (int n = 0; n < kN; n++)
          new_max = fmaxf(new_max, fmaxf(s_acc[m][n][2 * r], s_acc[m][n][2 * r + 1]));
        new_max = quad_max(new_max);
        factors[m][r] = row_max[m][r];  // which becomes its exponential below, as a score does
        row_max[m][r] = new_max;
        // A row that has seen no key yet has the maximum -inf; exp2(-inf - 0) is the 0 that it
        // needs.
        shifts[m][r] = new_max == -infinity() ? 0.f : new_max * unit_log2;
        large |= fabsf(shifts[m][r]) > kLargestPlainScore;
      }
    if (__any_sync(0xffffffff, large)) {
      subtract_max(s_acc, shifts);
      slope = 1.f;
    }
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        factors[m][r] = exp2_approx(factors[m][r] * slope - shifts[m][r]);
        float sum = row_sum[m][r] * factors[m][r];
#pragma unroll
        for (int n = 0; n < kN; n++)
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; e++)
            sum += s_acc[m][n][e] = exp2_approx(s_acc[m][n][e] * slope - shifts[m][r]);
        row_sum[m][r] = sum;
      }
  }

  template <int kNV>
  DEVICE void rescale(float (&o_acc)[kM][kNV][4]) const {
    for_each(o_acc, [&](float& o, int m, int, int e) { o *= factors[m][e / 2]; });
  }

  // o_acc becomes the output; row_max and row_sum become those of all columns and of the sink. A
  // row without keys gives 0; sink(m, r) is that of a row.
  template <int kNV, class Sink>
  DEVICE void finish(float (&o_acc)[kM][kNV][4], float scale, const Sink& sink) {
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float sum = quad_sum(row_sum[m][r]), top = row_max[m][r] * unit, kept = 1.f;
        if (kSinks) {
          const float extra = sink(m, r), both = fmaxf(top, extra);
          const float shift = both == -infinity() ? 0.f : both;
          kept = exp2_approx(difference_log2(top, shift));
          sum = sum * kept + exp2_approx(difference_log2(extra, shift));
          top = both;
        }
        const float normalize = sum == 0.f ? 0.f : scale * kept / sum;
        row_max[m][r] = sum == 0.f ? -infinity() : sum > 0.f ? top : sum;  // NaN, which fmaxf drops
        row_sum[m][r] = sum;
#pragma unroll
        for (int n = 0; n < kNV; n++) {
          o_acc[m][n][2 * r] *= normalize;
          o_acc[m][n][2 * r + 1] *= normalize;
        }
      }
  }

  // After finish(), of a row that is `index` in the arrays: lse, and what backward needs of it. A
  // row past the query length has summed over zeros: its statistics are those of no key.
  DEVICE void store(const ForwardParams& p, i64 index, int m, int r, bool in_length) const {
    const float top = in_length ? row_max[m][r] : -infinity(),
                sum = in_length ? row_sum[m][r] : 0.f;
    p.lse[index] = sum == 0.f ? -infinity() : top + log2_approx(sum) * kLn2;
    if (p.row_max) {
      p.row_max[index] = top;
      p.row_sum[index] = sum;
    }
  }

 private:
  // s_acc and the old maxima become the exponentials' exponents. Rows whose maximum times unit_log2
  // would round away what these need subtract first; the others keep the bits that step() gives.
  template <int kN>
  DEVICE void subtract_max(float (&s_acc)[kM][kN][4], float (&shifts)[kM][2]) {
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float shift = shifts[m][r], top = __fmul_rn(row_max[m][r], unit);
        const bool large = fabsf(shift) > kLargestPlainScore;
        const auto exponent = [&](float s) {
          return large ? difference_log2(__fmul_rn(s, unit), top) : fmaf(s, unit_log2, -shift);
        };
        factors[m][r] = exponent(factors[m][r]);
#pragma unroll
        for (int n = 0; n < kN; n++)
#pragma unroll
          for (int e = 2 * r; e < 2 * r + 2; e++) s_acc[m][n][e] = exponent(s_acc[m][n][e]);
        shifts[m][r] = 0.f;
      }
  }
};

// Of query head `head`.
DEVICE float sink_of(const Problem& p, int head) { return kSinks ? p.sinks[head] : -infinity(); }
