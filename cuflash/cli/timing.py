"""Medians of contenders that take turns, so that a change of clock rates meets them all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

WARM_UP_CALLS = 3
MIN_REPEATS, MAX_REPEATS = 7, 100


class Clock(Protocol):
    """Runs a call and returns the function that reads its milliseconds, to be called at the end."""

    def time(self, call: Callable[[], Any]) -> Callable[[], float]: ...


@dataclass(frozen=True, slots=True)
class Contender:
    """One implementation, ready to run one problem."""

    call: Callable[[], Any]
    clock: Clock
    preparation_ms: float | None = None  # of what is done once, for any number of calls


@dataclass(frozen=True, slots=True)
class Timing:
    median_ms: float
    min_ms: float
    repeats: int


class StreamClock:
    """Events on CuPy's current stream, around a call that finds nothing in the L2 cache."""

    def __init__(self, cupy: Any) -> None:
        self._cuda = cupy.cuda
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        self._scratch = cupy.empty(2 * properties["l2CacheSize"], cupy.uint8)

    def time(self, call: Callable[[], Any]) -> Callable[[], float]:
        start, end = self._cuda.Event(), self._cuda.Event()
        # The write evicts all else, and lasts so long that the host's share of the call hides.
        self._scratch.fill(0)
        start.record()
        call()
        end.record()

        def read() -> float:
            end.synchronize()
            return self._cuda.get_elapsed_time(start, end)

        return read


@dataclass(frozen=True, slots=True)
class HostClock:
    """The host's clock around calls that are queued one behind the other, until `wait` returns."""

    queued: int = 1
    idle: Callable[[], None] = lambda: None  # waits for the work of others
    wait: Callable[[Any], Any] = lambda result: result

    def time(self, call: Callable[[], Any]) -> Callable[[], float]:
        self.idle()
        start = time.perf_counter()
        for _ in range(self.queued):
            result = call()
        self.wait(result)
        milliseconds = 1e3 * (time.perf_counter() - start) / self.queued
        return lambda: milliseconds


def warm_up(contender: Contender) -> float:
    """Milliseconds of the last of a few calls."""
    for _ in range(WARM_UP_CALLS):
        milliseconds = contender.clock.time(contender.call)()
    return milliseconds


def measure(contenders: dict[str, Contender], seconds: float) -> dict[str, Timing]:
    """Time warm contenders in turns for about `seconds` each."""
    return {name: summary(ms) for name, ms in rounds(contenders, seconds).items()}


def summary(ms: list[float]) -> Timing:
    """Of one contender's times."""
    return Timing(statistics.median(ms), min(ms), len(ms))


def rounds(contenders: dict[str, Contender], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each warm contender, in the rounds in which all took their turns."""
    slowest_ms = max(warm_up(contender) for contender in contenders.values())
    repeats = min(max(int(1e3 * seconds / slowest_ms), MIN_REPEATS), MAX_REPEATS)
    readers: dict[str, list[Callable[[], float]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            readers[name].append(contender.clock.time(contender.call))
    return {name: [read() for read in reads] for name, reads in readers.items()}
