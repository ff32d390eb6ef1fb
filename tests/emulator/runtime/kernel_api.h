// Everything that a translated kernel calls.
#pragma once
#include "ops.h"

namespace emu {

struct Dim {
  u32 x, y, z;
};
struct Place {  // of the calling CUDA thread
  Dim tid, ntid, ctaid, nctaid;
  u32 linear, dynamic_shared, total_shared;
};
const Place& place();
u32& current_line();       // of the PTX text, for error messages
u32 endless_loop_check();  // called once per kLoopFuel backward branches; returns fuel
constexpr u32 kLoopFuel = 1 << 16;
u64 clock_cycles();
[[noreturn]] void trap(const char* what);

// Memory. Shared addresses are offsets in the shared window; generic and global ones are host
// pointers.
const void* shared_read(u32 address, u32 bytes);
void shared_write(u32 address, const void* value, u32 bytes);
void* shared_atomic(u32 address, u32 bytes);
void* global_at(u64 address, u32 bytes, bool write);
const void* generic_read(u64 address, u32 bytes);
void generic_write(u64 address, const void* value, u32 bytes);
void* local_at(u64 address, u32 bytes, const void* frame, u64 frame_bytes);
u64 shared_to_generic(u32 address);
u32 generic_to_shared(u64 address);
bool is_shared(u64 address);

// Strong accesses to global and generic addresses; clusters are of one block.
enum class Scope : u8 { weak, cta, gpu };
struct Order {
  Scope scope;
  bool acquires, releases;
};
enum class Strong { load, store, atomic, float_sum };
void* strong_at(u64 address, u32 bytes, Strong access, Order order);
void load_strong(void* value, const void* memory, u32 bytes, Order order);
void store_strong(void* memory, const void* value, u32 bytes, Order order);
// Around an atomic operation: memory and what is published with it change together.
class StrongAtomic {
 public:
  StrongAtomic(void* memory, Order order, bool reads);
  ~StrongAtomic();

 private:
  u64 address;
  Order order;
  bool reads, locked;
  void* mine = nullptr;
};
void fence(bool acquires, bool releases);  // at the scope of the GPU
void polled(u64 address,
            u64 value);  // after a strong load or an atomic: lets others run in spin loops

// Warps and barriers.
enum class Shuffle { up, down, bfly, idx };
u32 shuffle(Shuffle mode, u32 value, u32 b, u32 c, u32 mask, bool& in_range);
u32 ballot(bool vote, u32 mask);
u32 elect(u32 mask);
void sync_warp(u32 mask);
u64 reduce_lanes(Atomic op, u64 value, u32 mask, bool is_signed);
void barrier(u32 id, i64 threads, bool arrive_only);  // threads < 0: the whole block
u32 barrier_vote(u32 id, i64 threads, bool vote);     // returns how many voted true
void set_max_registers(u32 count, bool increase);
void yield_point();

enum class Format { bf16, f16, e4m3, e5m2, tf32 };
void ldmatrix(u32* registers, int count, u32 row_address, bool transpose);
void stmatrix(const u32* registers, int count, u32 row_address, bool transpose);
void mma(Format a_format, Format b_format, int k, bool f16_accumulate, u32* d, const u32* a,
         const u32* b);

// Asynchronous copies.
void cp_async(u32 destination, u64 source, u32 bytes, u32 source_bytes);
void cp_async_commit();
void cp_async_wait(u64 groups_in_flight);
void cp_async_mbarrier_arrive(u32 barrier, bool counted);
void mbarrier_init(u32 barrier, u32 count);
void mbarrier_invalidate(u32 barrier);
void mbarrier_expect(u32 barrier, u32 bytes);
u64 mbarrier_arrive(u32 barrier, u32 count, u32 expect_bytes, bool drop);
bool mbarrier_wait(u32 barrier, u64 state, bool parity, bool may_suspend);
enum class Bulk { load, store, reduce };
void tma(Bulk op, u32 shared, u64 tensor_map, u32 barrier, int rank, const i32* coordinates);
enum class Element { bytes, f32, f16, bf16, u32 };
void bulk_copy(Bulk op, Element type, u32 shared, u64 global, u32 bytes, u32 barrier);
void bulk_commit();
void bulk_wait(u64 groups_in_flight, bool only_read);
void fence_proxy_async();

// Warpgroup matrix products. Registers that they touch live in one array; tuples are tables of
// indices into it.
struct WgmmaShape {
  Format a, b;
  int n;
  bool transpose_a, transpose_b, negate_a, negate_b;
  bool operator==(const WgmmaShape&) const = default;
};
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(u64 groups_in_flight);
void wgmma(const WgmmaShape& shape, u32* registers, const u16* d, const u16* a, u64 a_descriptor,
           u64 b_descriptor, bool accumulate);

template <class V>
inline void load_shared(V& v, u32 address) {
  std::memcpy(&v, shared_read(address, sizeof v), sizeof v);
}
template <class V>
inline void store_shared(const V& v, u32 address) {
  shared_write(address, &v, sizeof v);
}
template <class V>
inline void load_global(V& v, u64 address) {
  std::memcpy(&v, global_at(address, sizeof v, false), sizeof v);
}
template <class V>
inline void store_global(const V& v, u64 address) {
  std::memcpy(global_at(address, sizeof v, true), &v, sizeof v);
}
template <class V>
inline void load_strong(V& v, u64 address, Order order) {
  load_strong(&v, strong_at(address, sizeof v, Strong::load, order), sizeof v, order);
}
template <class V>
inline void store_strong(const V& v, u64 address, Order order) {
  store_strong(strong_at(address, sizeof v, Strong::store, order), &v, sizeof v, order);
}
template <class V>
inline void load_generic(V& v, u64 address) {
  std::memcpy(&v, generic_read(address, sizeof v), sizeof v);
}
template <class V>
inline void store_generic(const V& v, u64 address) {
  generic_write(address, &v, sizeof v);
}

}  // namespace emu
