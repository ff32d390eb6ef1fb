"""The GPUs of this machine, or the sentence that says why there is none."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import Any

from cuflash import _jit


class CommandError(Exception):
    """A command cannot run here; the message says what it needs."""


@dataclass(frozen=True, slots=True)
class Gpu:
    index: int
    name: str
    capability: int  # 10 * major + minor
    num_sms: int
    memory_bytes: int

    @property
    def arch(self) -> str:
        """NVRTC's name for it, as sm_80."""
        return f"sm_{self.capability}"


def find_gpus() -> tuple[list[Gpu], str]:
    """Every GPU here; where there is none, the reason."""
    try:
        runtime = _jit.import_cupy().cuda.runtime
    except ImportError as error:
        return [], str(error).removeprefix("cuflash: ")
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return [], f"no usable NVIDIA driver ({error})"
    gpus = [_describe(index, runtime.getDeviceProperties(index)) for index in range(count)]
    return gpus, "" if gpus else "the driver shows no GPU"


def require_gpu(command: str, instead: str = "") -> Any:
    """CuPy, once there is a GPU for `command`; `instead`: what does without one."""
    gpus, reason = find_gpus()
    if not gpus:
        raise CommandError(
            f"{command} needs an NVIDIA GPU of sm_80 or newer, its driver and CuPy "
            f'(pip install "cuflash[cuda13]"); here: {reason}' + (instead and f"; {instead}")
        )
    return _jit.import_cupy()


def archs_here(command: str) -> list[str]:
    """The architectures of the GPUs here, for which `command` compiles."""
    gpus, reason = find_gpus()
    if not gpus:
        raise CommandError(
            f"{command} needs to know for which GPUs: name architectures, as --arch sm_80 sm_90, "
            f"for there is none here to ask ({reason})"
        )
    return sorted({gpu.arch for gpu in gpus})


def driver_version() -> str:
    """The driver's own version and CUDA's, as 580.95 (CUDA 13.0)."""
    version = _jit.import_cupy().cuda.runtime.driverGetVersion()
    if not version:
        return "none"
    cuda = f"CUDA {version // 1000}.{version % 1000 // 10}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return cuda
    return f"{answer.stdout.strip()} ({cuda})"


def _describe(index: int, properties: dict[str, Any]) -> Gpu:
    return Gpu(
        index=index,
        name=properties["name"].decode(),
        capability=10 * properties["major"] + properties["minor"],
        num_sms=properties["multiProcessorCount"],
        memory_bytes=properties["totalGlobalMem"],
    )
