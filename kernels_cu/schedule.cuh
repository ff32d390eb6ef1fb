// Which tiles a block works on, in which order.
#pragma once
#include "mask.cuh"

// The key tiles of one query tile, from the last to the first, each partly or fully visible.
struct KeyTiles {
  Interval visited, full;
  int current;

  DEVICE KeyTiles(const Mask& mask, int row, int block_q, int block_kv)
      : visited(mask.key_tiles(row, block_q, block_kv)),
        full(mask.full_key_tiles(row, block_q, block_kv)),
        current(visited.end - 1) {}

  DEVICE bool valid() const { return current >= visited.begin; }
  DEVICE bool has_next() const { return current > visited.begin; }
  DEVICE void advance() { current--; }
  DEVICE bool partly_visible() const { return current < full.begin || current >= full.end; }
};

// The query tiles of one key tile, from the last to the first: the lower key tiles, whose turn
// comes before, have then long left the diagonal, where this one ends.
struct QueryTiles {
  const Mask& mask;
  Interval visited;
  int current, block_q, block_kv, key_tile;

  DEVICE QueryTiles(const Mask& mask, int key_tile, int block_q, int block_kv)
      : mask(mask),
        visited(mask.query_tiles(key_tile * block_kv, block_q, block_kv)),
        current(visited.end - 1),
        block_q(block_q),
        block_kv(block_kv),
        key_tile(key_tile) {}

  DEVICE bool valid() const { return current >= visited.begin; }
  DEVICE bool has_next() const { return current > visited.begin; }
  DEVICE bool has_previous() const { return current + 1 < visited.end; }
  DEVICE bool empty() const { return visited.begin >= visited.end; }
  DEVICE int next() const { return current - 1; }
  DEVICE void advance() { current--; }
  // Rows past the length count as not visible: zeros times an infinite key would not be zero.
  DEVICE bool partly_visible() const {
    const Interval full = mask.full_key_tiles(current * block_q, block_q, block_kv);
    return key_tile < full.begin || key_tile >= full.end ||
           (current + 1) * block_q > mask.valid_rows();
  }
  // How many key tiles add to this query tile before this one.
  DEVICE int turn() const {
    return key_tile - mask.key_tiles(current * block_q, block_q, block_kv).begin;
  }
};

// Those query tiles in every head of q that shares a key head, one head after the other.
struct GroupTiles {
  QueryTiles tiles;
  int head, end;  // of q

  DEVICE GroupTiles(const QueryTiles& tiles, int head_k, int group)
      : tiles(tiles), head(head_k * group), end(tiles.empty() ? head : head + group) {}

  DEVICE bool valid() const { return head < end; }
  DEVICE bool has_next() const { return tiles.has_next() || head + 1 < end; }
  DEVICE void advance() {
    if (tiles.has_next())
      tiles.advance();
    else
      head++, tiles.current = tiles.visited.end - 1;
  }
};

struct Work {
  int tile;
  int head;  // of Rows in the forward, of k in the backward
  int batch;
};

// Forward: sections of (batch, head) pairs whose keys and values fit the L2 cache; inside a section
// the last query tiles first, which under a causal mask are the longest.
DEVICE Work forward_work(const Problem& p, const Rows& rows, int block_q, int heads_per_section,
                         int index) {
  const int tiles = rows.tiles(block_q);
  const int heads = p.batch * rows.heads;
  const int section = index / (tiles * heads_per_section);
  const int in_section = index % (tiles * heads_per_section);
  const int section_heads = smaller(heads_per_section, heads - section * heads_per_section);
  const int head = section * heads_per_section + in_section % section_heads;
  return {tiles - 1 - in_section / section_heads, head % rows.heads, head / rows.heads};
}

// Backward: heads fastest, so that blocks that run together rarely add to the same query tile; key
// tiles ascending, because the first ones have the most queries under a causal mask.
DEVICE Work backward_work(const Problem& p, u32 index) {
  const u32 heads = p.batch * p.heads_k;
  const int head = index % heads;
  return {(int)(index / heads), head % p.heads_k, head / p.heads_k};
}
