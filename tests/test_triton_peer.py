"""The contender that `bench` writes in Triton: its tiles fit, its launches are right, on no GPU."""

from __future__ import annotations

import shutil
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from emulator import load

from cuflash import reference
from cuflash.cli import contenders, suites
from cuflash.cli.cells import Cell, Inputs
from cuflash.cli.timing import HostClock

pytest.importorskip("triton")
pytest.importorskip("torch")
compile_ptx = pytest.importorskip("emulator_triton_kernels").compile_ptx
triton_peer = pytest.importorskip("cuflash.cli.triton_peer")

pytestmark = pytest.mark.triton

HOPPER, HOPPER_SMEM_BYTES = 90, 232_448
SMALL = triton_peer.SMALL
DIRECTIONS = ("forward", "backward")
# SMALL of forward is also what every cell of backward gets its lse by
FIT_EVERY_HEAD_SIZE = {"forward": SMALL, "backward": triton_peer.Tiles(32, 64, 8, 1)}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("head_dim", suites.HEAD_DIMS)
def test_some_tiles_fit_every_head_size(direction: str, head_dim: int) -> None:
    tiles = FIT_EVERY_HEAD_SIZE[direction]
    assert tiles in triton_peer.TILES[direction]
    assert compiled(direction, head_dim, tiles).smem_bytes <= HOPPER_SMEM_BYTES


@pytest.mark.full
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_all_tiles_fit_some_head_size(direction: str) -> None:
    for tiles in triton_peer.TILES[direction]:
        assert compiled(direction, 64, tiles).smem_bytes <= HOPPER_SMEM_BYTES


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Triton's launches run on the emulator."""
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")
    names = ("attention_forward", "attention_delta", "attention_backward")
    kernels = {name: getattr(triton_peer.triton_kernels, name) for name in names}
    stand_ins = {name: Launcher(partial(launch, kernel)) for name, kernel in kernels.items()}
    monkeypatch.setattr(triton_peer, "triton_kernels", SimpleNamespace(**stand_ins))
    monkeypatch.setattr(triton_peer, "CHECKED_LENGTH", 70)
    monkeypatch.setattr(triton_peer, "TILES", dict.fromkeys(DIRECTIONS, (SMALL,)))
    monkeypatch.setattr(triton_peer, "warm_up", lambda contender: 1.0)
    triton_peer.check.cache_clear()
    return triton_peer.triton_kernels


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_contender_is_right(emulated: SimpleNamespace, direction: str, causal: bool) -> None:
    cell = Cell(direction, "float16", 2, 130, 1, 32, causal)
    inputs = random_inputs(cell)
    found = contenders._triton(HostClock(), cell, inputs).call()
    arrays = (inputs.q, inputs.k, inputs.v)
    if direction == "forward":
        found, expected = found[:1], reference.attention(*arrays, causal=causal)[:1]
    else:
        expected = reference.attention_backward(inputs.dout, *arrays, causal=causal)[:3]
    for tensor, array in zip(found, expected, strict=True):
        assert np.abs(tensor.float().numpy() - array).max() <= 5e-3 * np.abs(array).max()


def test_a_wrong_contender_is_not_timed(emulated: SimpleNamespace) -> None:
    sound = emulated.attention_forward.launch
    emulated.attention_forward.launch = lambda grid, q, k, v, *rest, **options: sound(
        grid, q, k, k, *rest, **options
    )
    cell = Cell("forward", "float16", 1, 64, 1, 32, False)
    with pytest.raises(ArithmeticError, match="^out is off by "):
        contenders._triton(HostClock(), cell, random_inputs(cell))


def test_the_fastest_tiles_that_fit_are_taken(
    emulated: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large, too_large = (SMALL._replace(block_q=rows) for rows in (64, 128, 256))

    def check(cell: Cell, tiles: Any, device: Any) -> None:
        assert (cell.batch, cell.seqlen, cell.heads) == (1, 70, 2)
        if tiles is too_large:
            raise triton_peer.triton.runtime.errors.OutOfResources(300_000, 232_448, "shared")

    def warm_up(contender: Any) -> float:
        return {small: 2.0, large: 1.0}[contender.call.args[-1]]

    monkeypatch.setattr(triton_peer, "check", check)
    monkeypatch.setattr(triton_peer, "warm_up", warm_up)
    monkeypatch.setitem(triton_peer.TILES, "forward", (small, large, too_large))
    cell = Cell("forward", "float16", 1, 64, 1, 32, False)
    contender = contenders._triton(HostClock(), cell, random_inputs(cell))
    assert contender.call.args[-1] is large
    monkeypatch.setitem(triton_peer.TILES, "forward", (too_large,))
    with pytest.raises(triton_peer.triton.runtime.errors.OutOfResources):
        contenders._triton(HostClock(), cell, random_inputs(cell))


def random_inputs(cell: Cell) -> Inputs:
    rng = np.random.default_rng(0)
    arrays = (rng.standard_normal(cell.shape).astype(cell.dtype) for _ in range(4))
    return Inputs(*arrays)


def compiled(direction: str, head_dim: int, tiles: Any) -> Any:
    kernel = getattr(triton_peer.triton_kernels, f"attention_{direction}")
    constants = {"BLOCK_Q": tiles.block_q, "BLOCK_KV": tiles.block_kv}
    constants |= {"HEAD_DIM": head_dim, "CAUSAL": True}
    kinds = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "dq_ptr": "*fp32"}
    kinds |= {"scale": "fp32", "scale_log2": "fp32"}
    signature = {
        name: kinds.get(name, "*bf16" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name not in constants
    }
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    return compile_ptx(kernel, signature, constants, HOPPER, **options)


class Launcher:
    """kernel[grid](*arguments, **options), as Triton has it."""

    def __init__(self, launch: Any) -> None:
        self.launch = launch

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self.launch, grid)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: int) -> None:
    """Compile for what the arguments are, and run on the emulator."""
    kinds = {"float16": "*fp16", "float32": "*fp32", "float": "fp32", "int": "i32"}
    signature, constants, values = {}, {}, []
    for name, argument in zip(kernel.arg_names, arguments, strict=True):
        if name.isupper():
            constants[name] = argument
            continue
        is_tensor = hasattr(argument, "dtype")
        kind = str(argument.dtype) if is_tensor else type(argument).__name__
        signature[name] = kinds[kind.removeprefix("torch.")]
        to_scalar = np.float32 if isinstance(argument, float) else np.int32
        values.append(argument.numpy() if is_tensor else to_scalar(argument))
    program = compile_ptx(kernel, signature, constants, HOPPER, **options)
    load(program.ptx).launch(
        (*grid, 1),
        (program.threads, 1, 1),
        program.smem_bytes,
        [*values, 0, 0],  # and scratch memory, of which none is used
        buffers=[value for value in values if isinstance(value, np.ndarray)],
        allow_same_value=True,
    )
