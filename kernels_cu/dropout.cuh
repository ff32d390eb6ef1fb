// Which probabilities dropout keeps: a function of the seed and the place alone, so that forward,
// backward and the CPU agree whatever the tiles (cuflash/_random.py). Philox4x32-10 (Salmon et al.,
// "Parallel random numbers: as easy as 1, 2, 3", 2011) gives four words, which go to queries i and
// i + 8 and keys j and j + 8: one thread holds those four in either orientation of its scores.
#pragma once
#include "places.cuh"

#ifndef DROPOUT
#define DROPOUT 0
#endif
constexpr bool kDropout = DROPOUT;

DEVICE uint4 philox(uint4 counter, u32 key_low, u32 key_high) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const u64 first = (u64)0xd2511f53u * counter.x, second = (u64)0xcd9e8d57u * counter.z;
    counter = make_uint4((u32)(second >> 32) ^ counter.y ^ key_low, (u32)second,
                         (u32)(first >> 32) ^ counter.w ^ key_high, (u32)first);
    key_low += 0x9e3779b9u, key_high += 0xbb67ae85u;
  }
  return counter;
}

struct Dropout {
  u64 seed;
  u32 drop_below;
  float scale;  // of what is kept

  DEVICE explicit Dropout(const Problem& p)
      : seed(p.seed), drop_below(p.drop_below), scale(p.dropout_scale) {}

  DEVICE uint4 words(const Place& at) const {
    return philox(make_uint4(at.j / 16 * 8 + at.j % 8, at.i / 16 * 8 + at.i % 8, at.h, at.b),
                  (u32)seed, (u32)(seed >> 32));
  }
  DEVICE bool keeps(const uint4& words, int query_half, int key_half) const {
    const u32 low = key_half ? words.y : words.x, high = key_half ? words.w : words.z;
    return (query_half ? high : low) >= drop_below;
  }

  // As Places::visible: whether each accumulator is kept.
  template <int kM, int kN, bool kTransposed>
  DEVICE u64 kept(const Places<kTransposed>& places) const {
    static_assert(kM * kN * 4 <= 64, "a bit for each accumulator");
    u64 bits = 0;
    if constexpr (kPackGroup) {  // a row's neighbours are other heads: a call for every element
#pragma unroll 1
      for (int index = 0; index < kM * kN * 4; index++) {
        const Place at = places.pair(index / 4 % kM, index / (4 * kM), index % 4);
        bits |= (u64)keeps(words(at), at.i / 8 % 2, at.j / 8 % 2) << index;
      }
    } else {
#pragma unroll 1
      for (int index = 0; index < kM * kN; index++) {
        const int n = index / (2 * kM) * 2, m = index / 2 % kM, e = index % 2;
        const uint4 four = words(places.pair(m, n, e));
#pragma unroll
        for (int half = 0; half < 4; half++) {
          const int row_half = half / 2, column_half = half % 2;
          const bool kept = keeps(four, kTransposed ? column_half : row_half,
                                  kTransposed ? row_half : column_half);
          bits |= (u64)kept << (((n + column_half) * kM + m) * 4 + e + 2 * row_half);
        }
      }
    }
    return bits;
  }

  // The gradient of a probability, from that of what dropout made of it.
  DEVICE float gradient(float x, bool kept) const { return kept ? x * scale : 0.f; }

  // Probabilities that are dropped become 0. The others grow when their sums are stored: 16 bits do
  // not hold a probability times any scale.
  template <int kM, int kN>
  DEVICE void drop(float (&p_acc)[kM][kN][4], const Places<false>& places) const {
    const u64 bits = kept<kM, kN>(places);
    for_each(p_acc, [&](float& p, int m, int n, int e) {
      if (!bit_of<kM>(bits, m, n, e)) p = 0.f;
    });
  }
};

// What sums over probabilities that dropout has left are multiplied by.
DEVICE float kept_scale(const Problem& p) { return kDropout ? p.dropout_scale : 1.f; }
