// Which tiles of a mask are visible: none, some or all of their pairs.
//
// One warp per (matrix, query tile, key tile); a matrix is one batch entry's and head's, or what
// they share. The leaves' rules on whole regions decide most tiles in O(rows + keys) (leaves.cuh);
// where they leave it open, the warp looks at pairs until it has met a visible and a hidden one.
//
// No shared memory. Writes one byte a tile: memory is O(tiles).
#include "mask.cuh"

#ifndef BLOCK_Q
#define BLOCK_Q 128
#endif
#ifndef BLOCK_KV
#define BLOCK_KV 64
#endif
#ifndef WARPS
#define WARPS 4
#endif
#ifndef WHOLE_ROWS
#define WHOLE_ROWS 0
#endif

constexpr int kBlockQ = BLOCK_Q, kBlockKV = BLOCK_KV;
// Backward: rows past the length count as hidden, and such a tile is none of the fully visible.
constexpr bool kWholeRows = WHOLE_ROWS;

struct MaskTilesParams {
  Problem problem;
  u8* sights;          // (batches, heads, query tiles, key tiles)
  int batches, heads;  // 1 where all share a matrix; heads of Rows
  int masks_of_rows;   // heads of q packed into the rows, if they may have masks of their own, or 1
  int padding;
};
#ifdef PARAMS_BYTES
static_assert(sizeof(MaskTilesParams) == PARAMS_BYTES,
              "MaskTilesParams differs from the packed one");
#endif

DEVICE Sight band_sees(const Mask& mask, const Region& of) {
  const i64 first = (i64)of.i + mask.first, last_first = first + (of.i_end - 1 - of.i);
  const i64 last = (i64)of.i + mask.last, last_last = last + (of.i_end - 1 - of.i);
  return sight(first < of.j_end && of.j <= last_last, last_first <= of.j && of.j_end - 1 <= last);
}

// By looking at every pair, until one is visible and one is not.
DEVICE Sight look(const Mask& mask, const Region& of) {
  const int keys = of.j_end - of.j, pairs = (of.i_end - of.i) * keys;
  bool any = false, all = true;
#pragma unroll 1
  for (int first = 0; first < pairs && !(any && !all); first += kWarpSize) {
    const int index = smaller(first + lane_id(), pairs - 1);
    const Place at{of.b, of.h, of.i + index / keys, of.j + index % keys, of.offset};
    const bool visible =
        at.i + mask.first <= at.j && at.j <= at.i + mask.last && tree_sees(mask.problem, at);
    any |= __any_sync(0xffffffff, visible);
    all &= __all_sync(0xffffffff, visible);
  }
  return sight(any, all);
}

extern "C" __global__ void __launch_bounds__(WARPS* kWarpSize)
    mask_tiles(const __grid_constant__ MaskTilesParams p) {
  const Rows rows(p.problem);
  const int query_tiles = rows.tiles(kBlockQ), key_tiles = ceil_div(p.problem.seqlen_k, kBlockKV);
  const i64 index = (i64)blockIdx.x * WARPS + warp_id();
  if (index >= (i64)p.batches * p.heads * query_tiles * key_tiles) return;
  const int key_tile = index % key_tiles, query_tile = index / key_tiles % query_tiles;
  const i64 matrix = index / key_tiles / query_tiles;
  const int head = matrix % p.heads, batch = matrix / p.heads;
  const Mask mask(p.problem, batch);

  const int row = query_tile * kBlockQ, key = key_tile * kBlockKV;
  Region region{batch,      0, rows.position(row), 0, key, smaller(key + kBlockKV, mask.kv_len),
                mask.offset};
  region.i_end = smaller(rows.position(smaller(row + kBlockQ, rows.count) - 1) + 1, mask.q_len);
  bool any = false, all = key + kBlockKV <= mask.kv_len;
  if (kWholeRows) all &= row + kBlockQ <= mask.valid_rows();
  if (region.i < region.i_end && region.j < region.j_end) {
#pragma unroll 1
    for (int h = 0; h < p.masks_of_rows; h++) {
      region.h = rows.head_q(head) + h;
      Sight sees = both(band_sees(mask, region), tree_sees(p.problem, region));
      if (sees == kSome) sees = look(mask, region);
      any |= sees != kNone, all &= sees == kAll;
    }
  } else {
    all = false;
  }
  if (lane_id() == 0) p.sights[index] = sight(any, any && all);
}
