// The tiles of packed sequences: which sequence each is of, so that work is even however lengths
// differ. One block: its first warp walks over the sequences and sums up their tiles, then each
// thread looks places of the table up. No shared memory; everything written lies within O(tokens).
//
// cu may hold anything: edges are its running maximum, held inside the array, so that sequences
// never overlap and their tiles are at most tokens group / block + sequences.
#include "params.cuh"

#ifndef WARPS
#define WARPS 8
#endif

struct PackedTilesParams {
  const i64* cu;    // (sequences + 1,)
  int* edges;       // (sequences + 1,)
  int* first_tile;  // (sequences + 1,): of a sequence, among all
  int2* tiles;      // (count,): sequence, or -1, and tile in it
  int sequences;
  int tokens;
  int group;  // rows of a token
  int block;  // rows of a tile
  int count, padding;
};
#ifdef PARAMS_BYTES
static_assert(sizeof(PackedTilesParams) == PARAMS_BYTES,
              "PackedTilesParams differs from the packed one");
#endif

DEVICE int edge(const PackedTilesParams& p, int index) {
  return (int)smaller(larger(p.cu[index], 0ll), (i64)p.tokens);
}

// Over the lanes up to this one.
template <class Join>
DEVICE int scan(int x, const Join& join) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int before = __shfl_up_sync(0xffffffff, x, distance);
    if (lane_id() >= distance) x = join(before, x);
  }
  return x;
}

DEVICE void sum_up(const PackedTilesParams& p) {
  int last_edge = edge(p, 0), tiles = 0;
  if (lane_id() == 0) p.edges[0] = last_edge, p.first_tile[0] = 0;
#pragma unroll 1
  for (int first = 0; first < p.sequences; first += kWarpSize) {
    const int sequence = first + lane_id();
    const bool exists = sequence < p.sequences;
    int end = larger(exists ? edge(p, sequence + 1) : 0, last_edge);
    end = scan(end, [](int a, int b) { return larger(a, b); });
    int begin = __shfl_up_sync(0xffffffff, end, 1);
    if (lane_id() == 0) begin = last_edge;
    const int own = exists ? ceil_div((end - begin) * p.group, p.block) : 0;
    const int through = tiles + scan(own, [](int a, int b) { return a + b; });
    if (exists) p.edges[sequence + 1] = end, p.first_tile[sequence + 1] = through;
    last_edge = __shfl_sync(0xffffffff, end, kWarpSize - 1);
    tiles = __shfl_sync(0xffffffff, through, kWarpSize - 1);
  }
}

extern "C" __global__ void __launch_bounds__(WARPS* kWarpSize)
    packed_tiles(const __grid_constant__ PackedTilesParams p) {
  if (warp_id() == 0) sum_up(p);
  __syncthreads();
#pragma unroll 1
  for (int index = threadIdx.x; index < p.count; index += WARPS * kWarpSize) {
    int low = 0, high = p.sequences;  // first_tile[low] <= index < first_tile[high], if any
#pragma unroll 1
    while (high - low > 1) {
      const int middle = low + (high - low) / 2;
      if (p.first_tile[middle] <= index)
        low = middle;
      else
        high = middle;
    }
    const bool exists = p.sequences > 0 && index < p.first_tile[p.sequences];
    p.tiles[index] = exists ? make_int2(low, index - p.first_tile[low]) : make_int2(-1, 0);
  }
}
