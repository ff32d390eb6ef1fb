"""Which kernels a call would use, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cuflash._mask_blocks import TileCounts
from cuflash._mask_tree import Mask
from cuflash._packed import PackedProblem, dense_or_packed
from cuflash.attention import DENSE, Array, Integers, Window
from cuflash.interop import receive
from cuflash.score_mod import ScoreMod
from cuflash.varlen import PACKED


@dataclass(frozen=True)
class Explanation:
    """What `explain` finds; as a string, one sentence.

    Attributes
    ----------
    backend : "cpu", "sm80" or "sm90"
        Of the forward pass.
    reason : str
        Why it is this one.
    kernel : str
        Its source file in kernels_cu; empty on the CPU.
    backward_kernel : str
        That of the backward pass of the same call, where dout is contiguous. Empty on the CPU, and
        where a score_mod has no derivative.
    block_q, block_kv : int
        Queries and keys of a tile of the forward pass, at most.
    tiles : TileCounts or None
        What a mask leaves of the tiles; None without one, and on a GPU.
    """

    backend: str
    reason: str
    kernel: str
    backward_kernel: str
    block_q: int
    block_kv: int
    tiles: TileCounts | None = None

    def __str__(self) -> str:
        kernel = f", {self.kernel}" if self.kernel else ""
        found = f"{self.backend}{kernel}, tiles of {self.block_q} x {self.block_kv}"
        if self.tiles is not None:
            hidden, partial, full = self.tiles
            found += f" ({hidden} hidden, {partial} partly visible, {full} in full)"
        backward = f"; backward: {self.backward_kernel}" if self.backward_kernel else ""
        return f"{found}: {self.reason}{backward}"


def explain(
    q: Array,
    k: Array,
    v: Array,
    cu_seqlens_q: Integers | None = None,
    cu_seqlens_k: Integers | None = None,
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
    """Which backend and kernels `attention` or `attention_varlen` would use, and why.

    No attention is computed and no kernel compiled; the arguments are checked as these check them.
    On the CPU it counts how many tiles a mask hides, shows in part and in full, of all batch
    entries and query heads; a mask on a GPU is not read, which would be to wait for it.

    Parameters
    ----------
    q, k, v : arrays
        As in `attention`, or, with `cu_seqlens_q` and `cu_seqlens_k`, as in `attention_varlen`.
    cu_seqlens_q, cu_seqlens_k : (B + 1,) integers
        As in `attention_varlen`. Without them it is a call of `attention`.
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
    cpu, tiles of 3 x 3: the arrays are in the memory of the CPU
    >>> q = k = v = np.ones((1, 512, 2, 4), np.float32)
    >>> cuflash.explain(q, k, v, mask=cuflash.masks.causal()).tiles
    TileCounts(hidden=12, partial=8, full=12)
    """
    return _explain("explain", locals())


def _explain(function: str, arguments: dict[str, Any]) -> Explanation:
    with receive(function, ("q", "k", "v"), arguments) as call:
        problem = call.upload(dense_or_packed(function, call.device, call.arguments))
        kind = PACKED if isinstance(problem, PackedProblem) else DENSE
        backend = kind.backend(call.device)
        if call.device == "cpu":
            block, tiles = backend.explain(problem)
            return Explanation(
                "cpu", "the arrays are in the memory of the CPU", "", "", *block, tiles
            )
        plan, reason, backward_kernel = backend.explain(problem)
    tile = plan.tiling.block_q, plan.tiling.block_kv
    return Explanation(plan.backend, reason, plan.kernel.source, backward_kernel, *tile)
