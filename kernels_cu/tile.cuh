// A tile of 16-bit elements in shared memory, swizzled so that the eight rows of an 8x8 matrix lie
// in different banks, and its copies from and to global memory.
#pragma once
#include "params.cuh"
#include "ptx/math.cuh"
#include "ptx/memory.cuh"

#ifndef VEC_BYTES
#define VEC_BYTES 16
#endif
// The widest access that the alignment of every array of the call allows: 16, 8, 4 or 2 bytes.
constexpr int kVecBytes = VEC_BYTES;
constexpr int kVec = kVecBytes / 2;
constexpr int kCopyUnroll = 4;  // more only costs registers

template <int kRows_, int kCols_>
struct SmemTile {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kPitch = kCols * 2;  // bytes
  static constexpr int kBytes = kRows * kPitch;
  static_assert(kCols % 32 == 0, "a row must be a multiple of 64 bytes");
  // Rows of a multiple of 128 bytes start in one bank: XOR the 16-byte chunk with row % 8.
  // Otherwise rows alternate between two halves of the banks: XOR with row / 2 % 4.
  static constexpr int kSwizzle = kPitch % 128 == 0 ? 7 : 3;
  static constexpr int kSwizzleShift = kPitch % 128 == 0 ? 0 : 1;

  u32 base;

  static DEVICE u32 swizzle(int row) { return (row >> kSwizzleShift) & kSwizzle; }
  // Of the 16-byte chunk holding columns 8 chunk ... 8 chunk + 7.
  DEVICE u32 chunk_address(int row, int chunk) const {
    return base + row * kPitch + ((chunk ^ swizzle(row)) << 4);
  }
  DEVICE u32 address(int row, int col) const { return chunk_address(row, col / 8) + col % 8 * 2; }
};

// Calls f(row, col) for each vector of the tile that this thread copies.
template <int kThreads, class Tile, int kUnroll, class F>
DEVICE void for_each_own_vector(const F& f) {
  constexpr int kVecsPerRow = Tile::kCols / kVec;
  constexpr int kVecs = Tile::kRows * kVecsPerRow;
#pragma unroll kUnroll
  for (int i = 0; i < ceil_div(kVecs, kThreads); i++) {
    const int index = threadIdx.x + i * kThreads;
    if (kVecs % kThreads != 0 && index >= kVecs) break;
    f(index / kVecsPerRow, index % kVecsPerRow * kVec);
  }
}

// Global rows [0, valid_rows) of `cols` elements to the tile; all else in it becomes zero.
// `row_pointer` gives the first element of a row and is asked for valid rows only.
template <int kThreads, class Tile, class RowPointer>
DEVICE void load_tile(const Tile& tile, const RowPointer& row_pointer, int valid_rows, int cols) {
  for_each_own_vector<kThreads, Tile, kCopyUnroll>([&](int row, int col) {
    const u32 target = tile.address(row, col);
    const bool inside = row < valid_rows && col < cols;
    const u16* source = row_pointer(inside ? row : 0) + (inside ? col : 0);
    if constexpr (kVecBytes == 2)
      st_shared(target, inside ? *source : (u16)0);
    else
      cp_async<kVecBytes>(target, source, inside ? smaller(cols - col, kVec) * 2 : 0);
  });
}

// Rows a stride apart, from `first` on, as one group of copies.
template <int kThreads, class Tile>
DEVICE void load_rows(const Tile& tile, const u16* first, i64 stride, int valid_rows, int cols) {
  load_tile<kThreads>(tile, [&](int row) { return first + row * stride; }, valid_rows, cols);
  cp_async_commit();
}

// The tile's first valid_rows rows and `cols` columns to global memory.
template <int kThreads, class Tile, class RowPointer>
DEVICE void store_tile(const Tile& tile, const RowPointer& row_pointer, int valid_rows, int cols) {
  for_each_own_vector<kThreads, Tile, kCopyUnroll>([&](int row, int col) {
    if (row >= valid_rows || col >= cols) return;
    u16* target = row_pointer(row) + col;
    const u32 source = tile.address(row, col);
    if (kVecBytes == 16 && col + kVec <= cols) {
      *(uint4*)target = ld_shared_u32x4(source);
      return;
    }
#pragma unroll
    for (int e = 0; e < kVec; e++)
      if (col + e < cols) target[e] = ld_shared_u16(source + e * 2);
  });
}
