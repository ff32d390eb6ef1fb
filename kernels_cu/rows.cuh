// The rows of a head. With PACK_GROUP they are those of one key head: every query position of every
// head of its group, head fastest, so that a tile of rows reads K and V once for the whole group.
// Otherwise they are the positions of one query head.
#pragma once
#include "params.cuh"

#ifndef PACK_GROUP
#define PACK_GROUP 0
#endif
constexpr bool kPackGroup = PACK_GROUP;

struct Rows {
  int group;  // heads packed into the rows
  int heads;  // that have rows of their own: of k where the group is packed, else of q
  int count;  // Sq * group
  u32 magic;  // of the division by group, which would cost many registers in the main loops
  int shift;

  DEVICE explicit Rows(const Problem& p)
      : group(kPackGroup ? p.group : 1),
        heads(kPackGroup ? p.heads_k : p.heads_k * p.group),
        count(p.seqlen_q * group),
        magic(p.group_magic),
        shift(p.group_shift) {}

  DEVICE int head_q(int head) const { return head * group; }  // the first of the group
  DEVICE int head_k(const Problem& p, int head) const {
    return kPackGroup || p.group == 1 ? head : head / p.group;
  }
  DEVICE int position(int row) const { return kPackGroup ? __umulhi(row, magic) >> shift : row; }
  DEVICE int head_in_group(int row) const { return kPackGroup ? row - position(row) * group : 0; }
  DEVICE int tiles(int block_q) const { return ceil_div(count, block_q); }

  // First element of a row in x, whose data pointer already is at (batch, 0, first head of the
  // group).
  template <class Element>
  DEVICE Element* pointer(Element* base, const Tensor& x, int row) const {
    return base + position(row) * x.seq_stride + head_in_group(row) * x.head_stride;
  }
  // Where a row stands in a (B, Hq, Sq) array, relative to the first row of its group's first head.
  DEVICE i64 stat_index(const Problem& p, int row) const {
    return (i64)head_in_group(row) * p.seqlen_q + position(row);
  }
};

// The element (batch, 0, head) of x.
DEVICE u16* base_of(const Tensor& x, int batch, int head) {
  return (u16*)x.data + batch * x.batch_stride + head * x.head_stride;
}

// A tile of a head's rows or keys.
struct Work {
  int tile;
  int head;   // of Rows, or of k where the tile is of keys
  int batch;  // or sequence; -1: none, there are fewer tiles than places for them

  DEVICE bool exists() const { return !kPacked || batch >= 0; }
};

// How many row tiles there are at most, in all heads of Rows.
DEVICE int row_tiles(const Problem& p, const Rows& rows, int block_q) {
  if (kPacked) return rows.heads * p.packing.query_tile_count;
  return p.batch * rows.heads * rows.tiles(block_q);
}
// The row tiles of a head after each other.
DEVICE Work row_tile(const Problem& p, const Rows& rows, int block_q, int index) {
  if (kPacked) {
    const int count = p.packing.query_tile_count;
    const int2 tile = p.packing.query_tiles[index % count];
    return {tile.y, index / count, tile.x};
  }
  const int tiles = rows.tiles(block_q);
  return {index % tiles, index / tiles % rows.heads, index / tiles / rows.heads};
}
