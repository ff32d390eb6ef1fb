"""Tasks on every core, with BLAS held to one thread while they run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

from threadpoolctl import ThreadpoolController

Task = TypeVar("Task")
Result = TypeVar("Result")


def for_each(
    function: Callable[[Task], object], tasks: Iterable[Task], small: bool = False
) -> None:
    """Run function(task) for all tasks, on as many threads as BLAS may use; raise what one raises.

    The threads end with the call: none is left to wake up in a forked child or to wait for at exit.
    `small`: no product of a task is so large that BLAS would use more than one thread for it.
    """
    tasks = list(tasks)
    if not tasks:
        return
    if small and len(tasks) == 1:
        function(tasks[0])  # to hold BLAS to one thread would cost more than the task
        return
    left, lock, errors = tasks[::-1], threading.Lock(), []

    def work() -> None:
        try:
            while True:
                with lock:
                    if errors or not left:
                        return
                    task = left.pop()
                function(task)
        except BaseException as error:  # also KeyboardInterrupt: the other threads stop first
            errors.append(error)

    with _single_threaded_blas() as threads:
        helpers: list[threading.Thread] = []
        try:
            _start(helpers, work, min(threads, len(tasks)) - 1)
            work()
        finally:
            left.clear()  # an interrupt here ends the others too
            for helper in helpers:
                helper.join()
    try:
        if errors:
            raise errors[0]
    finally:
        errors.clear()  # whose frames hold it, and with it the arrays of the call


def _start(helpers: list[threading.Thread], work: Callable[[], None], count: int) -> None:
    """Add running threads to `helpers`, as many as the system grants."""
    for _ in range(count):
        helper = threading.Thread(target=work)
        try:
            helper.start()
        except RuntimeError:  # no more threads: those that run do the work
            return
        helpers.append(helper)


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
            _callers.restore = _by_any_thread(lambda: blas.limit(limits=1)).restore_original_limits
        _callers.inside += 1
    try:
        yield _callers.threads
    finally:
        with _callers.lock:
            _callers.inside -= 1
            if not _callers.inside:
                _by_any_thread(_callers.restore)


def _by_any_thread(set_threads: Callable[[], Result]) -> Result:
    """Set BLAS's threads: threadpoolctl, from 3.8 on, ignores all but the first thread that does.

    Which callers come first and leave last is nobody's choice; and the next may be another's.
    """
    _let_go()
    try:
        return set_threads()
    finally:
        _let_go()


def _let_go() -> None:
    for library in _blas().lib_controllers:
        if hasattr(library, "clear_controlling_thread"):
            library.clear_controlling_thread(force=True)


@lru_cache(maxsize=1)
def _blas() -> ThreadpoolController:
    """The loaded BLAS libraries; finding them takes milliseconds."""
    return ThreadpoolController().select(user_api="blas")
