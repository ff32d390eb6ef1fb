"""The kernels of calls that nobody has made yet: a call is launched on a GPU that is not there."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuflash import _plan_sm90, masks
from cuflash._checks import BFLOAT16
from cuflash._packed import dense_or_packed
from cuflash._params import TENSOR_MAP_BYTES, TensorMap
from cuflash._traits import FEW_ROWS, Device, Kernel
from cuflash.attention import DENSE
from cuflash.varlen import PACKED

LONG = 2 * FEW_ROWS  # no kernel depends on numbers of queries above FEW_ROWS
# Numbers of keys that Hopper's forward takes in tiles of one kind and of the other.
_KEYS = (LONG, _plan_sm90.DENSE_TILES.block_kv)
_DTYPES = {"float16": np.dtype(np.float16), "bfloat16": BFLOAT16}

# Rules of masks by name, for some queries and keys; no kernel depends on more of them.
RULES: dict[str, Callable[[int, int], masks.Mask]] = {
    "causal": lambda queries, keys: masks.causal(),
    "window": lambda queries, keys: masks.window(keys, keys),
    "lengths": lambda queries, keys: masks.lengths(np.array([keys])),
    "documents": lambda queries, keys: masks.documents(*(_numbers(1, n) for n in (queries, keys))),
    "prefix": lambda queries, keys: masks.prefix(np.array([keys])),
    "intervals": lambda queries, keys: masks.intervals(*[_numbers(1, 1, keys, 1)] * 2),
    "blocks": lambda queries, keys: masks.blocks(np.ones((1, 1), bool), queries, keys),
    "dense": lambda queries, keys: masks.dense(np.ones((queries, keys), bool)),
}


@dataclass(frozen=True, slots=True)
class CallKind:
    """What calls have in common that launch the same kernels."""

    dtype: str
    head_dim: int
    head_dim_v: int
    group: int = 1  # query heads to a key head
    softcap: bool = False
    mask: str | None = None  # names of RULES, joined by &, | and ~
    bias_bits: int = 0  # of an element; 0: no bias
    alibi: bool = False
    sinks: bool = False
    dropout: bool = False
    packed: bool = False
    backward: bool = True
    deterministic: bool = True


def kernels_of(kind: CallKind, arch: str) -> list[Kernel]:
    """Every kernel that such calls launch, on contiguous arrays of any length."""
    gpu = _AbsentGpu(int(arch.removeprefix("sm_")))
    for queries, keys in itertools.product((1, FEW_ROWS, LONG), _KEYS):
        _launch(kind, queries, keys, gpu)
    return list(dict.fromkeys(gpu.noted))


def mask_of(rules: str, queries: int, keys: int) -> masks.Mask:
    """The mask of RULES' names, joined by &, | and ~ as in Python."""

    def read(node: ast.expr) -> masks.Mask:
        match node:
            case ast.Name(name) if name in RULES:
                return RULES[name](queries, keys)
            case ast.BinOp(left, ast.BitAnd(), right):
                return read(left) & read(right)
            case ast.BinOp(left, ast.BitOr(), right):
                return read(left) | read(right)
            case ast.UnaryOp(ast.Invert(), inner):
                return ~read(inner)
        found = ast.unparse(node)
        raise ValueError(f"{found!r} is no rule; expected {', '.join(RULES)}, joined by &, | and ~")

    try:
        tree = ast.parse(rules, mode="eval")
    except SyntaxError as error:
        message = f"{rules!r} is no mask; expected rules joined by &, | and ~"
        raise ValueError(message) from error
    return read(tree.body)


class _AbsentGpu:
    """Takes the place of `_gpu.Gpu`: memory is NumPy's, and a launch is noted."""

    stream = (0, 0)
    is_captured = False

    def __init__(self, capability: int) -> None:
        self.device = Device(capability, l2_bytes=1, sms=1)
        self.noted: list[Kernel] = []

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype)

    def encode(self, tensor_map: TensorMap) -> bytes:
        return bytes(TENSOR_MAP_BYTES)

    def run(self, kernel: Kernel, blocks: int, params: bytes) -> None:
        self.noted.append(kernel)


def _launch(kind: CallKind, queries: int, keys: int, gpu: _AbsentGpu) -> None:
    """A forward pass and, where the kind has one, a backward pass."""
    problem = dense_or_packed("compile", "cuda", _arguments(kind, queries, keys))
    arrays = PACKED if kind.packed else DENSE
    backend = arrays.backend("cuda")  # needs CuPy
    out, lse, stats = backend.forward(problem, gpu, wants_stats=True)
    if kind.backward:
        own = {"stats": stats, "deterministic": kind.deterministic}
        backend.backward(arrays.gradient.create("compile", problem, out, out, lse, **own), gpu)


def _arguments(kind: CallKind, queries: int, keys: int) -> dict[str, Any]:
    """Of `attention` or `attention_varlen`: one batch entry, one key head."""
    heads, dtype = kind.group, _DTYPES[kind.dtype]
    q = np.zeros((1, queries, heads, kind.head_dim), dtype)
    k, v = (np.zeros((1, keys, 1, size), dtype) for size in (kind.head_dim, kind.head_dim_v))
    arguments: dict[str, Any] = {
        "cu_seqlens_q": None,
        "cu_seqlens_k": None,
        "softcap": 1.0 if kind.softcap else None,
        "alibi_slopes": np.zeros(heads, np.float32) if kind.alibi else None,
        "sinks": np.zeros(heads, np.float32) if kind.sinks else None,
        "dropout": 0.5 if kind.dropout else 0.0,
        "seed": 0 if kind.dropout else None,
    }
    if kind.packed:
        return arguments | {
            **{name: x[0] for name, x in (("q", q), ("k", k), ("v", v))},
            **dict.fromkeys(("q_lens", "kv_lens", "mask", "bias")),
            "cu_seqlens_q": np.array([0, queries]),
            "cu_seqlens_k": np.array([0, keys]),
        }
    bias_dtype = {0: None, 16: dtype, 32: np.dtype(np.float32)}[kind.bias_bits]
    return arguments | {
        "q": q,
        "k": k,
        "v": v,
        "mask": mask_of(kind.mask, queries, keys) if kind.mask else None,
        "bias": None if bias_dtype is None else np.zeros((queries, keys), bias_dtype),
    }


def _numbers(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.int64)
