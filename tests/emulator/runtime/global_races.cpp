// Global memory: a happens-before detector for the blocks of one launch, at the granularity of
// bytes and of the actors of state.h, so that the threads of a warp count as ordered.
//
// Inside a block its clocks say what comes before what. Between blocks only synchronisation of
// PTX's memory model does, at the scope of the GPU: a release pattern on an address (a release, or
// a fence and then a strong write) and an acquire pattern (an acquire, or a strong read and then a
// fence) that observes it, directly or through atomic operations. A release publishes what its warp
// has seen; what a warp acquires orders its own later accesses, and those of whoever has seen the
// acquisition.
#include <algorithm>
#include <mutex>

#include "state.h"

namespace emu {

// What happened before a release: of each block, the times of its actors.
struct Published {
  struct Part {
    u32 block;
    u32 seen[kActors];
  };
  std::vector<Part> parts;  // by block

  bool covers(u32 block, int actor, u32 time) const {
    const auto part = std::lower_bound(parts.begin(), parts.end(), block,
                                       [](const Part& p, u32 b) { return p.block < b; });
    return part != parts.end() && part->block == block && part->seen[actor] >= time;
  }
  void join(const Published& other) {
    std::vector<Part> merged;
    merged.reserve(parts.size() + other.parts.size());
    auto a = parts.begin();
    for (const Part& b : other.parts) {
      while (a != parts.end() && a->block < b.block) merged.push_back(*a++);
      merged.push_back(b);
      if (a == parts.end() || a->block != b.block) continue;
      for (int i = 0; i < kActors; i++)
        merged.back().seen[i] = std::max(merged.back().seen[i], a->seen[i]);
      ++a;
    }
    merged.insert(merged.end(), a, parts.end());
    parts = std::move(merged);
  }
};
static Publication joined(const Publication& a, const Publication& b) {
  if (!a || !b || a == b) return a ? a : b;
  auto both = std::make_shared<Published>(*a);
  both->join(*b);
  return both;
}

// The latest acquisition of a warp that the owner of a clock has seen.
static const Publication* acquired_by(int warp, const Clock& clock) {
  const auto& list = cta->acquired[warp];
  for (auto a = list.rbegin(); a != list.rend(); ++a)
    if (a->time <= clock.seen[warp]) return &a->what;
  return nullptr;
}
static Publication publish() {
  Warp& w = *cta->current->warp;
  auto all = std::make_shared<Published>();
  all->parts.push_back({cta->number, {}});
  std::copy_n(w.clock.seen, kActors, all->parts[0].seen);
  for (int i = 0; i < cta->warp_count; i++)
    if (const Publication* p = acquired_by(i, w.clock)) all->join(**p);
  w.clock.seen[w.id] = ++cta->time;
  return all;
}
static void acquire(const Publication& what) {
  if (!what) return;
  Warp& w = *cta->current->warp;
  auto& list = cta->acquired[w.id];
  w.clock.seen[w.id] = ++cta->time;
  list.push_back({cta->time, list.empty() ? what : joined(list.back().what, what)});
}

// ---- Strong accesses and fences.

// Memory and what was published with it change together.
static std::mutex& synchronisation(u64 address) {
  return cta->launch->synchronised[address / 4 % kSynchronised].mutex;
}
static Publication& published_at(u64 address) {
  return cta->launch->synchronised[address / 4 % kSynchronised].published[address];
}
static bool between_blocks(u64 address, Order order) {
  return order.scope == Scope::gpu && cta->options->races && !is_shared(address);
}
static void observe(const Publication& seen, Order order) {
  if (!seen) return;
  if (order.acquires) return acquire(seen);
  auto& observed = cta->current->observed;
  if (std::find(observed.begin(), observed.end(), seen) == observed.end()) observed.push_back(seen);
}
static Publication to_publish(Order order) {
  return order.releases ? publish() : cta->current->fenced;
}

void load_strong(void* value, const void* memory, u32 bytes, Order order) {
  const u64 address = reinterpret_cast<u64>(memory);
  if (!between_blocks(address, order)) {
    std::memcpy(value, memory, bytes);
    return;
  }
  Publication seen;
  {
    std::lock_guard lock(synchronisation(address));
    std::memcpy(value, memory, bytes);
    seen = published_at(address);
  }
  observe(seen, order);
}
void store_strong(void* memory, const void* value, u32 bytes, Order order) {
  const u64 address = reinterpret_cast<u64>(memory);
  if (!between_blocks(address, order)) {
    std::memcpy(memory, value, bytes);
    return;
  }
  Publication mine = to_publish(order);
  std::lock_guard lock(synchronisation(address));
  std::memcpy(memory, value, bytes);
  published_at(address) = mine;
}
StrongAtomic::StrongAtomic(void* memory, Order order, bool reads)
    : address(reinterpret_cast<u64>(memory)), order(order), reads(reads), locked(false) {
  if (!between_blocks(address, order)) return;
  if (order.releases || cta->current->fenced)
    mine = new Publication(to_publish(order));
  else if (!reads)
    return;
  synchronisation(address).lock();
  locked = true;
}
StrongAtomic::~StrongAtomic() {
  if (!locked) return;
  Publication& there = published_at(address);
  Publication seen = there;
  if (mine) there = joined(there, *static_cast<Publication*>(mine));
  synchronisation(address).unlock();
  delete static_cast<Publication*>(mine);
  if (reads) observe(seen, order);
}
void fence(bool acquires, bool releases) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  if (!cta->options->races) return;
  Thread& t = *cta->current;
  if (acquires) {
    Publication all;
    for (const Publication& p : t.observed) all = joined(all, p);
    t.observed.clear();
    acquire(all);
  }
  if (releases) t.fenced = publish();
}

// ---- The history of each byte.

struct Trace {
  u32 next;  // 0 ends the list
  u32 block, time, line;
  u16 bytes;  // of the cell
  u8 actor;
  Scope scope;
  bool write, adds_floats;
};
constexpr u32 kPageBytes = 4096, kGlobalCell = 16;
struct Page {
  std::mutex mutex;
  u32 first[kPageBytes / kGlobalCell] = {};
  std::vector<Trace> traces{1};  // of which the first is no one's
  u32 unused = 0;
};

static Page& page_of(u64 address) {
  const u64 number = address / kPageBytes;
  auto& recent = cta->recent_pages[number % std::size(cta->recent_pages)];
  if (recent.number != number || !recent.page) {
    std::lock_guard lock(cta->launch->pages_mutex);
    auto& page = cta->launch->pages[number];
    if (!page) {
      page = std::make_shared<Page>();
      page->traces.reserve(kPageBytes / kGlobalCell + 1);
    }
    recent = {number, page.get()};
  }
  return *recent.page;
}

static bool happened_before(const Trace& t, const Clock& clock) {
  if (t.block == cta->number) return t.time <= clock.seen[t.actor];
  for (int i = 0; i < cta->warp_count; i++)
    if (const Publication* p = acquired_by(i, clock))
      if ((*p)->covers(t.block, t.actor, t.time)) return true;
  return false;
}
static bool conflicts(const Trace& a, const Trace& b) {
  if (!a.write && !b.write) return false;
  if (a.adds_floats && b.adds_floats && cta->options->deterministic) return true;
  const Scope least = a.block == b.block ? Scope::cta : Scope::gpu;
  if (a.scope >= least && b.scope >= least) return false;
  return !(cta->options->allow_same_value && a.block == b.block && a.write && b.write);
}

// Whether every race with `before`, which comes before `a`, is one with `a` too.
static bool stands_for(const Trace& a, const Trace& before) {
  const bool sums = a.adds_floats || a.scope == Scope::weak;
  return (a.write || !before.write) && a.scope <= before.scope && (sums || !before.adds_floats);
}

[[noreturn]] static void report(const char* what, u64 address, const Trace& mine,
                                const Trace& other) {
  const Options& o = *cta->options;
  char place[100] = "";
  for (u64 i = 0; i < o.buffer_count; i++)
    if (o.buffers[i].begin <= address && address < o.buffers[i].end) {
      snprintf(place, sizeof place, " (byte %llu of buffer number %llu)",
               static_cast<unsigned long long>(address - o.buffers[i].begin),
               static_cast<unsigned long long>(i));
      break;
    }
  const u32 x = other.block % o.grid[0], y = other.block / o.grid[0] % o.grid[1],
            z = other.block / o.grid[0] / o.grid[1];
  const bool sums = mine.adds_floats && other.adds_floats;
  fail(
      "race in global memory: %s by %s at 0x%llx%s is not ordered after the %s by %s of block "
      "(%u,%u,%u) at PTX line %u%s",
      what, actor_name(mine.actor).c_str(), static_cast<unsigned long long>(address), place,
      other.adds_floats ? "addition"
      : other.write     ? "write"
                        : "read",
      actor_name(other.actor).c_str(), x, y, z, other.line,
      sums ? ": sums of floats in no order, in a deterministic kernel" : "");
}

static void note_cell(u64 cell, const char* what, const Trace& mine, const Clock& clock) {
  Page& page = page_of(cell);
  std::unique_lock lock(page.mutex);
  u32* link = &page.first[cell % kPageBytes / kGlobalCell];
  while (const u32 index = *link) {
    Trace& t = page.traces[index];
    if (t.bytes & mine.bytes) {
      const bool same = t.block == mine.block && t.actor == mine.actor && t.time <= mine.time;
      const bool matters = conflicts(t, mine);
      const bool before =
          same || ((matters || mine.write || t.block == mine.block) && happened_before(t, clock));
      if (matters && !before) {
        const Trace other = t;
        lock.unlock();
        report(what, cell + std::countr_zero(u32(t.bytes & mine.bytes)), mine, other);
      }
      if (before && stands_for(mine, t)) t.bytes &= ~mine.bytes;
      if (!t.bytes) {
        *link = t.next;
        t.next = page.unused;
        page.unused = index;
        continue;
      }
    }
    link = &t.next;
  }
  const u32 first = page.first[cell % kPageBytes / kGlobalCell];
  u32 index = page.unused;
  if (index) {
    page.unused = page.traces[index].next;
    page.traces[index] = mine;
  } else {
    index = page.traces.size();
    page.traces.push_back(mine);
  }
  page.traces[index].next = first;
  page.first[cell % kPageBytes / kGlobalCell] = index;
}

void note_global(u64 address, u32 bytes, const GlobalAccess& a) {
  Trace trace{
      0,       cta->number, a.clock->seen[a.actor], cta->current->line, 0, static_cast<u8>(a.actor),
      a.scope, a.write,     a.adds_floats};
  for (u64 begin = address, next; begin < address + bytes; begin = next) {
    const u64 cell = begin / kGlobalCell * kGlobalCell;
    next = std::min(address + bytes, cell + kGlobalCell);
    trace.bytes = ((1u << (next - begin)) - 1) << (begin - cell);
    note_cell(cell, a.what, trace, *a.clock);
  }
}

}  // namespace emu
