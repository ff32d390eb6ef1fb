"""C++ → shared objects in a cache folder, loaded into this process."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import EmulatorError

_RUNTIME = Path(__file__).parent / "runtime"
_FLAGS = (
    "-std=c++20",
    "-march=native",
    "-fPIC",
    "-shared",
    "-fwrapv",
    "-fno-strict-aliasing",
    "-w",
)
_RUNTIME_FLAGS = (
    *_FLAGS,
    "-O3",
    "-ftls-model=initial-exec",
    "-fno-semantic-interposition",
    "-pthread",
)
# Most of a test's time goes into compiling, so kernels are not optimised. PTX says what is fused.
_KERNEL_FLAGS = (*_FLAGS, "-O0", "-ffp-contract=off")


def compiler() -> str | None:
    """The C++ compiler, or None where kernels cannot be emulated."""
    return shutil.which("g++") if platform.machine() in ("x86_64", "AMD64") else None


@functools.cache
def cache_folder() -> Path:
    """Belongs to this user, because what lies there is loaded as code."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    temporary = Path(tempfile.gettempdir()) / f"cuflash-{os.getuid()}"
    for folder in (cache / "cuflash" / "emulator", temporary):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
                return folder
    raise EmulatorError("no writable cache folder; set XDG_CACHE_HOME")


@functools.cache
def runtime() -> ctypes.CDLL:
    """The runtime, built once per machine, loaded so that kernels find its functions."""
    return ctypes.CDLL(str(_runtime_folder() / "runtime.so"), mode=ctypes.RTLD_GLOBAL)


def kernel_library(ptx: str, entry: str, translate: Callable[[], str]) -> ctypes.CDLL:
    """An entry point of a PTX text; `translate` gives its C++ if it is not cached."""
    runtime()
    folder = _runtime_folder()
    target = cache_folder() / f"kernel-{_digest(folder.name, _translator(), entry, ptx)}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "kernel.cpp"
            path.write_text(translate())
            _compile([*_KERNEL_FLAGS, f"-I{folder}", f"-I{_RUNTIME}", str(path)], target)
    return ctypes.CDLL(str(target))


@functools.cache
def _translator() -> str:
    names = ("parse", "translate", "arithmetic", "instructions")
    return _digest(*(_RUNTIME.with_name(f"{name}.py").read_text() for name in names))


@functools.cache
def _runtime_folder() -> Path:
    """Holds the runtime and the precompiled header of kernels, which halves their compile time."""
    sources = sorted(_RUNTIME.glob("*.cpp"))
    texts = (path.read_text() for path in [*sources, *sorted(_RUNTIME.glob("*.h"))])
    folder = cache_folder() / f"runtime-{_digest(*texts, *_RUNTIME_FLAGS, *_KERNEL_FLAGS)}"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "runtime.so").exists():
            header = ["-x", "c++-header", str(_RUNTIME / "kernel_api.h")]
            _compile([*_KERNEL_FLAGS, *header], folder / "kernel_api.h.gch")
            _compile([*_RUNTIME_FLAGS, *map(str, sources)], folder / "runtime.so")
    return folder


def _compile(arguments: list[str], target: Path) -> None:
    """Compiles beside the target and renames, so that others never see half a file."""
    path = compiler()
    if path is None:
        raise EmulatorError("the emulator needs g++ on x86-64")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        output = Path(folder) / target.name
        result = subprocess.run(
            [path, *arguments, "-o", str(output)], capture_output=True, text=True
        )
        if result.returncode:
            raise EmulatorError(
                f"g++ cannot compile the translated kernel:\n{result.stderr[:4000]}"
            )
        os.replace(output, target)


@functools.cache
def _machine() -> str:
    """What -march=native depends on."""
    version = subprocess.run(
        [compiler() or "g++", "--version"], capture_output=True, text=True
    ).stdout
    flags = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")
    ]
    return version + flags[0]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join((*parts, _machine())).encode()).hexdigest()[:20]
