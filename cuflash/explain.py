"""Which kernel a call would use, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cuflash._mask_tree import Mask
from cuflash._problem import Problem
from cuflash.attention import Array, Integers, Window
from cuflash.interop import receive
from cuflash.score_mod import ScoreMod


@dataclass(frozen=True)
class Explanation:
    """What `explain` finds; as a string, one sentence."""

    backend: str  # "cpu", "sm80" or "sm90"
    reason: str
    kernel: str  # source file in kernels_cu; empty on the CPU
    block_q: int  # queries and keys of a tile; 0 on the CPU, which cuts tiles by size
    block_kv: int

    def __str__(self) -> str:
        tiles = f", {self.kernel}, tiles of {self.block_q} x {self.block_kv}" if self.kernel else ""
        return f"{self.backend}{tiles}: {self.reason}"


def explain(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    offset: int | Integers | None = None,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    q_lens: Integers | None = None,
    kv_lens: Integers | None = None,
    mask: Mask | Array | None = None,
    bias: Array | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    score_mod: ScoreMod | None = None,
    out: Array | None = None,
) -> Explanation:
    """Which backend and kernel `attention` would use for these arguments, and why.

    Nothing is computed or compiled, and the arguments are checked as `attention` checks them.

    Parameters
    ----------
    q, k, v : arrays
        As in `attention`.
    causal, offset, window, scale, softcap, q_lens, kv_lens, mask, bias, out
        As in `attention`.
    alibi_slopes, sinks, dropout, seed, score_mod
        As in `attention`.

    Returns
    -------
    Explanation
        Its string is the answer; its fields are for programs.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `attention`.

    Examples
    --------
    >>> import numpy as np, cuflash
    >>> q = k = v = np.ones((1, 3, 2, 4), np.float32)
    >>> print(cuflash.explain(q, k, v, causal=True))
    cpu: the arrays are in the memory of the CPU
    """
    return _explain("explain", locals())


def _explain(function: str, arguments: dict[str, Any]) -> Explanation:
    with receive(function, ("q", "k", "v"), arguments) as call:
        problem = call.upload(Problem.create(function, call.device, **call.arguments))
        if call.device == "cpu":
            return Explanation("cpu", "the arrays are in the memory of the CPU", "", 0, 0)
        # As in attention.py: only calls on a GPU need CuPy.
        from cuflash import _launch

        plan, reason = _launch.explain(problem)
    return Explanation(
        plan.backend, reason, plan.kernel.source, plan.tiling.block_q, plan.tiling.block_kv
    )
