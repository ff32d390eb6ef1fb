// Entry point: runs the blocks of a grid on OS threads, each on the next free thread. No order of
// blocks is promised to a kernel: eager schedules take them as they are numbered, lazy ones from
// the last, random ones by the seed; or a launch says in which order.
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>

#include "state.h"

namespace emu {

constexpr size_t kGuardBytes = 512 << 10;  // no access, on both sides of shared memory

void Stats::add(const Stats& o) {
  switches += o.switches, mma += o.mma, wgmma += o.wgmma;
  tma_loads += o.tma_loads, tma_stores += o.tma_stores, cp_async += o.cp_async,
      bytes_loaded += o.bytes_loaded;
  bank_wavefronts += o.bank_wavefronts, bank_ideal += o.bank_ideal;
  registers = std::max(registers, o.registers);
  bytes_past_extents += o.bytes_past_extents;
}

static void on_fault(int signal_number, siginfo_t* info, void*) {
  if (!cta || !cta->current) {
    signal(signal_number, SIG_DFL);
    return;
  }
  const u64 address = reinterpret_cast<u64>(info->si_addr);
  const u64 below_stack = reinterpret_cast<u64>(cta->current->stack) - address;
  if (signal_number == SIGSEGV && below_stack <= 4096)
    fail("stack overflow of a thread: too many local variables");
  fail("memory fault at 0x%llx: global memory out of bounds?",
       static_cast<unsigned long long>(address));
}

static std::mutex pool_mutex;
static std::vector<std::unique_ptr<Block>> pool;

static std::unique_ptr<Block> take_block(Launch& launch) {
  std::unique_ptr<Block> b;
  {
    std::lock_guard lock(pool_mutex);
    if (!pool.empty()) b = std::move(pool.back()), pool.pop_back();
  }
  if (!b) {
    b = std::make_unique<Block>();
    b->shared_mapping = static_cast<u8*>(mmap(nullptr, kSharedMax + 2 * kGuardBytes, PROT_NONE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    b->shared = b->shared_mapping + kGuardBytes;
    b->cells = new_cells();
  }
  if (b->time > 1u << 31) {
    forget_accesses(b->cells);
    b->time = 0;
  }
  b->launch = &launch;
  b->options = launch.options;
  b->stats = {};
  b->bytes_read.assign(launch.options->buffer_count, 0);
  b->failed = false;
  std::fill(std::begin(b->recent_pages), std::end(b->recent_pages), Block::RecentPage{});
  b->shared_bytes = launch.options->static_shared + launch.options->dynamic_shared;
  mprotect(b->shared, (kSharedMax + 4095) & ~4095u, PROT_NONE);
  mprotect(b->shared, (b->shared_bytes + 4095) & ~4095u, PROT_READ | PROT_WRITE);
  return b;
}

static std::vector<u32> order_of_blocks(const Options& o) {
  std::vector<u32> order(o.grid[0] * o.grid[1] * o.grid[2]);
  if (o.order) {
    std::copy_n(o.order, order.size(), order.begin());
    return order;
  }
  std::iota(order.begin(), order.end(), 0u);
  if (o.schedule == kLazy) std::reverse(order.begin(), order.end());
  if (o.schedule == kRandom) std::shuffle(order.begin(), order.end(), std::mt19937_64(o.seed));
  return order;
}

static void run_blocks(Launch& launch, std::string& error, Stats& stats) {
  const Options& o = *launch.options;
  std::unique_ptr<Block> block = take_block(launch);
  cta = block.get();
  stack_t alternate{cta->signal_stack, 0, sizeof cta->signal_stack}, before;
  sigaltstack(&alternate, &before);
  for (u32 place; !launch.failed && (place = launch.next_block++) < launch.order.size();) {
    const u32 i = launch.order[place];
    cta->random_state = (o.seed + 1) * 0x9E3779B97F4A7C15ull ^ (i + 1) * 0xD1B54A32D192ED03ull;
    random_bits();
    cta->peek_seed = random_bits();
    run_block(i);
    if (cta->failed && !launch.failed.exchange(true)) error = cta->error;
  }
  launch.running--;
  sigaltstack(&before, nullptr);
  std::lock_guard lock(pool_mutex);
  stats.add(cta->stats);
  for (u64 i = 0; i < o.buffer_count; i++) o.bytes_read[i] += cta->bytes_read[i];
  pool.push_back(std::move(block));
  cta = nullptr;
}

extern "C" int emulator_launch(void (*kernel)(const u8*), const Options* options, Stats* stats,
                               char* error_text, u64 error_bytes) {
  static std::mutex one_launch;
  std::lock_guard lock(one_launch);
  struct sigaction action{}, segv, bus;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &segv);
  sigaction(SIGBUS, &action, &bus);
  Launch launch;
  launch.options = options;
  launch.order = order_of_blocks(*options);
  launch.kernel = kernel;
  launch.running = options->os_threads;
  std::string error;
  *stats = {};
  std::vector<std::thread> helpers;
  for (u32 i = 1; i < options->os_threads; i++)
    helpers.emplace_back([&] { run_blocks(launch, error, *stats); });
  run_blocks(launch, error, *stats);
  for (std::thread& t : helpers) t.join();
  sigaction(SIGSEGV, &segv, nullptr);
  sigaction(SIGBUS, &bus, nullptr);
  snprintf(error_text, error_bytes, "%s", error.c_str());
  return launch.failed;
}

}  // namespace emu
