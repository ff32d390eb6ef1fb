"""Bugs put into kernels as they ship: replacements in a copy of their folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import backends
import pytest

from cuflash import _jit


def changed(source: str, old: str, new: str) -> str:
    """The text of a source with `new` in the place of `old`, which has to be there."""
    text = (_jit.kernel_dir() / source).read_text()
    assert old in text, f"{source} no longer has what the bug replaces: {old}"
    return text.replace(old, new)


def put_in(source: str, old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on kernels are compiled from a copy where `new` takes the place of `old`."""
    kernels, text = folder / "kernels_cu", changed(source, old, new)
    shutil.copytree(_jit.kernel_dir(), kernels)
    (kernels / source).write_text(text)
    monkeypatch.setattr(_jit, "kernel_dir", lambda: kernels)
    monkeypatch.setattr(backends, "_emulated_kernel", backends._emulated_kernel.__wrapped__)
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(folder / "cache"))


def assert_noticed(name: str, wanted: str, endings: Iterable[str]) -> None:
    """One of the runs, under one schedule after the other, ends as the bug has to."""
    seen = []
    for ending in endings:
        if re.search(wanted, ending):
            return
        seen.append(ending)
    pytest.fail(f"{name} ended with {seen}")
