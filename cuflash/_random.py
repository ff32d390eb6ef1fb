"""Random numbers that depend on where they stand, and on nothing else: Philox4x32-10 [1]_.

Forward, backward, every backend and every size of tile draw the same number for the same element
of the scores, and so drop the same elements.

.. [1] J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel Random Numbers: As Easy as
   1, 2, 3", SC 2011.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # what the two words of the key grow by, round by round
WORD = 0xFFFFFFFF

# One counter serves four elements: rows i and i + 8 with keys j and j + 8.
HALF = 8
BLOCK = 2 * HALF

# Counters at a time, so that the words of a round stay in a core's L2 cache.
STRIP = 2**15


def dropped(
    rate: float,
    seed: int,
    batches: np.ndarray,
    heads: np.ndarray,
    rows: np.ndarray,
    keys: np.ndarray,
) -> np.ndarray:
    """Which elements of a grid dropout sets to 0: bool (batches, heads, rows, keys)."""
    return random_bits(seed, batches, heads, rows, keys) < np.uint32(threshold(rate))


def threshold(rate: float) -> int:
    """Random bits below it drop their element: a share of `rate` of all 2^32."""
    return int(rate * 2**32)


def random_bits(
    seed: int, batches: np.ndarray, heads: np.ndarray, rows: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    """32 random bits for each element of a grid: uint32 (batches, heads, rows, keys).

    `batches`, query `heads`, `rows` and `keys` are arrays of indices, in any order.

    Examples
    --------
    >>> grid = random_bits(7, *map(np.arange, (1, 2, 20, 30)))
    >>> some = random_bits(7, *map(np.array, ([0], [1], [17, 3], [8, 29])))
    >>> bool((some == grid[:, 1:, [[17], [3]], [8, 29]]).all())
    True
    """
    row_blocks, row_places = _blocks(rows)
    key_blocks, key_places = _blocks(keys)
    b, h, i, j = np.ix_(batches, heads, _counters(row_blocks), _counters(key_blocks))
    shape = (len(batches), len(heads), len(row_blocks), 2, HALF, len(key_blocks), 2, HALF)
    bits = np.empty(shape, np.uint32)
    counters_of_row_block = len(batches) * len(heads) * HALF * j.size
    step = max(1, STRIP // max(1, counters_of_row_block))
    for start in range(0, len(row_blocks), step):
        strip = bits[:, :, start : start + step]
        some = i[:, :, start * HALF : (start + step) * HALF]
        for word, x in enumerate(philox((j, some, h, b), seed)):
            part = strip[:, :, :, word // 2, :, :, word % 2]
            part[...] = x.reshape(part.shape)
    bits = bits.reshape(len(batches), len(heads), 2 * i.size, 2 * j.size)
    return bits.take(row_places, axis=2).take(key_places, axis=3)


def philox(
    counter: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], key: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Four words of 32 bits for each counter of four words; the key's lower word comes first.

    The words of the counter broadcast against each other, and are joined as late as can be: the
    first rounds of a grid cost little.
    """
    c0, c1, c2, c3 = (np.asarray(word).astype(np.uint64) for word in counter)
    k0, k1 = key & WORD, key >> 32
    # Two words to a number: (c0, c1) and (c2, c3).
    a, b = (c0 << 32) | c1, (c2 << 32) | c3
    for _ in range(ROUNDS):
        p, q = (a >> 32) * MULTIPLIERS[0], (b >> 32) * MULTIPLIERS[1]
        a, b = q ^ ((a ^ k0) << 32), p ^ ((b ^ k1) << 32)
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return a >> 32, a & WORD, b >> 32, b & WORD


def _blocks(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The blocks of 16 that hold these indices, and where each index stands in their sequence."""
    blocks, which = np.unique(indices // BLOCK, return_inverse=True)
    return blocks, which * BLOCK + indices % BLOCK


def _counters(blocks: np.ndarray) -> np.ndarray:
    """The eight counters of each block, in order."""
    return (blocks[:, None] * HALF + np.arange(HALF)).reshape(-1)
