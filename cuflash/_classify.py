"""Which tiles of a mask are visible, found on the GPU that its arrays are on, unawaited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from cuflash import _params, _plan_small, _program, _traits
from cuflash._gpu import Gpu
from cuflash._mask_tree import Compiled, Dense, Mask
from cuflash._params import Tables, TileLists
from cuflash._problem import Array, Problem

WORD_KEYS = 32
WARP = 32


def tables(
    problem: Problem, traits: _traits.Traits, tiling: _traits.Tiling, on: Gpu, of_keys: bool
) -> Tables:
    """What a kernel of this tiling is handed over of the problem's mask and score function.

    `of_keys`: lists of the query tiles that each key tile visits, as a backward pass walks.
    """
    found = attachments(problem, on)
    if problem.mask is None:
        return found

    def find() -> tuple[TileLists, Array]:
        return _tile_lists(problem, found, traits, tiling, on, of_keys)

    lists, entries = _kept(problem, (traits.extras, tiling, of_keys), on, find)
    return found._replace(lists=lists, owners=(*found.owners, entries))


def attachments(problem: Problem, on: Gpu) -> Tables:
    """What the call's own source reads, without lists."""
    packed, owners = b"", ()
    if problem.mask is not None:
        bits = _kept(problem, "bits", on, lambda: _pack_bits(problem.mask, on))
        packed = _program.mask_attachments(problem.mask, problem.group, bits)
        owners = tuple(one.words for one in bits.values())
    if problem.score_mod is not None:
        packed += _program.score_mod_attachments(problem.score_mod)
    return Tables(attachments=packed, owners=owners)


def sights(
    problem: Problem, found: Tables, traits: _traits.Traits, tiling: _traits.Tiling, on: Gpu
) -> Array:
    """(B or 1, heads of Rows or 1, query tiles, key tiles): 0 none, 1 some, 2 all visible."""

    def find() -> Array:
        return _find_sights(problem, found, traits, tiling, on, whole_rows=False)

    return _kept(problem, ("sights", traits.extras, tiling), on, find)


def _find_sights(
    problem: Problem,
    found: Tables,
    traits: _traits.Traits,
    tiling: _traits.Tiling,
    on: Gpu,
    whole_rows: bool,
) -> Array:
    """As `sights`; with `whole_rows`, rows past the query length are not visible."""
    packed = problem.group if tiling.pack_group else 1  # heads in the rows
    masks_of_rows, heads = 1, 1
    if _program.depends_on_head(problem.mask):
        masks_of_rows, heads = packed, problem.heads_q // packed
    batches = problem.batch if _program.depends_on_batch(problem) else 1
    query_tiles = -(-problem.seqlen_q * packed // tiling.block_q)
    key_tiles = -(-problem.seqlen_k // tiling.block_kv)
    found_sights = on.empty((batches, heads, query_tiles, key_tiles), np.uint8)
    kernel = _plan_small.mask_tiles_kernel(traits, tiling, on.device.capability, whole_rows)
    params = _params.pack_mask_tiles(problem, found, found_sights, masks_of_rows)
    _run(on, kernel, found_sights.size, params)
    return found_sights


def _tile_lists(
    problem: Problem,
    found: Tables,
    traits: _traits.Traits,
    tiling: _traits.Tiling,
    on: Gpu,
    of_keys: bool,
) -> tuple[TileLists, Array]:
    """Where the lists are, and the array that owns them."""
    own_sights = _find_sights(problem, found, traits, tiling, on, whole_rows=of_keys)
    batches, heads, query_tiles, key_tiles = own_sights.shape
    kernel = _plan_small.mask_lists_kernel(on.device.capability)
    turns = on.empty(own_sights.shape, np.uint32) if of_keys else None
    entries = on.empty((batches, heads, query_tiles, 1 + key_tiles, 2), np.int32)
    params = _params.pack_mask_lists(own_sights, entries, turns, of_keys=False)
    _run(on, kernel, batches * heads * query_tiles, params)
    if of_keys:
        entries = on.empty((batches, heads, key_tiles, 1 + query_tiles, 2), np.int32)
        params = _params.pack_mask_lists(own_sights, entries, turns, of_keys=True)
        _run(on, kernel, batches * heads * key_tiles, params)

    lines, pitch = entries.shape[2:4]
    of_head = lines * pitch
    strides = (0 if batches == 1 else heads * of_head, 0 if heads == 1 else of_head, pitch)
    return TileLists(_params.address(entries), *strides), entries


def _kept(problem: Problem, what: Any, on: Gpu, find: Callable[[], Any]) -> Any:
    """From the tables of a compiled mask, where nothing else of the call lies on the device.

    Each stream has tables of its own: nothing else would order another's reads after the writes.
    What a CUDA graph makes is computed by its replays alone, and what it reads has to stay.
    """
    of_device = (problem.q_lens, problem.kv_lens, problem.offset)
    per_batch = any(x is not None and not isinstance(x, int) for x in of_device)
    if not isinstance(problem.mask, Compiled) or per_batch:
        return find()
    shape = (*problem.lse_shape, problem.seqlen_k, problem.heads_k)
    key = (what, shape, problem.window, problem.offset, on.stream)
    found = problem.mask.kept(key, find, keeps=not on.is_captured)
    if on.is_captured and key in problem.mask.tables:
        problem.mask.read_by_graphs[id(found)] = found
    return found


def _pack_bits(mask: Mask, on: Gpu) -> dict[int, _program.Bits]:
    """Every Dense leaf's array as bits, by the leaf's number."""
    bits = {}
    for number, leaf in enumerate(mask.leaves()):
        if isinstance(leaf, Dense):
            booleans = leaf.array.reshape((1,) * (4 - leaf.array.ndim) + leaf.array.shape)
            batch, heads, rows, keys = booleans.shape
            words = on.empty((batch, heads, rows, -(-keys // WORD_KEYS)), np.uint32)
            kernel = _plan_small.mask_bits_kernel(on.device.capability)
            params = _params.pack_mask_bits(booleans, words)
            _run(on, kernel, -(-words.size // WARP), params)
            bits[number] = _program.Bits(words, keys)
    return bits


def _run(on: Gpu, kernel: _traits.Kernel, warps: int, params: bytes) -> None:
    if warps:
        on.run(kernel, -(-warps * WARP // kernel.threads), params)
