// What the three kernels of a backward pass share: sizes, the workspace, how warps divide a
// product.
//
//   prep   delta = rowsum(dout ∘ out) - dlse, lse in base 2, cleared dq_acc and turns
//   main   dk, dv, and dq_acc in float32
//   post   dq = scale dq_acc in 16 bits
#pragma once
#include "gemm.cuh"
#include "scores.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef HEAD_DIM_V
#define HEAD_DIM_V 128
#endif
#ifndef BLOCK_Q
#define BLOCK_Q 64
#endif
#ifndef WARPS
#define WARPS 8
#endif
#ifndef QUERY_WARPS
#define QUERY_WARPS 2
#endif
#ifndef SUM_FLOATS
#define SUM_FLOATS 1
#endif

constexpr int kHeadDim = HEAD_DIM, kHeadDimV = HEAD_DIM_V;  // padded
constexpr int kBlockQ = BLOCK_Q;
constexpr int kWarps = WARPS;
constexpr int kThreads = kWarps * kWarpSize;
// That one instruction of the main kernel adds to dq_acc: 1 or, on Hopper, 4.
constexpr int kSumFloats = SUM_FLOATS;
static_assert(kSumFloats == 1 || kSumFloats == 4, "a float or the four of an accumulator");
#ifdef PARAMS_BYTES
static_assert(sizeof(BackwardParams) == PARAMS_BYTES, "BackwardParams differs from the packed one");
#endif

// A kRows x kCols product, divided among kWarpsM x (kWarps / kWarpsM) warps.
template <int kRows, int kCols, int kWarpsM>
struct WarpGrid {
  static constexpr int kWarpsN = kWarps / kWarpsM;
  static constexpr int kM = kRows / kWarpsM / 16;
  static constexpr int kN = kCols / kWarpsN / 8;
  static_assert(kWarpsN * kWarpsM == kWarps, "every warp has a part");
  static_assert(kM * kWarpsM * 16 == kRows, "rows must be a multiple of 16 per warp");
  static_assert(kN * kWarpsN * 8 == kCols && kN % 2 == 0, "columns: a multiple of 16 per warp");
  typedef float Acc[kM][kN][4];

  static DEVICE int row() { return warp_id() / kWarpsN * (16 * kM); }
  static DEVICE int col() { return warp_id() % kWarpsN * (8 * kN); }
};

typedef WarpGrid<kBlockQ, kHeadDim, QUERY_WARPS> QueryGrid;  // dq

constexpr int kRowStats =
    3;  // that prep leaves of a row: lse in base 2, row_max and log2 of row_sum

// The place of a query tile in the workspace, the same in row_stats, delta, dq_acc and turns.
// `head` is one of Rows.
DEVICE i64 workspace_tile(const Problem& p, int batch, int head, int tile) {
  const Rows rows(p);
  if (kPacked)
    return (i64)head * p.packing.query_tile_count + p.packing.first_query_tile[batch] + tile;
  return ((i64)batch * rows.heads + head) * rows.tiles(kBlockQ) + tile;
}

// score - largest, at most 0: summed in another order, a product may round to above the forward's
// largest score.
DEVICE float below_largest(float score, float largest) { return min_or_nan(score - largest, 0.f); }

// What a forward has left of one row: p = exp(score - largest) / sum.
struct RowStats {
  float largest;   // +inf for a row that sees no key, so that its probabilities are 0
  float sum_log2;  // of the sum

  DEVICE RowStats(float largest, float sum_log2) : largest(largest), sum_log2(sum_log2) {}
  // `index`: in the (B, Hq, Sq) arrays; row_sum null: 1.
  DEVICE RowStats(const float* row_max, const float* row_sum, i64 index) {
    const float top = row_max[index], sum = (row_sum ? row_sum : row_max)[index];
    largest = top == -infinity() ? infinity() : top;
    sum_log2 = top == -infinity() || !row_sum ? 0.f : log2_approx(sum);
  }

  DEVICE bool sees_keys() const { return largest != infinity(); }
  DEVICE float lse_log2() const { return largest * kLog2e + sum_log2; }
  // Whether lse_log2 is too coarse for this row's probabilities.
  DEVICE bool large() const { return sees_keys() && fabsf(largest * kLog2e) > kLargestPlainScore; }
  DEVICE float probability(float score) const {
    return exp2_approx(below_largest(score, largest) * kLog2e - sum_log2);
  }
};

// delta, for kernels whose rows are not those of the main kernel.
struct RowDeltas {
  const float* delta;
  i64 rows_per_head;  // of the main kernel's Rows, in whole tiles
  int block_q;        // the main kernel's
  int group;          // heads of q in these rows

  DEVICE i64 index(const Problem& p, int batch, int head, int position) const {
    const i64 row = (i64)position * group + head % group;
    if (kPacked)
      return head / group * rows_per_head + (i64)p.packing.first_query_tile[batch] * block_q + row;
    const i64 heads = p.heads_k * p.group / group;
    return (batch * heads + head / group) * rows_per_head + row;
  }
};

// Whether any row of the query tiles of `heads` heads of Rows, from `head` on, is large. For whole
// warps.
DEVICE bool any_large(const BackwardParams& p, const Mask& mask, int head, int heads) {
  const int tiles = mask.rows.tiles(kBlockQ);
  bool found = false;
#pragma unroll 1
  for (int i = lane_id(); i < heads * tiles; i += kWarpSize)
    found |= p.large[workspace_tile(p.problem, mask.batch, head + i / tiles, i % tiles)] != 0;
  return __any_sync(0xffffffff, found);
}

// dq_acc keeps each thread's accumulators a block's width apart, in pieces of kSumFloats, so that a
// warp's accesses are contiguous. f(accumulator, its address).
template <class F>
DEVICE void for_each_dq(QueryGrid::Acc& dq, float* dq_acc, i64 tile, const F& f) {
  float* first = dq_acc + tile * kBlockQ * kHeadDim + threadIdx.x * kSumFloats;
  for_each(dq, [&](float& value, int m, int n, int e) {
    const int index = (m * QueryGrid::kN + n) * 4 + e;
    f(value, first + index / kSumFloats * kSumFloats * kThreads + index % kSumFloats);
  });
}

// The sums once all blocks have added to them, in loads of kSumFloats.
DEVICE void load_dq(QueryGrid::Acc& dq, const float* dq_acc, i64 tile) {
  const float* first = dq_acc + tile * kBlockQ * kHeadDim + threadIdx.x * kSumFloats;
#pragma unroll
  for (int m = 0; m < QueryGrid::kM; m++)
#pragma unroll
    for (int n = 0; n < QueryGrid::kN; n++) {
      const float* quad = first + (m * QueryGrid::kN + n) * 4 * kThreads;
      if constexpr (kSumFloats == 4) {
        const float4 sums = *(const float4*)quad;
        dq[m][n][0] = sums.x, dq[m][n][1] = sums.y, dq[m][n][2] = sums.z, dq[m][n][3] = sums.w;
      } else {
#pragma unroll
        for (int e = 0; e < 4; e++) dq[m][n][e] = quad[e * kThreads];
      }
    }
}

// A product to a tile in shared memory, in 16 bits.
template <class Grid, class Tile>
DEVICE void to_smem(const Tile& tile, const typename Grid::Acc& acc, float scale) {
#pragma unroll
  for (int m = 0; m < Grid::kM; m++)
#pragma unroll
    for (int n = 0; n < Grid::kN; n++)
#pragma unroll
      for (int r = 0; r < 2; r++)
        st_shared(tile.address(Grid::row() + acc_row(m, 2 * r), Grid::col() + acc_col(n, 0)),
                  pack<Element>(acc[m][n][2 * r] * scale, acc[m][n][2 * r + 1] * scale));
}
