"""Types of arguments that several commands take."""

from __future__ import annotations

import argparse
import math
import re

from cuflash._checks import MAX_HEAD_DIM


def architecture(text: str) -> str:
    """As sm_90."""
    if not re.fullmatch(r"sm_[1-9][0-9]{1,2}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no architecture; expected one as sm_80")
    return text


def head_dim(text: str) -> int:
    """A head size that kernels have."""
    size = positive(text)
    if size > MAX_HEAD_DIM:
        raise argparse.ArgumentTypeError(f"{text!r} is too large; expected at most {MAX_HEAD_DIM}")
    return size


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not re.fullmatch(r"[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected an integer of at least 1")
    return int(text)


def seconds(text: str) -> float:
    """A duration above 0."""
    try:
        duration = float(text)
    except ValueError:
        duration = math.nan
    if not 0 < duration < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; expected seconds, more than 0")
    return duration
