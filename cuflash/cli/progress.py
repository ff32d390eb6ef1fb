"""A progress bar where tqdm is installed and somebody watches; plain lines otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], total: int, unit: str) -> Iterator[T]:
    """Hand `items` on; the bar moves as they come."""
    bar = _tqdm() if sys.stderr.isatty() else None
    return iter(items) if bar is None else iter(bar(items, total=total, unit=unit))


def say(line: str) -> None:
    """Print a line above the bar, if there is one."""
    bar = _tqdm()
    if bar is None:
        print(line, flush=True)
    else:
        bar.write(line)


def _tqdm() -> type | None:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm
