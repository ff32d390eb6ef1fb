"""What masks refuse: at once where no problem is needed, else by name when they meet one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from unreal_gpu import HK, HQ, SK, SQ, B, Maker, refused

import cuflash
from cuflash import masks, reference
from cuflash.masks import Mask


def integers(*shape: int, fill: int = 0) -> np.ndarray:
    return np.full(shape, fill, np.int64)


def booleans(*shape: int) -> np.ndarray:
    return np.ones(shape, bool)


JOINED = "expected two masks (cuflash.masks.dense makes one of a boolean array)"
OF_AN_ENTRY = "expected one integer per batch entry"
AT_ONCE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "causal-text": (
        lambda: masks.causal("x"),
        TypeError,
        ".causal: offset is 'x' (str); expected an integer",
    ),
    "causal-bool": (
        lambda: masks.causal(True),
        TypeError,
        ".causal: offset is True (bool); expected an integer",
    ),
    "causal-far": (
        lambda: masks.causal(2**61),
        ValueError,
        f".causal: offset is {2**61}; expected at most 2^60 in size",
    ),
    "window-left": (
        lambda: masks.window(-1, 0),
        ValueError,
        ".window: left is -1; expected 0 or more, or None for unbounded",
    ),
    "window-right": (
        lambda: masks.window(0, 1.0),
        TypeError,
        ".window: right is 1.0 (float); expected an integer",
    ),
    "window-offset": (
        lambda: masks.window(0, 0, 0.5),
        TypeError,
        ".window: offset is 0.5 (float); expected an integer",
    ),
    "lengths-none": (
        lambda: masks.lengths(),
        ValueError,
        ".lengths: kv_lens and q_lens are None; expected at least one",
    ),
    "lengths-one": (
        lambda: masks.lengths(3),
        TypeError,
        f".lengths: kv_lens is a int; {OF_AN_ENTRY}",
    ),
    "lengths-ragged": (
        lambda: masks.lengths(q_lens=[1, [2]]),
        TypeError,
        f".lengths: q_lens is [1, [2]]; {OF_AN_ENTRY}",
    ),
    "documents": (
        lambda: masks.documents([[1, 2]]),
        TypeError,
        ".documents: q_ids is a list; expected an array",
    ),
    "documents-keys": (
        lambda: masks.documents(integers(2, 5), 3),
        TypeError,
        ".documents: kv_ids is a int; expected an array",
    ),
    "prefix": (lambda: masks.prefix(4), TypeError, f".prefix: n is a int; {OF_AN_ENTRY}"),
    "intervals": (
        lambda: masks.intervals(integers(1, 1, 7, 1), None),
        TypeError,
        ".intervals: end is a NoneType; expected an array",
    ),
    "intervals-shapes": (
        lambda: masks.intervals(integers(1, 1, 7, 1), integers(1, 1, 7, 2)),
        ValueError,
        ".intervals: start has shape (1, 1, 7, 1), end has (1, 1, 7, 2); expected the same",
    ),
    "blocks-list": (
        lambda: masks.blocks([[True]], 1, 1),
        TypeError,
        ".blocks: array is a list; expected an array",
    ),
    "blocks-zero": (
        lambda: masks.blocks(booleans(1, 1), 0, 1),
        ValueError,
        ".blocks: block_q is 0; expected at least 1",
    ),
    "blocks-float": (
        lambda: masks.blocks(booleans(1, 1), 1, 2.0),
        TypeError,
        ".blocks: block_k is 2.0 (float); expected an integer",
    ),
    "dense": (
        lambda: masks.dense(True),
        TypeError,
        ".dense: array is a bool; expected an array",
    ),
    "expression-code": (
        lambda: masks.expression(3),
        TypeError,
        ".expression: code is a int; expected a CUDA C++ expression, a string",
    ),
    "expression-lambda": (
        lambda: masks.expression(lambda b, h, i, j: i < j),
        TypeError,
        ".expression: code is a function; expected a CUDA C++ expression, a string; "
        "a NumPy function goes beside it, for the CPU",
    ),
    "expression-empty": (
        lambda: masks.expression(" "),
        ValueError,
        ".expression: code is empty; expected a CUDA C++ expression",
    ),
    "expression-function": (
        lambda: masks.expression("true", 3),
        TypeError,
        ".expression: function is a int; expected a function of NumPy arrays or None",
    ),
    "expression-name": (
        lambda: masks.expression("true", b=integers(3)),
        ValueError,
        ".expression: 'b' names an array; expected a C identifier other than b, h, i, j, score",
    ),
    "expression-array": (
        lambda: masks.expression("x(0)", x=3),
        TypeError,
        ".expression: x is a int; expected an array",
    ),
    "and-array": (
        lambda: masks.causal() & booleans(3),
        TypeError,
        f": & joins a mask and a ndarray; {JOINED}",
    ),
    "array-or": (
        lambda: booleans(3) | masks.causal(),
        TypeError,
        f": | joins a mask and a ndarray; {JOINED}",
    ),
    "or-bool": (
        lambda: masks.causal() | True,
        TypeError,
        f": | joins a mask and a bool; {JOINED}",
    ),
    "and-in-words": (
        lambda: masks.causal() and masks.prefix([1]),
        TypeError,
        ": a mask is neither true nor false; join masks by &, | and ~",
    ),
}


@pytest.mark.parametrize("make, error, message", AT_ONCE.values(), ids=AT_ONCE)
def test_refused_at_once(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape("cuflash.masks" + message) + "$"):
        make()


PER_ENTRY = f"expected ({B},), one per batch entry"
PER_COLUMN = f"expected ({B}, {HK} or 1, {SK}, 1 or 2), (batch, k heads or 1, Sk, intervals)"
BLOCKS = f"expected (3, 4) or ({B} or 1, {HQ} or 1, 3, 4)"
SCORES = f"expected one that broadcasts to (batch, q heads, Sq, Sk) = ({B}, {HQ}, {SQ}, {SK})"
ENDS = integers(B, HK, SK, 1)
WITH_A_PROBLEM: dict[str, tuple[Mask, type[Exception], str]] = {
    "causal-offsets": (
        masks.causal(integers(3)),
        ValueError,
        f"causal) offset has shape (3,); {PER_ENTRY}",
    ),
    "window-offsets-dtype": (
        masks.window(1, 1, [0.5, 1]),
        TypeError,
        f"window) offset is float64; {OF_AN_ENTRY}",
    ),
    "window-offsets-far": (
        masks.window(1, 1, [2**61, 0]),
        ValueError,
        f"window) offset holds {2**61}; expected {-(2**60)} to {2**60}",
    ),
    "dense-of-keys": (
        masks.dense(booleans(B, SK)),
        ValueError,
        f"dense) array has shape ({B}, {SK}); {SCORES}, as array[:, None, None, :] does",
    ),
    "lengths-shape": (
        masks.lengths([1, 2, 3]),
        ValueError,
        f"lengths) kv_lens has shape (3,); {PER_ENTRY}",
    ),
    "lengths-long": (
        masks.lengths([1, SK + 1]),
        ValueError,
        f"lengths) kv_lens holds {SK + 1}; expected 0 to {SK}",
    ),
    "lengths-negative": (
        masks.lengths(None, [-1, 2]),
        ValueError,
        f"lengths) q_lens holds -1; expected 0 to {SQ}",
    ),
    "documents-of-queries": (
        masks.documents(integers(B, SQ + 1), integers(B, SK)),
        ValueError,
        f"documents) q_ids has shape ({B}, {SQ + 1}); expected ({B}, {SQ})",
    ),
    "documents-of-both": (
        masks.documents(integers(B, SQ)),
        ValueError,
        f"documents) q_ids, which are also kv_ids, has shape ({B}, {SQ}); expected ({B}, {SK})",
    ),
    "documents-of-keys": (
        masks.documents(integers(B, SQ), integers(B, SQ)),
        ValueError,
        f"documents) kv_ids has shape ({B}, {SQ}); expected ({B}, {SK})",
    ),
    "documents-dtype": (
        masks.documents(np.zeros((B, SQ)), integers(B, SK)),
        TypeError,
        "documents) q_ids is float64; expected integers",
    ),
    "prefix-shape": (
        masks.prefix([1]),
        ValueError,
        f"prefix) n has shape (1,); {PER_ENTRY}",
    ),
    "prefix-long": (
        masks.prefix([0, SK + 1]),
        ValueError,
        f"prefix) n holds {SK + 1}; expected 0 to {SK}",
    ),
    "intervals-axes": (
        masks.intervals(integers(B, 1, SK), integers(B, 1, SK)),
        ValueError,
        f"intervals) start has shape ({B}, 1, {SK}); {PER_COLUMN}",
    ),
    "intervals-of-query-heads": (
        masks.intervals(integers(B, HQ, SK, 1), integers(B, HQ, SK, 1)),
        ValueError,
        f"intervals) start has shape ({B}, {HQ}, {SK}, 1); {PER_COLUMN}",
    ),
    "intervals-three": (
        masks.intervals(integers(B, 1, SK, 3), integers(B, 1, SK, 3)),
        ValueError,
        f"intervals) start has shape ({B}, 1, {SK}, 3); {PER_COLUMN}",
    ),
    "intervals-late": (
        masks.intervals(ENDS + SQ + 1, ENDS),
        ValueError,
        f"intervals) start holds {SQ + 1}; expected 0 to {SQ}",
    ),
    "intervals-negative": (
        masks.intervals(ENDS, ENDS - 1),
        ValueError,
        f"intervals) end holds -1; expected 0 to {SQ}",
    ),
    "intervals-dtype": (
        masks.intervals(ENDS * 1.0, ENDS * 1.0),
        TypeError,
        "intervals) start is float64; expected integers",
    ),
    "blocks-too-few": (
        masks.blocks(booleans(3, 3), 2, 2),
        ValueError,
        f"blocks) array has shape (3, 3); {BLOCKS}",
    ),
    "blocks-of-three-heads": (
        masks.blocks(booleans(B, 3, 3, 4), 2, 2),
        ValueError,
        f"blocks) array has shape ({B}, 3, 3, 4); {BLOCKS}",
    ),
    "blocks-of-three-axes": (
        masks.blocks(booleans(1, 3, 4), 2, 2),
        ValueError,
        f"blocks) array has shape (1, 3, 4); {BLOCKS}",
    ),
    "blocks-dtype": (
        masks.blocks(np.ones((3, 4)), 2, 2),
        TypeError,
        "blocks) array is float64; expected bool (True: attend)",
    ),
    "dense-shape": (
        masks.dense(booleans(SQ, SK + 1)),
        ValueError,
        f"dense) array has shape ({SQ}, {SK + 1}); {SCORES}",
    ),
    "dense-dtype": (
        masks.dense(np.ones((SQ, SK), np.uint8)),
        TypeError,
        "dense) array is uint8; expected bool (True: attend), as array != 0 is",
    ),
    "expression-without-function": (
        masks.expression("true"),
        NotImplementedError,
        "expression) has no function; the cpu backend evaluates a NumPy function, "
        "masks.expression(code, function)",
    ),
    "expression-dtype": (
        masks.expression("x(0)", lambda b, h, i, j, x: x[0], x=np.zeros(3)),
        TypeError,
        "expression) x is float64; expected one of bool, int32, int64, float16, bfloat16, float32",
    ),
    "expression-axes": (
        masks.expression("x(0)", lambda b, h, i, j, x: True, x=booleans(1, 1, 1, 1, 1)),
        ValueError,
        "expression) x has 5 axes; expected 1 to 4",
    ),
}


@pytest.mark.parametrize("mask, error, message", WITH_A_PROBLEM.values(), ids=WITH_A_PROBLEM)
def test_refused_by_a_problem(mask: Mask, error: type[Exception], message: str) -> None:
    """Also where the mask stands among others, by its number there, and when it is compiled."""
    maker = Maker("cpu")
    with refused(error, f"mask leaf 0 ({message}"):
        maker.problem(mask=mask)
    with refused(error, f"mask leaf 1 ({message}"):
        maker.problem(mask=masks.causal() & ~(mask | masks.prefix([0, 0])))
    q, k = (np.zeros((B, n, h, 8), np.float32) for n, h in ((SQ, HQ), (SK, HK)))
    with pytest.raises(
        error, match=re.escape(f"cuflash.masks.Mask.compile: mask leaf 0 ({message}")
    ):
        mask.compile(q, k)


def test_a_compiled_mask_fits_what_it_was_compiled_for() -> None:
    q, k = (np.zeros((B, n, h, 8), np.float32) for n, h in ((SQ, HQ), (SK, HK)))
    mask = masks.prefix([1, SK]).compile(q, k)
    with pytest.raises(ValueError, match=f"prefix\\) n holds {SK}; expected 0 to {SK - 1}"):
        cuflash.attention(q, k[:, 1:], k[:, 1:], mask=mask)


@pytest.mark.parametrize(
    "arrays, message",
    [
        (((B, SQ, HQ), (B, SK, HK, 8)), "q has 3 axes"),
        (((B, SQ, HQ, 8), (B, SK, HK, 4)), "k has head size 4, q has 8; expected the same"),
        (((B, SQ, 3, 8), (B, SK, HK, 8)), "q has 3 heads, k has 2"),
    ],
)
def test_compile_checks_q_and_k(arrays: tuple[tuple[int, ...], ...], message: str) -> None:
    q, k = (np.zeros(shape, np.float32) for shape in arrays)
    with pytest.raises(ValueError, match=f"^cuflash.masks.Mask.compile: {message}"):
        masks.causal().compile(q, k)


# ------------------------------------------------------------------------- arrays of all kinds


def test_sequences_stand_for_arrays_where_there_is_one_number_per_entry() -> None:
    x = np.random.default_rng(0).standard_normal((2, 6, 1, 4))
    pairs = [
        (masks.causal([1, -2]), masks.causal(np.array([1, -2]))),
        (masks.lengths(range(3, 5), (6, 0)), masks.lengths(np.array([3, 4]), np.array([6, 0]))),
        (masks.prefix([2, 5]), masks.prefix(np.array([2, 5], np.uint8))),
        (masks.window(1, 1, np.array(2)), masks.window(1, 1, 2)),
    ]
    for given, same in pairs:
        found = cuflash.attention(x, x, x, mask=given)
        np.testing.assert_array_equal(found, cuflash.attention(x, x, x, mask=same))
        np.testing.assert_allclose(found, reference.attention(x, x, x, mask=given)[0])


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("of_mask", ["torch", "numpy"])
def test_masks_of_torch_tensors(of_mask: str, compiled: bool) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    q, k, v, dout = rng.standard_normal((4, 2, 6, 2, 4))
    tensors = [torch.from_numpy(x) for x in (q, k, v, dout)]
    arrays = {
        "ids": rng.integers(0, 2, (2, 6)),
        "start": rng.integers(0, 7, (2, 1, 6, 2)),
        "end": rng.integers(0, 7, (2, 1, 6, 2)),
        "blocks": rng.random((3, 2)) < 0.7,
        "dense": rng.random((2, 1, 6, 6)) < 0.7,
        "lens": np.array([4, 6]),
        "table": rng.integers(0, 5, 6).astype(np.int32),
    }

    def mask_of(ids, start, end, blocks, dense, lens, table):
        function = lambda b, h, i, j, table: table[i] > 1  # noqa: E731
        mask = masks.documents(ids) | masks.intervals(start, end) & masks.blocks(blocks, 2, 3)
        mask = mask & masks.dense(dense) | masks.prefix(lens) & masks.causal(lens)
        return mask | masks.expression("table(i) > 1", function, table=table)

    given = {n: torch.from_numpy(x) if of_mask == "torch" else x for n, x in arrays.items()}
    mask, same = mask_of(**given), mask_of(**arrays)
    if compiled:
        mask = mask.compile(*tensors[:2])
    out, pullback = cuflash.attention_vjp(*tensors[:3], mask=mask)
    assert isinstance(out, torch.Tensor)
    np.testing.assert_allclose(out.numpy(), reference.attention(q, k, v, mask=same)[0])
    found = pullback(tensors[3])
    right = reference.attention_backward(dout, q, k, v, mask=same)
    for x, y in zip(found[:3], right[:3], strict=True):
        np.testing.assert_allclose(x.numpy(), y, atol=1e-12)
