// The gradient of a bias, on mma.sync, for every GPU from Ampere on.
//
//   s = scale q kᵀ    p = exp(s - max) / sum    dp = dout vᵀ    dbias = sum over shared axes of p
//   (dp - delta)
//
// One block per (tile of dbias, split). An axis along which all share the bias is one element long:
// the block walks over it, batch entries, heads, query or key tiles, or, with splits, over its part
// of that walk, and adds up in registers; so every sum has one order, and nothing is atomic. The
// parts are summed by flash_bwd_bias_sum.cu. s and dp are computed again, which the main kernel
// need not know of.
//
// Warps divide the scores as in flash_bwd_sm80.cu. Shared memory, bytes:  q | k | dout | v
//   = 2 (kBlockQ + kBlockKV) (D + Dv); the sums, float32, pass over them at the end.
//
// Registers: s, dp and the sums, 3 kBlockQ kBlockKV / kThreads.
#include "backward.cuh"
#include "dropout.cuh"
#include "schedule.cuh"
#include "scores.cuh"

#ifndef BLOCK_KV
#define BLOCK_KV 64
#endif
#ifndef SCORE_WARPS
#define SCORE_WARPS 2
#endif

constexpr int kBlockKV = BLOCK_KV;
static_assert(!kPackGroup, "rows are positions of one query head");

typedef SmemTile<kBlockQ, kHeadDim> QTile;
typedef SmemTile<kBlockKV, kHeadDim> KTile;
typedef SmemTile<kBlockQ, kHeadDimV> DoutTile;
typedef SmemTile<kBlockKV, kHeadDimV> VTile;
constexpr int kKOffset = QTile::kBytes;
constexpr int kDoutOffset = kKOffset + KTile::kBytes;
constexpr int kVOffset = kDoutOffset + DoutTile::kBytes;
constexpr int kSumBytes = kBlockQ * kBlockKV * sizeof(float);
constexpr int kSmemBytes = larger(kVOffset + VTile::kBytes, kSumBytes);
#ifdef SMEM_BYTES
static_assert(kSmemBytes == SMEM_BYTES, "shared memory differs from the plan's");
#endif

typedef WarpGrid<kBlockQ, kBlockKV, SCORE_WARPS> ScoreGrid;

struct BiasGradientParams {
  Problem problem;
  Tensor q, k, v, dout;
  const float* row_max;  // (B, Hq, Sq)
  const float* row_sum;  // likewise, or null: 1
  RowDeltas deltas;
  const u8* sights;  // of a mask's tree (mask_tiles.cu), by this kernel's tiles
  i64 sights_batch_stride, sights_head_stride;
  float* sums;    // (splits, *extent)
  int extent[4];  // of the bias: B, Hq, Sq, Sk, or 1
  int splits, padding;
};
#ifdef BIAS_PARAMS_BYTES
static_assert(sizeof(BiasGradientParams) == BIAS_PARAMS_BYTES,
              "BiasGradientParams differs from the packed one");
#endif

// One of `count` steps along an axis, or the only one of a shared axis.
struct Axis {
  int begin, steps;
  DEVICE Axis(int extent, int index, int count)
      : begin(extent == 1 ? 0 : index), steps(extent == 1 ? count : 1) {}
};

// ds of one tile, added to the sums.
struct Tile {
  const BiasGradientParams& p;
  u32 smem;
  int batch, head, query_tile, key_tile;

  DEVICE void add(ScoreGrid::Acc& sums) const {
    const Mask mask(p.problem, batch);
    const int first_row = query_tile * kBlockQ, first_key = key_tile * kBlockKV;
    const Interval visited = mask.key_tiles(first_row, kBlockQ, kBlockKV);
    if (key_tile < visited.begin || key_tile >= visited.end) return;
    if (kHasTree && sight() == kNone) return;

    const QTile q{smem};
    const KTile k{smem + kKOffset};
    const DoutTile dout{smem + kDoutOffset};
    const VTile v{smem + kVOffset};
    const int head_k = mask.rows.head_k(p.problem, head);
    __syncthreads();  // every warp has finished with the last tile
    load(q, p.q, head, first_row, mask.q_len, p.problem.head_dim);
    load(dout, p.dout, head, first_row, mask.q_len, p.problem.head_dim_v);
    load(k, p.k, head_k, first_key, mask.kv_len, p.problem.head_dim);
    load(v, p.v, head_k, first_key, mask.kv_len, p.problem.head_dim_v);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();

    ScoreGrid::Acc s, dp;
    clear(s);
    clear(dp);
    gemm<kHeadDim / 16>(s, RowsOf<QTile>{q, ScoreGrid::row()},
                        TransposedRight<KTile>{k, ScoreGrid::col()});
    gemm<kHeadDimV / 16>(dp, RowsOf<DoutTile>{dout, ScoreGrid::row()},
                         TransposedRight<VTile>{v, ScoreGrid::col()});
    const Places<false> places{mask, head, first_row + ScoreGrid::row(),
                               first_key + ScoreGrid::col()};
    differentiate(s, dp, mask, places);
    for_each_hidden(dp, places, [](float& ds, int, int, int) { ds = 0.f; });
    for_each(sums, [&](float& sum, int m, int n, int e) { sum += dp[m][n][e]; });
  }

 private:
  DEVICE int sight() const {
    const int key_tiles = ceil_div(p.problem.seqlen_k, kBlockKV);
    return p.sights[batch * p.sights_batch_stride + head * p.sights_head_stride +
                    (i64)query_tile * key_tiles + key_tile];
  }

  template <class SmemTile>
  DEVICE void load(const SmemTile& tile, const Tensor& x, int head, int first, int length,
                   int cols) const {
    const u16* source = base_of(x, batch, head) + first * x.seq_stride;
    load_tile<kThreads>(
        tile, [&](int row) { return source + row * x.seq_stride; }, length - first, cols);
  }

  // dp becomes p (dp - delta).
  DEVICE void differentiate(const ScoreGrid::Acc& s, ScoreGrid::Acc& dp, const Mask& mask,
                            const Places<false>& places) const {
    const Scores scores(p.problem);
    const Dropout dropout(p.problem);
    u64 kept = 0;
    if (kDropout) kept = dropout.kept<ScoreGrid::kM, ScoreGrid::kN>(places);
    for_each(dp, [&](float& x, int m, int n, int e) {
      // The nearest row that exists: what the others give is hidden.
      const int row = smaller(places.row(m, n, e), p.problem.seqlen_q - 1);
      const RowStats stats(p.row_max, p.row_sum, mask.stats(head) + row);
      const float delta = p.deltas.delta[p.deltas.index(p.problem, batch, head, row)];
      float derivative;
      const float score = scores.with_terms(s[m][n][e], places.at(m, n, e), derivative);
      const float prob = stats.probability(score);
      const float dprob = kDropout ? dropout.gradient(x, bit_of<ScoreGrid::kM>(kept, m, n, e)) : x;
      x = prob * (dprob - delta);
    });
  }
};

// The block's tile of sums to global memory, summed over the axes that all share.
DEVICE void store(const BiasGradientParams& p, float* tile_smem, const ScoreGrid::Acc& sums,
                  int split, int batch, int head, int first_row, int first_key) {
  __syncthreads();  // every warp has finished with the last tile
#pragma unroll
  for (int m = 0; m < ScoreGrid::kM; m++)
#pragma unroll
    for (int n = 0; n < ScoreGrid::kN; n++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        tile_smem[(ScoreGrid::row() + acc_row(m, e)) * kBlockKV + ScoreGrid::col() +
                  acc_col(n, e)] = sums[m][n][e];
  __syncthreads();

  const bool rows_share = p.extent[2] == 1, keys_share = p.extent[3] == 1;
  const int rows = rows_share ? 1 : kBlockQ, keys = keys_share ? 1 : kBlockKV;
  const int rows_of_one = kBlockQ / rows, keys_of_one = kBlockKV / keys;
#pragma unroll 1
  for (int index = threadIdx.x; index < rows * keys; index += kThreads) {
    const int row = index / keys, key = index % keys;
    if (first_row + row >= p.extent[2] || first_key + key >= p.extent[3]) continue;
    float sum = 0.f;
#pragma unroll 1
    for (int r = 0; r < rows_of_one; r++)
#pragma unroll 1
      for (int k = 0; k < keys_of_one; k++) sum += tile_smem[(row + r) * kBlockKV + key + k];
    const i64 matrix = ((i64)split * p.extent[0] + batch) * p.extent[1] + head;
    p.sums[(matrix * p.extent[2] + first_row + row) * p.extent[3] + first_key + key] = sum;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    flash_bwd_bias(const __grid_constant__ BiasGradientParams p) {
  extern __shared__ __align__(128) u8 smem[];
  const int all_query_tiles = ceil_div(p.problem.seqlen_q, kBlockQ);
  const int all_key_tiles = ceil_div(p.problem.seqlen_k, kBlockKV);
  i64 index = blockIdx.x;
  const auto take = [&](int extent, int tiles) {
    const int count = extent == 1 ? 1 : tiles, taken = index % count;
    index /= count;
    return Axis(extent, taken, tiles);
  };
  const Axis keys = take(p.extent[3], all_key_tiles);
  const Axis queries = take(p.extent[2], all_query_tiles);
  const Axis heads = take(p.extent[1], p.problem.heads_k * p.problem.group);
  const Axis batches = take(p.extent[0], p.problem.batch);
  const int split = index;

  ScoreGrid::Acc sums;
  clear(sums);
  const i64 steps = (i64)keys.steps * queries.steps * heads.steps * batches.steps;
#pragma unroll 1
  for (i64 step = split; step < steps; step += p.splits) {
    const i64 of_query = step / keys.steps, of_head = of_query / queries.steps;
    const Tile tile{p,
                    shared_address(smem),
                    batches.begin + (int)(of_head / heads.steps),
                    heads.begin + (int)(of_head % heads.steps),
                    queries.begin + (int)(of_query % queries.steps),
                    keys.begin + (int)(step % keys.steps)};
    tile.add(sums);
  }
  store(p, (float*)smem, sums, split, batches.begin, heads.begin, queries.begin * kBlockQ,
        keys.begin * kBlockKV);
}
