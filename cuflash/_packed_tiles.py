"""The tables of packed sequences' tiles, made on the GPU that the lengths are on, and the rest."""

from __future__ import annotations

import numpy as np

from cuflash import _params, _plan_small, _traits
from cuflash._gpu import Gpu
from cuflash._params import PackingTables, Tables
from cuflash._problem import Array, Problem, Result


def packing_tables(
    problem: Problem, tiling: _traits.Tiling, on: Gpu, of_keys: bool
) -> tuple[PackingTables, tuple[Array, ...]]:
    """Where the tables are, and the arrays that own them; `of_keys`: also the tiles of keys."""
    cu_seqlens_q, cu_seqlens_k = problem.packing
    group = problem.group if tiling.pack_group else 1
    queries = _tables(cu_seqlens_q, problem.seqlen_q, group, tiling.block_q, on, lists=True)
    keys = _tables(cu_seqlens_k, problem.seqlen_k, 1, tiling.block_kv, on, lists=of_keys)
    fields = PackingTables(
        query_edges=_params.address(queries[0]),
        key_edges=_params.address(keys[0]),
        first_query_tile=_params.address(queries[1]),
        query_tiles=_params.address(queries[2]),
        key_tiles=_params.address(keys[2]),
        query_tile_count=queries[2].shape[0],
        key_tile_count=keys[2].shape[0],
    )
    return fields, (*queries, *keys)


def fill_rest(problem: Problem, result: Result, tables: Tables, on: Gpu) -> None:
    """What a query without keys gets, for tokens of no sequence: the main kernel passes over."""
    kernel = _plan_small.packed_rest_kernel(on.device.capability)
    on.run(kernel, on.device.sms, _params.pack_packed_rest(problem, result, tables))


def _tables(
    cu: Array, tokens: int, group: int, block: int, on: Gpu, lists: bool
) -> tuple[Array, Array, Array]:
    """Edges, each sequence's first tile, and all tiles: as many places as they can need."""
    sequences = cu.shape[0] - 1
    count = tokens * group // block + sequences if lists else 0
    edges, first_tile = (on.empty((sequences + 1,), np.int32) for _ in range(2))
    tiles = on.empty((count, 2), np.int32)
    kernel = _plan_small.packed_tiles_kernel(on.device.capability)
    params = _params.pack_packed_tiles(cu, edges, first_tile, tiles, tokens, group, block)
    on.run(kernel, 1, params)
    return edges, first_tile, tiles
