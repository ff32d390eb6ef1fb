"""What the host asks of CUDA in a call, on a stub of it: contexts, pools, graphs."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import unreal_gpu

pytest.importorskip("cupy", reason="launches need CuPy")

import cupy  # noqa: E402
import stub_cuda  # noqa: E402
from stub_cuda import StubCuda  # noqa: E402

import cuflash  # noqa: E402
from cuflash import _capture, _gpu, _jit, _launch, _mask_tree, interop, masks  # noqa: E402

SHAPE = (2, 300, 2, 64)
SQ = SHAPE[1]


@pytest.fixture
def cuda() -> Iterator[StubCuda]:
    with stub_cuda.installed() as cuda:
        yield cuda


def tensors(count: int = 3, shape: tuple[int, ...] = SHAPE) -> list[Any]:
    """CuPy arrays on GPU 0, in memory that no pool has."""
    return [unreal_gpu.array(shape, address=(1 << 36) + (i << 24)) for i in range(count)]


def lengths(*shape: int) -> Any:
    return unreal_gpu.array(shape, np.int32, address=1 << 37)


def both(arrays: Any = None, **options: Any) -> list[Any]:
    """Forward and backward."""
    (out, lse), pullback = cuflash.attention_vjp(*(arrays or tensors()), return_lse=True, **options)
    return [out, lse, *pullback(out)]


def packed() -> list[Any]:
    """Likewise, of packed sequences."""
    edges = lengths(3)
    (out, lse), pullback = cuflash.attention_varlen_vjp(
        *tensors(shape=SHAPE[1:]), edges, edges, return_lse=True, causal=True
    )
    return [out, lse, *pullback(out)]


CALLS: dict[str, Callable[[], Any]] = {
    "plain": both,
    "lengths": lambda: both(kv_lens=lengths(2), q_lens=lengths(2)),
    "mask": lambda: both(mask=masks.documents(lengths(2, SQ)) & masks.causal()),
    "terms": lambda: both(
        bias=unreal_gpu.array((SQ, SQ), address=1 << 38),
        sinks=unreal_gpu.array((2,), address=1 << 39),
    ),
    "packed": packed,
}


# ------------------------------------------------------------------------------------- contexts


def in_a_new_thread(call: Callable[[], Any]) -> Exception | None:
    """What it raises there."""
    raised: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def without_binding(place: str) -> Any:
    """As `with` alone has it, which a device that is current already binds to no thread."""
    return cupy.cuda.Device(interop._ordinal(place))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_new_thread_has_a_context_before_anything_is_launched(
    cuda: StubCuda, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where pools have memory for it, so that nothing else would have bound one."""
    call()
    launched = len(cuda.launched)
    assert launched and in_a_new_thread(call) is None
    assert len(cuda.launched) == 2 * launched
    monkeypatch.setattr(interop, "_cuda_device", without_binding)
    assert "CUDA_ERROR_INVALID_CONTEXT (201)" in str(in_a_new_thread(call))


def test_a_module_is_loaded_in_a_new_thread(
    cuda: StubCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself: it binds a context whoever asks for a kernel."""
    both()
    cuda_device = interop._cuda_device
    monkeypatch.setattr(interop, "_cuda_device", without_binding)
    _jit.load.cache_clear()
    kernel = next(iter(_launch._forward_launches.values())).kernel
    assert in_a_new_thread(lambda: _jit.load(kernel, 0)) is None
    monkeypatch.setattr(interop, "_cuda_device", cuda_device)
    assert in_a_new_thread(both) is None


def test_a_grid_that_no_gpu_launches(cuda: StubCuda) -> None:
    both()
    kernel = next(iter(_launch._forward_launches.values())).kernel
    with pytest.raises(NotImplementedError, match="would take 2147483648 blocks; expected at most"):
        _gpu.gpu(0).run(kernel, 1 << 31, b"")


# ------------------------------------------------------------------------- graphs of CuPy's users


def use_memory(cuda: StubCuda) -> list[Any]:
    """What comes after a capture: another call, and arrays of every size that there was."""
    gc.collect()
    sizes = {size for _, size in cuda.pool._free}
    return [both(causal=True), *(cupy.empty(size, np.uint8) for size in sizes for _ in range(20))]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_graphs_memory_is_handed_out_to_nobody(cuda: StubCuda, call: Callable[[], Any]) -> None:
    stream, pool = cuda.stream(), stub_cuda.Pool(cuda)
    with stream:
        call()
    with cupy.cuda.using_allocator(pool.malloc), stream.capture() as graph:
        call()
    assert graph.launches and not graph.copies
    with stream:
        use_memory(cuda)
    assert not cuda.faults


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_memory_of_the_default_pool_is_not_captured(
    cuda: StubCuda, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = cuda.stream()
    with stream:
        call()
    message = r"^cuflash\.attention.*: a CUDA graph is being captured, and memory comes from CuPy's"
    with stream.capture() as graph, pytest.raises(RuntimeError, match=message):
        call()
    assert not graph.launches
    monkeypatch.setattr(_capture, "check_pool", lambda *_: None)
    with stream.capture():
        call()
    with stream:
        use_memory(cuda)
    assert cuda.faults


def kept() -> dict[str, Any]:
    return {"forward": {**_launch._forward_launches}, "backward": {**_launch._backward_launches}}


@pytest.mark.parametrize("looks", [True, False], ids=["right", "blind"])
def test_a_capture_leaves_what_is_kept_as_it_is(
    cuda: StubCuda, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither stores nor drops, although all is full."""
    monkeypatch.setattr(_launch, "_MAX_KEPT", 1)
    monkeypatch.setattr(_mask_tree, "MAX_TABLES", 1)
    arrays, stream, pool = tensors(), cuda.stream(), stub_cuda.Pool(cuda)
    mask = masks.documents(lengths(2, SQ)).compile(*arrays[:2])
    with stream:
        both()
        both(mask=mask)
    before, tables = kept(), {**mask.tables}
    assert tables and all(before.values())
    if not looks:
        monkeypatch.setattr("cuflash._gpu.is_captured", lambda cupy: False)
    with cupy.cuda.using_allocator(pool.malloc), stream.capture():
        both(causal=True)
        both(mask=mask, causal=True)
    assert ((kept(), mask.tables) == (before, tables)) == looks


@pytest.mark.parametrize("keeps", [True, False], ids=["right", "forgetful"])
def test_tables_that_a_graph_reads_stay(
    cuda: StubCuda, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made before the capture, and dropped from what calls look up by calls after it."""
    arrays, stream, pool = tensors(), cuda.stream(), stub_cuda.Pool(cuda)
    mask = masks.documents(lengths(2, SQ)).compile(*arrays[:2])
    with stream:
        both(mask=mask)
    before = len(cuda.launched)
    with cupy.cuda.using_allocator(pool.malloc), stream.capture() as graph:
        results = both(mask=mask)
    assert len(cuda.launched) == before
    assert len(graph.launches) == 4  # the tables are read, not made
    if not keeps:
        mask.read_by_graphs.clear()
    mask.tables.clear()
    with stream:
        use_memory(cuda)
    assert bool(cuda.faults) != keeps
    del results


def test_tables_that_a_graph_makes_are_its_own(cuda: StubCuda) -> None:
    arrays, stream, pool = tensors(), cuda.stream(), stub_cuda.Pool(cuda)
    mask = masks.documents(lengths(2, SQ)).compile(*arrays[:2])
    with cupy.cuda.using_allocator(pool.malloc), stream.capture() as graph:
        both(mask=mask)
    assert len(graph.launches) == 4 + 2 + 3  # sights and lists, for the keys once more
    assert not mask.tables and not mask.read_by_graphs


ON_HOST: dict[str, tuple[dict[str, Any], str]] = {
    "kv_lens": ({"kv_lens": [3, 4]}, "kv_lens"),
    "q_lens": ({"q_lens": np.array([3, 4])}, "q_lens"),
    "offset": ({"offset": [3, 4]}, "offset"),
    "mask": ({"mask": masks.documents(np.zeros((2, SQ), int))}, "mask leaf 0 (documents) q_ids"),
    "score_mod": (
        {"score_mod": cuflash.ScoreMod("score + x(h)", named={"x": np.ones(2, np.float32)})},
        "score_mod x",
    ),
}


@pytest.mark.parametrize(("options", "name"), ON_HOST.values(), ids=ON_HOST)
def test_what_is_on_the_host_is_not_captured(
    cuda: StubCuda, options: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, pool = cuda.stream(), stub_cuda.Pool(cuda)
    with cupy.cuda.using_allocator(pool.malloc), stream.capture() as graph:
        with pytest.raises(ValueError) as error:
            cuflash.attention(*tensors(), **options)
        assert str(error.value).startswith(
            f"cuflash.attention: {name} is on the host while a CUDA graph is being captured"
        )
        assert str(error.value).endswith("expected an array on the GPU, made before the capture")
        assert not graph.copies
        cuflash.attention(*tensors(), offset=3, scale=0.5)  # numbers are no arrays
        cuflash.attention(*tensors(), offset=np.array(3))
        monkeypatch.setattr(_capture, "check_nothing_on_host", lambda *_: None)
        cuflash.attention(*tensors(), **options)
        assert graph.copies


def test_edges_on_the_host_are_not_captured(cuda: StubCuda) -> None:
    q, k, v = tensors(shape=SHAPE[1:])
    pool = stub_cuda.Pool(cuda)
    message = "^cuflash.attention_varlen: cu_seqlens_k is on the host while a CUDA graph is being"
    with cupy.cuda.using_allocator(pool.malloc), cuda.stream().capture():  # noqa: SIM117
        with pytest.raises(ValueError, match=message):
            cuflash.attention_varlen(q, k, v, lengths(3), [0, 3, 300])


def test_a_mask_is_not_compiled_while_a_graph_is_captured(cuda: StubCuda) -> None:
    q, k, _ = tensors()
    pool = stub_cuda.Pool(cuda)
    message = "^cuflash.masks.Mask.compile: a CUDA graph is being captured, and compile waits"
    with cupy.cuda.using_allocator(pool.malloc), cuda.stream().capture():  # noqa: SIM117
        with pytest.raises(RuntimeError, match=message):
            masks.causal().compile(q, k)


def test_a_capture_elsewhere_is_nobodys_business(cuda: StubCuda) -> None:
    """Of the legacy stream CUDA does not even tell whether it is captured, while another is."""
    with cuda.stream().capture(), stub_cuda.Stream(cuda, 0):
        both()


# ------------------------------------------------------------------------------ tensors of torch


def torch_tensors() -> list[Any]:
    torch = pytest.importorskip("torch")
    return [torch.zeros(SHAPE, dtype=torch.bfloat16) for _ in range(3)]


def test_memory_of_calls_on_tensors_is_torchs(cuda: StubCuda) -> None:
    """As torch allocates it, not a view of anything: autograd and record_stream know it."""
    torch = pytest.importorskip("torch")
    arrays = torch_tensors()
    with stub_cuda.torch_installed(cuda) as made:
        options = {"bias": torch.zeros((1, 2, SQ, SQ), dtype=torch.bfloat16)}
        options["sinks"] = torch.zeros(2, dtype=torch.float64)
        results = both(arrays, causal=True, **options)
        q, k, v = (x[0] for x in arrays)
        edges = torch.tensor([0, 5, 300])
        parts = cuflash.attention_varlen(q, k, v, edges, edges, return_lse=True)
    assert not cuda.pool.calls and made
    own = {storage().data_ptr() for storage in made if storage() is not None}
    for x in [*results, *parts]:
        assert type(x) is torch.Tensor and not x._is_view() and not x.requires_grad
        assert x.untyped_storage().data_ptr() in own
        assert x.nbytes == x.untyped_storage().nbytes() and x.is_contiguous()
    names = ["bfloat16", "float32", *["bfloat16"] * 4, "float64"]
    assert [str(x.dtype) for x in results] == [f"torch.{name}" for name in names]
    shapes = [SHAPE, (2, 2, SQ), *[SHAPE] * 3, (1, 2, SQ, SQ), (2,)]
    assert [tuple(x.shape) for x in results] == shapes
    assert [tuple(x.shape) for x in parts] == [SHAPE[1:], (2, SQ)]


def test_a_capture_of_torch_asks_for_no_pool(cuda: StubCuda) -> None:
    """torch.cuda.graph has one of its own; lengths on the host are refused as elsewhere."""
    with stub_cuda.torch_installed(cuda), cuda.stream().capture() as graph:
        both(torch_tensors(), causal=True)
        assert len(graph.launches) == 4 and not cuda.pool.calls
        with pytest.raises(ValueError, match="kv_lens is on the host while a CUDA graph is being"):
            cuflash.attention(*torch_tensors(), kv_lens=[3, 4])


class Vendors:
    """An array of a library that is not told which stream a call is on."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **options: Any) -> None: ...


def test_who_waits_for_results_captures_none(cuda: StubCuda) -> None:
    message = "a CUDA graph is being captured, and a call on a .*Vendors waits for its results"
    with cuda.stream().capture(), pytest.raises(NotImplementedError, match=message):
        cuflash.attention(Vendors(), Vendors(), Vendors())


# ------------------------------------------------------------------------------ calls that fail


def shifted(shape: tuple[int, ...], dtype: Any) -> Any:
    """A CuPy array whose elements lie across the borders of elements."""
    return unreal_gpu.array(shape, dtype, address=(1 << 40) + 1)


ROWS = (2, 2, SQ)
MISPLACED: dict[str, dict[str, Any]] = {
    "kv_lens": {"kv_lens": ((2,), np.int32)},
    "q_lens": {"q_lens": ((2,), np.int64)},
    "offset": {"offset": ((2,), np.int32)},
    "alibi_slopes": {"alibi_slopes": ((2,), np.float32)},
    "sinks": {"sinks": ((2,), np.float64)},
    "bias": {"bias": ((SQ, SQ), np.float16)},
    "lse": {"lse": (ROWS, np.float32)},
    "dlse": {"dlse": (ROWS, np.float32)},
    "stats": {"stats": ((2, *ROWS), np.float32)},
    "dout": {"dout": (SHAPE, np.float16)},
}


@pytest.mark.parametrize(("name", "given"), [(n, x[n]) for n, x in MISPLACED.items()])
def test_a_gpu_reads_whole_elements_alone(cuda: StubCuda, name: str, given: Any) -> None:
    """Others are an error of the hardware, after which no call of the process works."""
    out, lse, stats = cuflash.attention(*tensors(), return_stats=True)
    results = {"dout": out, "out": out, "lse": lse, "stats": stats, name: shifted(*given)}
    q, k, v = tensors()
    with pytest.raises(ValueError, match=f": {name} has its first element at 0x.*1; expected a"):
        cuflash.attention_backward(q=q, k=k, v=v, **results)


def test_a_gpu_reads_whole_elements_of_edges_and_masks_alone(cuda: StubCuda) -> None:
    q, k, v = tensors(shape=SHAPE[1:])
    with pytest.raises(ValueError, match="cu_seqlens_k has its first element at 0x"):
        cuflash.attention_varlen(q, k, v, lengths(3), shifted((3,), np.int32))
    shape = (2, 1, SQ, 1)
    for name, mask in {
        "q_ids": masks.documents(shifted((2, SQ), np.int32)),
        "kv_ids": masks.documents(lengths(2, SQ), shifted((2, SQ), np.int64)),
        "n": masks.prefix(shifted((2,), np.int32)),
        "offset": masks.window(3, 0, shifted((2,), np.int32)),
        "end": masks.intervals(lengths(*shape), shifted(shape, np.int32)),
    }.items():
        with pytest.raises(ValueError, match=rf"mask leaf 0 \(\w+\) {name} has its first element"):
            cuflash.attention(*tensors(), mask=mask)


class Fails(Exception):
    """What a stub raises in the middle of a call."""


def fails_after(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which raises from its call number `count` on."""
    calls = iter(range(count))

    def call(*arguments: Any, **options: Any) -> Any:
        if next(calls, None) is None:
            raise Fails
        return function(*arguments, **options)

    return call


def surroundings(cuda: StubCuda) -> tuple[Any, ...]:
    """What a call changes while it runs."""
    return (cuda.thread.device, *cuda.thread.streams, cupy.cuda.get_allocator(), {**cuda.captures})


@pytest.mark.parametrize("count", range(6))
@pytest.mark.parametrize("place", ["malloc", "launch"])
@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_a_call_that_fails_leaves_nothing_behind(
    cuda: StubCuda, library: str, place: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory, or of whatever a launch needs; the next call launches what it always does."""
    q, k, v = tensors() if library == "cupy" else torch_tensors()
    mask = masks.documents(lengths(2, SQ)) if library == "cupy" else masks.causal()
    with stub_cuda.torch_installed(cuda) if library == "torch" else nullcontext():
        mask, cuda.launched = mask.compile(q, k), []
        both([q, k, v], mask=mask)
        expected, cuda.launched = len(cuda.launched), []
        both([q, k, v], mask=mask)
        again, cuda.launched = len(cuda.launched), []
        mask.tables.clear()
        before = surroundings(cuda)
        with monkeypatch.context() as patch:
            if place == "launch":
                patch.setattr(_gpu.driver, "launchKernel", fails_after(count, cuda.launch))
            elif library == "cupy":
                patch.setattr(cuda, "malloc", fails_after(count, cuda.malloc))
                cuda.pool._free.clear()
            else:
                torch = pytest.importorskip("torch")
                patch.setattr(torch, "empty", fails_after(count, torch.empty))
            with pytest.raises(Fails):
                both([q, k, v], mask=mask)
        assert surroundings(cuda) == before
        mask.tables.clear()
        cuda.launched = []
        both([q, k, v], mask=mask)
        assert len(cuda.launched) == expected
        both([q, k, v], mask=mask)
        assert len(cuda.launched) == expected + again


def test_a_stream_that_a_failed_call_leaves_behind_is_noticed(
    cuda: StubCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def forgetful(self: Any, place: str) -> Iterator[None]:
        cuda.stream().__enter__()
        yield
        cuda.thread.streams.pop()

    before = surroundings(cuda)
    monkeypatch.setattr(interop._CuPy, "context", forgetful)
    cuda.set_device(0)
    both()
    assert surroundings(cuda) == before
    monkeypatch.setattr(_gpu.driver, "launchKernel", fails_after(0, cuda.launch))
    with pytest.raises(Fails):
        both()
    assert surroundings(cuda) != before


@pytest.mark.parametrize("count", range(4))
def test_a_captured_call_that_fails_leaves_nothing_behind(
    cuda: StubCuda, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays, stream, pool = tensors(), cuda.stream(), stub_cuda.Pool(cuda)
    mask = masks.documents(lengths(2, SQ)).compile(*arrays[:2])
    with cupy.cuda.using_allocator(pool.malloc), stream.capture():
        before, known = surroundings(cuda), kept()
        with monkeypatch.context() as patch:
            patch.setattr(_gpu.driver, "launchKernel", fails_after(count, cuda.launch))
            with pytest.raises(Fails):
                both(mask=mask)
        assert surroundings(cuda) == before and kept() == known
        assert not mask.tables and not mask.read_by_graphs
        both(mask=mask)


def test_a_dry_run_is_of_its_thread_alone(cuda: StubCuda) -> None:
    both()
    launched, cuda.launched = len(cuda.launched), []
    with _gpu.dry_run() as noted:
        assert in_a_new_thread(both) is None
        assert len(cuda.launched) == launched and not noted
        with pytest.raises(Fails), _gpu.dry_run() as inner:
            both()
            raise Fails
        assert len(inner) == launched and not noted
        both()
        assert len(noted) == launched
    assert len(cuda.launched) == launched
    both()
    assert len(cuda.launched) == 2 * launched


NO_POOLS: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (lambda: None, "CUDA without a pool of CuPy's, which frees it"),
    "managed": (lambda: cupy.cuda.malloc_managed, "CUDA without a pool of CuPy's, which frees it"),
    "async": (lambda: cupy.cuda.malloc_async, "CUDA without a pool of CuPy's, which frees it"),
    "async pool": (
        lambda: cupy.cuda.MemoryAsyncPool.__new__(cupy.cuda.MemoryAsyncPool, []).malloc,
        "a pool of CUDA's, cupy.cuda.MemoryAsyncPool, which takes it back",
    ),
}


@pytest.mark.parametrize(("allocator", "found"), NO_POOLS.values(), ids=NO_POOLS)
def test_memory_of_no_pool_is_not_captured(
    cuda: StubCuda, allocator: Callable[[], Any], found: str
) -> None:
    message = f"a CUDA graph is being captured, and memory comes from {found} while replays use it"
    with cupy.cuda.using_allocator(allocator()), cuda.stream().capture() as graph:  # noqa: SIM117
        with pytest.raises(RuntimeError, match=f"^cuflash.attention: {message}; expected a pool"):
            cuflash.attention(*tensors())
    assert not graph.launches
