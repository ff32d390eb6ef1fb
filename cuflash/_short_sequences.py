"""Short packed sequences, many at once: Python's overhead is paid by the batch.

A batch is a dense problem of one batch entry, whose heads are those of all its sequences:
(T, heads, size) becomes (1, longest, sequences * heads, size). Each is a head of its own to every
matrix product, and so what is not finite stays in its sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cuflash import _work
from cuflash._packed import PackedGradientProblem, PackedProblem
from cuflash._problem import GradientProblem, Problem
from cuflash._sizes import Sizes
from cuflash._tiles import Band
from cuflash._work import Work

# A sequence is short if a batch holds at least this many like it.
SHORTEST_BATCH = 4

# The overhead of a batch, counted in scores that take as long.
COST_OF_BATCH = 2**14

# Lengths are rounded up to one of this many in each doubling; None: they are not rounded.
PADDINGS = (None, 8, 4, 2, 1)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Where each sequence of a batch has its tokens among all tokens."""

    starts: np.ndarray  # (sequences,)
    lengths: np.ndarray

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    @property
    def span(self) -> slice | None:
        """All of them, where they are equally many and lie side by side."""
        start, length = int(self.starts[0]), int(self.lengths[0])
        sides = np.arange(self.starts.size) * length + start
        if (self.lengths == length).all() and (self.starts == sides).all():
            return slice(start, start + self.starts.size * length)
        return None

    @property
    def missing(self) -> np.ndarray:
        """(sequences, longest), True behind the end of a sequence."""
        return np.arange(self.longest) >= self.lengths[:, None]

    def gather(self, x: np.ndarray, padding: float = 0.0) -> np.ndarray:
        """Of (T, heads, size) these tokens: (1, longest, sequences * heads, size), heads apart."""
        heads, size = x.shape[1:]
        count, longest = self.starts.size, self.longest
        if self.span is not None:
            some = x[self.span].reshape(count, longest, heads, size).swapaxes(1, 2)
        else:
            missing = self.missing
            places = self.starts[:, None] + np.where(missing, 0, np.arange(longest))
            some = x[places[:, None], np.arange(heads)[:, None]]
            some.swapaxes(1, 2)[missing] = padding
        return some.reshape(1, count * heads, longest, size).swapaxes(1, 2)

    def scatter(self, some: np.ndarray, x: np.ndarray) -> None:
        """Write these tokens of x, (T, heads, size), from what is as `gather` has it."""
        count, longest = self.starts.size, self.longest
        some = some.reshape(longest, count, *x.shape[1:]).swapaxes(0, 1)
        if self.span is not None:
            x[self.span].reshape(some.shape)[...] = some
        else:
            there = ~self.missing
            x[(self.starts[:, None] + np.arange(longest))[there]] = some[there]


@dataclass(frozen=True, slots=True)
class Batch:
    """Short sequences that are computed at once."""

    sequences: np.ndarray  # their numbers among all
    queries: Tokens
    keys: Tokens

    @classmethod
    def of(cls, problem: PackedProblem, sequences: np.ndarray) -> Batch:
        """Some sequences of a problem."""
        queries, keys = (
            Tokens(cu[sequences], cu[sequences + 1] - cu[sequences])
            for cu in (problem.cu_seqlens_q, problem.cu_seqlens_k)
        )
        return cls(sequences, queries, keys)

    @property
    def scores(self) -> int:
        """How many are computed, by query head."""
        return self.sequences.size * self.queries.longest * self.keys.longest

    def work(self, problem: PackedProblem, splits_rows: bool) -> Work:
        """The batch as a dense problem whose heads are those of its sequences; it is one tile."""
        q, k, v = (
            tokens.gather(x)
            for tokens, x in (
                (self.queries, problem.q),
                (self.keys, problem.k),
                (self.keys, problem.v),
            )
        )
        slopes, sinks, count = problem.alibi_slopes, problem.sinks, self.sequences.size
        if slopes is not None:
            slopes = np.tile(slopes, count) if slopes.ndim == 1 else slopes[self.sequences].ravel()
        dense = Problem(
            device=problem.device,
            sizes=Sizes(q.shape, k.shape, v.shape),
            q=q,
            k=k,
            v=v,
            scale=problem.scale,
            softcap=problem.softcap,
            window=problem.window,
            offset=None,  # the band has it
            q_lens=None,
            kv_lens=None,
            mask=None,
            bias=None,
            alibi_slopes=slopes,
            sinks=None if sinks is None else np.tile(sinks, count),
            dropout=problem.dropout,
            seed=problem.seed,
            score_mod=problem.score_mod,
            out=None,
        )
        band = self.band(problem)
        return Work(dense, splits_rows, share=0.0, sequences=self.sequences, band=band)

    def band(self, problem: PackedProblem) -> Band:
        """What the queries of all its sequences see."""
        offset = self.keys.lengths - self.queries.lengths
        if problem.offset is not None:
            offset = np.broadcast_to(problem.offset, problem.batch)[self.sequences]
        rows, keys = self.queries.longest, self.keys.longest
        left, right = problem.window
        same = (x == x[0] for x in (self.queries.lengths, self.keys.lengths, offset))
        if all(x.all() for x in same):
            at = int(offset[0])
            first, last = (
                (None if left is None else at - left),
                (None if right is None else at + right),
            )
            return Band(rows, keys, first, last, at)
        i, j = np.arange(rows)[:, None], np.arange(keys)
        offset = offset[:, None, None]
        hidden = self.queries.missing[:, :, None] | self.keys.missing[:, None]
        if left is not None:
            hidden |= j < i + (offset - left)
        if right is not None:
            hidden |= j > i + (offset + right)
        hidden, offset = (
            np.repeat(x[:, None], problem.k.shape[1], axis=0) for x in (hidden, offset)
        )
        return Band(rows, keys, None, None, offset, hidden)

    def gradient(self, gradient: PackedGradientProblem, dense: Problem) -> GradientProblem:
        """The gradient's part of the batch; dense: the problem of its work."""
        dout, out = map(self.queries.gather, (gradient.dout, gradient.out))
        dlse, stats = gradient.dlse, gradient.stats
        return GradientProblem(
            forward=dense,
            dout=dout,
            out=out,
            # What is missing is a row that has seen nothing.
            lse=self._rows(gradient.lse, -np.inf),
            dlse=None if dlse is None else self._rows(dlse),
            deterministic=gradient.deterministic,
            stats=None if stats is None else np.stack([self._rows(x) for x in stats]),
        )

    def _rows(self, x: np.ndarray, padding: float = 0.0) -> np.ndarray:
        """Of (heads, T) those of its queries, as of a dense problem: (1, heads, longest)."""
        return self.queries.gather(by_token(x), padding)[..., 0].swapaxes(1, 2)


def by_token(x: np.ndarray) -> np.ndarray:
    """A view: (heads, T) to (T, heads, 1)."""
    return x.T[..., None]


def divide(problem: PackedProblem) -> tuple[list[int], list[Batch]]:
    """The sequences that have queries: those that stand alone, and batches of the others."""
    rows, keys = np.diff(problem.cu_seqlens_q), np.diff(problem.cu_seqlens_k)
    most_rows, most_keys = _work.largest_tile(problem.window)
    group = problem.q.shape[1] // max(1, problem.k.shape[1])
    short = (group * rows <= most_rows) & (keys <= most_keys)
    short &= SHORTEST_BATCH * _sizes(problem, rows, keys) <= _most_elements()
    alone = (~short & (rows > 0)).nonzero()[0].tolist()
    batches = []
    for sequences in _batches(problem, (short & (rows > 0)).nonzero()[0], rows, keys):
        if sequences.size == 1:
            alone += sequences.tolist()
        else:
            batches.append(Batch.of(problem, sequences))
    return sorted(alone), batches


def _batches(
    problem: PackedProblem, short: np.ndarray, rows: np.ndarray, keys: np.ndarray
) -> Iterator[np.ndarray]:
    """These sequences, in batches of the same padded lengths that fit into a tile."""
    if not short.size:
        return
    # By the pair of the lengths, as one number.
    base = int(keys[short].max()) + 1
    pairs, which, counts = np.unique(
        rows[short] * base + keys[short], return_inverse=True, return_counts=True
    )
    lengths = np.divmod(pairs, base)
    # No padding with a user's function: it must not be called with positions that do not exist.
    paddings = PADDINGS if problem.score_mod is None and pairs.size > 1 else PADDINGS[:1]
    best = min((_Padding(problem, lengths, counts, x) for x in paddings), key=lambda x: x.cost)
    group_of_sequence = best.groups[which]
    by_group = short[np.argsort(group_of_sequence, kind="stable")]
    stops = np.cumsum(np.bincount(group_of_sequence))
    for some, most in zip(np.split(by_group, stops[:-1]), best.most.tolist(), strict=True):
        yield from np.split(some, range(most, some.size, most))


class _Padding:
    """Pairs of lengths (queries, keys) in groups of which each is padded to one pair.

    counts: how many sequences have each pair; lengths_per_doubling: as in PADDINGS.
    """

    def __init__(
        self,
        problem: PackedProblem,
        lengths: tuple[np.ndarray, np.ndarray],
        counts: np.ndarray,
        lengths_per_doubling: int | None,
    ) -> None:
        rows, keys = (_padded(x, lengths_per_doubling) for x in lengths)
        base = int(keys.max()) + 1
        pairs, self.groups = np.unique(rows * base + keys, return_inverse=True)
        rows, keys = np.divmod(pairs, base)
        self.most = np.maximum(1, _most_elements() // np.maximum(1, _sizes(problem, rows, keys)))
        sequences = np.bincount(self.groups, counts)
        scores = sequences * rows * keys * problem.q.shape[1]
        self.cost = float((COST_OF_BATCH * np.ceil(sequences / self.most) + scores).sum())


def _padded(lengths: np.ndarray, lengths_per_doubling: int | None) -> np.ndarray:
    """Lengths, each rounded up as PADDINGS says."""
    if lengths_per_doubling is None:
        return lengths
    _, exponents = np.frexp(np.maximum(lengths - 1, 0))
    steps = np.maximum(1, 2 ** np.maximum(exponents - 1, 0) // lengths_per_doubling)
    return -(-lengths // steps) * steps


def _most_elements() -> int:
    """Of each array of a batch: half a tile, small enough that malloc reuses its memory."""
    return math.prod(_work.TILE) // 2


def _sizes(problem: PackedProblem, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The elements of the largest array that sequences of such lengths need, scores among them."""
    (_, heads_q, head_dim), (_, heads_k, head_dim_v) = problem.q.shape, problem.v.shape
    widest = max(head_dim, head_dim_v)
    return np.maximum(heads_q * rows * np.maximum(keys, widest), heads_k * keys * widest)
