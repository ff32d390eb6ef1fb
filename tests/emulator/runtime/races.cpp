// Shared memory: bounds, and a happens-before race detector over cells of 16 bytes, split into 4 on
// demand.
#include <sys/mman.h>

#include "state.h"

namespace emu {

// Asynchronous accesses count from their issue until somebody has waited for them, so a single
// schedule shows almost every race.
struct Cell {
  u64 readers;  // actors that have read since the last write, at read_times
  u32 write_time, writer_fences;
  u16 generic_writer;  // 1 + thread, 0 if the async proxy may read
  u8 writer;
  bool split, atomic;
  u32 read_times[kActors];
};
constexpr int kCellBytes = 16, kParts = 4;

constexpr size_t kCellsBytes = sizeof(Cell) * (kSharedMax / kCellBytes + 1) * kParts;

Cell* new_cells() {
  return static_cast<Cell*>(mmap(nullptr, kCellsBytes, PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}
void forget_accesses(Cell* cells) { madvise(cells, kCellsBytes, MADV_DONTNEED); }

void Clock::join(const Clock& o) {
  for (int i = 0; i < kActors; i++) seen[i] = std::max(seen[i], o.seen[i]);
  for (int i = 0; i < kActors; i++) fenced[i] = std::max(fenced[i], o.fenced[i]);
}
void Clock::meet(const Clock& o) {
  for (int i = 0; i < kActors; i++) seen[i] = std::min(seen[i], o.seen[i]);
  for (int i = 0; i < kActors; i++) fenced[i] = std::min(fenced[i], o.fenced[i]);
}

std::string actor_name(int actor) {
  if (actor < kCopyUnit) return "warp " + std::to_string(actor);
  if (actor < kTensorCore) return "cp.async of warp " + std::to_string(actor - kCopyUnit);
  if (actor < kBulkLoad) return "wgmma of warpgroup " + std::to_string(actor - kTensorCore);
  return actor < kBulkStore ? "a bulk load" : "a bulk store";
}
[[noreturn]] static void report_race(const Access& a, u32 offset, const char* before, int other) {
  fail("race: %s by %s %s smem+0x%x, not ordered after the %s by %s", a.what,
       actor_name(a.actor).c_str(), a.write ? "writes" : "reads", offset, before,
       actor_name(other).c_str());
}

static void check_cell(Cell& cell, u32 offset, const Access& a, bool same_value) {
  const Clock& clock = *a.clock;
  const bool unordered = cell.write_time > clock.seen[cell.writer];
  if (unordered && !same_value && !(a.atomic && cell.atomic))
    report_race(a, offset, "write", cell.writer);
  if (!a.write) {
    if (a.async_proxy && cell.generic_writer &&
        cta->threads[cell.generic_writer - 1].proxy_fences == cell.writer_fences &&
        cell.write_time > clock.fenced[cell.writer])
      fail(
          "proxy: %s reads smem+0x%x, which thread %d wrote, without a fence.proxy.async in that "
          "thread or on "
          "the way here",
          a.what, offset, cell.generic_writer - 1);
    cell.readers |= 1ull << a.actor;
    cell.read_times[a.actor] = clock.seen[a.actor];
    return;
  }
  for (u64 rest = cell.readers; rest; rest &= rest - 1) {
    const int reader = std::countr_zero(rest);
    if (cell.read_times[reader] > clock.seen[reader]) report_race(a, offset, "read", reader);
  }
  cell.readers = 0;
  cell.write_time = clock.seen[a.actor];
  cell.writer = a.actor;
  cell.atomic = a.atomic;
  cell.generic_writer = a.generic_writer + 1;
  if (a.generic_writer >= 0) cell.writer_fences = cta->threads[a.generic_writer].proxy_fences;
}

void check_shared(u32 address, u32 bytes, const Access& a) {
  const u32 begin = offset_of(address), end = begin + bytes;
  if (address < kSharedBase || end > cta->shared_bytes || end < begin)
    fail("%s: out of bounds of shared memory: smem+0x%x (%u bytes), the block has 0x%x", a.what,
         begin, bytes, cta->shared_bytes);
  if (!cta->options->races) return;
  const bool same_value =
      a.value && cta->options->allow_same_value && !std::memcmp(shared_at(address), a.value, bytes);
  for (u32 offset = begin, next; offset < end; offset = next) {
    next = std::min(end, offset / kCellBytes * kCellBytes + kCellBytes);
    Cell* cell = cta->cells + offset / kCellBytes * kParts;
    if (!cell->split && next - offset == kCellBytes) {
      check_cell(*cell, offset, a, same_value);
      continue;
    }
    if (!cell->split) {
      for (int i = 1; i < kParts; i++) cell[i] = *cell;
      cell->split = true;
    }
    for (u32 part = offset % kCellBytes / 4; part <= (next - 1) % kCellBytes / 4; part++)
      check_cell(cell[part], offset, a, same_value);
  }
}

void require_alignment(u32 address, u32 alignment, const char* what) {
  if (address % alignment)
    fail("%s: misaligned shared memory address smem+0x%x, needs %u", what, offset_of(address),
         alignment);
}

// The loads and stores of threads.
static Access by_thread(const char* what, bool write) {
  const Thread& t = *cta->current;
  return {.what = what,
          .actor = t.warp->id,
          .clock = &t.warp->clock,
          .write = write,
          .generic_writer = write ? t.index : -1};
}
const void* shared_read(u32 address, u32 bytes) {
  require_alignment(address, bytes, "ld.shared");
  check_shared(address, bytes, by_thread("ld.shared", false));
  return shared_at(address);
}
void shared_write(u32 address, const void* value, u32 bytes) {
  require_alignment(address, bytes, "st.shared");
  Access access = by_thread("st.shared", true);
  // A value is compared with memory, so bounds come first.
  if (address >= kSharedBase && offset_of(address) + bytes <= cta->shared_bytes)
    access.value = value;
  check_shared(address, bytes, access);
  std::memcpy(shared_at(address), value, bytes);
}
void* shared_atomic(u32 address, u32 bytes) {
  require_alignment(address, bytes, "atom.shared");
  Access access = by_thread("atom.shared", true);
  access.atomic = true;
  check_shared(address, bytes, access);
  return shared_at(address);
}

void fence_proxy_async() {
  Thread& t = *cta->current;
  Clock& clock = t.warp->clock;
  t.proxy_fences++;
  for (int i = 0; i < kActors; i++)
    clock.fenced[i] = std::max(clock.fenced[i], i == t.warp->id ? t.warp->synced : clock.seen[i]);
}

}  // namespace emu
