"""Time the tiles that a GPU's kernels may have, beside those that the planner chooses today.

    python benchmarks/sweep_tiles.py forward          # this GPU's backend: sm90 on Hopper
    python benchmarks/sweep_tiles.py backward --backend sm80 --head-dim 64 128 --seqlen 2048 16384
    python benchmarks/sweep_tiles.py forward --arch sm_90 --compile-only  # needs no GPU

All candidates are compiled, a kernel to each core. Those that spill, that ptxas serialises or that
do not compile are dropped. The others run on the same arrays as today's tiles: one whose result
differs is reported, the rest are timed in turns. A table is printed, and a JSON file is left in
benchmarks/results, written anew after each cell. What was compiled stays in the cache of kernels,
so that a second run begins with the measurement.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np

import cuflash
from cuflash import _plan, _plan_sm80, _plan_sm90
from cuflash._checks import BFLOAT16
from cuflash._traits import (
    TMA_BYTES,
    BackwardPlan,
    ForwardPlan,
    Kernel,
    Traits,
    backend_of,
    padded,
    smem_limit,
)
from cuflash.cli import arguments, reports, suites, tables
from cuflash.cli.cells import Cell, Inputs
from cuflash.cli.compile import Outcome, compile_all
from cuflash.cli.gpus import CommandError, archs_here, require_gpu
from cuflash.cli.inputs import gpu_inputs
from cuflash.cli.progress import progress, say
from cuflash.cli.timing import Clock, Contender, StreamClock, measure

Tiles = (
    _plan_sm90.ForwardTiles
    | _plan_sm90.BackwardTiles
    | _plan_sm80.ForwardTiles
    | _plan_sm80.BackwardTiles
)
Plan = ForwardPlan | BackwardPlan

RANGES: dict[tuple[str, str], tuple[type, dict[str, Sequence[int]]]] = {
    ("sm90", "forward"): (
        _plan_sm90.ForwardTiles,
        {
            "consumers": (2, 3),
            "block_kv": range(64, 193, 16),
            "stages": (2, 3),
            "ping_pong": (True, False),
        },
    ),
    ("sm90", "backward"): (
        _plan_sm90.BackwardTiles,
        {"block_q": (64, 128), "block_kv": (64, 128)},
    ),
    ("sm80", "forward"): (
        _plan_sm80.ForwardTiles,
        {"block_q": (64, 128, 192, 256), "block_kv": range(32, 129, 16), "warps": (4, 8)},
    ),
    ("sm80", "backward"): (
        _plan_sm80.BackwardTiles,
        {
            "block_q": (32, 64, 128),
            "block_kv": (32, 64, 96, 128),
            "warps": (4, 8),
            "stages": (1, 2),
            "score_warps": (2, 4),
            "key_warps": (2, 4),
            "query_warps": (2, 4),
        },
    ),
}
WARP = 32
MAX_REGISTERS = 255  # of a thread; as many accumulators certainly spill
MAX_SCORES = 64  # of a thread of the sm80 kernels: places.cuh has a bit for each

ROUNDING = 2.0**-8  # of bfloat16
TOLERANCE = 2 * ROUNDING  # of a difference, relative to the largest element


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile and measure; the exit status is 1 where a kernel fails or its result is wrong."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.arch and not options.compile_only:
        parser.error("--arch goes with --compile-only: what is measured is this machine's GPU")
    try:
        return _compile_only(options) if options.compile_only else _measure(options)
    except (CommandError, NotImplementedError) as error:
        print(f"sweep_tiles: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("direction", choices=("forward", "backward"))
    add("--backend", choices=("sm80", "sm90"), help="default: the one that serves the GPU")
    add("--head-dim", nargs="+", type=_head_dim, default=[64, 128, 256])
    add("--seqlen", nargs="+", type=_seqlen, default=[2048, 16384])
    add("--seconds", type=arguments.seconds, default=0.2, help="for each candidate in each cell")
    add("--jobs", type=arguments.positive, default=os.cpu_count(), help="default: one per core")
    add("--compile-only", action="store_true", help="registers, spills and ptxas's notes")
    add("--arch", type=arguments.architecture, help="to compile for (default: this GPU's)")
    add("--output", type=Path, help="the JSON file (default: a new one in benchmarks/results)")
    add("--commit", help="what to record where this is no git checkout")
    return parser


def _head_dim(text: str) -> int:
    size = arguments.head_dim(text)
    if size % 8:
        raise argparse.ArgumentTypeError(f"{text!r} is no multiple of 8, which TMA needs")
    return size


def _seqlen(text: str) -> int:
    length = arguments.positive(text)
    if suites.TOKENS % length:
        raise argparse.ArgumentTypeError(f"{text!r} does not divide {suites.TOKENS} tokens")
    return length


@dataclass(frozen=True, slots=True)
class Sweep:
    """The kernels of which tiles are compared."""

    direction: str
    backend: str
    capability: int

    @classmethod
    def of(cls, options: argparse.Namespace, capability: int) -> Sweep:
        """On a GPU of this compute capability."""
        served_by = backend_of(capability, tma=True)
        backend = options.backend or served_by
        if backend == "sm90" != served_by:
            raise CommandError(f"--backend sm90 is for sm_90 alone, not for sm_{capability}")
        return cls(options.direction, backend, capability)

    def candidates(self, head_dim: int) -> list[Candidate]:
        """Today's tiles, of any cell, and then the others of the ranges that may fit."""
        traits = _traits(head_dim, self.backend)
        todays = [self.todays(head_dim, suites.TOKENS, causal) for causal in (True, False)]
        make, ranges = RANGES[self.backend, self.direction]
        every = (make(*values) for values in itertools.product(*ranges.values()))
        tiles = dict.fromkeys([*todays, *(x for x in every if self._may_fit(x, traits))])
        return [Candidate(head_dim, x, self._plan_of(x, traits), x in todays) for x in tiles]

    def todays(self, head_dim: int, seqlen: int, causal: bool) -> Tiles:
        """What the planner chooses for a cell."""
        traits = _traits(head_dim, self.backend)
        if self.backend == "sm90" and not causal:
            dense_tiles = _plan_sm90.fewer_by_dense_tiles(head_dim, head_dim, seqlen)
            traits = replace(traits, dense_tiles=dense_tiles)
        return getattr(self._planner, f"{self.direction}_tiles")(traits, *self._gpu)

    @property
    def _planner(self) -> ModuleType:
        return _plan_sm90 if self.backend == "sm90" else _plan_sm80

    @property
    def _gpu(self) -> tuple[int, ...]:
        """What the planner asks for beside the traits."""
        return () if self.backend == "sm90" else (self.capability,)

    def _plan_of(self, tiles: Tiles, traits: Traits) -> Plan:
        if self.direction == "forward":
            return self._planner.forward_plan_of(tiles, traits, *self._gpu)
        return self._planner.backward_plan_of(tiles, traits, *self._gpu, deterministic=True)

    def _may_fit(self, tiles: Tiles, traits: Traits) -> bool:
        """Into shared memory and registers, as far as arithmetic tells, and what is asserted."""
        match tiles:
            case _plan_sm90.ForwardTiles():
                return tiles.fits(traits)
            case _plan_sm90.BackwardTiles():
                return tiles.fits(traits) and (tiles.block_q == 64 or not tiles.wide)
            case _plan_sm80.ForwardTiles():
                accumulators = tiles.block_q * (tiles.block_kv + traits.head_dim_v)
                accumulators //= WARP * tiles.warps
                divided = tiles.block_q % (16 * tiles.warps) == 0
            case _plan_sm80.BackwardTiles():
                accumulators = tiles.accumulators(traits)
                divided = _divides(tiles, traits)
        scores = tiles.block_q * tiles.block_kv // (WARP * tiles.warps)
        fits = tiles.smem_bytes(traits) <= smem_limit(self.capability)
        return fits and divided and scores <= MAX_SCORES and accumulators < MAX_REGISTERS


def _traits(head_dim: int, backend: str) -> Traits:
    return Traits(
        dtype="bfloat16",
        head_dim=padded(head_dim),
        head_dim_v=padded(head_dim),
        vec_bytes=TMA_BYTES,
        pack_group=False,
        softcap=False,
        scale_first=False,
        few_rows=False,
        tma=backend == "sm90",
    )


def _divides(tiles: _plan_sm80.BackwardTiles, traits: Traits) -> bool:
    """Whether each product gives every warp a multiple of 16 rows and of 16 columns."""
    products = (
        (tiles.block_q, tiles.block_kv, tiles.score_warps),
        (tiles.block_kv, traits.head_dim, tiles.key_warps),
        (tiles.block_kv, traits.head_dim_v, tiles.key_warps),
        (tiles.block_q, traits.head_dim, tiles.query_warps),
    )
    return all(
        rows % (16 * row_warps) == 0 and columns % (16 * (tiles.warps // row_warps)) == 0
        for rows, columns, row_warps in products
    )


def name_of(tiles: Tiles) -> str:
    """As `consumers=2 block_kv=128`."""
    return " ".join(f"{name}={int(value)}" for name, value in asdict(tiles).items())


@dataclass(frozen=True, slots=True)
class Candidate:
    """Tiles for one head size."""

    head_dim: int
    tiles: Tiles
    plan: Plan
    is_todays: bool

    def __str__(self) -> str:
        return name_of(self.tiles)

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """The main one first."""
        if isinstance(self.plan, ForwardPlan):
            return (self.plan.kernel,)
        return (self.plan.main, self.plan.prep, self.plan.post)


@dataclass(frozen=True, slots=True)
class Compiled:
    """A candidate, and what the compiler made of its kernels."""

    candidate: Candidate
    registers: int
    spill_bytes: int
    stack_bytes: int
    notes: tuple[str, ...]  # ptxas's (Resources)
    error: str  # why it does not compile

    @classmethod
    def of(cls, candidate: Candidate, outcomes: dict[Kernel, Outcome]) -> Compiled:
        found = [outcomes[kernel] for kernel in candidate.kernels]
        main = found[0].resources
        resources = [outcome.resources for outcome in found if outcome.resources]
        errors = [_first_error(outcome.error) for outcome in found if outcome.error]
        return cls(
            candidate,
            registers=main.registers if main else 0,
            spill_bytes=sum(x.spill_bytes for x in resources),
            stack_bytes=max((x.stack_bytes for x in resources), default=0),
            notes=tuple(note for x in resources for note in x.notes),
            error=errors[0] if errors else "",
        )

    @property
    def fault(self) -> str:
        """Why it is not worth a measurement; empty where it is."""
        if self.error:
            return f"does not compile: {self.error}"
        spilled = [f"{self.spill_bytes} bytes spilled"] if self.spill_bytes else []
        return ", ".join(spilled + [f"ptxas: {note}" for note in self.notes])

    @property
    def is_measured(self) -> bool:
        """Today's are in any case: the others are compared with them."""
        return not self.error and (self.candidate.is_todays or not self.fault)


def _first_error(log: str) -> str:
    found = re.search(r"(?:error|fatal) *: (.*)", log)  # NVRTC's or ptxas's
    return found[1] if found else log.partition("\n")[0]


def compiled(sweep: Sweep, options: argparse.Namespace) -> list[Compiled]:
    """All candidates."""
    candidates = [x for head_dim in options.head_dim for x in sweep.candidates(head_dim)]
    kernels = list(dict.fromkeys(kernel for x in candidates for kernel in x.kernels))
    jobs = min(options.jobs, len(kernels))
    say(f"{len(candidates)} candidates, {len(kernels)} kernels for {kernels[0].arch}")
    outcomes = progress(compile_all(kernels, jobs), len(kernels), "kernel")
    by_kernel = {outcome.kernel: outcome for outcome in outcomes}
    return [Compiled.of(candidate, by_kernel) for candidate in candidates]


def _compile_only(options: argparse.Namespace) -> int:
    arch = options.arch or archs_here("sweep_tiles")[0]
    sweep = Sweep.of(options, int(arch.removeprefix("sm_")))
    found = compiled(sweep, options)
    for head_dim in options.head_dim:
        rows = [x for x in found if x.candidate.head_dim == head_dim]
        names = [f.name for f in fields(rows[0].candidate.tiles)]
        print(f"\n{sweep.backend} {sweep.direction} for {arch}, D {head_dim}, bfloat16\n")
        heads = [*names, "", "registers", "bytes spilled", "of stack", "of shared memory", "notes"]
        print("\n".join(tables.header(heads)))
        for row in rows:
            candidate = row.candidate
            print(
                tables.line(
                    *(int(value) for value in asdict(candidate.tiles).values()),
                    "today's" if candidate.is_todays else "",
                    row.registers or tables.MISSING,
                    tables.MISSING if row.error else row.spill_bytes,
                    tables.MISSING if row.error else row.stack_bytes,
                    candidate.kernels[0].smem_bytes,
                    row.error or ", ".join(row.notes),
                )
            )
    return 1 if any(x.candidate.is_todays and x.error for x in found) else 0


def _measure(options: argparse.Namespace) -> int:
    cupy = require_gpu("sweep_tiles")
    sweep = Sweep.of(options, int(cupy.cuda.Device().compute_capability))
    machine = reports.machine_of_gpu(cupy)
    suite = f"tiles-{sweep.backend}-{sweep.direction}"
    output = options.output or reports.default_output(suite, machine["device"])
    reports.require_writable("sweep_tiles", output)
    found = compiled(sweep, options)
    report = _report(options, machine, sweep, found)

    cells = list(_cells(sweep, options))
    make = gpu_inputs(cupy, cells)
    clock = StreamClock(cupy)
    for cell in progress(cells, len(cells), "cell"):
        measured = [
            x.candidate for x in found if x.is_measured and x.candidate.head_dim == cell.head_dim
        ]
        row = run_cell(cell, measured, make(cell), clock, options.seconds)
        row["todays"] = name_of(sweep.todays(cell.head_dim, cell.seqlen, cell.causal))
        report["cells"].append(row)
        # A kernel that breaks the GPU's context takes no finished cell with it.
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        say(_best(row))
    print(table(report))
    print(f"\n{output}")
    results = (x for row in report["cells"] for x in row["results"].values())
    return 1 if any("tflops" not in x for x in results) else 0


def _cells(sweep: Sweep, options: argparse.Namespace) -> Iterator[Cell]:
    """As those of bench, suites forward and backward."""
    for head_dim in options.head_dim:
        for seqlen in options.seqlen:
            for causal in (False, True):
                sizes = (suites.TOKENS // seqlen, seqlen, suites.WIDTH // head_dim, head_dim)
                yield Cell(sweep.direction, "bfloat16", *sizes, causal)


class Planned:
    """A clock of calls that run by `plan`, which takes the planner's place before time starts."""

    def __init__(self, plan: Plan, clock: Clock) -> None:
        self._plan = plan
        self._clock = clock
        # What _launch keeps of calls: warm from the second on.
        names = ("forward_choices", "forward_launches", "backward_choices", "backward_launches")
        self._kept: dict[str, dict] = {f"_{name}": {} for name in names}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Calls within run by the plan."""
        from cuflash import _launch  # needs CuPy

        direction = "forward" if isinstance(self._plan, ForwardPlan) else "backward"
        with (
            patch.object(_plan, f"{direction}_plan", lambda *traits: self._plan),
            patch.multiple(_launch, **self._kept),
        ):
            yield

    def time(self, call: Callable[[], Any]) -> Callable[[], float]:
        """As StreamClock."""
        with self.in_place():
            return self._clock.time(call)


def run_cell(
    cell: Cell, candidates: list[Candidate], inputs: Inputs, clock: Clock, seconds: float
) -> dict[str, Any]:
    """Check each candidate against the first, one of today's, and time those that agree."""
    call = _call(cell, inputs)
    contenders, results = {}, {}
    todays = None
    for candidate in candidates:
        planned = Planned(candidate.plan, clock)
        try:
            with planned.in_place():
                result = [x for x in call() if x is not None]
            todays = todays or result
            difference = largest_difference(result, todays)
        # A kernel may fail in any way; what is left to do then is to say which.
        except Exception as error:
            results[str(candidate)] = {"error": f"{type(error).__name__}: {error}"[:200]}
            if todays is None:
                break
            continue
        if difference <= TOLERANCE:
            contenders[str(candidate)] = Contender(call, planned)
        else:  # or NaN
            results[str(candidate)] = {"wrong": f"differs by {difference:.2g} of the largest"}
    for name, timing in (measure(contenders, seconds) if contenders else {}).items():
        tflops = cell.flops / timing.median_ms / 1e9
        results[name] = {**asdict(timing), "tflops": float(f"{tflops:.4g}")}
    # In the order of the candidates.
    results = {str(x): results[str(x)] for x in candidates if str(x) in results}
    sizes = {name: getattr(cell, name) for name in ("batch", "seqlen", "heads", "head_dim")}
    return {**sizes, "causal": cell.causal, "flops": cell.flops, "results": results}


def _call(cell: Cell, inputs: Inputs) -> Callable[[], Any]:
    arrays, options = (inputs.q, inputs.k, inputs.v), {"causal": cell.causal}
    forward = partial(cuflash.attention, *arrays, return_lse=True, **options)
    if cell.direction == "forward":
        return forward
    return partial(cuflash.attention_backward, inputs.dout, *arrays, *forward(), **options)


def largest_difference(arrays: Sequence[Any], others: Sequence[Any]) -> float:
    """Relative to the largest element of the other array; NaN where there is one."""
    differences = []
    for a, b in zip(map(_as_float32, arrays), map(_as_float32, others), strict=True):
        differences.append(float(abs(a - b).max() / abs(b).max()))
    return float(np.max(differences))


def _as_float32(array: Any) -> Any:
    """bfloat16 by its bits, which needs no arithmetic of that dtype."""
    if array.dtype != BFLOAT16:
        return array
    return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _report(
    options: argparse.Namespace, machine: dict[str, Any], sweep: Sweep, found: list[Compiled]
) -> dict[str, Any]:
    return {
        **machine,
        "suite": f"tiles {sweep.direction}",
        "backend": sweep.backend,
        "dtype": "bfloat16",
        **reports.provenance("python benchmarks/sweep_tiles.py", options.commit),
        "candidates": [
            {
                "head_dim": x.candidate.head_dim,
                "name": str(x.candidate),
                "tiles": asdict(x.candidate.tiles),
                "todays": x.candidate.is_todays,
                "registers": x.registers,
                "spill_bytes": x.spill_bytes,
                "stack_bytes": x.stack_bytes,
                "smem_bytes": x.candidate.kernels[0].smem_bytes,
                "fault": x.fault,
            }
            for x in found
        ],
        "cells": [],
    }


def table(report: dict[str, Any]) -> str:
    """For each head size its candidates, fastest first, and below them those that failed."""
    parts = [
        f"{report['device']}, {report['date']}, {report['backend']} {report['suite']}, bfloat16: "
        "TFLOP/s, and how many times as fast as today's tiles (geometric mean)"
    ]
    for head_dim in dict.fromkeys(x["head_dim"] for x in report["candidates"]):
        cells = [x for x in report["cells"] if x["head_dim"] == head_dim]
        rows = [x for x in report["candidates"] if x["head_dim"] == head_dim]
        gains = {x["name"]: gain(cells, x["name"]) for x in rows}
        rows.sort(key=lambda x: gains[x["name"]] or 0.0, reverse=True)
        heads = [*rows[0]["tiles"], "", "registers", *map(_cell_name, cells), "to today's"]
        parts += ["", f"D {head_dim}", "", *tables.header(heads)]
        for row in rows:
            results = [cell["results"].get(row["name"], {}) for cell in cells]
            if any("tflops" in x for x in results):
                parts.append(
                    tables.line(
                        *map(int, row["tiles"].values()),
                        "today's" if row["todays"] else "",
                        row["registers"],
                        *(tables.number(x.get("tflops")) for x in results),
                        f"{gains[row['name']]:.3f}" if gains[row["name"]] else tables.MISSING,
                    )
                )
        parts += ["", *_failures(rows, cells)]
    return "\n".join(parts)


def gain(cells: list[dict[str, Any]], name: str) -> float | None:
    """Over today's tiles, by the geometric mean; None where a cell has no time of both."""
    times = [
        [cell["results"].get(n, {}).get("median_ms") for n in (cell["todays"], name)]
        for cell in cells
    ]
    if not times or not all(map(all, times)):
        return None
    return statistics.geometric_mean(own / other for own, other in times)


def _failures(rows: list[dict[str, Any]], cells: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        if row["fault"]:
            yield f"{row['name']}: {row['fault']}"
        for cell in cells:
            result = cell["results"].get(row["name"], {})
            for kind in ("wrong", "error"):
                if kind in result:
                    yield f"{row['name']}: {_cell_name(cell)}: {kind}: {result[kind]}"


def _cell_name(cell: dict[str, Any]) -> str:
    return f"S{cell['seqlen']}" + (" causal" if cell["causal"] else "")


def _best(row: dict[str, Any]) -> str:
    """One cell's fastest, in one line."""
    timed = {name: x for name, x in row["results"].items() if "tflops" in x}
    head = f"D{row['head_dim']} {_cell_name(row)}: "
    if not timed:
        return head + "nothing was timed"
    best = max(timed, key=lambda name: timed[name]["tflops"])
    return head + f"{timed[best]['tflops']} TFLOP/s by {best}"


if __name__ == "__main__":
    sys.exit(main())
