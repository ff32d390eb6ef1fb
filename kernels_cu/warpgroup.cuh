// acc += a b for one warpgroup, 64 rows: descriptors of tiles in shared memory for wgmma.
#pragma once
#include "accumulator.cuh"
#include "panels.cuh"
#include "ptx/sync.cuh"
#include "ptx/wgmma.cuh"

constexpr int kWarpgroupThreads = 128;
constexpr int kWarpgroupRows = 64;

DEVICE int warpgroup_id() { return threadIdx.x / kWarpgroupThreads; }
DEVICE int warpgroup_thread() { return threadIdx.x % kWarpgroupThreads; }
// The first of this warp's 16 rows.
DEVICE int warpgroup_row() { return warp_id() % 4 * 16; }

// Matrix descriptor (PTX ISA, wgmma): address, leading and stride offsets in units of 16 bytes.
template <class Tile>
DEVICE u64 descriptor(u32 address, u32 leading_bytes) {
  constexpr u64 kSwizzle = Tile::kPanelCols == 64 ? 1 : 2;
  constexpr u64 kStrideBytes = 8 * Tile::kPitch;  // between groups of eight rows
  return kSwizzle << 62 | kStrideBytes >> 4 << 32 | (u64)(leading_bytes >> 4) << 16 |
         (address & 0x3ffff) >> 4;
}

// Rows `row` and on of a tile; the product contracts its columns.
template <class Tile>
struct RowOperand {
  static constexpr int kTrans = 0;
  const Tile& tile;
  int row;  // a multiple of 8
  DEVICE u64 at(int k) const {
    const int col = 16 * k;
    return descriptor<Tile>(tile.base + col / Tile::kPanelCols * Tile::kPanelBytes +
                                row * Tile::kPitch + col % Tile::kPanelCols * 2,
                            16);
  }
};
// Columns `col` and on of a tile; the product contracts its rows.
template <class Tile>
struct ColumnOperand {
  static constexpr int kTrans = 1;
  const Tile& tile;
  int col;  // a multiple of a panel's columns
  DEVICE u64 at(int k) const {
    return descriptor<Tile>(
        tile.base + col / Tile::kPanelCols * Tile::kPanelBytes + 16 * k * Tile::kPitch,
        Tile::kPanelBytes);
  }
};

// Issues the products of kK steps of 16; the caller fences before and commits after.
template <int kK, int kN, class Left, class Right>
DEVICE void issue_gemm(float (&acc)[1][kN][4], const Left& a, const Right& b, bool accumulate) {
#pragma unroll
  for (int k = 0; k < kK; k++)
    Wgmma<Element, 8 * kN>::template ss<Left::kTrans, Right::kTrans>(acc[0], a.at(k), b.at(k),
                                                                     accumulate || k > 0);
}
template <int kK, int kN, class Right>
DEVICE void issue_gemm(float (&acc)[1][kN][4], const u32 (&a)[1][kK][4], const Right& b,
                       bool accumulate) {
#pragma unroll
  for (int k = 0; k < kK; k++)
    Wgmma<Element, 8 * kN>::template rs<Right::kTrans>(acc[0], a[0][k], b.at(k),
                                                       accumulate || k > 0);
}
