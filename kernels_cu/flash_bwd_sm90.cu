// Gradients of attention on Hopper, for head sizes up to 128: wgmma, TMA, warp specialisation. The
// block, its barriers and its order are those of backward_sm90.cuh.
//
//   dv = pᵀ dout      dk = scale dsᵀ q     dq = scale ds k
//
// Each computing warpgroup has sᵀ, dpᵀ, dk and dv of 64 keys, and half of dq: half of the columns
// (kBlockQ = 64) or of the rows (kBlockQ = 128). The accumulators of sᵀ and dpᵀ are what wgmma
// wants as pᵀ and dsᵀ on the left; only ds, for dq, passes through shared memory, as [key][query]
// in two buffers by turns.
//
//   step      sᵀ and dpᵀ start | p, while dpᵀ runs | ds, while dv runs | dq and dk start |
//             dq to memory, while dk runs
//
// Shared memory, bytes:  k | v | kStages x q | kStages x dout | 2 x ds | stages of lse, delta | ...
//   = 2 (kBlockKV (D + Dv) + kStages kBlockQ (D + Dv + 8) + 2 kBlockKV kBlockQ) + mbarriers, ticket
// dk and dv are staged over k and v at the end.
//
// Registers of a computing thread, of 240: dk and dv (D + Dv) / 2; then sᵀ, dpᵀ kBlockQ and pᵀ
// kBlockQ / 4, or dq 32, pᵀ and dsᵀ kBlockQ / 2. The next sᵀ has no room beside them.
#include "backward_sm90.cuh"
#include "hidden.cuh"

constexpr int kBlockKV = 128;

// This warpgroup's part of dq.
constexpr bool kSplitColumns = kBlockQ == kWarpgroupRows;
constexpr int kDqCols = kSplitColumns ? kHeadDim / kConsumers : kHeadDim;
static_assert(kSplitColumns || kBlockQ == kConsumers * kWarpgroupRows, "64 rows of dq each");

typedef Panels<kBlockKV, kHeadDim, smaller(kDqCols, 64)> KTile;
typedef Panels<kBlockKV, kHeadDimV> VTile;
typedef Panels<kBlockQ, kHeadDim> QTile;
typedef Panels<kBlockQ, kHeadDimV> DoutTile;
typedef Panels<kBlockKV, kBlockQ> DsTile;
typedef Panels<kWarpgroupRows, kHeadDim> DkTile;  // of one warpgroup
typedef Panels<kWarpgroupRows, kHeadDimV> DvTile;

typedef u32 ScoreOperand[1][kBlockQ / 16][4];  // pᵀ, dsᵀ
typedef float KeyAcc[1][kHeadDim / 8][4];      // dk
typedef float ValueAcc[1][kHeadDimV / 8][4];   // dv
typedef float QueryAcc[1][kDqCols / 8][4];     // dq

typedef BackwardStorage<KTile, VTile, QTile, DoutTile, DsTile, false> Storage;

constexpr int kStagingBarrier = kFirstFreeBarrier;  // and the next: one for each warpgroup

// One computing warpgroup.
struct Consumer : BackwardConsumer<Storage> {
  KeyAcc dk;
  ValueAcc dv;

  DEVICE Consumer(const BackwardParamsSm90& p, const Work& work, const Mask& mask,
                  const Storage& smem)
      : BackwardConsumer(p, work, mask, smem) {
    clear(dk);
    clear(dv);
  }

  // Of this warpgroup's part of dq.
  DEVICE int dq_row() const { return kSplitColumns ? 0 : index * kWarpgroupRows; }
  DEVICE int dq_col() const { return kSplitColumns ? index * kDqCols : 0; }

  template <bool kPartly>
  DEVICE void step(const GroupTiles& walk) {
    Visible visible;
    if constexpr (kPartly && !kHasTree) look(walk, visible);
    ScoreAcc s, dp;
    start_scores(s);
    start_dp(dp);
    if constexpr (kPartly && kHasTree) look(walk, visible);  // takes long: while these run
    const bool non_finite = finish_scores<kPartly, 0>(s, dp, walk, visible);
    ScoreOperand probs, ds;
    pack_operand(probs, s);
    pack_operand(ds, dp);
    if (!kPartly) start_dv(probs);
    store_ds(ds);
    fence_proxy_async();

    QueryAcc dq;
    if constexpr (kPartly) {
      // Nothing of this tile is in flight here.
      if (warp_uniform(named_barrier_or(kScoresBarrier, kThreads, non_finite))) {
        add_gradients(dq, probs, walk, visible);
        release(smem.dout_empty(stage.index));
        release(smem.q_empty(stage.index));
        add_dq(dq, dq_row(), dq_col(), walk);
        return;
      }
      start_dv(probs);
    } else {
      named_barrier_sync(kScoresBarrier, kThreads);
    }
    start_dq(dq);
    wgmma_wait<1>(dv, probs);
    release_read(smem.dout_empty(stage.index));
    start_dk(ds);
    wgmma_wait<1>(dq);
    add_dq(dq, dq_row(), dq_col(), walk);
    wgmma_wait<0>(dk, ds);
    release_read(smem.q_empty(stage.index));
  }

  // dk and dv through shared memory, over k and v.
  DEVICE void finish() const {
    const DkTile dk_tile{smem.k().base + index * DkTile::kBytes};
    const DvTile dv_tile{smem.v().base + index * DvTile::kBytes};
    named_barrier_sync(kScoresBarrier, kThreads);  // every warp has finished with k and v
    stage_gradient(dk_tile, 0, dk, p.call.problem.scale);
    stage_gradient(dv_tile, 0, dv, kept_scale(p.call.problem));
    fence_proxy_async();
    named_barrier_sync(kStagingBarrier + index, kWarpgroupThreads);
    if (warpgroup_thread() != 0) return;
    const int first_row = work.tile * kBlockKV + first_key();
    store_panels(dk_tile, &p.dk, p.call.problem, p.call.dk, mask.k_start + first_row, mask.k_end(),
                 work.head, mask.array_batch());
    store_panels(dv_tile, &p.dv, p.call.problem, p.call.dv, mask.k_start + first_row, mask.k_end(),
                 work.head, mask.array_batch());
    bulk_commit();
    bulk_wait_read();
  }

 private:
  // dv += pᵀ dout
  DEVICE void start_dv(ScoreOperand& probs) {
    const DoutTile dout = smem.dout(stage.index);
    wgmma_fence(dv, probs);
    issue_gemm<kBlockQ / 16>(dv, probs, ColumnOperand<DoutTile>{dout, 0}, true);
    wgmma_commit();
  }

  // dk += dsᵀ q
  DEVICE void start_dk(ScoreOperand& ds) {
    const QTile q = smem.q(stage.index);
    wgmma_fence(dk, ds);
    issue_gemm<kBlockQ / 16>(dk, ds, ColumnOperand<QTile>{q, 0}, true);
    wgmma_commit();
  }

  // dq = ds k
  DEVICE void start_dq(QueryAcc& dq) {
    const DsTile ds = smem.ds(stage.index);
    const KTile k = smem.k();
    wgmma_fence(dq);
    issue_gemm<kBlockKV / 16>(dq, ColumnOperand<DsTile>{ds, dq_row()},
                              ColumnOperand<KTile>{k, dq_col()}, false);
    wgmma_commit();
  }

  DEVICE void store_ds(const ScoreOperand& operand) const {
    store_scores(smem.ds(stage.index), first_key(), 0, operand);
  }

  // dv, dk and dq of visible pairs only, without the tensor cores; pᵀ takes the place of dsᵀ.
  DEVICE void add_gradients(QueryAcc& dq, const ScoreOperand& probs, const GroupTiles& walk,
                            const Visible& visible) {
    const auto sees = [&](int r, int query) { return sees_query(walk, visible, r, query); };
    const DsTile ds_tile = smem.ds(stage.index);
    const TileLeft<false, DsTile> of_key{ds_tile, first_key() + warpgroup_row()};
    add_visible(dk, of_key, smem.q(stage.index), 0, sees);
    const int first_row = dq_row() + warpgroup_row();
    clear(dq);
    add_visible(dq, TileLeft<true, DsTile>{ds_tile, first_row}, smem.k(), dq_col(),
                [&](int r, int key) {
                  const int query = walk.tiles.current * kBlockQ + first_row + acc_row(0, 2 * r);
                  return sees_key(walk, query, key);
                });
    named_barrier_sync(kScoresBarrier, kThreads);  // every warp has finished with dsᵀ
    store_ds(probs);
    __syncwarp();
    add_visible(dv, of_key, smem.dout(stage.index), 0, sees);
  }
};

extern "C" __global__ void __launch_bounds__(kBlockThreads, 1)
    flash_bwd(const __grid_constant__ BackwardParamsSm90 p) {
  extern __shared__ __align__(1024) u8 shared_memory[];
  run_block<Consumer>(p, Storage{shared_address(shared_memory)});
}
