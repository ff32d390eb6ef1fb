"""The kernels that `compile` finds are those that calls launch."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cuflash import masks
from cuflash._mask_tree import Leaf
from cuflash._problem import GradientProblem, Problem

pytest.importorskip("cupy", reason="launches need CuPy")

from cuflash import _launch, _launch_packed  # noqa: E402
from cuflash._packed import PackedGradientProblem, PackedProblem  # noqa: E402
from cuflash.cli import launches  # noqa: E402

PLAIN = launches.CallKind("float16", 64, 64)
BATCH, SQ, SK, HEADS_K = 2, 300, 417, 2
ARCHS = ("sm_80", "sm_89", "sm_90", "sm_120")


def zeros(*shape: int, dtype: Any = np.float16) -> np.ndarray:
    """Starts at a multiple of 64 bytes, as memory of a GPU does."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.zeros(size + 64, np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + size].view(dtype).reshape(shape)


def tensors(kind: launches.CallKind, seqlen_q: int) -> list[np.ndarray]:
    return [
        zeros(BATCH, seqlen_q, HEADS_K * kind.group, kind.head_dim),
        zeros(BATCH, SK, HEADS_K, kind.head_dim),
        zeros(BATCH, SK, HEADS_K, kind.head_dim_v),
    ]


def of_a_call(kind: launches.CallKind, arch: str, seqlen_q: int, **options: Any) -> set[Any]:
    """Launched by a forward and a backward pass of ordinary sizes."""
    gpu = launches._AbsentGpu(int(arch[3:]))
    problem = Problem.create("attention", "cuda", *tensors(kind, seqlen_q), **options)
    out, lse, _ = _launch.forward(problem, gpu)
    if kind.backward:
        gradient = GradientProblem.create("attention", problem, out, out, lse)
        _launch.backward(replace(gradient, deterministic=kind.deterministic), gpu)
    return set(gpu.noted)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "kind",
    [
        PLAIN,
        replace(PLAIN, group=4),
        replace(PLAIN, head_dim=33, backward=False),
        replace(PLAIN, head_dim=192, head_dim_v=128, softcap=True, deterministic=False),
    ],
    ids=str,
)
def test_kernels_are_those_of_calls_of_any_length(arch: str, kind: launches.CallKind) -> None:
    options = {"softcap": 5.0} if kind.softcap else {}
    launched = [of_a_call(kind, arch, seqlen, **options) for seqlen in (1, 16, 64, 65, SQ)]
    assert set(launches.kernels_of(kind, arch)) == set().union(*launched)


@pytest.mark.parametrize("group", [1, 4])
def test_kernels_of_every_number_of_keys(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = replace(PLAIN, head_dim=128, head_dim_v=128, group=group, backward=False)
    kernels, launched = set(launches.kernels_of(kind, "sm_90")), set()
    for seqlen_k in (1, 128, 129, 176, 177, 4096):
        monkeypatch.setattr(sys.modules[__name__], "SK", seqlen_k)
        for causal in (False, True):
            found = of_a_call(kind, "sm_90", SQ, causal=causal)
            assert found <= kernels
            launched |= found
    tiles = [dict(kernel.constants)["BLOCK_KV"] for kernel in launched]
    assert sorted(tiles) == [128, 176]


def test_a_hopper_gpu_has_kernels_of_both_kinds() -> None:
    sources = [kernel.source for kernel in launches.kernels_of(PLAIN, "sm_90")]
    assert len(sources) == len(set(launches.kernels_of(PLAIN, "sm_90")))
    for name in ("flash_fwd", "flash_bwd"):
        assert {f"{name}_sm80.cu", f"{name}_sm90.cu"} <= set(sources)
    assert not any("sm90" in x.source for x in launches.kernels_of(PLAIN, "sm_89"))


ROWS = np.arange(SQ)[None].repeat(BATCH, 0) // 50
KEYS = np.arange(SK)[None].repeat(BATCH, 0) // 50
ENDS = np.full((BATCH, HEADS_K, SK, 2), 3)
OF_RULE = {
    "causal": masks.causal(2),
    "window": masks.window(3, None),
    "lengths": masks.lengths(np.array([3, SK]), np.array([SQ, 4])),
    "documents": masks.documents(ROWS, KEYS),
    "prefix": masks.prefix(np.array([7, 0])),
    "intervals": masks.intervals(ENDS, ENDS),
    "blocks": masks.blocks(np.ones((BATCH, 2, 3, 4), bool), 128, 128),
    "dense": masks.dense(np.ones((BATCH, 1, SQ, SK), bool)),
}
TREES = {
    "~documents & causal | prefix": ~OF_RULE["documents"] & OF_RULE["causal"] | OF_RULE["prefix"],
    "causal & (window | dense)": OF_RULE["causal"] & (OF_RULE["window"] | OF_RULE["dense"]),
}


def test_every_rule_has_a_name() -> None:
    assert launches.RULES.keys() == OF_RULE.keys()
    leaves = {type(make(3, 5)) for make in launches.RULES.values()}
    kinds = {x.__name__ for x in Leaf.__subclasses__()} - {"Expression"}
    assert {x.__name__ for x in leaves} == kinds


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("rules", [*OF_RULE, *TREES])
def test_kernels_of_a_mask(arch: str, rules: str) -> None:
    kind = replace(PLAIN, mask=rules)
    mask = (OF_RULE | TREES)[rules]
    launched = of_a_call(kind, arch, SQ, mask=mask)
    assert launched <= set(launches.kernels_of(kind, arch))
    assert launched.isdisjoint(launches.kernels_of(PLAIN, arch)) or arch == "sm_90"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ({"bias_bits": 16}, {"bias": zeros(SQ, SK)}),
        ({"bias_bits": 32}, {"bias": zeros(SQ, SK, dtype=np.float32)}),
        ({"alibi": True}, {"alibi_slopes": zeros(HEADS_K, dtype=np.float32)}),
        ({"sinks": True}, {"sinks": zeros(HEADS_K, dtype=np.float32)}),
        ({"dropout": True}, {"dropout": 0.1, "seed": 3}),
    ],
    ids=lambda x: next(iter(x)),
)
def test_kernels_of_a_term(arch: str, kind: dict[str, Any], options: dict[str, Any]) -> None:
    kernels = set(launches.kernels_of(replace(PLAIN, **kind), arch))
    launched = of_a_call(PLAIN, arch, SQ, **options)
    assert launched <= kernels
    assert not launched <= set(launches.kernels_of(PLAIN, arch))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_of_packed_sequences(arch: str) -> None:
    gpu = launches._AbsentGpu(int(arch[3:]))
    q, k, v = (x[0] for x in tensors(PLAIN, SQ))
    edges = np.array([0, 7, 7, SQ]), np.array([0, 100, 200, SK])
    problem = PackedProblem.create("attention_varlen", "cuda", q, k, v, *edges)
    out, lse, _ = _launch_packed.forward(problem, gpu)
    gradient = PackedGradientProblem.create("attention_varlen", problem, out, out, lse)
    _launch_packed.backward(gradient, gpu)
    kernels = set(launches.kernels_of(replace(PLAIN, packed=True), arch))
    assert set(gpu.noted) <= kernels
    assert not set(gpu.noted) <= set(launches.kernels_of(PLAIN, arch))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("causal & sliding", "'sliding' is no rule; expected causal, window, "),
        ("causal()", "'causal()' is no rule; "),
        ("causal + dense", "'causal + dense' is no rule; "),
        ("causal & ", "'causal & ' is no mask; expected rules joined by &, | and ~"),
        ("", "'' is no mask; "),
    ],
)
def test_what_is_no_mask_is_refused(rules: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        launches.mask_of(rules, 1, 1)
    assert str(error.value).startswith(message)
