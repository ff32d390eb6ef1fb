"""A function of the user's own on the scores, compiled into the kernels."""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cuflash._checks import BFLOAT16, Array, Check

RESERVED_NAMES = frozenset({"score", "b", "h", "i", "j"})
_NAME = re.compile(r"(?!__)[A-Za-z_]\w*", re.ASCII)
# A line with a directive, NUL, halves of surrogate pairs.
_NO_EXPRESSION = re.compile(r"^\s*(?:#|%:)|[\0\ud800-\udfff]", re.MULTILINE)
# Words of C++, and what stands around an expression in the source of a kernel.
_WORDS = (
    "alignas alignof and and_eq asm auto bitand bitor bool break case catch char char16_t char32_t "
    "class compl const const_cast constexpr continue decltype default delete do double "
    "dynamic_cast else enum explicit export extern false float for friend goto if inline int long "
    "mutable namespace new noexcept not not_eq nullptr operator or or_eq private protected public "
    "register reinterpret_cast return short signed sizeof static static_assert static_cast struct "
    "switch template this thread_local throw true try typedef typeid typename union unsigned using "
    "virtual void volatile wchar_t while xor xor_eq "
    "p at attached NamedArray Half BFloat16 i64"
)
_TAKEN = frozenset(_WORDS.split())


@dataclass(frozen=True, eq=False)
class ScoreMod:
    """A score becomes a function of itself, its place and arrays of the user's.

    It acts on the scaled and capped score, before ALiBi and bias: scale, softcap, score_mod, bias.

    Parameters
    ----------
    forward : str
        A CUDA C++ expression of the new score: of `score` (float), `b`, `h`, `i`, `j` (int: batch
        entry, query head, query, key) and the named arrays. On a GPU it is compiled into the
        kernels.
    backward : str
        The derivative of that expression with respect to `score`, of the same names. Needed by
        a backward pass on a GPU.
    numpy_forward, numpy_backward : callable
        The same two as functions of NumPy arrays, ``f(score, b, h, i, j, **arrays)``. `score` is a
        tile (batch entries, query heads, queries, keys), not to be written; the indices broadcast
        to it, and so must the result. Needed on the CPU, where threads call them side by side.
    named : mapping of names to arrays
        What the expressions read as ``name(index, ...)``, one index per axis, each of which is
        clipped to the axis; the functions get the whole arrays by keyword. bool, int32, int64,
        float16, bfloat16 or float32, of one to four axes. They get no gradient.

    Raises
    ------
    TypeError, ValueError
        An expression is no string or empty, a function cannot be called, a name is no identifier
        or is taken.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> distance = cuflash.ScoreMod(
    ...     "score - 0.5f * abs(i - j)",
    ...     "1.f",
    ...     numpy_forward=lambda score, b, h, i, j: score - 0.5 * abs(i - j),
    ...     numpy_backward=lambda score, b, h, i, j: np.ones_like(score),
    ... )
    >>> q = k = v = np.ones((1, 2, 1, 4), np.float32)
    >>> cuflash.attention(q, k, v, score_mod=distance).shape
    (1, 2, 1, 4)

    Notes
    -----
    Method: FlexAttention's score_mod (Dong et al. 2024, arXiv:2412.05496), with the derivative by
    hand.
    """

    forward: str
    backward: str | None = None
    numpy_forward: Callable[..., Any] | None = None
    numpy_backward: Callable[..., Any] | None = None
    named: Mapping[str, Array] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_expression("ScoreMod", "forward", self.forward)
        if self.backward is not None:
            check_expression("ScoreMod", "backward", self.backward)
        for name in ("numpy_forward", "numpy_backward"):
            check_function("ScoreMod", name, getattr(self, name))
        if not isinstance(self.named, Mapping):
            raise TypeError(
                f"cuflash.ScoreMod: named is a {type(self.named).__name__}; expected a mapping of "
                "names to arrays"
            )
        check_names("ScoreMod", self.named)

    @property
    def attachments(self) -> int:
        """What it hands to a kernel: the named arrays."""
        return len(self.named)

    def arrays(self) -> dict[str, Any]:
        """The named arrays, by a name for messages."""
        return {f"score_mod {name}": x for name, x in self.named.items()}

    def with_arrays(self, arrays: Mapping[str, Any]) -> ScoreMod:
        """The same expressions with other arrays under the names of `arrays()`."""
        return replace(self, named={name: arrays[f"score_mod {name}"] for name in self.named})

    def check(self, check: Check) -> None:
        """Fail where the device cannot use it."""
        for name, x in self.arrays().items():
            check.named_array(name, x)
        if check.device == "cpu" and self.numpy_forward is None:
            check.fail(
                NotImplementedError,
                "score_mod has no numpy_forward; the cpu backend evaluates a NumPy function",
            )

    def check_backward(self, check: Check) -> None:
        """Fail where the device cannot differentiate it."""
        if check.device == "cpu" and self.numpy_backward is None:
            check.fail(
                NotImplementedError,
                "score_mod has no numpy_backward; the cpu backend evaluates the derivative as a "
                "NumPy function",
            )
        if check.device == "cuda" and self.backward is None:
            check.fail(
                NotImplementedError,
                "score_mod has no backward; the GPU kernels compile the derivative from it",
            )

    def evaluate(self, score: np.ndarray, *place: np.ndarray) -> np.ndarray:
        """The new scores at (b, h, i, j) = place, by the NumPy function."""
        return self._call("numpy_forward", score, place)

    def differentiate(self, score: np.ndarray, *place: np.ndarray) -> np.ndarray:
        """The derivatives of the new scores by the old ones at (b, h, i, j) = place."""
        return self._call("numpy_backward", score, place)

    def _call(self, name: str, score: np.ndarray, place: tuple[np.ndarray, ...]) -> np.ndarray:
        function = getattr(self, name)
        arguments = (score, *place)
        found = evaluate(
            f"ScoreMod: {name}", self.forward, function, score.shape, arguments, self.named
        )
        return np.broadcast_to(found, score.shape)


def check_score_mod(check: Check, score_mod: ScoreMod | None) -> None:
    """Fail unless it is a score function that the device can use, or none."""
    if score_mod is None:
        return
    if not isinstance(score_mod, ScoreMod):
        found = type(score_mod).__name__
        check.fail(TypeError, f"score_mod is a {found}; expected a cuflash.ScoreMod")
    score_mod.check(check)


def check_expression(function: str, name: str, code: Any) -> None:
    """Fail unless `code` is the text of one expression."""
    if not isinstance(code, str):
        hint = "; a NumPy function goes beside it, for the CPU" if callable(code) else ""
        raise TypeError(
            f"cuflash.{function}: {name} is a {type(code).__name__}; expected a CUDA C++ "
            f"expression, a string{hint}"
        )
    if not code.strip():
        raise ValueError(f"cuflash.{function}: {name} is empty; expected a CUDA C++ expression")
    if _NO_EXPRESSION.search(code):
        raise ValueError(
            f"cuflash.{function}: {name} is {reprlib.repr(code)}; expected a CUDA C++ expression, "
            "without preprocessor directives and characters that no source has"
        )


def check_function(function: str, name: str, value: Any) -> None:
    """Fail unless `value` can be called or is None."""
    if value is not None and not callable(value):
        raise TypeError(
            f"cuflash.{function}: {name} is a {type(value).__name__}; expected a function of NumPy "
            "arrays or None"
        )


def evaluate(
    name: str,
    code: str,
    function: Callable[..., Any],
    shape: tuple[int, ...],
    arguments: Sequence[np.ndarray],
    named: Mapping[str, np.ndarray],
) -> np.ndarray:
    """A user's function of arrays that it may not write: numbers that broadcast to `shape`.

    What goes wrong keeps its type and message; a note says in which function, and at what place.
    """
    arguments = [x.view() for x in arguments]
    for x in arguments:
        x.flags.writeable = False
    try:
        return _numbers(name, function(*arguments, **named), shape)
    except Exception as error:
        places = (f"{x} {_range(i)}" for x, i in zip("bhij", arguments[-4:], strict=True))
        arrays = (f"{x} {array.dtype} {array.shape}" for x, array in named.items())
        called = ", ".join([*places, *arrays])
        _add_note(error, f"cuflash.{name}, of {reprlib.repr(code)}, was called with {called}")
        raise


def _numbers(name: str, found: Any, shape: tuple[int, ...]) -> np.ndarray:
    """What a user's function gave, as an array."""
    try:
        found = np.asarray(found)
    except ValueError:  # sequences of several lengths
        found = np.asarray(None)
    if found.dtype.kind not in "biuf" and found.dtype != BFLOAT16:
        raise TypeError(
            f"cuflash.{name} gave {found.dtype}; expected numbers or booleans, for scores of "
            f"shape {shape}"
        )
    try:
        np.broadcast_to(found, shape)
    except ValueError:
        raise ValueError(
            f"cuflash.{name} gave shape {found.shape} for scores of shape {shape}; expected "
            "one that broadcasts to it"
        ) from None
    return found


def _range(x: np.ndarray) -> str:
    """The integers of one axis, as 3 or 0 to 127."""
    if not x.size:
        return "none"
    return str(x.min()) if x.size == 1 else f"{x.min()} to {x.max()}"


def _add_note(error: Exception, note: str) -> None:
    """Let the traceback show a note."""
    if sys.version_info >= (3, 11):
        error.add_note(note)
    elif error.__cause__ is None and error.__context__ is None:
        error.__cause__ = RuntimeError(note)  # Python 3.10 shows causes and no notes


def check_names(function: str, named: Mapping[str, Any]) -> None:
    """Fail unless every name can stand in an expression."""
    for name in named:
        taken = not isinstance(name, str) or name in RESERVED_NAMES or name in _TAKEN
        if taken or not _NAME.fullmatch(name):
            raise ValueError(
                f"cuflash.{function}: {reprlib.repr(name)} names an array; expected a C identifier "
                f"other than {', '.join(sorted(RESERVED_NAMES))}"
            )
