"""Draw the pictures of masks.md: of each, the mask that the page's code has made by then.

python docs/draw_masks.py            # into docs/pictures
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import cuflash

HERE = Path(__file__).resolve().parent
SIDE, TILE = 24, 4  # pairs on a side of a picture, and of a tile
MARGIN = 2  # above and on the left, in pairs
PIXELS = 7  # of a pair

EMPTY = "#ffffff"
PARTLY, VISIBLE_OF_PARTLY = "#fbe6c3", "#d9881c"
FULL, VISIBLE_OF_FULL = "#cfe8d8", "#2c8c58"
GRID, TEXT = "#8a8f98", "#5a5f68"

CODE_OR_PICTURE = re.compile(r"```python\n(.*?)```|!\[[^\]]*\]\(pictures/([\w-]+)\.svg\)", re.S)


def main(folder: Path) -> None:
    """Write every picture of the page into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, visible in pictures((HERE / "masks.md").read_text(encoding="utf-8")):
        (folder / f"{name}.svg").write_text(svg(visible), encoding="utf-8")


def pictures(page: str) -> Iterator[tuple[str, np.ndarray]]:
    """Run the page's code, and yield which pairs are visible in each picture, by its name."""
    names = {}
    for code, picture in CODE_OR_PICTURE.findall(page):
        if code:
            exec(compile(code, "masks.md", "exec"), names)
        elif picture == "legend":
            yield picture, legend()
        else:
            yield picture, visible_pairs(names["mask"])


def visible_pairs(mask: cuflash.masks.Mask) -> np.ndarray:
    """(SIDE, SIDE): with equal scores and the unit vectors for values, what is not 0 is seen."""
    q = k = np.zeros((1, SIDE, 1, 1))
    v = np.eye(SIDE).reshape(1, SIDE, 1, SIDE)
    return cuflash.attention(q, k, v, mask=mask)[0, :, 0] > 0


def legend() -> np.ndarray:
    """An empty tile, a partly visible one and a full one."""
    partly = np.tri(TILE, dtype=bool)
    return np.hstack([np.zeros_like(partly), partly, np.ones_like(partly)])


def svg(visible: np.ndarray) -> str:
    """Tiles tinted by what they show, visible pairs in a darker colour, lines between tiles."""
    rows, columns = visible.shape
    tiles = visible.reshape(rows // TILE, TILE, columns // TILE, TILE)
    some, full = (
        np.kron(tile, np.ones((TILE, TILE), bool))
        for tile in (tiles.any(axis=(1, 3)), tiles.all(axis=(1, 3)))
    )
    width, height = (MARGIN + n + 1 for n in (columns, rows))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * PIXELS}" '
        f'height="{height * PIXELS}" viewBox="{-MARGIN} {-MARGIN} {width} {height}">',
        f'<path fill="{EMPTY}" d="M{-MARGIN} {-MARGIN}h{width}v{height}h{-width}z"/>',
        f'<path fill="{PARTLY}" d="{squares(some & ~full)}"/>',
        f'<path fill="{FULL}" d="{squares(full)}"/>',
        f'<path fill="{VISIBLE_OF_PARTLY}" d="{squares(visible & ~full)}"/>',
        f'<path fill="{VISIBLE_OF_FULL}" d="{squares(visible & full)}"/>',
        f'<path stroke="{EMPTY}" stroke-width=".14" d="{grid(rows, columns, 1)}"/>',
        f'<path stroke="{GRID}" stroke-width=".12" d="{grid(rows, columns, TILE)}"/>',
    ]
    if rows == SIDE:
        style = f'fill="{TEXT}" font-family="sans-serif" font-size="1.4"'
        lines += [
            f'<text {style} x="0" y="-.6">keys →</text>',
            f'<text {style} x="{-rows}" y="-.6" transform="rotate(-90)">← queries</text>',
        ]
    return "\n".join([*lines, "</svg>", ""])


def squares(chosen: np.ndarray) -> str:
    """A path around the chosen pairs: a rectangle for each run of a row."""
    path = []
    for row, pairs in enumerate(chosen):
        edges = np.flatnonzero(np.diff(pairs, prepend=False, append=False))
        for start, end in edges.reshape(-1, 2).tolist():
            path.append(f"M{start} {row}h{end - start}v1h{start - end}z")
    return "".join(path)


def grid(rows: int, columns: int, step: int) -> str:
    """A path along every so many rows and columns, and around all."""
    across = [f"M0 {y}h{columns}" for y in range(0, rows + 1, step)]
    down = [f"M{x} 0v{rows}" for x in range(0, columns + 1, step)]
    return "".join(across + down)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "pictures")
