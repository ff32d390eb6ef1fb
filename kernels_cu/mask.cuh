// Which keys a query sees. causal, window, offset and lengths all come down to one interval of keys
// per query, whose two ends never decrease from one query to the next; so tiles have ranges in both
// directions. A mask's tree (generated.cuh) hides more of it, pair by pair.
#pragma once
#include "generated.cuh"
#include "rows.cuh"

struct Interval {
  int begin, end;  // [begin, end); empty where end <= begin
};

// Farther than any array reaches, and no sum with a window wraps around.
constexpr i64 kFarthestOffset = 1ll << 60;

struct Mask {
  const Problem& problem;
  Rows rows;
  int batch;
  i64 offset;
  int q_start, k_start;  // of a packed sequence, else 0
  int q_len, kv_len;
  int first;  // query i sees keys i + first ...
  int last;   // ... to i + last, inclusive

  DEVICE Mask(const Problem& p, int batch) : problem(p), rows(p), batch(batch) {
    q_start = k_start = 0;
    if constexpr (kPacked) {
      q_start = p.packing.query_edges[batch], k_start = p.packing.key_edges[batch];
      q_len = p.packing.query_edges[batch + 1] - q_start;
      kv_len = p.packing.key_edges[batch + 1] - k_start;
      rows.count = q_len * rows.group;
    } else {
      q_len = p.q_lens ? clamp(p.q_lens[batch], 0, p.seqlen_q) : p.seqlen_q;
      kv_len = p.kv_lens ? clamp(p.kv_lens[batch], 0, p.seqlen_k) : p.seqlen_k;
    }
    offset = p.offset_is_given ? p.offset : (i64)kv_len - q_len;
    if (p.offsets) offset = larger(smaller(p.offsets[batch], kFarthestOffset), -kFarthestOffset);
    // Beyond these ends nothing changes, and 0 <= i < Sq keeps i + first and i + last + 1 in 32
    // bits.
    first = clamp(offset - p.window_left, -p.seqlen_q, p.seqlen_k);
    last = clamp(offset + p.window_right, -p.seqlen_q - 1, p.seqlen_k);
  }

  DEVICE Interval keys_of_position(int position) const {
    if (position >= q_len) return {0, 0};
    return {clamp(position + first, 0, kv_len), clamp(position + last + 1, 0, kv_len)};
  }
  DEVICE Interval keys_of_row(int row) const { return keys_of_position(rows.position(row)); }

  // The other side: the positions that see a key.
  DEVICE Interval positions_of_key(int key) const {
    if (key >= kv_len) return {0, 0};
    return {clamp((i64)key - last, 0, q_len), clamp((i64)key - first + 1, 0, q_len)};
  }

  // `head`: of q, the first of those packed into the rows.
  DEVICE Place place(int head, int row, int key) const {
    return {batch, head + rows.head_in_group(row), rows.position(row), key, offset};
  }
  DEVICE bool visible(int head, int row, int key) const {
    const Interval keys = keys_of_row(row);
    if (key < keys.begin || key >= keys.end) return false;
    return !kHasTree || tree_sees(problem, place(head, row, key));
  }

  // The first row of a head of an array of queries, or of keys.
  DEVICE u16* queries(const Tensor& x, int head) const {
    u16* of_head = base_of(x, array_batch(), head);
    return kPacked ? of_head + q_start * x.seq_stride : of_head;
  }
  DEVICE u16* keys(const Tensor& x, int head) const {
    u16* of_head = base_of(x, array_batch(), head);
    return kPacked ? of_head + k_start * x.seq_stride : of_head;
  }
  // The same in a (B, Hq, Sq) array.
  DEVICE i64 stats(int head_q) const {
    const i64 head = (i64)array_batch() * problem.heads_k * problem.group + head_q;
    return head * problem.seqlen_q + q_start;
  }
  DEVICE int array_batch() const { return kPacked ? 0 : batch; }
  DEVICE int q_end() const { return q_start + q_len; }
  DEVICE int k_end() const { return k_start + kv_len; }
  // Keys whose gradients are this sequence's to write.
  DEVICE int own_keys() const { return kPacked ? kv_len : problem.seqlen_k; }

  // Rows that hold queries: the others read as zeros.
  DEVICE int valid_rows() const { return q_len * rows.group; }

  // Key tiles that the query tile [row, row + block_q) visits.
  DEVICE Interval key_tiles(int row, int block_q, int block_kv) const {
    const int first_position = rows.position(row);
    if (first_position >= q_len) return {0, 0};
    const int begin = clamp(first_position + first, 0, kv_len);
    const int end = clamp(last_position(row, block_q) + last + 1, 0, kv_len);
    return {begin / block_kv, ceil_div(end, block_kv)};
  }

  // Of those, the tiles that every row of the query tile sees whole.
  DEVICE Interval full_key_tiles(int row, int block_q, int block_kv) const {
    const int first_position = rows.position(row);
    if (first_position >= q_len) return {0, 0};
    const int begin = keys_of_position(last_position(row, block_q)).begin;
    const int end = keys_of_position(first_position).end;
    return {ceil_div(begin, block_kv), end / block_kv};
  }

  // Query tiles that visit the key tile [key, key + block_kv): the same relation from the other
  // side.
  DEVICE Interval query_tiles(int key, int block_q, int block_kv) const {
    if (key >= kv_len) return {0, 0};
    const int begin = clamp((i64)key - last, 0, q_len);            // i + last >= key
    const int end = clamp((i64)key + block_kv - first, 0, q_len);  // i + first < key + block_kv
    if (begin >= end) return {0, 0};
    return {begin * rows.group / block_q, ceil_div(end * rows.group, block_q)};
  }

  // Of those, the tiles in which every row sees all of the key tile, and none is past the length.
  DEVICE Interval full_query_tiles(int key, int block_q, int block_kv) const {
    if (key + block_kv > kv_len) return {0, 0};
    const int begin = clamp((i64)key + block_kv - 1 - last, 0, q_len);  // i + last >= the last key
    const int end = clamp((i64)key + 1 - first, 0, q_len);              // i + first <= key
    return {ceil_div(begin * rows.group, block_q), end * rows.group / block_q};
  }

 private:
  DEVICE int last_position(int row, int block_q) const {
    return smaller(rows.position(smaller(row + block_q, rows.count) - 1), q_len - 1);
  }
  template <class T>
  static DEVICE int clamp(T x, int low, int high) {
    return (int)smaller(larger(x, (T)low), (T)high);
  }
};
