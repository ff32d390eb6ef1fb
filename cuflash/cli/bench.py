"""python -m cuflash bench: cuflash beside its peers, into a table and a JSON file."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import cuflash
from cuflash import _jit
from cuflash._checks import BFLOAT16
from cuflash.cli import contenders
from cuflash.cli.cells import Cell, Inputs
from cuflash.cli.contenders import OURS, Factory
from cuflash.cli.gpus import CommandError, driver_version, require_gpu
from cuflash.cli.progress import progress, say
from cuflash.cli.timing import measure, warm_up

TOKENS, WIDTH = 16384, 2048  # B * S and H * D of every cell on a GPU
LENGTHS = (1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 128, 256)
CPU_SHAPES = ((1, 2048, 8, 64, False), (1, 2048, 8, 64, True), (2, 512, 12, 64, False))
CPU_SHAPES += ((1, 4096, 4, 128, True),)  # batch, length, heads, head size, causal
PACKAGES = ("numpy", "cupy-cuda13x", "cupy-cuda12x", "torch", "jax", "triton", "nvidia-cudnn-cu13")
CHECKOUT = Path(cuflash.__file__).resolve().parent.parent


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("bench", help="speed beside the peers that are installed")
    add = parser.add_argument
    add("--suite", choices=("forward", "backward", "cpu"), default="forward")
    add("--quick", action="store_true", help="a few cells of the grid")
    add("--peers", nargs="*", help="only these, by the names of the table's columns")
    add("--seconds", type=_seconds, default=0.5, help="for each contender in each cell")
    add("--output", type=Path, help="the JSON file (default: in benchmarks/results)")
    add("--commit", help="what to record where this is no git checkout")
    return parser


def run(options: argparse.Namespace) -> int:
    cells = list(_cells(options.suite, options.quick))
    if options.suite == "cpu":
        factories, machine = contenders.cpu_contenders(), _cpu()
    else:
        cupy = require_gpu("bench")
        factories, machine = contenders.gpu_contenders(cupy), _gpu(cupy)
    # Whatever is wrong with the arguments is said before the measurement, which takes minutes.
    factories = _chosen(factories, options.peers)
    output = options.output or _default_output(options.suite, machine["device"])
    _require_writable(output)
    if options.suite == "cpu":
        gemm, inputs_of = contenders.gemm_tflops_cpu(), _cpu_inputs
    else:
        gemm, inputs_of = contenders.gemm_tflops_gpu(cupy), _gpu_inputs(cupy)
    rows = []
    for cell in progress(cells, len(cells), "cell"):
        rows.append(_run_cell(cell, factories, inputs_of(cell), options.seconds))
        say(f"{cell}: {_rates(rows[-1])}")
    report = _report(options, machine, gemm, rows)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(_table(report))
    print(f"\n{output}")
    return 1 if any("error" in row["results"][OURS] for row in rows) else 0


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; expected seconds, more than 0")
    return seconds


def _chosen(factories: dict[str, Factory], peers: list[str] | None) -> dict[str, Factory]:
    """The factories of these peers, and ours; all of them where none were named."""
    if peers is None:
        return factories
    unknown = [repr(name) for name in peers if name not in factories]
    if unknown:
        known = ", ".join(repr(name) for name in factories if name != OURS)
        raise CommandError(f"bench: --peers has {', '.join(unknown)}; expected some of {known}")
    return {name: make for name, make in factories.items() if name == OURS or name in peers}


def _require_writable(output: Path) -> None:
    existed = output.exists()
    try:
        output.open("a").close()
    except OSError as error:
        raise CommandError(
            f"bench: the result cannot be written to {output}: {error.strerror}; "
            "expected --output FILE, in a folder that exists"
        ) from error
    if not existed:
        output.unlink()


def _cells(suite: str, quick: bool) -> Iterator[Cell]:
    if suite == "cpu":
        for batch, seqlen, heads, head_dim, causal in CPU_SHAPES[:1] if quick else CPU_SHAPES:
            for direction in ("forward", "forward+backward"):
                yield Cell(direction, "float32", batch, seqlen, heads, head_dim, causal)
        return
    for head_dim in (128,) if quick else HEAD_DIMS:
        for causal in (False, True):
            for seqlen in (2048, 16384) if quick else LENGTHS:
                heads = WIDTH // head_dim
                yield Cell(suite, "bfloat16", TOKENS // seqlen, seqlen, heads, head_dim, causal)


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
    for name, timing in (measure(ready, seconds) if ready else {}).items():
        tflops = cell.flops / timing.median_ms / 1e9
        results[name] = {**dataclasses.asdict(timing), "tflops": float(f"{tflops:.4g}")}
    return {**dataclasses.asdict(cell), "flops": cell.flops, "results": results}


def _rates(row: dict[str, Any]) -> str:
    results = row["results"].items()
    return ", ".join(f"{name} {result.get('tflops', 'absent')}" for name, result in results)


def _gpu_inputs(cupy: Any) -> Callable[[Cell], Inputs]:
    """All cells have equally many elements, so the numbers travel to the GPU once."""
    rng = np.random.default_rng(0)
    flat = [
        cupy.asarray(rng.standard_normal(TOKENS * WIDTH, np.float32).astype(BFLOAT16))
        for _ in range(4)
    ]
    return lambda cell: Inputs(*(x.reshape(cell.shape) for x in flat))


def _cpu_inputs(cell: Cell) -> Inputs:
    rng = np.random.default_rng(0)
    return Inputs(*(rng.standard_normal(cell.shape, np.float32) for _ in range(4)))


def _gpu(cupy: Any) -> dict[str, Any]:
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return {
        "device": properties["name"].decode(),
        "driver": driver_version(),
        "nvrtc": "{}.{}".format(*_jit.nvrtc_version()),
    }


def _cpu() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {"device": f"{next(models, platform.machine())}, {os.cpu_count()} cores"}


def _report(
    options: argparse.Namespace,
    machine: dict[str, Any],
    gemm: tuple[float, str],
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        **machine,
        "suite": options.suite,
        "date": datetime.date.today().isoformat(),
        "commit": options.commit or _commit(),
        "command": "python -m cuflash " + " ".join(sys.argv[1:]),
        "inputs": "standard normal",
        "versions": {"python": platform.python_version(), **_versions()},
        "gemm": {"tflops": float(f"{gemm[0]:.4g}"), "by": gemm[1]},
        "cells": rows,
    }


def _versions() -> dict[str, str]:
    found = {"cuflash": cuflash.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    git = ["git", "-C", str(CHECKOUT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + (" with changes" if changes.stdout else "")


def _default_output(suite: str, device: str) -> Path:
    """A file in the checkout's benchmarks/results; without a checkout, in one made here."""
    folder = CHECKOUT / "benchmarks" / "results"
    if not folder.is_dir():
        folder = Path.cwd() / "benchmarks" / "results"
        with suppress(OSError):  # the file will not be writable then either
            folder.mkdir(parents=True, exist_ok=True)
    slug = "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())
    return folder / f"{datetime.date.today().isoformat()}-{slug}-{suite}.json"


def _table(report: dict[str, Any]) -> str:
    """Markdown: the rate of each, and ours as a share of the matrix product and of the best."""
    rows = report["cells"]
    peers = list(dict.fromkeys(name for row in rows for name in row["results"] if name != OURS))
    gemm = report["gemm"]
    heads = ["", "D", "S", "causal", OURS, "of GEMM", *peers, "to best peer"]
    lines = [
        f"{report['device']}, {report['date']}, TFLOP/s; "
        f"matrix product: {gemm['tflops']:.4g} ({gemm['by']})",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + " --- |" * len(heads),
    ]
    for row in rows:
        results = row["results"]
        rates = {name: result.get("tflops") for name, result in results.items()}
        ours = rates[OURS]
        best = max((rates[p] for p in peers if rates.get(p)), default=None)
        columns = [
            row["direction"],
            str(row["head_dim"]),
            str(row["seqlen"]),
            "yes" if row["causal"] else "no",
            _number(ours),
            f"{100 * ours / gemm['tflops']:.0f} %" if ours else "–",
            *(_number(rates.get(peer)) for peer in peers),
            f"{ours / best:.2f}" if ours and best else "–",
        ]
        lines.append("| " + " | ".join(columns) + " |")
    failures = {
        f"{name}: {result['error']}"
        for row in rows
        for name, result in row["results"].items()
        if "error" in result
    }
    return "\n".join([*lines, *(["", *sorted(failures)] if failures else [])])


def _number(rate: float | None) -> str:
    return "–" if rate is None else f"{rate:.4g}"
