"""Without a GPU `gpu` tests are skipped; `full` ones are left out unless asked for."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import backends
import numpy as np
import pytest

from cuflash import _capture, interop


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "full" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    reason = _why_no_gpu()
    if reason:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _forget_launches() -> Iterator[None]:
    """What is kept of launches names its GPU: an emulated one would live on, with its memory."""
    yield
    forget_launches()


def forget_launches() -> None:
    """Also the plans of layouts, which a test may have made other ones than the next one wants."""
    launch = sys.modules.get("cuflash._launch")
    for way in ("forward", "backward"):
        for kept in ("choices", "launches"):
            getattr(launch, f"_{way}_{kept}", {}).clear()


BACKENDS = ("cpu", "emulated-80", "emulated-90", pytest.param("gpu", marks=pytest.mark.gpu))


def on_every_backend(cases: Mapping[str, tuple], always: Collection[str]) -> list[Any]:
    """(backend, *case) of each case, for a test with `indirect=["backend"]`.

    Emulation compiles kernels for each: but for those whose id is in `always` it is `full`.
    """
    parameters = []
    for name, case in cases.items():
        for backend in (pytest.param(x) if isinstance(x, str) else x for x in BACKENDS):
            (kind,), marks = backend.values, list(backend.marks)
            id_ = f"{kind}-{name}"
            if kind.startswith("emulated") and id_ not in always:
                marks.append(pytest.mark.full)
            parameters.append(pytest.param(kind, *case, id=id_, marks=marks))
    return parameters


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> backends.Backend:
    """Every backend in turn."""
    make: dict[str, Callable[[], backends.Backend]] = {
        "cpu": backends.CpuBackend,
        "gpu": backends.GpuBackend,
        "emulated-80": emulated,
        "emulated-90": lambda: emulated(capability=90),
    }
    return make[request.param]()


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's part of a call on arrays of CuPy."""
    pytest.importorskip("cupy")
    monkeypatch.setattr(interop, "_driver_fault", lambda ordinal: "")
    monkeypatch.setattr(interop, "_cuda_device", lambda place: nullcontext())
    monkeypatch.setattr(_capture, "is_captured", lambda cupy: False)


def emulated(**options: object) -> backends.EmulatedBackend:
    """The emulated backend, where what it needs is installed."""
    pytest.importorskip("cupy", reason="NVRTC is reached through CuPy")
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")
    return backends.EmulatedBackend(**options)


def _why_no_gpu() -> str | None:
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed"
    return None if cupy.cuda.is_available() else "no GPU here"
