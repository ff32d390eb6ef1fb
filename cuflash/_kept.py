"""What calls find once and keep, in dictionaries that stay small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Found = TypeVar("Found")


def kept(
    known: dict[Any, Found], key: Any, find: Callable[[], Found], most: int, keeps: bool = True
) -> Found:
    """What was found for this key before, or is now; only if it `keeps` does that change `known`.

    With `most` entries it is full: all of them go.
    """
    found = known.get(key)
    if found is None:
        found = find()
        if keeps:
            if len(known) >= most:
                known.clear()
            known[key] = found
    return found
