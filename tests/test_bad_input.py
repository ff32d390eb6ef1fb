"""What a careless or hostile caller may hand over, beyond the rules that test_problem.py lists."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from unreal_gpu import Maker

import cuflash
from cuflash import _jit, _params, _program, _traits, masks, reference
from cuflash.__main__ import main
from cuflash._packed import PackedProblem
from cuflash._problem import Problem

B, SQ, SK, H, D = 2, 5, 7, 2, 8
SHAPES = {"q": (B, SQ, H, D), "k": (B, SK, H, D), "v": (B, SK, H, D)}
REFUSALS = (TypeError, ValueError, NotImplementedError)


def tensors(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def refused(message: str):
    return pytest.raises(REFUSALS, match=f"^cuflash.{message}")


# Values


class Column:
    """A data frame's column: a dtype and a shape, but no array."""

    def __init__(self, values: list[int]) -> None:
        self.values = np.array(values)
        self.dtype, self.shape = self.values.dtype, self.values.shape

    def __getitem__(self, index: int) -> Any:
        return self.values[index]


@pytest.mark.parametrize("lengths", [[1, 2], [-3, 2], [1, 2000]])
@pytest.mark.parametrize("name", ["q_lens", "kv_lens"])
def test_lengths_that_are_no_array_are_not_trusted(name: str, lengths: list[int]) -> None:
    with refused(f"attention: {name} is .*Column; expected one integer per batch entry"):
        cuflash.attention(**tensors(), **{name: Column(lengths)})


@pytest.mark.parametrize("value", [1, None, "yes", np.array([True, False])])
@pytest.mark.parametrize("name", ["return_lse", "deterministic", "bias_gradient"])
def test_flags_are_checked_at_once(name: str, value: Any) -> None:
    with refused(f"attention_vjp: {name} is .*; expected True or False"):
        cuflash.attention_vjp(**tensors(), **{name: value})


def test_no_query_heads_for_some_key_heads() -> None:
    inputs = tensors()
    inputs["q"] = inputs["q"][:, :, :0]
    out, pullback = cuflash.attention_vjp(**inputs)
    assert out.shape == (B, SQ, 0, D)
    assert not any(gradient.any() for gradient in pullback(out)[:3])


def test_intervals_of_no_heads() -> None:
    q, k, v = (x[:, :, :0] for x in tensors().values())
    mask = masks.intervals(*np.zeros((2, B, 0, SK, 2), int))
    out, pullback = cuflash.attention_vjp(q, k, v, mask=mask)
    expected, _ = reference.attention(q, k, v, mask=mask)
    assert out.shape == expected.shape == (B, SQ, 0, D)
    assert pullback(out).dk.shape == reference.attention_backward(out, q, k, v, mask=mask).dk.shape


def test_a_bias_of_the_lowest_number_is_no_mask() -> None:
    bias = np.zeros((SQ, SK), np.float32)
    bias[2] = np.finfo(np.float32).min
    inputs = tensors()
    out, lse = cuflash.attention(**inputs, bias=bias, return_lse=True)
    mean = inputs["v"].mean(axis=1)
    assert np.allclose(out[:, 2], mean, atol=1e-6)
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_key_of_nan_spoils_only_the_rows_that_see_it(softcap: float | None) -> None:
    inputs = tensors()
    inputs["k"][:, -1] = np.nan
    options = {"causal": True, "softcap": softcap}
    out, pullback = cuflash.attention_vjp(**inputs, **options)
    dout = np.ones_like(out)
    expected = reference.attention_backward(dout, **inputs, **options)
    for found, right in zip(pullback(dout)[:3], expected[:3], strict=True):
        assert (np.isnan(found) == np.isnan(right)).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_callers_error_state_is_not_asked(dtype: Any) -> None:
    inputs = tensors(dtype)
    inputs["v"] *= 1000
    bias = np.zeros((SQ, SK), dtype)
    with np.errstate(all="raise"):
        out, pullback = cuflash.attention_vjp(**inputs, bias=bias)
        pullback(np.full_like(out, 6e4))


class Raising:
    """Whatever it is asked for, it raises."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("mine")


class RaisingNumber(float):
    def __float__(self) -> float:
        raise RuntimeError("mine")


ANY_OPTION = [
    *("causal", "offset", "window", "scale", "softcap", "q_lens", "kv_lens", "mask", "bias"),
    *("alibi_slopes", "sinks", "dropout", "seed", "score_mod", "return_lse", "deterministic"),
]


@pytest.mark.parametrize("name", [*SHAPES, *ANY_OPTION])
def test_an_object_that_raises_is_no_argument(name: str) -> None:
    pytest.importorskip("torch")  # whose tensors are looked for among the arguments
    with refused(f"attention_vjp: {name} is .*Raising.*; expected"):
        cuflash.attention_vjp(**{**tensors(), name: Raising()})


@pytest.mark.parametrize("make", [masks.causal, masks.prefix, masks.dense, masks.documents])
def test_a_mask_of_an_object_that_raises(make: Any) -> None:
    with refused(f"masks.{make.__name__}: .* is .*Raising.*; expected"):
        make(Raising())


@pytest.mark.parametrize("name", ["scale", "softcap", "dropout"])
def test_a_number_that_raises(name: str) -> None:
    with refused(f"attention: {name} is a RaisingNumber; expected a real number"):
        cuflash.attention(**tensors(), **{name: RaisingNumber(1)})


@pytest.mark.parametrize("parts", [range(10**12), (Raising() for _ in range(1)), [Raising()]])
def test_parts_that_are_no_arrays(parts: Any) -> None:
    state = np.zeros((1, 1, 1))
    with refused(r"merge: outs(\[0\])? is a (range|.*Raising); expected"):
        cuflash.merge(parts, [state])


# Arrays of others


class Exporter:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


def _raises(error: BaseException) -> Any:
    def method(self: Any, **options: Any) -> Any:
        raise error

    return method


@pytest.mark.parametrize(
    ("method", "broken"),
    [
        ("__dlpack__", lambda self, **options: None),
        ("__dlpack__", _raises(AttributeError("broken"))),
        ("__dlpack__", _raises(StopIteration("broken"))),
        ("__dlpack_device__", _raises(RuntimeError("broken"))),
        ("__dlpack_device__", lambda self: None),
        ("__dlpack_device__", lambda self: ("cpu", 0)),
    ],
)
def test_a_broken_exporter_is_named(method: str, broken: Any) -> None:
    kind = type("Broken", (Exporter,), {method: broken})
    with refused("attention: q is a .*Broken"):
        cuflash.attention(*map(kind, tensors().values()))
    with refused("attention: kv_lens is a .*Broken"):
        cuflash.attention(**tensors(), kv_lens=kind(np.array([1, 2])))


def test_a_deleted_array_of_jax_is_named() -> None:
    jnp = pytest.importorskip("jax.numpy")
    q, k, v = (jnp.array(x) for x in tensors().values())
    k.delete()
    with refused("attention: k is a jax.Array .*deleted"):
        cuflash.attention(q, k, v)


def test_out_that_is_exported_as_a_copy_is_refused() -> None:
    class Copies(Exporter):
        def __dlpack__(self, **options: Any) -> Any:
            return self.array.__dlpack__(**{**options, "copy": True})

    out = Copies(np.zeros(SHAPES["q"], np.float32))
    with refused("attention: out is a .*Copies"):
        cuflash.attention(*map(Copies, tensors().values()), out=out)


# GPU


@pytest.mark.parametrize("name", ["q", "out"])
def test_elements_at_odd_addresses(name: str) -> None:
    make = Maker("cuda")
    array = make((B * SQ * H * D * 2 + 2,), np.uint8)[1:-1].view(np.float16).reshape(SHAPES["q"])
    arrays = {**{name: make(shape) for name, shape in SHAPES.items()}, name: array}
    with refused(f"attention: {name} "):
        problem = make.problem(**arrays)
        _traits.Traits.of(problem, _params.alignment(arrays["q"], arrays[name]))


@pytest.mark.parametrize("shape", [(1, 5, 2, 8), (5, 2, 8)])
def test_strides_of_parts_of_elements(shape: tuple[int, ...]) -> None:
    x = np.ndarray(shape, np.float16, bytes(200), 0, (165, 33, 16, 2)[-len(shape) :])
    message = "attention: q has a stride of {} bytes; expected a multiple of 2, an element"
    with refused(message.format(x.strides[0])):
        if len(shape) == 4:
            Problem.create("attention", "cuda", x, x, x)
        else:
            PackedProblem.create("attention", "cuda", x, x, x, np.zeros(1, int), np.zeros(1, int))


# Threads and processes


@pytest.mark.parametrize("how", ["threading.Thread(target=late).start()", "atexit.register(late)"])
def test_a_call_after_the_end_of_the_main_thread(how: str) -> None:
    script = f"""
import atexit, threading
import numpy as np
import cuflash
x = np.ones((1, 600, 8, 16), np.float32)
def late():
    if threading.current_thread() is not threading.main_thread():
        threading.main_thread().join()
    assert np.allclose(cuflash.attention(x, x, x), 1)
    print("done")
{how}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "done" in done.stdout, done.stderr


# Command line


@pytest.mark.parametrize(
    "arguments",
    [
        ["--arch", "banana"],
        ["--arch", "sm_"],
        ["--arch", "sm_80", "--head-dim", "0"],
        ["--arch", "sm_80", "--head-dim", "300"],
        ["--arch", "sm_80", "--head-dim-v", "-1"],
        ["--arch", "sm_80", "--group", "0"],
        ["--arch", "sm_80", "--jobs", "0"],
    ],
)
def test_compile_refuses_nonsense(
    arguments: list[str], tmp_path: Any, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("CUFLASH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_jit, "cached_cubin", None)  # nothing is to be compiled
    try:
        status = main(["compile", "--jobs", "1", *arguments])
    except SystemExit as error:  # argparse
        status = error.code
    assert status == 2
    assert arguments[-1] in capsys.readouterr().err


def test_a_record_nested_too_deep_is_damaged(tmp_path: Any) -> None:
    path = tmp_path / "entry.cubin"
    path.write_bytes(b"image")
    path.with_suffix(".json").write_text("[" * 200_000)
    assert _jit._read_entry(path) is None


# Masks and score functions


def attend(mask: Any, **options: Any) -> np.ndarray:
    return cuflash.attention(**tensors(), mask=mask, **options)


def test_a_mask_that_is_joined_with_itself_over_and_over() -> None:
    mask = masks.causal()
    with refused(r"masks: the mask joins 2048 rules, 12 deep; expected at most 1024 rules"):
        for _ in range(100):
            mask = mask & mask
    assert attend(mask).shape == SHAPES["q"]


@pytest.mark.parametrize("join", [lambda x, y: x & y, lambda x, y: ~(y | x)])
def test_masks_that_are_nested_deep(join: Any) -> None:
    mask = masks.causal()
    with refused(r"masks: the mask joins \d+ rules, 129 deep; expected at most .* 128 deep"):
        for _ in range(500):
            mask = join(mask, masks.window(3, 3))
    expected, _ = reference.attention(**tensors(), mask=mask)
    for same in (mask, pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask)):
        assert np.allclose(attend(same, window=(9, 9)), expected, atol=1e-5)


def test_a_mask_that_is_inverted_or_compiled_over_and_over() -> None:
    q, k, _ = tensors().values()
    inverted = compiled = masks.causal()
    for _ in range(1000):
        inverted, compiled = ~inverted, compiled.compile(q, k)
    for mask in (inverted, compiled):
        assert (attend(mask) == attend(masks.causal())).all()


def test_the_text_of_a_mask_shows_no_values() -> None:
    array = np.zeros((SQ, SK), bool)
    mask = masks.dense(array) & masks.lengths(range(1000)) | ~masks.expression("a(0)", a=array[0])
    with np.printoptions(threshold=sys.maxsize):
        assert repr(mask) == (
            "Or(left=And(left=Dense(array=bool (5, 7)), "
            "right=Lengths(kv_lens=int64 (1000,), q_lens=None)), "
            "right=Not(inner=Expression(code='a(0)', named={a: bool (7,)}, function=None)))"
        )
        assert "named" not in repr(cuflash.ScoreMod("score", named={"a": array}))


@pytest.mark.parametrize("mask", [masks.Mask(), masks.Mask() & masks.causal(), masks.Mask])
def test_a_mask_of_no_rule(mask: Any) -> None:
    with refused("(masks: a Mask has no rule|attention: mask is a type)"):
        attend(mask)


def test_a_score_function_for_a_mask() -> None:
    with refused("attention: mask is a ScoreMod; expected a mask or a boolean array"):
        attend(cuflash.ScoreMod("score"))


def test_classes_for_arrays_and_functions() -> None:
    with refused("masks.prefix: n is a type; expected one integer per batch entry"):
        masks.prefix(np.ndarray)
    assert "function=<class" in repr(masks.expression("true", np.ndarray))


@pytest.mark.parametrize("size", [2**31, 2**63, 2**64, 10**400, np.uint64(2**64 - 1)])
def test_blocks_larger_than_all(size: Any) -> None:
    for sizes in ((size, SK), (SQ, size)):
        mask = masks.blocks(np.ones((1, 1), bool), *sizes)
        assert (attend(mask) == attend(None)).all()
        assert len(_program.mask_attachments(mask, 1, {})) == _program.ATTACHMENT_BYTES


def test_intervals_of_an_exporter_without_a_shape() -> None:
    start, end = np.zeros((2, B, 1, SK, 1), int)
    end[:, :, 3:] = 4
    expected = attend(masks.intervals(start, end))
    assert (attend(masks.intervals(Exporter(start), Exporter(end))) == expected).all()
    with refused(r"attention: mask leaf 0 \(intervals\) start has shape .*; expected the same"):
        attend(masks.intervals(Exporter(start), np.concatenate([end, end], axis=-1)))
    with refused("masks.intervals: start is a type; expected an array"):
        masks.intervals(np.ndarray, np.ndarray)


def test_documents_beyond_int64() -> None:
    ids = np.full((B, SQ), 2**64 - 1, np.uint64)
    with refused(r"attention: mask leaf 0 \(documents\) q_ids holds 18446744073709551615"):
        attend(masks.documents(ids, np.full((B, SK), -1)))


class Broken:
    def __array__(self, *arguments: Any, **options: Any) -> Any:
        raise RuntimeError("broken")


@pytest.mark.parametrize("lengths", [[Broken(), 1], range(10**12), range(2**70), [0.5, [1]] * 99])
def test_sequences_that_make_no_lengths(lengths: Any) -> None:
    with refused("attention: kv_lens is .{1,200}; expected one integer per batch entry"):
        cuflash.attention(**tensors(), kv_lens=lengths)
    with refused("masks.prefix: n is .{1,200}; expected one integer per batch entry"):
        masks.prefix(lengths)


def ones(score: np.ndarray, *place: np.ndarray) -> np.ndarray:
    return np.ones_like(score)


RESULTS = [
    (None, "object"),
    ("1", "<U1"),
    (1j, "complex128"),
    (np.array(3, "m8[s]"), r"timedelta64\[s\]"),
    ([[1], [1, 2]], "object"),
    (np.ones(3), r"shape \(3,\)"),
    (np.ones((1, 1, 1, 1, 1)), r"shape \(1, 1, 1, 1, 1\)"),
]


@pytest.mark.parametrize(("result", "found"), RESULTS)
def test_functions_that_give_no_numbers_for_the_scores(result: Any, found: str) -> None:
    mask = masks.expression("true", lambda *place: result)
    for whole in (mask, ~mask & masks.causal()):
        with refused(f"masks.expression: function gave {found}.*; expected"):
            attend(whole)
    forward = cuflash.ScoreMod("score", "1.f", lambda *place: result, ones)
    with refused(f"ScoreMod: numpy_forward gave {found}.*; expected"):
        attend(None, score_mod=forward)
    backward = cuflash.ScoreMod("score", "1.f", lambda score, *place: score, lambda *place: result)
    out, pullback = cuflash.attention_vjp(**tensors(), score_mod=backward)
    with refused(f"ScoreMod: numpy_backward gave {found}.*; expected"):
        pullback(out)


@pytest.mark.parametrize("argument", range(4))
def test_functions_that_write_to_the_indices(argument: int) -> None:
    def write(*arguments: np.ndarray) -> np.ndarray:
        arguments[-4:][argument][...] += 1
        return np.ones(1)

    with pytest.raises(ValueError, match="read-only"):
        attend(masks.expression("true", write))
    with pytest.raises(ValueError, match="read-only"):
        attend(None, score_mod=cuflash.ScoreMod("score", numpy_forward=write))


def fail(*arguments: np.ndarray, **named: np.ndarray) -> np.ndarray:
    raise LookupError("mine")


RAISING = {
    "masks.expression: function, of 'w(i)',": {
        "mask": masks.causal() & masks.expression("w(i)", fail, w=np.ones(3, np.int32))
    },
    "ScoreMod: numpy_forward, of 'score * w(i)',": {
        "score_mod": cuflash.ScoreMod(
            "score * w(i)", numpy_forward=fail, named={"w": np.ones(3, np.int32)}
        )
    },
}


@pytest.mark.parametrize("name", RAISING)
def test_the_error_of_a_users_function_is_its_own_and_says_where(name: str) -> None:
    with pytest.raises(LookupError) as caught:
        cuflash.attention(**tensors(), **RAISING[name])
    assert str(caught.value) == "mine" and caught.value.args == ("mine",)
    called = (
        r"was called with b [01]( to 1)?, h [01]( to 1)?, i 0( to 4)?, j 0( to 6)?, w int32 \(3,\)"
    )
    printed = "".join(traceback.format_exception(caught.value))
    assert re.search(f"^.*cuflash.{re.escape(name)} {called}$", printed, re.MULTILINE)
    assert "in fail" in printed  # the line of the user's


def test_the_derivative_of_a_score_function_says_that_it_is_the_one() -> None:
    function = cuflash.ScoreMod("score", "1.f", lambda score, *place: score, fail)
    out, pullback = cuflash.attention_vjp(**tensors(), score_mod=function)
    with pytest.raises(LookupError) as caught:
        pullback(out)
    printed = "".join(traceback.format_exception(caught.value))
    assert "cuflash.ScoreMod: numpy_backward, of 'score', was called with b " in printed


def test_what_interrupts_a_users_function_has_no_note() -> None:
    def interrupt(*arguments: np.ndarray) -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        attend(masks.expression("true", interrupt))
    assert "was called with" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("name", ["numpy_forward", "numpy_backward"])
def test_score_functions_that_cannot_be_called(name: str) -> None:
    with refused(f"ScoreMod: {name} is a int; expected a function of NumPy arrays or None"):
        cuflash.ScoreMod("score", **{name: 3})


@pytest.mark.parametrize("named", [None, 3, [], "", "ab", np.ones(2), [("a", np.ones(2))]])
def test_named_arrays_that_are_no_mapping(named: Any) -> None:
    with refused("ScoreMod: named is a .*; expected a mapping of names to arrays"):
        cuflash.ScoreMod("score", named=named)


@pytest.mark.parametrize("name", ["p", "at", "int", "class", "__x", "é", "attached", "a\n", "a;"])
def test_names_that_cannot_stand_in_a_kernel(name: str) -> None:
    with refused("masks.expression: .* names an array; expected a C identifier"):
        masks.expression("true", **{name: np.ones(2)})
    with refused("ScoreMod: .* names an array; expected a C identifier"):
        cuflash.ScoreMod("score", named={name: np.ones(2)})


@pytest.mark.parametrize(
    "code", ['1\n#include "/etc/passwd"', "  # define b h", "%:error", "1\0", "1 + '\ud800'"]
)
def test_code_that_is_no_expression(code: str) -> None:
    with refused("masks.expression: code is .*; expected a CUDA C\\+\\+ expression, without"):
        masks.expression(code)
    with refused("ScoreMod: forward is .*; expected a CUDA C\\+\\+ expression, without"):
        cuflash.ScoreMod(code)


def test_one_compiled_mask_in_many_threads_and_shapes() -> None:
    q, k, v = tensors().values()
    mask = (masks.causal() | masks.prefix([3, 1])).compile(q, k)
    cases = [(q, k, v), (q[:, :3], k, v), (q.astype(np.float64), k.astype(float), v.astype(float))]
    expected = [reference.attention(*case, mask=mask)[0] for case in cases]

    def run(number: int) -> bool:
        case = number % len(cases)
        return np.allclose(cuflash.attention(*cases[case], mask=mask), expected[case], atol=1e-5)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(run, range(60)))
