"""The emulator gets PTX right that the Triton compiler made and nobody here wrote."""

from __future__ import annotations

import dataclasses
import math
import shutil

import emulator_oracle as oracle
import numpy as np
import pytest
from emulator import Stats, guarded, load, tensor_map

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("emulator_triton_kernels")
attention = pytest.importorskip("cuflash.cli.triton_kernels")

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not shutil.which("g++"), reason="the emulator needs g++"),
]

RELEASE = tuple(map(int, triton.__version__.split(".")[:2]))
LOG2_E = math.log2(math.e)
SCHEDULES = [("eager", 0), ("lazy", 0), ("random", 0)]
SWIZZLE_BYTES = {0: 0, 1: 32, 2: 64, 3: 128}  # CUtensorMapSwizzle → bytes
TRITON_DTYPES = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}
SCRATCH = [0, 0]  # pointers to global and profiling scratch, which these kernels do not use


@dataclasses.dataclass(frozen=True)
class Matmul:
    arch: int
    dtype: str
    block: tuple[int, int, int]  # M, N, K
    transpose_a: bool = False
    transpose_b: bool = False
    a_in_registers: bool = False
    atomic: bool = False

    def __str__(self) -> str:
        layout = "nt"[self.transpose_a] + "nt"[self.transpose_b]
        extra = "-a-regs" * self.a_in_registers + "-atomic" * self.atomic
        return f"sm{self.arch}-{self.dtype}-{'x'.join(map(str, self.block))}-{layout}{extra}"


MATMULS = [
    Matmul(80, "bf16", (64, 64, 32)),
    Matmul(80, "fp16", (64, 64, 16), transpose_b=True),
    Matmul(90, "bf16", (64, 64, 64)),
    Matmul(90, "fp16", (64, 128, 32), transpose_b=True),
    Matmul(90, "bf16", (64, 128, 16), transpose_a=True),
    Matmul(90, "fp16", (64, 64, 64), a_in_registers=True, atomic=True),
]
MORE_MATMULS = [
    Matmul(arch, dtype, (64, block_n, block_k), transpose_a, transpose_b)
    for arch in (80, 90)
    for dtype, block_n in (("bf16", 64), ("fp16", 128))
    for block_k in (16, 32, 64)
    for transpose_a in (False, True)
    for transpose_b in (False, True)
] + [
    Matmul(80, "bf16", (16, 16, 16)),
    Matmul(80, "bf16", (64, 32, 32), a_in_registers=True),
    Matmul(80, "fp16", (64, 64, 32), atomic=True),
    Matmul(90, "bf16", (64, 256, 32), transpose_b=True, a_in_registers=True),
    Matmul(90, "fp16", (64, 8, 32)),
    Matmul(90, "fp16", (128, 128, 64)),
]


@dataclasses.dataclass(frozen=True)
class TmaMatmul:
    dtype: str
    out_dtype: str
    block: tuple[int, int, int]  # M, N, K
    transpose_b: bool = False
    reduce: bool = False

    def __str__(self) -> str:
        layout = "nt" if self.transpose_b else "nn"
        blocks = "x".join(map(str, self.block))
        return f"{self.dtype}-{self.out_dtype}-{blocks}-{layout}{'-reduce' * self.reduce}"


TMA_MATMULS = [
    TmaMatmul("bf16", "fp16", (64, 64, 64)),
    TmaMatmul("fp16", "fp32", (64, 64, 32), transpose_b=True),
    TmaMatmul("bf16", "fp32", (64, 64, 16), reduce=True),
]
MORE_TMA_MATMULS = [
    TmaMatmul(dtype, out_dtype, (64, block_n, block_k), transpose_b, reduce)
    for dtype, out_dtype in (("bf16", "fp32"), ("fp16", "fp16"))
    for block_n, block_k in ((32, 16), (64, 64), (128, 32))
    for transpose_b in (False, True)
    for reduce in (False, True)
]


@dataclasses.dataclass(frozen=True)
class Attention:
    arch: int
    dtype: str
    head_dim: int
    block: tuple[int, int]  # queries, keys
    causal: bool
    num_stages: int = 2

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        blocks = "x".join(map(str, self.block))
        stages = f"{self.num_stages}-stages"
        return f"sm{self.arch}-{self.dtype}-d{self.head_dim}-{blocks}-{kind}-{stages}"


FORWARDS = [
    Attention(80, "bf16", 64, (64, 64), causal=True),
    Attention(80, "fp16", 128, (64, 64), causal=False),
    Attention(90, "bf16", 64, (64, 64), causal=False),
    Attention(90, "fp16", 128, (64, 64), causal=True),
]
MORE_FORWARDS = [
    Attention(arch, dtype, head_dim, (block_q, 64), causal)
    for arch in (80, 90)
    for head_dim in (16, 64, 128)
    for block_q, dtype in ((64, "fp16"), (128, "bf16"))
    for causal in (False, True)
]
BACKWARDS = [
    Attention(80, "bf16", 64, (64, 64), causal=True, num_stages=1),
    Attention(90, "bf16", 64, (64, 64), causal=True, num_stages=1),
    Attention(90, "fp16", 64, (64, 64), causal=False, num_stages=2),
]
MORE_BACKWARDS = [
    Attention(arch, dtype, head_dim, (64, 64), causal, num_stages)
    for arch in (80, 90)
    for dtype, head_dim in (("bf16", 64), ("fp16", 128))
    for causal in (False, True)
    for num_stages in (1, 2)
]


@pytest.mark.parametrize("case", MATMULS, ids=str)
def test_matmul(case: Matmul) -> None:
    check_matmul(case)


@pytest.mark.full
@pytest.mark.parametrize("case", MORE_MATMULS, ids=str)
def test_more_matmuls(case: Matmul) -> None:
    check_matmul(case)


@pytest.mark.parametrize("case", TMA_MATMULS, ids=str)
def test_tma_matmul(case: TmaMatmul) -> None:
    check_tma_matmul(case)


@pytest.mark.full
@pytest.mark.parametrize("case", MORE_TMA_MATMULS, ids=str)
def test_more_tma_matmuls(case: TmaMatmul) -> None:
    check_tma_matmul(case)


@pytest.mark.parametrize("case", FORWARDS, ids=str)
def test_attention_forward(case: Attention) -> None:
    check_forward(case)


@pytest.mark.full
@pytest.mark.parametrize("case", MORE_FORWARDS, ids=str)
def test_more_attention_forwards(case: Attention) -> None:
    check_forward(case)


@pytest.mark.parametrize("case", BACKWARDS, ids=str)
def test_attention_backward(case: Attention) -> None:
    check_backward(case)


@pytest.mark.full
@pytest.mark.parametrize("case", MORE_BACKWARDS, ids=str)
def test_more_attention_backwards(case: Attention) -> None:
    check_backward(case)


def check_matmul(case: Matmul) -> None:
    if case.arch == 90 and case.a_in_registers and RELEASE < (3, 8):
        pytest.skip(
            "PTX of Triton before 3.8 writes the A registers of an iteration's second wgmma group"
            " before the wgmma.wait_group for the previous iteration's second group, which reads"
            " the same registers; the PTX ISA leaves that undefined"
        )
    block_m, block_n, block_k = case.block
    m, n, depth = 2 * block_m, 2 * block_n, 128
    rng = np.random.default_rng(0)
    a = oracle.random_tensor((depth, m) if case.transpose_a else (m, depth), case.dtype, rng)
    b = oracle.random_tensor((n, depth) if case.transpose_b else (depth, n), case.dtype, rng)
    signature = {"a_ptr": f"*{case.dtype}", "b_ptr": f"*{case.dtype}", "out_ptr": "*fp32"}
    signature |= dict.fromkeys(("k_size", "a_stride", "b_stride", "out_stride"), "i32")
    constants = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "TRANSPOSE_A": case.transpose_a,
        "TRANSPOSE_B": case.transpose_b,
        "A_IN_REGISTERS": case.a_in_registers,
        "ATOMIC": case.atomic,
    }
    compiled = kernels.compile_ptx(kernels.matmul, signature, constants, case.arch)

    a64 = (a.T if case.transpose_a else a) * np.float64(2 if case.a_in_registers else 1)
    b64 = (b.T if case.transpose_b else b).astype(np.float64)
    # Triton before 3.8 multiplies 8 columns by mma on Hopper too
    by_wgmma = case.arch == 90 and not (block_n == 8 and RELEASE < (3, 8))
    for schedule in SCHEDULES:
        out = guarded((m, n), np.float32, fill=1.0 if case.atomic else np.nan)
        sizes = [np.int32(size) for size in (depth, a.shape[1], b.shape[1], n)]
        stats = launch(compiled, (2, 2, 1), [a, b, out, *sizes], [a, b, out], schedule)
        expected = a64 @ b64 + (1.0 if case.atomic else 0.0)
        oracle.assert_within(out, expected, accumulation_error(a64, b64))
        assert (stats.wgmma if by_wgmma else stats.mma) > 0


def check_tma_matmul(case: TmaMatmul) -> None:
    block_m, block_n, block_k = case.block
    m, n, depth = 72, 136, 104  # every block overhangs
    rng = np.random.default_rng(0)
    a = oracle.random_tensor((m, depth), case.dtype, rng)
    b = oracle.random_tensor((n, depth) if case.transpose_b else (depth, n), case.dtype, rng)
    b_block = (block_n, block_k) if case.transpose_b else (block_k, block_n)
    signature = {
        "a_map": f"tensordesc<{case.dtype}[{block_m}, {block_k}]>",
        "b_map": f"tensordesc<{case.dtype}[{b_block[0]}, {b_block[1]}]>",
        "out_map": f"tensordesc<{case.out_dtype}[{block_m}, {block_n}]>",
        "k_size": "i32",
    }
    constants = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "TRANSPOSE_B": case.transpose_b,
        "REDUCE": case.reduce,
    }
    compiled = kernels.compile_ptx(kernels.matmul_tma, signature, constants, 90, num_stages=3)

    a64, b64 = a.astype(np.float64), (b.T if case.transpose_b else b).astype(np.float64)
    expected = a64 @ b64 + (1.0 if case.reduce else 0.0)
    # The product is rounded to the output's type, and so is the sum if the output is added to
    roundings = 2 if case.reduce else 1
    tolerance = accumulation_error(a64, b64)
    tolerance += roundings * oracle.UNIT_ROUNDOFF[case.out_dtype] * (np.abs(expected) + 1.0)
    for schedule in SCHEDULES:
        out = guarded((m, n), oracle.DTYPES[case.out_dtype], fill=1.0 if case.reduce else np.nan)
        args: list[object] = []
        for array, descriptor in zip((a, b, out), compiled.tensor_descriptors, strict=True):
            swizzle = SWIZZLE_BYTES[descriptor["swizzle"]]
            args.append(tensor_map(array, descriptor["block_size"], swizzle=swizzle))
            args += [np.int32(size) for size in array.shape]
            args += [np.int64(array.shape[1]), np.int64(1)]  # strides in elements
        grid = (-(-m // block_m), -(-n // block_n), 1)
        stats = launch(compiled, grid, [*args, np.int32(depth)], [a, b, out], schedule)
        oracle.assert_within(out, expected, tolerance)
        assert stats.wgmma > 0
        assert stats.tma_loads > 0
        assert stats.tma_stores > 0


def check_forward(case: Attention) -> None:
    batch, heads, seqlen = 2, 2, 200
    shape = (batch, seqlen, heads, case.head_dim)
    rng = np.random.default_rng(0)
    q, k, v = (oracle.random_tensor(shape, case.dtype, rng) for _ in range(3))
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{case.dtype}")
    signature |= {"lse_ptr": "*fp32", "scale_log2": "fp32"}
    compiled = compile_attention(attention.attention_forward, signature, case)

    expected = oracle.forward(q, k, v, case.causal, case.dtype)
    scale_log2 = np.float32(LOG2_E / math.sqrt(case.head_dim))
    sizes = [np.int32(size) for size in (seqlen, heads, heads * case.head_dim)]
    grid = (-(-seqlen // case.block[0]), batch * heads, 1)
    for schedule in SCHEDULES:
        out = guarded(shape, q.dtype, fill=np.nan)
        lse = guarded((batch, heads, seqlen), np.float32, fill=np.nan)
        arrays = [q, k, v, out, lse]
        stats = launch(compiled, grid, [*arrays, scale_log2, *sizes], arrays, schedule)
        oracle.assert_within(out, expected.out, expected.out_tolerance)
        oracle.assert_within(lse / LOG2_E, expected.lse, expected.lse_tolerance)
        assert (stats.wgmma if case.arch == 90 else stats.mma) > 0


@pytest.mark.parametrize("arch", [80, 90])
def test_attention_delta(arch: int) -> None:
    shape, rows = (2, 70, 3, 64), 32  # (B, S, H, D), and of a program
    rng = np.random.default_rng(0)
    out, dout = (oracle.random_tensor(shape, "bf16", rng) for _ in range(2))
    signature = {"out_ptr": "*bf16", "dout_ptr": "*bf16", "delta_ptr": "*fp32"}
    signature |= dict.fromkeys(("seqlen", "heads", "row_stride"), "i32")
    constants = {"BLOCK_Q": rows, "HEAD_DIM": shape[3]}
    compiled = kernels.compile_ptx(attention.attention_delta, signature, constants, arch)
    expected = (out.astype(np.float64) * dout.astype(np.float64)).sum(axis=3).swapaxes(1, 2)
    for schedule in SCHEDULES:
        delta = guarded(expected.shape, np.float32, fill=np.nan)
        sizes = [np.int32(size) for size in (shape[1], shape[2], shape[2] * shape[3])]
        arrays = [out, dout, delta]
        launch(compiled, (-(-shape[1] // rows), 6, 1), [*arrays, *sizes], arrays, schedule)
        oracle.assert_within(delta, expected, 1e-5)


def check_backward(case: Attention) -> None:
    batch, heads, seqlen = 1, 2, 200
    shape = (batch, seqlen, heads, case.head_dim)
    rng = np.random.default_rng(0)
    q, k, v, dout = (oracle.random_tensor(shape, case.dtype, rng) for _ in range(4))
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "dout_ptr"), f"*{case.dtype}")
    outputs = ("dq_ptr", "dk_ptr", "dv_ptr")
    signature |= dict.fromkeys(("lse_ptr", "delta_ptr", *outputs), "*fp32")
    signature |= dict.fromkeys(("scale", "scale_log2"), "fp32")
    compiled = compile_attention(attention.attention_backward, signature, case)

    expected = oracle.backward(q, k, v, dout, case.causal, case.dtype)
    lse = (expected.lse * LOG2_E).astype(np.float32)
    delta = expected.delta.astype(np.float32)
    scale = 1.0 / math.sqrt(case.head_dim)
    scalars = [np.float32(scale), np.float32(scale * LOG2_E)]
    scalars += [np.int32(size) for size in (seqlen, heads, heads * case.head_dim)]
    grid = (-(-seqlen // case.block[1]), batch * heads, 1)
    for schedule in SCHEDULES:
        dq = guarded(shape, np.float32, fill=0.0)  # summed by atomics
        dk, dv = (guarded(shape, np.float32, fill=np.nan) for _ in range(2))
        arrays = [q, k, v, dout, lse, delta, dq, dk, dv]
        stats = launch(compiled, grid, [*arrays, *scalars], arrays, schedule)
        oracle.assert_within(dq, expected.dq, expected.dq_tolerance)
        oracle.assert_within(dk, expected.dk, expected.dk_tolerance)
        oracle.assert_within(dv, expected.dv, expected.dv_tolerance)
        assert (stats.wgmma if case.arch == 90 else stats.mma) > 0


def compile_attention(kernel: object, signature: dict[str, str], case: Attention) -> object:
    block_q, block_kv = case.block
    constants = {
        "BLOCK_Q": block_q,
        "BLOCK_KV": block_kv,
        "HEAD_DIM": case.head_dim,
        "CAUSAL": case.causal,
    }
    signature = signature | dict.fromkeys(("seqlen", "heads", "row_stride"), "i32")
    return kernels.compile_ptx(kernel, signature, constants, case.arch, num_stages=case.num_stages)


def accumulation_error(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Bound of a float32 sum of exact products, in any order."""
    depth = a.shape[1]
    return depth * oracle.UNIT_ROUNDOFF["fp32"] * (np.abs(a) @ np.abs(b) + 1.0)


def launch(
    compiled: object,
    grid: tuple[int, int, int],
    args: list[object],
    buffers: list[np.ndarray],
    schedule: tuple[str, int],
) -> Stats:
    name, seed = schedule
    # Triton replicates small layouts: several threads then write the same value to one address
    return load(compiled.ptx).launch(
        grid,
        (compiled.threads, 1, 1),
        compiled.smem_bytes,
        [*args, *SCRATCH],
        schedule=name,
        seed=seed,
        buffers=buffers,
        allow_same_value=True,
    )
