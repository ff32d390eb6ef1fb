"""Blocks of a backward run one at a time, in any order, and what is wrong with how they take turns.

A block may wait for those that took their work before it, and for no other: they run. Sums have one
order, to the bit, and nothing is read or added before those whose turn it was have released it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import emulated
from injection import changed, put_in
from test_attention import bits

from cuflash.cli.cases import Case

pytest.importorskip("cupy", reason="NVRTC is reached through CuPy")

# Three or four key tiles of one head, each of which adds to every query tile.
SUMMED = Case(batch=1, heads_q=1, heads_k=1, seqlen_q=130, seqlen_k=330, head_dim=64)
GROUPED = replace(SUMMED, heads_q=2, seqlen_q=80, causal=True)
CASES = {
    "80-64": (80, SUMMED),
    "80-group": (80, GROUPED),
    "80-documents": (80, replace(SUMMED, extras=("documents",))),
    "90-64": (90, SUMMED),
    "90-group": (90, GROUPED),
    "90-documents": (90, replace(SUMMED, extras=("documents",))),
    "90-128": (90, replace(SUMMED, head_dim=128)),
    "90-256": (90, replace(SUMMED, seqlen_q=70, seqlen_k=190, head_dim=256)),
}
QUICK_CASES = ("80-group", "80-documents", "90-64", "90-128", "90-256")

RACE = "race in global memory"
MEMORY = "ptx/memory.cuh"
RELEASE, ACQUIRE = "red.release.gpu", "ld.acquire.gpu"
SM80 = "flash_bwd_sm80.cu"
AWAIT_TURN = "  if (kDeterministic && threadIdx.x == 0) await(counter, turn);\n"
TURN_BARRIER = (
    "    if (kDeterministic) __syncthreads();  // it is this tile's turn for every thread\n"
)
# Of both architectures, or of sm80's kernel; test_hopper_backward_bugs.py has those of sm90's.
# name: (capabilities, file, what stands there, what takes its place)
BUGS = {
    "relaxed-release": ((80, 90), MEMORY, RELEASE, RELEASE.replace("release", "relaxed")),
    "release-in-the-block": ((80, 90), MEMORY, RELEASE, RELEASE.replace("gpu", "cta")),
    "relaxed-acquire": ((80, 90), MEMORY, ACQUIRE, ACQUIRE.replace("acquire", "relaxed")),
    "acquire-in-the-block": ((80, 90), MEMORY, ACQUIRE, ACQUIRE.replace("gpu", "cta")),
    "turn-not-awaited": ((80,), SM80, AWAIT_TURN, ""),
    "turn-awaited-by-one-thread": ((80,), SM80, TURN_BARRIER, ""),
}
QUICK = ("relaxed-release", "relaxed-acquire", "turn-not-awaited")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in QUICK_CASES else pytest.mark.full) for x in CASES]
)
def test_one_block_at_a_time_in_every_order(name: str) -> None:
    capability, case = CASES[name]
    expected = gradients(capability, case)
    blocks = expected.pop("blocks")
    assert blocks in (3, 4)
    for order in permutations(range(blocks)):
        found = gradients(capability, case, threads=1, order=order)
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value, err_msg=f"{key}, {order}")


def test_every_bug_has_its_place() -> None:
    for _, source, old, new in BUGS.values():
        assert changed(source, old, new)


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        pytest.param(name, capability, marks=() if name in QUICK else pytest.mark.full)
        for name, (capabilities, *_) in BUGS.items()
        for capability in capabilities
    ],
)
def test_bug_is_noticed(
    name: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the first run already, in which the blocks ran one after the other in their order."""
    from emulator import EmulatorError

    _, *replacement = BUGS[name]
    forward(capability, SUMMED)  # by kernels as they are
    put_in(*replacement, tmp_path, monkeypatch)
    with pytest.raises(EmulatorError, match=RACE):
        gradients(capability, SUMMED, schedule="eager", threads=1)


def test_work_by_the_number_of_the_block_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emulator import EmulatorError

    forward(80, SUMMED)
    old = "*index = atomic_add(p.turns, 1);"
    put_in(SM80, old, "*index = blockIdx.x;", tmp_path, monkeypatch)
    gradients(80, SUMMED, threads=1, order=range(3))
    with pytest.raises(EmulatorError, match="deadlock.*(?s:.*)2 of the 3 blocks have not started"):
        gradients(80, SUMMED, threads=1, order=(1, 0, 2))


@cache
def forward(capability: int, case: Case) -> tuple[np.ndarray, np.ndarray]:
    q, k, v, *_ = case.arrays()
    return emulated(capability=capability).forward(q, k, v, **case.options)


def gradients(capability: int, case: Case, **options: Any) -> dict[str, Any]:
    """The gradients' bits, also of dq before it is rounded, and how many blocks there were."""
    q, k, v, dout, _ = case.arrays()
    out, lse = forward(capability, case)
    on = emulated(capability=capability, **options)
    dq, dk, dv, *_ = on.backward(dout, q, k, v, out, lse, **case.options)
    main = next(x for x in on.launches if "DETERMINISTIC" in dict(x.kernel.constants))
    found = {"dq": dq, "dk": dk, "dv": dv, "sums": main.dq_sums}
    return {name: bits(x) for name, x in found.items()} | {"blocks": main.blocks}
