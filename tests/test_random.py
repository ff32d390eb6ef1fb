"""Philox against its published answers, and its numbers' place, rate and independence."""

from __future__ import annotations

import doctest
import itertools

import numpy as np
import pytest

from cuflash import _random
from cuflash._random import philox, random_bits

SEED = 0x299F31D0A4093822
WORD = 0xFFFFFFFF

# From kat_vectors of the authors' library Random123: counter, key, answer.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def grid(*sizes: int) -> np.ndarray:
    """The bits of the first batch entries, heads, rows and keys."""
    return random_bits(SEED, *map(np.arange, sizes))


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    assert tuple(map(int, philox(counter, key[0] | key[1] << 32))) == answer


def test_each_element_has_its_own_word() -> None:
    indices = np.array([2, 5]), np.array([0, 31]), np.array([0, 7, 8, 24]), np.array([3, 47, 2**31])
    bits = random_bits(SEED, *indices)
    assert bits.shape == (2, 2, 4, 3) and bits.dtype == np.uint32
    for place, (b, h, i, j) in zip(
        np.ndindex(bits.shape), itertools.product(*indices), strict=True
    ):
        words = philox((j // 16 * 8 + j % 8, i // 16 * 8 + i % 8, h, b), SEED)
        assert bits[place] == words[(i // 8 % 2) * 2 + j // 8 % 2]


@pytest.mark.parametrize("strip", [1, 100, 2**20])
def test_any_indices_give_what_the_whole_grid_holds(
    monkeypatch: pytest.MonkeyPatch, strip: int
) -> None:
    whole = grid(2, 3, 100, 150)
    monkeypatch.setattr(_random, "STRIP", strip)
    np.testing.assert_array_equal(grid(2, 3, 100, 150), whole)
    for rows, keys in (
        (np.arange(3, 61), np.arange(17, 18)),
        (np.arange(99, -1, -7), np.array([149, 0, 149, 16])),
        (np.arange(0), np.arange(5)),
    ):
        some = random_bits(SEED, np.array([1]), np.array([2, 0]), rows, keys)
        expected = whole[1:][:, [2, 0]][:, :, rows][..., keys]
        np.testing.assert_array_equal(some, expected)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_both_words_of_the_seed_count(seed: int) -> None:
    one = random_bits(seed, *map(np.arange, (1, 1, 16, 16)))
    for other in (seed ^ 1, seed ^ 2**32):
        assert (one != random_bits(other, *map(np.arange, (1, 1, 16, 16)))).any()


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_as_many_elements_as_the_rate_says_are_below_it(rate: float) -> None:
    below = grid(2, 4, 256, 256) < np.uint32(rate * 2**32)
    deviation = np.sqrt(rate * (1 - rate))
    for axes in (None, (2, 3), (0, 1, 2), (0, 1, 3)):  # of all, a head, a key, a row
        found = below.mean(axis=axes)
        count = below.size // found.size
        # A normal deviate is above 6 once in a thousand million times.
        assert (np.abs(found - rate) <= 6 * deviation / np.sqrt(count)).all()


def test_neighbours_are_independent() -> None:
    """Elements of one counter, of the next counters, and of other heads and entries."""
    signs = np.where(grid(2, 2, 512, 512) < 2**31, -1.0, 1.0)
    for axis, steps in {0: (1,), 1: (1,), 2: (1, 8, 16), 3: (1, 8, 16)}.items():
        for step in steps:
            size = signs.shape[axis]
            first = signs.take(np.arange(size - step), axis)
            second = signs.take(np.arange(step, size), axis)
            assert abs((first * second).sum()) <= 6 * np.sqrt(first.size)


def test_examples_in_docstrings() -> None:
    result = doctest.testmod(_random)
    assert result.attempted > 0 and result.failed == 0
