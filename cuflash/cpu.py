"""Attention on NumPy arrays: FlashAttention's tiles in O(S) memory, on every core.

A column rides along with each operand, so that a tile costs little but its matrix products and
one exponential:

    [q * scale, -reference] @ [k, 1]ᵀ = scores - reference       what the exponential is taken of
    probs @ [v, 1]                    = [numerator, denominator] of the softmax
    [dout, -delta] @ [v, 1]ᵀ          = dprobs - delta           gradient of the scores / probs

Forward, the reference of a row is any number so close to its largest score that exponentials
neither overflow nor vanish: 0, until a sum of them says otherwise. Backward, it is the row's lse.

A tile is (heads, group * rows, keys): some key heads of one batch entry, and for each of them all
query heads that read it, so that k and v are read once per group and never repeated. Tiles depend
on the shapes alone, not on the number of threads, and so does every bit of the result.

Inside, scores are in units of log 2, because exp2 is twice as fast as exp.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import numpy as np

from cuflash._problem import GradientProblem, Gradients, Problem
from cuflash._threads import for_each
from cuflash._tiles import Band, blocks, visible_tiles

# The scores of one tile fit a core's L2 cache: 256 x 512 float32 is half a MiB.
TILE_ROWS = 256
TILE_KEYS = 512

# Heads, rows and keys are split until there are this many tasks: by shape, for any machine.
MANY_TASKS = 16

# A row's reference stays while its sum of exponentials is between 1 / LARGEST_SUM and LARGEST_SUM.
LARGEST_SUM = 2.0**24

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)


def forward(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Attention's (out, lse)."""
    work = _Work(problem)
    out = np.empty(problem.out_shape, problem.dtype) if problem.out is None else problem.out
    lse = np.full(problem.lse_shape, -np.inf, work.dtype)
    for batch, band in enumerate(work.bands):
        out[batch, band.rows :] = 0
    out_by_head, lse_by_head = work.by_key_head(out), work.rows_by_key_head(lse)

    def attend(task: tuple[_Item, slice]) -> None:
        item, rows = task
        with np.errstate(all="ignore"):
            _attend(item, rows, out_by_head[item.index], lse_by_head[item.index])

    tasks = [
        (item, rows)
        for item in work.items()
        for rows in blocks(slice(0, item.band.rows), work.task_rows)
    ]
    for_each(attend, tasks[::-1])  # causal: the last rows take longest, so they come first
    return out, lse


def backward(gradient: GradientProblem) -> Gradients:
    """The gradients of q, k, v and the bias."""
    work = _Work(gradient.forward)
    sums = _GradientSums(work)

    def differentiate(task: tuple[int, list[_Item]]) -> None:
        split, family = task
        with np.errstate(all="ignore"):
            for item in family:
                _differentiate(item, gradient, sums, split)

    families = work.families()
    for_each(differentiate, [(split, one) for split in range(sums.splits) for one in families])
    return sums.gradients()


def _attend(item: _Item, rows: slice, out: np.ndarray, lse: np.ndarray) -> None:
    """Write some rows of out (heads, group, Sq, Dv) and lse (heads, group, Sq)."""
    work = item.work
    softmaxes = {}
    for tile_rows in blocks(rows, work.tile_rows):
        query = item.query(tile_rows)
        sums = np.zeros((*query.shape[:2], work.v.shape[-1] + 1), work.dtype)
        softmaxes[tile_rows.start] = _OnlineSoftmax(work, query, sums)
    for keys in blocks(item.band.keys_of(rows), work.tile_keys):
        loaded = item.load_keys(keys)
        for tile_rows, seen in visible_tiles(item.band, rows, keys, work.tile_rows):
            tile = item.tile(tile_rows, seen, loaded)
            if tile is not None:
                softmaxes[tile_rows.start].step(tile)
    for tile_rows in blocks(rows, work.tile_rows):
        softmaxes[tile_rows.start].write(out[:, :, tile_rows], lse[:, :, tile_rows])


@dataclass(frozen=True, slots=True)
class _OnlineSoftmax:
    """What a tile of rows has gathered from the keys seen so far."""

    work: _Work
    query: np.ndarray  # (heads, group * rows, D + 1), scaled, the last column -reference
    sums: np.ndarray  # (heads, group * rows, Dv + 1): numerator, and denominator in the last column

    def step(self, tile: _Tile) -> None:
        """Attend to one more tile of keys."""
        scores = _scores(self.work, self.query, tile)
        probs = _hide(_exp2(scores), tile.hidden, 0)
        gathered = _product(probs, tile.value, tile.hidden)
        if not self.in_range(gathered, tile.hidden):
            scores = _scores(self.work, self.query, tile)
            self.raise_reference(_hide(scores, tile.hidden, -np.inf))
            probs = _exp2(scores)
            gathered = _product(probs, tile.value, tile.hidden)
        self.sums[...] += gathered

    def in_range(self, gathered: np.ndarray, hidden: np.ndarray | None) -> bool:
        """Whether no row's exponentials overflowed or vanished; NaN is out of range."""
        denominator = gathered[..., -1]
        if not denominator.max() <= LARGEST_SUM:
            return False
        if denominator.min() >= 1 / LARGEST_SUM:
            return True
        fits = self.sums[..., -1] + denominator >= 1 / LARGEST_SUM
        return bool(fits.all() or (hidden is not None and (fits | hidden.all(axis=-1)).all()))

    def raise_reference(self, scores: np.ndarray) -> None:
        """Make each row's reference its largest score so far, in scores, query and sums alike."""
        top = scores.max(axis=-1, keepdims=True)
        seen = self.sums[..., -1:] > 0
        rise = np.where(seen, np.maximum(top, 0), top)
        rise[rise == -np.inf] = 0  # a row that has seen nothing yet
        scores -= rise
        self.query[..., -1:] -= rise
        self.sums[...] *= np.where(seen, np.exp2(-rise), 0)

    def write(self, out: np.ndarray, lse: np.ndarray) -> None:
        """Finish: out (heads, group, rows, Dv) and lse (heads, group, rows)."""
        denominator = self.sums[..., -1].reshape(lse.shape)
        numerator = self.sums[..., :-1].reshape(out.shape)
        seen_nothing = denominator == 0
        divisor = np.where(seen_nothing, 1, denominator)[..., None]
        np.divide(numerator, divisor, out=out, casting="same_kind")
        np.log2(denominator, out=lse)
        lse -= self.query[..., -1].reshape(lse.shape)
        lse *= LN_2
        np.copyto(lse, -np.inf, where=seen_nothing)


def _differentiate(item: _Item, gradient: GradientProblem, sums: _GradientSums, split: int) -> None:
    """Add what every `splits`-th block of keys contributes to the gradients of some heads."""
    work, band = item.work, item.band
    every_row = slice(0, band.rows)
    row_blocks = [
        _RowBlock.load(item, gradient, rows) for rows in blocks(every_row, work.tile_rows)
    ]
    for keys in list(blocks(slice(0, band.keys), work.tile_keys))[split :: sums.splits]:
        loaded = item.load_keys(keys)
        dkey, dvalue = np.zeros_like(loaded.key[..., :-1]), np.zeros_like(loaded.value[..., :-1])
        for rows, seen in visible_tiles(band, every_row, keys, work.tile_rows):
            tile = item.tile(rows, seen, loaded)
            if tile is None:
                continue
            block = row_blocks[rows.start // work.tile_rows]
            probs, dscores, slope = block.differentiate_softmax(work, tile)
            sums.add_bias(item, rows, seen, split, dscores)
            if slope is not None:
                dscores *= slope
            part, hidden_t = loaded.part(seen), _transposed(tile.hidden)
            dvalue[part] += _product(_transposed(probs), block.dout[..., :-1], hidden_t)
            dkey[part] += _product(_transposed(dscores), block.query[..., :-1], hidden_t)
            block.dquery[...] += _product(dscores, tile.key[..., :-1], tile.hidden)
        sums.dk[item.index][:, 0, keys] = dkey * LN_2
        sums.dv[item.index][:, 0, keys] = dvalue
    for block in row_blocks:
        target = sums.dq[split][item.index][:, :, block.rows]
        dquery = block.dquery.reshape(target.shape)
        np.multiply(dquery, work.problem.scale, out=target, casting="same_kind")


@dataclass(frozen=True, slots=True)
class _RowBlock:
    """A tile of rows in the backward pass."""

    rows: slice
    query: np.ndarray  # (heads, group * rows, D + 1), scaled, the last column -lse
    dout: np.ndarray  # (heads, group * rows, Dv + 1), the last column -delta
    dquery: np.ndarray  # (heads, group * rows, D), to be scaled

    @classmethod
    def load(cls, item: _Item, gradient: GradientProblem, rows: slice) -> _RowBlock:
        work = item.work

        def some(x: np.ndarray) -> np.ndarray:
            return x[item.index][:, :, rows]

        lse = some(work.rows_by_key_head(gradient.lse))
        # A row that has seen nothing gets the probability exp(score - inf) = 0 everywhere.
        reference = np.where(lse == -np.inf, np.inf, lse * LOG2_E)
        query = item.query(rows)
        query[..., -1] = -reference.reshape(query.shape[:2])
        out, dout = (
            some(work.by_key_head(x)).astype(work.dtype, copy=False)
            for x in (gradient.out, gradient.dout)
        )
        delta = np.vecdot(out, dout)
        if gradient.dlse is not None:
            delta -= some(work.rows_by_key_head(gradient.dlse))
        dquery = np.zeros((*query.shape[:2], query.shape[2] - 1), work.dtype)
        return cls(rows, query, _with_column(dout, -delta, work.dtype), dquery)

    def differentiate_softmax(
        self, work: _Work, tile: _Tile
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Probabilities, the gradient of the scores, and the slope of the softcap."""
        shape = (*self.query.shape[:2], tile.key.shape[1])
        slope = work.scratch.array(2, shape) if work.softcap else None
        scores = _scores(work, self.query, tile, slope)
        probs = _hide(_exp2(scores), tile.hidden, 0)
        dscores = work.scratch.array(1, shape)
        np.matmul(self.dout, _transposed(tile.value), out=dscores)
        dscores *= probs
        return probs, _hide(dscores, tile.hidden, 0), slope


class _GradientSums:
    """Where the gradients are added up; no two tasks add to the same elements."""

    def __init__(self, work: _Work) -> None:
        problem = work.problem
        self.work = work
        key_blocks = math.ceil(problem.seqlen_k / work.tile_keys)
        self.splits = max(1, min(key_blocks, MANY_TASKS // max(1, len(work.families()))))
        # Splits of the keys share the rows of dq: each has a copy, and these are summed in order.
        dtype = problem.dtype if self.splits == 1 else work.dtype
        self.dq_copies = np.zeros((self.splits, *problem.q.shape), dtype)
        self.dq = [work.by_key_head(copy) for copy in self.dq_copies]
        self.all_dk = np.zeros(problem.k.shape, problem.dtype)
        self.all_dv = np.zeros(problem.v.shape, problem.dtype)
        self.dk, self.dv = work.by_key_head(self.all_dk, 1), work.by_key_head(self.all_dv, 1)
        if problem.bias is not None:
            # Splits have keys of their own, and share dbias only where all keys share a bias.
            copies = self.splits if work.bias_shape[3] == 1 else 1
            self.dbias_copies = np.zeros((copies, *work.bias_shape), work.dtype)

    def add_bias(
        self, item: _Item, rows: slice, keys: slice, split: int, dscores: np.ndarray
    ) -> None:
        """Add a tile's part of dbias, summed along the axes that share a bias."""
        if self.work.problem.bias is None:
            return
        dbias = self.work.scores_by_key_head(self.dbias_copies[split % len(self.dbias_copies)])
        batch = slice(item.batch, item.batch + 1)
        index = (batch, item.heads, slice(None), rows, keys)
        shared = [n == 1 for n in dbias.shape]
        target = dbias[
            tuple(slice(None) if one else i for one, i in zip(shared, index, strict=True))
        ]
        by_head = dscores.reshape(1, dscores.shape[0], self.work.group, -1, dscores.shape[-1])
        axes = tuple(axis for axis, one in enumerate(shared) if one)
        target += by_head.sum(axis=axes, keepdims=True)

    def gradients(self) -> Gradients:
        """The finished gradients in the dtypes of their inputs."""
        problem, dbias = self.work.problem, None
        if problem.bias is not None:
            dbias = _sum_of(self.dbias_copies, problem.bias.dtype).reshape(problem.bias.shape)
        return Gradients(_sum_of(self.dq_copies, problem.dtype), self.all_dk, self.all_dv, dbias)


class _Scratch(threading.local):
    """Each thread's room for the scores of a tile, and for what has their shape."""

    def __init__(self, size: int, dtype: np.dtype) -> None:
        self.size, self.dtype = size, dtype
        self.buffers: dict[int, np.ndarray] = {}

    def array(self, index: int, shape: tuple[int, ...]) -> np.ndarray:
        """The buffer of this index as a contiguous array, with whatever it holds."""
        if index not in self.buffers:
            self.buffers[index] = np.empty(self.size, self.dtype)
        return self.buffers[index][: math.prod(shape)].reshape(shape)


class _Work:
    """A problem's arrays by key head, and how they are cut."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.dtype = problem.lse_dtype
        self.group = problem.group
        self.scale = problem.scale * LOG2_E
        self.softcap = problem.softcap * LOG2_E
        self.q = self.by_key_head(problem.q)
        self.k, self.v = (self.by_key_head(x, 1) for x in (problem.k, problem.v))
        scores_shape = (problem.batch, problem.heads_q, problem.seqlen_q, problem.seqlen_k)
        self.mask, self.bias = (
            None if x is None else self.scores_by_key_head(np.broadcast_to(x, scores_shape))
            for x in (problem.mask, problem.bias)
        )
        self.bands = [Band.of(problem, batch) for batch in range(problem.batch)]
        self.tile_rows = max(1, min(problem.seqlen_q, TILE_ROWS // self.group))
        self.tile_keys = max(1, min(problem.seqlen_k, TILE_KEYS))
        items = problem.batch * problem.heads_k
        tile_size = self.group * self.tile_rows * self.tile_keys
        self.tile_heads = max(1, min(TILE_ROWS * TILE_KEYS // tile_size, items // MANY_TASKS))
        tiles = math.ceil(problem.seqlen_q / self.tile_rows)
        tasks_of_item = math.ceil(MANY_TASKS / max(1, items))
        self.task_rows = self.tile_rows * max(1, tiles // tasks_of_item)
        self.scratch = _Scratch(self.tile_heads * tile_size, self.dtype)

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """The bias's own shape, with all four axes."""
        return (1,) * (4 - self.problem.bias.ndim) + self.problem.bias.shape

    def items(self) -> list[_Item]:
        """What shares no output."""
        heads = list(blocks(slice(0, self.problem.heads_k), self.tile_heads))
        return [_Item(self, batch, some) for batch in range(self.problem.batch) for some in heads]

    def families(self) -> list[list[_Item]]:
        """Items that share elements of dbias: one thread adds to them, in order."""
        shared = (False, False)
        if self.bias is not None:
            shared = (self.bias_shape[0] == 1, self.bias_shape[1] == 1)
        families: dict[tuple[int, int], list[_Item]] = {}
        for item in self.items():
            key = (0 if shared[0] else item.batch, 0 if shared[1] else item.heads.start)
            families.setdefault(key, []).append(item)
        return list(families.values())

    def by_key_head(self, x: np.ndarray, group: int | None = None) -> np.ndarray:
        """A view: (B, S, H, D) to (B, Hk, group, S, D)."""
        group = self.group if group is None else group
        batch, seqlen, heads, size = x.shape
        return x.reshape(batch, seqlen, heads // group, group, size).transpose(0, 2, 3, 1, 4)

    def rows_by_key_head(self, x: np.ndarray) -> np.ndarray:
        """A view: (B, Hq, Sq) to (B, Hk, group, Sq)."""
        return x.reshape(x.shape[0], x.shape[1] // self.group, self.group, x.shape[2])

    def scores_by_key_head(self, x: np.ndarray) -> np.ndarray:
        """A view: (B or 1, Hq or 1, Sq or 1, Sk or 1) to (B, Hk, group, Sq, Sk), or 1 likewise."""
        group = 1 if x.shape[1] == 1 else self.group
        return x.reshape(x.shape[0], x.shape[1] // group, group, *x.shape[2:])


@dataclass(frozen=True, slots=True)
class _LoadedKeys:
    """A block of keys, ready for matrix products."""

    keys: slice
    key: np.ndarray  # (heads, keys, D + 1), the last column 1
    value: np.ndarray  # (heads, keys, Dv + 1), the last column 1

    def part(self, seen: slice) -> tuple[slice, slice]:
        """The index of some of these keys."""
        return (slice(None), slice(seen.start - self.keys.start, seen.stop - self.keys.start))


@dataclass(frozen=True, slots=True)
class _Tile:
    """What a tile of rows reads of a block of keys."""

    key: np.ndarray  # (heads, keys, D + 1)
    value: np.ndarray  # (heads, keys, Dv + 1)
    bias: np.ndarray | None  # (heads, group, rows, keys)
    hidden: np.ndarray | None  # (1 or heads, group * rows, keys), True where not seen


@dataclass(frozen=True, slots=True)
class _Item:
    """Some key heads of one batch entry, and the query heads that read them."""

    work: _Work
    batch: int
    heads: slice

    @property
    def index(self) -> tuple[int, slice]:
        """Into arrays by key head."""
        return (self.batch, self.heads)

    @property
    def band(self) -> Band:
        return self.work.bands[self.batch]

    def query(self, rows: slice) -> np.ndarray:
        """(heads, group * rows, D + 1), scaled, the last column 0."""
        query = _with_column(self.work.q[self.index][:, :, rows], 0, self.work.dtype)
        query *= self.work.scale
        return query

    def load_keys(self, keys: slice) -> _LoadedKeys:
        key, value = (
            _with_column(x[self.index][:, :, keys], 1, self.work.dtype)
            for x in (self.work.k, self.work.v)
        )
        return _LoadedKeys(keys, key, value)

    def tile(self, rows: slice, seen: slice, loaded: _LoadedKeys) -> _Tile | None:
        """One tile, or None if a mask hides all of it."""
        hidden = self.hidden(rows, seen)
        if hidden is not None and hidden.all():
            return None
        part = loaded.part(seen)
        bias = None
        if self.work.bias is not None:
            bias = self.work.bias[self.index][:, :, rows, seen]
        return _Tile(loaded.key[part], loaded.value[part], bias, hidden)

    def hidden(self, rows: slice, keys: slice) -> np.ndarray | None:
        """(1 or heads, group * rows, keys), True where not seen; None if all see all."""
        hidden = self.band.hidden(rows, keys)
        if self.work.mask is not None:
            masked = ~self.work.mask[self.index][:, :, rows, keys]
            hidden = masked if hidden is None else hidden | masked
        if hidden is None or not hidden.any():
            return None
        *heads, _, _ = hidden.shape or (1,)
        group = (self.work.group,) if not heads else ()
        whole = np.broadcast_to(hidden, (*heads, *group, *hidden.shape[-2:]))
        return whole.reshape(-1, self.work.group * hidden.shape[-2], hidden.shape[-1])


def _scores(
    work: _Work, query: np.ndarray, tile: _Tile, slope: np.ndarray | None = None
) -> np.ndarray:
    """(heads, group * rows, keys): the scores less their row's reference; and softcap's slope."""
    scores = work.scratch.array(0, (*query.shape[:2], tile.key.shape[1]))
    if work.softcap:
        np.matmul(query[..., :-1], _transposed(tile.key[..., :-1]), out=scores)
        scores /= work.softcap
        np.tanh(scores, out=scores)
        if slope is not None:
            np.multiply(scores, scores, out=slope)
            np.subtract(1, slope, out=slope)
        scores *= work.softcap
        scores += query[..., -1:]
    else:
        np.matmul(query, _transposed(tile.key), out=scores)
    if tile.bias is not None:
        by_head = scores.reshape(tile.bias.shape)
        by_head += tile.bias * np.asarray(LOG2_E, work.dtype)
    return scores


def _exp2(x: np.ndarray) -> np.ndarray:
    """2 to the power of x, in place."""
    # Where results underflow, NumPy's exp2 is a hundred times slower, and its exp is not.
    if x.min(initial=0) >= np.finfo(x.dtype).minexp:
        return np.exp2(x, out=x)
    x *= LN_2
    return np.exp(x, out=x)


def _hide(x: np.ndarray, hidden: np.ndarray | None, value: float) -> np.ndarray:
    """Overwrite what is not seen, in place."""
    if hidden is not None:
        np.copyto(x, value, where=hidden)
    return x


def _product(weights: np.ndarray, values: np.ndarray, hidden: np.ndarray | None) -> np.ndarray:
    """weights @ values; a hidden pair adds nothing, although 0 * NaN and 0 * inf are NaN."""
    if hidden is None or np.isfinite(values).all():
        return weights @ values
    bad = ~np.isfinite(values).all(axis=-1)
    product = weights @ np.where(bad[..., None], 0, values)
    hidden = np.broadcast_to(hidden, weights.shape)
    for head, i in zip(*bad.nonzero(), strict=True):
        seen = ~hidden[head, :, i]
        product[head, seen] += weights[head, seen, i, None] * values[head, i]
    return product


def _with_column(x: np.ndarray, column: np.ndarray | float, dtype: np.dtype) -> np.ndarray:
    """(heads, group, rows, size) to a new (heads, group * rows, size + 1) with a last column."""
    heads, group, rows, size = x.shape
    wider = np.empty((heads, group, rows, size + 1), dtype)
    wider[..., :-1] = x
    wider[..., -1] = column
    return wider.reshape(heads, group * rows, size + 1)


def _transposed(x: np.ndarray | None) -> np.ndarray | None:
    return None if x is None else x.swapaxes(-1, -2)


def _sum_of(copies: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The sum along the first axis, in order."""
    total = copies[0] if len(copies) == 1 else copies.sum(axis=0)
    return total.astype(dtype, copy=False)
