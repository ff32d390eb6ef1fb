// Instructions that a warp executes together: shuffles, votes, matrix loads and stores, mma; and
// setmaxnreg.
#include "state.h"

namespace emu {

constexpr u32 kAllLanes = ~0u;

// Lanes wait until all of `mask` have come to the same instruction; the last one executes it for
// all.
template <class F>
static void collective(const char* name, u32 mask, void* argument, F execute) {
  Thread& t = *cta->current;
  Warp& w = *t.warp;
  const int lane = t.index % 32;
  if (!(mask >> lane & 1)) fail("%s: lane %d is not in its own mask 0x%x", name, lane, mask);
  Collective* c = nullptr;
  for (Collective& k : w.collectives)
    if (k.arrived && k.mask >> lane & 1) c = &k;
  if (!c) {
    for (Collective& k : w.collectives)
      if (!k.arrived) c = &k;
    c->name = name;
    c->mask = mask;
  } else if (c->name != name || c->mask != mask) {
    fail("divergent warp: %s with mask 0x%x while other lanes are in %s with mask 0x%x", name, mask,
         c->name, c->mask);
  }
  c->arguments[lane] = argument;
  c->arrived |= 1u << lane;
  if (c->arrived != mask) return suspend(name);
  c->arrived = 0;
  execute(c->arguments);
  const u32 others = mask & ~(1u << lane);
  w.ready |= others;
  if (others) cta->ready_warps |= 1u << w.id;
  yield_point();
}
static void order_lanes(u32 mask) {
  Warp& w = *cta->current->warp;
  if (mask != kAllLanes) return;
  w.synced = w.clock.seen[w.id];
  w.clock.seen[w.id] = ++cta->time;
}
template <class F>
static void each_lane(u32 mask, F f) {
  for (; mask; mask &= mask - 1) f(std::countr_zero(mask));
}

void sync_warp(u32 mask) {
  collective("bar.warp.sync", mask, nullptr, [mask](void**) { order_lanes(mask); });
}

u32 shuffle(Shuffle mode, u32 value, u32 b, u32 c, u32 mask, bool& in_range) {
  struct Lane {
    u32 value, b, c, result;
    bool in_range;
  } mine{value, b & 31, c, 0, false};
  collective("shfl", mask, &mine, [&](void** lanes) {
    each_lane(mask, [&](int i) {
      Lane& lane = *static_cast<Lane*>(lanes[i]);
      const int segment = lane.c >> 8 & 31, clamp = lane.c & 31;
      const int low = i & segment, high = low | (clamp & ~segment), shift = lane.b;
      const int source = mode == Shuffle::up     ? i - shift
                         : mode == Shuffle::down ? i + shift
                         : mode == Shuffle::bfly ? i ^ shift
                                                 : low | (shift & ~segment);
      lane.in_range = mode == Shuffle::up ? source >= high : source <= high;
      const int from = lane.in_range ? source : i;
      if (!(mask >> from & 1))
        fail("shfl: lane %d reads lane %d, which is not in the mask 0x%x", i, from, mask);
      lane.result = static_cast<Lane*>(lanes[from])->value;
    });
  });
  in_range = mine.in_range;
  return mine.result;
}

u32 ballot(bool vote, u32 mask) {
  struct Lane {
    bool vote;
    u32 result;
  } mine{vote, 0};
  collective("vote", mask, &mine, [&](void** lanes) {
    u32 votes = 0;
    each_lane(mask, [&](int i) { votes |= u32{static_cast<Lane*>(lanes[i])->vote} << i; });
    each_lane(mask, [&](int i) { static_cast<Lane*>(lanes[i])->result = votes; });
  });
  return mine.result;
}

static u64 reduce_step(Atomic op, u64 a, u64 b, bool is_signed) {
  switch (op) {
    case Atomic::add:
      return a + b;
    case Atomic::min:
      return is_signed ? minimum<i64>(a, b) : minimum(a, b);
    case Atomic::max:
      return is_signed ? maximum<i64>(a, b) : maximum(a, b);
    case Atomic::and_:
      return a & b;
    case Atomic::or_:
      return a | b;
    default:
      return a ^ b;
  }
}
u64 reduce_lanes(Atomic op, u64 value, u32 mask, bool is_signed) {
  struct Lane {
    u64 value, result;
  } mine{value, 0};
  collective("redux", mask, &mine, [&](void** lanes) {
    bool first = true;
    u64 total = 0;
    each_lane(mask, [&](int i) {
      const u64 v = static_cast<Lane*>(lanes[i])->value;
      total = first ? v : reduce_step(op, total, v, is_signed);
      first = false;
    });
    each_lane(mask, [&](int i) { static_cast<Lane*>(lanes[i])->result = total; });
  });
  return mine.result;
}

u32 elect(u32 mask) {  // any fixed lane is allowed, so schedules differ
  collective("elect", mask, nullptr, [](void**) {});
  return cta->options->schedule == kLazy ? 31 - std::countl_zero(mask) : std::countr_zero(mask);
}

void set_max_registers(u32 count, bool increase) {
  collective(increase ? "setmaxnreg.inc" : "setmaxnreg.dec", kAllLanes, nullptr, [](void**) {});
  Thread& t = *cta->current;
  Warp& w = *t.warp;
  if (count < 24 || count > 256 || count % 8)
    fail("setmaxnreg: %u registers; allowed are multiples of 8 from 24 to 256", count);
  if (w.registers == count) return;  // another lane did it
  if ((count > w.registers) != increase)
    fail("setmaxnreg.%s %u: the warp has %u registers per thread", increase ? "inc" : "dec", count,
         w.registers);
  while (increase && w.registers != count &&
         cta->registers_in_use + 32 * (count - w.registers) > kRegisterFile)
    spin("setmaxnreg.inc %llu: waits for registers, %llu are free", count,
         kRegisterFile - cta->registers_in_use);
  if (w.registers == count) return;
  made_progress();
  cta->registers_in_use += 32 * (count - w.registers);
  w.registers = count;
  cta->stats.registers = std::max<u64>(cta->stats.registers, cta->registers_in_use);
}

// Eight rows of 16 bytes take one wavefront if they fall into different bank groups.
static void count_bank_conflicts(const u32* rows) {
  u64 load[8] = {};
  for (int i = 0; i < 8; i++)
    if (std::find(rows, rows + i, rows[i]) == rows + i) load[rows[i] / 16 % 8]++;
  cta->stats.bank_wavefronts += *std::max_element(load, load + 8);
  cta->stats.bank_ideal++;
}
struct MatrixLane {
  u32* registers;
  u32 row_address;
};
// Checks the rows of `count` 8x8 matrices; lane 8 j + r names row r of matrix j.
static void gather_rows(const char* what, void** lanes, int count, bool write, u32* rows) {
  const Warp& w = *cta->current->warp;
  for (int l = 0; l < 8 * count; l++) {
    rows[l] = static_cast<MatrixLane*>(lanes[l])->row_address;
    require_alignment(rows[l], 16, what);
    check_shared(rows[l], 16,
                 {.what = what,
                  .actor = w.id,
                  .clock = &w.clock,
                  .write = write,
                  .generic_writer = write ? w.id * 32 + l : -1});
  }
  for (int j = 0; j < count; j++) count_bank_conflicts(rows + 8 * j);
}
// Lane l holds elements (l / 4, 2 (l % 4)) and the next one in the row, or of the transposed
// matrix.
static u8* matrix_element(const u32* rows, int lane, int half, bool transpose) {
  const int r = lane / 4, c = lane % 4 * 2 + half;
  return transpose ? shared_at(rows[c]) + 2 * r : shared_at(rows[r]) + 2 * c;
}
void ldmatrix(u32* registers, int count, u32 row_address, bool transpose) {
  MatrixLane mine{registers, row_address};
  collective(transpose ? "ldmatrix.trans" : "ldmatrix", kAllLanes, &mine, [&](void** lanes) {
    u32 rows[32];
    gather_rows("ldmatrix", lanes, count, false, rows);
    for (int j = 0; j < count; j++)
      for (int l = 0; l < 32; l++) {
        u16 low, high;
        std::memcpy(&low, matrix_element(rows + 8 * j, l, 0, transpose), 2);
        std::memcpy(&high, matrix_element(rows + 8 * j, l, 1, transpose), 2);
        static_cast<MatrixLane*>(lanes[l])->registers[j] = low | u32{high} << 16;
      }
  });
}
void stmatrix(const u32* registers, int count, u32 row_address, bool transpose) {
  MatrixLane mine{const_cast<u32*>(registers), row_address};
  collective(transpose ? "stmatrix.trans" : "stmatrix", kAllLanes, &mine, [&](void** lanes) {
    u32 rows[32];
    gather_rows("stmatrix", lanes, count, true, rows);
    for (int j = 0; j < count; j++)
      for (int l = 0; l < 32; l++) {
        const u32 v = static_cast<MatrixLane*>(lanes[l])->registers[j];
        std::memcpy(matrix_element(rows + 8 * j, l, 0, transpose), &v, 2);
        std::memcpy(matrix_element(rows + 8 * j, l, 1, transpose),
                    reinterpret_cast<const u8*>(&v) + 2, 2);
      }
  });
}

template <class T>
static void decode_as(const void* from, int bytes, float* to) {
  for (size_t i = 0; i < bytes / sizeof(T); i++) {
    T value;
    std::memcpy(&value, static_cast<const T*>(from) + i, sizeof value);
    to[i] = value;
  }
}
void decode(Format format, const void* from, int bytes, float* to) {
  switch (format) {
    case Format::bf16:
      return decode_as<BF16>(from, bytes, to);
    case Format::f16:
      return decode_as<F16>(from, bytes, to);
    case Format::e4m3:
      return decode_as<E4M3>(from, bytes, to);
    case Format::e5m2:
      return decode_as<E5M2>(from, bytes, to);
    case Format::tf32:
      return decode_as<TF32>(from, bytes, to);
  }
}

// mma.m16n8k: lane l is in group g = l / 4 with t = l % 4. A register of E elements holds, for A,
// row g (+8 for odd registers), columns E t.. (+4 E from register 2 on); for B, column g, rows E
// t.. (+4 E each).
void mma(Format a_format, Format b_format, int k, bool f16_accumulate, u32* d, const u32* a,
         const u32* b) {
  struct Lane {
    u32* d;
    const u32 *a, *b;
  } mine{d, a, b};
  collective("mma", kAllLanes, &mine, [&](void** lanes) {
    cta->stats.mma++;
    const int size = element_bytes(a_format), per_register = 4 / size;
    const int a_registers = k * size / 8, b_registers = k * size / 16;
    float A[16][32], columns[8][32], B[32][8];
    for (int l = 0; l < 32; l++) {
      const Lane& lane = *static_cast<Lane*>(lanes[l]);
      const int g = l / 4, first = l % 4 * per_register;
      for (int r = 0; r < a_registers; r++)
        decode(a_format, lane.a + r, 4, &A[g + r % 2 * 8][r / 2 * 4 * per_register + first]);
      for (int r = 0; r < b_registers; r++)
        decode(b_format, lane.b + r, 4, &columns[g][r * 4 * per_register + first]);
    }
    for (int x = 0; x < k; x++)
      for (int j = 0; j < 8; j++) B[x][j] = columns[j][x];
    float C[16][8] = {};
    for (int i = 0; i < 16; i++)
      for (int x = 0; x < k; x++)
        for (int j = 0; j < 8; j++) C[i][j] += A[i][x] * B[x][j];
    // Registers 0, 1 of the accumulator: row g, columns 2 t, 2 t + 1; 2, 3: row g + 8.
    for (int l = 0; l < 32; l++) {
      u32* out = static_cast<Lane*>(lanes[l])->d;
      for (int r = 0; r < 2; r++) {
        const float* sum = &C[l / 4 + r * 8][l % 4 * 2];
        if (f16_accumulate) {
          out[r] = pairs<F16>([&](float old) { return old + *sum++; }, out[r]);
        } else {
          for (int e = 0; e < 2; e++) out[2 * r + e] = bits(as<float>(out[2 * r + e]) + sum[e]);
        }
      }
    }
  });
}

}  // namespace emu
