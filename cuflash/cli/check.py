"""python -m cuflash check: this GPU's results against the float64 reference, one line a problem."""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from cuflash import _jit
from cuflash.cli import cases
from cuflash.cli.ahead import compile_ahead
from cuflash.cli.calls import bits, results
from cuflash.cli.cases import Case
from cuflash.cli.gpus import find_gpus, require_gpu
from cuflash.cli.oracle import expect
from cuflash.cli.progress import progress, say

RUNS, RUNS_OF_RACES = 2, 1000
QUICK = 6  # every sixth problem
LIMIT_SECONDS = 300  # of one problem's runs; a barrier that nobody reaches would hold up for ever


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser("check", help="is this GPU's result right? against float64")
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="every sixth problem")
    which.add_argument(
        "--races",
        action="store_true",
        help="twenty problems of many blocks, each run again and again",
    )
    add(
        "--runs",
        type=_runs,
        metavar="N",
        help="runs of each problem, which have to agree in every bit "
        f"(default: {RUNS}; with --races {RUNS_OF_RACES})",
    )
    return parser


def run(options: argparse.Namespace) -> int:
    cupy = require_gpu("check")
    fault = _jit.hopper_fault()
    if fault and any(gpu.capability == 90 for gpu in find_gpus()[0]):
        say(f"warning: {fault}")
    start = time.perf_counter()
    problems = list(cases.races() if options.races else _every(options.quick))
    runs = options.runs or (RUNS_OF_RACES if options.races else RUNS)
    compile_ahead(partial(results, case, case.arrays(), cupy) for case in problems)
    failed = 0
    for case in progress(problems, len(problems), "problem"):
        faults, figures = check(case, cupy, runs)
        failed += bool(faults)
        say(f"{'FAIL' if faults else 'pass'}  {case}  {figures}  {'; '.join(faults)}".rstrip())
    seconds = time.perf_counter() - start
    print(f"{len(problems) - failed} passed, {failed} failed, {seconds:.0f} s")
    return 1 if failed else 0


def _every(quick: bool) -> Iterator[Case]:
    step = QUICK if quick else 1
    for some in (cases.spread(), cases.crowds()):
        yield from list(some)[::step]


def _runs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of runs; expected 1 or more")
    return int(text)


def check(case: Case, xp: Any, runs: int = RUNS) -> tuple[list[str], str]:
    """What is wrong with a problem's results, and the errors beside what they may be.

    Parameters
    ----------
    case : the problem
    xp : cupy, or numpy for the cpu backend
    runs : how often it is run; all have to agree in every bit
    """
    arrays = case.arrays()
    try:
        with _limit(case):
            found = results(case, arrays, xp)
            repeatable = found if case.deterministic else ("out", "lse")
            differs = {name: xp.zeros((), bool) for name in repeatable}
            for _ in range(runs - 1):
                again = results(case, arrays, xp)
                for name, so_far in differs.items():
                    so_far |= (bits(found[name]) != bits(again[name])).any()
            differing = [name for name, it_does in differs.items() if it_does]
            found = {n: x if xp is np else xp.asnumpy(x) for n, x in found.items()}
    except Exception as error:  # whatever it is, the other problems are still to be checked
        return [f"{type(error).__name__}: {error}".splitlines()[0]], ""
    bounds = expect(arrays, case.options)
    errors = {name: bound.error(found[name]) for name, bound in bounds.items()}
    faults = [
        f"{name} is off by {error:.2g}, allowed {bounds[name].allowed:.2g}"
        for name, error in errors.items()
        if not error <= bounds[name].allowed
    ]
    faults += [f"{name} differs from run to run" for name in differing]
    figures = (f"{name} {error:.1e}/{bounds[name].allowed:.1e}" for name, error in errors.items())
    return faults, " ".join(figures)


@contextmanager
def _limit(case: Case) -> Iterator[None]:
    """Within, a GPU that does not answer ends the process: nothing else frees it."""

    def give_up() -> None:
        say(f"FAIL  {case}  no result after {LIMIT_SECONDS} s: the GPU hangs in it")
        os._exit(1)

    timer = threading.Timer(LIMIT_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
