// The rules that a mask's tree is made of (cuflash/_mask_tree.py), each as it sees one pair of
// query and key, and as it sees a region of them: none, some or all, where `some` may be a guess.
// Every index is clamped or in bounds by the checks of shapes, whatever the data.
#pragma once
#include "params.cuh"
#include "ptx/math.cuh"

// A pair of query and key.
struct Place {
  int b, h, i, j;
  i64 offset;  // the call's
};

// Queries [i, i_end) and keys [j, j_end), neither empty.
struct Region {
  int b, h, i, i_end, j, j_end;
  i64 offset;
};

// Ordered, so that "and" is the smaller, "or" the larger, "not" the distance to kAll.
enum Sight { kNone, kSome, kAll };
DEVICE Sight both(Sight a, Sight b) { return smaller(a, b); }
DEVICE Sight either(Sight a, Sight b) { return larger(a, b); }
DEVICE Sight opposite(Sight a) { return (Sight)(kAll - a); }
DEVICE bool both(bool a, bool b) { return a && b; }
DEVICE bool either(bool a, bool b) { return a || b; }
DEVICE bool opposite(bool a) { return !a; }
DEVICE Sight sight(bool any, bool all) { return all ? kAll : any ? kSome : kNone; }

// Over the warp.
DEVICE i64 warp_min(i64 x) {
#pragma unroll
  for (int lane = kWarpSize / 2; lane > 0; lane /= 2)
    x = smaller(x, (i64)__shfl_xor_sync(0xffffffff, x, lane));
  return x;
}
DEVICE i64 warp_max(i64 x) {
#pragma unroll
  for (int lane = kWarpSize / 2; lane > 0; lane /= 2)
    x = larger(x, (i64)__shfl_xor_sync(0xffffffff, x, lane));
  return x;
}

struct BandLeaf {
  i64 left, right;
  const i64* offsets;  // (B,) or null
  i64 offset;          // read where `offsets` is null and `offset_is_given`
  i64 offset_is_given;

  DEVICE i64 center(int b, i64 call) const {
    if (!offsets) return offset_is_given ? offset : call;
    return larger(smaller(offsets[b], 1ll << 60), -(1ll << 60));
  }
  DEVICE bool sees(const Place& at) const {
    const i64 center = at.i + this->center(at.b, at.offset);
    return center - left <= at.j && at.j <= center + right;
  }
  DEVICE Sight sees(const Region& of) const {
    const i64 first = of.i + center(of.b, of.offset), last = first + (of.i_end - 1 - of.i);
    const i64 last_key = of.j_end - 1;
    const bool none = last_key < first - left || of.j > last + right;
    return sight(!none, last - left <= of.j && last_key <= first + right);
  }
};

struct LengthsLeaf {
  const i64* kv_lens;  // (B,) or null
  const i64* q_lens;   // (B,) or null

  DEVICE bool sees(const Place& at) const {
    return (!kv_lens || at.j < kv_lens[at.b]) && (!q_lens || at.i < q_lens[at.b]);
  }
  DEVICE Sight sees(const Region& of) const {
    const bool any = (!kv_lens || of.j < kv_lens[of.b]) && (!q_lens || of.i < q_lens[of.b]);
    const bool all =
        (!kv_lens || of.j_end <= kv_lens[of.b]) && (!q_lens || of.i_end <= q_lens[of.b]);
    return sight(any, all);
  }
};

struct DocumentsLeaf {
  const i64* q_ids;   // (B, Sq)
  const i64* kv_ids;  // (B, Sk)
  i64 seqlen_q, seqlen_k;

  DEVICE const i64* of_queries(int b) const { return q_ids + b * seqlen_q; }
  DEVICE const i64* of_keys(int b) const { return kv_ids + b * seqlen_k; }
  DEVICE bool sees(const Place& at) const { return of_queries(at.b)[at.i] == of_keys(at.b)[at.j]; }
  DEVICE Sight sees(const Region& of) const {
    const i64 *queries = of_queries(of.b), *keys = of_keys(of.b);
    i64 low_q = queries[of.i], high_q = low_q, low_k = keys[of.j], high_k = low_k;
    for (int i = of.i + lane_id(); i < of.i_end; i += kWarpSize)
      low_q = smaller(low_q, queries[i]), high_q = larger(high_q, queries[i]);
    for (int j = of.j + lane_id(); j < of.j_end; j += kWarpSize)
      low_k = smaller(low_k, keys[j]), high_k = larger(high_k, keys[j]);
    low_q = warp_min(low_q), low_k = warp_min(low_k);
    high_q = warp_max(high_q), high_k = warp_max(high_k);
    return sight(low_q <= high_k && low_k <= high_q, low_q == high_k && low_k == high_q);
  }
};

struct PrefixLeaf {
  const i64* n;  // (B,)

  DEVICE bool sees(const Place& at) const { return at.j < n[at.b]; }
  DEVICE Sight sees(const Region& of) const { return sight(of.j < n[of.b], of.j_end <= n[of.b]); }
};

// Queries that each key does not let see it.
struct IntervalsLeaf {
  const i64* start;  // (B, Hk or 1, Sk, count)
  const i64* end;
  i64 batch_stride, head_stride;
  int count, group;

  DEVICE i64 first(int b, int h, int j) const {
    return b * batch_stride + h / group * head_stride + (i64)j * count;
  }
  DEVICE bool sees(const Place& at) const {
    const i64 index = first(at.b, at.h, at.j);
    for (int c = 0; c < count; c++)
      if (start[index + c] <= at.i && at.i < end[index + c]) return false;
    return true;
  }
  DEVICE Sight sees(const Region& of) const {
    bool none = true, all = true;
    for (int j = of.j + lane_id(); j < of.j_end; j += kWarpSize) {
      const i64 index = first(of.b, of.h, j);
      bool covered = false;
      for (int c = 0; c < count; c++) {
        const i64 begin = start[index + c], past = end[index + c];
        covered |= begin <= of.i && of.i_end <= past;
        all &= begin >= past || past <= of.i || of.i_end <= begin;
      }
      none &= covered;
    }
    return sight(!__all_sync(0xffffffff, none), __all_sync(0xffffffff, all));
  }
};

struct BlocksLeaf {
  const u8* cells;  // (B or 1, Hq or 1, nq, nk)
  i64 batch_stride, head_stride, query_stride, key_stride;
  int block_q, block_k;

  DEVICE bool cell(int b, int h, int row, int column) const {
    return cells[b * batch_stride + h * head_stride + row * query_stride + column * key_stride];
  }
  DEVICE bool sees(const Place& at) const {
    return cell(at.b, at.h, at.i / block_q, at.j / block_k);
  }
  DEVICE Sight sees(const Region& of) const {
    const int row = of.i / block_q, column = of.j / block_k;
    const int columns = (of.j_end - 1) / block_k - column + 1;
    const int count = ((of.i_end - 1) / block_q - row + 1) * columns;
    bool any = false, all = true;
    for (int index = lane_id(); index < count; index += kWarpSize) {
      const bool visible = cell(of.b, of.h, row + index / columns, column + index % columns);
      any |= visible, all &= visible;
    }
    return sight(__any_sync(0xffffffff, any), __all_sync(0xffffffff, all));
  }
};

// Bits, 32 keys to a word (mask_bits.cu).
struct DenseLeaf {
  const u32* words;  // (B or 1, Hq or 1, Sq or 1, words)
  i64 batch_stride, head_stride, query_stride;
  i64 last_key;  // 0 where all keys share a bit

  DEVICE bool sees(const Place& at) const {
    const int j = smaller((i64)at.j, last_key);
    return words[at.b * batch_stride + at.h * head_stride + at.i * query_stride + j / 32] >>
               j % 32 &
           1;
  }
  DEVICE Sight sees(const Region& of) const {
    const i64 base = of.b * batch_stride + of.h * head_stride;
    const int first = smaller((i64)of.j, last_key), last = smaller((i64)of.j_end - 1, last_key);
    const int word = first / 32, count = last / 32 - word + 1;
    const int rows = query_stride ? of.i_end - of.i : 1;
    bool any = false, all = true;
    for (int index = lane_id(); index < rows * count; index += kWarpSize) {
      const int column = word + index % count;
      u32 wanted = 0xffffffffu;
      if (column == first / 32) wanted &= 0xffffffffu << first % 32;
      if (column == last / 32) wanted &= 0xffffffffu >> (31 - last % 32);
      const u32 bits = words[base + (of.i + index / count) * query_stride + column] & wanted;
      any |= bits != 0, all &= bits == wanted;
    }
    return sight(__any_sync(0xffffffff, any), __all_sync(0xffffffff, all));
  }
};

// How an element of a user's array is stored and read.
template <class T>
struct Stored {
  typedef T Type;
  static DEVICE T value(T x) { return x; }
};
template <>
struct Stored<bool> {
  typedef u8 Type;
  static DEVICE bool value(u8 x) { return x; }
};
template <>
struct Stored<Half> {
  typedef u16 Type;
  static DEVICE float value(u16 x) { return to_float<Half>(x); }
};
template <>
struct Stored<BFloat16> {
  typedef u16 Type;
  static DEVICE float value(u16 x) { return to_float<BFloat16>(x); }
};

// A user's array of one to four axes, in expressions name(index, ...), each index clamped; an i64
// for each axis.
template <class T, class... Indices>
struct NamedArray {
  const u8* data;
  int extent[4];
  i64 stride[4];  // bytes

  DEVICE auto operator()(Indices... indices) const {
    const i64 index[] = {indices...};
    i64 offset = 0;
#pragma unroll
    for (int axis = 0; axis < (int)sizeof...(indices); axis++)
      offset += smaller(larger(index[axis], 0ll), (i64)extent[axis] - 1) * stride[axis];
    return Stored<T>::value(*(const typename Stored<T>::Type*)(data + offset));
  }
};

static_assert(sizeof(BandLeaf) <= sizeof(Attachment), "leaves fit into attachments");
static_assert(sizeof(LengthsLeaf) <= sizeof(Attachment), "leaves fit into attachments");
static_assert(sizeof(DocumentsLeaf) <= sizeof(Attachment), "leaves fit into attachments");
static_assert(sizeof(PrefixLeaf) <= sizeof(Attachment), "leaves fit into attachments");
static_assert(sizeof(IntervalsLeaf) <= sizeof(Attachment), "leaves fit into attachments");
static_assert(sizeof(BlocksLeaf) <= sizeof(Attachment), "leaves fit into attachments");
static_assert(sizeof(DenseLeaf) <= sizeof(Attachment), "leaves fit into attachments");
static_assert(sizeof(NamedArray<float, i64>) <= sizeof(Attachment), "arrays fit into attachments");

// Attachment k of a call, as the structure that the generated program knows it to be.
#if ATTACHMENTS
template <class T>
DEVICE const T& attached(const Problem& p, int k) {
  return reinterpret_cast<const T&>(p.attachments[k]);
}
#endif
