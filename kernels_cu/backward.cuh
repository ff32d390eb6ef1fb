// What the three kernels of a backward pass share: sizes, the workspace, how warps divide a
// product.
//
//   prep   delta = rowsum(dout ∘ out) - dlse, lse in base 2, cleared dq_acc and turns
//   main   dk, dv, and dq_acc in float32
//   post   dq = scale dq_acc in 16 bits
#pragma once
#include "gemm.cuh"
#include "rows.cuh"

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
#ifdef PARAMS_BYTES
static_assert(sizeof(BackwardParams) == PARAMS_BYTES, "BackwardParams differs from the packed one");
#endif

// A kRows x kCols product, divided among kWarpsM x (kWarps / kWarpsM) warps.
template <int kRows, int kCols, int kWarpsM>
struct WarpGrid {
  static constexpr int kWarpsN = kWarps / kWarpsM;
  static constexpr int kM = kRows / kWarpsM / 16;
  static constexpr int kN = kCols / kWarpsN / 8;
  static_assert(kM * kWarpsM * 16 == kRows, "rows must be a multiple of 16 per warp");
  static_assert(kN * kWarpsN * 8 == kCols && kN % 2 == 0, "columns: a multiple of 16 per warp");
  typedef float Acc[kM][kN][4];

  static DEVICE int row() { return warp_id() / kWarpsN * (16 * kM); }
  static DEVICE int col() { return warp_id() % kWarpsN * (8 * kN); }
};

typedef WarpGrid<kBlockQ, kHeadDim, QUERY_WARPS> QueryGrid;  // dq

// Where a query tile stands in the workspace: lse_log2, delta, dq_acc and turns count tiles alike.
// `head` is one of Rows.
DEVICE i64 workspace_tile(const Problem& p, int batch, int head, int tile) {
  const Rows rows(p);
  if (kPacked)
    return (i64)head * p.packing.query_tile_count + p.packing.first_query_tile[batch] + tile;
  return ((i64)batch * rows.heads + head) * rows.tiles(kBlockQ) + tile;
}

// lse_log2 and delta, for kernels whose rows are not those of the main kernel.
struct RowStats {
  const float* lse_log2;
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
