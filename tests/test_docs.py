"""The pages in docs: their code runs, and the pictures of masks are what their code makes."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from cuflash import masks

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "masks.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def draw_masks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_masks", DOCS / "draw_masks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_code_runs_and_draws_the_pictures(
    draw_masks: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw_masks.main(tmp_path)
    drawn, kept = (
        {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
        for folder in (tmp_path, DOCS / "pictures")
    )
    assert drawn.keys() == kept.keys()
    assert [name for name in drawn if drawn[name] != kept[name]] == []
    expected = re.findall(r"^ *print\(.*\)  # (.*)", PAGE, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == expected


def test_every_mask_has_its_rule_and_its_picture() -> None:
    sections = re.split(r"^### ", PAGE, flags=re.M)[1:]
    by_name = {section.partition("\n")[0]: section for section in sections}
    for name in set(masks.__all__) - {"Mask"}:
        assert f"](pictures/{name}.svg)" in by_name[name]
        assert f"masks.{name}(" in by_name[name]


def test_a_picture_shows_pairs_and_tiles(draw_masks: ModuleType) -> None:
    visible = np.zeros((24, 24), bool)
    visible[4:8, 8:12] = True  # a tile
    visible[20, 1] = visible[20, 3] = True
    picture = draw_masks.svg(visible)
    paths = dict(re.findall(r'<path fill="(#\w+)" d="([^"]*)"', picture))
    full = "".join(f"M8 {row}h4v1h-4z" for row in range(4, 8))
    assert paths[draw_masks.FULL] == paths[draw_masks.VISIBLE_OF_FULL] == full
    partly = "".join(f"M0 {row}h4v1h-4z" for row in range(20, 24))
    assert paths[draw_masks.PARTLY] == partly
    assert paths[draw_masks.VISIBLE_OF_PARTLY] == "M1 20h1v1h-1zM3 20h1v1h-1z"


def test_the_readme_counts_the_injected_bugs() -> None:
    import test_block_order
    import test_hopper_backward_bugs
    import test_hopper_forward
    import test_mask_bugs

    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    sentence = re.search(r"^\| injected bugs .*", readme, re.MULTILINE)[0]
    counts = [
        len(test_hopper_forward.BUGS),
        sum(map(len, test_hopper_backward_bugs.SOURCES.values())),
        len(test_mask_bugs.LIST_BUGS) + len(test_mask_bugs.BUGS),
        len(test_block_order.BUGS) + 1,  # and blocks that do not draw their numbers
    ]
    assert [int(x) for x in re.findall(r"\b(\d+) in ", sentence)] == counts


GPU_PAGE = (DOCS / "gpu.md").read_text(encoding="utf-8")
GRAPHS = {
    re.search(r"import (\w+)", code)[1]: code
    for code in re.findall(r"```python\n(.*?)```", GPU_PAGE, re.DOTALL)
}


def test_there_is_a_graph_of_each_library() -> None:
    for name, code in GRAPHS.items():
        compile(code, name, "exec")
    assert GRAPHS.keys() == {"cupy", "torch"}


@pytest.mark.gpu
@pytest.mark.parametrize("library", GRAPHS)
def test_graphs_replay(library: str) -> None:
    module = pytest.importorskip(library)
    if library == "torch" and not module.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    values = {"__name__": "page"}
    exec(GRAPHS[library], values)
    values["v"][...] = 1
    values["v"][:, 500:] = 7  # which the length hides
    if library == "torch":
        values["graph"].replay()
        module.cuda.synchronize()
    else:
        values["graph"].launch(values["stream"])
        values["stream"].synchronize()
    assert (values["out"] == 1).all()


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", PAGE))
def test_links_lead_somewhere(link: Any) -> None:
    assert (DOCS / link).exists()
