// Gradients of attention on Hopper, for head sizes up to 256 with D or Dv above 128: wgmma, TMA,
// warp specialisation.
//
//   s = scale q kᵀ    p = exp2(s - lse)    dp = dout vᵀ    ds = p (dp - delta)
//   dv = pᵀ dout      dk = scale dsᵀ q     dq = scale ds k
//
// One block per (key tile, key head, batch entry), as in flash_bwd_sm90.cu: it walks over the query
// heads of the group and, in each, over the query tiles that see its keys; dk and dv of the group
// are summed in registers, dq tiles are added to dq_acc, float32, in global memory.
//
// dk and dv of 64 keys are too wide for one warpgroup's registers, so two divide their columns, and
// those of dq; each then needs p and ds whole. Warpgroup 0: warp 0 loads, warp 1 keeps the turns,
// both with one lane, the others have nothing to do. Warpgroups 1 and 2 compute: each sᵀ and dpᵀ of
// all keys and half of the queries, which pass in 16 bits through shared memory, [key][query], in
// two buffers by turns; then half of the columns of dv, dq and dk.
//
//   step      sᵀ, dpᵀ and the last step's dv start | p, while dpᵀ runs | ds, while dv runs |
//             barrier | dq and dk start | dq to memory, while dk runs
//
// Partly visible tiles hide what the mask forbids. If in one of them s or dp is not finite, in
// either warpgroup (a vote on the barrier), its dv, dk and dq are summed without the tensor cores
// (hidden.cuh): every inf and NaN of q, k and dout shows in s or dp.
//
// mbarriers: q (with lse) and dout (with delta) each have a ring of kStages, full by the bytes of
// TMA, empty by one arrival of each computing warp; k and v are loaded once. Named barriers: p and
// ds are written, this tile's turn has come, its sums are added.
//
// Deterministic: blocks take their work from a counter and add to a query tile in the order of
// their key tiles, each waiting for its turn. A block only waits for blocks that took their work
// earlier, so they are running, and the earliest unfinished one waits for nobody. Warp 1 watches
// the counter, so that the computing warps meet a barrier that is usually open.
//
// Shared memory, bytes:  k | v | kStages x q | kStages x dout | 2 x p | 2 x ds | lse, delta | ...
//   = 2 (kBlockKV (D + Dv) + kStages kBlockQ (D + Dv + 4) + 4 kBlockKV kBlockQ) + mbarriers, ticket
// dk and dv are staged over k and v at the end.
//
// Registers of a computing thread, of 240: dk and dv (D + Dv) / 4; then sᵀ and dpᵀ 16 each, or dq
// D / 4.
//
// Method: FlashAttention-3 (Shah et al. 2024); dq goes to memory from registers, without staging.
#ifndef HEAD_DIM
#define HEAD_DIM 256
#endif
#ifndef HEAD_DIM_V
#define HEAD_DIM_V 256
#endif
#ifndef QUERY_WARPS
#define QUERY_WARPS 4
#endif
#ifndef SUM_FLOATS
#define SUM_FLOATS 4
#endif
#include "backward.cuh"
#include "hidden.cuh"
#include "schedule.cuh"
#include "softmax.cuh"
#include "warpgroup.cuh"

#ifndef DETERMINISTIC
#define DETERMINISTIC 1
#endif

constexpr bool kDeterministic = DETERMINISTIC;
constexpr int kBlockKV = 64;
constexpr int kStages = 2;
constexpr int kConsumers = 2;
constexpr int kBlockThreads = (1 + kConsumers) * kWarpgroupThreads;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
static_assert(kWarps == kConsumers * 4, "post has the threads of the computing warps");
static_assert(kBlockKV == kWarpgroupRows && kBlockQ == kWarpgroupRows, "the rows of each product");

// One computing warpgroup's part: the queries of sᵀ and dpᵀ, the columns of dq, dk and dv.
constexpr int kQueries = kBlockQ / kConsumers;
constexpr int kCols = kHeadDim / kConsumers, kColsV = kHeadDimV / kConsumers;
static_assert(kCols == 8 * QueryGrid::kN && kSumFloats == 4, "post reads what this kernel adds");

// Such a part is whole panels.
template <int kRows, int kTileCols>
using Tile = Panels<kRows, kTileCols, kTileCols / kConsumers % 64 == 0 ? 64 : 32>;
typedef Tile<kBlockKV, kHeadDim> KTile;
typedef Tile<kBlockKV, kHeadDimV> VTile;
typedef Tile<kBlockQ, kHeadDim> QTile;
typedef Tile<kBlockQ, kHeadDimV> DoutTile;
typedef Panels<kBlockKV, kBlockQ> ScoreTile;  // p or ds

typedef float ScoreAcc[1][kQueries / 8][4];  // sᵀ, dpᵀ
typedef float KeyAcc[1][kCols / 8][4];       // dk
typedef float ValueAcc[1][kColsV / 8][4];    // dv
typedef float QueryAcc[1][kCols / 8][4];     // dq

enum NamedBarrier { kScoresBarrier = 1, kTurnBarrier, kAddedBarrier };
constexpr int kTurnThreads = kThreads + kWarpSize;  // the computing warps and the one of the turns

constexpr int kStatBytes = kBlockQ * sizeof(float);
constexpr int kMbarrierBytes = 8;

// Where everything stands in shared memory.
struct Storage {
  u32 base;
  static constexpr int kV = KTile::kBytes;
  static constexpr int kQ = kV + VTile::kBytes;
  static constexpr int kDout = kQ + kStages * QTile::kBytes;
  static constexpr int kProbs = kDout + kStages * DoutTile::kBytes;
  static constexpr int kDs = kProbs + 2 * ScoreTile::kBytes;
  static constexpr int kLse = kDs + 2 * ScoreTile::kBytes;
  static constexpr int kDelta = kLse + kStages * kStatBytes;
  static constexpr int kMbarriers = kDelta + kStages * kStatBytes;
  static constexpr int kTicket = kMbarriers + (2 + 4 * kStages) * kMbarrierBytes;
  static constexpr int kBytes = kTicket + 8;

  DEVICE KTile k() const { return {base}; }
  DEVICE VTile v() const { return {base + kV}; }
  DEVICE QTile q(int stage) const { return {base + kQ + stage * QTile::kBytes}; }
  DEVICE DoutTile dout(int stage) const { return {base + kDout + stage * DoutTile::kBytes}; }
  DEVICE ScoreTile probs(int buffer) const { return {base + kProbs + buffer * ScoreTile::kBytes}; }
  DEVICE ScoreTile ds(int buffer) const { return {base + kDs + buffer * ScoreTile::kBytes}; }
  DEVICE u32 lse(int stage) const { return base + kLse + stage * kStatBytes; }
  DEVICE u32 delta(int stage) const { return base + kDelta + stage * kStatBytes; }
  DEVICE u32 k_full() const { return mbarrier(0); }
  DEVICE u32 v_full() const { return mbarrier(1); }
  DEVICE u32 q_full(int stage) const { return mbarrier(2 + stage); }
  DEVICE u32 q_empty(int stage) const { return mbarrier(2 + kStages + stage); }
  DEVICE u32 dout_full(int stage) const { return mbarrier(2 + 2 * kStages + stage); }
  DEVICE u32 dout_empty(int stage) const { return mbarrier(2 + 3 * kStages + stage); }
  DEVICE u32 ticket() const { return base + kTicket; }

 private:
  DEVICE u32 mbarrier(int index) const { return base + kMbarriers + index * kMbarrierBytes; }
};
#ifdef SMEM_BYTES
static_assert(Storage::kBytes == SMEM_BYTES, "shared memory differs from the plan's");
#endif
#ifdef MAPPED_PARAMS_BYTES
static_assert(sizeof(BackwardParamsSm90) == MAPPED_PARAMS_BYTES,
              "BackwardParamsSm90 differs from the packed one");
#endif

// A place in the rings of q and dout, and the parity of its present use.
struct Stage {
  int index = 0;
  u32 parity = 0;
  DEVICE Stage previous() const {
    Stage stage;
    stage.index = index == 0 ? kStages - 1 : index - 1;
    return stage;
  }
  DEVICE Stage next() const {
    Stage stage;
    stage.index = index + 1 == kStages ? 0 : index + 1;
    stage.parity = parity ^ (stage.index == 0);
    return stage;
  }
};

DEVICE void init_mbarriers(const Storage& smem) {
  mbarrier_init(smem.k_full(), 1);
  mbarrier_init(smem.v_full(), 1);
#pragma unroll
  for (int stage = 0; stage < kStages; stage++) {
    mbarrier_init(smem.q_full(stage), 1);
    mbarrier_init(smem.q_empty(stage), kWarps);
    mbarrier_init(smem.dout_full(stage), 1);
    mbarrier_init(smem.dout_empty(stage), kWarps);
  }
  fence_mbarrier_init();
}

// By one thread.
DEVICE void load(const BackwardParamsSm90& p, const Work& work, const Mask& mask, GroupTiles walk,
                 const Storage& smem) {
  const Problem& problem = p.call.problem;
  const int first_key = work.tile * kBlockKV;
  bool first = true;
  Stage stage;
#pragma unroll 1
  for (; walk.valid(); walk.advance(), stage = stage.next()) {
    const int first_row = walk.tiles.current * kBlockQ;
    const i64 stats = workspace_tile(problem, work.batch, walk.head, walk.tiles.current) * kBlockQ;
    if (first) {
      mbarrier_arrive_expect(smem.k_full(), KTile::kBytes);
      load_panels(smem.k(), &p.k, smem.k_full(), first_key, mask.kv_len, problem.seqlen_k,
                  work.head, work.batch);
    }
    mbarrier_wait(smem.q_empty(stage.index), stage.parity ^ 1);
    mbarrier_arrive_expect(smem.q_full(stage.index), QTile::kBytes + kStatBytes);
    load_panels(smem.q(stage.index), &p.q, smem.q_full(stage.index), first_row, mask.q_len,
                problem.seqlen_q, walk.head, work.batch);
    bulk_load(smem.lse(stage.index), p.call.lse_log2 + stats, kStatBytes, smem.q_full(stage.index));
    if (first) {
      mbarrier_arrive_expect(smem.v_full(), VTile::kBytes);
      load_panels(smem.v(), &p.v, smem.v_full(), first_key, mask.kv_len, problem.seqlen_k,
                  work.head, work.batch);
    }
    mbarrier_wait(smem.dout_empty(stage.index), stage.parity ^ 1);
    mbarrier_arrive_expect(smem.dout_full(stage.index), DoutTile::kBytes + kStatBytes);
    load_panels(smem.dout(stage.index), &p.dout, smem.dout_full(stage.index), first_row, mask.q_len,
                problem.seqlen_q, walk.head, work.batch);
    bulk_load(smem.delta(stage.index), p.call.delta + stats, kStatBytes,
              smem.dout_full(stage.index));
    first = false;
  }
}

// By one warp, of which a lane follows the counters; barriers carry what it has seen to the
// computing warps, and their sums to it.
DEVICE void keep_turns(const BackwardParams& p, const Work& work, GroupTiles walk) {
#pragma unroll 1
  for (; walk.valid(); walk.advance()) {
    u32* counter =
        p.turns + 1 + workspace_tile(p.problem, work.batch, walk.head, walk.tiles.current);
    if (lane_id() == 0)
      while (ld_acquire(counter) != walk.tiles.turn()) {
      }
    __syncwarp();
    named_barrier_arrive(kTurnBarrier, kTurnThreads);
    named_barrier_sync(kAddedBarrier, kTurnThreads);
    if (lane_id() == 0) red_release_add(counter, 1);
  }
}

// One computing warpgroup.
struct Consumer {
  const BackwardParamsSm90& p;
  const Work& work;
  const Mask& mask;
  const Storage& smem;
  const Scores scores;
  const int index;  // of the warpgroup
  KeyAcc dk;
  ValueAcc dv;
  Stage stage;
  bool dv_is_due = false;  // of the last step: it runs under this one's p and ds

  DEVICE Consumer(const BackwardParamsSm90& p, const Work& work, const Mask& mask,
                  const Storage& smem)
      : p(p),
        work(work),
        mask(mask),
        smem(smem),
        scores(p.call.problem),
        index(warpgroup_id() - 1) {}

  DEVICE void run(GroupTiles walk) {
    clear(dk);
    clear(dv);
    if (walk.valid()) {
      mbarrier_wait(smem.k_full(), 0);
      mbarrier_wait(smem.v_full(), 0);
    }
#pragma unroll 1
    for (; walk.valid(); walk.advance(), stage = stage.next()) {
      if (walk.tiles.partly_visible())
        step<true>(walk);
      else
        step<false>(walk);
    }
    if (dv_is_due) {
      start_dv(stage.previous());
      wgmma_wait<0>(dv);
    }
    store();
  }

 private:
  // The first of this warpgroup's part.
  DEVICE int first_query() const { return index * kQueries; }
  DEVICE int first_col() const { return index * kCols; }
  DEVICE int first_col_v() const { return index * kColsV; }

  // sᵀ = k qᵀ
  DEVICE void start_scores(ScoreAcc& s) {
    mbarrier_wait(smem.q_full(stage.index), stage.parity);
    const KTile k = smem.k();
    const QTile q = smem.q(stage.index);
    wgmma_fence(s);
    issue_gemm<kHeadDim / 16>(s, RowOperand<KTile>{k, 0}, RowOperand<QTile>{q, first_query()},
                              false);
    wgmma_commit();
  }

  // dpᵀ = v doutᵀ
  DEVICE void start_dp(ScoreAcc& dp) {
    mbarrier_wait(smem.dout_full(stage.index), stage.parity);
    const VTile v = smem.v();
    const DoutTile dout = smem.dout(stage.index);
    wgmma_fence(dp);
    issue_gemm<kHeadDimV / 16>(dp, RowOperand<VTile>{v, 0},
                               RowOperand<DoutTile>{dout, first_query()}, false);
    wgmma_commit();
  }

  // dv += pᵀ dout
  DEVICE void start_dv(const Stage& stage) {
    const ScoreTile probs = smem.probs(stage.index);
    const DoutTile dout = smem.dout(stage.index);
    wgmma_fence(dv);
    issue_gemm<kBlockQ / 16>(dv, RowOperand<ScoreTile>{probs, 0},
                             ColumnOperand<DoutTile>{dout, first_col_v()}, true);
    wgmma_commit();
  }

  // dk += dsᵀ q
  DEVICE void start_dk() {
    const ScoreTile ds = smem.ds(stage.index);
    const QTile q = smem.q(stage.index);
    wgmma_fence(dk);
    issue_gemm<kBlockQ / 16>(dk, RowOperand<ScoreTile>{ds, 0}, ColumnOperand<QTile>{q, first_col()},
                             true);
    wgmma_commit();
  }

  // dq = ds k
  DEVICE void start_dq(QueryAcc& dq) {
    const ScoreTile ds = smem.ds(stage.index);
    const KTile k = smem.k();
    wgmma_fence(dq);
    issue_gemm<kBlockKV / 16>(dq, ColumnOperand<ScoreTile>{ds, 0},
                              ColumnOperand<KTile>{k, first_col()}, false);
    wgmma_commit();
  }

  template <bool kPartly>
  DEVICE void step(const GroupTiles& walk) {
    const int tile = walk.tiles.current;
    Interval columns[2];
    if constexpr (kPartly) columns[0] = columns_of(0, tile), columns[1] = columns_of(1, tile);
    ScoreAcc s, dp;
    start_scores(s);
    start_dp(dp);
    if (dv_is_due)
      start_dv(stage.previous());
    else
      wgmma_commit();  // an empty group, so that the waits count alike
    wgmma_wait<2>(s);
    bool non_finite = false;
    if constexpr (kPartly) non_finite = any_non_finite(s);
    scores.transform(s);  // while dpᵀ is on its way
    if constexpr (!kSoftcap) differentiate<true, false>(s, dp);
    wgmma_wait<1>(dp, s);
    if constexpr (kPartly) non_finite |= any_non_finite(dp);
    differentiate<kSoftcap, true>(s, dp);  // a softcap's derivative needs s and dp at once
    if constexpr (kPartly) {
      hide(s, columns);
      hide(dp, columns);
    }
    store_scores(smem.probs(stage.index), s);
    store_scores(smem.ds(stage.index), dp);
    fence_proxy_async();
    wgmma_wait<0>(dv);
    if (dv_is_due) release(smem.dout_empty(stage.previous().index));

    QueryAcc dq;
    if constexpr (kPartly) {
      if (warp_uniform(named_barrier_or(kScoresBarrier, kThreads, non_finite))) {
        add_gradients(dq, columns, tile);
        release(smem.dout_empty(stage.index));
        release(smem.q_empty(stage.index));
        add_dq(dq, walk);
        dv_is_due = false;
        return;
      }
    } else {
      named_barrier_sync(kScoresBarrier, kThreads);
    }
    start_dq(dq);
    start_dk();
    wgmma_wait<1>(dq);
    add_dq(dq, walk);
    wgmma_wait<0>(dk);
    release(smem.q_empty(stage.index));
    dv_is_due = true;
  }

  // kProbs: s, transformed, becomes p. kGradients: dp becomes ds.
  template <bool kProbs, bool kGradients>
  DEVICE void differentiate(ScoreAcc& s, ScoreAcc& dp) const {
    constexpr int kFloat = sizeof(float);
    // Each in one register, to which the loads add constants.
    const u32 lse = opaque(smem.lse(stage.index) + (first_query() + acc_col(0, 0)) * kFloat);
    const u32 delta = opaque(smem.delta(stage.index) + (first_query() + acc_col(0, 0)) * kFloat);
#pragma unroll
    for (int n = 0; n < kQueries / 8; n++) {
      float2 lse_log2, deltas;
      if (kProbs) lse_log2 = ld_shared_f32x2(lse + 8 * n * kFloat);
      if (kGradients) deltas = ld_shared_f32x2(delta + 8 * n * kFloat);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float score = s[0][n][e];
        if (kProbs)
          s[0][n][e] = exp2_approx(score * scores.factor() - (e % 2 ? lse_log2.y : lse_log2.x));
        if (kGradients)
          dp[0][n][e] =
              s[0][n][e] * (dp[0][n][e] - (e % 2 ? deltas.y : deltas.x)) * scores.derivative(score);
      }
    }
  }

  // Of this thread's accumulators.
  static DEVICE bool any_non_finite(ScoreAcc& acc) {
    float sum = 0.f;  // 0 x is 0 or NaN
    for_each(acc, [&](float& x, int, int, int) { sum = fmaf(x, 0.f, sum); });
    return !(sum == 0.f);
  }

  // Columns of sᵀ whose queries see the key of accumulator row acc_row(0, 2 r), less acc_col(0, 0).
  DEVICE Interval columns_of(int r, int tile) const {
    const Interval queries =
        mask.positions_of_key(work.tile * kBlockKV + warpgroup_row() + acc_row(0, 2 * r));
    const int first = tile * kBlockQ + first_query() + acc_col(0, 0);
    return {opaque(queries.begin - first), opaque(queries.end - first)};
  }

  // What the mask forbids has no probability and no gradient.
  static DEVICE void hide(ScoreAcc& acc, const Interval (&columns)[2]) {
    for_each(acc, [&](float& x, int, int n, int e) {
      const int column = 8 * n + e % 2;
      if (column < columns[e / 2].begin || column >= columns[e / 2].end) x = 0.f;
    });
  }

  // In 16 bits, this warpgroup's queries.
  DEVICE void store_scores(const ScoreTile& tile, const ScoreAcc& scores) const {
    u32 fragments[1][kQueries / 16][4];
    pack_operand(fragments, scores);
    const int row = warpgroup_row() + lane_id() % 16;
    const int chunk = first_query() / 8 + lane_id() / 16;
#pragma unroll
    for (int k = 0; k < kQueries / 16; k++)
      stmatrix_x4(tile.chunk_address(row, chunk + 2 * k), fragments[0][k]);
  }

  // dv, dk and dq of visible pairs only, without the tensor cores.
  DEVICE void add_gradients(QueryAcc& dq, const Interval (&columns)[2], int tile) {
    const auto sees_query = [&](int r, int query) {
      const int column = query - first_query() - acc_col(0, 0);
      return columns[r].begin <= column && column < columns[r].end;
    };
    const ScoreTile probs = smem.probs(stage.index), ds = smem.ds(stage.index);
    const int row = warpgroup_row();
    add_visible(dv, TileLeft<false, ScoreTile>{probs, row}, smem.dout(stage.index), first_col_v(),
                sees_query);
    add_visible(dk, TileLeft<false, ScoreTile>{ds, row}, smem.q(stage.index), first_col(),
                sees_query);
    clear(dq);
    add_visible(dq, TileLeft<true, ScoreTile>{ds, row}, smem.k(), first_col(), [&](int r, int key) {
      return mask.visible(tile * kBlockQ + row + acc_row(0, 2 * r), work.tile * kBlockKV + key);
    });
  }

  // Each thread's sums where post's thread of the same QueryGrid part reads them.
  DEVICE void add_dq(const QueryAcc& dq, const GroupTiles& walk) const {
    const int part = warp_id() % 4 * QueryGrid::kWarpsN + index;
    const i64 tile = workspace_tile(p.call.problem, work.batch, walk.head, walk.tiles.current);
    float* sums =
        p.call.dq_acc + tile * kBlockQ * kHeadDim + (part * kWarpSize + lane_id()) * kSumFloats;
    if (kDeterministic) named_barrier_sync(kTurnBarrier, kTurnThreads);
#pragma unroll
    for (int n = 0; n < kCols / 8; n++) red_add(sums + n * kThreads * kSumFloats, dq[0][n]);
    if (kDeterministic) named_barrier_arrive(kAddedBarrier, kTurnThreads);
  }

  // dk and dv through shared memory, over k and v.
  DEVICE void store() const {
    const KTile dk_tile = smem.k();
    const VTile dv_tile = smem.v();
    named_barrier_sync(kScoresBarrier, kThreads);  // every warp has finished with k and v
    stage_gradient(dk_tile, first_col(), dk, p.call.problem.scale);
    stage_gradient(dv_tile, first_col_v(), dv, 1.f);
    fence_proxy_async();
    named_barrier_sync(kScoresBarrier, kThreads);
    if (warpgroup_thread() != 0) return;
    if (index == 0)
      store_panels(dk_tile, &p.dk, work.tile * kBlockKV, work.head, work.batch);
    else
      store_panels(dv_tile, &p.dv, work.tile * kBlockKV, work.head, work.batch);
    bulk_commit();
    bulk_wait_read();
  }

  template <class Tile, int kN>
  static DEVICE void stage_gradient(const Tile& tile, int first_col, const float (&acc)[1][kN][4],
                                    float scale) {
    const int row = warpgroup_row() + lane_id() % 16;
    const int chunk = first_col / 8 + lane_id() / 16;
#pragma unroll
    for (int k = 0; k < kN / 2; k++) {
      u32 pairs[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float (&quad)[4] = acc[0][2 * k + i / 2];
        pairs[i] = pack<Element>(quad[i % 2 * 2] * scale, quad[i % 2 * 2 + 1] * scale);
      }
      stmatrix_x4(tile.chunk_address(row, chunk + 2 * k), pairs);
    }
  }
};

extern "C" __global__ void __launch_bounds__(kBlockThreads, 1)
    flash_bwd(const __grid_constant__ BackwardParamsSm90 p) {
  extern __shared__ __align__(1024) u8 shared_memory[];
  const Storage smem{shared_address(shared_memory)};
  if (threadIdx.x == 0) {
    init_mbarriers(smem);
    if (kDeterministic) st_shared(smem.ticket(), atomic_add(p.call.turns, 1));
  }
  __syncthreads();

  const Work work = backward_work(
      p.call.problem, kDeterministic ? warp_uniform(ld_shared_u32(smem.ticket())) : blockIdx.x);
  const Mask mask(p.call.problem, work.batch);
  const GroupTiles walk(QueryTiles(mask, work.tile, kBlockQ, kBlockKV), work.head,
                        p.call.problem.group);
  if (warpgroup_id() == 0) {
    setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x == 0) load(p, work, mask, walk, smem);
    if (kDeterministic && warp_id() == 1) keep_turns(p.call, work, walk);
  } else {
    setmaxnreg_inc<kConsumerRegisters>();
    Consumer(p, work, mask, smem).run(walk);
  }
}
