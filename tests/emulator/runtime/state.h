// State of one CUDA block. Each CUDA thread is a fiber; a block stays on one OS thread, which `cta`
// belongs to.
#pragma once
#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernel_api.h"

namespace emu {

constexpr int kMaxThreads = 512, kMaxWarps = kMaxThreads / 32, kMaxWarpgroups = kMaxThreads / 128;
constexpr u32 kSharedBase = 1024;  // the first KiB of the shared window belongs to the system
constexpr u32 kSharedMax = 232448;
constexpr u32 kRegisterFile = 65536;
constexpr size_t kStackBytes = 512 << 10;
constexpr u32 kPoison =
    0x7fa0beef;  // a signalling NaN: no arithmetic gives it or leaves it as it is

// Everyone who accesses shared memory: warps, and the units that work for them asynchronously.
constexpr int kCopyUnit = kMaxWarps, kTensorCore = 2 * kMaxWarps,
              kBulkLoad = kTensorCore + kMaxWarpgroups;
constexpr int kBulkLoads = 16, kBulkStore = kBulkLoad + kBulkLoads, kBulkStores = 8;
// What bulk stores do to global memory, of which wait_group.read does not wait.
constexpr int kBulkWrite = kBulkStore + kBulkStores, kBulkWrites = 4;
constexpr int kActors = 64;
static_assert(kBulkWrite + kBulkWrites <= kActors);

// Vector clock: for each actor, the time up to which its accesses happen before the owner's next
// one, and the part of them that a fence.proxy.async makes visible to the async proxy.
struct alignas(64) Clock {
  u32 seen[kActors], fenced[kActors];
  void join(const Clock& other);
  void meet(const Clock& other);
};

struct Access {
  const char* what;
  int actor;
  const Clock* clock;
  bool write = false, async_proxy = false, atomic = false;
  int generic_writer =
      -1;  // thread whose fence.proxy.async must follow before the async proxy reads
  const void* value = nullptr;  // what will be written
};
void check_shared(u32 address, u32 bytes, const Access& access);  // bounds, races, proxies
struct Cell;  // access history of 16 bytes (races.cpp)
Cell* new_cells();
void forget_accesses(Cell* cells);
std::string actor_name(int actor);

// What a release makes known to whoever acquires it (global_races.cpp).
struct Published;
typedef std::shared_ptr<const Published> Publication;
struct Acquisition {
  u32 time;  // of the warp that acquired
  Publication what;
};
struct GlobalAccess {
  const char* what;
  int actor;
  const Clock* clock;
  bool write = false;
  Scope scope = Scope::weak;
  bool adds_floats = false;
};
void note_global(u64 address, u32 bytes, const GlobalAccess& access);  // fails if it is a race
struct Page;                                                           // access history of 4 KiB

struct Warp;
struct Mbarrier {
  u32 offset, count, pending, phase;
  i64 bytes;
  Clock clock;
  u32 waiting[kMaxWarps];
};
struct Barrier {
  u32 expected, arrived, votes, result;
  Clock clock;
  u32 waiting[kMaxWarps];
};
struct Collective {
  const char* name;
  u32 mask, arrived;
  void* arguments[32];
};
struct Warp {
  int id;
  u32 ready;  // lanes that can run
  Clock clock;
  u32 synced;  // time up to which all lanes' accesses are ordered among themselves
  Collective collectives[4];
  u32 registers;
  std::vector<u32> copy_times;  // of each cp.async group
};

struct TensorMap {  // lives in the 128 opaque bytes of a CUtensorMap
  u64 magic, base;
  u32 rank, element_bytes, swizzle_bytes;
  Element element;
  u32 extent[5], box[5];  // innermost first
  u64 stride[5];
  u32 box_bytes() const { return box[0] * box[1] * box[2] * box[3] * box[4] * element_bytes; }
};
static_assert(sizeof(TensorMap) <= 128);

struct Thread;
struct AsyncCopy {
  Bulk op;
  u32 shared;
  TensorMap map;
  i32 at[5];
  Mbarrier* barrier;
  int actor;
  u32 time;
  Clock clock;
  Thread* thread;  // that issued it
  u32 line;        // where
  int global_actor;
  bool done = false;
  bool late = false;        // completes only when nothing else can run
  bool is_arrival = false;  // cp.async.mbarrier.arrive, for the first `copies` of the thread
  size_t copies = 0;
};
struct AccumulatorBuffer {
  float values[64 * 256];
  int users;
};
struct WgmmaOp {
  WgmmaShape shape;
  bool a_in_registers, accumulate, done;
  u64 a_descriptor, b_descriptor;
  int issued, collected;  // number of threads
  AccumulatorBuffer* accumulators;
  Clock clock;
  u32 time;
  float a[64 * 32];
};
struct Warpgroup {
  std::deque<WgmmaOp> ops;
  u64 first = 0, executed = 0;  // sequence numbers
  std::vector<Thread*> waiting;
};

struct Thread {
  int index;
  Warp* warp;
  Place place;
  void* stack_pointer;
  u8* stack;
  bool finished;
  u32 line;
  const char* waits_for;  // printf format of the two details
  u64 detail_a, detail_b;

  u32 proxy_fences;
  u32 peeked_offset, peeked_phase;  // last mbarrier phase for which try_wait said "not yet"
  u64 polled_address, polled_value;
  std::vector<Publication> observed;  // by strong reads, not acquired yet
  Publication fenced;                 // by its last fence, for its later strong writes

  struct Copy {
    u32 destination;
    u64 source;
    u32 bytes, source_bytes;
  };
  std::vector<Copy> copies;
  std::vector<size_t> copy_groups;  // end of each group in `copies`
  size_t copies_done;

  std::vector<AsyncCopy*> stores;
  std::vector<size_t> store_groups;
  size_t stores_done, stores_written;
  std::vector<std::pair<int, u32>> stores_read;  // actor of the writing and time

  struct Accumulators {
    u32* registers;
    const u16* tuple;
    int count;
    AccumulatorBuffer* buffer;
    u64 last;  // sequence number of the last wgmma on them
  };
  struct AFragment {
    u32* registers;
    const u16* tuple;
    u32 value[4];
    u64 sequence;
  };
  std::vector<Accumulators> accumulators;  // in flight
  std::vector<AFragment> a_fragments;
  std::vector<u8> register_in_flight;
  bool wgmma_fenced;
  u64 wgmma_issued;
  std::vector<u64> wgmma_groups;
  size_t wgmma_groups_done;
};

struct Buffer {
  u64 begin, end, writable;
};
struct Options {  // mirrored in launch.py
  u32 grid[3], block[3];
  u32 schedule, os_threads;
  u64 seed;
  u32 static_shared, dynamic_shared, registers;
  u8 races, poison, allow_same_value, deterministic;
  const u8* parameters;
  u64 parameter_bytes;
  const Buffer* buffers;
  u64 buffer_count;
  u64* bytes_read;   // of each buffer
  const u32* order;  // of the blocks, or null
};
enum Schedule { kEager, kLazy, kRandom };

struct Stats {  // mirrored in launch.py
  u64 switches, mma, wgmma, tma_loads, tma_stores, cp_async, bytes_loaded, bank_wavefronts,
      bank_ideal, registers, bytes_past_extents;
  void add(const Stats& other);
};

constexpr u32 kSynchronised = 64;
struct Launch {
  const Options* options;
  void (*kernel)(const u8*);
  std::vector<u32> order;  // of the blocks' linear numbers
  std::atomic<u32> next_block{0}, running{0}, spinning{0}, progress{0};
  std::atomic<bool> failed{false};

  struct {
    std::mutex mutex;
    std::unordered_map<u64, Publication> published;  // by address
  } synchronised[kSynchronised];
  std::mutex pages_mutex;
  std::unordered_map<u64, std::shared_ptr<Page>> pages;  // by address / 4096
};

struct Block {
  Launch* launch;
  const Options* options;
  Stats stats;
  std::vector<u64> bytes_read;  // of each buffer
  Thread threads[kMaxThreads];
  Warp warps[kMaxWarps];
  Warpgroup warpgroups[kMaxWarpgroups];
  Barrier barriers[16];
  std::vector<Mbarrier*> mbarriers;
  std::vector<AsyncCopy*> pending;
  std::vector<AccumulatorBuffer*> free_accumulators;
  int thread_count, warp_count, alive;
  u32 number;  // among all blocks

  // scheduler
  Thread* current;
  int current_warp;
  u32 ready_warps;
  std::vector<Thread*> pollers;
  u32 idle_rounds, rounds_alone, seen_progress;
  double idle_since;
  void* main_stack_pointer;
  u64 random_state;
  u32 peek_seed;
  bool failed;
  std::string error;

  // shared memory
  u8* shared;  // of address kSharedBase
  u8* shared_mapping;
  u32 shared_bytes;
  Cell* cells;
  u32 time;
  u32 registers_in_use;
  int next_load_unit, next_store_unit;
  std::vector<Acquisition> acquired[kMaxWarps];  // in their order
  struct RecentPage {
    u64 number;
    Page* page;
  } recent_pages[64];
  float b_matrix[32 * 256];
  u8 signal_stack[65536];
};
extern thread_local Block* cta;

// fibers.cpp
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);
u32 random_bits();
void wake(Thread& thread);
void wake(u32 (&lanes)[kMaxWarps]);
void suspend(const char* waits_for, u64 a = 0, u64 b = 0);
void spin(const char* waits_for, u64 a = 0, u64 b = 0);
void made_progress();
void run_block(u32 number);

inline int element_bytes(Format f) {
  return f == Format::tf32 ? 4 : f == Format::e4m3 || f == Format::e5m2 ? 1 : 2;
}
void decode(Format format, const void* from, int bytes, float* to);

// Others that cross files.
inline u8* shared_at(u32 address) { return cta->shared + (address - kSharedBase); }
inline u32 offset_of(u32 address) { return address - kSharedBase; }
void require_alignment(u32 address, u32 alignment, const char* what);
void check_global(u64 address, u32 bytes, const GlobalAccess& access);  // bounds, races
void check_mapped(u64 address, const char* what);
u32 swizzled(u32 address, u32 span);
Mbarrier& mbarrier_at(u32 address, const char* what);
void complete_async(size_t index_in_pending);
void finish_copies(Thread& thread, size_t end);
void arrive_now(Mbarrier& barrier, u32 count, i64 bytes);
void run_wgmma(Warpgroup& group, u64 end);
void check_nothing_in_flight();

}  // namespace emu
