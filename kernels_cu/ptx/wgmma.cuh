// d += a b on the tensor cores, one warpgroup: d 64 x N float32 in registers, b in shared memory, a
// in shared memory or registers (PTX ISA, wgmma.mma_async). d[n][e] is acc[0][n][e] of
// accumulator.cuh, in the rows of the warp. Registers must not be touched before their group's
// wait.
#pragma once
#include "element.cuh"

// Ties pin registers in the compiler's data flow; they emit no instruction.
template <int kN>
DEVICE void tie(float (&acc)[1][kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; n++)
    asm volatile(""
                 : "+f"(acc[0][n][0]), "+f"(acc[0][n][1]), "+f"(acc[0][n][2]),
                   "+f"(acc[0][n][3])::"memory");
}
template <int kK>
DEVICE void tie(u32 (&fragments)[1][kK][4]) {
#pragma unroll
  for (int k = 0; k < kK; k++)
    asm volatile(""
                 : "+r"(fragments[0][k][0]), "+r"(fragments[0][k][1]), "+r"(fragments[0][k][2]),
                   "+r"(fragments[0][k][3])::"memory");
}

// Before the first product; `registers` are all that the products read or write.
template <class... Registers>
DEVICE void wgmma_fence(Registers&... registers) {
  (tie(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending groups run; `registers` are all that may be touched from then on.
template <int kPending, class... Registers>
DEVICE void wgmma_wait(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  (tie(registers), ...);
}

// ss: a and b by descriptor; rs: a in registers. kTransA, kTransB: the operand's rows (a) or
// columns (b) are contiguous, not the contraction. accumulate false: d = a b.
template <class Element, int kN>
struct Wgmma;

// Named by N: the registers of d, and their constraints.
#define REGISTERS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define REGISTERS_48 REGISTERS_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define REGISTERS_64 REGISTERS_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_80 REGISTERS_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define REGISTERS_96 REGISTERS_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define REGISTERS_112 REGISTERS_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define REGISTERS_128 REGISTERS_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_144 REGISTERS_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define REGISTERS_160 REGISTERS_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define REGISTERS_176 REGISTERS_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define REGISTERS_192 REGISTERS_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define REGISTERS_256                                                                          \
  REGISTERS_192                                                                                \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "   \
  "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, " \
  "%126, %127"
#define ACC(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define ACC_2(n) ACC(n), ACC(n + 1)
#define ACCUMULATORS_32 ACC_2(0), ACC_2(2)
#define ACCUMULATORS_48 ACCUMULATORS_32, ACC_2(4)
#define ACCUMULATORS_64 ACCUMULATORS_48, ACC_2(6)
#define ACCUMULATORS_80 ACCUMULATORS_64, ACC_2(8)
#define ACCUMULATORS_96 ACCUMULATORS_80, ACC_2(10)
#define ACCUMULATORS_112 ACCUMULATORS_96, ACC_2(12)
#define ACCUMULATORS_128 ACCUMULATORS_112, ACC_2(14)
#define ACCUMULATORS_144 ACCUMULATORS_128, ACC_2(16)
#define ACCUMULATORS_160 ACCUMULATORS_144, ACC_2(18)
#define ACCUMULATORS_176 ACCUMULATORS_160, ACC_2(20)
#define ACCUMULATORS_192 ACCUMULATORS_176, ACC_2(22)
#define ACCUMULATORS_256 ACCUMULATORS_192, ACC_2(24), ACC_2(26), ACC_2(28), ACC_2(30)

#define NAME_BFloat16(N) "wgmma.mma_async.sync.aligned.m64n" N "k16.f32.bf16.bf16"
#define NAME_Half(N) "wgmma.mma_async.sync.aligned.m64n" N "k16.f32.f16.f16"

// o0 ... o6: the numbers of the operands after d, N / 2 and up.
#define WGMMA(Type, N, o0, o1, o2, o3, o4, o5, o6)                                                 \
  template <>                                                                                      \
  struct Wgmma<Type, N> {                                                                          \
    template <int kTransA, int kTransB>                                                            \
    static DEVICE void ss(float (&d)[N / 8][4], u64 a, u64 b, bool accumulate) {                   \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #o2                                        \
                   ", 0;\n" NAME_##Type(#N) " {" REGISTERS_##N "}, %" #o0 ", %" #o1                \
                                                               ", p, 1, 1, %" #o3 ", %" #o4 ";\n}" \
                   : ACCUMULATORS_##N                                                              \
                   : "l"(a), "l"(b), "r"((int)accumulate), "n"(kTransA), "n"(kTransB)              \
                   : "memory");                                                                    \
    }                                                                                              \
    template <int kTransB>                                                                         \
    static DEVICE void rs(float (&d)[N / 8][4], const u32 (&a)[4], u64 b, bool accumulate) {       \
      asm volatile(                                                                                \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %" #o5 ", 0;\n" NAME_##Type(#N) " {" REGISTERS_##N     \
          "}, {%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4 ", p, 1, 1, %" #o6 ";\n}"           \
          : ACCUMULATORS_##N                                                                       \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate), "n"(kTransB) \
          : "memory");                                                                             \
    }                                                                                              \
  };
#define WGMMA_BOTH(...) WGMMA(BFloat16, __VA_ARGS__) WGMMA(Half, __VA_ARGS__)

WGMMA_BOTH(32, 16, 17, 18, 19, 20, 21, 22)
WGMMA_BOTH(48, 24, 25, 26, 27, 28, 29, 30)
WGMMA_BOTH(64, 32, 33, 34, 35, 36, 37, 38)
WGMMA_BOTH(80, 40, 41, 42, 43, 44, 45, 46)
WGMMA_BOTH(96, 48, 49, 50, 51, 52, 53, 54)
WGMMA_BOTH(112, 56, 57, 58, 59, 60, 61, 62)
WGMMA_BOTH(128, 64, 65, 66, 67, 68, 69, 70)
WGMMA_BOTH(144, 72, 73, 74, 75, 76, 77, 78)
WGMMA_BOTH(160, 80, 81, 82, 83, 84, 85, 86)
WGMMA_BOTH(176, 88, 89, 90, 91, 92, 93, 94)
WGMMA_BOTH(192, 96, 97, 98, 99, 100, 101, 102)
WGMMA_BOTH(256, 128, 129, 130, 131, 132, 133, 134)

#undef WGMMA_BOTH
#undef WGMMA
#undef NAME_Half
#undef NAME_BFloat16
#undef ACC_2
#undef ACC
