"""python -m cuflash info: versions, GPUs, the backend that would serve, the cache."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata
from typing import Any

import cuflash
from cuflash import _jit, _traits
from cuflash.cli.gpus import Gpu, driver_version, find_gpus

PACKAGES = ("numpy", "ml_dtypes", "threadpoolctl")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    return commands.add_parser("info", help="versions, GPUs, which backend would serve, the cache")


def run(options: argparse.Namespace) -> int:
    gpus, reason = find_gpus()
    rows = [
        ("cuflash", f"{cuflash.__version__} in {os.path.dirname(cuflash.__file__)}"),
        ("Python", platform.python_version()),
        *((name, metadata.version(name)) for name in PACKAGES),
        ("CuPy", _cupy_version()),
        ("NVRTC", _nvrtc()),
        ("driver", _driver()),
        *((f"GPU {gpu.index}", _describe(gpu)) for gpu in gpus),
        ("NumPy arrays", f"backend cpu, {os.cpu_count()} cores"),
        *((f"arrays on GPU {gpu.index}", _backend(gpu)) for gpu in gpus),
        *([] if gpus else [("GPU arrays", f"no backend: {reason}")]),
        ("cache", _cache()),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")
    return 0


def _cupy_version() -> str:
    try:
        return _jit.import_cupy().__version__
    except ImportError:
        return 'not installed; pip install "cuflash[cuda13]"'


def _nvrtc() -> str:
    try:
        version = _jit.dotted(_jit.nvrtc_version())
    except ImportError as error:
        return f"none: {str(error).removeprefix('cuflash: ')}"
    fault = _jit.hopper_fault()
    return f"{version}; warning: {fault}" if fault else version


def _driver() -> str:
    try:
        return driver_version()
    except ImportError:
        return "not asked: that takes CuPy"


def _describe(gpu: Gpu) -> str:
    return f"{gpu.name}, {gpu.arch}, {gpu.num_sms} SMs, {gpu.memory_bytes / 2**30:.1f} GiB"


def _backend(gpu: Gpu) -> str:
    try:
        backend = _traits.backend_of(gpu.capability, tma=True)
        return f"backend {backend}, by its architecture {gpu.arch}"
    except NotImplementedError as error:
        return f"no backend: {error}"


def _cache() -> str:
    folder = _jit.cache_dir()
    files = [path for path in folder.glob("*") if path.is_file()]
    kernels = sum(path.suffix == ".cubin" for path in files)
    mebibytes = sum(path.stat().st_size for path in files) / 2**20
    return f"{folder}: {kernels} kernels, {mebibytes:.1f} MiB"
