// Attention forward for Hopper: a producer warpgroup feeds two consumer warpgroups of 64 queries
// each through a ring of K and V tiles. Q Kᵀ of tile j is in flight before P V of tile j - 1.
// -DHEAD_DIM=64|128, -DCAUSAL=0|1, -DFP16=0|1, -DBUG=<name of bugs.cuh>
#include "softmax.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 64
#endif
#ifndef CAUSAL
#define CAUSAL 1
#endif

constexpr int kHeadDim = HEAD_DIM;
constexpr bool kCausal = CAUSAL;
constexpr int kConsumers = 2;
constexpr int kRows = 64;  // queries of a consumer, keys of a tile
constexpr int kBlockQ = kConsumers * kRows;
constexpr int kStages = 2;
constexpr int kWarpgroup = 128;
constexpr u32 kTileBytes = kRows * kHeadDim * sizeof(u16);
constexpr u32 kPanelBytes = kRows * 128;  // a tile is panels of 64 channels, 128 bytes a row
constexpr int kPanels = kHeadDim / 64;

struct Params {
  TensorMap q;  // [batch, heads, seqlen, kHeadDim], box [1, 1, kRows, 64], as k, v and out
  TensorMap k;
  TensorMap v;
  TensorMap out;
  float* lse;  // [batch, heads, seqlen]
  int seqlen;
  int heads;
  float scale_log2;  // softmax scale times log2(e)
};
static_assert(sizeof(Params) == 576, "the tests pack this struct");

// Shared memory: Q (later O) of each consumer, K stages, V stages, mbarriers.
struct Storage {
  u32 start;
  DEVICE u32 q(int consumer) const { return start + consumer * kTileBytes; }
  DEVICE u32 k(int tile) const { return q(kConsumers + tile % kStages); }
  DEVICE u32 v(int tile) const { return q(kConsumers + kStages + tile % kStages); }
  DEVICE u32 q_full() const { return q(kConsumers + 2 * kStages); }
  DEVICE u32 k_full(int tile) const { return q_full() + 8 * (1 + tile % kStages); }
  DEVICE u32 v_full(int tile) const { return k_full(tile) + 8 * kStages; }
  DEVICE u32 k_empty(int tile) const { return k_full(tile) + 16 * kStages; }
  DEVICE u32 v_empty(int tile) const { return k_full(tile) + 24 * kStages; }
};

DEVICE u32 phase(int tile) { return tile / kStages & 1; }

DEVICE void init_barriers(const Storage& storage) {
  mbarrier_init(storage.q_full(), 1);
  for (int stage = 0; stage < kStages; stage++) {
    mbarrier_init(storage.k_full(stage), 1);
    mbarrier_init(storage.v_full(stage), 1);
    mbarrier_init(storage.k_empty(stage), kBug == Bug::WrongArrivalCount ? 1 : kConsumers);
    mbarrier_init(storage.v_empty(stage), kConsumers);
  }
  fence_mbarrier_init();
}

// One tile of kRows rows, panel by panel; `barrier` expects its bytes.
DEVICE void load_tile(u32 tile, const TensorMap* map, u32 barrier, int first_row) {
  for (int panel = 0; panel < kPanels; panel++)
    tma_load(tile + panel * kPanelBytes, map, barrier, panel * 64, first_row, blockIdx.y,
             blockIdx.z);
}

// Run by one thread.
DEVICE void produce(const Params& p, const Storage& storage, int first_query, int tile_count) {
  constexpr int kExtraBytes = kBug == Bug::ExpectTooFewBytes    ? -16
                              : kBug == Bug::ExpectTooManyBytes ? 16
                                                                : 0;
  mbarrier_arrive_expect_tx(storage.q_full(), kConsumers * kTileBytes);
  for (int consumer = 0; consumer < kConsumers; consumer++)
    load_tile(storage.q(consumer), &p.q, storage.q_full(), first_query + consumer * kRows);

  for (int tile = 0; tile < tile_count; tile++) {
    if (kBug != Bug::MissingEmptyWaitK) mbarrier_wait(storage.k_empty(tile), phase(tile) ^ 1);
    mbarrier_arrive_expect_tx(storage.k_full(tile), kTileBytes + kExtraBytes);
    load_tile(storage.k(tile), &p.k, storage.k_full(tile), tile * kRows);
    if (kBug != Bug::MissingEmptyWaitV) mbarrier_wait(storage.v_empty(tile), phase(tile) ^ 1);
    mbarrier_arrive_expect_tx(storage.v_full(tile), kTileBytes);
    load_tile(storage.v(tile), &p.v, storage.v_full(tile), tile * kRows);
  }
}

// One warpgroup: 64 queries, of which a thread holds rows `row` and `row + 8`.
struct Consumer {
  const Params& p;
  const Storage storage;
  const int index;      // of this consumer
  const int thread;     // in the warpgroup
  const int first_row;  // of the warpgroup
  const int tile_count;

  float scores[kRows / 2];
  u32 probs[kRows / 16][4];
  float out_acc[kHeadDim / 2];
  OnlineSoftmax softmax;

  DEVICE int row() const { return first_row + thread / 32 * 16 + thread % 32 / 4; }

  DEVICE void run() {
    float rescale[2];
    mbarrier_wait(storage.q_full(), 0);
    mbarrier_wait(storage.k_full(0), 0);
    issue_scores(0);
    wgmma_wait<0>(scores);
    release(storage.k_empty(0));
    if (kBug == Bug::DoubleArrival) release(storage.k_empty(0));
    step_softmax(0, rescale);
    pack_probs();

    for (int tile = 1; tile < tile_count; tile++) {
      if (kBug != Bug::MissingFullWait)
        mbarrier_wait(storage.k_full(tile), phase(tile) ^ (kBug == Bug::WrongParity));
      issue_scores(tile);
      mbarrier_wait(storage.v_full(tile - 1), phase(tile - 1));
      issue_out(tile - 1);

      if (kBug == Bug::EarlyReleaseK) release(storage.k_empty(tile));
      if (kBug != Bug::MissingScoresWait) wgmma_wait<1>(scores);
      if (kBug != Bug::EarlyReleaseK) release(storage.k_empty(tile));
      if (kBug == Bug::EarlyReleaseV) release(storage.v_empty(tile - 1));
      step_softmax(tile, rescale);

      if (kBug == Bug::ProbsOverwrittenInFlight) pack_probs();
      if (kBug == Bug::OutputRescaledInFlight) scale_rows(out_acc, rescale);
      wgmma_wait<0>(out_acc, probs);
      if (kBug != Bug::EarlyReleaseV) release(storage.v_empty(tile - 1));
      if (kBug != Bug::OutputRescaledInFlight) scale_rows(out_acc, rescale);
      if (kBug != Bug::ProbsOverwrittenInFlight) pack_probs();
    }

    mbarrier_wait(storage.v_full(tile_count - 1), phase(tile_count - 1));
    issue_out(tile_count - 1);
    wgmma_wait<0>(out_acc);
    release(storage.v_empty(tile_count - 1));
    store();
  }

  // scores = q kᵀ
  DEVICE void issue_scores(int tile) {
    constexpr u32 kStrideOffset = kBug == Bug::WrongStrideOffset ? 512 : 1024;
    wgmma_fence(scores);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; step++) {
      const u32 offset = step / 4 * kPanelBytes + step % 4 * 32;
      wgmma_m64n64k16(scores, wgmma_descriptor(storage.q(index) + offset, 16, 1024),
                      wgmma_descriptor(storage.k(tile) + offset, 16, kStrideOffset), step > 0);
    }
    wgmma_commit();
  }

  // out_acc += probs v
  DEVICE void issue_out(int tile) {
    constexpr bool kSwap = kBug == Bug::SwappedOffsets;
    if (kBug != Bug::MissingWgmmaFence) wgmma_fence(out_acc, probs);
#pragma unroll
    for (int step = 0; step < kRows / 16; step++)
      wgmma_pv(out_acc, probs[step],
               wgmma_descriptor(storage.v(tile) + step * 16 * 128, kSwap ? 1024 : kPanelBytes,
                                kSwap ? kPanelBytes : 1024),
               tile > 0 || step > 0);
    wgmma_commit();
  }

  DEVICE void step_softmax(int tile, float (&rescale)[2]) {
    const bool partly_visible =
        tile == tile_count - 1 || (kCausal && (tile + 1) * kRows > first_row);
    if (partly_visible) mask_scores<kCausal>(scores, row(), tile * kRows, p.seqlen);
    softmax.step(scores, p.scale_log2, rescale);
  }

  DEVICE void pack_probs() {
#pragma unroll
    for (int step = 0; step < kRows / 16; step++) pack_columns(probs[step], scores, step);
  }

  DEVICE void release(u32 barrier) const {
    if (thread == 0) mbarrier_arrive(barrier);
  }

  // O goes over this consumer's Q, which nobody else reads, and from there to global memory.
  DEVICE void store() {
    const u32 staging =
        kBug == Bug::OutputOverKeys ? storage.k(0) + index * kTileBytes : storage.q(index);
    float inverse_sum[2];
    softmax.finish(inverse_sum);
    scale_rows(out_acc, inverse_sum);
    softmax.store_lse(p.lse + (static_cast<u64>(blockIdx.z) * p.heads + blockIdx.y) * p.seqlen,
                      row(), p.seqlen, p.scale_log2);
    const int tile_row = thread / 32 * 16 + thread % 16;
#pragma unroll
    for (int channels = 0; channels < kHeadDim; channels += 16) {
      u32 packed[4];
      pack_columns(packed, out_acc, channels / 16);
      const int chunk = channels / 8 + thread % 32 / 16;
      stmatrix_x4(
          staging + chunk / 8 * kPanelBytes + tile_row * 128 + ((chunk ^ tile_row) % 8) * 16,
          packed);
    }

    const bool fences = kBug == Bug::ProxyFenceInOneThread ? thread == 0 : true;
    if (kBug != Bug::MissingProxyFence && fences) fence_proxy_async();
    if (kBug != Bug::MissingBarrierBeforeStore)
      named_barrier_sync(kBug == Bug::SharedNamedBarrier ? 1 : 1 + index, kWarpgroup);
    if (thread != 0) return;
    for (int panel = 0; panel < kPanels; panel++)
      tma_store(&p.out, staging + panel * kPanelBytes, panel * 64, first_row, blockIdx.y,
                blockIdx.z);
    bulk_commit();
    if (kBug != Bug::MissingStoreWait) bulk_wait();
  }
};

// grid: (ceil(seqlen / kBlockQ), heads, batch)
extern "C" __global__ void __launch_bounds__((1 + kConsumers) * kWarpgroup, 1)
    forward_sm90(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared_memory[];
  constexpr u32 kMisalignment = kBug == Bug::MisalignedStorage ? 512 : 0;
  const Storage storage{shared_address(shared_memory) + kMisalignment};
  const int warpgroup = threadIdx.x / kWarpgroup;
  const int first_query = blockIdx.x * kBlockQ;
  const int visible_keys = kCausal ? min(p.seqlen, first_query + kBlockQ) : p.seqlen;
  const int tile_count = (visible_keys + kRows - 1) / kRows;

  if (threadIdx.x == 0) init_barriers(storage);
  if (kBug != Bug::MissingBarrierAfterInit) __syncthreads();

  if (warpgroup == 0) {
    setmaxnreg_dec<24>();
    if (threadIdx.x == 0) produce(p, storage, first_query, tile_count);
  } else {
    setmaxnreg_inc<240>();
    const int index = warpgroup - 1;
    const int thread = threadIdx.x % kWarpgroup;
    Consumer{p, storage, index, thread, first_query + index * kRows, tile_count}.run();
  }
}
