"""Compile what calls will launch before they do, a kernel to each core."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from typing import Any

from cuflash.cli.compile import compile_all
from cuflash.cli.gpus import CommandError
from cuflash.cli.progress import progress


def compile_ahead(calls: Iterable[Callable[[], Any]]) -> None:
    """Make the calls without their launches, and compile what they would have launched.

    What goes wrong shows again when the calls are made in earnest, and is passed over here.
    """
    from cuflash._gpu import dry_run  # needs CuPy

    with dry_run() as noted:
        for call in calls:
            with suppress(Exception):
                call()
    kernels = list(dict.fromkeys(noted))
    # Without a folder for the cache, or without processes, each call compiles for itself.
    with suppress(CommandError, BrokenExecutor, OSError):
        for _ in progress(compile_all(kernels, os.cpu_count() or 1), len(kernels), "kernel"):
            pass
