"""Files of measurements: where they go, and on what machine and by what they were measured."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from itertools import chain, count
from pathlib import Path
from typing import Any

import cuflash
from cuflash import _jit
from cuflash.cli.gpus import CommandError, driver_version

PACKAGES = ("numpy", "cupy-cuda13x", "cupy-cuda12x", "torch", "jax", "triton", "nvidia-cudnn-cu13")
CHECKOUT = Path(cuflash.__file__).resolve().parent.parent


def provenance(command: str, commit: str | None) -> dict[str, Any]:
    """When and by what a file is written; `commit`: where no git checkout tells."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit or _commit(),
        "command": " ".join([command, *sys.argv[1:]]),
        "inputs": "standard normal",
        "versions": {"python": platform.python_version(), **_versions()},
    }


def machine_of_gpu(cupy: Any) -> dict[str, Any]:
    """The current GPU, its driver and the compiler."""
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return {
        "device": properties["name"].decode(),
        "driver": driver_version(),
        "nvrtc": _jit.dotted(_jit.nvrtc_version()),
    }


def machine_of_cpu() -> dict[str, Any]:
    """This machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {"device": f"{next(models, platform.machine())}, {os.cpu_count()} cores"}


def require_writable(command: str, output: Path) -> None:
    """Refuse what cannot be written, in the name of `command`; no file is left behind."""
    existed = output.exists()
    try:
        output.open("a").close()
    except OSError as error:
        raise CommandError(
            f"{command}: the result cannot be written to {output}: {error.strerror}; "
            "expected --output FILE, in a folder that exists"
        ) from error
    if not existed:
        output.unlink()


def default_output(suite: str, device: str) -> Path:
    """A new file in the checkout's benchmarks/results; without a checkout, in one made here."""
    folder = CHECKOUT / "benchmarks" / "results"
    if not folder.is_dir():
        folder = Path.cwd() / "benchmarks" / "results"
        with suppress(OSError):  # the file will not be writable then either
            folder.mkdir(parents=True, exist_ok=True)
    slug = "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())
    stem = f"{datetime.date.today().isoformat()}-{slug}-{suite}"
    names = (f"{stem}{suffix}.json" for suffix in chain([""], (f"-{n}" for n in count(2))))
    return next(folder / name for name in names if not (folder / name).exists())


def _versions() -> dict[str, str]:
    found = {"cuflash": cuflash.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    git = ["git", "-C", str(CHECKOUT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + (" with changes" if changes.stdout else "")
