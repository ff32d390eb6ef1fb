// acc += a b for the tiles of one warp: fragments from shared memory or registers, mma.sync.
#pragma once
#include "accumulator.cuh"
#include "ptx/mma.cuh"
#include "tile.cuh"

// a[m][k]: 16x16 matrices at rows row + 16 m, columns 16 k of a tile that holds a ...
template <class Tile>
struct RowsOf {
  const Tile& tile;
  int row;
  DEVICE void load(u32 (&a)[4], int m, int k) const {
    ldmatrix_x4(a, tile.chunk_address(row + 16 * m + lane_id() % 16, 2 * k + lane_id() / 16));
  }
};
// ... or at columns col + 16 m, rows 16 k of a tile that holds aᵀ ...
template <class Tile>
struct ColumnsOf {
  const Tile& tile;
  int col;
  DEVICE void load(u32 (&a)[4], int m, int k) const {
    ldmatrix_x4_trans(a, tile.chunk_address(16 * k + lane_id() % 8 + lane_id() / 16 * 8,
                                            col / 8 + 2 * m + lane_id() / 8 % 2));
  }
};
// ... or in registers, packed from an accumulator.
template <int kM, int kN>
struct Packed {
  u32 fragments[kM][kN / 2][4];
  DEVICE explicit Packed(const float (&acc)[kM][kN][4]) { pack_operand(fragments, acc); }
  DEVICE void load(u32 (&a)[4], int m, int k) const {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = fragments[m][k][i];
  }
};

// b: 16 (k) x 16 (n) at columns 16 k, rows row + 16 n of a tile that holds bᵀ ...
template <class Tile>
struct TransposedRight {
  const Tile& tile;
  int row;
  DEVICE void load(u32 (&b)[4], int n, int k) const {
    ldmatrix_x4(b, tile.chunk_address(row + 16 * n + lane_id() % 8 + lane_id() / 16 * 8,
                                      2 * k + lane_id() / 8 % 2));
  }
};
// ... or at rows 16 k, columns col + 16 n of a tile that holds b.
template <class Tile>
struct Right {
  const Tile& tile;
  int col;
  DEVICE void load(u32 (&b)[4], int n, int k) const {
    ldmatrix_x4_trans(
        b, tile.chunk_address(16 * k + lane_id() % 16, col / 8 + 2 * n + lane_id() / 16));
  }
};

template <int kK, int kM, int kN, class Left, class RightOperand>
DEVICE void gemm(float (&acc)[kM][kN][4], const Left& left, const RightOperand& right) {
  static_assert(kN % 2 == 0, "columns come in pairs of 8");
#pragma unroll
  for (int k = 0; k < kK; k++) {
    u32 a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; m++) left.load(a[m], m, k);
#pragma unroll
    for (int n = 0; n < kN / 2; n++) {
      u32 b[4];
      right.load(b, n, k);
#pragma unroll
      for (int m = 0; m < kM; m++) {
        mma_m16n8k16<Element>(acc[m][2 * n], a[m], b[0], b[1]);
        mma_m16n8k16<Element>(acc[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}
