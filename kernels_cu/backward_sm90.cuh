// What Hopper's two backward kernels share: the block's shared memory, its producer and its turns,
// how it walks over query tiles, and what a computing warpgroup does to sᵀ and dpᵀ.
//
//   s = scale q kᵀ    p = exp2(s - lse)    dp = dout vᵀ    ds = p (dp - delta)
//
// In partly visible tiles p = exp(s - max) / sum, by two statistics of a row. A block for one of
// whose rows lse is too coarse (prep looks for such scores) takes every tile for partly visible.
//
// One block per (key tile, key head, batch entry). It walks over the query heads of the group and,
// in each, over the query tiles that see its keys: dk and dv of the group are summed in registers,
// dq tiles are added to dq_acc, float32, in global memory.
//
// Warpgroup 0: warp 0 loads, warp 1 keeps the turns, both with one lane, the others have nothing to
// do. Warpgroups 1 and 2 compute: the kernel's Consumer, step() for each tile, then finish().
//
// mbarriers: q (with its rows' statistics) and dout (with delta) each have a ring of kStages, full
// by the bytes of TMA, empty by one arrival of each computing warp; k and v are loaded once. Named
// barriers: p or ds is written, this tile's turn has come, its sums are added.
//
// Deterministic: blocks take their work from a counter and add to a query tile in the order of
// their key tiles, each waiting for its turn. A block only waits for blocks that took their work
// earlier, so they are running, and the earliest unfinished one waits for nobody. Warp 1 watches
// the counter, so that the computing warps meet a barrier that is usually open.
//
// A run of fully visible tiles has a loop of its own, as in the forward. Partly visible tiles hide
// what the mask forbids. If in one of them s or dp is not finite, in
// either warpgroup (a vote on the barrier of the scores), its dv, dk and dq are summed without the
// tensor cores (hidden.cuh): every inf and NaN of q, k and dout shows in s or dp.
//
// Method: FlashAttention-3 (Shah et al. 2024); dq goes to memory from registers, without staging.
#pragma once
#ifndef QUERY_WARPS
#define QUERY_WARPS 4
#endif
#ifndef SUM_FLOATS
#define SUM_FLOATS 4
#endif
#include "backward.cuh"
#include "dropout.cuh"
#include "schedule.cuh"
#include "scores.cuh"
#include "warpgroup.cuh"

#ifndef DETERMINISTIC
#define DETERMINISTIC 1
#endif

constexpr bool kDeterministic = DETERMINISTIC;
// Registers are left neither for a second loop nor for what could be kept from tile to tile.
constexpr bool kFewRegisters = kHasTerms || kSoftcap;
constexpr int kStages = 2;
constexpr int kConsumers = 2;
constexpr int kBlockThreads = (1 + kConsumers) * kWarpgroupThreads;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
static_assert(kWarps == kConsumers * 4, "post has the threads of the computing warps");
static_assert(kSumFloats == 4, "post reads what these kernels add");
#ifdef MAPPED_PARAMS_BYTES
static_assert(sizeof(BackwardParamsSm90) == MAPPED_PARAMS_BYTES,
              "BackwardParamsSm90 differs from the packed one");
#endif

enum NamedBarrier { kScoresBarrier = 1, kTurnBarrier, kAddedBarrier, kFirstFreeBarrier };
constexpr int kTurnThreads = kThreads + kWarpSize;  // the computing warps and the one of the turns

constexpr int kStatBytes = kBlockQ * sizeof(float);
constexpr int kMbarrierBytes = 8;

// Where everything stands in shared memory. ScoreTile is ds, in two buffers, and with kStoresProbs
// also p.
template <class KTile_, class VTile_, class QTile_, class DoutTile_, class ScoreTile,
          bool kStoresProbs>
struct BackwardStorage {
  typedef KTile_ KTile;
  typedef VTile_ VTile;
  typedef QTile_ QTile;
  typedef DoutTile_ DoutTile;

  u32 base;
  static constexpr int kV = KTile::kBytes;
  static constexpr int kQ = kV + VTile::kBytes;
  static constexpr int kDout = kQ + kStages * QTile::kBytes;
  static constexpr int kProbs = kDout + kStages * DoutTile::kBytes;
  static constexpr int kDs = kProbs + (kStoresProbs ? 2 * ScoreTile::kBytes : 0);
  static constexpr int kLse = kDs + 2 * ScoreTile::kBytes;
  static constexpr int kDelta = kLse + kStages * kRowStats * kStatBytes;
  static constexpr int kMbarriers = kDelta + kStages * kStatBytes;
  static constexpr int kTicket = kMbarriers + (2 + 4 * kStages) * kMbarrierBytes;
  static constexpr int kBytes = kTicket + 8;
#ifdef SMEM_BYTES
  static_assert(kBytes == SMEM_BYTES, "shared memory differs from the plan's");
#endif

  DEVICE KTile k() const { return {base}; }
  DEVICE VTile v() const { return {base + kV}; }
  DEVICE QTile q(int stage) const { return {base + kQ + stage * QTile::kBytes}; }
  DEVICE DoutTile dout(int stage) const { return {base + kDout + stage * DoutTile::kBytes}; }
  DEVICE ScoreTile probs(int buffer) const {
    static_assert(kStoresProbs, "p stays in registers");
    return {base + kProbs + buffer * ScoreTile::kBytes};
  }
  DEVICE ScoreTile ds(int buffer) const { return {base + kDs + buffer * ScoreTile::kBytes}; }
  // Then the largest scores and the sums.
  DEVICE u32 lse(int stage) const { return base + kLse + stage * kRowStats * kStatBytes; }
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

template <class Storage>
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
template <class Storage>
DEVICE void load(const BackwardParamsSm90& p, const Work& work, const Mask& mask, GroupTiles walk,
                 const Storage& smem) {
  const Problem& problem = p.call.problem;
  const int first_key = work.tile * Storage::KTile::kRows;
  bool first = true;
  Stage<kStages> stage;
#pragma unroll 1
  for (; walk.valid(); walk.advance(), stage = stage.next()) {
    const int first_row = walk.tiles.current * kBlockQ;
    const i64 stats = workspace_tile(problem, work.batch, walk.head, walk.tiles.current) * kBlockQ;
    if (first) {
      mbarrier_arrive_expect(smem.k_full(), Storage::KTile::kBytes);
      load_panels(smem.k(), &p.k, smem.k_full(), p.call.problem, p.call.k, mask.k_start + first_key,
                  mask.k_end(), work.head, mask.array_batch());
    }
    mbarrier_wait(smem.q_empty(stage.index), stage.parity ^ 1);
    mbarrier_arrive_expect(smem.q_full(stage.index),
                           Storage::QTile::kBytes + kRowStats * kStatBytes);
    load_panels(smem.q(stage.index), &p.q, smem.q_full(stage.index), p.call.problem, p.call.q,
                mask.q_start + first_row, mask.q_end(), walk.head, mask.array_batch());
    bulk_load(smem.lse(stage.index), p.call.row_stats + kRowStats * stats, kRowStats * kStatBytes,
              smem.q_full(stage.index));
    if (first) {
      mbarrier_arrive_expect(smem.v_full(), Storage::VTile::kBytes);
      load_panels(smem.v(), &p.v, smem.v_full(), p.call.problem, p.call.v, mask.k_start + first_key,
                  mask.k_end(), work.head, mask.array_batch());
    }
    mbarrier_wait(smem.dout_empty(stage.index), stage.parity ^ 1);
    mbarrier_arrive_expect(smem.dout_full(stage.index), Storage::DoutTile::kBytes + kStatBytes);
    load_panels(smem.dout(stage.index), &p.dout, smem.dout_full(stage.index), p.call.problem,
                p.call.dout, mask.q_start + first_row, mask.q_end(), walk.head, mask.array_batch());
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
    if (lane_id() == 0) await(counter, walk.tiles.turn());
    __syncwarp();
    named_barrier_arrive(kTurnBarrier, kTurnThreads);
    named_barrier_sync(kAddedBarrier, kTurnThreads);
    if (lane_id() == 0) red_release_add(counter, 1);
  }
}

// Of this thread's accumulators.
template <int kN>
DEVICE bool any_non_finite(float (&acc)[1][kN][4]) {
  float sum = 0.f;  // 0 x is 0 or NaN
  for_each(acc, [&](float& x, int, int, int) { sum = fmaf(x, 0.f, sum); });
  return !(sum == 0.f);
}

// What a thread's accumulators of sᵀ may keep: those that the mask does not forbid.
template <bool kByPair>
struct VisibleOf {
  u64 bits;  // Places::visible
};
template <>
struct VisibleOf<false> {
  Interval columns[2];  // of accumulator row acc_row(0, 2 r), less acc_col(0, 0)
};
typedef VisibleOf<kHasTree> Visible;

// What the mask forbids has no probability and no gradient.
template <int kN>
DEVICE void hide(float (&acc)[1][kN][4], const VisibleOf<false>& visible) {
  for_each(acc, [&](float& x, int, int n, int e) {
    const int column = 8 * n + e % 2;
    if (column < visible.columns[e / 2].begin || column >= visible.columns[e / 2].end) x = 0.f;
  });
}
template <int kN>
DEVICE void hide(float (&acc)[1][kN][4], const VisibleOf<true>& visible) {
  for_each(acc, [&](float& x, int m, int n, int e) {
    if (!bit_of<1>(visible.bits, m, n, e)) x = 0.f;
  });
}

// A warpgroup's 64 rows in 16 bits to a tile, from (first_row, first_col) on.
template <class Tile, int kK>
DEVICE void store_scores(const Tile& tile, int first_row, int first_col,
                         const u32 (&scores)[1][kK][4]) {
  const int row = first_row + warpgroup_row() + lane_id() % 16;
  const int chunk = first_col / 8 + lane_id() / 16;
#pragma unroll
  for (int k = 0; k < kK; k++) stmatrix_x4(tile.chunk_address(row, chunk + 2 * k), scores[0][k]);
}

// scale acc in 16 bits to a tile of 64 rows, from column first_col on.
template <class Tile, int kN>
DEVICE void stage_gradient(const Tile& tile, int first_col, const float (&acc)[1][kN][4],
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

// One computing warpgroup up to p and ds. Two divide the keys of sᵀ and dpᵀ, 64 each, or, where
// there are only 64, the queries.
template <class Storage>
struct BackwardConsumer {
  static constexpr int kBlockKV = Storage::KTile::kRows;
  static constexpr bool kDivideKeys = kBlockKV == kConsumers * kWarpgroupRows;
  static constexpr int kQueries = kDivideKeys ? kBlockQ : kBlockQ / kConsumers;
  static_assert(kDivideKeys || kBlockKV == kWarpgroupRows, "64 rows of sᵀ for each warpgroup");
  typedef float ScoreAcc[1][kQueries / 8][4];  // sᵀ, dpᵀ

  const BackwardParamsSm90& p;
  const Work& work;
  const Mask& mask;
  const Storage& smem;
  const Scores scores;
  const Dropout dropout;
  const int index;  // of the warpgroup
  Stage<kStages> stage;

  DEVICE BackwardConsumer(const BackwardParamsSm90& p, const Work& work, const Mask& mask,
                          const Storage& smem)
      : p(p),
        work(work),
        mask(mask),
        smem(smem),
        scores(p.call.problem),
        dropout(p.call.problem),
        index(warpgroup_id() - 1) {}

  // Before the first tile of a head; this warpgroup's part of dq begins at (row, col) of the tiles.
  DEVICE void begin_head(int head, int row, int col) {
    if (!kFewRegisters) first_sums = sums_of(head, row, col);
  }

 protected:
  float* first_sums;  // sums_of() a head; terms need the registers, and it is computed at each tile

  // Of this thread, in dq_acc's first tile of a head: where post's thread of the same QueryGrid
  // part reads them.
  DEVICE float* sums_of(int head, int row, int col) const {
    const int part = (row / 16 + warp_id() % 4) * QueryGrid::kWarpsN + col / (8 * QueryGrid::kN);
    const i64 tile = workspace_tile(p.call.problem, work.batch, head, 0);
    return p.call.dq_acc + tile * kBlockQ * kHeadDim + (part * kWarpSize + lane_id()) * kSumFloats;
  }

  // The first of this warpgroup's part of sᵀ and dpᵀ, in the tiles.
  DEVICE int first_key() const { return kDivideKeys ? index * kWarpgroupRows : 0; }
  DEVICE int first_query() const { return kDivideKeys ? 0 : index * kQueries; }

  // sᵀ = k qᵀ
  DEVICE void start_scores(ScoreAcc& s) {
    typedef typename Storage::KTile KTile;
    typedef typename Storage::QTile QTile;
    mbarrier_wait(smem.q_full(stage.index), stage.parity);
    const KTile k = smem.k();
    const QTile q = smem.q(stage.index);
    wgmma_fence(s);
    issue_gemm<kHeadDim / 16>(s, RowOperand<KTile>{k, first_key()},
                              RowOperand<QTile>{q, first_query()}, false);
    wgmma_commit();
  }

  // dpᵀ = v doutᵀ
  DEVICE void start_dp(ScoreAcc& dp) {
    typedef typename Storage::VTile VTile;
    typedef typename Storage::DoutTile DoutTile;
    mbarrier_wait(smem.dout_full(stage.index), stage.parity);
    const VTile v = smem.v();
    const DoutTile dout = smem.dout(stage.index);
    wgmma_fence(dp);
    issue_gemm<kHeadDimV / 16>(dp, RowOperand<VTile>{v, first_key()},
                               RowOperand<DoutTile>{dout, first_query()}, false);
    wgmma_commit();
  }

  DEVICE Places<true> places(const GroupTiles& walk) const {
    return {mask, walk.head, walk.tiles.current * kBlockQ + first_query(),
            work.tile * kBlockKV + first_key() + warpgroup_row()};
  }

  // The products s and dp, of which dp and kLater more groups are in flight, become p, after
  // dropout, and ds. Whether this thread's s or dp of a partly visible tile was not finite.
  template <bool kPartly, int kLater>
  DEVICE bool finish_scores(ScoreAcc& s, ScoreAcc& dp, const GroupTiles& walk,
                            const Visible& visible) const {
    u64 kept = 0;
    if (kDropout) kept = dropout.template kept<1, kQueries / 8>(places(walk));
    wgmma_wait<kLater + 1>(s);
    bool non_finite = false;
    if constexpr (kPartly) non_finite = any_non_finite(s);
    // A softcap's and the terms' derivatives need s and dp at once.
    constexpr bool kAtOnce = kSoftcap || kHasTerms;
    if constexpr (!kHasTerms) scores.transform(s, places(walk));  // while dpᵀ is on its way
    if constexpr (!kAtOnce) differentiate<kPartly, true, false>(s, dp, walk, kept);
    wgmma_wait<kLater>(dp, s);
    if constexpr (kPartly) non_finite |= any_non_finite(dp);
    differentiate<kPartly, kAtOnce, true>(s, dp, walk, kept);
    if constexpr (kPartly) {
      hide(s, visible);
      hide(dp, visible);
    }
    return non_finite;
  }

  // kProbs: s, transformed unless it has terms, becomes p. kGradients: dp becomes ds.
  // kByTwo: by the two statistics of the rows, else by lse.
  template <bool kByTwo, bool kProbs, bool kGradients>
  DEVICE void differentiate(ScoreAcc& s, ScoreAcc& dp, const GroupTiles& walk, u64 kept) const {
    constexpr int kFloat = sizeof(float);
    // Each in one register, to which the loads add constants.
    const u32 lse = opaque(smem.lse(stage.index) + (first_query() + acc_col(0, 0)) * kFloat);
    const u32 delta = opaque(smem.delta(stage.index) + (first_query() + acc_col(0, 0)) * kFloat);
    const Places<true> own = places(walk).opaque_if(kHasTerms);
#pragma unroll
    for (int n = 0; n < kQueries / 8; n++) {
      const auto of_query = [](const float2& pair, int e) { return e % 2 ? pair.y : pair.x; };
      // From the derivative on, which is at hand only here: ds is p times what dp becomes.
      float2 deltas;
      if constexpr (kGradients) deltas = ld_shared_f32x2(delta + 8 * n * kFloat);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float& p = s[0][n][e];
        float& ds = dp[0][n][e];
        float derivative = scores.derivative(p);
        if constexpr (kProbs && kHasTerms) p = scores.with_terms(p, own.at(0, n, e), derivative);
        if constexpr (kGradients && kDropout) ds = dropout.gradient(ds, bit_of<1>(kept, 0, n, e));
        if constexpr (kGradients) ds = (ds - of_query(deltas, e)) * derivative;
      }
      if constexpr (kProbs && kByTwo) {
        const float2 row_max = ld_shared_f32x2(lse + kStatBytes + 8 * n * kFloat);
#pragma unroll
        for (int e = 0; e < 4; e++)
          s[0][n][e] = below_largest(scores.score(s[0][n][e]), of_query(row_max, e));
      }
      if constexpr (kProbs) {
        const float slope = kByTwo ? kLog2e : scores.unit_log2();
        const float2 shifts = ld_shared_f32x2(lse + (kByTwo ? 2 * kStatBytes : 0) + 8 * n * kFloat);
#pragma unroll
        for (int e = 0; e < 4; e++)
          s[0][n][e] = exp2_approx(s[0][n][e] * slope - of_query(shifts, e));
      }
      if constexpr (kGradients) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          dp[0][n][e] *= s[0][n][e];
          if (kDropout && !bit_of<1>(kept, 0, n, e)) s[0][n][e] = 0.f;
        }
      }
    }
  }

  DEVICE void look(const GroupTiles& walk, VisibleOf<true>& visible) const {
    visible.bits = places(walk).template visible<1, kQueries / 8>();
  }
  DEVICE void look(const GroupTiles& walk, VisibleOf<false>& visible) const {
#pragma unroll
    for (int r = 0; r < 2; r++) visible.columns[r] = columns_of(r, walk.tiles.current);
  }

  // Columns of sᵀ whose queries see the key of accumulator row acc_row(0, 2 r), less acc_col(0, 0).
  DEVICE Interval columns_of(int r, int tile) const {
    const Interval queries = mask.positions_of_key(work.tile * kBlockKV + first_key() +
                                                   warpgroup_row() + acc_row(0, 2 * r));
    const int first = tile * kBlockQ + first_query() + acc_col(0, 0);
    return {opaque(queries.begin - first), opaque(queries.end - first)};
  }

  // Whether the key of accumulator row acc_row(0, 2 r) sees row `query` of the tile.
  DEVICE bool sees_query(const GroupTiles& walk, const VisibleOf<true>&, int r, int query) const {
    const int key = work.tile * kBlockKV + first_key() + warpgroup_row() + acc_row(0, 2 * r);
    return mask.visible(walk.head, walk.tiles.current * kBlockQ + query, key);
  }
  DEVICE bool sees_query(const GroupTiles&, const VisibleOf<false>& visible, int r,
                         int query) const {
    const int column = query - first_query() - acc_col(0, 0);
    return visible.columns[r].begin <= column && column < visible.columns[r].end;
  }

  // Whether row `query` of the array sees row `key` of the tile.
  DEVICE bool sees_key(const GroupTiles& walk, int query, int key) const {
    return mask.visible(walk.head, query, work.tile * kBlockKV + key);
  }

  // dq from (row, col) of the tile on.
  template <int kN>
  DEVICE void add_dq(const float (&dq)[1][kN][4], int row, int col, const GroupTiles& walk) const {
    static_assert(kN == QueryGrid::kN, "post reads what this kernel adds");
    float* first = kFewRegisters ? sums_of(walk.head, row, col) : first_sums;
    float* sums = first + walk.tiles.current * (i64)(kBlockQ * kHeadDim);
    if (kDeterministic) named_barrier_sync(kTurnBarrier, kTurnThreads);
#pragma unroll
    for (int n = 0; n < kN; n++) red_add(sums + n * kThreads * kSumFloats, dq[0][n]);
    if (kDeterministic) named_barrier_arrive(kAddedBarrier, kTurnThreads);
  }
};

// A kernel's body: its warpgroups take their roles.
template <class Consumer, class Storage>
DEVICE void run_block(const BackwardParamsSm90& p, const Storage& smem) {
  if (threadIdx.x == 0) {
    init_mbarriers(smem);
    if (kDeterministic) st_shared(smem.ticket(), atomic_add(p.call.turns, 1));
  }
  __syncthreads();

  const Work work = backward_work(
      p.call.problem, kDeterministic ? warp_uniform(ld_shared_u32(smem.ticket())) : blockIdx.x);
  if (!work.exists()) return;
  const Mask mask(p.call.problem, work.batch);
  GroupTiles walk(
      QueryTiles(mask, work.head * p.call.problem.group, work.tile, kBlockQ, Storage::KTile::kRows),
      work.head, p.call.problem.group);
  if (warpgroup_id() == 0) {
    setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x == 0) load(p, work, mask, walk, smem);
    if (kDeterministic && warp_id() == 1) keep_turns(p.call, work, walk);
  } else {
    setmaxnreg_inc<kConsumerRegisters>();
    Consumer consumer(p, work, mask, smem);
    if (walk.valid()) {
      mbarrier_wait(smem.k_full(), 0);
      mbarrier_wait(smem.v_full(), 0);
    }
    const int group = p.call.problem.group;
    const bool large = warp_uniform(any_large(p.call, mask, work.head * group, group));
    // A run of fully visible tiles of a head has a loop of its own, of few instructions.
    const auto stays_full = [&] {
      if (kFewRegisters) return false;
      return kHasTree ? (bool)warp_uniform(walk.tiles.stay_full()) : walk.tiles.stay_full();
    };
#pragma unroll 1
    while (walk.valid()) {
      consumer.begin_head(walk.head, consumer.dq_row(), consumer.dq_col());
      // Opaque: two copies of the loops, one for each answer, would spill.
      if (opaque(large) || warp_uniform(walk.tiles.partly_visible())) {
        consumer.template step<true>(walk);
        consumer.stage = consumer.stage.next();
        walk.advance();
        continue;
      }
#pragma unroll 1
      do {
        consumer.template step<false>(walk);
        consumer.stage = consumer.stage.next();
        walk.tiles.advance();
      } while (stays_full());
      walk.settle();
    }
    consumer.finish();
  }
}
