// What a launch hands over, by value. cuflash/_params.py packs the same bytes; every kernel asserts
// the size. Letters: B batch, Sq Sk lengths, Hq Hk heads of q and of k, D Dv head sizes, G = Hq /
// Hk the group.
#pragma once
#include "common.cuh"
#include "ptx/tma.cuh"

// A (B, S, H, D) array of 16-bit elements with a contiguous last axis; strides in elements.
struct Tensor {
  void* data;
  i64 batch_stride;
  i64 seq_stride;
  i64 head_stride;
};

struct Problem {
  const i64* q_lens;   // (B,) or null: Sq
  const i64* kv_lens;  // (B,) or null: Sk
  const i64* offsets;  // (B,) or null: `offset`
  i64 offset;          // read where `offsets` is null and `offset_is_given`
  i64 window_left;     // keys left of i + offset, inclusive; very large: unbounded
  i64 window_right;
  int offset_is_given;  // else the offset is kv_len - q_len
  int batch;
  int seqlen_q;
  int seqlen_k;
  int heads_k;
  int group;
  u32 group_magic;  // row / group = the high half of row group_magic, shifted right by group_shift
  int group_shift;
  int head_dim;
  int head_dim_v;
  float scale;         // multiplies q kᵀ
  float scale_log2;    // scale log2(e)
  float softcap_in;    // scale / softcap
  float softcap_log2;  // softcap log2(e)
};

struct ForwardParams {
  Problem problem;
  Tensor q;               // (B, Sq, Hq, D)
  Tensor k;               // (B, Sk, Hk, D)
  Tensor v;               // (B, Sk, Hk, Dv)
  Tensor out;             // (B, Sq, Hq, Dv)
  float* lse;             // (B, Hq, Sq), natural logarithm
  int heads_per_section;  // (batch, key head) pairs whose keys and values share the L2 cache
  int padding;
};

struct BackwardParams {
  Problem problem;
  Tensor q;           // (B, Sq, Hq, D)
  Tensor k;           // (B, Sk, Hk, D)
  Tensor v;           // (B, Sk, Hk, Dv)
  Tensor out;         // (B, Sq, Hq, Dv)
  Tensor dout;        // (B, Sq, Hq, Dv)
  Tensor dq;          // (B, Sq, Hq, D)
  Tensor dk;          // (B, Sk, Hk, D)
  Tensor dv;          // (B, Sk, Hk, Dv)
  const float* lse;   // (B, Hq, Sq)
  const float* dlse;  // (B, Hq, Sq) or null
  float* lse_log2;  // (B, Hk, query tiles, kBlockQ): lse in base 2, +inf for rows that see nothing
  float* delta;     // (B, Hk, query tiles, kBlockQ): sum of dout out over Dv, less dlse
  float* dq_acc;    // (B, Hk, query tiles, kBlockQ D) in the accumulators' order
  u32* turns;       // (1 + B Hk query tiles): work counter, then whose turn it is to add to a tile
};

// For Hopper: also tensor maps of the arrays that TMA moves (cuflash/_params.py).
struct ForwardParamsSm90 {
  TensorMap q;  // loads
  TensorMap k;
  TensorMap v;
  TensorMap out;  // stores
  ForwardParams call;
};

struct BackwardParamsSm90 {
  TensorMap q;  // loads
  TensorMap k;
  TensorMap v;
  TensorMap dout;
  TensorMap dk;  // stores
  TensorMap dv;
  BackwardParams call;
};
