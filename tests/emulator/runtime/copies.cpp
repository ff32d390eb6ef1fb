// Asynchronous copies: cp.async, bulk copies and TMA. Data moves when the schedule says so.
#include "state.h"

namespace emu {

// ---- cp.async: each thread's copies land, at the latest, at its own wait.
void cp_async(u32 destination, u64 source, u32 bytes, u32 source_bytes) {
  Thread& t = *cta->current;
  Warp& w = *t.warp;
  require_alignment(destination, bytes, "cp.async");
  if (source_bytes > bytes)
    fail("cp.async: src-size %u is larger than cp-size %u", source_bytes, bytes);
  if (source_bytes) {
    if (source % bytes)
      fail("cp.async: misaligned global address 0x%llx, needs %u",
           static_cast<unsigned long long>(source), bytes);
  }
  while (w.copy_times.size() <= t.copy_groups.size()) w.copy_times.push_back(++cta->time);
  const int actor = kCopyUnit + w.id;
  Clock clock = w.clock;
  clock.seen[actor] = std::max(clock.seen[actor], w.copy_times[t.copy_groups.size()]);
  if (source_bytes)
    check_global(source, source_bytes, {.what = "cp.async", .actor = actor, .clock = &clock});
  check_shared(destination, bytes,
               {.what = "cp.async", .actor = actor, .clock = &clock, .write = true});
  t.copies.push_back({destination, source, bytes, source_bytes});
  cta->stats.cp_async++;
  cta->stats.bytes_loaded += source_bytes;
  if (cta->options->poison) std::memset(shared_at(destination), 0xff, bytes);
}
void finish_copies(Thread& t, size_t end) {
  for (; t.copies_done < end; t.copies_done++) {
    const Thread::Copy& c = t.copies[t.copies_done];
    u8* to = shared_at(c.destination);
    std::memcpy(to, reinterpret_cast<const void*>(c.source), c.source_bytes);
    std::memset(to + c.source_bytes, 0, c.bytes - c.source_bytes);
  }
}
void cp_async_commit() {
  Thread& t = *cta->current;
  while (t.warp->copy_times.size() <= t.copy_groups.size())
    t.warp->copy_times.push_back(++cta->time);
  t.copy_groups.push_back(t.copies.size());
  const u32 schedule = cta->options->schedule;
  if (schedule == kEager || (schedule == kRandom && random_bits() & 1))
    finish_copies(t, t.copies.size());
}
void cp_async_wait(u64 groups_in_flight) {
  Thread& t = *cta->current;
  if (t.copy_groups.size() <= groups_in_flight) return;
  const size_t group = t.copy_groups.size() - groups_in_flight - 1;
  finish_copies(t, t.copy_groups[group]);
  u32& seen = t.warp->clock.seen[kCopyUnit + t.warp->id];
  seen = std::max(seen, t.warp->copy_times[group]);
}

static void enqueue(AsyncCopy* copy) {
  copy->late = random_bits() & 1;
  cta->pending.push_back(copy);
  if (cta->options->schedule == kEager) complete_async(cta->pending.size() - 1);
}

// The arrival happens when all earlier copies of the thread have landed.
void cp_async_mbarrier_arrive(u32 address, bool counted) {
  Thread& t = *cta->current;
  Mbarrier& m = mbarrier_at(address, "cp.async.mbarrier.arrive");
  if (!counted) m.pending++;
  auto* arrival = new AsyncCopy{};
  arrival->op = Bulk::store;
  arrival->barrier = &m;
  arrival->clock = t.warp->clock;
  arrival->thread = &t;
  arrival->is_arrival = true;
  arrival->copies = t.copies.size();
  const auto& times = t.warp->copy_times;
  if (!times.empty())
    arrival->clock.seen[kCopyUnit + t.warp->id] =
        times[std::min(t.copy_groups.size(), times.size() - 1)];
  t.warp->clock.seen[t.warp->id] = ++cta->time;
  enqueue(arrival);
}

// ---- Bulk copies and TMA.
// XORs the index of the 16-byte chunk with that of the 128-byte line.
u32 swizzled(u32 address, u32 span) {
  return span == 0 ? address : address ^ (address >> 7 & (span / 16 - 1)) << 4;
}

static const char* name_of(Bulk op) {
  return op == Bulk::load ? "bulk load" : op == Bulk::store ? "bulk store" : "bulk reduce";
}
template <class T>
static void add_to(u8* global, const u8* shared) {
  T value;
  std::memcpy(&value, shared, sizeof value);
  atomic<Atomic::add>(global, value);
}
static void move(const AsyncCopy& copy, u8* shared, u8* global, u32 bytes) {
  const bool loads = copy.op == Bulk::load, adds = copy.op == Bulk::reduce;
  const bool adds_floats = adds && copy.map.element != Element::u32;
  check_global(reinterpret_cast<u64>(global), bytes,
               {.what = name_of(copy.op),
                .actor = copy.global_actor,
                .clock = &copy.clock,
                .write = !loads,
                .scope = adds ? Scope::gpu : Scope::weak,
                .adds_floats = adds_floats});
  if (loads) {
    std::memcpy(shared, global, bytes);
    return;
  }
  if (copy.op == Bulk::store) {
    std::memcpy(global, shared, bytes);
    return;
  }
  switch (copy.map.element) {
    case Element::f32:
      return add_to<float>(global, shared);
    case Element::f16:
      return add_to<F16>(global, shared);
    case Element::bf16:
      return add_to<BF16>(global, shared);
    case Element::u32:
      return add_to<u32>(global, shared);
    case Element::bytes:
      fail("bulk reduce: the element type of the tensor map cannot be added");
  }
}
// One row of the box: 16-byte chunks, swizzled; elements outside the tensor read as zero. Stores
// leave out whole chunks only: of one that the tensor's end divides, all is written.
static void copy_row(const AsyncCopy& copy, u32 shared_row, u8* global_row, bool inside) {
  const TensorMap& m = copy.map;
  const u32 size = m.element_bytes, step = copy.op == Bulk::reduce ? size : 16;
  for (u32 offset = 0; offset < m.box[0] * size; offset += step) {
    u8* shared = shared_at(swizzled(shared_row + offset / 16 * 16, m.swizzle_bytes)) + offset % 16;
    const i64 first = i64{copy.at[0]} + offset / size, end = first + step / size;
    if (inside && first >= 0 && end <= m.extent[0]) {
      move(copy, shared, global_row + first * size, step);
      continue;
    }
    if (inside && copy.op == Bulk::store && 0 <= first && first < m.extent[0] &&
        first * size % step == 0) {
      cta->stats.bytes_past_extents += (end - m.extent[0]) * size;
      move(copy, shared, global_row + first * size, step);
      continue;
    }
    if (copy.op == Bulk::load) std::memset(shared, 0, step);
    for (i64 x = std::max<i64>(first, 0); inside && x < std::min<i64>(end, m.extent[0]); x++)
      move(copy, shared + (x - first) * size, global_row + x * size, size);
  }
}
static void execute(AsyncCopy& copy) {
  const TensorMap& m = copy.map;
  const u32 rows = m.box[1] * m.box[2] * m.box[3] * m.box[4];
  for (u32 row = 0; row < rows; row++) {
    bool inside = true;
    u64 global = m.base;  // wraps around, as the hardware's
    for (u32 axis = 1, rest = row; axis < 5; rest /= m.box[axis++]) {
      const i64 at = i64{copy.at[axis]} + rest % m.box[axis];
      inside &= at >= 0 && at < m.extent[axis];
      global += static_cast<u64>(at) * m.stride[axis];
    }
    copy_row(copy, copy.shared + row * m.box[0] * m.element_bytes, reinterpret_cast<u8*>(global),
             inside);
  }
  copy.done = true;
}
void complete_async(size_t i) {
  AsyncCopy* copy = cta->pending[i];
  cta->pending.erase(cta->pending.begin() + i);
  made_progress();
  if (copy->is_arrival) {
    finish_copies(*copy->thread, copy->copies);
  } else {
    Thread* running = cta->current;
    cta->current = copy->thread;  // whom an error concerns
    std::swap(copy->thread->line, copy->line);
    execute(*copy);
    std::swap(copy->thread->line, copy->line);
    cta->current = running;
    if (copy->op != Bulk::load) return;  // its thread waits for it
  }
  copy->barrier->clock.join(copy->clock);
  if (copy->is_arrival)
    arrive_now(*copy->barrier, 1, 0);
  else
    arrive_now(*copy->barrier, 0, -i64{copy->map.box_bytes()});
  delete copy;
}

static void issue(Bulk op, u32 shared, const TensorMap& map, const i32* at, Mbarrier* barrier) {
  Thread& t = *cta->current;
  auto* copy = new AsyncCopy{op, shared, map, {}, barrier, 0, 0, t.warp->clock, &t, t.line};
  std::copy_n(at, map.rank, copy->at);
  if (op == Bulk::load) {
    copy->actor = copy->global_actor = kBulkLoad + cta->next_load_unit++ % kBulkLoads;
  } else {
    const int unit = cta->next_store_unit++;
    copy->actor = kBulkStore + unit % kBulkStores;
    copy->global_actor = kBulkWrite + unit % kBulkWrites;
  }
  copy->time = copy->clock.seen[copy->actor] = ++cta->time;
  copy->clock.seen[copy->global_actor] = copy->time;
  check_shared(shared, map.box_bytes(),
               {.what = name_of(op),
                .actor = copy->actor,
                .clock = &copy->clock,
                .write = op == Bulk::load,
                .async_proxy = true});
  if (op == Bulk::load) {
    cta->stats.tma_loads++;
    cta->stats.bytes_loaded += map.box_bytes();
    if (cta->options->poison) std::memset(shared_at(shared), 0xff, map.box_bytes());
  } else {
    cta->stats.tma_stores++;
    t.stores.push_back(copy);
  }
  enqueue(copy);
}

constexpr u64 kMapMagic = 0x70616d726f736e74;
void tma(Bulk op, u32 shared, u64 tensor_map, u32 barrier, int rank, const i32* at) {
  const auto& map = *reinterpret_cast<const TensorMap*>(tensor_map);
  if (tensor_map % 64)
    fail("TMA: the tensor map at 0x%llx is not aligned to 64 bytes",
         static_cast<unsigned long long>(tensor_map));
  if (map.magic != kMapMagic) fail("TMA: what the instruction names is not a tensor map");
  if (map.rank != u32(rank))
    fail("TMA: the instruction has rank %d, the tensor map %u", rank, map.rank);
  // Hardware fails where nothing is mapped there, wherever the coordinates lie; not so for stores.
  if (op == Bulk::load) check_mapped(map.base, "TMA load: the tensor map's own address, a look");
  require_alignment(shared, 128, "TMA");
  issue(op, shared, map, at, op == Bulk::load ? &mbarrier_at(barrier, "TMA load") : nullptr);
}
void bulk_copy(Bulk op, Element type, u32 shared, u64 global, u32 bytes, u32 barrier) {
  require_alignment(shared, 16, "cp.async.bulk");
  if (global % 16 || bytes % 16)
    fail("cp.async.bulk: global address 0x%llx and size %u must be multiples of 16",
         static_cast<unsigned long long>(global), bytes);
  const u32 size = type == Element::bytes                         ? 16
                   : type == Element::f32 || type == Element::u32 ? 4
                                                                  : 2;
  const u32 count = bytes / size;
  const TensorMap map{.magic = kMapMagic,
                      .base = global,
                      .rank = 1,
                      .element_bytes = size,
                      .swizzle_bytes = 0,
                      .element = type,
                      .extent = {count, 1, 1, 1, 1},
                      .box = {count, 1, 1, 1, 1},
                      .stride = {}};
  const i32 at = 0;
  issue(op, shared, map, &at, op == Bulk::load ? &mbarrier_at(barrier, "cp.async.bulk") : nullptr);
}
void bulk_commit() {
  Thread& t = *cta->current;
  t.store_groups.push_back(t.stores.size());
}
static void see(Clock& clock, int actor, u32 time) {
  clock.seen[actor] = std::max(clock.seen[actor], time);
}
void bulk_wait(u64 groups_in_flight, bool only_read) {
  Thread& t = *cta->current;
  if (t.store_groups.size() <= groups_in_flight) return;
  const size_t end = t.store_groups[t.store_groups.size() - groups_in_flight - 1];
  for (; t.stores_done < end; t.stores_done++) {
    AsyncCopy* copy = t.stores[t.stores_done];
    auto& pending = cta->pending;
    if (!copy->done)
      complete_async(std::find(pending.begin(), pending.end(), copy) - pending.begin());
    see(t.warp->clock, copy->actor, copy->time);
    t.stores_read.emplace_back(copy->global_actor, copy->time);
    delete copy;
  }
  if (only_read) return;
  for (; t.stores_written < end; t.stores_written++) {
    const auto [actor, time] = t.stores_read[t.stores_written];
    see(t.warp->clock, actor, time);
  }
}

void check_nothing_in_flight() {
  const Thread& t = *cta->current;
  if (t.copies_done < t.copies.size() && cta->options->schedule != kEager)
    fail("the thread exits with cp.async in flight");
  if (t.stores_done < t.stores.size())
    fail("the thread exits with a bulk store for which it has not waited");
  if (!t.accumulators.empty()) fail("the thread exits with wgmma in flight");
}

}  // namespace emu
