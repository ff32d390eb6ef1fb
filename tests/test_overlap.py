"""Whether arrays share memory, decided from addresses."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from cuflash import _overlap
from cuflash._overlap import overlap, overlaps_itself


def test_overlap_agrees_with_numpy() -> None:
    rng = np.random.default_rng(0)
    memory = np.zeros(64, np.uint16)
    for _ in range(500):
        a, b = (random_view(memory, rng) for _ in range(2))
        assert overlap(a, b) == np.shares_memory(a, b)


def test_what_takes_too_long_to_tell_counts_as_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_overlap, "MAX_WORK", 1)
    memory = np.zeros(12_000, np.uint8)
    a = as_strided(memory, (25, 3, 2), (100, 7, 536))
    b = as_strided(memory[30:], (25, 3, 2), (420, 518, 206))
    with pytest.raises(np.exceptions.TooHardError):
        np.shares_memory(a, b, max_work=1)
    assert overlap(a, b)


def test_overlap_of_empty_arrays() -> None:
    memory = np.zeros((4, 4))
    assert not overlap(memory, memory[1:1])
    assert not overlap(memory[:, :0], memory)


def test_views_of_dense_memory_do_not_overlap_themselves() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        assert not overlaps_itself(random_view(np.zeros(64, np.uint16), rng))


@pytest.mark.parametrize(
    ("shape", "strides"), [((3, 2), (0, 2)), ((3, 2), (2, 2)), ((3, 3), (4, 2))]
)
def test_strided_tricks_overlap_themselves(
    shape: tuple[int, int], strides: tuple[int, int]
) -> None:
    array = as_strided(np.zeros(64, np.uint16), shape, strides)
    assert overlaps_itself(array)


def random_view(memory: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    view = memory.reshape(4, 4, 4)
    for axis in range(3):
        start, stop = sorted(rng.integers(0, 5, 2))
        step = rng.choice([1, 2, -1])
        view = np.moveaxis(np.moveaxis(view, axis, 0)[start:stop][::step], 0, axis)
    return view.transpose(rng.permutation(3))
