"""Allocate, pack parameters, launch: what happens on a GPU in one forward or backward."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from cuflash import _classify, _params, _plan, _plan_sm90, _traits
from cuflash._convert import as_contiguous
from cuflash._gpu import Gpu, gpu
from cuflash._kept import kept
from cuflash._packed_tiles import fill_rest, packing_tables
from cuflash._params import RowDeltas, Workspace
from cuflash._problem import Array, GradientProblem, Gradients, Packing, Problem, Result
from cuflash._term_gradients import bias_gradient, sink_gradient

_INT64, _FLOAT32 = np.dtype(np.int64), np.dtype(np.float32)
_DEVICE_DTYPES = {
    **dict.fromkeys(("q_lens", "kv_lens", "offset"), _INT64),
    **dict.fromkeys(("alibi_slopes", "sinks"), _FLOAT32),
}
_ROW_STATS = 3  # of backward.cuh
_MAX_KEPT = 4096
_forward_choices: dict[tuple, _Choice] = {}
_forward_launches: dict[tuple, _Launch] = {}
_backward_choices: dict[tuple, tuple[_traits.Traits, _traits.BackwardPlan]] = {}
_backward_launches: dict[tuple, tuple[_Launch, ...]] = {}


def forward(problem: Problem, on: Gpu | None = None, wants_stats: bool = False) -> Result:
    """Out, lse and, if wanted, stats of a problem; `on` defaults to the GPU that q is on."""
    on = on or gpu(problem.q.data.device_id)
    out = problem.out if problem.out is not None else on.empty(problem.out_shape, problem.dtype)
    lse = on.empty(problem.lse_shape, problem.lse_dtype)
    stats = on.empty((2, *problem.lse_shape), problem.lse_dtype) if wants_stats else None
    result = Result(out, lse, stats)
    if not lse.size:
        return result
    if problem.reads_no_more:
        _run(on, *_known_launch(problem, result, on))
        return result

    problem = _with_device_arrays(problem, on)
    choice = _forward_choice(problem, out, on.device)
    tables = _tables(problem, choice.traits, choice.plan.tiling, on, of_keys=False)
    if problem.packing is not None:
        fill_rest(problem, result, tables, on)
    _run(on, *_forward_launch(problem, result, choice, on, tables))
    return result


class _Launch(NamedTuple):
    kernel: _traits.Kernel
    blocks: int
    params: bytes


def _known_launch(problem: Problem, result: Result, on: Gpu) -> _Launch:
    """Kept by all that it depends on: allocators give the same addresses again and again."""

    def find() -> _Launch:
        choice = _forward_choice(problem, result.out, on.device)
        return _forward_launch(problem, result, choice, on)

    key = (on, *_params.places(problem, result))
    return kept(_forward_launches, key, find, _MAX_KEPT, keeps=not on.is_captured)


def _forward_launch(
    problem: Problem,
    result: Result,
    choice: _Choice,
    on: Gpu,
    tables: _params.Tables = _params.NO_TABLES,
) -> _Launch:
    plan, heads_per_section = choice.plan, choice.heads_per_section
    blocks = _query_tiles(problem, plan.tiling)
    if plan.backend == "sm80":
        params = _params.pack_forward(problem, result, heads_per_section, tables)
        return _Launch(plan.kernel, blocks, params)
    params = _params.pack_forward_sm90(
        problem,
        result,
        heads_per_section * problem.group,
        choice.panels,
        plan.tiling.block_kv,
        on.encode,
        tables,
    )
    if problem.mask is None and problem.packing is None:
        blocks = min(blocks, on.device.sms)  # else tiles differ: the hardware spreads them evenly
    return _Launch(plan.kernel, blocks, params)


def backward_traits(gradient: GradientProblem, grads: tuple[Array, Array, Array]) -> _traits.Traits:
    """What selects the kernels of a backward pass into `grads`."""
    problem = gradient.forward
    loaded = {"q": problem.q, "k": problem.k, "v": problem.v, "dout": gradient.dout}
    alignment = _params.alignment(*loaded.values(), gradient.out, *grads)
    obstacle = _obstacle(problem, loaded, {"dk": grads[1], "dv": grads[2]})
    return _traits.Traits.of(problem, alignment, tma=not obstacle)


class _Choice(NamedTuple):
    """What a forward pass is launched with."""

    traits: _traits.Traits
    plan: _traits.ForwardPlan
    heads_per_section: int
    panels: tuple[int, int]


def _forward_choice(problem: Problem, out: Array, device: _traits.Device) -> _Choice:
    """Kept by layout: a warm call looks it up."""
    extras = _traits.Extras.of(problem)

    def find() -> _Choice:
        traits = forward_traits(problem, out)
        return _Choice(
            traits,
            _plan.forward_plan(traits, device.capability),
            _plan.heads_per_section(problem, device),
            _plan_sm90.panels(traits),
        )

    dense_tiles = _plan_sm90.dense_tiles_pay(problem)
    layout = (device, *_params.layout(problem, out, extras), dense_tiles)
    return kept(_forward_choices, layout, find, _MAX_KEPT)


def forward_traits(problem: Problem, out: Array) -> _traits.Traits:
    """What selects the kernel of a forward pass into `out`."""
    alignment = _params.alignment(problem.q, problem.k, problem.v, out)
    tma = not _forward_obstacle(problem, out)
    dense_tiles = tma and _plan_sm90.dense_tiles_pay(problem)
    return _traits.Traits.of(problem, alignment, tma, dense_tiles)


def explain(problem: Problem, on: Gpu | None = None) -> tuple[_traits.ForwardPlan, str, str]:
    """The plan of a forward pass, why it is this backend's, and the source of its backward."""
    on = on or gpu(problem.q.data.device_id)
    out = problem.out if problem.out is not None else _unread(problem.out_shape, problem.dtype)
    plan = _plan.forward_plan(forward_traits(problem, out), on.device.capability)
    backward = _backward_source(problem, out, on.device.capability)
    if plan.backend == "sm90":
        return plan, "a Hopper GPU, and TMA can move q, k, v and out", backward
    if _traits.backend_of(on.device.capability, tma=True) == "sm80":
        return plan, f"the GPU is {on.device.arch}, not Hopper (sm_90)", backward
    return plan, f"a Hopper GPU, but {_forward_obstacle(problem, out)}", backward


def _backward_source(problem: Problem, out: Array, capability: int) -> str:
    """Of the kernel that would go back through this call; empty where none can."""
    if problem.score_mod is not None and problem.score_mod.backward is None:
        return ""
    grads = tuple(_unread(x.shape, x.dtype) for x in (problem.q, problem.k, problem.v))
    dout = _unread(problem.out_shape, problem.dtype)
    lse = _unread(problem.lse_shape, problem.lse_dtype)
    gradient = GradientProblem(problem, dout, out, lse, dlse=None, deterministic=True)
    return _plan.backward_plan(backward_traits(gradient, grads), capability, True).main.source


def _unread(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Laid out as an array that a call allocates, at an address where nobody may look."""
    interface = {"data": (1 << 46, False), "shape": shape, "version": 3}
    interface["typestr"] = f"|V{dtype.itemsize}"
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def _forward_obstacle(problem: Problem, out: Array) -> str:
    """As `_obstacle`, of a forward pass into `out`."""
    return _obstacle(problem, {"q": problem.q, "k": problem.k, "v": problem.v}, {"out": out})


def _obstacle(problem: Problem, loaded: dict[str, Array], stored: dict[str, Array]) -> str:
    """Why Hopper's kernels do not serve these arrays; empty where they do."""
    if _plan_sm90.few_queries(problem):
        return f"{problem.seqlen_q} queries do not fill a tile of its kernels"
    return _params.tma_obstacle(loaded, stored)


def backward(gradient: GradientProblem, on: Gpu | None = None) -> Gradients:
    """The gradients of a checked problem; `on` defaults to the GPU that q is on."""
    problem = gradient.forward
    on = on or gpu(problem.q.device.id)
    q, k, v = problem.q, problem.k, problem.v
    if not q.size or (not k.size and problem.sinks is None):
        return gradient.zeros(on.zeros)
    allocate = on.empty if problem.packing is None else on.zeros  # tokens of no sequence
    grads = tuple(allocate(x.shape, x.dtype) for x in (q, k, v))
    sinks_dtype = None if problem.sinks is None else problem.sinks.dtype
    problem = _with_device_arrays(problem, on)
    gradient = _with_contiguous_rows(gradient, problem, on)

    traits, plan = _backward_choice(gradient, grads, on.device)
    tables = _tables(problem, traits, plan.tiling, on, of_keys=True)
    query_tiles = _query_tiles(problem, plan.tiling)
    rows = query_tiles * plan.tiling.block_q
    workspace = Workspace(
        row_stats=on.empty((_ROW_STATS * rows,), np.float32),
        delta=on.empty((rows,), np.float32),
        dq_acc=on.empty((rows * plan.head_dim,), np.float32),
        turns=on.empty((1 + query_tiles,), np.uint32),
        large=on.empty((query_tiles,), np.uint32),
    )
    if problem.reads_no_more:
        launches = _known_launches(gradient, grads, workspace, plan, on)
    else:
        launches = _launches(gradient, grads, workspace, plan, on, tables)
    for launch in launches:
        _run(on, *launch)
    group = problem.group if plan.tiling.pack_group else 1
    heads = problem.heads_q // group * (problem.batch if problem.packing is None else 1)
    deltas = RowDeltas(workspace.delta, rows // heads, plan.tiling.block_q, group)
    dbias = dsinks = None
    if gradient.bias_gradient:
        dbias = bias_gradient(gradient, traits, deltas, tables, on)
    if problem.sinks is not None:
        dsinks = sink_gradient(gradient, traits, deltas, tables, sinks_dtype, on)
    return Gradients(*grads, dbias, dsinks)


def _backward_choice(
    gradient: GradientProblem, grads: tuple[Array, Array, Array], device: _traits.Device
) -> tuple[_traits.Traits, _traits.BackwardPlan]:
    """Kept by layout, as a forward's."""
    extras = _traits.Extras.of(gradient.forward)

    def find() -> tuple[_traits.Traits, _traits.BackwardPlan]:
        traits = backward_traits(gradient, grads)
        return traits, _plan.backward_plan(traits, device.capability, gradient.deterministic)

    layout = (device, *_params.gradient_layout(gradient, grads, extras))
    return kept(_backward_choices, layout, find, _MAX_KEPT)


def _known_launches(
    gradient: GradientProblem,
    grads: tuple[Array, Array, Array],
    workspace: Workspace,
    plan: _traits.BackwardPlan,
    on: Gpu,
) -> tuple[_Launch, ...]:
    """Kept by all that they depend on, as a forward's."""
    key = (on, *_params.gradient_places(gradient, grads, workspace))

    def find() -> tuple[_Launch, ...]:
        return _launches(gradient, grads, workspace, plan, on)

    return kept(_backward_launches, key, find, _MAX_KEPT, keeps=not on.is_captured)


def _launches(
    gradient: GradientProblem,
    grads: tuple[Array, Array, Array],
    workspace: Workspace,
    plan: _traits.BackwardPlan,
    on: Gpu,
    tables: _params.Tables = _params.NO_TABLES,
) -> tuple[_Launch, ...]:
    """Of a backward pass: lse and delta, the gradients, and dq in its dtype."""
    problem, tiling = gradient.forward, plan.tiling
    params = main_params = _params.pack_backward(gradient, grads, workspace, tables)
    if plan.backend == "sm90":
        tile = (tiling.block_q, tiling.block_kv)
        main_params = _params.pack_backward_sm90(
            gradient, grads, params, tile, plan.panels, on.encode
        )
    query_tiles = _query_tiles(problem, tiling)
    return (
        _Launch(plan.prep, query_tiles, params),
        _Launch(plan.main, _key_tiles(problem, tiling), main_params),
        _Launch(plan.post, query_tiles, params),
    )


def _run(on: Gpu, kernel: _traits.Kernel, blocks: int, params: bytes) -> None:
    if blocks:
        on.run(kernel, blocks, params)


def _tables(
    problem: Problem, traits: _traits.Traits, tiling: _traits.Tiling, on: Gpu, of_keys: bool
) -> _params.Tables:
    """What a launch reads that is computed on the device; `of_keys`: for a backward pass."""
    tables = _params.NO_TABLES
    if traits.extras.program.source:
        tables = _classify.tables(problem, traits, tiling, on, of_keys)
    if problem.packing is not None:
        packing, owners = packing_tables(problem, tiling, on, of_keys)
        tables = tables._replace(packing=packing, owners=(*tables.owners, *owners))
    return tables


def _query_tiles(problem: Problem, tiling: _traits.Tiling) -> int:
    """Of all heads of Rows; of packed sequences, at most."""
    group = problem.group if tiling.pack_group else 1
    heads, rows = problem.heads_q // group, problem.seqlen_q * group
    if problem.packing is not None:
        return heads * (rows // tiling.block_q + problem.sequences)
    return problem.batch * heads * -(-rows // tiling.block_q)


def _key_tiles(problem: Problem, tiling: _traits.Tiling) -> int:
    """Likewise, of all heads of k."""
    if problem.packing is not None:
        return problem.heads_k * (problem.seqlen_k // tiling.block_kv + problem.sequences)
    return problem.batch * problem.heads_k * -(-problem.seqlen_k // tiling.block_kv)


def _with_device_arrays(problem: Problem, on: Gpu) -> Problem:
    """The kernels read integers as contiguous int64, slopes and sinks as contiguous float32."""
    changes = {}
    for name, dtype in _DEVICE_DTYPES.items():
        x = getattr(problem, name)
        if x is not None and not isinstance(x, int):
            changes[name] = as_contiguous(x, dtype, on)
    if problem.packing is not None:
        edges = (as_contiguous(x, _INT64, on) for x in problem.packing)
        changes["packing"] = Packing(*edges)
    if problem.mask is not None:
        changes["mask"] = problem.mask.map_integers(lambda x: as_contiguous(x, _INT64, on))
    return replace(problem, **changes) if changes else problem


def _with_contiguous_rows(gradient: GradientProblem, problem: Problem, on: Gpu) -> GradientProblem:
    """The kernels read lse, dlse and stats as contiguous float32."""
    arrays = {name: getattr(gradient, name) for name in ("lse", "dlse", "stats")}
    found = {n: as_contiguous(x, _FLOAT32, on) for n, x in arrays.items() if x is not None}
    return replace(gradient, forward=problem, **found)
