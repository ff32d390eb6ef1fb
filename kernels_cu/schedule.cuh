// Which tiles a block works on, in which order.
#pragma once
#include "mask.cuh"

// The entries of one tile's list, from the last to the first: the tiles of the other side that see
// any of it.
struct ListedTiles {
  const int2* entries;  // 2 tile + (partly visible), turn
  int last, index, current;

  DEVICE ListedTiles(const TileLists& lists, int batch, int head, int tile)
      : entries(lists.entries + batch * lists.batch_stride + head * lists.head_stride +
                tile * lists.pitch + 1),
        last(entries[-1].x - 1),
        index(last),
        current(at(last)) {}

  DEVICE bool valid() const { return index >= 0; }
  DEVICE bool has_next() const { return index > 0; }
  DEVICE bool has_previous() const { return index < last; }
  DEVICE bool empty() const { return last < 0; }
  DEVICE int next() const { return at(index - 1); }
  DEVICE int previous() const { return at(index + 1); }
  DEVICE int final() const { return at(0); }
  DEVICE void advance() { current = at(--index); }
  DEVICE bool partly_visible() const { return entries[index].x & 1; }
  // How many key tiles add to this query tile before this one.
  DEVICE int turn() const { return entries[index].y; }

 private:
  DEVICE int at(int index) const { return index < 0 ? 0 : entries[index].x >> 1; }
};

// The key tiles of one query tile, from the last to the first, each partly or fully visible.
struct BandKeyTiles {
  Interval visited, full;
  int current;

  DEVICE BandKeyTiles(const Mask& mask, int, int row, int block_q, int block_kv)
      : visited(mask.key_tiles(row, block_q, block_kv)),
        full(mask.full_key_tiles(row, block_q, block_kv)),
        current(visited.end - 1) {}

  DEVICE bool valid() const { return current >= visited.begin; }
  DEVICE bool has_next() const { return current > visited.begin; }
  DEVICE int next() const { return current - 1; }
  DEVICE void advance() { current--; }
  DEVICE bool partly_visible() const { return current < full.begin || current >= full.end; }
};
struct ListedKeyTiles : ListedTiles {
  // `head`: of Rows.
  DEVICE ListedKeyTiles(const Mask& mask, int head, int row, int block_q, int)
      : ListedTiles(mask.problem.lists, mask.batch, head, row / block_q) {}
};

// The query tiles of one key tile, from the last to the first: the lower key tiles, whose turn
// comes before, have then long left the diagonal, where this one ends.
struct BandQueryTiles {
  const Mask& mask;
  Interval visited, full;
  int current, block_q, block_kv, key_tile;

  DEVICE BandQueryTiles(const Mask& mask, int, int key_tile, int block_q, int block_kv)
      : mask(mask),
        visited(mask.query_tiles(key_tile * block_kv, block_q, block_kv)),
        full(mask.full_query_tiles(key_tile * block_kv, block_q, block_kv)),
        current(visited.end - 1),
        block_q(block_q),
        block_kv(block_kv),
        key_tile(key_tile) {}

  DEVICE bool valid() const { return current >= visited.begin; }
  DEVICE bool has_next() const { return current > visited.begin; }
  DEVICE bool has_previous() const { return current + 1 < visited.end; }
  DEVICE bool empty() const { return visited.begin >= visited.end; }
  DEVICE int next() const { return current - 1; }
  DEVICE int previous() const { return current + 1; }
  DEVICE int final() const { return visited.begin; }
  DEVICE void advance() { current--; }
  DEVICE void restart(int) { current = visited.end - 1; }
  // Rows past the length count as not visible: zeros times an infinite key would not be zero.
  DEVICE bool partly_visible() const { return current < full.begin || current >= full.end; }
  // Whether the tile after a fully visible one is fully visible too.
  DEVICE bool stay_full() const { return current >= full.begin; }
  // How many key tiles add to this query tile before this one.
  DEVICE int turn() const {
    return key_tile - mask.key_tiles(current * block_q, block_q, block_kv).begin;
  }
};
struct ListedQueryTiles : ListedTiles {
  const Mask& mask;
  int key_tile;

  // `head`: of Rows.
  DEVICE ListedQueryTiles(const Mask& mask, int head, int key_tile, int, int)
      : ListedTiles(mask.problem.lists, mask.batch, head, key_tile),
        mask(mask),
        key_tile(key_tile) {}
  DEVICE bool stay_full() const { return valid() && !partly_visible(); }
  // With the same key tile's list of another head.
  DEVICE void restart(int head) {
    (ListedTiles&)* this = ListedTiles(mask.problem.lists, mask.batch, head, key_tile);
  }
};

template <bool kListed>
struct TilesOf {
  typedef ListedKeyTiles OfQueries;
  typedef ListedQueryTiles OfKeys;
};
template <>
struct TilesOf<false> {
  typedef BandKeyTiles OfQueries;
  typedef BandQueryTiles OfKeys;
};
// A mask's tree leaves lists of tiles; without one, two intervals say it all.
typedef TilesOf<kHasTree>::OfQueries KeyTiles;
typedef TilesOf<kHasTree>::OfKeys QueryTiles;

// The query tiles of a key tile in every head of q that shares its key head, one head after the
// other.
struct GroupTiles {
  QueryTiles tiles;
  int head, end;  // of q

  // `tiles`: of the group's first head.
  DEVICE GroupTiles(const QueryTiles& tiles, int head_k, int group)
      : tiles(tiles), head(head_k * group), end(head + group) {
    if (tiles.empty()) next_head();
  }

  DEVICE bool valid() const { return head < end; }
  DEVICE void advance() {
    tiles.advance();
    settle();
  }
  // After a head's last tile, moves on to the next head that has any.
  DEVICE void settle() {
    if (!tiles.valid()) next_head();
  }

 private:
  DEVICE void next_head() {
    do {
      if (++head < end) tiles.restart(head);
    } while (head < end && tiles.empty());
  }
};

// Forward: sections of (batch, head) pairs whose keys and values fit the L2 cache; inside a section
// the last query tiles first, which under a causal mask are the longest.
DEVICE Work forward_work(const Problem& p, const Rows& rows, int block_q, int heads_per_section,
                         int index) {
  if (kPacked) return row_tile(p, rows, block_q, row_tiles(p, rows, block_q) - 1 - index);
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
  if (kPacked) {
    const int2 tile = p.packing.key_tiles[index / p.heads_k];
    return {tile.y, (int)(index % p.heads_k), tile.x};
  }
  const u32 heads = p.batch * p.heads_k;
  const int head = index % heads;
  return {(int)(index / heads), head % p.heads_k, head / p.heads_k};
}
