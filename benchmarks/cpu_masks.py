"""Time masks on the CPU beside the same call without one, in one run, by turns.

    python benchmarks/cpu_masks.py            # prints a table, writes benchmarks/results/
    python benchmarks/cpu_masks.py --repeats 41 --threads 2

A mask should cost its visible share of the time without it. The share is that of the blocks of
128 queries and 128 keys of which something is visible, or else that of the pairs. Each repeat times
one call without and one with each mask, so that a machine that is busy for a while disturbs both:
the ratio is the median of the repeats' ratios.
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
from machine import environment

import cuflash
from cuflash import masks, reference

RESULTS = Path(__file__).parent / "results"
SHAPE = (1, 4096, 4, 64)  # (B, S, H, D), float32
BLOCK = 128


def main() -> None:
    """Measure all masks, print them, and leave a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS / "cpu_masks.json")
    arguments = parser.parse_args()

    cases = []
    with threadpoolctl.threadpool_limits(arguments.threads, user_api="blas"):
        for name, mask in _masks().items():
            shares = _visible_shares(mask)
            for direction in ("forward", "forward+backward"):
                plain, masked = _call(direction, None), _call(direction, mask)
                case = {"mask": name, "direction": direction, **shares}
                case |= _compare(plain, masked, arguments.repeats)
                case["ratio_by_share_of_blocks"] = case["ratio"] / shares["share_of_blocks"]
                case["ratio_by_share_of_pairs"] = case["ratio"] / shares["share_of_pairs"]
                print(
                    f"{name:31} {direction:17} no mask {case['plain_ms']:7.1f} ms   "
                    f"mask {case['masked_ms']:6.1f} ms   ratio {case['ratio']:.3f} is "
                    f"{case['ratio_by_share_of_blocks']:.2f} of the visible blocks' share, "
                    f"{case['ratio_by_share_of_pairs']:.2f} of the pairs'",
                    flush=True,
                )
                cases.append(case)
    report = environment(arguments.threads) | {"shape_bshd": SHAPE, "repeats": arguments.repeats}
    arguments.results.write_text(json.dumps(report | {"cases": cases}, indent=2) + "\n")


def _masks() -> dict[str, masks.Mask]:
    rng = np.random.default_rng(0)
    seqlen, blocks = SHAPE[1], SHAPE[1] // BLOCK
    cuts = np.sort(rng.choice(np.arange(1, seqlen), 7, replace=False))
    equal, unequal = (
        np.searchsorted(edges, np.arange(seqlen), side="right")[None]
        for edges in (np.arange(seqlen // 8, seqlen, seqlen // 8), cuts)
    )
    quarter = rng.permuted(np.arange(blocks)[None].repeat(blocks, axis=0) < blocks // 4, axis=1)
    return {
        "8 documents of 512": masks.documents(equal),
        "8 documents of any length": masks.documents(unequal),
        "window of 512": masks.window(511, 0),
        "blocks of 128, 75 % empty": masks.blocks(quarter, BLOCK, BLOCK),
        "the same blocks, as a dense mask": masks.dense(
            np.kron(quarter, np.ones((BLOCK, BLOCK), bool))
        ),
    }


Call = Callable[[], object]


def _call(direction: str, mask: masks.Mask | None) -> Call:
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal(SHAPE, dtype=np.float32) for _ in range(4))

    def forward() -> object:
        return cuflash.attention(q, k, v, mask=mask)

    def both() -> object:
        _, pullback = cuflash.attention_vjp(q, k, v, mask=mask)
        return pullback(dout)

    return forward if direction == "forward" else both


def _visible_shares(mask: masks.Mask) -> dict[str, float]:
    """By the reference, of one head: all have the same mask."""
    seqlen = SHAPE[1]
    one_head = np.zeros((1, seqlen, 1, 1))
    visible = reference._visible(one_head, one_head, False, None, None, None, None, mask)[0, 0]
    blocks = visible.reshape(seqlen // BLOCK, BLOCK, seqlen // BLOCK, BLOCK).any(axis=(1, 3))
    return {"share_of_blocks": float(blocks.mean()), "share_of_pairs": float(visible.mean())}


def _compare(plain: Call, masked: Call, repeats: int) -> dict[str, object]:
    """Medians of both times, in ms, and of their ratios, after one call of each to warm up."""
    plain(), masked()
    pairs = [(_milliseconds(plain), _milliseconds(masked)) for _ in range(repeats)]
    ratios = sorted(b / a for a, b in pairs)
    return {
        "plain_ms": statistics.median(a for a, _ in pairs),
        "masked_ms": statistics.median(b for _, b in pairs),
        "plain_min_ms": min(a for a, _ in pairs),
        "masked_min_ms": min(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
    }


def _milliseconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


if __name__ == "__main__":
    main()
