// Attention forward for Hopper: TMA, wgmma, one producer and two or three consumer warpgroups.
//
//   s = scale q kᵀ,  p = softmax(terms and mask of s),  out = dropout(p) v,  lse = log sum exp s
//
// Persistent blocks walk over work items, (query tile, query head, batch entry): longest first, in
// rounds of alternate direction, so that a block that got the longest of one round gets the
// shortest of the next. Key tiles run from the last to the first (schedule.cuh).
//
// Warpgroups: 0 produces (one thread issues TMA, in the order K, Q, K, V, K, V ... V), each other
// consumes: it owns 64 rows of the query tile. q kᵀ of a tile runs while the softmax of the one
// before feeds p v: both products are in flight together, and in turns (kPingPong) one warpgroup's
// softmax runs beside the other's products. A warpgroup whose rows do not see a tile only releases
// it.
//
// Barriers: full and empty of every stage of K and of V, and of every warpgroup's Q. K and V of a
// tile have the same place in one ring; p v is one place behind q kᵀ. Empty ones are arrived at by
// each warp of the consumers, after the wait for the product that read the stage.
//
// A run of fully visible tiles has a loop of its own, whose addresses and descriptors stay in
// uniform registers: tests/test_sass.py holds the instructions that it issues. Partly visible
// tiles, and those beside them, take a step that pays for the mask and for the search of inf and
// NaN behind it (hidden.cuh), which runs beside the next q kᵀ.
//
// Shared memory, bytes:  q | kStages x k | kStages x v | out | barriers, each a multiple of 1024
//   = 2 (kBlockQ D + kStages kBlockKV (D + Dv) + kBlockQ Dv) + barriers
// Where that is too much, out is staged over q, and the next q waits for its store (kOutOverQ).
//
// Registers of a consumer: o_acc Dv / 2, s_acc kBlockKV / 2, p kBlockKV / 4; of 240 (three
// warpgroups: 160).
//
// Method: FlashAttention-3 (Shah et al. 2024).
#include "dropout.cuh"
#include "hidden.cuh"
#include "schedule.cuh"
#include "softmax.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef HEAD_DIM_V
#define HEAD_DIM_V 128
#endif
#ifndef CONSUMERS
#define CONSUMERS 2
#endif
#ifndef BLOCK_KV
#define BLOCK_KV 128
#endif
#ifndef STAGES
#define STAGES 2
#endif
#ifndef PING_PONG
#define PING_PONG 1
#endif
#ifndef OUT_OVER_Q
#define OUT_OVER_Q 0
#endif

constexpr int kHeadDim = HEAD_DIM, kHeadDimV = HEAD_DIM_V;  // padded
constexpr int kConsumers = CONSUMERS;
constexpr int kBlockQ = kConsumers * kWarpgroupRows;
constexpr int kBlockKV = BLOCK_KV;
constexpr int kStages = STAGES;
constexpr int kThreads = (1 + kConsumers) * kWarpgroupThreads;
constexpr bool kPingPong = PING_PONG;
constexpr bool kOutOverQ = OUT_OVER_Q;
constexpr int kConsumerWarps = kConsumers * 4;
// Together 504 for two consumers, 512 for three: what a block of 384 or 512 threads starts with.
constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 32;
constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 160;
// With so many accumulators of the output their rescaling is worth hiding behind q kᵀ.
constexpr bool kRescaleLate = kHeadDimV <= 128;
// Of q kᵀ, those whose descriptors of q the compiler may keep from tile to tile; beside 256 columns
// more would be spilled.
constexpr int kSteps = kHeadDim / 16, kKeptSteps = kHeadDim <= 128 ? kSteps : 6;
static_assert(kConsumers == 2 || kConsumers == 3, "two or three consumer warpgroups");
static_assert(kBlockKV % 16 == 0, "kBlockKV must be a multiple of 16");
static_assert(!kPackGroup, "rows are positions of one query head");

typedef Panels<kWarpgroupRows, kHeadDim> QTile;  // of one warpgroup
typedef Panels<kBlockKV, kHeadDim> KTile;
typedef Panels<kBlockKV, kHeadDimV> VTile;
typedef Panels<kWarpgroupRows, kHeadDimV> OutTile;  // of one warpgroup

constexpr int kOutBytes = kOutOverQ ? 0 : kConsumers * OutTile::kBytes;
constexpr int kQBytes = kConsumers * (kOutOverQ ? larger(QTile::kBytes, OutTile::kBytes)  //
                                                : QTile::kBytes);
constexpr int kKOffset = kQBytes;
constexpr int kVOffset = kKOffset + kStages * KTile::kBytes;
constexpr int kOutOffset = kVOffset + kStages * VTile::kBytes;
constexpr int kBarriersOffset = kOutOffset + kOutBytes;
constexpr int kBarriers = 2 * kConsumers + 4 * kStages;
constexpr int kSmemBytes = kBarriersOffset + 8 * kBarriers;
#ifdef SMEM_BYTES
static_assert(kSmemBytes == SMEM_BYTES, "shared memory differs from the plan's");
#endif
#ifdef PARAMS_BYTES
static_assert(sizeof(ForwardParamsSm90) == PARAMS_BYTES,
              "ForwardParamsSm90 differs from the packed one");
#endif

// Named barriers: 0 is __syncthreads.
DEVICE int turn_barrier(int consumer) { return 1 + consumer; }
DEVICE int own_barrier(int consumer) { return 1 + kConsumers + consumer; }

typedef Stage<kStages> Ring;  // a tile's place in it, of K and V alike

struct Smem {
  u32 base;
  DEVICE QTile q(int consumer) const { return {base + consumer * kQBytes / kConsumers}; }
  DEVICE KTile k(const Ring& ring) const { return {base + kKOffset + ring.index * KTile::kBytes}; }
  DEVICE VTile v(const Ring& ring) const { return {base + kVOffset + ring.index * VTile::kBytes}; }
  DEVICE OutTile out(int consumer) const {
    return {kOutOverQ ? q(consumer).base : base + kOutOffset + consumer * OutTile::kBytes};
  }

  DEVICE u32 q_full(int consumer) const { return barrier(consumer); }
  DEVICE u32 q_empty(int consumer) const { return barrier(kConsumers + consumer); }
  DEVICE u32 k_full(const Ring& ring) const { return of_stage(0, ring.index); }
  DEVICE u32 k_empty(const Ring& ring) const { return of_stage(1, ring.index); }
  DEVICE u32 v_full(const Ring& ring) const { return of_stage(2, ring.index); }
  DEVICE u32 v_empty(const Ring& ring) const { return of_stage(3, ring.index); }

  DEVICE void init_barriers() const {
    for (int consumer = 0; consumer < kConsumers; consumer++) {
      mbarrier_init(q_full(consumer), 1);
      mbarrier_init(q_empty(consumer), kOutOverQ ? 1 : 4);
    }
    for (int stage = 0; stage < kStages; stage++) {
      mbarrier_init(of_stage(0, stage), 1);
      mbarrier_init(of_stage(1, stage), kConsumerWarps);
      mbarrier_init(of_stage(2, stage), 1);
      mbarrier_init(of_stage(3, stage), kConsumerWarps);
    }
    fence_mbarrier_init();
  }

 private:
  DEVICE u32 barrier(int index) const { return base + kBarriersOffset + 8 * index; }
  DEVICE u32 of_stage(int kind, int stage) const {
    return barrier(2 * kConsumers + kind * kStages + stage);
  }
};

// This block's work items, one per round.
struct WorkList {
  const ForwardParamsSm90& p;
  const Rows rows;
  int round = 0;

  DEVICE explicit WorkList(const ForwardParamsSm90& p) : p(p), rows(p.call.problem) {}

  DEVICE int index() const {
    const int place = round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    return round * gridDim.x + place;
  }
  DEVICE bool valid() const {
    return index() < row_tiles(p.call.problem, rows, kBlockQ) && work().exists();
  }
  DEVICE Work work() const {
    return forward_work(p.call.problem, rows, kBlockQ, p.call.heads_per_section, index());
  }
};

// Run by one thread.
DEVICE void produce(const ForwardParamsSm90& p, const Smem& smem) {
  const Problem& problem = p.call.problem;
  prefetch_tensor_map(&p.q);
  prefetch_tensor_map(&p.k);
  prefetch_tensor_map(&p.v);
  Ring ring;
#pragma unroll 1
  for (WorkList list(p); list.valid(); list.round++) {
    const Work work = list.work();
    const Mask mask(problem, work.batch);
    const int first_row = work.tile * kBlockQ;
    const int head_k = mask.rows.head_k(problem, work.head);

    const auto load_q = [&] {
#pragma unroll 1
      for (int consumer = 0; consumer < kConsumers; consumer++) {
        mbarrier_wait(smem.q_empty(consumer), (list.round + 1) % 2);
        mbarrier_arrive_expect(smem.q_full(consumer), QTile::kBytes);
        load_panels(smem.q(consumer), &p.q, smem.q_full(consumer), p.call.problem, p.call.q,
                    mask.q_start + first_row + consumer * kWarpgroupRows, mask.q_end(), work.head,
                    mask.array_batch());
      }
    };
    const auto load_k = [&](const Ring& at, int tile) {
      mbarrier_wait(smem.k_empty(at), at.parity ^ 1);
      mbarrier_arrive_expect(smem.k_full(at), KTile::kBytes);
      load_panels(smem.k(at), &p.k, smem.k_full(at), p.call.problem, p.call.k,
                  mask.k_start + tile * kBlockKV, mask.k_end(), head_k, mask.array_batch());
    };
    const auto load_v = [&](const Ring& at, int tile) {
      mbarrier_wait(smem.v_empty(at), at.parity ^ 1);
      mbarrier_arrive_expect(smem.v_full(at), VTile::kBytes);
      load_panels(smem.v(at), &p.v, smem.v_full(at), p.call.problem, p.call.v,
                  mask.k_start + tile * kBlockKV, mask.k_end(), head_k, mask.array_batch());
    };

    KeyTiles tiles(mask, work.head, first_row, kBlockQ, kBlockKV);
    if (tiles.valid()) load_k(ring, tiles.current);
    load_q();
#pragma unroll 1
    for (; tiles.valid(); tiles.advance(), ring = ring.next()) {
      if (tiles.has_next()) load_k(ring.next(), tiles.next());
      load_v(ring, tiles.current);
    }
  }
}

struct KeyTile {
  int index;
  bool partly;  // visible to the warpgroup's rows
};

// Of the key tiles that the block visits, what one warpgroup's rows see. Lists do not tell of rows.
struct OwnKeyTiles {
  Interval visited, full;

  DEVICE OwnKeyTiles(const Mask& mask, int first_row)
      : visited(mask.key_tiles(first_row, kWarpgroupRows, kBlockKV)),
        full(mask.full_key_tiles(first_row, kWarpgroupRows, kBlockKV)) {}

  DEVICE bool see(const KeyTiles& tiles) const {
    return kHasTree || visited.begin <= tiles.current && tiles.current < visited.end;
  }
  // Of a tile that they see.
  DEVICE KeyTile current(const KeyTiles& tiles) const {
    const int tile = tiles.current;
    if constexpr (kHasTree) return {tile, warp_uniform(tiles.partly_visible())};
    return {tile, tile < full.begin || tile >= full.end};
  }
  // Whether the tile after a fully visible one is fully visible too.
  DEVICE bool see_all(const KeyTiles& tiles) const {
    if constexpr (kHasTree) return warp_uniform(tiles.valid() && !tiles.partly_visible());
    return tiles.current >= full.begin;
  }
};

// One warpgroup: 64 rows of every query tile of the block.
struct Consumer {
  const ForwardParamsSm90& p;
  const Smem smem;
  const int index;
  const Scores scores;
  const Dropout dropout;
  const int turn;  // turn_barrier(index): so computed, it stays in a register
  const RowOperand<QTile> q;
  const RowOperand<KTile> first_k;  // of the first stage
  const ColumnOperand<VTile> first_v;
  Ring ring;  // of the next q kᵀ; p v is one behind

  // Of the present work item.
  int head;
  int first_row;  // of this warpgroup
  OnlineSoftmax<1> softmax;
  float s_acc[1][kBlockKV / 8][4];
  u32 probabilities[1][kBlockKV / 16][4];
  float o_acc[1][kHeadDimV / 8][4];

  DEVICE Consumer(const ForwardParamsSm90& p, const Smem& smem, int index)
      : p(p),
        smem(smem),
        index(index),
        scores(p.call.problem),
        dropout(p.call.problem),
        turn(threadIdx.x / kWarpgroupThreads),
        q(smem.q(index), 0),
        first_k(RowOperand<KTile>(smem.k(Ring()), 0).first.kept()),
        first_v(ColumnOperand<VTile>(smem.v(Ring()), 0).first.kept()),
        softmax(scores) {}

  DEVICE void run() {
    if (kPingPong && index == 0) named_barrier_arrive(turn_barrier(0), 2 * kWarpgroupThreads);
#pragma unroll 1
    for (WorkList list(p); list.valid(); list.round++) {
      const Work work = list.work();
      const Mask mask(p.call.problem, work.batch);
      head = work.head;
      first_row = work.tile * kBlockQ + index * kWarpgroupRows;
      mbarrier_wait(smem.q_full(index), list.round % 2);
      attend(mask, KeyTiles(mask, head, work.tile * kBlockQ, kBlockQ, kBlockKV));
      store(work, mask);
    }
    // The turn that is left over.
    if (kPingPong && index == 0) named_barrier_sync(turn_barrier(0), 2 * kWarpgroupThreads);
    if (warpgroup_thread() == 0) bulk_wait();
  }

 private:
  // `tiles`: that any warpgroup of the block sees.
  DEVICE void attend(const Mask& mask, KeyTiles tiles) {
    const OwnKeyTiles own(mask, first_row);
    softmax = OnlineSoftmax<1>(scores);
    clear(o_acc);

#pragma unroll 1
    for (; tiles.valid() && !own.see(tiles); tiles.advance()) skip();
    if (tiles.valid()) {
      KeyTile last = own.current(tiles);
      begin_with(mask, last);
      tiles.advance();
      // One way back alone: after two, the compiler takes nothing for uniform any more.
#pragma unroll 1
      for (;;) {
        // `last` is not updated here: only that it was fully visible matters. With terms, a second
        // body would take registers that they need.
        if (!kHasTerms && !last.partly) {
#pragma unroll 1
          for (; own.see_all(tiles); tiles.advance())
            step<false>(mask, last, {tiles.current, false});
        }
        if (!tiles.valid() || !own.see(tiles)) break;
        const KeyTile next = own.current(tiles);
        step<true>(mask, last, next);
        last = next;
        tiles.advance();
      }
      end_with(mask, last);
    } else {
      release_q();
    }
#pragma unroll 1
    for (; tiles.valid(); tiles.advance()) skip();
    softmax.finish(o_acc, kept_scale(p.call.problem),
                   [&](int, int) { return sink_of(p.call.problem, head); });
  }

  // s of the first tile: no product p v to run beside yet.
  DEVICE void begin_with(const Mask& mask, const KeyTile& tile) {
    mbarrier_wait(smem.k_full(ring), ring.parity);
    take_turn();
    issue_scores();
    pass_turn();
    const u64 visible = look(mask, tile);
    wgmma_wait<0>(s_acc);
    release_read(smem.k_empty(ring));
    ring = ring.next();
    see(mask, tile, visible);
    pack_operand(probabilities, s_acc);
  }

  // s of the next tile beside p v of the last.
  template <bool kMasked>
  DEVICE void step(const Mask& mask, const KeyTile& last, const KeyTile& next) {
    const Ring behind = ring.previous();
    mbarrier_wait(smem.k_full(ring), ring.parity);
    take_turn();
    issue_scores();
    if (!kRescaleLate) softmax.rescale(o_acc);
    mbarrier_wait(smem.v_full(behind), behind.parity);
    if (kMasked && last.partly && holds_hidden(behind)) {
      pass_turn();
      add_visible_values(mask, last, behind);
      const u64 visible = look(mask, next);
      wgmma_wait<0>(s_acc);
      release(smem.v_empty(behind));
      release_read(smem.k_empty(ring));
      see(mask, next, visible);
    } else {
      issue_values(behind);
      pass_turn();
      const u64 visible = kMasked ? look(mask, next) : 0;
      wgmma_wait<1>(s_acc);
      release_read(smem.k_empty(ring));
      see(mask, {next.index, kMasked && next.partly}, visible);
      wgmma_wait<0>(o_acc, probabilities);
      release_read(smem.v_empty(behind));
    }
    ring = ring.next();
    pack_operand(probabilities, s_acc);
    if (kRescaleLate) softmax.rescale(o_acc);
  }

  // p v of the last tile.
  DEVICE void end_with(const Mask& mask, const KeyTile& last) {
    const Ring behind = ring.previous();
    release_q();
    if (!kRescaleLate) softmax.rescale(o_acc);
    mbarrier_wait(smem.v_full(behind), behind.parity);
    if (last.partly && holds_hidden(behind)) {
      add_visible_values(mask, last, behind);
      release(smem.v_empty(behind));
      return;
    }
    issue_values(behind);
    wgmma_wait<0>(o_acc, probabilities);
    release_read(smem.v_empty(behind));
  }

  // A tile that only other warpgroups see.
  DEVICE void skip() {
    mbarrier_wait(smem.k_full(ring), ring.parity);
    take_turn();
    pass_turn();
    release(smem.k_empty(ring));
    mbarrier_wait(smem.v_full(ring), ring.parity);
    release(smem.v_empty(ring));
    ring = ring.next();
  }

  // s = q kᵀ
  DEVICE void issue_scores() {
    const RowOperand<KTile> k = first_k.of_tile(ring.index);
    wgmma_fence(s_acc);
    issue_gemm<kKeptSteps>(s_acc, q, k, false);
    if constexpr (kKeptSteps < kSteps) {
      const Descriptor<QTile> hidden((u32)opaque(q.first.low));
      issue_gemm<kSteps, kKeptSteps>(s_acc, RowOperand<QTile>(hidden), k, true);
    }
    wgmma_commit();
  }

  // o += p v
  DEVICE void issue_values(const Ring& at) {
    wgmma_fence(o_acc, probabilities);
    issue_gemm<kBlockKV / 16>(o_acc, probabilities, first_v.of_tile(at.index), true);
    wgmma_commit();
  }

  // Whether inf or NaN may hide behind the mask.
  DEVICE bool holds_hidden(const Ring& at) const {
    return warp_uniform(holds_non_finite(smem.v(at), own_barrier(index)));
  }
  // o += p v of the visible alone.
  DEVICE void add_visible_values(const Mask& mask, const KeyTile& tile, const Ring& at) {
    const int row = first_row + warpgroup_row() + acc_row(0, 0);
    add_visible(o_acc, RegisterLeft<kBlockKV / 16>{probabilities}, smem.v(at), 0,
                [&](int r, int key) {
                  return mask.visible(head, row + 8 * r, tile.index * kBlockKV + key);
                });
  }

  DEVICE Places<false> places(const Mask& mask, const KeyTile& tile) const {
    return {mask, head, first_row + warpgroup_row(), tile.index * kBlockKV};
  }

  // What a tree lets these rows see of a partly visible tile, while the tile's product runs.
  DEVICE u64 look(const Mask& mask, const KeyTile& tile) const {
    if constexpr (kHasTree) return tile.partly ? places(mask, tile).visible<1, kBlockKV / 8>() : 0;
    return 0;
  }

  // Scores to unnormalised probabilities.
  DEVICE void see(const Mask& mask, const KeyTile& tile, u64 visible) {
    const Places<false> places = this->places(mask, tile);
    scores.transform(s_acc, places);
    if (tile.partly) {
      if constexpr (kHasTree)
        hide(s_acc, visible);
      else
        hide(s_acc, places);
    }
    softmax.step(s_acc);
    if constexpr (kDropout) dropout.drop(s_acc, places);
  }

  // Once per tile and warpgroup, in a circle from warpgroup 0. Without turns only its own warps
  // meet: after a barrier the compiler knows that lanes are converged, and uses uniform registers.
  DEVICE void take_turn() const {
    named_barrier_sync(turn, (kPingPong ? 2 : 1) * kWarpgroupThreads);
  }
  DEVICE void pass_turn() const {
    if (kPingPong)
      named_barrier_arrive(turn_barrier((index + 1) % kConsumers), 2 * kWarpgroupThreads);
  }

  // After the last product with q; where the output goes over q, its store comes first.
  DEVICE void release_q() const {
    if (!kOutOverQ) release(smem.q_empty(index));
  }

  DEVICE void store(const Work& work, const Mask& mask) {
    const Problem& problem = p.call.problem;
    const OutTile out_smem = smem.out(index);
    bool in_length[2];  // rows past it sum over zeros: they are 0 and -inf by definition
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = first_row + warpgroup_row() + acc_row(0, 2 * r);
      in_length[r] = row < mask.q_len;
      if (lane_id() % 4 == 0 && row < mask.rows.count)
        softmax.store(p.call, mask.stats(work.head) + row, 0, r, in_length[r]);
    }
    for_each(o_acc, [&](float& o, int, int, int e) { o = in_length[e / 2] ? o : 0.f; });

    // The last store has read the stage, and every warp is done with q.
    if (!kOutOverQ && warpgroup_thread() == 0) bulk_wait_read();
    named_barrier_sync(own_barrier(index), kWarpgroupThreads);
    u32 packed[1][kHeadDimV / 16][4];
    pack_operand(packed, o_acc);
#pragma unroll
    for (int k = 0; k < kHeadDimV / 16; k++)
      stmatrix_x4(out_smem.chunk_address(warpgroup_row() + lane_id() % 16, 2 * k + lane_id() / 16),
                  packed[0][k]);
    fence_proxy_async();
    named_barrier_sync(own_barrier(index), kWarpgroupThreads);
    if (warpgroup_thread() == 0) {
      store_panels(out_smem, &p.out, p.call.problem, p.call.out, mask.q_start + first_row,
                   mask.q_end(), work.head, mask.array_batch());
      bulk_commit();
      if (kOutOverQ) {
        bulk_wait_read();
        mbarrier_arrive(smem.q_empty(index));
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    flash_fwd(const __grid_constant__ ForwardParamsSm90 p) {
  extern __shared__ __align__(1024) u8 memory[];
  const Smem smem{shared_address(memory)};
  if (threadIdx.x == 0) smem.init_barriers();
  __syncthreads();

  if (warpgroup_id() == 0) {
    setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x == 0) produce(p, smem);
  } else {
    setmaxnreg_inc<kConsumerRegisters>();
    Consumer(p, smem, warpgroup_id() - 1).run();
  }
}
