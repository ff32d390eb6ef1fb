"""What the figures of a benchmark depend on, for its file of results."""

from __future__ import annotations

import datetime
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import threadpoolctl


def environment(threads: int) -> dict[str, object]:
    """Command, date, commit, processor and versions."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "cpu": _cpu_name(),
        "threads": threads,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": [
            f"{library['internal_api']} {library['version']} {library.get('architecture', '')}"
            for library in threadpoolctl.threadpool_info()
            if library["user_api"] == "blas"
        ],
    }


def _cpu_name() -> str:
    """The processor's own name where Linux tells it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
