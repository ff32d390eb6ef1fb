// inf and NaN in a partly visible tile, for warpgroups. A product p v multiplies what a row does
// not see by p = 0, and 0 inf and 0 NaN are NaN. So where such a tile holds any (practically
// never), its product is summed without the tensor cores, visible elements only.
#pragma once
#include "warpgroup.cuh"

// Whether any of the tile's elements is inf or NaN; one answer for the warpgroup, through
// `barrier`.
template <class Tile>
DEVICE bool holds_non_finite(const Tile& tile, int barrier) {
  u32 sum = 0;  // a pair; 0 x is 0 or NaN
#pragma unroll 4
  for (int offset = warpgroup_thread() * 16; offset < Tile::kBytes;
       offset += kWarpgroupThreads * 16) {
    const uint4 pairs = ld_shared_u32x4(tile.base + offset);
    sum = fma_pair<Element>(pairs.x, 0, sum);
    sum = fma_pair<Element>(pairs.y, 0, sum);
    sum = fma_pair<Element>(pairs.z, 0, sum);
    sum = fma_pair<Element>(pairs.w, 0, sum);
  }
  return named_barrier_or(barrier, kWarpgroupThreads, !is_finite(sum) || !is_finite(sum >> 16));
}

// Element (acc_row(0, 2 r), k) of a left operand in registers. Every lane has to ask.
template <int kK>
struct RegisterLeft {
  const u32 (&fragments)[1][kK][4];
  DEVICE float operator()(int r, int k) const {
    u32 pair =
        0;  // by arithmetic: a branch becomes an index, and fragments then leave the registers
#pragma unroll
    for (int i = 0; i < 2 * kK; i++)
      pair |= fragments[0][i / 2][i % 2 * 2 + r] & -(u32)(i == k / 8);
    pair = __shfl_sync(0xffffffff, pair, lane_id() / 4 * 4 + k % 8 / 2);
    return to_float<Element>(k % 2 ? pair >> 16 : pair);
  }
};

// Element (first_row + acc_row(0, 2 r), k) of a left operand in shared memory, of which the tile
// holds the rows or, kTransposed, the columns.
template <bool kTransposed, class Tile>
struct TileLeft {
  const Tile& tile;
  int first_row;
  DEVICE float operator()(int r, int k) const {
    const int row = first_row + acc_row(0, 2 * r);
    return to_float<Element>(
        ld_shared_u16(kTransposed ? tile.address(k, row) : tile.address(row, k)));
  }
};

// acc += left b over the rows of tile b, from column first_col on; visible(r, k): whether row
// acc_row(0, 2 r) of the warp sees row k of b.
template <int kN, class Left, class Tile, class Visible>
DEVICE void add_visible(float (&acc)[1][kN][4], const Left& left, const Tile& b, int first_col,
                        const Visible& visible) {
#pragma unroll 1
  for (int k = 0; k < Tile::kRows; k++) {
    const int col = opaque(first_col);  // hoisted column addresses would spill in the main loop
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float a = left(r, k);
      if (!visible(r, k)) continue;
      const int warp_col = opaque(first_col);  // hoisted column addresses would spill everywhere
#pragma unroll
      for (int n = 0; n < kN; n++) {
        const u32 pair = ld_shared_u32(b.address(k, col + acc_col(n, 0)));
        acc[0][n][2 * r] += a * to_float<Element>(pair);
        acc[0][n][2 * r + 1] += a * to_float<Element>(pair >> 16);
      }
    }
  }
}
