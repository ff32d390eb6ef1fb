"""Time cuflash on the CPU beside torch's scaled_dot_product_attention, in one run, by turns.

    python benchmarks/cpu_against_torch.py            # prints a table, writes benchmarks/results/
    python benchmarks/cpu_against_torch.py --repeats 41 --threads 2

Both compute on the same float32 memory, laid out (B, H, S, D), with the same number of threads. A
ratio below 1 means that cuflash is faster. Each repeat times one call of each, so that a machine
that is busy for a while disturbs both: the ratio is the median of the repeats' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import threadpoolctl
import torch
from machine import environment

import cuflash

RESULTS = Path(__file__).parent / "results"
CASES = [  # (B, H, S, D), causal
    ((1, 8, 2048, 64), False),
    ((1, 8, 2048, 64), True),
    ((2, 12, 512, 64), False),
    ((1, 4, 4096, 128), True),
]


def main() -> None:
    """Measure all cases, print them, and leave a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS / "cpu_against_torch.json")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    cases = []
    with threadpoolctl.threadpool_limits(arguments.threads, user_api="blas"):
        for shape, causal in CASES:
            for direction, calls in _calls(shape, causal).items():
                case = {"shape_bhsd": shape, "causal": causal, "direction": direction}
                case |= _compare(*calls, repeats=arguments.repeats)
                print(
                    f"{str(shape):18} {'causal' if causal else '':6} {direction:18} "
                    f"cuflash {case['cuflash_ms']:8.1f} ms   torch {case['torch_ms']:8.1f} ms   "
                    f"ratio {case['ratio']:.2f}",
                    flush=True,
                )
                cases.append(case)
    report = environment(arguments.threads) | {"torch": torch.__version__}
    report |= {"repeats": arguments.repeats, "cases": cases}
    arguments.results.write_text(json.dumps(report, indent=2) + "\n")


Call = Callable[[], object]


def _calls(shape: tuple[int, int, int, int], causal: bool) -> dict[str, tuple[Call, Call]]:
    """For each direction, the call of cuflash and the call of torch."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape, dtype=np.float32) for _ in range(4)]
    q, k, v, dout = (x.swapaxes(1, 2) for x in arrays)
    leaves = [torch.from_numpy(x).requires_grad_() for x in arrays[:3]]
    dout_tensor = torch.from_numpy(arrays[3])

    def cuflash_forward() -> object:
        return cuflash.attention(q, k, v, causal=causal)

    def cuflash_both() -> object:
        _, pullback = cuflash.attention_vjp(q, k, v, causal=causal)
        return pullback(dout)

    def torch_forward() -> object:
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal)

    def torch_both() -> object:
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal)
        return torch.autograd.grad(out, leaves, dout_tensor)

    return {
        "forward": (cuflash_forward, torch_forward),
        "forward+backward": (cuflash_both, torch_both),
    }


def _compare(ours: Call, theirs: Call, repeats: int) -> dict[str, float]:
    """Medians of both times, in ms, and of their ratios, after one call of each to warm up."""
    ours(), theirs()
    pairs = [(_milliseconds(ours), _milliseconds(theirs)) for _ in range(repeats)]
    ratios = sorted(a / b for a, b in pairs)
    return {
        "cuflash_ms": statistics.median(a for a, _ in pairs),
        "torch_ms": statistics.median(b for _, b in pairs),
        "cuflash_min_ms": min(a for a, _ in pairs),
        "torch_min_ms": min(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
    }


def _milliseconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
