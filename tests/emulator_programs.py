"""Small kernels for tests of the emulator, written in PTX by hand.

In their bodies, pointer parameters arrive in %rd0, %rd1, ...; %r0 is the index of the thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from emulator import Kernel, Stats, build, load

needs_compiler = pytest.mark.skipif(
    build.compiler() is None, reason="the emulator needs g++ on x86-64"
)

FORMATS = {
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "tf32": np.float32,
}


def program(body: str, pointers: int = 1, module: str = "", directives: str = "") -> Kernel:
    """A kernel `test` with that many pointer parameters and dynamic shared memory `smem`."""
    params = ", ".join(f".param .u64 p{i}" for i in range(pointers))
    loads = "\n".join(f"ld.param.u64 %rd{i}, [p{i}];" for i in range(pointers))
    return load(
        f"""
        .version 8.8
        .target sm_90a
        .address_size 64
        .extern .shared .align 1024 .b8 smem[];
        {module}
        .visible .entry test({params}) {directives} {{
        .reg .pred %p<8>; .reg .b16 %h<64>; .reg .b32 %r<400>; .reg .b64 %rd<64>;
        {loads}
        mov.u32 %r0, %tid.x;
        {body}
        ret;
        }}"""
    )


def launch(
    kernel: Kernel, *args: Any, block: int = 32, grid: int = 1, smem: int = 4096, **options: Any
) -> Stats:
    """Runs with the arrays among the arguments as the only memory."""
    options.setdefault(
        "buffers", [a for a in args if isinstance(a, np.ndarray) and a.dtype.names is None]
    )
    return kernel.launch((grid,), (block,), smem, args, **options)


def per_thread(pointer: int, size: int, target: str) -> str:
    """Address of element `thread` of an array."""
    return f"mad.wide.u32 {target}, %r0, {size}, %rd{pointer};"


def apply(
    instructions: Sequence[str], *inputs: np.ndarray, out: np.dtype | type, kind: str = ""
) -> np.ndarray:
    """Results (instruction, thread) of instructions on {d}, {a}, {b}, {c}; {t} is `kind`."""
    out, count = np.dtype(out), inputs[0].size
    prefix = {2: "%h", 4: "%r", 8: "%rd"}
    named = list(zip("abc", inputs, strict=False))
    registers = {name: f"{prefix[x.itemsize]}4{i}" for i, (name, x) in enumerate(named)}
    registers["d"] = f"{prefix[out.itemsize]}39"
    body = [per_thread(0, out.itemsize, "%rd30")]
    for i, (name, x) in enumerate(named):
        body.append(per_thread(i + 1, x.itemsize, "%rd31"))
        body.append(f"ld.global.b{8 * x.itemsize} {registers[name]}, [%rd31];")
    for i, instruction in enumerate(instructions):
        body.append(instruction.format(t=kind, **registers) + ";")
        offset = i * count * out.itemsize
        body.append(f"st.global.b{8 * out.itemsize} [%rd30+{offset}], {registers['d']};")
    results = np.zeros((len(instructions), count), out)
    launch(program("\n".join(body), 1 + len(inputs)), results, *inputs, block=count)
    return results


def integers(dtype: Any, count: int = 64) -> np.ndarray:
    """Random values and the extreme ones."""
    dtype = np.dtype(dtype)
    info = np.iinfo(dtype)
    rng = np.random.default_rng(dtype.itemsize)
    edges = np.array([0, 1, info.min, info.max, info.max // 3], dtype)
    values = rng.integers(info.min, info.max, count - edges.size, dtype)
    return rng.permutation(np.concatenate([values, edges]))


def small_values(shape: tuple[int, ...], name: str, seed: int) -> np.ndarray:
    """Numbers whose products and sums are exact in float32."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(FORMATS[name])


def fragments_of(matrix: np.ndarray, rows_in_group: int) -> np.ndarray:
    """A (16 rows in two groups of 8) or B transposed (8 rows) as registers (lane, register)."""
    per_register = 4 // matrix.itemsize
    k = matrix.shape[1]
    out = []
    for lane in range(32):
        g, t = divmod(lane, 4)
        for column in range(0, k, 4 * per_register):
            for row in range(g, rows_in_group, 8):
                out.append(matrix[row, column + t * per_register :][:per_register])
    return np.concatenate(out).view(np.uint32).reshape(32, -1)
