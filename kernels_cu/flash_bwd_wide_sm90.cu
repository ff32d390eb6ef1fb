// Gradients of attention on Hopper, for head sizes up to 256 with D or Dv above 128: wgmma, TMA,
// warp specialisation. The block, its barriers and its order are those of backward_sm90.cuh.
//
//   dv = pᵀ dout      dk = scale dsᵀ q     dq = scale ds k
//
// dk and dv of 64 keys are too wide for one warpgroup's registers, so two divide their columns, and
// those of dq; each then needs p and ds whole. Each computing warpgroup has sᵀ and dpᵀ of all keys
// and half of the queries, which pass in 16 bits through shared memory, [key][query], in two
// buffers by turns; then half of the columns of dv, dq and dk.
//
//   step      sᵀ, dpᵀ and the last step's dv start | p, while dpᵀ runs | ds, while dv runs |
//             barrier | dq and dk start | dq to memory, while dk runs
//
// Shared memory, bytes:  k | v | kStages x q | kStages x dout | 2 x p | 2 x ds | lse, delta | ...
//   = 2 (kBlockKV (D + Dv) + kStages kBlockQ (D + Dv + 8) + 4 kBlockKV kBlockQ) + mbarriers, ticket
// dk and dv are staged over k and v at the end.
//
// Registers of a computing thread, of 240: dk and dv (D + Dv) / 4; then sᵀ and dpᵀ 16 each, or dq
// D / 4.
#ifndef HEAD_DIM
#define HEAD_DIM 256
#endif
#ifndef HEAD_DIM_V
#define HEAD_DIM_V 256
#endif
#include "backward_sm90.cuh"
#include "hidden.cuh"

constexpr int kBlockKV = 64;
static_assert(kBlockKV == kWarpgroupRows && kBlockQ == kWarpgroupRows, "the rows of each product");

// This warpgroup's part of dq, dk and dv.
constexpr int kCols = kHeadDim / kConsumers, kColsV = kHeadDimV / kConsumers;

// Such a part is whole panels.
template <int kRows, int kTileCols>
using Tile = Panels<kRows, kTileCols, kTileCols / kConsumers % 64 == 0 ? 64 : 32>;
typedef Tile<kBlockKV, kHeadDim> KTile;
typedef Tile<kBlockKV, kHeadDimV> VTile;
typedef Tile<kBlockQ, kHeadDim> QTile;
typedef Tile<kBlockQ, kHeadDimV> DoutTile;
typedef Panels<kBlockKV, kBlockQ> ScoreTile;  // p or ds

typedef float KeyAcc[1][kCols / 8][4];     // dk
typedef float ValueAcc[1][kColsV / 8][4];  // dv
typedef float QueryAcc[1][kCols / 8][4];   // dq

typedef BackwardStorage<KTile, VTile, QTile, DoutTile, ScoreTile, true> Storage;

// One computing warpgroup.
struct Consumer : BackwardConsumer<Storage> {
  KeyAcc dk;
  ValueAcc dv;
  bool dv_is_due = false;  // of the last step: it runs under this one's p and ds

  DEVICE Consumer(const BackwardParamsSm90& p, const Work& work, const Mask& mask,
                  const Storage& smem)
      : BackwardConsumer(p, work, mask, smem) {
    clear(dk);
    clear(dv);
  }

  // Of this warpgroup's part of dq.
  DEVICE int dq_row() const { return 0; }
  DEVICE int dq_col() const { return first_col(); }

  template <bool kPartly>
  DEVICE void step(const GroupTiles& walk) {
    Visible visible;
    if constexpr (kPartly && !kHasTree) look(walk, visible);
    ScoreAcc s, dp;
    start_scores(s);
    start_dp(dp);
    if constexpr (kPartly && kHasTree) look(walk, visible);  // takes long: while these run
    if (dv_is_due)
      start_dv(stage.previous().index);
    else
      wgmma_commit();  // an empty group, so that the waits count alike
    const bool non_finite = finish_scores<kPartly, 1>(s, dp, walk, visible);
    store_part(smem.probs(stage.index), s);
    store_part(smem.ds(stage.index), dp);
    fence_proxy_async();
    wgmma_wait<0>(dv);
    if (dv_is_due) release_read(smem.dout_empty(stage.previous().index));

    QueryAcc dq;
    if constexpr (kPartly) {
      if (warp_uniform(named_barrier_or(kScoresBarrier, kThreads, non_finite))) {
        add_gradients(dq, walk, visible);
        release(smem.dout_empty(stage.index));
        release(smem.q_empty(stage.index));
        add_dq(dq, dq_row(), dq_col(), walk);
        dv_is_due = false;
        return;
      }
    } else {
      named_barrier_sync(kScoresBarrier, kThreads);
    }
    start_dq(dq);
    start_dk();
    wgmma_wait<1>(dq);
    add_dq(dq, dq_row(), dq_col(), walk);
    wgmma_wait<0>(dk);
    release_read(smem.q_empty(stage.index));
    dv_is_due = true;
  }

  // dk and dv through shared memory, over k and v.
  DEVICE void finish() {
    if (dv_is_due) {
      start_dv(stage.previous().index);
      wgmma_wait<0>(dv);
    }
    const KTile dk_tile = smem.k();
    const VTile dv_tile = smem.v();
    named_barrier_sync(kScoresBarrier, kThreads);  // every warp has finished with k and v
    stage_gradient(dk_tile, first_col(), dk, p.call.problem.scale);
    stage_gradient(dv_tile, first_col_v(), dv, kept_scale(p.call.problem));
    fence_proxy_async();
    named_barrier_sync(kScoresBarrier, kThreads);
    if (warpgroup_thread() != 0) return;
    if (index == 0)
      store_panels(dk_tile, &p.dk, p.call.problem, p.call.dk, mask.k_start + work.tile * kBlockKV,
                   mask.k_end(), work.head, mask.array_batch());
    else
      store_panels(dv_tile, &p.dv, p.call.problem, p.call.dv, mask.k_start + work.tile * kBlockKV,
                   mask.k_end(), work.head, mask.array_batch());
    bulk_commit();
    bulk_wait_read();
  }

 private:
  // The first of this warpgroup's part of dq, dk and dv.
  DEVICE int first_col() const { return index * kCols; }
  DEVICE int first_col_v() const { return index * kColsV; }

  // dv += pᵀ dout
  DEVICE void start_dv(int stage) {
    const ScoreTile probs = smem.probs(stage);
    const DoutTile dout = smem.dout(stage);
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

  // In 16 bits, this warpgroup's queries.
  DEVICE void store_part(const ScoreTile& tile, const ScoreAcc& acc) const {
    u32 fragments[1][kQueries / 16][4];
    pack_operand(fragments, acc);
    store_scores(tile, 0, first_query(), fragments);
  }

  // dv, dk and dq of visible pairs only, without the tensor cores.
  DEVICE void add_gradients(QueryAcc& dq, const GroupTiles& walk, const Visible& visible) {
    const auto sees = [&](int r, int query) { return sees_query(walk, visible, r, query); };
    const ScoreTile probs = smem.probs(stage.index), ds = smem.ds(stage.index);
    const int row = warpgroup_row();
    add_visible(dv, TileLeft<false, ScoreTile>{probs, row}, smem.dout(stage.index), first_col_v(),
                sees);
    add_visible(dk, TileLeft<false, ScoreTile>{ds, row}, smem.q(stage.index), first_col(), sees);
    clear(dq);
    add_visible(dq, TileLeft<true, ScoreTile>{ds, row}, smem.k(), first_col(), [&](int r, int key) {
      return sees_key(walk, walk.tiles.current * kBlockQ + row + acc_row(0, 2 * r), key);
    });
  }
};

extern "C" __global__ void __launch_bounds__(kBlockThreads, 1)
    flash_bwd(const __grid_constant__ BackwardParamsSm90 p) {
  extern __shared__ __align__(1024) u8 shared_memory[];
  run_block<Consumer>(p, Storage{shared_address(shared_memory)});
}
