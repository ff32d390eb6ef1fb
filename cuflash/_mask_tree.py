"""A mask is a tree: its leaves say which queries see which keys, and &, | and ~ join them.

The leaves hold arrays of any framework; `with_arrays` gives the same tree with NumPy or CuPy ones.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, NoReturn

import numpy as np

from cuflash._capture import refuse_to_compile
from cuflash._checks import Array, Check, check_layouts
from cuflash._kept import Found, kept
from cuflash._sizes import Sizes
from cuflash.interop import receive
from cuflash.score_mod import evaluate

MAX_TABLES = 256  # of a compiled mask, as a decoder's growing lengths ask for


class ScoresShape(NamedTuple):
    """Of the scores that a mask is for."""

    batch: int
    heads_q: int
    heads_k: int
    seqlen_q: int
    seqlen_k: int

    @classmethod
    def of(cls, sizes: Sizes) -> ScoresShape:
        """Of a problem of these sizes."""
        return cls(sizes.batch, sizes.heads_q, sizes.heads_k, sizes.seqlen_q, sizes.seqlen_k)

    @property
    def scores(self) -> tuple[int, int, int, int]:
        """(B, Hq, Sq, Sk)."""
        return (self.batch, self.heads_q, self.seqlen_q, self.seqlen_k)


@dataclass(frozen=True, eq=False, repr=False)
class Mask:
    """Which queries see which keys. Join masks by ``&``, ``|`` and ``~``."""

    __array_ufunc__ = None  # so that `array & mask` comes to __rand__
    size = (1, 1)  # leaves, as `leaves` counts them, and how deep the deepest of them stands

    def __and__(self, other: Mask) -> Mask:
        return _checked(And(self, _mask(other, "&")))

    def __or__(self, other: Mask) -> Mask:
        return _checked(Or(self, _mask(other, "|")))

    def __invert__(self) -> Mask:
        return self.inner if isinstance(self, Not) else _checked(Not(self))

    def __rand__(self, other: Any) -> NoReturn:
        _mask(other, "&")

    def __ror__(self, other: Any) -> NoReturn:
        _mask(other, "|")

    def __repr__(self) -> str:
        """Of arrays the dtype and shape: values are many, and may lie on a GPU."""
        shown = (f"{x.name}={_shown(getattr(self, x.name))}" for x in fields(self) if x.repr)
        return f"{type(self).__name__}({', '.join(shown)})"

    def __bool__(self) -> NoReturn:
        raise TypeError("cuflash.masks: a mask is neither true nor false; join masks by &, | and ~")

    def compile(self, q: Array, k: Array) -> Compiled:
        """The same mask, which calls classify once: to be shared by layers and steps.

        A call finds out which tiles the mask hides and which it shows in full. It leaves that with
        a compiled mask, for later calls, forward or backward, whose q, k and options have the same
        shapes and kinds; calls with `q_lens`, `kv_lens` or an offset per batch entry find it out
        for themselves. The mask's arrays must keep their values: compile again when they change,
        which costs nothing but that. Compile what is joined, last: ``compiled & other`` is not
        compiled.

        Parameters
        ----------
        q, k : arrays (B, Sq, Hq, D) and (B, Sk, Hk, D)
            As those of the calls; only their shapes, dtype and device count.

        Returns
        -------
        Compiled
            A mask like any other. Its arrays are on q's device; on a GPU this waits for them.

        Raises
        ------
        TypeError, ValueError, NotImplementedError
            The mask does not fit q and k.

        Examples
        --------
        >>> import numpy as np, cuflash
        >>> q = k = v = np.ones((1, 6, 2, 4), np.float32)
        >>> mask = cuflash.masks.causal() & cuflash.masks.documents(np.array([[0, 0, 0, 1, 1, 1]]))
        >>> mask = mask.compile(q, k)
        >>> for layer in range(2):  # the second classifies nothing
        ...     v = cuflash.attention(q, k, v, mask=mask)
        """
        function = "masks.Mask.compile"
        with receive(function, ("q", "k"), {"q": q, "k": k, "mask": self}) as call:
            if call.is_captured:
                refuse_to_compile(function)
            q, k, mask = (call.arguments[name] for name in ("q", "k", "mask"))
            layouts = [(x.shape, x.strides, x.dtype) for x in (q, k, k)]
            sizes = check_layouts(function, call.device, *layouts)
            mask.check(Check(function, call.device), ScoresShape.of(sizes))
            # What the kernels read, so that no call has to convert it.
            mask = call.on_device(mask).map_integers(call.contiguous_integers)
            call.wait()  # calls on other streams read these arrays without asking
            return Compiled(mask.inner if isinstance(mask, Compiled) else mask)

    def leaves(self) -> list[Leaf]:
        """The leaves, from left to right; one that stands twice counts twice."""
        raise NotImplementedError(
            f"cuflash.masks: a {type(self).__name__} has no rule; expected one of cuflash.masks"
        )

    @property
    def attachments(self) -> int:
        """What it hands to a kernel: its rules, and the arrays that expressions name."""
        leaves = self.leaves()
        return sum(len(x.named) if isinstance(x, Expression) else 1 for x in leaves)

    def arrays(self) -> dict[str, Any]:
        """Every array of the leaves, by a name for messages: the leaf's number, kind and field."""
        return {
            f"mask leaf {number} ({leaf.kind}) {name}": x
            for number, leaf in enumerate(self.leaves())
            for name, x in leaf.own_arrays().items()
        }

    def map_integers(self, convert: Callable[[Array], Array]) -> Mask:
        """The same tree with what `convert` makes of the rules' arrays of integers."""
        arrays = self.arrays()
        for number, leaf in enumerate(self.leaves()):
            for name, x in () if isinstance(leaf, Expression) else leaf.own_arrays().items():
                if x.dtype.kind in "iu":
                    arrays[f"mask leaf {number} ({leaf.kind}) {name}"] = convert(x)
        return self.with_arrays(arrays)

    def with_arrays(self, arrays: Mapping[str, Any]) -> Mask:
        """The same tree with other arrays under the names of `arrays()`."""
        counter = iter(range(len(self.leaves())))
        return self._with_arrays(arrays, counter)

    def _with_arrays(self, arrays: Mapping[str, Any], counter: Any) -> Mask:
        """`counter`: numbers the leaves from left to right."""
        raise NotImplementedError

    def check(self, check: Check, shape: ScoresShape) -> None:
        """Fail where a leaf does not fit scores of this shape."""
        for number, leaf in enumerate(self.leaves()):
            leaf.check_own(check, f"mask leaf {number} ({leaf.kind})", shape)


@dataclass(frozen=True, eq=False, repr=False)
class And(Mask):
    """Visible to both."""

    left: Mask
    right: Mask
    size: tuple[int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _size(self.left, self.right))

    def leaves(self) -> list[Leaf]:
        return self.left.leaves() + self.right.leaves()

    def _with_arrays(self, arrays: Mapping[str, Any], counter: Any) -> Mask:
        left = self.left._with_arrays(arrays, counter)
        return And(left, self.right._with_arrays(arrays, counter))


@dataclass(frozen=True, eq=False, repr=False)
class Or(Mask):
    """Visible to one at least."""

    left: Mask
    right: Mask
    size: tuple[int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _size(self.left, self.right))

    def leaves(self) -> list[Leaf]:
        return self.left.leaves() + self.right.leaves()

    def _with_arrays(self, arrays: Mapping[str, Any], counter: Any) -> Mask:
        left = self.left._with_arrays(arrays, counter)
        return Or(left, self.right._with_arrays(arrays, counter))


@dataclass(frozen=True, eq=False, repr=False)
class Not(Mask):
    """Hidden by it."""

    inner: Mask
    size: tuple[int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _size(self.inner))

    def leaves(self) -> list[Leaf]:
        return self.inner.leaves()

    def _with_arrays(self, arrays: Mapping[str, Any], counter: Any) -> Mask:
        return Not(self.inner._with_arrays(arrays, counter))


@dataclass(frozen=True, eq=False, repr=False)
class Leaf(Mask):
    """A mask of one rule."""

    kind = ""

    def leaves(self) -> list[Leaf]:
        return [self]

    def own_arrays(self) -> dict[str, Any]:
        """The fields that hold arrays, or sequences that stand for one."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: x for name, x in values.items() if not isinstance(x, (int, type(None)))}

    def _with_arrays(self, arrays: Mapping[str, Any], counter: Any) -> Mask:
        prefix = f"mask leaf {next(counter)} ({self.kind}) "
        return replace(self, **{name: arrays[prefix + name] for name in self.own_arrays()})

    def check_own(self, check: Check, name: str, shape: ScoresShape) -> None:
        """Fail where this leaf does not fit scores of this shape; `name` begins messages."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, repr=False)
class Band(Leaf):
    """Key j is visible to query i where i + offset - left <= j <= i + offset + right."""

    left: int | None
    right: int | None
    offset: int | Array | None  # int, (B,) integers, or None: the call's

    @property
    def kind(self) -> str:
        """As what it was made."""
        return "causal" if (self.left, self.right) == (None, 0) else "window"

    def check_own(self, check: Check, name: str, shape: ScoresShape) -> None:
        check.offset(self.offset, shape.batch, f"{name} offset")


@dataclass(frozen=True, eq=False, repr=False)
class Lengths(Leaf):
    """j < kv_lens[b] and i < q_lens[b]."""

    kv_lens: Array | None  # (B,)
    q_lens: Array | None  # (B,)
    kind = "lengths"

    def check_own(self, check: Check, name: str, shape: ScoresShape) -> None:
        check.lengths(f"{name} kv_lens", self.kv_lens, shape.batch, shape.seqlen_k)
        check.lengths(f"{name} q_lens", self.q_lens, shape.batch, shape.seqlen_q)


@dataclass(frozen=True, eq=False, repr=False)
class Documents(Leaf):
    """q_ids[b, i] == kv_ids[b, j]."""

    q_ids: Array  # (B, Sq)
    kv_ids: Array | None  # (B, Sk); None: q_ids
    kind = "documents"

    def check_own(self, check: Check, name: str, shape: ScoresShape) -> None:
        check.integers(f"{name} q_ids", self.q_ids, (shape.batch, shape.seqlen_q))
        kv_name = "q_ids, which are also kv_ids," if self.kv_ids is None else "kv_ids"
        check.integers(f"{name} {kv_name}", self.ids_of_keys, (shape.batch, shape.seqlen_k))

    @property
    def ids_of_keys(self) -> Array:
        """(B, Sk)."""
        return self.q_ids if self.kv_ids is None else self.kv_ids


@dataclass(frozen=True, eq=False, repr=False)
class Prefix(Leaf):
    """j < n[b]."""

    n: Array  # (B,)
    kind = "prefix"

    def check_own(self, check: Check, name: str, shape: ScoresShape) -> None:
        check.lengths(f"{name} n", self.n, shape.batch, shape.seqlen_k)


@dataclass(frozen=True, eq=False, repr=False)
class Intervals(Leaf):
    """Query i lies in no [start[b, h, j, c], end[b, h, j, c]); h is a key head."""

    start: Array  # (B, Hk or 1, Sk, 1 or 2)
    end: Array  # as start
    kind = "intervals"

    def check_own(self, check: Check, name: str, shape: ScoresShape) -> None:
        check.same_shape(f"{name} ", self.start, self.end)
        for side, x in (("start", self.start), ("end", self.end)):
            check.intervals(
                f"{name} {side}", x, shape.batch, shape.heads_k, shape.seqlen_q, shape.seqlen_k
            )


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(Leaf):
    """array[..., i // block_q, j // block_k]."""

    array: Array  # bool, (nq, nk) or (B or 1, Hq or 1, nq, nk)
    block_q: int
    block_k: int
    kind = "blocks"

    def check_own(self, check: Check, name: str, shape: ScoresShape) -> None:
        rows = math.ceil(shape.seqlen_q / self.block_q)
        columns = math.ceil(shape.seqlen_k / self.block_k)
        check.blocks(f"{name} array", self.array, (shape.batch, shape.heads_q, rows, columns))


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Leaf):
    """The array itself."""

    array: Array  # bool, broadcasts to (B, Hq, Sq, Sk)
    kind = "dense"

    def check_own(self, check: Check, name: str, shape: ScoresShape) -> None:
        check.mask(self.array, shape.scores, f"{name} array")


@dataclass(frozen=True, eq=False, repr=False)
class Expression(Leaf):
    """Visible where a user's expression is true."""

    code: str  # CUDA C++ over b, h, i, j and the names of `named`
    named: dict[str, Array]
    function: Callable[..., Any] | None  # of NumPy arrays b, h, i, j and the named ones
    kind = "expression"

    def own_arrays(self) -> dict[str, Any]:
        return dict(self.named)

    def evaluate(self, shape: tuple[int, ...], *place: np.ndarray) -> np.ndarray:
        """What is visible at (b, h, i, j) = place: bool, and broadcasts to `shape`."""
        visible = evaluate(
            "masks.expression: function", self.code, self.function, shape, place, self.named
        )
        return visible.astype(bool, copy=False)

    def _with_arrays(self, arrays: Mapping[str, Any], counter: Any) -> Mask:
        prefix = f"mask leaf {next(counter)} ({self.kind}) "
        return replace(self, named={name: arrays[prefix + name] for name in self.named})

    def check_own(self, check: Check, name: str, shape: ScoresShape) -> None:
        for array_name, x in self.named.items():
            check.named_array(f"{name} {array_name}", x)
        if check.device == "cpu" and self.function is None:
            check.fail(
                NotImplementedError,
                f"{name} has no function; the cpu backend evaluates a NumPy function, "
                "masks.expression(code, function)",
            )


@dataclass(frozen=True, eq=False, repr=False)
class Compiled(Mask):
    """A mask with the tables of its tiles, which calls add and share."""

    inner: Mask
    # By all that they depend on but the mask's data; and those that may never be dropped, by id.
    tables: dict[Any, Any] = field(default_factory=dict, repr=False)
    read_by_graphs: dict[int, Any] = field(default_factory=dict, repr=False)
    size: tuple[int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _size(self.inner))

    def leaves(self) -> list[Leaf]:
        return self.inner.leaves()

    def kept(self, key: Any, find: Callable[[], Found], keeps: bool = True) -> Found:
        """A table from those of this mask, as of `kept`."""
        return kept(self.tables, key, find, MAX_TABLES, keeps)

    def _with_arrays(self, arrays: Mapping[str, Any], counter: Any) -> Mask:
        inner = self.inner._with_arrays(arrays, counter)
        return Compiled(inner, self.tables, self.read_by_graphs)


def _size(*parts: Mask) -> tuple[int, int]:
    """Of what joins them."""
    leaves, depths = zip(*(part.size for part in parts), strict=True)
    return (sum(leaves), 1 + max(depths))


def _checked(mask: Mask) -> Mask:
    Check("masks", "").tree(*mask.size)
    return mask


def _shown(value: Any) -> str:
    """A field's value, short."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_shown(x)}' for name, x in value.items())}}}"
    if isinstance(value, Mask):
        return repr(value)
    if not isinstance(value, type) and hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype} {tuple(value.shape)}"
    return reprlib.repr(value)


def _mask(other: Any, operator: str) -> Mask:
    if isinstance(other, Mask):
        return other
    raise TypeError(
        f"cuflash.masks: {operator} joins a mask and a {type(other).__name__}; expected two masks "
        "(cuflash.masks.dense makes one of a boolean array)"
    )
