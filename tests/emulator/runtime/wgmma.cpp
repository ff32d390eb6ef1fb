// wgmma: matrix products of a warpgroup (4 warps). An operation is complete when all 128 threads
// have issued it; it runs when the schedule says so, at the latest at the wait that covers it.
#include "state.h"

namespace emu {

constexpr int kRows = 64, kThreads = 128;

static Warpgroup& my_group() { return cta->warpgroups[cta->current->index / kThreads]; }

// Address of element (r, k) of an operand: r counts rows of A or columns of B.
static u32 element_address(u64 descriptor, bool mn_major, int r, int k, int size) {
  static constexpr u32 kSpans[] = {0, 128, 64, 32};
  const u32 start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  const u32 stride = (descriptor >> 32 & 0x3fff) << 4, span = kSpans[descriptor >> 62];
  u32 offset;
  if (!mn_major && span) {
    offset = r / 8 * stride + r % 8 * span + k * size;
  } else if (!mn_major) {
    offset = r / 8 * stride + r % 8 * 16 + k * size / 16 * leading + k * size % 16;
  } else if (span) {
    const u32 byte = r * size;
    offset = byte / span * leading + byte % span + k % 8 * span + k / 8 * stride;
  } else {
    offset = r * size / 16 * stride + r * size % 16 + k % 8 * 16 + k / 8 * leading;
  }
  return swizzled(start + offset, span);
}
// Calls f(address, r, k) for each 16 bytes of an operand of `rows` rows.
template <class F>
static void each_chunk(u64 descriptor, bool mn_major, int rows, int size, F f) {
  const int depth = 32 / size, step = 16 / size, r_step = mn_major ? step : 1,
            k_step = mn_major ? 1 : step;
  for (int r = 0; r < rows; r += r_step)
    for (int k = 0; k < depth; k += k_step)
      f(element_address(descriptor, mn_major, r, k, size), r, k);
}

// c[64][n] += a[64][depth] b[depth][n]
static void multiply(const float* a, const float* b, float* c, int n, int depth) {
  constexpr int kStep = 8;
  for (int i = 0; i < kRows; i += 4)
    for (int j = 0; j < n; j += kStep) {
      float sum[4][kStep];
      for (int u = 0; u < 4; u++) std::memcpy(sum[u], c + (i + u) * n + j, sizeof sum[u]);
      for (int k = 0; k < depth; k++)
        for (int u = 0; u < 4; u++)
          for (int v = 0; v < kStep; v++) sum[u][v] += a[(i + u) * depth + k] * b[k * n + j + v];
      for (int u = 0; u < 4; u++) std::memcpy(c + (i + u) * n + j, sum[u], sizeof sum[u]);
    }
}
static void execute(WgmmaOp& op) {
  const WgmmaShape& s = op.shape;
  const int size = element_bytes(s.a), depth = 32 / size, step = 16 / size;
  float *b = cta->b_matrix, chunk[16];
  if (!op.a_in_registers)
    each_chunk(op.a_descriptor, s.transpose_a, kRows, size, [&](u32 address, int r, int k) {
      decode(s.a, shared_at(address), 16, chunk);
      for (int e = 0; e < step; e++)
        op.a[s.transpose_a ? (r + e) * depth + k : r * depth + k + e] = chunk[e];
    });
  each_chunk(op.b_descriptor, s.transpose_b, s.n, size, [&](u32 address, int r, int k) {
    decode(s.b, shared_at(address), 16, chunk);
    for (int e = 0; e < step; e++)
      b[s.transpose_b ? k * s.n + r + e : (k + e) * s.n + r] = chunk[e];
  });
  if (s.negate_a != s.negate_b)
    for (int i = 0; i < depth * s.n; i++) b[i] = -b[i];
  float* c = op.accumulators->values;
  if (!op.accumulate) std::fill_n(c, kRows * s.n, 0.f);
  multiply(op.a, b, c, s.n, depth);
  cta->stats.wgmma++;
  op.done = true;
}
void run_wgmma(Warpgroup& g, u64 end) {
  for (; g.executed < end; g.executed++) execute(g.ops[g.executed - g.first]);
}

// Index in [64][n] of accumulator register i of a thread.
static int accumulator_index(int thread, int i, int n) {
  const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
  return row * n + i / 4 * 8 + thread % 4 * 2 + i % 2;
}
static void require_poison(const Thread::Accumulators& a) {
  if (!cta->options->poison) return;
  for (int i = 0; i < a.count; i++)
    if (a.registers[a.tuple[i]] != kPoison)
      fail("wgmma: accumulators were modified while a wgmma on them is in flight");
}

void wgmma_fence() { cta->current->wgmma_fenced = true; }
void wgmma_commit() {
  Thread& t = *cta->current;
  t.wgmma_groups.push_back(t.wgmma_issued);
}

static WgmmaOp& new_op(Warpgroup& g) {
  g.ops.emplace_back();
  return g.ops.back();
}
static AccumulatorBuffer* new_accumulators() {
  auto& free = cta->free_accumulators;
  if (free.empty()) return new AccumulatorBuffer{};
  AccumulatorBuffer* buffer = free.back();
  free.pop_back();
  buffer->users = 0;
  return buffer;
}

// The first wgmma of a chain takes the accumulators out of the registers, and leaves poison there.
static void take_accumulators(Thread& t, WgmmaOp& op, u32* registers, const u16* tuple,
                              u64 sequence) {
  const int n = op.shape.n, count = n / 2;
  for (int i = 0; i < count; i++) {
    const u16 r = tuple[i];
    if (t.register_in_flight.size() <= r) t.register_in_flight.resize(r + 64);
    if (t.register_in_flight[r])
      fail("wgmma: two operations in flight overlap in their accumulators");
    t.register_in_flight[r] = 1;
    if (op.accumulate)
      op.accumulators->values[accumulator_index(t.index % kThreads, i, n)] =
          as<float>(registers[r]);
    if (cta->options->poison) registers[r] = kPoison;
  }
  op.accumulators->users++;
  t.accumulators.push_back({registers, tuple, count, op.accumulators, sequence});
}
// Registers of A hold: row g (+8 for odd ones), columns E q.. (+ half the depth from register 2
// on).
static void take_a_fragment(Thread& t, WgmmaOp& op, u32* registers, const u16* tuple,
                            u64 sequence) {
  const int size = element_bytes(op.shape.a), per_register = 4 / size, depth = 32 / size;
  const int thread = t.index % kThreads, row = thread / 32 * 16 + thread % 32 / 4;
  Thread::AFragment fragment{registers, tuple, {}, sequence};
  for (int r = 0; r < 4; r++) {
    fragment.value[r] = registers[tuple[r]];
    const int column = thread % 4 * per_register + r / 2 * depth / 2;
    decode(op.shape.a, &fragment.value[r], 4, &op.a[(row + r % 2 * 8) * depth + column]);
  }
  t.a_fragments.push_back(fragment);
}
// All 128 threads have issued: from here on the tensor core may read shared memory.
static void start(Warpgroup& g, WgmmaOp& op, u64 sequence) {
  const WgmmaShape& s = op.shape;
  const int group = cta->current->index / kThreads, actor = kTensorCore + group,
            size = element_bytes(s.a);
  op.time = op.clock.seen[actor] = ++cta->time;
  auto check = [&](u32 address, int, int) {
    check_shared(address, 16,
                 {.what = "wgmma", .actor = actor, .clock = &op.clock, .async_proxy = true});
  };
  if (!op.a_in_registers) each_chunk(op.a_descriptor, s.transpose_a, kRows, size, check);
  each_chunk(op.b_descriptor, s.transpose_b, s.n, size, check);
  const u32 schedule = cta->options->schedule;
  if (schedule == kEager || (schedule == kRandom && random_bits() & 1)) run_wgmma(g, sequence + 1);
  for (Thread* waiting : g.waiting) wake(*waiting);
  g.waiting.clear();
}

void wgmma(const WgmmaShape& shape, u32* registers, const u16* d, const u16* a, u64 a_descriptor,
           u64 b_descriptor, bool accumulate) {
  Thread& t = *cta->current;
  Warpgroup& g = my_group();
  const u64 sequence = t.wgmma_issued++;
  for (const u64 descriptor : {a_descriptor, b_descriptor})
    if (descriptor >> 62 && descriptor >> 49 & 7)
      fail("wgmma: base offsets in swizzled descriptors are not supported");
  Thread::Accumulators* chain = nullptr;
  for (auto& in_flight : t.accumulators)
    if (in_flight.tuple == d) chain = &in_flight;
  if ((!chain || a) && !t.wgmma_fenced)
    fail("wgmma: no wgmma.fence since the last wgmma.wait_group orders its registers");
  if (chain) require_poison(*chain);
  if (sequence == g.first + g.ops.size()) {
    WgmmaOp& op = new_op(g);
    op.shape = shape, op.a_in_registers = a, op.accumulate = accumulate;
    op.a_descriptor = a_descriptor, op.b_descriptor = b_descriptor;
    op.accumulators = chain ? chain->buffer : new_accumulators();
    op.clock = t.warp->clock;
  }
  WgmmaOp& op = g.ops[sequence - g.first];
  if (op.shape != shape || op.accumulate != accumulate || op.a_in_registers != (a != nullptr) ||
      op.a_descriptor != a_descriptor || op.b_descriptor != b_descriptor)
    fail("wgmma: threads of the warpgroup disagree about the instruction or its descriptors");
  if (chain && chain->buffer != op.accumulators)
    fail("wgmma: threads of the warpgroup chain it to different accumulators");
  if (chain)
    chain->last = sequence;
  else
    take_accumulators(t, op, registers, d, sequence);
  if (a) take_a_fragment(t, op, registers, a, sequence);
  if (t.index % 32 == 0) op.clock.meet(t.warp->clock);
  if (++op.issued == kThreads) start(g, op, sequence);
}

static void give_back(Thread& t, u64 end) {
  std::erase_if(t.a_fragments, [&](const Thread::AFragment& f) {
    if (f.sequence >= end) return false;
    for (int r = 0; r < 4; r++)
      if (f.registers[f.tuple[r]] != f.value[r])
        fail("wgmma: A registers were modified while the wgmma was in flight");
    return true;
  });
  std::erase_if(t.accumulators, [&](const Thread::Accumulators& a) {
    if (a.last >= end) return false;
    require_poison(a);
    for (int i = 0; i < a.count; i++) {
      a.registers[a.tuple[i]] =
          bits(a.buffer->values[accumulator_index(t.index % kThreads, i, 2 * a.count)]);
      t.register_in_flight[a.tuple[i]] = 0;
    }
    if (--a.buffer->users == 0) cta->free_accumulators.push_back(a.buffer);
    return true;
  });
}
void wgmma_wait(u64 groups_in_flight) {
  Thread& t = *cta->current;
  Warpgroup& g = my_group();
  t.wgmma_fenced = false;
  yield_point();
  if (t.wgmma_groups.size() <= groups_in_flight) return;
  const size_t groups = t.wgmma_groups.size() - groups_in_flight;
  const u64 end = t.wgmma_groups[groups - 1];
  auto issued_by_all = [&] {
    return end <= g.first ||
           (g.first + g.ops.size() >= end && g.ops[end - 1 - g.first].issued == kThreads);
  };
  while (!issued_by_all()) {
    g.waiting.push_back(&t);
    suspend("wgmma.wait_group: other warps of the warpgroup have not issued wgmma number %llu",
            end - 1);
  }
  run_wgmma(g, end);
  give_back(t, end);

  // The thread has now seen everything that these operations read.
  const int actor = kTensorCore + t.index / kThreads;
  const u64 begin = t.wgmma_groups_done ? t.wgmma_groups[t.wgmma_groups_done - 1] : 0;
  t.wgmma_groups_done = std::max(t.wgmma_groups_done, groups);
  for (u64 sequence = begin; sequence < end; sequence++) {
    WgmmaOp& op = g.ops[sequence - g.first];
    t.warp->clock.seen[actor] = std::max(t.warp->clock.seen[actor], op.time);
    op.collected++;
  }
  while (!g.ops.empty() && g.ops.front().collected == kThreads) {
    g.ops.pop_front();
    g.first++;
  }
}

}  // namespace emu
