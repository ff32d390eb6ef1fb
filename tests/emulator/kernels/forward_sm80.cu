// Attention forward for Ampere: 4 warps of 16 queries each; K and V are double-buffered by
// cp.async. -DHEAD_DIM=64|128, -DCAUSAL=0|1, -DFP16=0|1, -DBUG=<name of bugs.cuh>
#include "softmax.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 64
#endif
#ifndef CAUSAL
#define CAUSAL 1
#endif

constexpr int kHeadDim = HEAD_DIM;
constexpr bool kCausal = CAUSAL;
constexpr int kBlock = 64;  // queries of a block, keys of a tile
constexpr int kThreads = 128;
constexpr u32 kTileBytes = kBlock * kHeadDim * sizeof(u16);
constexpr u32 kPanelBytes = kBlock * 128;  // a tile is panels of 64 channels, 128 bytes a row

struct Params {
  const u16* q;  // [batch, seqlen, heads, kHeadDim], as k, v and out
  const u16* k;
  const u16* v;
  u32* out;    // two channels each
  float* lse;  // [batch, heads, seqlen]
  int seqlen;
  int heads;
  float scale_log2;  // softmax scale times log2(e)
};
static_assert(sizeof(Params) == 56, "the tests pack this struct");

// Shared memory: Q, then two stages of K, then two of V.
struct Tiles {
  u32 q;
  DEVICE u32 k(int tile) const { return q + (1 + tile % 2) * kTileBytes; }
  DEVICE u32 v(int tile) const { return q + (3 + tile % 2) * kTileBytes; }
};

// Address of 16 bytes (8 channels); the XOR spreads the rows of a column over all banks.
DEVICE u32 chunk_address(u32 tile, int row, int chunk) {
  return tile + chunk / 8 * kPanelBytes + row * 128 + ((chunk ^ row) % 8) * 16;
}

// The same without the XOR.
DEVICE u32 unswizzled_address(u32 tile, int row, int chunk) {
  return tile + chunk / 8 * kPanelBytes + row * 128 + chunk % 8 * 16;
}

// rows: [seqlen, heads, kHeadDim] at this block's batch and head; rows past the end become zero.
DEVICE void load_tile(u32 tile, const u16* rows, int first_row, const Params& p) {
  constexpr int kChunks = kHeadDim / 8;
#pragma unroll
  for (int i = threadIdx.x; i < kBlock * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool valid = first_row + row < p.seqlen;
    const u64 offset = static_cast<u64>(valid ? first_row + row : 0) * p.heads * kHeadDim;
    cp_async_16(chunk_address(tile, row, chunk), rows + offset + chunk * 8, valid);
  }
}

// scores[16 x 64] of a warp = q kᵀ
DEVICE void multiply_qk(float (&scores)[kBlock / 2], const u32 (&q_frag)[kHeadDim / 16][4], u32 k) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; step++) {
#pragma unroll
    for (int keys = 0; keys < kBlock; keys += 16) {
      int row = keys + lane % 8 + lane / 16 * 8;
      if (kBug == Bug::WrongRow && keys == kBlock - 16) row += 8;
      const int chunk = 2 * step + lane / 8 % 2;
      u32 k_frag[4];
      ldmatrix_x4(k_frag, kBug == Bug::DroppedSwizzle ? unswizzled_address(k, row, chunk)
                                                      : chunk_address(k, row, chunk));
      mma_m16n8k16(&scores[keys / 2], q_frag[step], k_frag[0], k_frag[1]);
      mma_m16n8k16(&scores[keys / 2 + 4], q_frag[step], k_frag[2], k_frag[3]);
    }
  }
}

// out_acc[16 x kHeadDim] of a warp += p v
DEVICE void multiply_pv(float (&out_acc)[kHeadDim / 2], const float (&probs)[kBlock / 2], u32 v) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < kBlock / 16; step++) {
    u32 p_frag[4];
    pack_columns(p_frag, probs, step);
#pragma unroll
    for (int channels = 0; channels < kHeadDim; channels += 16) {
      u32 v_frag[4];
      ldmatrix_x4_trans(v_frag, chunk_address(v, step * 16 + lane % 16, channels / 8 + lane / 16));
      mma_m16n8k16(&out_acc[channels / 2], p_frag, v_frag[0], v_frag[1]);
      mma_m16n8k16(&out_acc[channels / 2 + 4], p_frag, v_frag[2], v_frag[3]);
    }
  }
}

// out: [seqlen, heads, kHeadDim / 2] at this block's batch and head
DEVICE void store_out(u32* out, const float (&out_acc)[kHeadDim / 2], int row, const Params& p) {
#pragma unroll
  for (int i = 0; i < kHeadDim / 2; i += 2) {
    const int query = row + (i >> 1 & 1) * 8;
    const u64 offset = static_cast<u64>(query) * p.heads * kHeadDim / 2;
    if (query < p.seqlen)
      out[offset + i / 4 * 4 + threadIdx.x % 4] = pack(out_acc[i], out_acc[i + 1]);
  }
}

// grid: (ceil(seqlen / kBlock), heads, batch)
extern "C" __global__ void __launch_bounds__(kThreads)
    forward_sm80(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 storage[];
  const Tiles tiles{shared_address(storage)};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_query = blockIdx.x * kBlock, row = first_query + warp * 16 + lane / 4;
  const int head = blockIdx.y, batch = blockIdx.z;
  const u64 base = (static_cast<u64>(batch) * p.seqlen * p.heads + head) * kHeadDim;
  const int visible_keys = kCausal ? min(p.seqlen, first_query + kBlock) : p.seqlen;
  const int tile_count = (visible_keys + kBlock - 1) / kBlock;

  // First loads: Q and K in one group, V in the next
  load_tile(tiles.q, p.q + base, first_query, p);
  load_tile(tiles.k(0), p.k + base, 0, p);
  cp_async_commit();
  load_tile(tiles.v(0), p.v + base, 0, p);
  cp_async_commit();
  cp_async_wait<1>();
  if (kBug != Bug::MissingBarrierAfterFirstWait) __syncthreads();

  u32 q_frag[kHeadDim / 16][4];
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; step++)
    ldmatrix_x4(q_frag[step], chunk_address(tiles.q, warp * 16 + lane % 16, 2 * step + lane / 16));

  OnlineSoftmax softmax;
  float out_acc[kHeadDim / 2] = {};
  for (int tile = 0; tile < tile_count; tile++) {
    // Next tile; empty groups after the last one keep the wait counts constant
    const bool prefetch = tile + 1 < tile_count;
    if (prefetch) load_tile(tiles.k(tile + 1), p.k + base, (tile + 1) * kBlock, p);
    cp_async_commit();
    if (prefetch) load_tile(tiles.v(tile + 1), p.v + base, (tile + 1) * kBlock, p);
    cp_async_commit();

    float scores[kBlock / 2] = {}, rescale[2];
    multiply_qk(scores, q_frag, tiles.k(tile));
    if (tile == tile_count - 1) mask_scores<kCausal>(scores, row, tile * kBlock, p.seqlen);
    softmax.step(scores, p.scale_log2, rescale);
    scale_rows(out_acc, rescale);

    cp_async_wait<kBug == Bug::LaxWaitGroup ? 3 : 2>();  // V of this tile
    __syncthreads();
    multiply_pv(out_acc, scores, tiles.v(tile));
    cp_async_wait<1>();  // K of the next tile
    if (kBug != Bug::MissingBarrierAtLoopEnd) __syncthreads();
  }

  float inverse_sum[2];
  softmax.finish(inverse_sum);
  scale_rows(out_acc, inverse_sum);
  store_out(p.out + base / 2, out_acc, row, p);
  softmax.store_lse(p.lse + (static_cast<u64>(batch) * p.heads + head) * p.seqlen, row, p.seqlen,
                    p.scale_log2);
}
