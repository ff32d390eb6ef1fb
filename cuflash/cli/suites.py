"""The grids of cells that `bench` measures, by the names of its suites."""

from __future__ import annotations

from collections.abc import Iterator

from cuflash.cli.cells import Cell
from cuflash.cli.rules import Documents, PrefixLm, RandomBlocks, RandomPairs, Rule, Window

GPU_SUITES = {
    "forward": "forward on a GPU: bfloat16, head sizes 64 to 256, lengths 1024 to 16384",
    "backward": "the gradients alone, over the same grid",
    "masks": "masks and biases on a GPU, beside flex attention and the time without a mask",
    "packed": "packed sequences on a GPU, beside torch's and the same tokens masked as documents",
    "host": "the host's share of a call, on problems so small that the GPU waits for it",
}
CPU_SUITES = {
    "cpu": "forward and gradients on the CPU, float32; needs no GPU",
    "cpu-masks": "documents, a window and random blocks on the CPU; needs no GPU",
    "cpu-packed": "packed sequences on the CPU, beside torch's attention one by one; needs no GPU",
}
MASK_SUITES = ("masks", "cpu-masks")
HOST_SUITE = "host"

TOKENS, WIDTH = 16384, 2048  # B * S and H * D of a cell of forward and backward
LENGTHS = (1024, 2048, 4096, 8192, 16384)
HEAD_DIMS = (64, 128, 256)
CPU_SHAPES = ((1, 2048, 8, 64, False), (1, 2048, 8, 64, True), (2, 512, 12, 64, False))
CPU_SHAPES += ((1, 4096, 4, 128, True),)  # batch, length, heads, head size, causal

EQUAL_DOCUMENTS = Documents((2048,) * 8)
UNEQUAL_DOCUMENTS = Documents((1000, 2520, 2520, 2520, 1440))
MASKS: tuple[tuple[Rule, int, int, bool], ...] = (  # rule, length, heads, causal
    (EQUAL_DOCUMENTS, 16384, 16, False),
    (EQUAL_DOCUMENTS, 16384, 16, True),
    (UNEQUAL_DOCUMENTS, 10000, 64, False),
    (UNEQUAL_DOCUMENTS, 10000, 64, True),
    (Window(1024), 32768, 8, False),
    (PrefixLm(0.25), 16384, 16, False),
    (RandomBlocks(128, 0.5), 16384, 16, False),
    (RandomBlocks(128, 0.9), 16384, 16, False),
    (RandomPairs(0.5), 8192, 16, False),
)
BIAS_LENGTH, BIAS_HEADS = 4096, 16
CPU_MASKS: tuple[Rule, ...] = (Documents((512,) * 8), Window(512), RandomBlocks(128, 0.75))
CPU_MASK_SIZES = (1, 4096, 4, 64)  # batch, length, heads, head size
SMALL_SIZES = (1, 128, 4)  # batch, length, heads
PACKED = (  # sequences, heads
    (EQUAL_DOCUMENTS, 16),
    (UNEQUAL_DOCUMENTS, 64),
    (Documents((64,) * 256), 16),
    (Documents((8192, *(128,) * 64)), 16),
)
CPU_PACKED = (
    Documents((512,) * 8),
    Documents((2048, *(128,) * 16)),
    Documents((4,) * 2000),
    Documents(tuple(range(1, 65)) * 16),
)
CPU_PACKED_SIZES = (4, 64)  # heads, head size


def cells(suite: str, quick: bool) -> Iterator[Cell]:
    """Those of a suite; `quick`: a few of them."""
    if suite == "cpu":
        return _cpu(quick)
    if suite == "cpu-masks":
        return _cpu_masks(quick)
    if suite == "cpu-packed":
        return _cpu_packed(quick)
    if suite == "packed":
        return _packed(quick)
    if suite == HOST_SUITE:
        return _small(quick)
    return _masks(quick) if suite == "masks" else _plain(suite, quick)


def _plain(suite: str, quick: bool) -> Iterator[Cell]:
    for head_dim in (128,) if quick else HEAD_DIMS:
        for causal in (False, True):
            for seqlen in (2048, 16384) if quick else LENGTHS:
                heads = WIDTH // head_dim
                yield Cell(suite, "bfloat16", TOKENS // seqlen, seqlen, heads, head_dim, causal)


def _masks(quick: bool) -> Iterator[Cell]:
    for direction in ("forward",) if quick else ("forward", "forward+backward"):
        for rule, seqlen, heads, causal in MASKS[::4] if quick else MASKS:
            yield Cell(direction, "bfloat16", 1, seqlen, heads, 128, causal, rule)
    sizes = ("bfloat16", 1, BIAS_LENGTH, BIAS_HEADS, 128, False)
    yield Cell("forward", *sizes, bias="fixed")
    if not quick:
        yield Cell("forward+backward", *sizes, bias="fixed")
        yield Cell("forward+backward", *sizes, bias="learned")


def _packed(quick: bool) -> Iterator[Cell]:
    for direction in ("forward",) if quick else ("forward", "forward+backward"):
        for documents, heads in PACKED[::2] if quick else PACKED:
            for causal in (False, True):
                sizes = (1, sum(documents.lengths), heads, 128)
                yield Cell(direction, "bfloat16", *sizes, causal, documents)


def _small(quick: bool) -> Iterator[Cell]:
    for direction in ("forward",) if quick else ("forward", "backward"):
        for head_dim in HEAD_DIMS[:2]:
            yield Cell(direction, "bfloat16", *SMALL_SIZES, head_dim, causal=True)


def _cpu(quick: bool) -> Iterator[Cell]:
    for batch, seqlen, heads, head_dim, causal in CPU_SHAPES[:1] if quick else CPU_SHAPES:
        for direction in ("forward", "forward+backward"):
            yield Cell(direction, "float32", batch, seqlen, heads, head_dim, causal)


def _cpu_masks(quick: bool) -> Iterator[Cell]:
    for direction in ("forward", "forward+backward"):
        for rule in CPU_MASKS[:1] if quick else CPU_MASKS:
            yield Cell(direction, "float32", *CPU_MASK_SIZES, causal=False, rule=rule)


def _cpu_packed(quick: bool) -> Iterator[Cell]:
    for direction in ("forward", "forward+backward"):
        for documents in CPU_PACKED[:1] if quick else CPU_PACKED:
            for causal in (False, True):
                sizes = (1, sum(documents.lengths), *CPU_PACKED_SIZES)
                yield Cell(direction, "float32", *sizes, causal, documents)
