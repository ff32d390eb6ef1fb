// Fibers and the scheduler of one block: which CUDA thread runs next, and what to say when none
// can.
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <cstdarg>

#include "state.h"

namespace emu {

thread_local Block* cta;

// Saves the callee-saved registers on the old stack and takes them from the new one.
extern "C" void emulator_switch_stack(void** save, void* load);
asm(R"(
.text
.globl emulator_switch_stack
.type emulator_switch_stack,@function
emulator_switch_stack:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");
constexpr size_t kPage = 4096;

static void switch_stack(void** save, void* load) {
  cta->stats.switches++;
  emulator_switch_stack(save, load);
}
[[noreturn]] static void leave_block() {
  void* abandoned;
  switch_stack(&abandoned, cta->main_stack_pointer);
  __builtin_unreachable();
}

void fail(const char* format, ...) {
  char what[4096], where[200];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  const Thread& t = *cta->current;
  const Dim& b = t.place.ctaid;
  snprintf(where, sizeof where,
           "block (%u,%u,%u) thread %d (warp %d lane %d) at PTX line %u: ", b.x, b.y, b.z, t.index,
           t.index / 32, t.index % 32, t.line);
  cta->error = std::string(where) + what;
  cta->failed = true;
  leave_block();
}

u32 random_bits() {  // xorshift
  u64& x = cta->random_state;
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return x >> 32;
}

void made_progress() {
  if (cta->idle_rounds == 0) return;
  cta->idle_rounds = cta->rounds_alone = 0;
  cta->launch->spinning--;
  cta->launch->progress++;
}
void wake(Thread& thread) {
  thread.warp->ready |= 1u << thread.index % 32;
  cta->ready_warps |= 1u << thread.warp->id;
  thread.waits_for = nullptr;
}
void wake(u32 (&lanes)[kMaxWarps]) {
  for (int i = 0; i < cta->warp_count; i++) {
    if (!lanes[i]) continue;
    made_progress();
    cta->warps[i].ready |= lanes[i];
    cta->ready_warps |= 1u << i;
    lanes[i] = 0;
  }
}

[[noreturn]] static void report_deadlock() {
  std::string report = "deadlock: no thread can go on";
  char text[300];
  for (int i = 0, j; i < cta->thread_count; i = j) {
    const Thread& t = cta->threads[i];
    auto same = [&](const Thread& u) {
      return t.finished == u.finished &&
             (t.finished || (t.waits_for == u.waits_for && t.line == u.line &&
                             t.detail_a == u.detail_a && t.detail_b == u.detail_b));
    };
    for (j = i; j < cta->thread_count && same(cta->threads[j]);) j++;
    snprintf(text, sizeof text, "\n  threads %d..%d: ", i, j - 1);
    report += text;
    snprintf(text, sizeof text,
             t.finished    ? "exited"
             : t.waits_for ? t.waits_for
                           : "running",
             t.detail_a, t.detail_b);
    report += text;
    if (t.finished) continue;
    snprintf(text, sizeof text, " (PTX line %u)", t.line);
    report += text;
  }
  const Launch& launch = *cta->launch;
  const size_t blocks = launch.order.size(), started = std::min<size_t>(launch.next_block, blocks);
  if (started < blocks) {
    snprintf(text, sizeof text, "\n  %zu of the %zu blocks have not started", blocks - started,
             blocks);
    report += text;
  }
  for (const Mbarrier* m : cta->mbarriers) {
    snprintf(text, sizeof text,
             "\n  mbarrier smem+0x%x: phase %u, %u of %u arrivals pending, %lld bytes expected",
             m->offset, m->phase, m->pending, m->count, static_cast<long long>(m->bytes));
    report += text;
  }
  fail("%s", report.c_str());
}

static double seconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}
// Only spinning threads are left: is there hope that another block changes what they look at?
static bool spin_is_hopeless() {
  constexpr double kPatience = 0.3;
  Launch& launch = *cta->launch;
  if (launch.failed) leave_block();
  if (cta->idle_rounds++ == 0) launch.spinning++;
  if (cta->idle_rounds == 1 || launch.progress != cta->seen_progress ||
      launch.spinning < launch.running) {
    cta->seen_progress = launch.progress;
    cta->idle_since = seconds();
  }
  if (cta->idle_rounds > 10 && launch.running > 1) usleep(50);
  cta->rounds_alone = launch.running == 1 ? cta->rounds_alone + 1 : 0;
  return cta->rounds_alone > 100 ||
         (cta->idle_rounds > 100 && seconds() - cta->idle_since > kPatience);
}

static int choose_warp() {
  const u32 ready = cta->ready_warps;
  if (cta->options->schedule == kLazy) return 31 - std::countl_zero(ready);  // the highest first
  if (cta->options->schedule == kEager) {                                    // round robin
    const u32 above = ready & (~1u << cta->current_warp);
    return std::countr_zero(above ? above : ready);
  }
  u32 rest = ready;
  for (u32 skip = random_bits() % std::popcount(ready); skip > 0; skip--) rest &= rest - 1;
  return std::countr_zero(rest);
}
static Thread& next_thread(bool stay_in_warp) {
  const u32 schedule = cta->options->schedule;
  auto& pending = cta->pending;
  for (;;) {
    if (schedule == kRandom && !pending.empty() && random_bits() % 16 == 0) {
      const size_t i = random_bits() % pending.size();
      if (!pending[i]->late) complete_async(i);
    }
    if (cta->ready_warps) {
      if (!stay_in_warp || !(cta->ready_warps >> cta->current_warp & 1))
        cta->current_warp = choose_warp();
      Warp& warp = cta->warps[cta->current_warp];
      const int lane = std::countr_zero(warp.ready);
      warp.ready &= warp.ready - 1;
      if (!warp.ready) cta->ready_warps &= ~(1u << warp.id);
      return cta->threads[warp.id * 32 + lane];
    }
    if (!pending.empty()) {  // lazy: the last issued lands first
      complete_async(schedule == kLazy    ? pending.size() - 1
                     : schedule == kEager ? 0
                                          : random_bits() % pending.size());
    } else if (!cta->pollers.empty() && !spin_is_hopeless()) {
      for (Thread* t : cta->pollers) {
        t->warp->ready |= 1u << t->index % 32;
        cta->ready_warps |= 1u << t->warp->id;
      }
      cta->pollers.clear();
    } else {
      report_deadlock();
    }
  }
}
static void reschedule(bool stay_in_warp) {
  Thread &from = *cta->current, &to = next_thread(stay_in_warp);
  if (&from == &to) return;
  cta->current = &to;
  switch_stack(&from.stack_pointer, to.stack_pointer);
}
void suspend(const char* waits_for, u64 a, u64 b) {
  Thread& t = *cta->current;
  t.waits_for = waits_for, t.detail_a = a, t.detail_b = b;
  reschedule(true);
}
void spin(const char* waits_for, u64 a, u64 b) {
  cta->pollers.push_back(cta->current);
  suspend(waits_for, a, b);
}
void yield_point() {
  if (cta->options->schedule != kRandom || random_bits() % 8) return;
  wake(*cta->current);
  reschedule(false);
}
void polled(u64 address, u64 value) {
  Thread& t = *cta->current;
  const bool same = t.polled_address == address && t.polled_value == value;
  t.polled_address = address, t.polled_value = value;
  if (same) return spin("spinning on address 0x%llx, which holds %llu", address, value);
  made_progress();
  yield_point();
}
u32 endless_loop_check() {
  spin("in a loop without end");
  return kLoopFuel;
}

static void run_thread() {
  cta->launch->kernel(cta->options->parameters);
  check_nothing_in_flight();
  made_progress();
  Thread& t = *cta->current;
  t.finished = true;
  if (--cta->alive == 0) leave_block();
  Thread& to = next_thread(true);
  cta->current = &to;
  switch_stack(&t.stack_pointer, to.stack_pointer);
}

static void reset_warps() {
  for (int i = 0; i < cta->warp_count; i++) {
    Warp& w = cta->warps[i];
    w.id = i;
    w.ready = ~0u;
    for (Collective& c : w.collectives) c.arrived = 0;
    std::fill_n(w.clock.seen, kActors, cta->time);  // all that earlier blocks did
    std::fill_n(w.clock.fenced, kActors, cta->time);
    w.synced = cta->time;
    w.registers = cta->options->registers;
    w.copy_times.clear();
  }
  for (int i = 0; i < cta->warp_count; i++) cta->warps[i].clock.seen[i] = ++cta->time;
}
static void reset_thread(int i, Dim ctaid) {
  const Options& o = *cta->options;
  Thread& t = cta->threads[i];
  if (!t.stack) {
    void* m = mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(m, kPage, PROT_NONE);
    t.stack = static_cast<u8*>(m) + kPage;
  }
  const Dim size{o.block[0], o.block[1], o.block[2]}, grid{o.grid[0], o.grid[1], o.grid[2]};
  const u32 n = i;
  t.index = i;
  t.warp = &cta->warps[i / 32];
  t.place = {{n % size.x, n / size.x % size.y, n / size.x / size.y},
             size,
             ctaid,
             grid,
             n,
             o.dynamic_shared,
             cta->shared_bytes};
  t.finished = t.wgmma_fenced = false;
  t.waits_for = nullptr;
  t.line = t.proxy_fences = 0;
  t.peeked_offset = ~0u;
  t.polled_address = ~0ull;
  t.copies_done = t.stores_done = t.stores_written = t.wgmma_issued = t.wgmma_groups_done = 0;
  t.observed.clear(), t.stores_read.clear();
  t.fenced = nullptr;
  t.copies.clear(), t.copy_groups.clear(), t.stores.clear(), t.store_groups.clear();
  t.accumulators.clear(), t.a_fragments.clear(), t.register_in_flight.clear(),
      t.wgmma_groups.clear();

  // The first switch pops six registers and returns into run_thread; tops are spread over the
  // cache.
  u64* top = reinterpret_cast<u64*>(t.stack + kStackBytes - 64 - i * 7 % 16 * 256);
  top[-1] = 0;
  top[-2] = reinterpret_cast<u64>(run_thread);
  std::fill(top - 8, top - 2, 0);
  t.stack_pointer = top - 8;
}

void run_block(u32 number) {
  Block& b = *cta;
  const Options& o = *b.options;
  const Dim ctaid{number % o.grid[0], number / o.grid[0] % o.grid[1],
                  number / o.grid[0] / o.grid[1]};
  b.number = number;
  for (auto& list : b.acquired) list.clear();
  b.thread_count = b.alive = o.block[0] * o.block[1] * o.block[2];
  b.warp_count = b.thread_count / 32;
  b.ready_warps = (1u << b.warp_count) - 1;
  b.current_warp = b.idle_rounds = b.rounds_alone = b.next_load_unit = b.next_store_unit = 0;
  if (o.poison) std::memset(b.shared, 0xff, b.shared_bytes);
  for (Mbarrier* m : b.mbarriers) delete m;
  for (AsyncCopy* copy : b.pending) delete copy;
  b.mbarriers.clear(), b.pending.clear(), b.pollers.clear();
  std::memset(static_cast<void*>(b.barriers), 0, sizeof b.barriers);
  for (Warpgroup& g : b.warpgroups) g.ops.clear(), g.waiting.clear(), g.first = g.executed = 0;
  b.time++;
  reset_warps();
  for (int i = 0; i < b.thread_count; i++) reset_thread(i, ctaid);
  b.registers_in_use = b.thread_count * o.registers;
  b.stats.registers = std::max<u64>(b.stats.registers, b.registers_in_use);

  b.current = &next_thread(true);
  switch_stack(&b.main_stack_pointer, b.current->stack_pointer);
  if (b.idle_rounds) b.launch->spinning--;
  b.idle_rounds = b.rounds_alone = 0;
  if (!b.failed && std::any_of(b.pending.begin(), b.pending.end(),
                               [](auto* c) { return c->op == Bulk::load; })) {
    b.failed = true;
    b.error = "the block exits with a bulk load in flight";
  }
}

const Place& place() { return cta->current->place; }
u32& current_line() { return cta->current->line; }
u64 clock_cycles() { return __rdtsc(); }
void trap(const char* what) { fail("%s", what); }

}  // namespace emu
