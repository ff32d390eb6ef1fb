// Gradients of attention on mma.sync, for every GPU from Ampere on.
//
//   s = scale q kᵀ    p = exp2(s - lse)    dp = dout vᵀ    ds = p (dp - delta)
//   dv = pᵀ dout      dk = scale dsᵀ q     dq = scale ds k
//
// In a query tile where prep has found a row with large scores, p = exp(s - max) / sum.
//
// One block per (key tile, key head, batch entry). It walks over the query tiles that see its keys,
// whose rows are (position, head of the group): dk and dv of a whole group are summed in registers,
// and dq tiles are added to dq_acc, float32, in global memory. Deterministic: blocks take their
// work from a counter and add to a query tile in the order of their key tiles, each waiting for its
// turn; a block only waits for blocks that took their work earlier, so they are running and
// somebody always advances.
//
// Warps divide each product in their own way (WarpGrid): s and dp kBlockQ x kBlockKV, dk and dv
// kBlockKV x D, dq kBlockQ x D. p and ds therefore pass through shared memory.
//
// Shared memory, bytes:  k | v | kStages x (q | dout | lse | delta) | p | ds
//   = 2 (kBlockKV (D + Dv) + kStages kBlockQ (D + Dv + 4) + 2 kBlockQ kBlockKV)
// dk and dv are staged over k and v at the end. With two stages the next q and dout arrive during
// the whole step, with one stage during dq = ds k.
//
// Registers: dk and dv kBlockKV (D + Dv) / kThreads, s and dp 2 kBlockQ kBlockKV / kThreads.
//
// Method: FlashAttention-2 (Dao 2023).
#include "backward.cuh"
#include "dropout.cuh"
#include "non_finite.cuh"
#include "schedule.cuh"
#include "scores.cuh"

#ifndef BLOCK_KV
#define BLOCK_KV 128
#endif
#ifndef STAGES
#define STAGES 2
#endif
#ifndef SCORE_WARPS
#define SCORE_WARPS 2
#endif
#ifndef KEY_WARPS
#define KEY_WARPS 4
#endif
#ifndef DETERMINISTIC
#define DETERMINISTIC 1
#endif

constexpr int kBlockKV = BLOCK_KV;
constexpr int kStages = STAGES;
constexpr bool kDeterministic = DETERMINISTIC;
static_assert(kStages == 1 || kStages == 2, "one or two buffers of q and dout");

typedef SmemTile<kBlockKV, kHeadDim> KTile;
typedef SmemTile<kBlockKV, kHeadDimV> VTile;
typedef SmemTile<kBlockQ, kHeadDim> QTile;
typedef SmemTile<kBlockQ, kHeadDimV> DoutTile;
typedef SmemTile<kBlockQ, kBlockKV> ScoreTile;

constexpr int kStatBytes = kBlockQ * sizeof(float);
constexpr int kDoutOffset = QTile::kBytes;  // in a stage
constexpr int kLseOffset = kDoutOffset + DoutTile::kBytes;
constexpr int kDeltaOffset = kLseOffset + kStatBytes;
constexpr int kStageBytes = kDeltaOffset + kStatBytes;
static_assert(kStageBytes % 128 == 0, "tiles start at a multiple of 128 bytes");
constexpr int kVOffset = KTile::kBytes;
constexpr int kStagesOffset = kVOffset + VTile::kBytes;
constexpr int kPOffset = kStagesOffset + kStages * kStageBytes;
constexpr int kDsOffset = kPOffset + ScoreTile::kBytes;
#ifdef SMEM_BYTES
static_assert(kDsOffset + ScoreTile::kBytes == SMEM_BYTES, "shared memory differs from the plan's");
#endif

typedef WarpGrid<kBlockQ, kBlockKV, SCORE_WARPS> ScoreGrid;  // s, dp
typedef WarpGrid<kBlockKV, kHeadDim, KEY_WARPS> KeyGrid;     // dk
typedef WarpGrid<kBlockKV, kHeadDimV, KEY_WARPS> ValueGrid;  // dv

// Of a thread, at a time: dk and dv, beside them s and dp or dq.
constexpr int kAccumulators =
    (kBlockKV * (kHeadDim + kHeadDimV) + kBlockQ * larger(2 * kBlockKV, kHeadDim)) / kThreads;
// Whether what rules and terms read for a batch entry, a head and a key tile would spill if it were
// kept throughout the loop (NVRTC 13.5). Read anew, it costs a few instructions a query tile.
constexpr bool kFewRegisters = (kHasTree || kHasTerms) && kAccumulators > (kHasTerms ? 112 : 128);

// One float per row of a query tile.
DEVICE void load_stats(u32 target, const float* source) {
  const int i = threadIdx.x * 4;
  if (i < kBlockQ) cp_async<16>(target + i * sizeof(float), source + i, 16);
}

// Calls f(row, m, r) for each row of s that this lane holds: accumulators [m][n][2 r] and [2 r +
// 1].
template <class F>
DEVICE void for_each_row(const F& f) {
#pragma unroll
  for (int m = 0; m < ScoreGrid::kM; m++)
#pragma unroll
    for (int r = 0; r < 2; r++) f(ScoreGrid::row() + acc_row(m, 2 * r), m, r);
}

// s becomes p, after dropout, and dp becomes ds; kLarge: by stats_of(row), else by lse.
template <bool kLarge, class StatsOf>
DEVICE void differentiate(ScoreGrid::Acc& s, ScoreGrid::Acc& dp, const Scores& scores,
                          const Dropout& dropout, const Places<false>& places, u32 stage_smem,
                          const StatsOf& stats_of) {
  u64 kept = 0;
  if (kDropout) kept = dropout.kept<ScoreGrid::kM, ScoreGrid::kN>(places);
  if (!kHasTerms) scores.transform(s, places);
  for_each_row([&](int row, int m, int r) {
    const float lse_log2 = __uint_as_float(ld_shared_u32(stage_smem + kLseOffset + 4 * row));
    const float delta = __uint_as_float(ld_shared_u32(stage_smem + kDeltaOffset + 4 * row));
    const RowStats stats = stats_of(row);
#pragma unroll
    for (int n = 0; n < ScoreGrid::kN; n++)
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; e++) {
        float score = s[m][n][e], derivative = scores.derivative(score);
        if (kHasTerms) score = scores.with_terms(score, places.at(m, n, e), derivative);
        float prob;
        if constexpr (kLarge)
          prob = stats.probability(scores.score(score));
        else
          prob = exp2_approx(score * scores.unit_log2() - lse_log2);
        const bool keep = bit_of<ScoreGrid::kM>(kept, m, n, e);
        const float dprob = kDropout ? dropout.gradient(dp[m][n][e], keep) : dp[m][n][e];
        s[m][n][e] = !kDropout || keep ? prob : 0.f;
        dp[m][n][e] = prob * (dprob - delta) * derivative;
      }
  });
}

// acc = a gradient of keys: the rows of `tile` that are not finite reach only the keys that they
// see.
template <bool kAsNaN, class Grid, class Tile>
DEVICE void add_non_finite_queries(typename Grid::Acc& acc, const Tile& tile, const Mask& mask,
                                   int head_q, int first_row, int first_key) {
  add_non_finite<kAsNaN>(acc, tile, Grid::col(), [&](int key, int row) {
    return mask.visible(head_q, first_row + row, first_key + Grid::row() + key);
  });
}

// dq += ds k for one query tile, where `non_finite` keys are not seen by every row. Leaves k as it
// was.
template <class LoadKeys>
DEVICE void query_gradient(QueryGrid::Acc& dq, const ScoreTile& ds_smem, const KTile& k_smem,
                           bool non_finite, const Mask& mask, int head_q, int first_row,
                           int first_key, const LoadKeys& load_keys) {
  clear(dq);
  if (non_finite) {
    add_non_finite<true>(dq, k_smem, QueryGrid::col(), [&](int row, int key) {
      return mask.visible(head_q, first_row + QueryGrid::row() + row, first_key + key);
    });
    __syncthreads();
    zero_non_finite<kThreads>(k_smem);
    __syncthreads();
  }
  gemm<kBlockKV / 16>(dq, RowsOf<ScoreTile>{ds_smem, QueryGrid::row()},
                      Right<KTile>{k_smem, QueryGrid::col()});
  if (non_finite) {
    __syncthreads();
    load_keys();
  }
}

// Key tiles add to a query tile in turns, lowest first. The counter is thread 0's; barriers carry
// what it has seen to the other threads, and their additions to it.
DEVICE void await_turn(const u32* counter, u32 turn) {
  if (kDeterministic && threadIdx.x == 0) await(counter, turn);
  __syncwarp();
}
DEVICE void end_turn(u32* counter) {
  if (kDeterministic && threadIdx.x == 0) red_release_add(counter, 1);
}

// Work in the order in which blocks ask for it; without order, by block.
DEVICE u32 take_work(const BackwardParams& p, u8* smem) {
  if (!kDeterministic) return blockIdx.x;
  u32* index = (u32*)smem;
  if (threadIdx.x == 0) *index = atomic_add(p.turns, 1);
  __syncthreads();
  const u32 taken = *index;
  __syncthreads();  // the tiles overwrite it
  return taken;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    flash_bwd(const __grid_constant__ BackwardParams p) {
  extern __shared__ __align__(128) u8 smem[];
  const u32 base = shared_address(smem);
  const KTile k_smem{base};
  const VTile v_smem{base + kVOffset};
  const ScoreTile p_smem{base + kPOffset}, ds_smem{base + kDsOffset};

  const Work work = backward_work(p.problem, take_work(p, smem));
  if (!work.exists()) return;
  Mask mask(p.problem, work.batch);
  const Scores scores(p.problem);
  int first_key = work.tile * kBlockKV;
  const Dropout dropout(p.problem);
  int head_q = work.head * p.problem.group;
  QueryTiles tiles(mask, work.head, work.tile, kBlockQ, kBlockKV);
  u32* turns = p.turns + 1;

  // Pointers are computed anew at each use: kept, they would cost registers throughout the loop.
  const auto load_k = [&] {
    load_rows<kThreads>(k_smem, mask.keys(p.k, work.head) + first_key * p.k.seq_stride,
                        p.k.seq_stride, mask.kv_len - first_key, p.problem.head_dim);
  };
  const auto load_v = [&] {
    load_rows<kThreads>(v_smem, mask.keys(p.v, work.head) + first_key * p.v.seq_stride,
                        p.v.seq_stride, mask.kv_len - first_key, p.problem.head_dim_v);
  };
  const auto q_stage = [&](int stage) { return QTile{base + kStagesOffset + stage * kStageBytes}; };
  const auto dout_stage = [&](int stage) { return DoutTile{q_stage(stage).base + kDoutOffset}; };
  const auto load_queries = [&](int stage, int tile) {
    const int first_row = tile * kBlockQ, valid_rows = mask.valid_rows() - first_row;
    const u16* q = mask.queries(p.q, head_q);
    const u16* dout = mask.queries(p.dout, head_q);
    load_tile<kThreads>(
        q_stage(stage), [&](int row) { return mask.rows.pointer(q, p.q, first_row + row); },
        valid_rows, p.problem.head_dim);
    load_tile<kThreads>(
        dout_stage(stage),
        [&](int row) { return mask.rows.pointer(dout, p.dout, first_row + row); }, valid_rows,
        p.problem.head_dim_v);
    const i64 stats = workspace_tile(p.problem, mask.batch, work.head, tile) * kBlockQ;
    load_stats(q_stage(stage).base + kLseOffset, p.row_stats + kRowStats * stats);
    load_stats(q_stage(stage).base + kDeltaOffset, p.delta + stats);
    cp_async_commit();
  };

  KeyGrid::Acc dk;
  ValueGrid::Acc dv;
  clear(dk);
  clear(dv);
  bool keys_non_finite = false;
  if (tiles.valid()) {
    load_k();
    load_v();
    load_queries(0, tiles.current);
    cp_async_wait<0>();
    keys_non_finite = __syncthreads_or(copied_non_finite<kThreads>(k_smem));
  }

  int stage = 0;
#pragma unroll 1
  for (; tiles.valid(); tiles.advance()) {
    if (kFewRegisters) {
      mask.batch = opaque(mask.batch);
      head_q = opaque(head_q);
      first_key = opaque(first_key);
    }
    const int first_row = tiles.current * kBlockQ;
    const i64 workspace = workspace_tile(p.problem, mask.batch, work.head, tiles.current);
    const bool partly_visible = tiles.partly_visible();
    const QTile q_smem = q_stage(stage);
    const DoutTile dout_smem = dout_stage(stage);

    cp_async_wait<0>();
    // q and dout are here, and every warp has finished with the last tile's
    const bool non_finite =
        __syncthreads_or(partly_visible && (copied_non_finite<kThreads>(q_smem) ||
                                            copied_non_finite<kThreads>(dout_smem)));
    if (tiles.has_previous()) end_turn(turns + workspace + tiles.previous() - tiles.current);
    if (kStages == 2 && tiles.has_next()) load_queries(1 - stage, tiles.next());

    // s = q kᵀ, dp = dout vᵀ, p and ds
    ScoreGrid::Acc s, dp;
    clear(s);
    clear(dp);
    gemm<kHeadDim / 16>(s, RowsOf<QTile>{q_smem, ScoreGrid::row()},
                        TransposedRight<KTile>{k_smem, ScoreGrid::col()});
    gemm<kHeadDimV / 16>(dp, RowsOf<DoutTile>{dout_smem, ScoreGrid::row()},
                         TransposedRight<VTile>{v_smem, ScoreGrid::col()});
    const Places<false> places{mask, head_q, first_row + ScoreGrid::row(),
                               first_key + ScoreGrid::col()};
    const auto stats_of = [&](int row) {
      const float* of_row = p.row_stats + (workspace * kRowStats + 1) * kBlockQ + row;
      return RowStats(of_row[0], of_row[kBlockQ]);
    };
    if (p.large[workspace])
      differentiate<true>(s, dp, scores, dropout, places, q_smem.base, stats_of);
    else
      differentiate<false>(s, dp, scores, dropout, places, q_smem.base, stats_of);
    // What the mask forbids has no probability and no gradient.
    if (partly_visible)
      for_each_hidden(s, places,
                      [&](float& p, int m, int n, int e) { p = 0.f, dp[m][n][e] = 0.f; });
    to_smem<ScoreGrid>(p_smem, s, 1.f);
    to_smem<ScoreGrid>(ds_smem, dp, 1.f);
    __syncthreads();  // p and ds are whole, and every warp has finished q kᵀ and dout vᵀ

    if (non_finite) {
      add_non_finite_queries<false, ValueGrid>(dv, dout_smem, mask, head_q, first_row, first_key);
      add_non_finite_queries<true, KeyGrid>(dk, q_smem, mask, head_q, first_row, first_key);
      __syncthreads();
      zero_non_finite<kThreads>(dout_smem);
      zero_non_finite<kThreads>(q_smem);
      __syncthreads();
    }

    // dv += pᵀ dout, dk += dsᵀ q
    gemm<kBlockQ / 16>(dv, ColumnsOf<ScoreTile>{p_smem, ValueGrid::row()},
                       Right<DoutTile>{dout_smem, ValueGrid::col()});
    gemm<kBlockQ / 16>(dk, ColumnsOf<ScoreTile>{ds_smem, KeyGrid::row()},
                       Right<QTile>{q_smem, KeyGrid::col()});
    if (kStages == 1 && tiles.has_next()) {
      __syncthreads();  // every warp has finished with q and dout
      load_queries(0, tiles.next());
    }

    // dq += ds k
    await_turn(turns + workspace, tiles.turn());
    QueryGrid::Acc dq;
    query_gradient(dq, ds_smem, k_smem, partly_visible && keys_non_finite, mask, head_q, first_row,
                   first_key, load_k);
    if (kDeterministic) __syncthreads();  // it is this tile's turn for every thread
    for_each_dq(dq, p.dq_acc, workspace, [](float value, float* sum) { red_add(sum, value); });
    if (kStages == 2) stage = 1 - stage;
  }

  // dk and dv through shared memory to whole rows
  cp_async_wait<0>();
  __syncthreads();  // every warp has finished with k, v and dq
  if (!tiles.empty())
    end_turn(turns + workspace_tile(p.problem, mask.batch, work.head, tiles.final()));
  to_smem<KeyGrid>(k_smem, dk, p.problem.scale);
  to_smem<ValueGrid>(v_smem, dv, kept_scale(p.problem));
  __syncthreads();
  u16* dk_target = mask.keys(p.dk, work.head) + first_key * p.dk.seq_stride;
  u16* dv_target = mask.keys(p.dv, work.head) + first_key * p.dv.seq_stride;
  const int valid_keys = mask.own_keys() - first_key;
  store_tile<kThreads>(
      k_smem, [&](int row) { return dk_target + row * p.dk.seq_stride; }, valid_keys,
      p.problem.head_dim);
  store_tile<kThreads>(
      v_smem, [&](int row) { return dv_target + row * p.dv.seq_stride; }, valid_keys,
      p.problem.head_dim_v);
}
