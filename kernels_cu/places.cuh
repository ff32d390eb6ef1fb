// Which pair of query and key each accumulator of a warp's scores stands for.
#pragma once
#include "accumulator.cuh"
#include "mask.cuh"

// kTransposed: of sᵀ, whose rows are keys.
template <bool kTransposed>
struct Places {
  const Mask& mask;
  int head;       // of q, the first of those packed into the rows
  int first_row;  // of the warp's scores
  int first_key;

  DEVICE int row(int m, int n, int e) const {
    return first_row + (kTransposed ? acc_col(n, e) : acc_row(m, e));
  }
  DEVICE int key(int m, int n, int e) const {
    return first_key + (kTransposed ? acc_row(m, e) : acc_col(n, e));
  }
  DEVICE Place pair(int m, int n, int e) const {
    return mask.place(head, row(m, n, e), key(m, n, e));
  }
  // The nearest pair that exists.
  DEVICE Place at(int m, int n, int e) const {
    return mask.place(head, smaller(row(m, n, e), mask.rows.count - 1),
                      smaller(key(m, n, e), mask.problem.seqlen_k - 1));
  }

  // The same, of which the compiler knows nothing, if `wanted`: what depends on them is not kept
  // from tile to tile in registers that the accumulators need.
  DEVICE Places opaque_if(bool wanted) const {
    return {mask, head, wanted ? opaque(first_row) : first_row,
            wanted ? opaque(first_key) : first_key};
  }

  // Whether each accumulator is a visible pair, for bit_of(). The loop over n is not unrolled: the
  // tree's code stands beside accumulators that fill the registers.
  template <int kM, int kN>
  DEVICE u64 visible() const {
    static_assert(kM * kN * 4 <= 64, "a bit for each accumulator");
    u64 bits = 0;
#pragma unroll 1
    for (int n = 0; n < kN; n++) {
      u32 of_n = 0;
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          of_n |= (u32)mask.visible(head, row(m, n, e), key(m, n, e)) << (4 * m + e);
      bits |= (u64)of_n << (4 * kM * n);
    }
    return bits;
  }
};

// Of accumulator [m][n][e] of kM times any, among bits in the order n, m, e.
template <int kM>
DEVICE bool bit_of(u64 bits, int m, int n, int e) {
  return bits >> ((n * kM + m) * 4 + e) & 1;
}

// Calls f(accumulator, m, n, e) for those that the mask forbids.
template <int kM, int kN, class F>
DEVICE void for_each_hidden(float (&acc)[kM][kN][4], u64 visible, const F& f) {
  for_each(acc, [&](float& x, int m, int n, int e) {
    if (!bit_of<kM>(visible, m, n, e)) f(x, m, n, e);
  });
}
template <int kM, int kN, class F>
DEVICE void for_each_hidden(float (&acc)[kM][kN][4], const Places<false>& places, const F& f) {
  if constexpr (kHasTree) {
    for_each_hidden(acc, places.visible<kM, kN>(), f);
  } else {
    Interval keys[kM][2];
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) keys[m][r] = places.mask.keys_of_row(places.row(m, 0, 2 * r));
    for_each(acc, [&](float& x, int m, int n, int e) {
      const int key = places.key(m, n, e);
      if (key < keys[m][e / 2].begin || key >= keys[m][e / 2].end) f(x, m, n, e);
    });
  }
}

// Scores that the mask forbids become -inf. `visible`: Places, or the bits that they have given.
template <int kM, int kN, class Visible>
DEVICE void hide(float (&s_acc)[kM][kN][4], const Visible& visible) {
  for_each_hidden(s_acc, visible, [](float& s, int, int, int) { s = -infinity(); });
}
