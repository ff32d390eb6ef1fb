// What a launch hands over, by value. cuflash/_params.py packs the same bytes; every kernel asserts
// the size. Letters: B batch, Sq Sk lengths, Hq Hk heads of q and of k, D Dv head sizes, G = Hq /
// Hk the group.
#pragma once
#include "common.cuh"
#include "ptx/tma.cuh"

#ifndef ATTACHMENTS
#define ATTACHMENTS 0
#endif
#ifndef PACKED
#define PACKED 0
#endif
constexpr bool kPacked = PACKED;

// A (B, S, H, D) array of 16-bit elements with a contiguous last axis; strides in elements.
struct Tensor {
  void* data;
  i64 batch_stride;
  i64 seq_stride;
  i64 head_stride;
};

// Broadcasts to (B, Hq, Sq, Sk): strides in elements, 0 along the axes of one element.
struct ScoreTensor {
  const void* data;
  i64 batch_stride;
  i64 head_stride;
  i64 query_stride;
  i64 key_stride;
};

// The tiles that each tile of the other side visits (mask_lists.cu), by batch entry and head of
// Rows: a count and as many entries. Strides are 0 where these share their lists.
struct TileLists {
  const int2* entries;
  i64 batch_stride;
  i64 head_stride;
  i64 pitch;  // of one tile's list
};

// Sequences one after the other along axis 1 of arrays of batch size 1 (packed_tiles.cu); their
// edges never decrease and lie inside the arrays, whatever the caller's do.
struct Packing {
  const int* query_edges;       // (B + 1,): sequence b has the tokens [b] to [b + 1]
  const int* key_edges;         // (B + 1,)
  const int* first_query_tile;  // (B + 1,): of a sequence, among all
  const int2* query_tiles;  // (query_tile_count,): sequence and tile in it, or -1 in place of it
  const int2* key_tiles;    // (key_tile_count,)
  int query_tile_count;     // at least as many as there are
  int key_tile_count;
};

// What one leaf of a mask's tree, or one array of a user's, reads: a structure of leaves.cuh.
struct Attachment {
  u64 words[8];
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
  float scale;       // multiplies q kᵀ
  float scale_log2;  // scale log2(e)
  float softcap_in;  // scale / softcap, finite
  float softcap;
  const float* alibi_slopes;  // (Hq,) or (B, Hq)
  i64 alibi_batch_stride;
  const float* sinks;  // (Hq,)
  ScoreTensor bias;
  u64 seed;             // of dropout
  u32 drop_below;       // random bits below this drop a probability
  float dropout_scale;  // of those kept
  TileLists lists;
  Packing packing;
#if ATTACHMENTS
  Attachment attachments[ATTACHMENTS];
#endif
};

struct ForwardParams {
  Problem problem;
  Tensor q;               // (B, Sq, Hq, D)
  Tensor k;               // (B, Sk, Hk, D)
  Tensor v;               // (B, Sk, Hk, Dv)
  Tensor out;             // (B, Sq, Hq, Dv)
  float* lse;             // (B, Hq, Sq), natural logarithm
  float* row_max;         // (B, Hq, Sq), the largest score, and
  float* row_sum;         // (B, Hq, Sq), the sum of exp(score - row_max); null: not wanted
  int heads_per_section;  // (batch, key head) pairs whose keys and values share the L2 cache
  int padding;
};

struct BackwardParams {
  Problem problem;
  Tensor q;              // (B, Sq, Hq, D)
  Tensor k;              // (B, Sk, Hk, D)
  Tensor v;              // (B, Sk, Hk, Dv)
  Tensor out;            // (B, Sq, Hq, Dv)
  Tensor dout;           // (B, Sq, Hq, Dv)
  Tensor dq;             // (B, Sq, Hq, D)
  Tensor dk;             // (B, Sk, Hk, D)
  Tensor dv;             // (B, Sk, Hk, Dv)
  const float* row_max;  // (B, Hq, Sq): the largest score, or lse where that is all that is known
  const float* row_sum;  // (B, Hq, Sq): the sum of exp(score - row_max); null: 1
  const float* dlse;     // (B, Hq, Sq) or null
  // (B, Hk, query tiles, 3, kBlockQ): lse in base 2, the largest score and log2 of the sum; +inf,
  // +inf and 0 for rows that see nothing
  float* row_stats;
  float* delta;   // (B, Hk, query tiles, kBlockQ): sum of dout out over Dv, less dlse
  float* dq_acc;  // (B, Hk, query tiles, kBlockQ D) in the accumulators' order
  u32* turns;     // (1 + B Hk query tiles): work counter, then whose turn it is to add to a tile
  u32* large;     // (B Hk query tiles): whether lse_log2 is too coarse for one of its rows
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
