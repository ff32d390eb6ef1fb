"""The bytes of kernels_cu/params.cuh: a problem and its arrays, packed for one launch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from struct import Struct
from typing import Any, NamedTuple

from cuflash._overlap import address
from cuflash._problem import Array, GradientProblem, Problem, Result

_TENSOR = "Q3q"
_PROBLEM = Struct("3Q3q6iIi2i4f" + "QqQ" + "Q4q" + "QIf" + "Q3q" + "5Q2i")  # and the attachments
_FORWARD = Struct(4 * _TENSOR + "3Q2i")
_BACKWARD = Struct(8 * _TENSOR + "8Q")
_MASK_TILES = Struct("Q4i")
_MASK_LISTS = Struct("3Q3q4i")
_MASK_BITS = Struct("Q4qQ4i")
_PACKED_TILES = Struct("4Q6i")
_PACKED_REST = Struct("Q" + _TENSOR + "3Q4i")
_CONVERT = Struct("Q4qQ4q")
_ROW_STATS = "3Qq2i"
_BIAS_GRADIENT = Struct(4 * _TENSOR + _ROW_STATS + "Q2qQ" + "6i")
_BIAS_SUM = Struct("2Q2q")
_SINK_GRADIENT = Struct(_ROW_STATS + "Q")
TENSOR_MAP_BYTES = 128  # of a CUtensorMap, and what its address is a multiple of
PROBLEM_BYTES = _PROBLEM.size
FORWARD_BYTES = PROBLEM_BYTES + _FORWARD.size
BACKWARD_BYTES = PROBLEM_BYTES + _BACKWARD.size
MASK_TILES_BYTES = PROBLEM_BYTES + _MASK_TILES.size
MASK_LISTS_BYTES = _MASK_LISTS.size
MASK_BITS_BYTES = _MASK_BITS.size
PACKED_TILES_BYTES = _PACKED_TILES.size
PACKED_REST_BYTES = _PACKED_REST.size
CONVERT_BYTES = _CONVERT.size
BIAS_GRADIENT_BYTES = PROBLEM_BYTES + _BIAS_GRADIENT.size
BIAS_SUM_BYTES = _BIAS_SUM.size
SINK_GRADIENT_BYTES = PROBLEM_BYTES + _SINK_GRADIENT.size
FORWARD_MAPS, BACKWARD_MAPS = 4, 6  # tensor maps before ForwardParams, before BackwardParams

# Beyond any offset and length, and far enough from the ends of 64 bits to be added to them.
_UNBOUNDED = 1 << 61
_TMA_STRIDE_LIMIT = 1 << 40
_WRAP = 1 << 30  # of panels.cuh
_PLACES, _PLACE_BYTES = 0x7FFF0000, 16  # coordinates are signed: well below 2^31
_CHUNK_BYTES = 16  # in which TMA stores
_WARPGROUP_ROWS = 64
_LOG2_E = math.log2(math.e)
_MAX_FLOAT32 = (2 - 2**-23) * 2.0**127


class TensorMap(NamedTuple):
    """What cuTensorMapEncodeTiled is told of 16-bit elements; axes from the innermost outwards."""

    address: int
    extents: tuple[int, ...]  # elements
    strides: tuple[int, ...]  # bytes, of all axes but the first
    box: tuple[int, ...]  # elements that one copy moves

    @property
    def swizzle_bytes(self) -> int:
        """A panel of 64 or 32 columns is as wide as the swizzle."""
        return 2 * self.box[0]


Encoder = Callable[[TensorMap], bytes]


class TileLists(NamedTuple):
    """Of mask_lists.cu: strides in entries, 0 where batch entries or heads share their lists."""

    address: int
    batch_stride: int
    head_stride: int
    pitch: int


class PackingTables(NamedTuple):
    """Of packed_tiles.cu."""

    query_edges: int = 0
    key_edges: int = 0
    first_query_tile: int = 0
    query_tiles: int = 0
    key_tiles: int = 0
    query_tile_count: int = 0
    key_tile_count: int = 0


class Tables(NamedTuple):
    """What a launch hands over of a mask's tree and a score function."""

    lists: TileLists = TileLists(0, 0, 0, 0)
    packing: PackingTables = PackingTables()
    attachments: bytes = b""
    owners: tuple[Array, ...] = ()  # arrays that must live until the launch


NO_TABLES = Tables()


class Workspace(NamedTuple):
    """What the kernels of a backward pass hand to each other, by query tiles."""

    row_stats: Array
    delta: Array
    dq_acc: Array
    turns: Array
    large: Array


class RowDeltas(NamedTuple):
    """A workspace's delta, and how the main kernel counts its rows."""

    delta: Array
    rows_per_head: int
    block_q: int
    group: int


def pack_forward(
    problem: Problem,
    result: Result,
    heads_per_section: int,
    tables: Tables = NO_TABLES,
) -> bytes:
    """ForwardParams."""
    return _problem(problem, tables) + _FORWARD.pack(
        *_tensor(problem.q),
        *_tensor(problem.k),
        *_tensor(problem.v),
        *_tensor(result.out),
        address(result.lse),
        *_stats_addresses(result.stats),
        heads_per_section,
        0,
    )


def pack_forward_sm90(
    problem: Problem,
    result: Result,
    heads_per_section: int,
    panels: tuple[int, int],
    block_kv: int,
    encode: Encoder,
    tables: Tables = NO_TABLES,
) -> bytes:
    """ForwardParamsSm90; `panels`: columns of a panel of q and k, of v and out."""
    maps = (
        load_map(problem, problem.q, _WARPGROUP_ROWS, panels[0]),
        load_map(problem, problem.k, block_kv, panels[0]),
        load_map(problem, problem.v, block_kv, panels[1]),
        _output_map(problem, result.out, panels[1]),
    )
    call = pack_forward(problem, result, heads_per_section, tables)
    return _with_maps(maps, call, encode)


def pack_backward(
    gradient: GradientProblem,
    grads: tuple[Array, Array, Array],
    workspace: Workspace,
    tables: Tables = NO_TABLES,
) -> bytes:
    """BackwardParams."""
    problem = gradient.forward
    tensors = (problem.q, problem.k, problem.v, gradient.out, gradient.dout, *grads)
    return _problem(problem, tables) + _BACKWARD.pack(
        *(field for tensor in tensors for field in _tensor(tensor)),
        *_known_of_rows(gradient),
        0 if gradient.dlse is None else address(gradient.dlse),
        *(address(array) for array in workspace),
    )


def pack_mask_tiles(problem: Problem, tables: Tables, sights: Array, masks_of_rows: int) -> bytes:
    """MaskTilesParams of mask_tiles.cu; sights: (batches, heads, query tiles, key tiles)."""
    fields = (address(sights), *sights.shape[:2], masks_of_rows, 0)
    return _problem(problem, tables) + _MASK_TILES.pack(*fields)


def pack_mask_lists(sights: Array, entries: Array, turns: Array | None, of_keys: bool) -> bytes:
    """MaskListsParams of mask_lists.cu; sights: (batches, heads, query tiles, key tiles)."""
    batches, heads, query_tiles, key_tiles = sights.shape
    lines, steps = (key_tiles, query_tiles) if of_keys else (query_tiles, key_tiles)
    strides = (1, key_tiles) if of_keys else (key_tiles, 1)
    return _MASK_LISTS.pack(
        address(sights),
        address(entries),
        0 if turns is None else address(turns),
        *strides,
        batches * heads,
        lines,
        steps,
        int(of_keys),
        0,
    )


def pack_mask_bits(booleans: Array, words: Array) -> bytes:
    """MaskBitsParams of mask_bits.cu; both with four axes."""
    return _MASK_BITS.pack(address(booleans), *booleans.strides, address(words), *booleans.shape)


def pack_packed_tiles(
    cu: Array, edges: Array, first_tile: Array, tiles: Array, tokens: int, group: int, block: int
) -> bytes:
    """PackedTilesParams of packed_tiles.cu."""
    arrays = map(address, (cu, edges, first_tile, tiles))
    sequences, count = cu.shape[0] - 1, tiles.shape[0]
    return _PACKED_TILES.pack(*arrays, sequences, tokens, group, block, count, 0)


def pack_packed_rest(problem: Problem, result: Result, tables: Tables) -> bytes:
    """PackedRestParams of packed_rest.cu."""
    sizes = (problem.sequences, problem.seqlen_q, problem.heads_q, problem.head_dim_v)
    arrays = (*_tensor(result.out), address(result.lse), *_stats_addresses(result.stats))
    return _PACKED_REST.pack(tables.packing.query_edges, *arrays, *sizes)


def pack_convert(array: Array, copy: Array) -> bytes:
    """ConvertParams of convert.cu."""
    missing = 4 - array.ndim
    strides, extents = ((*[0] * missing, *array.strides), (*[1] * missing, *array.shape))
    return _CONVERT.pack(address(array), *strides, address(copy), *extents)


def pack_bias_gradient(
    gradient: GradientProblem,
    tables: Tables,
    deltas: RowDeltas,
    sights: Array | None,
    sums: Array,
    extent: tuple[int, ...],
    splits: int,
) -> bytes:
    """BiasGradientParams of flash_bwd_bias.cu."""
    problem = gradient.forward
    tensors = (problem.q, problem.k, problem.v, gradient.dout)
    sights_fields = (0, 0, 0)
    if sights is not None:
        batches, heads, query_tiles, key_tiles = sights.shape
        matrix = query_tiles * key_tiles
        sights_fields = (
            address(sights),
            0 if batches == 1 else heads * matrix,
            0 if heads == 1 else matrix,
        )
    return _problem(problem, tables) + _BIAS_GRADIENT.pack(
        *(field for tensor in tensors for field in _tensor(tensor)),
        *_row_stats(gradient, deltas),
        *sights_fields,
        address(sums),
        *extent,
        splits,
        0,
    )


def pack_bias_sum(sums: Array, dbias: Array, splits: int) -> bytes:
    """BiasSumParams of flash_bwd_bias_sum.cu."""
    return _BIAS_SUM.pack(address(sums), address(dbias), dbias.size, splits)


def pack_sink_gradient(
    gradient: GradientProblem, tables: Tables, deltas: RowDeltas, dsinks: Array
) -> bytes:
    """SinkGradientParams of flash_bwd_sinks.cu."""
    fields = (*_row_stats(gradient, deltas), address(dsinks))
    return _problem(gradient.forward, tables) + _SINK_GRADIENT.pack(*fields)


def _row_stats(gradient: GradientProblem, deltas: RowDeltas) -> tuple[int, ...]:
    """row_max, row_sum and RowDeltas of backward.cuh."""
    delta, *counts = deltas
    return (*_known_of_rows(gradient), address(delta), *counts)


def _known_of_rows(gradient: GradientProblem) -> tuple[int, int]:
    """row_max and row_sum: lse and nothing where there are no stats."""
    if gradient.stats is None:
        return address(gradient.lse), 0
    return _stats_addresses(gradient.stats)


def _stats_addresses(stats: Array | None) -> tuple[int, int]:
    """Of the largest scores and of the sums, or two zeros."""
    if stats is None:
        return 0, 0
    return address(stats), address(stats) + stats.nbytes // 2


def places(problem: Problem, result: Result) -> tuple[Any, ...]:
    """All that a forward launch depends on where it reads nothing but q, k and v."""
    arrays = (problem.q, problem.k, problem.v, result.out, result.lse)
    options = (problem.scale, problem.softcap, problem.window, problem.offset)
    stats = _stats_addresses(result.stats)
    return (problem.sizes, *map(address, arrays), result.out.strides, *stats, *options)


def layout(problem: Problem, out: Array, extras: Any) -> tuple[Any, ...]:
    """All that a forward plan depends on: equal layouts have equal plans."""
    q, k, v = problem.q, problem.k, problem.v
    low_bits = (address(q) | address(k) | address(v) | address(out)) % 16
    options = (problem.scale > 0, problem.softcap > 0)
    return (problem.sizes, out.strides, low_bits, *options, extras)


def gradient_places(
    gradient: GradientProblem,
    grads: tuple[Array, Array, Array],
    workspace: Workspace,
) -> tuple[Any, ...]:
    """All that a backward pass's launches depend on, likewise; grads have their inputs' shapes."""
    dlse = None if gradient.dlse is None else address(gradient.dlse)
    rest = map(address, (gradient.dout, *grads, *workspace))
    own = (dlse, gradient.dout.strides, *(x.strides for x in grads), gradient.deterministic)
    result = Result(gradient.out, gradient.lse, gradient.stats)
    return (*places(gradient.forward, result), *rest, *own)


def gradient_layout(
    gradient: GradientProblem, grads: tuple[Array, Array, Array], extras: Any
) -> tuple[Any, ...]:
    """All that a backward plan depends on, likewise."""
    problem, dq = gradient.forward, grads[0]
    moved = 0  # by TMA, which sees neither out nor dq
    for array in (problem.q, problem.k, problem.v, gradient.dout, *grads[1:]):
        moved |= address(array)
    low_bits = (moved % 16, (address(gradient.out) | address(dq)) % 16)
    own = (gradient.dout.strides, *(x.strides for x in grads), gradient.deterministic)
    return (*layout(problem, gradient.out, extras), *low_bits, *own)


def alignment(*arrays: Array) -> int:
    """The largest power of two, at most 16, that divides the address of every row."""
    bits = 16
    for array in arrays:
        bits |= address(array)
        for stride, size in zip(array.strides[:3], array.shape[:3], strict=True):
            if size > 1:
                bits |= stride
    return bits & -bits


def pack_backward_sm90(
    gradient: GradientProblem,
    grads: tuple[Array, Array, Array],
    call: bytes,
    tile: tuple[int, int],
    panels: tuple[int, int, int],
    encode: Encoder,
) -> bytes:
    """BackwardParamsSm90; `call`: pack_backward's, `tile`: its queries and keys.

    `panels`: columns of a panel of q and dk, of k, of v, dout and dv.
    """
    problem = gradient.forward
    block_q, block_kv = tile
    maps = (
        load_map(problem, problem.q, block_q, panels[0]),
        load_map(problem, problem.k, block_kv, panels[1]),
        load_map(problem, problem.v, block_kv, panels[2]),
        load_map(problem, gradient.dout, block_q, panels[2]),
        _output_map(problem, grads[1], panels[0]),
        _output_map(problem, grads[2], panels[2]),
    )
    return _with_maps(maps, call, encode)


def tma_obstacle(loaded: dict[str, Array], stored: dict[str, Array]) -> str:
    """Why TMA cannot load or store one of these arrays; empty where it can move all.

    A load reads zeros past the innermost axis, element by element; a store writes 16-byte chunks.
    """
    for name, array in (loaded | stored).items():
        if not array.size:
            return f"{name} is empty"
        if address(array) % 16:
            return f"{name} starts at an address that is no multiple of 16 bytes"
        for axis in range(3):
            stride, size = array.strides[axis], array.shape[axis]
            if size > 1 and (stride % 16 or not 0 < stride < _TMA_STRIDE_LIMIT):
                return f"{name} has stride {stride} bytes in axis {axis}, no multiple of 16 above 0"
        batch_stride, row_stride, _ = _tma_strides(array.shape, array.strides)
        end = (array.shape[0] - 1) * batch_stride + array.shape[1] * row_stride
        if array.shape[1] > _WRAP or end >= _PLACES * _PLACE_BYTES:
            return f"{name} has more rows or bytes than the coordinates of its map reach"
    for name, array in stored.items():
        row_bytes = array.shape[3] * array.itemsize
        if row_bytes % _CHUNK_BYTES:
            return f"{name} has rows of {row_bytes} bytes, which TMA stores in multiples of 16"
    return ""


def mapped_bytes(maps: int, call_bytes: int) -> int:
    """Of a parameter with so many tensor maps: whole multiples of their alignment."""
    return (maps + -(-call_bytes // TENSOR_MAP_BYTES)) * TENSOR_MAP_BYTES


def _output_map(problem: Problem, array: Array, panel: int) -> TensorMap:
    """What a warpgroup stores: of a packed sequence no row beyond its length."""
    return (store_map if problem.packing is None else row_map)(array, _WARPGROUP_ROWS, panel)


def load_map(problem: Problem, array: Array, rows: int, panel: int) -> TensorMap:
    """What the kernels load by."""
    if problem.has_lengths:
        return row_map(array, rows, panel)
    return _load_map(address(array), array.shape, array.strides, rows, panel)


def row_map(array: Array, rows: int, panel: int) -> TensorMap:
    """A (B, S, H, D) array, of whose batch entries the first `length` rows exist (panels.cuh).

    Axes: column, 2^30 - length + row, where row `length` of the batch entry starts in units of 16
    bytes, head, 2^30. So the first row beyond the length is out of bounds. The last axis takes off
    2^30 rows, modulo 2^64: the map's address has to be the array's, where memory is mapped, as
    loads look at it. Triton's ragged descriptors do likewise.
    """
    return _row_map(address(array), array.shape, array.strides, rows, panel)


def store_map(array: Array, rows: int, panel: int) -> TensorMap:
    """A (B, S, H, D) array; axes: column, row, head, batch."""
    return _store_map(address(array), array.shape, array.strides, rows, panel)


# Kept for warm calls: allocators give the same addresses again and again.
_MAPS = 4096


@lru_cache(maxsize=_MAPS)
def _row_map(
    first: int, shape: tuple[int, ...], strides: tuple[int, ...], rows: int, panel: int
) -> TensorMap:
    _, _, heads, cols = shape
    _, row_stride, head_stride = _tma_strides(shape, strides)
    return TensorMap(
        first,
        (cols, _WRAP, _PLACES, heads, _WRAP + 1),
        (row_stride, _PLACE_BYTES, head_stride, (1 << 64) // _WRAP - row_stride),
        (panel, rows, 1, 1, 1),
    )


@lru_cache(maxsize=_MAPS)
def _load_map(
    first: int, shape: tuple[int, ...], strides: tuple[int, ...], rows: int, panel: int
) -> TensorMap:
    """Axes: column, row, batch, head and, as maps with lengths have five, one of one element."""
    batch, seq, heads, cols = shape
    batch_stride, row_stride, head_stride = _tma_strides(shape, strides)
    return TensorMap(
        first,
        (cols, seq, batch, heads, 1),
        (row_stride, batch_stride, head_stride, _PLACE_BYTES),
        (panel, rows, 1, 1, 1),
    )


@lru_cache(maxsize=_MAPS)
def _store_map(
    first: int, shape: tuple[int, ...], strides: tuple[int, ...], rows: int, panel: int
) -> TensorMap:
    batch, seq, heads, cols = shape
    batch_stride, row_stride, head_stride = _tma_strides(shape, strides)
    return TensorMap(
        first,
        (cols, seq, heads, batch),
        (row_stride, head_stride, batch_stride),
        (panel, rows, 1, 1),
    )


def _tma_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """Of the first three axes; those of one element get a stride that no row reaches across."""
    beyond = -(-2 * shape[3] // TENSOR_MAP_BYTES) * TENSOR_MAP_BYTES
    sizes = zip(strides[:3], shape[:3], strict=True)
    return [stride if size > 1 else beyond for stride, size in sizes]


def _tensor(array: Array) -> tuple[int, int, int, int]:
    itemsize = array.itemsize
    batch, seq, head = _tma_strides(array.shape, array.strides)
    return address(array), batch // itemsize, seq // itemsize, head // itemsize


def _with_maps(maps: tuple[TensorMap, ...], call: bytes, encode: Encoder) -> bytes:
    """Tensor maps, then the others' parameters."""
    return b"".join((*map(encode, maps), call)).ljust(mapped_bytes(len(maps), len(call)), b"\0")


def _problem(problem: Problem, tables: Tables) -> bytes:
    left, right = problem.window
    scale, softcap = problem.scale, problem.softcap
    offset = problem.offset
    offset_is_array = offset is not None and not isinstance(offset, int)
    scale_log2 = scale * _LOG2_E
    slopes = problem.alibi_slopes
    fields = _PROBLEM.pack(
        0 if problem.q_lens is None else address(problem.q_lens),
        0 if problem.kv_lens is None else address(problem.kv_lens),
        address(offset) if offset_is_array else 0,
        _bounded(offset) if isinstance(offset, int) else 0,
        _UNBOUNDED if left is None else _bounded(left),
        _UNBOUNDED if right is None else _bounded(right),
        int(isinstance(offset, int)),
        problem.sequences,
        problem.seqlen_q,
        problem.seqlen_k,
        problem.heads_k,
        problem.group,
        *_division(problem.group),
        problem.head_dim,
        problem.head_dim_v,
        scale,
        scale_log2,
        _within_float32(scale / softcap) if softcap else 0.0,
        softcap,
        0 if slopes is None else address(slopes),
        0 if slopes is None or slopes.ndim == 1 else slopes.shape[1],
        0 if problem.sinks is None else address(problem.sinks),
        *_score_tensor(problem.bias),
        problem.seed if problem.dropout else 0,
        math.floor(problem.dropout * 2**32),
        1 / (1 - problem.dropout),
        *tables.lists,
        *tables.packing,
    )
    return fields + tables.attachments


def _score_tensor(x: Array | None) -> tuple[int, ...]:
    """ScoreTensor: its address, and strides in elements, 0 along axes of one."""
    if x is None:
        return (0,) * 5
    missing = 4 - x.ndim
    strides = zip(x.strides, x.shape, strict=True)
    return (address(x), *[0] * missing, *(0 if n == 1 else s // x.itemsize for s, n in strides))


def _division(divisor: int) -> tuple[int, int]:
    """Magic and shift: n // divisor = n * magic >> 32 >> shift for 0 <= n < 2^31, 1 < divisor.

    T. Granlund, P. L. Montgomery, "Division by Invariant Integers using Multiplication", 1994.
    """
    if divisor == 1:
        return 0, 0
    shift = (divisor - 1).bit_length()
    return -(-(1 << (31 + shift)) // divisor), shift - 1


def _within_float32(factor: float) -> float:
    """As infinity it would make NaN of products that are 0."""
    return max(-_MAX_FLOAT32, min(_MAX_FLOAT32, factor))


def _bounded(value: int) -> int:
    return max(-_UNBOUNDED, min(_UNBOUNDED, value))
