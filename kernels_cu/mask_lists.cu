// The tiles that each tile visits, in ascending order: its line of the matrices of mask_tiles.cu,
// without the tiles of which nothing is visible.
//
// One warp per line of one matrix. First the lines of the query tiles, whose key tiles take turns
// in the order of their list (turns), then for a backward pass those of the key tiles, which look
// these turns up. No shared memory.
#include "leaves.cuh"

#ifndef WARPS
#define WARPS 4
#endif

struct MaskListsParams {
  const u8* sights;  // (matrices, query tiles, key tiles)
  int2* entries;     // (matrices, lines, 1 + steps): a count; 2 step + (partly visible), turn
  u32* turns;        // (matrices, query tiles, key tiles), or null if not wanted
  i64 line_stride, step_stride;  // in a matrix: of the lists' own tiles, and of those they list
  i64 matrices;
  int lines, steps;
  int of_keys, padding;  // whether the lines are key tiles
};
#ifdef PARAMS_BYTES
static_assert(sizeof(MaskListsParams) == PARAMS_BYTES,
              "MaskListsParams differs from the packed one");
#endif

extern "C" __global__ void __launch_bounds__(WARPS* kWarpSize)
    mask_lists(const __grid_constant__ MaskListsParams p) {
  const i64 index = (i64)blockIdx.x * WARPS + warp_id();
  if (index >= p.matrices * p.lines) return;
  const i64 first = index / p.lines * p.lines * p.steps + index % p.lines * p.line_stride;
  int2* entries = p.entries + index * (1 + p.steps);
  int count = 0;
#pragma unroll 1
  for (int begin = 0; begin < p.steps; begin += kWarpSize) {
    const int step = begin + lane_id();
    const i64 tile = first + step * p.step_stride;
    const int sees = step < p.steps ? p.sights[tile] : kNone;
    const u32 visited = __ballot_sync(0xffffffff, sees != kNone);
    const int place = count + __popc(visited & ((1u << lane_id()) - 1));
    if (sees != kNone) {
      const int turn = p.of_keys ? (p.turns ? p.turns[tile] : 0) : place;
      entries[1 + place] = make_int2(2 * step + (sees == kSome), turn);
      if (!p.of_keys && p.turns) p.turns[tile] = place;
    }
    count += __popc(visited);
  }
  if (lane_id() == 0) entries[0] = make_int2(count, 0);
}
