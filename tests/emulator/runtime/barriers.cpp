// Barriers: bar.sync and its kin, and mbarrier.
#include "state.h"

namespace emu {

static void arrive_at(u32 id, i64 threads, bool arrive_only, bool vote) {
  Thread& t = *cta->current;
  if (id > 15) fail("barrier %u: there are 16", id);
  Barrier& b = cta->barriers[id];
  const u32 expected = threads < 0 ? cta->thread_count : threads;
  if (expected == 0 || expected % 32 || expected > u32(cta->thread_count))
    fail("barrier %u: %u threads, in a block of %d; must be a multiple of 32", id, expected,
         cta->thread_count);
  if (!b.arrived) {
    b.expected = expected;
    b.clock = t.warp->clock;
    b.votes = 0;
  } else if (b.expected != expected) {
    fail("barrier %u: this thread expects %u threads, others expect %u", id, expected, b.expected);
  }
  b.clock.join(t.warp->clock);
  t.warp->clock.seen[t.warp->id] = ++cta->time;
  b.votes += vote;
  const u32 lane = 1u << t.index % 32;
  if (!arrive_only) b.waiting[t.warp->id] |= lane;
  if (++b.arrived < expected) {
    if (!arrive_only) suspend("barrier %llu (%llu threads)", id, expected);
    return;
  }
  b.arrived = 0;
  b.result = b.votes;
  for (int i = 0; i < cta->warp_count; i++) {
    if (!b.waiting[i]) continue;
    Warp& w = cta->warps[i];
    w.clock.join(b.clock);
    w.synced = w.clock.seen[i] - 1;
  }
  if (!arrive_only) b.waiting[t.warp->id] &= ~lane;
  made_progress();
  wake(b.waiting);
  yield_point();
}
void barrier(u32 id, i64 threads, bool arrive_only) { arrive_at(id, threads, arrive_only, false); }
u32 barrier_vote(u32 id, i64 threads, bool vote) {
  arrive_at(id, threads, false, vote);
  return cta->barriers[id].result;
}

// An initialised mbarrier holds a tag and its index, so that overwriting it shows.
constexpr u64 kTag = 0xba44ba44;
Mbarrier& mbarrier_at(u32 address, const char* what) {
  require_alignment(address, 8, what);
  const Warp& w = *cta->current->warp;
  check_shared(address, 8, {.what = what, .actor = w.id, .clock = &w.clock});
  u64 content;
  std::memcpy(&content, shared_at(address), 8);
  const u64 index = content & 0xffff;
  if (content >> 16 != kTag || index >= cta->mbarriers.size() ||
      cta->mbarriers[index]->offset != offset_of(address))
    fail("%s: smem+0x%x is not an initialised mbarrier (or was overwritten)", what,
         offset_of(address));
  return *cta->mbarriers[index];
}
static void store_tag(u32 address, u64 content, const char* what) {
  require_alignment(address, 8, what);
  const Warp& w = *cta->current->warp;
  check_shared(address, 8, {.what = what, .actor = w.id, .clock = &w.clock, .write = true});
  std::memcpy(shared_at(address), &content, 8);
}
void mbarrier_init(u32 address, u32 count) {
  if (count == 0 || count >= 1u << 20) fail("mbarrier.init: count %u", count);
  store_tag(address, kTag << 16 | cta->mbarriers.size(), "mbarrier.init");
  cta->mbarriers.push_back(
      new Mbarrier{offset_of(address), count, count, 0, 0, cta->current->warp->clock, {}});
}
void mbarrier_invalidate(u32 address) {
  mbarrier_at(address, "mbarrier.inval");
  store_tag(address, ~0ull, "mbarrier.inval");
}

void arrive_now(Mbarrier& m, u32 count, i64 bytes) {
  if (m.pending < count)
    fail("mbarrier smem+0x%x: more arrivals than its count %u in one phase", m.offset, m.count);
  m.pending -= count;
  m.bytes += bytes;
  if (std::abs(m.bytes) >= 1 << 20)
    fail("mbarrier smem+0x%x: expects %lld bytes, over the limit of 2^20 - 1", m.offset,
         static_cast<long long>(m.bytes));
  if (m.pending || m.bytes) return;
  m.phase++;
  m.pending = m.count;
  wake(m.waiting);
}
u64 mbarrier_arrive(u32 address, u32 count, u32 expect_bytes, bool drop) {
  Mbarrier& m = mbarrier_at(address, "mbarrier.arrive");
  Warp& w = *cta->current->warp;
  m.clock.join(w.clock);
  w.clock.seen[w.id] = ++cta->time;
  const u64 phase = m.phase;
  if (drop) m.count -= count;
  arrive_now(m, count, expect_bytes);
  yield_point();
  return phase;
}
void mbarrier_expect(u32 address, u32 bytes) {
  arrive_now(mbarrier_at(address, "mbarrier.expect_tx"), 0, bytes);
}

// try_wait may say "not yet" at any time. To show code that relies on a single try it does so once
// per barrier and phase, for all threads alike because a warp may have to branch together.
static bool says_not_yet(const Mbarrier& m) {
  Thread& t = *cta->current;
  if (t.peeked_offset == m.offset && t.peeked_phase == m.phase) return false;
  t.peeked_offset = m.offset, t.peeked_phase = m.phase;
  if (cta->options->schedule != kRandom) return cta->options->schedule == kLazy;
  u32 hash = m.offset * 0x9E3779B1u ^ m.phase * 0x85EBCA77u ^ cta->peek_seed;
  hash ^= hash >> 15;
  return hash * 0x2C1B3C6Du >> 31;
}
bool mbarrier_wait(u32 address, u64 state, bool parity, bool may_suspend) {
  if (parity && state > 1)
    fail("mbarrier wait: parity %llu", static_cast<unsigned long long>(state));
  Mbarrier& m = mbarrier_at(address, "mbarrier wait");
  Thread& t = *cta->current;
  auto incomplete = [&] { return parity ? (m.phase & 1) == state : m.phase == u32(state); };
  if (incomplete() && !may_suspend) {
    spin("mbarrier.test_wait smem+0x%llx, parity or state %llu", m.offset, state);
    if (incomplete()) return false;
  }
  if (incomplete() && says_not_yet(m)) {
    yield_point();
    return false;
  }
  while (incomplete()) {
    m.waiting[t.warp->id] |= 1u << t.index % 32;
    suspend("mbarrier wait smem+0x%llx, parity or state %llu", m.offset, state);
  }
  made_progress();
  t.warp->clock.join(m.clock);
  yield_point();
  return true;
}

}  // namespace emu
