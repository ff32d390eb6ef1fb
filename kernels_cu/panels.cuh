// A tile of 16-bit elements as TMA writes it and wgmma reads it: panels of 64 columns, or of 32
// where 64 do not divide the columns. In a panel rows follow each other without gaps, and the
// 16-byte chunks of a row are permuted by the hardware's swizzle, an XOR of address bits; so bases
// are multiples of 1024 bytes.
#pragma once
#include "params.cuh"
#include "ptx/memory.cuh"
#include "ptx/tma.cuh"

template <int kRows_, int kCols_, int kPanelCols_ = kCols_ % 64 == 0 ? 64 : 32>
struct Panels {
  static constexpr int kRows = kRows_, kCols = kCols_, kPanelCols = kPanelCols_;
  static constexpr int kCount = kCols / kPanelCols;
  static constexpr int kPitch = kPanelCols * 2;  // bytes
  static constexpr int kPanelBytes = kRows * kPitch;
  static constexpr int kBytes = kCount * kPanelBytes;
  static_assert(kPanelCols == 64 || kPanelCols == 32, "the swizzles of 128 and of 64 bytes");
  static_assert(kCount * kPanelCols == kCols, "panels are whole");

  u32 base;

  // The swizzle: address bits 4-6 ^= bits 7-9 in a panel of 64 columns, 4-5 ^= 7-8 in one of 32.
  static DEVICE int swizzle(int row) { return kPanelCols == 64 ? row % 8 : row / 2 % 4; }
  // Of the 16-byte chunk holding columns 8 chunk ... 8 chunk + 7.
  DEVICE u32 chunk_address(int row, int chunk) const {
    constexpr int kChunks = kPanelCols / 8;
    return base + chunk / kChunks * kPanelBytes + row * kPitch +
           ((chunk % kChunks ^ swizzle(row)) << 4);
  }
  DEVICE u32 address(int row, int col) const { return chunk_address(row, col / 8) + col % 8 * 2; }
};

// Coordinates in a map, column and head aside (cuflash/_params.py, row_map). Where rows end with
// the arrays they are row and batch entry. Else a map is such that only the first `length` rows of
// a batch entry exist: kWrap - length rows count as before them, so the row axis, kWrap long, ends
// with the length. What that adds to the address the last axis takes off again, as its stride times
// kWrap wraps around 64 bits; the axis of `place` advances by 16 bytes.
constexpr int kWrap = 1 << 30;
struct RowPlace {
  int row, place, wrap;

  DEVICE RowPlace(const Problem& p, const Tensor& x, int first_row, int length, int batch)
      : row(first_row), place(batch), wrap(0) {
    if (!kPacked && !p.q_lens && !p.kv_lens) return;
    row += kWrap - length;
    place = (int)((length * x.seq_stride + batch * x.batch_stride) / 8);  // tma_obstacle: it fits
    wrap = kWrap;
  }
};

// The tile's rows from first_row on, of which `length` count and the others read as zeros.
template <class Tile>
DEVICE void load_panels(const Tile& tile, const TensorMap* map, u32 barrier, const Problem& p,
                        const Tensor& x, int first_row, int length, int head, int batch) {
  const RowPlace at(p, x, first_row, length, batch);
#pragma unroll
  for (int panel = 0; panel < Tile::kCount; panel++)
    tma_load(tile.base + panel * Tile::kPanelBytes, map, barrier, panel * Tile::kPanelCols, at.row,
             at.place, head, at.wrap);
}

// The tile to the rows from first_row on; those beyond the array are dropped or, where sequences
// are packed, those beyond `length`, by a map as load_panels has it.
template <class Tile>
DEVICE void store_panels(const Tile& tile, const TensorMap* map, const Problem& p, const Tensor& x,
                         int first_row, int length, int head, int batch) {
  const RowPlace at(p, x, first_row, length, batch);
#pragma unroll
  for (int panel = 0; panel < Tile::kCount; panel++) {
    const u32 source = tile.base + panel * Tile::kPanelBytes;
    const int col = panel * Tile::kPanelCols;
    if constexpr (kPacked)
      tma_store(map, source, col, at.row, at.place, head, at.wrap);
    else
      tma_store(map, source, col, first_row, head, batch);
  }
}
