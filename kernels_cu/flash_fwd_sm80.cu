// Attention forward on mma.sync, for every GPU from Ampere on.
//
//   s = scale q kᵀ,  p = softmax(terms and mask of s),  out = dropout(p) v,  lse = log sum exp s
//
// One block per (query tile, key head, batch entry); rows of a tile are (position, head of the
// group), so K and V are read once per group (rows.cuh). Key tiles run from the last to the first
// (schedule.cuh).
//
// Warps: each owns kBlockQ / kWarps rows, 16 kM of them at a time, and all kBlockKV columns of the
// scores; a row's softmax stays inside four lanes. P goes from the accumulator of q kᵀ to the
// operand of p v in registers.
//
// Shared memory, bytes:  q | k | v  =  2 (kBlockQ D + kBlockKV D + kBlockKV Dv); the output is
// staged over q (over q and k where Dv > D). One buffer each suffices: V arrives during q kᵀ, the
// next K during the softmax and p v. Two barriers per tile.
//
// Registers: o_acc kM Dv / 2, s_acc kM kBlockKV / 2, p and fragments about a quarter of that.
//
// Method: FlashAttention-2 (Dao 2023), online softmax (Milakov and Gimelshein 2018).
#include "dropout.cuh"
#include "gemm.cuh"
#include "non_finite.cuh"
#include "schedule.cuh"
#include "softmax.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef HEAD_DIM_V
#define HEAD_DIM_V 128
#endif
#ifndef BLOCK_Q
#define BLOCK_Q 128
#endif
#ifndef BLOCK_KV
#define BLOCK_KV 64
#endif
#ifndef WARPS
#define WARPS 4
#endif

constexpr int kHeadDim = HEAD_DIM, kHeadDimV = HEAD_DIM_V;  // padded
constexpr int kBlockQ = BLOCK_Q, kBlockKV = BLOCK_KV;
constexpr int kThreads = WARPS * kWarpSize;
constexpr int kWarpRows = kBlockQ / WARPS;
constexpr int kM = kWarpRows / 16;  // 16-row tiles of a warp
static_assert(kM * 16 * WARPS == kBlockQ, "kBlockQ must be a multiple of 16 rows per warp");
static_assert(kBlockKV % 16 == 0, "kBlockKV must be a multiple of 16");

typedef SmemTile<kBlockQ, kHeadDim> QTile;
typedef SmemTile<kBlockKV, kHeadDim> KTile;
typedef SmemTile<kBlockKV, kHeadDimV> VTile;
typedef SmemTile<kBlockQ, kHeadDimV> OutTile;

constexpr int kKOffset = QTile::kBytes;
constexpr int kVOffset = kKOffset + KTile::kBytes;
constexpr int kSmemBytes = larger(kVOffset + VTile::kBytes, OutTile::kBytes);
#ifdef SMEM_BYTES
static_assert(kSmemBytes == SMEM_BYTES, "shared memory differs from the plan's");
#endif
#ifdef PARAMS_BYTES
static_assert(sizeof(ForwardParams) == PARAMS_BYTES, "ForwardParams differs from the packed one");
#endif

// The output rows of this warp group to global memory, through shared memory; lse directly.
DEVICE void store(const ForwardParams& p, const Work& work, const Mask& mask,
                  const OutTile& out_smem, float (&o_acc)[kM][kHeadDimV / 8][4],
                  const OnlineSoftmax<kM>& softmax) {
  const int head = mask.rows.head_q(work.head);
  const int first_row = work.tile * kBlockQ;
  const int valid_rows = smaller(kBlockQ, mask.rows.count - first_row);

  // Rows past the query length sum over zeros: they are 0 and -inf by definition.
  bool in_length[kM][2];
#pragma unroll
  for (int m = 0; m < kM; m++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = warp_id() * kWarpRows + acc_row(m, 2 * r);
      in_length[m][r] = first_row + row < mask.valid_rows();
      if (lane_id() % 4 == 0 && row < valid_rows) {
        const i64 index = mask.stats(head) + mask.rows.stat_index(p.problem, first_row + row);
        softmax.store(p, index, m, r, in_length[m][r]);
      }
    }

  __syncthreads();  // every warp is done with q and k, which the output overwrites
#pragma unroll
  for (int m = 0; m < kM; m++)
#pragma unroll
    for (int n = 0; n < kHeadDimV / 8; n++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float (&o)[4] = o_acc[m][n];
        st_shared(out_smem.address(warp_id() * kWarpRows + acc_row(m, 2 * r), acc_col(n, 0)),
                  in_length[m][r] ? pack<Element>(o[2 * r], o[2 * r + 1]) : 0u);
      }
  __syncthreads();

  u16* out = mask.queries(p.out, head);
  store_tile<kThreads>(
      out_smem, [&](int row) { return mask.rows.pointer(out, p.out, first_row + row); }, valid_rows,
      p.problem.head_dim_v);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    flash_fwd(const __grid_constant__ ForwardParams p) {
  extern __shared__ __align__(128) u8 smem[];
  const u32 base = shared_address(smem);
  const QTile q_smem{base};
  const KTile k_smem{base + kKOffset};
  const VTile v_smem{base + kVOffset};

  const Rows rows(p.problem);
  const Work work = forward_work(p.problem, rows, kBlockQ, p.heads_per_section, blockIdx.x);
  if (!work.exists()) return;
  const Mask mask(p.problem, work.batch);
  const int first_row = work.tile * kBlockQ, warp_row = warp_id() * kWarpRows;
  KeyTiles tiles(mask, work.head, first_row, kBlockQ, kBlockKV);

  const int head_q = rows.head_q(work.head);
  const u16* q = mask.queries(p.q, head_q);
  const u16* k = mask.keys(p.k, rows.head_k(p.problem, work.head));
  const u16* v = mask.keys(p.v, rows.head_k(p.problem, work.head));
  const auto load_k = [&] {
    const i64 first_key = (i64)tiles.current * kBlockKV;
    load_rows<kThreads>(k_smem, k + first_key * p.k.seq_stride, p.k.seq_stride,
                        mask.kv_len - (int)first_key, p.problem.head_dim);
  };
  const auto load_v = [&] {
    const i64 first_key = (i64)tiles.current * kBlockKV;
    load_rows<kThreads>(v_smem, v + first_key * p.v.seq_stride, p.v.seq_stride,
                        mask.kv_len - (int)first_key, p.problem.head_dim_v);
  };

  const Scores scores(p.problem);
  const Dropout dropout(p.problem);
  OnlineSoftmax<kM> softmax(scores);
  float o_acc[kM][kHeadDimV / 8][4];
  clear(o_acc);

  if (tiles.valid()) {
    load_tile<kThreads>(
        q_smem, [&](int row) { return rows.pointer(q, p.q, first_row + row); },
        mask.valid_rows() - first_row, p.problem.head_dim);
    load_k();
  }
#pragma unroll 1
  while (tiles.valid()) {
    const int first_key = tiles.current * kBlockKV;
    const bool partly_visible = tiles.partly_visible();
    const Places<false> places{mask, head_q, first_row + warp_row, first_key};

    cp_async_wait<0>();
    __syncthreads();  // K is here, and every warp has finished with V
    load_v();

    // s = q kᵀ
    float s_acc[kM][kBlockKV / 8][4];
    clear(s_acc);
    gemm<kHeadDim / 16>(s_acc, RowsOf<QTile>{q_smem, warp_row}, TransposedRight<KTile>{k_smem, 0});

    cp_async_wait<0>();
    // V is here, and every warp has finished with K
    const bool non_finite = __syncthreads_or(partly_visible && copied_non_finite<kThreads>(v_smem));
    tiles.advance();
    if (tiles.valid()) load_k();

    scores.transform(s_acc, places);
    if (partly_visible) hide(s_acc, places);
    softmax.step(s_acc);
    softmax.rescale(o_acc);
    if (kDropout) dropout.drop(s_acc, places);

    // o += p v
    const Packed<kM, kBlockKV / 8> probabilities(s_acc);
    if (non_finite) {
      add_non_finite<false>(o_acc, v_smem, 0, [&](int row, int key) {
        return mask.visible(head_q, first_row + warp_row + row, first_key + key);
      });
      __syncthreads();
      zero_non_finite<kThreads>(v_smem);
      __syncthreads();
    }
    gemm<kBlockKV / 16>(o_acc, probabilities, Right<VTile>{v_smem, 0});
  }

  softmax.finish(o_acc, kept_scale(p.problem), [&](int m, int r) {
    const int row = first_row + warp_row + acc_row(m, 2 * r);
    return sink_of(p.problem, head_q + rows.head_in_group(row));
  });
  store(p, work, mask, OutTile{base}, o_acc, softmax);
}
