// The PTX instructions that the kernels use, one wrapper each. -DFP16=1 selects float16 operands,
// the default is bfloat16.
#pragma once
#include "bugs.cuh"

#ifndef FP16
#define FP16 0
#endif
#if FP16
#define OPERAND "f16"
#else
#define OPERAND "bf16"
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

struct alignas(64) TensorMap {
  u64 opaque[16];
};

DEVICE u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// ---- arithmetic and warp

DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two operands in one register, `low` in the lower half; cvt takes the upper one first.
DEVICE u32 pack(float low, float high) {
  if (kBug == Bug::SwappedPack) {
    const float swapped = low;
    low = high;
    high = swapped;
  }
  u32 packed;
  asm("cvt.rn." OPERAND "x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

DEVICE float shuffle_xor(float value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- Ampere: asynchronous copies and warp matrix instructions

// Copies 16 bytes, or writes 16 zero bytes if not `valid`.
DEVICE void cp_async_16(u32 target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

DEVICE void ldmatrix_x4(u32 (&regs)[4], u32 address) {
  constexpr int kFirst = kBug == Bug::SwappedLdmatrix ? 1 : 0;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(regs[kFirst]), "=r"(regs[1 - kFirst]), "=r"(regs[2]), "=r"(regs[3])
               : "r"(address)
               : "memory");
}

DEVICE void ldmatrix_x4_trans(u32 (&regs)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(regs[0]), "=r"(regs[1]), "=r"(regs[2]), "=r"(regs[3])
               : "r"(address)
               : "memory");
}

// d[16 x 8] += a[16 x 16] b[16 x 8]
DEVICE void mma_m16n8k16(float* d, const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." OPERAND "." OPERAND
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#if __CUDA_ARCH__ >= 900
// ---- Hopper: mbarriers

DEVICE void mbarrier_init(u32 barrier, u32 count) {
  if (kBug == Bug::SwappedMbarrierInit) {
    asm volatile("mbarrier.init.shared::cta.b64 [%1], %0;" ::"r"(barrier), "r"(count) : "memory");
  } else {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
  }
}

DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

DEVICE void mbarrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

DEVICE void mbarrier_arrive_expect_tx(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

DEVICE bool mbarrier_try_wait(u32 barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}

DEVICE void mbarrier_wait(u32 barrier, u32 parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// ---- Hopper: TMA

// Coordinates go from the innermost axis outwards: channel, row, head, batch.
DEVICE void tma_load(u32 target, const TensorMap* map, u32 barrier, int channel, int row, int head,
                     int batch) {
  constexpr bool kSwap = kBug == Bug::SwappedTmaCoordinates;
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
      "l"(map), "r"(barrier), "r"(kSwap ? row : channel), "r"(kSwap ? channel : row), "r"(head),
      "r"(batch)
      : "memory");
}

DEVICE void tma_store(const TensorMap* map, u32 source, int channel, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group"
      " [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(source), "r"(channel), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

DEVICE void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Makes this thread's shared-memory stores visible to TMA and wgmma.
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Hopper: register budget, stmatrix

template <int kRegisters>
DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

DEVICE void stmatrix_x4(u32 address, const u32 (&regs)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(regs[0]), "r"(regs[1]), "r"(regs[2]), "r"(regs[3])
               : "memory");
}

// ---- Hopper: warpgroup matrix instructions

// Descriptor of a 128-byte swizzled operand; offsets in bytes.
DEVICE u64 wgmma_descriptor(u32 address, u32 leading_offset, u32 stride_offset) {
  constexpr u64 kSwizzle128 = 1ull << 62;
  return kSwizzle128 | static_cast<u64>(stride_offset >> 4) << 32 |
         static_cast<u64>(leading_offset >> 4) << 16 | (address & 0x3ffff) >> 4;
}

// Ties pin a register array in the compiler's data flow; they emit no instruction.
template <int N>
DEVICE void tie(float (&regs)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(regs[i])::"memory");
}

template <int M, int N>
DEVICE void tie(u32 (&regs)[M][N]) {
#pragma unroll
  for (int i = 0; i < M * N; i++) asm volatile("" : "+r"(regs[i / N][i % N])::"memory");
}

// `regs`: every array that the following wgmma read or write.
template <class... Regs>
DEVICE void wgmma_fence(Regs&... regs) {
  (tie(regs), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// `regs`: every array that may be touched after the wait.
template <int kPending, class... Regs>
DEVICE void wgmma_wait(Regs&... regs) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  (tie(regs), ...);
}

#define ACC_8(d, i)                                                                           \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define ACC_32(d, i) ACC_8(d, i), ACC_8(d, i + 8), ACC_8(d, i + 16), ACC_8(d, i + 24)
#define REGS_32                                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGS_64                                                                                  \
  REGS_32                                                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." OPERAND "." OPERAND

// d[64 x 64] (+)= a[64 x 16] b[64 x 16]ᵀ, both operands K-major in shared memory
DEVICE void wgmma_m64n64k16(float (&d)[32], u64 a, u64 b, bool accumulate) {
  asm volatile("{\n.reg .pred scale;\nsetp.ne.b32 scale, %34, 0;\n" WGMMA(
                   "64") " {" REGS_32 "}, %32, %33, scale, 1, 1, 0, 0;\n}"
               : ACC_32(d, 0)
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate))
               : "memory");
}

// d[64 x 64] (+)= a[64 x 16] b[16 x 64], a in registers, b N-major in shared memory
DEVICE void wgmma_pv(float (&d)[32], const u32 (&a)[4], u64 b, bool accumulate) {
  asm volatile("{\n.reg .pred scale;\nsetp.ne.b32 scale, %37, 0;\n" WGMMA(
                   "64") " {" REGS_32 "}, {%32, %33, %34, %35}, %36, scale, 1, 1, 1;\n}"
               : ACC_32(d, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),
                 "r"(static_cast<int>(accumulate))
               : "memory");
}

// d[64 x 128] (+)= a[64 x 16] b[16 x 128], likewise
DEVICE void wgmma_pv(float (&d)[64], const u32 (&a)[4], u64 b, bool accumulate) {
  asm volatile("{\n.reg .pred scale;\nsetp.ne.b32 scale, %69, 0;\n" WGMMA(
                   "128") " {" REGS_64 "}, {%64, %65, %66, %67}, %68, scale, 1, 1, 1;\n}"
               : ACC_32(d, 0), ACC_32(d, 32)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),
                 "r"(static_cast<int>(accumulate))
               : "memory");
}
#endif
