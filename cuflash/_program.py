"""A mask's tree and a score function → the CUDA source of a call's own, and what it reads.

The source depends on the structure alone, so that new data compile nothing. What it reads are
attachments, 64 bytes each: the structures of kernels_cu/leaves.cuh.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import singledispatch
from itertools import count
from struct import Struct
from typing import Any, NamedTuple

import numpy as np

from cuflash._checks import BFLOAT16, FLOAT16
from cuflash._mask_tree import (
    And,
    Band,
    Blocks,
    Compiled,
    Dense,
    Documents,
    Expression,
    Intervals,
    Leaf,
    Lengths,
    Mask,
    Not,
    Or,
    Prefix,
)
from cuflash._overlap import address
from cuflash._problem import Array, Problem
from cuflash.score_mod import ScoreMod

ATTACHMENT_BYTES = 64
UNBOUNDED = 1 << 61  # beyond any offset, and far enough from the ends of 64 bits to be added to it

_C_TYPES = {
    np.dtype(np.bool_): "bool",
    np.dtype(np.int32): "int",
    np.dtype(np.int64): "i64",
    FLOAT16: "Half",
    BFLOAT16: "BFloat16",
    np.dtype(np.float32): "float",
}


class Program(NamedTuple):
    """A call's own source, and how many attachments it reads."""

    source: str = ""  # empty: the call has neither a mask nor a score function
    attachments: int = 0
    has_mask: bool = False
    has_score_mod: bool = False


@dataclass(frozen=True)
class Bits:
    """A Dense leaf's array as mask_bits.cu packs it."""

    words: Array  # (B or 1, Hq or 1, Sq or 1, words)
    keys: int  # 1 where all keys share a bit


def program(mask: Mask | None, score_mod: ScoreMod | None) -> Program:
    """The source of a call's mask and score function."""
    if mask is None and score_mod is None:
        return Program()
    writer = _Writer()
    condition = "" if mask is None else writer.condition(mask)
    functions = writer.functions
    if score_mod is not None:
        derivative = score_mod.backward or "0.f"
        functions += [
            "constexpr bool kHasScoreMod = true;",
            writer.score_function("score_mod", "ScoreMod.forward", score_mod.forward, score_mod),
            writer.score_function(
                "score_mod_derivative", "ScoreMod.backward", derivative, score_mod
            ),
        ]
        writer.used += len(score_mod.named)
    else:
        functions += [_NO_SCORE_MOD]
    functions += [_tree(condition) if mask is not None else _NO_TREE]
    source = "\n".join(["#pragma once", '#include "leaves.cuh"', *functions, ""])
    return Program(source, writer.used, mask is not None, score_mod is not None)


def mask_attachments(mask: Mask, group: int, bits: dict[int, Bits]) -> bytes:
    """What the program reads of a mask; `bits`: of every Dense leaf, by its number."""
    packed = []
    for number, leaf in enumerate(mask.leaves()):
        if isinstance(leaf, Expression):
            packed += map(_named_array, leaf.named.values())
        elif isinstance(leaf, Dense):
            packed.append(_dense(bits[number]))
        else:
            packed.append(_pack(leaf, group))
    return _padded(packed)


def score_mod_attachments(score_mod: ScoreMod) -> bytes:
    """What the program reads of a score function."""
    return _padded(map(_named_array, score_mod.named.values()))


def _padded(packed: Iterable[bytes]) -> bytes:
    return b"".join(one.ljust(ATTACHMENT_BYTES, b"\0") for one in packed)


def depends_on_batch(problem: Problem) -> bool:
    """Whether batch entries may see different tiles."""
    lengths = (problem.q_lens, problem.kv_lens)
    own = any(x is not None for x in lengths) or _is_array(problem.offset)
    return own or any(map(_leaf_depends_on_batch, problem.mask.leaves()))


def depends_on_head(mask: Mask) -> bool:
    """Whether heads may see different tiles."""
    return any(map(_leaf_depends_on_head, mask.leaves()))


_NO_SCORE_MOD = """\
constexpr bool kHasScoreMod = false;
DEVICE float score_mod(const Problem&, float score, const Place&) { return score; }
DEVICE float score_mod_derivative(const Problem&, float, const Place&) { return 1.f; }"""

_NO_TREE = """\
constexpr bool kHasTree = false;
DEVICE bool tree_sees(const Problem&, const Place&) { return true; }
DEVICE Sight tree_sees(const Problem&, const Region&) { return kAll; }"""


def _tree(condition: str) -> str:
    return f"""\
constexpr bool kHasTree = true;
template <class Where>
DEVICE auto tree_sees(const Problem& p, const Where& at) {{
  return {condition};
}}"""


class _Writer:
    """Counts attachments while it writes."""

    def __init__(self) -> None:
        self.used = 0
        self.functions: list[str] = []

    def condition(self, mask: Mask) -> str:
        """C++ that is true where the tree sees, of a Place or a Region `at`."""
        match mask:
            case And(left, right):
                return f"both({self.condition(left)}, {self.condition(right)})"
            case Or(left, right):
                return f"either({self.condition(left)}, {self.condition(right)})"
            case Not(inner):
                return f"opposite({self.condition(inner)})"
            case Compiled(inner):
                return self.condition(inner)
            case Expression():
                return self._expression(mask)
        number = self.used
        self.used += 1
        return f"attached<{type(mask).__name__}Leaf>(p, {number}).sees(at)"

    def _expression(self, leaf: Expression) -> str:
        name = f"expression_{len(self.functions)}"
        body = _body("masks.expression", leaf.code, self._named(leaf.named))
        self.functions += [
            f"DEVICE bool {name}(const Problem& p, const Place& at) {{\n{body}}}",
            f"DEVICE Sight {name}(const Problem&, const Region&) {{ return kSome; }}",
        ]
        self.used += len(leaf.named)
        return f"{name}(p, at)"

    def score_function(self, name: str, file: str, code: str, score_mod: ScoreMod) -> str:
        """A function of a score and its place."""
        body = _body(file, code, self._named(score_mod.named))
        return f"DEVICE float {name}(const Problem& p, float score, const Place& at) {{\n{body}}}"

    def _named(self, named: Any) -> Iterator[str]:
        """Declarations of the arrays that an expression reads."""
        for (name, x), number in zip(named.items(), count(self.used), strict=False):
            named_array = f"NamedArray<{', '.join([_C_TYPES[x.dtype]] + ['i64'] * x.ndim)}>"
            yield f"  const auto& {name} = attached<{named_array}>(p, {number});"


def _body(file: str, code: str, declarations: Iterator[str]) -> str:
    """A user's expression between lines of ours; the compiler counts its lines from 1 in `file`."""
    place = "  [[maybe_unused]] const int b = at.b, h = at.h, i = at.i, j = at.j;"
    lines = [
        place,
        *declarations,
        "  return (",
        f'#line 1 "{file}"',
        code,
        "  );",
        '#line 1 "generated.cuh"',
    ]
    return "\n".join([*lines, ""])


@singledispatch
def _pack(leaf: Leaf, group: int) -> bytes:
    """The leaf's structure in leaves.cuh; its integers are contiguous int64."""
    raise NotImplementedError(type(leaf).__name__)


@_pack.register
def _(leaf: Band, group: int) -> bytes:
    offset = leaf.offset
    is_int = isinstance(offset, int)
    return Struct("2qQ2q").pack(
        UNBOUNDED if leaf.left is None else min(leaf.left, UNBOUNDED),
        UNBOUNDED if leaf.right is None else min(leaf.right, UNBOUNDED),
        address(offset) if _is_array(offset) else 0,
        offset if is_int else 0,
        is_int,
    )


@_pack.register
def _(leaf: Lengths, group: int) -> bytes:
    lengths = (leaf.kv_lens, leaf.q_lens)
    return Struct("2Q").pack(*(0 if x is None else address(x) for x in lengths))


@_pack.register
def _(leaf: Documents, group: int) -> bytes:
    ids = (leaf.q_ids, leaf.ids_of_keys)
    return Struct("2Q2q").pack(*map(address, ids), *(x.shape[1] for x in ids))


@_pack.register
def _(leaf: Prefix, group: int) -> bytes:
    return Struct("Q").pack(address(leaf.n))


@_pack.register
def _(leaf: Intervals, group: int) -> bytes:
    _, heads, keys, intervals = leaf.start.shape
    return Struct("2Q2q2i").pack(
        address(leaf.start),
        address(leaf.end),
        heads * keys * intervals,
        0 if heads == 1 else keys * intervals,
        intervals,
        group,
    )


@_pack.register
def _(leaf: Blocks, group: int) -> bytes:
    strides = _broadcast_strides(leaf.array.shape, leaf.array.strides)
    return Struct("Q4q2i").pack(address(leaf.array), *strides, leaf.block_q, leaf.block_k)


def _dense(bits: Bits) -> bytes:
    strides = _broadcast_strides(bits.words.shape, bits.words.strides)
    itemsize = bits.words.itemsize
    return Struct("Q4q").pack(
        address(bits.words), *(stride // itemsize for stride in strides[:3]), bits.keys - 1
    )


def _named_array(x: Array) -> bytes:
    missing = 4 - x.ndim
    return Struct("Q4i4q").pack(address(x), *x.shape, *[1] * missing, *x.strides, *[0] * missing)


def _broadcast_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """Of four axes, in bytes: 0 along those of one element."""
    own = [0 if n == 1 else stride for n, stride in zip(shape, strides, strict=True)]
    return [0] * (4 - len(shape)) + own


def _leaf_depends_on_batch(leaf: Leaf) -> bool:
    match leaf:
        case Band(offset=offset):
            return _is_array(offset)
        case Expression(code):
            return _names(code, "b")
        case Dense(array) | Blocks(array):
            return array.ndim == 4 and array.shape[0] > 1
    return True


def _leaf_depends_on_head(leaf: Leaf) -> bool:
    match leaf:
        case Expression(code):
            return _names(code, "h")
        case Intervals(start):
            return start.shape[1] > 1
        case Dense(array) | Blocks(array):
            return array.ndim >= 3 and array.shape[-3] > 1
    return False


def _names(code: str, variable: str) -> bool:
    """Whether an expression may read a variable."""
    return re.search(rf"\b{variable}\b", code) is not None


def _is_array(x: Any) -> bool:
    return x is not None and not isinstance(x, int)
