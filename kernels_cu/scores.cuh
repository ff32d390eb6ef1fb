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
      for_each(s_acc, [&](float& s, int, int, int) { s = capped(s); });
    else if constexpr (kScaleFirst)
      for_each(s_acc, [&](float& s, int, int, int) { s *= scale; });
  }

  // Of q kᵀ, what the softcap is multiplied by. Here too roundings are spelt out; fused, products
  // and sums would make kernels with a mask and every term spill more.
  DEVICE float capped(float product) const { return tanh(__fmul_rn(product, softcap_in)); }
  // Accurate relative to its value: 1 - 2 / (1 + e^2x) cancels near 0, where a series takes over.
  static DEVICE float tanh(float x) {
    const float square = __fmul_rn(x, x);
    float series = __fadd_rn(__fmul_rn(square, 62.f / 2835), -17.f / 315);
    series = __fadd_rn(__fmul_rn(square, series), 2.f / 15);
    series = __fadd_rn(__fmul_rn(square, series), -1.f / 3);
    series = __fadd_rn(__fmul_rn(__fmul_rn(x, square), series), x);
    const float power = exp2_approx(__fmul_rn(2.f * kLog2e, x));
    const float reciprocal = reciprocal_approx(__fadd_rn(1.f, power));
    const float quotient = __fadd_rn(1.f, __fmul_rn(-2.f, reciprocal));
    return square < 1.f / 16 ? series : quotient;
  }

  // d score / d (scale q kᵀ), from a transformed score without terms.
  DEVICE float derivative(float s) const { return kSoftcap ? fmaf(-s, s, 1.f) : 1.f; }

  // The score of a pair, from q kᵀ, and d score / d (scale q kᵀ). Roundings are spelt out, so that
  // a backward kernel finds the bits of the forward's.
  DEVICE float with_terms(float product, const Place& at, float& derivative) const {
    float score = __fmul_rn(product, scale);
    derivative = 1.f;
    if (kSoftcap) {
      const float transformed = capped(product);
      score = __fmul_rn(transformed, softcap);
      derivative = fmaf(-transformed, transformed, 1.f);
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
