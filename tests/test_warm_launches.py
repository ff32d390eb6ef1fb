"""What is kept of launches: equal calls get the same, and each difference another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import forget_launches
from test_hopper_forward import heads_first_copy, shifted

import cuflash
from cuflash import _params, _traits
from cuflash._problem import GradientProblem, Problem, Result
from cuflash.cli.cases import Case

_launch = pytest.importorskip("cuflash._launch", reason="it needs CuPy", exc_type=ImportError)


class Encoder:
    """What of a GPU makes parameters: each tensor map has bytes of its own."""

    is_captured = False

    def __init__(self, capability: int) -> None:
        self.device = _traits.Device(capability, l2_bytes=1 << 20, sms=3)

    def encode(self, tensor_map: _params.TensorMap) -> bytes:
        return hashlib.sha512(repr(tensor_map).encode()).digest()


AMPERE, HOPPER = Encoder(80), Encoder(90)
CASE = Case(batch=1, heads_q=2, heads_k=1, seqlen_q=450, seqlen_k=1000, head_dim=64)
ARRAYS = CASE.arrays()
OUT, LSE = np.empty_like(ARRAYS.q), np.empty((1, 2, 450), np.float32)
GRADS = tuple(map(np.empty_like, ARRAYS[:3]))
WORKSPACE = tuple(np.empty(n, np.float32) for n in (1024, 1024, 65536, 17, 16))
STATS = np.empty((2, *LSE.shape), np.float32)
CHANGES: dict[str, Callable[[], dict[str, Any]]] = {
    "q": lambda: {"q": ARRAYS.q.copy()},
    "unaligned": lambda: {"q": shifted(ARRAYS.q)},
    "heads first": lambda: {"q": heads_first_copy(ARRAYS.q)},
    "k": lambda: {"k": ARRAYS.k.copy()},
    "v": lambda: {"v": ARRAYS.v.copy()},
    "length": lambda: {"k": ARRAYS.k[:, :999], "v": ARRAYS.v[:, :999]},
    "causal": lambda: {"causal": True},
    "window": lambda: {"window": (3, None)},
    "offset": lambda: {"offset": 0},
    "other offset": lambda: {"offset": 1},
    "scale": lambda: {"scale": 0.5},
    "softcap": lambda: {"softcap": 0.5},
}


def problem(**changes: Any) -> Problem:
    given = {"q": ARRAYS.q, "k": ARRAYS.k, "v": ARRAYS.v, **changes}
    return Problem.create("attention", "cuda", **given)


def as_strided_otherwise(x: np.ndarray) -> np.ndarray:
    """The same memory as an array of the same shape."""
    batch, seqlen, heads, size = x.shape
    return x.reshape(batch, heads, seqlen, size).swapaxes(1, 2)


def of_wider_rows(x: np.ndarray) -> np.ndarray:
    """An array at an aligned address whose rows are not aligned."""
    wider = np.empty((*x.shape[:-1], x.shape[-1] + 1), x.dtype)
    assert wider.ctypes.data % 16 == 0
    return wider[..., :-1]


def test_a_choice_is_kept_by_layout_alone() -> None:
    def choice(on: Encoder = HOPPER, out: np.ndarray = OUT, **changes: Any) -> Any:
        return _launch._forward_choice(problem(**changes), out, on.device)

    first = choice()
    assert choice(causal=True, q=ARRAYS.q.copy()) is first
    for changes in ({"q": shifted(ARRAYS.q)}, {"out": of_wider_rows(OUT)}):
        assert choice(**changes).plan.backend == "sm80"
    others = (
        choice(AMPERE),
        choice(softcap=1.0),
        choice(scale=-1.0),
        choice(k=ARRAYS.k[:, ::-1]),
        choice(sinks=np.ones(2, np.float32)),
    )
    assert len({first.plan.kernel, *(other.plan.kernel for other in others)}) == 6


def test_a_choice_is_kept_by_whether_queries_see_all_keys() -> None:
    q, k, v = replace(CASE, seqlen_k=4096, head_dim=128).arrays()[:3]

    def block_kv(**options: Any) -> int:
        of = problem(q=q, k=k, v=v, **options)
        return _launch._forward_choice(of, q, HOPPER.device).plan.tiling.block_kv

    assert block_kv() == block_kv(offset=7) == 176
    for options in ({"causal": True}, {"window": (5, None)}, {"kv_lens": np.full(1, 4096)}):
        assert block_kv(**options) == 128
        assert block_kv() == 176


def test_a_backward_choice_is_kept_by_layout_alone() -> None:
    def choice(dout: np.ndarray = ARRAYS.dout, out: np.ndarray = OUT, **changes: Any) -> Any:
        gradient = GradientProblem.create("attention", problem(**changes), dout, out, LSE)
        return _launch._backward_choice(gradient, GRADS, HOPPER.device)

    first = choice()
    assert choice(dout=ARRAYS.dout.copy(), causal=True, q=ARRAYS.q.copy()) is first
    for dout in (shifted(ARRAYS.dout), of_wider_rows(ARRAYS.dout)):
        assert choice(dout)[1].backend == "sm80"
    assert choice(out=shifted(OUT))[1].backend == "sm90"  # TMA does not move it
    assert choice(q=shifted(ARRAYS.q))[1].backend == "sm80"
    others = (choice(softcap=1.0), choice(sinks=np.ones(2, np.float32)))
    assert len({first[1].main, *(plan.main for _, plan in others)}) == 3


def forward(
    of: Problem,
    on: Encoder = HOPPER,
    out: np.ndarray = OUT,
    lse: np.ndarray = LSE,
    stats: np.ndarray | None = None,
) -> tuple[Any, ...]:
    """What is kept, which is what would be found out anew."""
    assert of.reads_no_more
    result = Result(out, lse, stats)
    known = _launch._known_launch(of, result, on)
    assert _launch._known_launch(of, result, on) is known
    choice = _launch._forward_choice(of, out, on.device)
    assert known == _launch._forward_launch(of, result, choice, on)
    return known


def backward(
    of: Problem,
    on: Encoder = HOPPER,
    grads: Any = GRADS,
    workspace: Any = WORKSPACE,
    **changes: Any,
) -> tuple[Any, ...]:
    """Likewise."""
    given = {"dout": ARRAYS.dout, "out": OUT, "lse": LSE, **changes}
    gradient = GradientProblem.create("attention", of, **given)
    traits, plan = choice = _launch._backward_choice(gradient, grads, on.device)
    assert _launch._backward_choice(gradient, grads, on.device) is choice
    assert traits == _launch.backward_traits(gradient, grads)
    known = _launch._known_launches(gradient, grads, workspace, plan, on)
    assert _launch._known_launches(gradient, grads, workspace, plan, on) is known
    assert known == _launch._launches(gradient, grads, workspace, plan, on)
    return known


@pytest.mark.parametrize("launch", [forward, backward])
def test_launches_are_kept_by_all_of_the_problem(launch: Callable[..., Any]) -> None:
    first = launch(problem())
    assert launch(problem(seed=7, dropout=0)) is first  # which change nothing
    held = [change() for change in CHANGES.values()]  # or an address would be given twice
    others = [launch(problem(**changes)) for changes in held]
    assert len({first, *others, launch(problem(), on=AMPERE)}) == 2 + len(CHANGES)


def test_a_launch_is_kept_by_where_the_results_go() -> None:
    held = OUT.copy(), LSE.copy(), STATS.copy()
    launches = [
        forward(problem()),
        forward(problem(), out=held[0]),
        forward(problem(), out=as_strided_otherwise(OUT)),
        forward(problem(), lse=held[1]),
        forward(problem(), stats=STATS),
        forward(problem(), stats=held[2]),
    ]
    assert len(set(launches)) == 6


def test_a_backward_is_kept_by_all_that_it_reads_and_writes() -> None:
    given = {"dout": ARRAYS.dout, "out": OUT, "lse": LSE, "dlse": LSE, "stats": STATS}
    held = {name: x.copy() for name, x in given.items()}
    launches = [backward(problem()), backward(problem(), deterministic=False)]
    launches += [backward(problem(), **{name: x}) for name, x in held.items()]
    launches += [
        backward(problem(), **{name: as_strided_otherwise(given[name])}) for name in ("dout", "out")
    ]
    for name, arrays in (("grads", GRADS), ("workspace", WORKSPACE)):
        copies = list(map(np.copy, arrays))
        held[name] = copies
        for i, copy in enumerate(copies):
            launches.append(backward(problem(), **{name: (*arrays[:i], copy, *arrays[i + 1 :])}))
    dq = as_strided_otherwise(GRADS[0])
    launches.append(backward(problem(), grads=(dq, *GRADS[1:])))
    assert len(set(launches)) == len(launches) == 2 + 5 + 2 + 3 + 5 + 1


@pytest.mark.parametrize(
    "read",
    [
        {"offset": np.zeros(1, np.int64)},
        {"q_lens": np.full(1, 9)},
        {"kv_lens": np.full(1, 9)},
        {"mask": cuflash.masks.causal()},
        {"bias": np.zeros((450, 1000), np.float32)},
        {"alibi_slopes": np.ones(2, np.float32)},
        {"sinks": np.ones(2, np.float32)},
        {"dropout": 0.1, "seed": 0},
        {"score_mod": cuflash.ScoreMod("score")},
    ],
    ids=lambda read: next(iter(read)),
)
def test_a_launch_that_reads_more_is_not_kept(read: dict[str, Any]) -> None:
    assert not problem(**read).reads_no_more


def test_no_test_finds_what_another_has_left() -> None:
    kept = [getattr(_launch, x) for x in vars(_launch) if x.endswith(("_choices", "_launches"))]
    kept = [x for x in kept if isinstance(x, dict)]
    assert len(kept) == 4
    for x in kept:
        assert not x
        x["key"] = "of another test"
    forget_launches()
    assert not any(kept)
