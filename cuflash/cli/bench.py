"""python -m cuflash bench: cuflash beside its peers, into a table and a JSON file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cuflash import _plan, _plan_sm90, _traits
from cuflash._problem import Problem
from cuflash._work import MASK_BLOCK
from cuflash.cli import arguments, contenders, reports, suites, tables
from cuflash.cli.ahead import compile_ahead
from cuflash.cli.cells import PRODUCTS, Cell, Inputs
from cuflash.cli.contenders import COMPILED, DENSE, OURS, OWN, Factory
from cuflash.cli.gpus import CommandError, require_gpu
from cuflash.cli.inputs import cpu_inputs, gpu_inputs
from cuflash.cli.progress import progress, say
from cuflash.cli.rules import Tile
from cuflash.cli.timing import rounds, summary, warm_up


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "bench",
        help="speed beside the peers that are installed",
        description=f"speed beside the peers that are installed\n\nsuites:\n{_suites()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--suite",
        choices=(*suites.GPU_SUITES, *suites.CPU_SUITES),
        default="forward",
        help="see above (default: forward)",
    )
    add("--quick", action="store_true", help="a few cells of the grid")
    add("--peers", nargs="*", help="only these, by the names of the table's columns")
    add("--seconds", type=arguments.seconds, default=0.5, help="for each contender in each cell")
    add("--output", type=Path, help="the JSON file (default: a new one in benchmarks/results)")
    add("--commit", help="what to record where this is no git checkout")
    return parser


def run(options: argparse.Namespace) -> int:
    cells = list(suites.cells(options.suite, options.quick))
    bench = _on_cpu(options.suite) if options.suite in suites.CPU_SUITES else _on_gpu(options.suite)
    # Whatever is wrong with the arguments is said before the measurement, which takes minutes.
    factories = _chosen(bench.factories, options.peers)
    output = options.output or reports.default_output(options.suite, bench.machine["device"])
    reports.require_writable("bench", output)
    gemm, make = bench.gemm(), bench.inputs(cells)
    if options.suite in suites.GPU_SUITES:
        own = {name: factory for name, factory in factories.items() if name in OWN}
        compile_ahead(partial(_call_once, own, cell, make) for cell in cells)
    rows = []
    for cell in progress(cells, len(cells), "cell"):
        inputs = make(cell)
        row = _run_cell(cell, factories, inputs, options.seconds)
        if options.suite in suites.MASK_SUITES:
            _add_shares(row, cell, bench.tiles(cell, inputs))
        rows.append(row)
        say(f"{cell}: {tables.rates(row['results'])}")
    report = _report(options, bench.machine, gemm, rows)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(tables.table(report))
    print(f"\n{output}")
    return 1 if any("error" in row["results"][OURS] for row in rows) else 0


class Bench(NamedTuple):
    """What differs between a GPU and the CPU."""

    factories: dict[str, Factory]
    machine: dict[str, Any]
    gemm: Callable[[], tuple[float, str]]
    inputs: Callable[[list[Cell]], Callable[[Cell], Inputs]]
    tiles: Callable[[Cell, Inputs], dict[str, Tile]]


def _on_gpu(suite: str) -> Bench:
    cupy = require_gpu("bench", f"the suites {', '.join(suites.CPU_SUITES)} need none")
    of_suite = {
        "masks": contenders.gpu_mask_contenders,
        "packed": contenders.gpu_packed_contenders,
        suites.HOST_SUITE: contenders.gpu_host_contenders,
    }
    return Bench(
        factories=of_suite.get(suite, contenders.gpu_contenders)(cupy),
        machine=reports.machine_of_gpu(cupy),
        gemm=partial(contenders.gemm_tflops_gpu, cupy),
        inputs=partial(gpu_inputs, cupy),
        tiles=partial(_gpu_tiles, int(cupy.cuda.Device().compute_capability)),
    )


def _on_cpu(suite: str) -> Bench:
    of_suite = {
        "cpu-masks": contenders.cpu_mask_contenders,
        "cpu-packed": contenders.cpu_packed_contenders,
    }
    return Bench(
        factories=of_suite.get(suite, contenders.cpu_contenders)(),
        machine=reports.machine_of_cpu(),
        gemm=contenders.gemm_tflops_cpu,
        inputs=lambda cells: cpu_inputs,
        tiles=lambda cell, inputs: dict.fromkeys(PRODUCTS, Tile(*MASK_BLOCK)),
    )


def _suites() -> str:
    """A line each."""
    lines = {**suites.GPU_SUITES, **suites.CPU_SUITES}.items()
    return "\n".join(f"  {name:<10} {what}" for name, what in lines)


def _chosen(factories: dict[str, Factory], peers: list[str] | None) -> dict[str, Factory]:
    """The factories of these peers, and ours; all of them where none were named."""
    if peers is None:
        return factories
    unknown = [repr(name) for name in peers if name not in factories]
    if unknown:
        known = ", ".join(repr(name) for name in factories if name not in OWN)
        raise CommandError(f"bench: --peers has {', '.join(unknown)}; expected some of {known}")
    return {n: make for n, make in factories.items() if n in OWN or n in peers}


def _call_once(factories: dict[str, Factory], cell: Cell, make: Callable[[Cell], Inputs]) -> None:
    inputs = make(cell)
    for factory in factories.values():
        with suppress(ValueError):  # it cannot do the cell
            factory(cell, inputs).call()


def _run_cell(
    cell: Cell, factories: dict[str, Factory], inputs: Inputs, seconds: float
) -> dict[str, Any]:
    ready, results = {}, {}
    for name, make in factories.items():
        # Peers fail in as many ways as there are peers; each failure is a result to be recorded.
        try:
            ready[name] = make(cell, inputs)
            warm_up(ready[name])
        except Exception as error:
            ready.pop(name, None)
            results[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    times = rounds(ready, seconds) if ready else {}
    for name, ms in times.items():
        timing = summary(ms)
        flops = cell.dense.flops if name == DENSE else cell.flops
        tflops = flops / timing.median_ms / 1e9
        results[name] = {**dataclasses.asdict(timing), "tflops": float(f"{tflops:.4g}")}
        if DENSE in times and name != DENSE:  # by round: a busy machine slows both
            ratios = [x / dense for x, dense in zip(ms, times[DENSE], strict=True)]
            results[name]["over_dense"] = float(f"{statistics.median(ratios):.4g}")
        if ready[name].preparation_ms is not None:
            results[name]["preparation_ms"] = ready[name].preparation_ms
    problem = dataclasses.asdict(dataclasses.replace(cell, rule=None))
    problem["rule"] = str(cell.rule or "")
    return {**problem, "flops": cell.flops, "results": results}


def _add_shares(row: dict[str, Any], cell: Cell, tiles: dict[str, Tile]) -> None:
    """The visible tiles, and ours beside that share of our dense time."""
    results, share = row["results"], cell.share(tiles)
    row |= {"tiles": tiles, "share": share}
    for name in (OURS, COMPILED):
        if "over_dense" in results.get(name, {}) and share:
            results[name]["over_share"] = float(f"{results[name]['over_dense'] / share:.4g}")


def _gpu_tiles(capability: int, cell: Cell, inputs: Inputs) -> dict[str, Tile]:
    """Of the kernels that serve a cell, whose arrays are aligned."""
    mask = cell.rule.mask(**inputs.of_rule) if cell.rule else None
    arrays = (inputs.q, inputs.k, inputs.v)
    options = {"causal": cell.causal, "mask": mask, "bias": inputs.bias}
    problem = Problem.create("bench", "cuda", *arrays, **options)
    dense_tiles = _plan_sm90.dense_tiles_pay(problem)  # of the forward; a backward has one kind
    traits = _traits.Traits.of(problem, _traits.TMA_BYTES, True, dense_tiles)
    plans = {
        "forward": _plan.forward_plan(traits, capability),
        "backward": _plan.backward_plan(traits, capability, deterministic=True),
    }
    return {n: Tile(plan.tiling.block_q, plan.tiling.block_kv) for n, plan in plans.items()}


def _report(
    options: argparse.Namespace,
    machine: dict[str, Any],
    gemm: tuple[float, str],
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        **machine,
        "suite": options.suite,
        **reports.provenance("python -m cuflash", options.commit),
        "gemm": {"tflops": float(f"{gemm[0]:.4g}"), "by": gemm[1]},
        "cells": rows,
    }
