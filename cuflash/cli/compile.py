"""python -m cuflash compile: fill the cache, with or without a GPU and its driver."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from typing import Any

from cuflash import _jit
from cuflash._traits import Kernel
from cuflash.cli import arguments, launches
from cuflash.cli.gpus import CommandError, archs_here
from cuflash.cli.progress import progress, say


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one kernel."""

    kernel: Kernel
    error: str = ""
    seconds: float = 0.0  # 0: it was there
    resources: _jit.Resources | None = None


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "compile", help="fill the kernel cache; needs no GPU and no driver"
    )
    add = parser.add_argument
    add(
        "--arch",
        nargs="+",
        type=arguments.architecture,
        metavar="sm_80",
        help="architectures (default: of the GPUs here)",
    )
    add("--dtype", nargs="+", choices=("float16", "bfloat16"), default=["float16", "bfloat16"])
    add(
        "--head-dim",
        nargs="+",
        type=arguments.head_dim,
        default=[64, 128],
        help="of q and k (default: 64 128)",
    )
    add("--head-dim-v", type=arguments.head_dim, help="of v (default: that of q and k)")
    add(
        "--group",
        "--gqa",
        nargs="+",
        type=arguments.positive,
        default=[1],
        help="q heads per k head (default: 1)",
    )
    add("--softcap", action="store_true", help="kernels that cap the scores")
    add(
        "--mask",
        type=_mask,
        help=f"kernels of a mask: {', '.join(launches.RULES)}, joined by &, | and ~",
    )
    add(
        "--bias-bits",
        type=int,
        choices=(16, 32),
        default=0,
        help="of an element of a bias: 16 for one of q's dtype, 32 for float32",
    )
    add("--alibi", action="store_true", help="kernels of alibi_slopes")
    add("--sinks", action="store_true", help="kernels of sinks")
    add("--dropout", action="store_true", help="kernels of dropout")
    add("--packed", action="store_true", help="kernels of attention_varlen")
    add("--forward-only", action="store_true", help="leave the gradients out")
    add("--nondeterministic", action="store_true", help="gradients of deterministic=False")
    add(
        "--jobs",
        type=arguments.positive,
        default=os.cpu_count(),
        help="processes (default: one per core)",
    )
    return parser


def run(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    archs = list(dict.fromkeys(options.arch or archs_here("compile")))
    _require_compiler()
    kernels = list(dict.fromkeys(k for arch in archs for k in _kernels(arch, options)))
    outcomes = []
    for outcome in progress(compile_all(kernels, options.jobs), len(kernels), "kernel"):
        say(_line(outcome))
        outcomes.append(outcome)
    failed = sum(bool(outcome.error) for outcome in outcomes)
    compiled = sum(outcome.seconds > 0 and not outcome.error for outcome in outcomes)
    print(
        f"{len(kernels)} kernels for {', '.join(archs)}: {compiled} compiled, "
        f"{len(kernels) - compiled - failed} were there, {failed} failed; "
        f"{time.perf_counter() - start:.1f} s; {_jit.cache_dir()}"
    )
    return 1 if failed else 0


def _mask(text: str) -> str:
    try:
        launches.mask_of(text, queries=1, keys=1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _kinds(options: argparse.Namespace) -> Iterator[launches.CallKind]:
    if options.packed and (options.mask or options.bias_bits):
        raise CommandError("compile: --packed goes with neither --mask nor --bias-bits")
    for dtype, head_dim, group in product(options.dtype, options.head_dim, options.group):
        yield launches.CallKind(
            dtype,
            head_dim,
            options.head_dim_v or head_dim,
            group,
            softcap=options.softcap,
            mask=options.mask,
            bias_bits=options.bias_bits,
            alibi=options.alibi,
            sinks=options.sinks,
            dropout=options.dropout,
            packed=options.packed,
            backward=not options.forward_only,
            deterministic=not options.nondeterministic,
        )


def _kernels(arch: str, options: argparse.Namespace) -> Iterator[Kernel]:
    try:
        for kind in _kinds(options):
            yield from launches.kernels_of(kind, arch)
    except (NotImplementedError, ValueError) as error:
        message = str(error).removeprefix("cuflash.compile: ")
        raise CommandError(f"compile: {message}") from error


def _require_compiler() -> None:
    try:
        _jit.nvrtc_version()
    except ImportError as error:
        raise CommandError(f"compile: {str(error).removeprefix('cuflash: ')}") from error


def compile_all(kernels: list[Kernel], jobs: int) -> Iterator[Outcome]:
    """What becomes of each; NVRTC compiles one kernel at a time in a process: there are several."""
    _require_compiler()
    if jobs == 1:
        yield from map(_compile, kernels)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        try:
            for future in as_completed([pool.submit(_compile, kernel) for kernel in kernels]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _compile(kernel: Kernel) -> Outcome:
    try:
        cubin = _jit.cached_cubin(kernel)
    except (_jit.CompileError, NotImplementedError, FileNotFoundError) as error:
        return Outcome(kernel, error=str(error))
    if cubin.path is None:
        # What else there is to compile would be lost too.
        raise CommandError(f"compile: the cache folder {_jit.cache_dir()} cannot be written")
    return Outcome(kernel, seconds=cubin.seconds, resources=cubin.resources)


def _line(outcome: Outcome) -> str:
    kernel = outcome.kernel
    constants = " ".join(f"{name}={value}" for name, value in kernel.constants)
    name = f"{kernel.arch} {kernel.source} {constants}"
    if outcome.resources is None:
        return f"{name}: FAILED: {outcome.error}"
    took = f"{outcome.seconds:.1f} s" if outcome.seconds else "was there"
    spills = outcome.resources.spill_bytes
    return f"{name}: {took}, {outcome.resources.registers} registers, {spills} bytes spilled"
