"""python -m cuflash check: this GPU's results against the float64 reference, one line a problem."""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import numpy as np

import cuflash
from cuflash import ScoreMod
from cuflash.cli.ahead import compile_ahead
from cuflash.cli.cases import Arrays, Case, spread
from cuflash.cli.gpus import require_gpu
from cuflash.cli.oracle import expect
from cuflash.cli.progress import progress, say
from cuflash.masks import Mask


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("check", help="is this GPU's result right? against float64")
    parser.add_argument("--quick", action="store_true", help="every sixth problem")
    parser.add_argument(
        "--runs",
        type=_runs,
        default=2,
        metavar="N",
        help="runs of each problem, which have to agree in every bit (default: 2)",
    )
    return parser


def run(options: argparse.Namespace) -> int:
    cupy = require_gpu("check")
    start = time.perf_counter()
    cases = list(spread(options.quick))
    compile_ahead(partial(_run, case, cupy, case.arrays()) for case in cases)
    failed = 0
    for case in progress(cases, len(cases), "problem"):
        faults, figures = check(case, cupy, options.runs)
        failed += bool(faults)
        say(f"{'FAIL' if faults else 'pass'}  {case}  {figures}  {'; '.join(faults)}".rstrip())
    seconds = time.perf_counter() - start
    print(f"{len(cases) - failed} passed, {failed} failed, {seconds:.0f} s")
    return 1 if failed else 0


def _runs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of runs; expected 1 or more")
    return int(text)


def check(case: Case, xp: Any, runs: int = 2) -> tuple[list[str], str]:
    """What is wrong with a problem's results, and the errors beside what they may be.

    Parameters
    ----------
    case : the problem
    xp : cupy, or numpy for the cpu backend
    runs : how often it is run; all have to agree in every bit
    """
    arrays = case.arrays()
    try:
        found = _run(case, xp, arrays)
        repeatable = found if case.deterministic else ("out", "lse")
        differing = {
            name
            for again in (_run(case, xp, arrays) for _ in range(runs - 1))
            for name in repeatable
            if found[name].tobytes() != again[name].tobytes()
        }
    except Exception as error:  # whatever it is, the other problems are still to be checked
        return [f"{type(error).__name__}: {error}".splitlines()[0]], ""
    bounds = expect(arrays, case.options)
    errors = {name: bound.error(found[name]) for name, bound in bounds.items()}
    faults = [
        f"{name} is off by {error:.2g}, allowed {bounds[name].allowed:.2g}"
        for name, error in errors.items()
        if not error <= bounds[name].allowed
    ]
    faults += [f"{name} differs from run to run" for name in found if name in differing]
    figures = (f"{name} {error:.1e}/{bounds[name].allowed:.1e}" for name, error in errors.items())
    return faults, " ".join(figures)


def _run(case: Case, xp: Any, arrays: Arrays) -> dict[str, np.ndarray]:
    """Forward and backward on xp's device; the results as NumPy arrays."""
    q, k, v, dout = (case.place(array, xp) for array in arrays[:4])
    dlse = xp.asarray(arrays[4])
    options = {name: _on_device(value, xp) for name, value in case.options.items()}
    out, lse = cuflash.attention(q, k, v, return_lse=True, **options)
    gradients = cuflash.attention_backward(
        dout, q, k, v, out, lse, dlse=dlse, deterministic=case.deterministic, **options
    )
    results = {"out": out, "lse": lse, **gradients._asdict()}
    return {n: x if xp is np else xp.asnumpy(x) for n, x in results.items() if x is not None}


def _on_device(value: Any, xp: Any) -> Any:
    """An option with its arrays, or those within it, on xp's device."""
    if isinstance(value, np.ndarray):
        return xp.asarray(value)
    if isinstance(value, (Mask, ScoreMod)):
        return value.with_arrays({name: xp.asarray(x) for name, x in value.arrays().items()})
    return value
