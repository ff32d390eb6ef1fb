"""Tasks on every core, with BLAS held to one thread while they run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

from threadpoolctl import ThreadpoolController

Task = TypeVar("Task")


def for_each(function: Callable[[Task], object], tasks: Iterable[Task]) -> None:
    """Run function(task) for all tasks, on as many threads as BLAS may use; raise what they raise.

    The threads end with the call: none is left to wake up in a forked child or to wait for at exit.
    """
    tasks = list(tasks)
    with _single_threaded_blas() as threads:
        workers = min(threads, len(tasks))
        if workers <= 1:
            for task in tasks:
                function(task)
            return
        with ThreadPoolExecutor(workers, "cuflash") as pool:
            for _ in pool.map(function, tasks):
                pass


class _Callers:
    """How many calls hold BLAS to one thread at this moment, and what it goes back to."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.threads = 1
        self.restore: Callable[[], None]


_callers = _Callers()


@contextmanager
def _single_threaded_blas() -> Iterator[int]:
    """Yield the number of threads that BLAS had; the last of several callers gives them back."""
    with _callers.lock:
        if not _callers.inside:
            blas = _blas()
            threads = [library.num_threads for library in blas.lib_controllers]
            _callers.threads = max(threads, default=os.cpu_count() or 1)
            _callers.restore = blas.limit(limits=1).restore_original_limits
        _callers.inside += 1
    try:
        yield _callers.threads
    finally:
        with _callers.lock:
            _callers.inside -= 1
            if not _callers.inside:
                _callers.restore()


@lru_cache(maxsize=1)
def _blas() -> ThreadpoolController:
    """The loaded BLAS libraries; finding them takes milliseconds."""
    return ThreadpoolController().select(user_api="blas")
