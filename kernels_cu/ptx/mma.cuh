// d += a b on the tensor cores, one warp: a 16x16 row-major, b 16x8 column-major, d 16x8 float32.
// Lane l holds d at rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next (PTX ISA,
// mma.m16n8k16).
#pragma once
#include "element.cuh"

template <class Element>
DEVICE void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b_low, u32 b_high);

template <>
DEVICE void mma_m16n8k16<BFloat16>(float (&d)[4], const u32 (&a)[4], u32 b_low, u32 b_high) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

template <>
DEVICE void mma_m16n8k16<Half>(float (&d)[4], const u32 (&a)[4], u32 b_low, u32 b_high) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}
