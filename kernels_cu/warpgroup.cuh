// acc += a b for one warpgroup, 64 rows: descriptors of tiles in shared memory for wgmma.
#pragma once
#include "accumulator.cuh"
#include "panels.cuh"
#include "ptx/sync.cuh"
#include "ptx/wgmma.cuh"

constexpr int kWarpgroupThreads = 128;
constexpr int kWarpgroupRows = 64;

// The compiler cannot know that x is the same in all lanes, and wgmma wants it to.
DEVICE int warp_uniform(int x) { return __shfl_sync(0xffffffff, x, 0); }

DEVICE int warpgroup_id() { return warp_uniform(threadIdx.x / kWarpgroupThreads); }
DEVICE int warpgroup_thread() { return threadIdx.x % kWarpgroupThreads; }
// The first of this warp's 16 rows.
DEVICE int warpgroup_row() { return warp_id() % 4 * 16; }

// Arrives once for each warp, behind a wait for the products that have read the stage: they end for
// all lanes at once.
DEVICE void release_read(u32 mbarrier) {
  if (lane_id() == 0) mbarrier_arrive(mbarrier);
}
// The same anywhere, once the warp's last lane is done: a lane still waiting for the previous
// phase could miss two.
DEVICE void release(u32 mbarrier) {
  __syncwarp();
  release_read(mbarrier);
}

// A place in a ring of stages, and the parity of its barriers' present phase, which turns over once
// a round.
template <int kStages>
struct Stage {
  int index = 0;
  u32 parity = 0;

  // Of two stages by bits: fewest instructions.
  DEVICE Stage next() const {
    if (kStages == 2) return {index ^ 1, parity ^ index};
    const bool wraps = index + 1 == kStages;
    return {wraps ? 0 : index + 1, parity ^ wraps};
  }
  DEVICE Stage previous() const {
    // Opaque: the compiler would toggle each address, which takes two instructions.
    if (kStages == 2) return {opaque(index ^ 1), parity ^ index ^ 1};
    const bool wraps = index == 0;
    return {wraps ? kStages - 1 : index - 1, parity ^ wraps};
  }
};

// Matrix descriptor (PTX ISA, wgmma): address, leading and stride offsets in units of 16 bytes. No
// address of shared memory carries out of its field, so constants may be added to the low half.
template <class Tile>
struct Descriptor {
  u32 low;

  DEVICE Descriptor(u32 address, u32 leading_bytes)
      : low(leading_bytes >> 4 << 16 | address >> 4) {}
  DEVICE explicit Descriptor(u32 low) : low(low) {}
  // Computed once: the compiler would compute it anew where it is used.
  DEVICE Descriptor kept() const { return Descriptor((u32)warp_uniform(low)); }
  DEVICE Descriptor of_tile(int index) const {
    return Descriptor(low + index * (Tile::kBytes / 16));
  }
  DEVICE u64 plus(int bytes) const {
    constexpr u32 kSwizzle = Tile::kPanelCols == 64 ? 1 : 2;
    constexpr u32 kStrideBytes = 8 * Tile::kPitch;  // between groups of eight rows
    return (u64)(kSwizzle << 30 | kStrideBytes >> 4) << 32 | (low + bytes / 16);
  }
};

// Rows `row` and on of a tile; the product contracts its columns.
template <class Tile>
struct RowOperand {
  static constexpr int kTrans = 0;
  Descriptor<Tile> first;
  // `row`: a multiple of 8.
  DEVICE RowOperand(const Tile& tile, int row) : first(tile.base + row * Tile::kPitch, 16) {}
  DEVICE explicit RowOperand(Descriptor<Tile> first) : first(first) {}
  // The same rows of one of the tiles that follow each other.
  DEVICE RowOperand of_tile(int index) const { return RowOperand(first.of_tile(index)); }
  DEVICE u64 at(int k) const {
    const int col = 16 * k;
    return first.plus(col / Tile::kPanelCols * Tile::kPanelBytes + col % Tile::kPanelCols * 2);
  }
};
// Columns `col` and on of a tile; the product contracts its rows.
template <class Tile>
struct ColumnOperand {
  static constexpr int kTrans = 1;
  Descriptor<Tile> first;
  // `col`: a multiple of a panel's columns.
  DEVICE ColumnOperand(const Tile& tile, int col)
      : first(tile.base + col / Tile::kPanelCols * Tile::kPanelBytes, Tile::kPanelBytes) {}
  DEVICE explicit ColumnOperand(Descriptor<Tile> first) : first(first) {}
  // The same columns of one of the tiles that follow each other.
  DEVICE ColumnOperand of_tile(int index) const { return ColumnOperand(first.of_tile(index)); }
  DEVICE u64 at(int k) const { return first.plus(16 * k * Tile::kPitch); }
};

// Issues the products of steps kFirst to kK of 16; the caller fences before and commits after.
template <int kK, int kFirst = 0, int kN, class Left, class Right>
DEVICE void issue_gemm(float (&acc)[1][kN][4], const Left& a, const Right& b, bool accumulate) {
#pragma unroll
  for (int k = kFirst; k < kK; k++)
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
