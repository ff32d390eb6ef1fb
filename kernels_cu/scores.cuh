// From q kᵀ to scores, in the order of the contract: scale, softcap, the user's function, then
// ALiBi and bias.
#pragma once
#include "places.cuh"

#ifndef SOFTCAP
#define SOFTCAP 0
#endif
#ifndef SCALE_FIRST
#define SCALE_FIRST 0
#endif
#ifndef ALIBI
#define ALIBI 0
#endif
#ifndef BIAS_BYTES
#define BIAS_BYTES 0
#endif
constexpr bool kSoftcap = SOFTCAP;
constexpr bool kAlibi = ALIBI;
constexpr int kBiasBytes = BIAS_BYTES;  // of an element: 2 (the arrays' type), 4 (float) or none
// What depends on the pair of query and key, not on q kᵀ alone.
constexpr bool kHasTerms = kHasScoreMod || kAlibi || kBiasBytes > 0;
// A scale of zero or less reverses or removes the order of the scores: apply it before the row
// maximum.
constexpr bool kScaleFirst = SCALE_FIRST;

// Broadcast to all pairs: the element of one.
template <int kBytes>
DEVICE float element_of(const ScoreTensor& x, const Place& at) {
  const i64 index =
      at.b * x.batch_stride + at.h * x.head_stride + at.i * x.query_stride + at.j * x.key_stride;
  return kBytes == 4 ? ((const float*)x.data)[index]
                     : to_float<Element>(((const u16*)x.data)[index]);
}

// Beyond this size of scores, in base 2, what one float holds of their rounding and of a sum's
// logarithm together is too coarse: half its last digit changes a probability by 2^-13.
constexpr float kLargestPlainScore = 2048.f;

// (a - b) log2(e) of scores, whatever finite numbers they are.
DEVICE float difference_log2(float a, float b) { return fmaf(a, 0.5f, -0.5f * b) * (2.f * kLog2e); }

// q kᵀ to scores, up to a positive number: score = unit() x what transform() leaves.
struct Scores {
  const Problem& problem;
  float scale, scale_log2, softcap, softcap_in;

  DEVICE explicit Scores(const Problem& p)
      : problem(p),
        scale(p.scale),
        scale_log2(p.scale_log2),
        softcap(p.softcap),
        softcap_in(p.softcap_in) {}

  DEVICE float unit() const {
    return kHasTerms || kScaleFirst && !kSoftcap ? 1.f : kSoftcap ? softcap : scale;
  }
  // The same in base 2.
  DEVICE float unit_log2() const {
    return kHasTerms || kSoftcap || kScaleFirst ? unit() * kLog2e : scale_log2;
  }
  // The score itself, rounded alike in every kernel: what is exact of one must be so of the others.
  DEVICE float score(float transformed) const { return __fmul_rn(transformed, unit()); }

  template <int kM, int kN, class Places>
  DEVICE void transform(float (&s_acc)[kM][kN][4], const Places& places) const {
    if constexpr (kHasTerms) {
      const Places own = places.opaque_if(true);
      for_each(s_acc, [&](float& s, int m, int n, int e) {
        float derivative;
        s = with_terms(s, own.at(m, n, e), derivative);
      });
    } else if constexpr (kSoftcap)
      for_each(s_acc, [&](float& s, int, int, int) { s = tanh(s * softcap_in); });
    else if constexpr (kScaleFirst)
      for_each(s_acc, [&](float& s, int, int, int) { s *= scale; });
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

  // d score / d (scale q kᵀ), from a transformed score without terms.
  DEVICE float derivative(float s) const { return kSoftcap ? 1.f - s * s : 1.f; }

  // The score of a pair, from q kᵀ, and d score / d (scale q kᵀ). Roundings are spelt out, so that
  // a backward kernel finds the bits of the forward's.
  DEVICE float with_terms(float product, const Place& at, float& derivative) const {
    float score = __fmul_rn(product, scale);
    derivative = 1.f;
    if (kSoftcap) {
      const float capped = tanh(product * softcap_in);
      score = __fmul_rn(capped, softcap);
      derivative = 1.f - capped * capped;
    }
    if (kHasScoreMod) {
      derivative *= score_mod_derivative(problem, score, at);
      score = score_mod(problem, score, at);
    }
    if (kAlibi) {
      const float slope = problem.alibi_slopes[at.b * problem.alibi_batch_stride + at.h];
      score = fmaf(-slope, fabsf((float)(at.i + at.offset - at.j)), score);
    }
    if (kBiasBytes > 0) score = __fadd_rn(score, element_of<kBiasBytes>(problem.bias, at));
    return score;
  }
};
