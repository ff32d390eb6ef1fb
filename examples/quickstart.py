"""Attention and its gradient: right to rounding, in memory that grows only with the length.

    python examples/quickstart.py

Runs on NumPy and, where a GPU serves, on CuPy.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from array_library import array_library

import cuflash
from cuflash import reference

Array = Any  # of NumPy or CuPy

xp = array_library()
DTYPE = np.dtype(np.float32 if xp is np else ml_dtypes.bfloat16)  # GPU kernels take 16-bit numbers

SHORT, LONG = 384, 8192  # positions in a sequence: of words, samples, notes
HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 64  # two query heads share a key head


def main() -> None:
    print(f"{xp.__name__} {xp.__version__}, {DTYPE}")
    compare_with_reference()
    compare_memory()


def compare_with_reference() -> None:
    """Largest deviation from attention as a textbook writes it, in float64."""
    q, k, v, dout = random_arrays(SHORT)
    out, pullback = cuflash.attention_vjp(q, k, v, causal=True)
    gradients = pullback(dout)

    q, k, v, dout = map(to_host, (q, k, v, dout))
    exact, _ = reference.attention(q, k, v, causal=True)
    exact_gradients = reference.attention_backward(dout, q, k, v, causal=True)

    print(f"\nlength {SHORT}: largest error against float64")
    print(f"  out  {largest_error(out, exact):.1e}")
    for name in ("dq", "dk", "dv"):
        error = largest_error(getattr(gradients, name), getattr(exact_gradients, name))
        print(f"  {name:4} {error:.1e}")


def compare_memory() -> None:
    """What a forward and a backward allocate, results included, beside one matrix of scores."""
    q, k, v, dout = random_arrays(LONG)

    def forward_and_backward() -> None:
        _, pullback = cuflash.attention_vjp(q, k, v, causal=True)
        pullback(dout)

    taken = peak_bytes(forward_and_backward)
    scores = HEADS * LONG * LONG * np.dtype(np.float32).itemsize
    print(f"\nlength {LONG}: memory of forward and backward")
    print(f"  {taken / 2**20:6.0f} MiB were taken, the results included")
    print(f"  {scores / 2**20:6.0f} MiB would hold the scores alone")


def random_arrays(length: int) -> tuple[Array, Array, Array, Array]:
    """q, k, v and a gradient of out: (1, length, heads, head size), standard normal."""
    rng = np.random.default_rng(0)

    def array(heads: int) -> Array:
        return xp.asarray(rng.standard_normal((1, length, heads, HEAD_DIM))).astype(DTYPE)

    return array(HEADS), array(KEY_HEADS), array(KEY_HEADS), array(HEADS)


def largest_error(found: Array, exact: np.ndarray) -> float:
    return float(np.abs(to_host(found).astype(np.float64) - exact).max())


def to_host(array: Array) -> np.ndarray:
    return array if xp is np else xp.asnumpy(array)


def peak_bytes(run: Callable[[], None]) -> int:
    """The most that `run` holds at any time, beyond what was held before."""
    if xp is np:
        tracemalloc.start()
        run()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak
    pool = xp.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    run()
    return pool.total_bytes() - before


if __name__ == "__main__":
    main()
