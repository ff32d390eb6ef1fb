// Global, generic and local memory: host memory, checked against the buffers that the launch may
// touch.
#include "state.h"

namespace emu {

static void report_out_of_bounds(u64 address, u32 bytes, const char* what) {
  const Options& o = *cta->options;
  u64 nearest = 0, distance = ~0ull;
  for (u64 i = 0; i < o.buffer_count; i++) {
    const Buffer& b = o.buffers[i];
    const u64 d = address < b.begin  ? b.begin - address
                  : address >= b.end ? address + bytes - b.end
                                     : 0;
    if (d < distance) nearest = i, distance = d;
  }
  const Buffer& b = o.buffers[nearest];
  const long long from_begin = address - b.begin;
  fail(
      "%s of %u bytes at 0x%llx is out of bounds; the nearest buffer is number %llu: byte %lld of "
      "its %llu",
      what, bytes, static_cast<unsigned long long>(address),
      static_cast<unsigned long long>(nearest), from_begin,
      static_cast<unsigned long long>(b.end - b.begin));
}

void check_global(u64 address, u32 bytes, const GlobalAccess& access) {
  const Options& o = *cta->options;
  u64 i = 0;
  while (i < o.buffer_count && (address < o.buffers[i].begin || address + bytes > o.buffers[i].end))
    i++;
  if (i < o.buffer_count) {
    const bool writable = o.buffers[i].writable;
    if (access.write && !writable)
      fail("%s writes to read-only buffer number %llu", access.what,
           static_cast<unsigned long long>(i));
    if (!access.write) cta->bytes_read[i] += bytes;
    if (!writable) return;  // nobody writes there
  } else if (o.buffers) {
    report_out_of_bounds(address, bytes, access.what);
  }
  if (o.races) note_global(address, bytes, access);
}

void check_mapped(u64 address, const char* what) {
  const Options& o = *cta->options;
  if (!o.buffers) return;
  for (u64 i = 0; i < o.buffer_count; i++)
    if (o.buffers[i].begin <= address && address < o.buffers[i].end) return;
  report_out_of_bounds(address, 1, what);
}

static void* checked_global(u64 address, u32 bytes, GlobalAccess access) {
  if (address % bytes)
    fail("%s: misaligned address 0x%llx, needs %u", access.what,
         static_cast<unsigned long long>(address), bytes);
  const Warp& w = *cta->current->warp;
  access.actor = w.id;
  access.clock = &w.clock;
  check_global(address, bytes, access);
  return reinterpret_cast<void*>(address);
}
void* global_at(u64 address, u32 bytes, bool write) {
  const char* what = write ? "store to global memory" : "load from global memory";
  return checked_global(address, bytes, {.what = what, .write = write});
}

bool is_shared(u64 address) {
  return address - reinterpret_cast<u64>(cta->shared) < cta->shared_bytes;
}
u64 shared_to_generic(u32 address) {
  return reinterpret_cast<u64>(cta->shared) - kSharedBase + address;
}
u32 generic_to_shared(u64 address) {
  return address - reinterpret_cast<u64>(cta->shared) + kSharedBase;
}

// Parameters and local arrays have generic addresses too.
static bool is_private(u64 address) {
  const Options& o = *cta->options;
  const Thread& t = *cta->current;
  return address - reinterpret_cast<u64>(o.parameters) < o.parameter_bytes ||
         address - reinterpret_cast<u64>(t.stack) < kStackBytes;
}
static void* generic_at(u64 address, u32 bytes, bool write) {
  return is_private(address) ? reinterpret_cast<void*>(address) : global_at(address, bytes, write);
}
const void* generic_read(u64 address, u32 bytes) {
  return is_shared(address) ? shared_read(generic_to_shared(address), bytes)
                            : generic_at(address, bytes, false);
}
void generic_write(u64 address, const void* value, u32 bytes) {
  if (is_shared(address)) return shared_write(generic_to_shared(address), value, bytes);
  std::memcpy(generic_at(address, bytes, true), value, bytes);
}
void* strong_at(u64 address, u32 bytes, Strong kind, Order order) {
  const bool write = kind != Strong::load;
  if (is_shared(address)) {
    const u32 shared = generic_to_shared(address);
    return kind == Strong::load ? const_cast<void*>(shared_read(shared, bytes))
                                : shared_atomic(shared, bytes);
  }
  if (is_private(address)) return reinterpret_cast<void*>(address);
  constexpr const char* kNames[] = {
      "strong load from global memory", "strong store to global memory",
      "atomic operation on global memory", "addition to global memory"};
  return checked_global(address, bytes,
                        {.what = kNames[static_cast<int>(kind)],
                         .write = write,
                         .scope = order.scope,
                         .adds_floats = kind == Strong::float_sum});
}
void* local_at(u64 address, u32 bytes, const void* frame, u64 frame_bytes) {
  const u64 offset = address - reinterpret_cast<u64>(frame);
  if (offset + bytes > frame_bytes || offset > frame_bytes)
    fail("local memory out of bounds: byte %lld of %llu", static_cast<long long>(offset),
         static_cast<unsigned long long>(frame_bytes));
  return reinterpret_cast<void*>(address);
}

}  // namespace emu
