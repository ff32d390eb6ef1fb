// inf and NaN in a partly visible tile. A product p v multiplies what a row does not see by p = 0,
// and 0 inf and 0 NaN are NaN. So where such a tile holds any (practically never), each row first
// adds those that it sees, then the tile loses them all, then the product runs as always.
#pragma once
#include "gemm.cuh"

// Whether this thread copied inf or NaN into the tile: asked between its copies' arrival and the
// barrier that shows them to the others, which can carry the answer (__syncthreads_or).
template <int kThreads, class Tile>
DEVICE bool copied_non_finite(const Tile& tile) {
  bool found = false;
  for_each_own_vector<kThreads, Tile, 1>([&](int row, int col) {
#pragma unroll
    for (int e = 0; e < ceil_div(kVec, 2); e++) {
      // A vector of one element: its pair's other half is another thread's and may not be there
      // yet.
      const u32 address = tile.address(row, col + 2 * e);
      const u32 pair = kVec == 1 ? ld_shared_u16(address) : ld_shared_u32(address);
      found |= !is_finite(pair) || !is_finite(pair >> 16);
    }
  });
  return found;
}

// acc += what of tile's rows is not finite, where visible(acc row, tile row). kAsNaN: what
// multiplies it is 0 or NaN there (a score that is not finite), so that the product is NaN.
template <bool kAsNaN, int kM, int kN, class Tile, class Visible>
DEVICE void add_non_finite(float (&acc)[kM][kN][4], const Tile& tile, int first_col,
                           const Visible& visible) {
#pragma unroll 1
  for (int row = 0; row < Tile::kRows; row++) {
    const int warp_col =
        opaque(first_col);  // hoisted column addresses would spill in the main loop
    bool sees[kM][2];
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) sees[m][r] = visible(acc_row(m, 2 * r), row);
#pragma unroll
    for (int n = 0; n < kN; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const u16 bits = ld_shared_u16(tile.address(row, warp_col + acc_col(n, e)));
        const float value = is_finite(bits) ? 0.f
                            : kAsNaN        ? not_a_number()
                                            : to_float<Element>(bits);
#pragma unroll
        for (int m = 0; m < kM; m++)
#pragma unroll
          for (int r = 0; r < 2; r++) acc[m][n][2 * r + e] += sees[m][r] ? value : 0.f;
      }
  }
}

template <int kThreads, class Tile>
DEVICE void zero_non_finite(const Tile& tile) {
#pragma unroll 1
  for (int index = threadIdx.x; index < Tile::kRows * Tile::kCols; index += kThreads) {
    const u32 address = tile.address(index / Tile::kCols, index % Tile::kCols);
    if (!is_finite(ld_shared_u16(address))) st_shared(address, (u16)0);
  }
}
