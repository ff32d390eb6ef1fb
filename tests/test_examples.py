"""The examples run, and the README's; the small GPT learns, and its gradients are the true ones."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

import cuflash

CHECKOUT = Path(__file__).resolve().parent.parent
ALPHABET, CONTEXT = 11, 6


@pytest.fixture
def example(monkeypatch):
    """Imports an example as its script would find its neighbours."""
    monkeypatch.syspath_prepend(str(CHECKOUT / "examples"))
    return importlib.import_module


@pytest.fixture
def char_gpt(example, monkeypatch):
    """The training example on NumPy, whatever GPU there is: its gradients are taken in float64."""
    module = example("train_char_gpt")
    monkeypatch.setattr(module, "xp", np)
    return module


@pytest.fixture
def tiny(char_gpt):
    return char_gpt.Config(ALPHABET, context=CONTEXT, channels=8, heads=2, layers=2, batch=2)


def test_the_readme_example_runs():
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    out, q = names["out"], names["q"]
    assert out.shape == q.shape and np.isfinite(out).all()
    assert len([line for line in block.splitlines() if line]) == 8


def test_the_readme_has_one_test_command():
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    lines = [
        line for line in readme.splitlines() if re.match(r"python3 -m venv .*-m pytest\b", line)
    ]
    assert len(lines) == 1


def test_quickstart_agrees_with_the_reference(example, monkeypatch, capsys):
    quickstart = example("quickstart")
    monkeypatch.setattr(quickstart, "LONG", 2048)
    quickstart.main()
    printed = capsys.readouterr().out
    errors = {name: float(x) for name, x in re.findall(r"(out|dq|dk|dv) +(\S+e\S+)", printed)}
    tolerance = 1e-5 if quickstart.xp is np else 5e-2
    assert set(errors) == {"out", "dq", "dk", "dv"}
    assert all(error <= tolerance for error in errors.values()), errors
    taken, scores = (int(mebibytes) for mebibytes in re.findall(r"(\d+) MiB", printed))
    assert taken < scores


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_gradients_are_those_of_the_library_itself(example, capsys, library):
    pytest.importorskip(library)
    example(f"{library}_attention").main()
    printed = capsys.readouterr().out
    errors = re.findall(r"(\w+) +(\d\S+e\S+)", printed)
    assert {name for name, _ in errors} == {"out", "dq", "dk", "dv", "dbias", "dsinks"}
    assert all(float(error) <= 2e-5 for _, error in errors), printed


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_the_readme_wraps_attention_as_the_example_does(library):
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    source = (CHECKOUT / "examples" / f"{library}_attention.py").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (block,) = [block for block in blocks if f"{library}." in block and "def backward" in block]
    assert block in source


SECOND = "^cuflash.attention: a second derivative was asked for, which is not available; expected"
TERMS = {"q": (1, 3, 2, 4), "k": (1, 3, 2, 4), "v": (1, 3, 2, 4), "bias": (3, 3), "sinks": (2,)}


@pytest.fixture
def torch_inputs():
    """q, k, v, bias and sinks in float64, which require grad."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64, "requires_grad": True}
    return {name: torch.randn(shape, **options) for name, shape in TERMS.items()}


def test_a_second_derivative_that_once_was_dropped(example, torch_inputs):
    torch = pytest.importorskip("torch")
    q, k, v, *_ = torch_inputs.values()
    out = example("torch_attention").attention(q, k, v)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match=SECOND):
        (out.mean() + dq.square().sum()).backward()


@pytest.mark.parametrize("dout_has_graph", [False, True], ids=["dout", "dout with a graph"])
@pytest.mark.parametrize("second", TERMS)
@pytest.mark.parametrize("first", TERMS)
def test_second_derivatives_of_the_torch_example_raise(
    example, torch_inputs, first, second, dout_has_graph
):
    torch = pytest.importorskip("torch")
    out = example("torch_attention").attention(**torch_inputs)
    dout = torch.ones_like(out).requires_grad_(dout_has_graph)
    (gradient,) = torch.autograd.grad(out, torch_inputs[first], dout, create_graph=True)
    with pytest.raises(NotImplementedError, match=SECOND):
        torch.autograd.grad(gradient.sum(), torch_inputs[second])


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
@pytest.mark.parametrize("only", TERMS)
def test_second_derivatives_raise_where_one_input_alone_requires_grad(example, torch_inputs, only):
    inputs = {n: x.detach().requires_grad_(n == only) for n, x in torch_inputs.items()}
    example("torch_attention").attention(**inputs).square().sum().backward(create_graph=True)
    gradient = inputs[only].grad
    inputs[only].grad = None
    with pytest.raises(NotImplementedError, match=SECOND):
        gradient.sum().backward()


def test_a_derivative_by_dout_raises(example, torch_inputs):
    torch = pytest.importorskip("torch")
    out = example("torch_attention").attention(**torch_inputs)
    dout = torch.ones_like(out, requires_grad=True)
    (dv,) = torch.autograd.grad(out, torch_inputs["v"], dout, create_graph=True)
    with pytest.raises(NotImplementedError, match=SECOND):
        torch.autograd.grad(dv.sum(), dout)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
def test_first_derivatives_of_the_torch_example_work_in_every_way(example, torch_inputs):
    torch = pytest.importorskip("torch")
    attention, inputs = example("torch_attention").attention, [*torch_inputs.values()]

    def loss(*inputs):
        return attention(*inputs, causal=True).square().sum()

    value = loss(*inputs)
    expected = torch.autograd.grad(value, inputs, retain_graph=True)
    plain = [x.detach() for x in inputs]
    ways = [torch.autograd.grad(value, inputs, retain_graph=True)]
    ways += [[x.detach() for x in torch.autograd.grad(value, inputs, create_graph=True)]]
    ways += [torch.func.grad(loss, tuple(range(5)))(*plain)]
    ways += [torch.func.vjp(loss, *plain)[1](torch.ones_like(value))]
    value.backward(create_graph=True)
    ways += [[x.grad for x in inputs]]
    for found in ways:
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert torch.autograd.gradcheck(attention, inputs)


def test_higher_derivatives_by_torchs_tools_raise(example, torch_inputs):
    torch = pytest.importorskip("torch")
    attention, inputs = example("torch_attention").attention, tuple(torch_inputs.values())
    plain = tuple(x.detach() for x in inputs)

    def loss(*inputs):
        return attention(*inputs).sum()

    def gradient(*inputs):
        return torch.func.grad(loss)(*inputs).sum()

    for ask in (
        lambda: torch.autograd.gradgradcheck(attention, inputs),
        lambda: torch.autograd.functional.hessian(loss, plain),
        lambda: torch.func.grad(gradient)(*plain),
    ):
        with pytest.raises(NotImplementedError, match=SECOND):
            ask()
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(attention, plain, plain)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.hessian(loss)(*plain)


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_the_wrappers_hand_on_the_statistics(example, monkeypatch, library):
    module = pytest.importorskip(library)
    given, backward = [], cuflash.attention_backward

    def recorded(*arrays, stats=None, **options):
        given.append(np.asarray(stats))
        return backward(*arrays, stats=stats, **options)

    monkeypatch.setattr(cuflash, "attention_backward", recorded)
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 4)).astype(np.float32)
    wrapper = example(f"{library}_attention")
    if library == "torch":
        tensor = module.from_numpy(x).requires_grad_()
        wrapper.attention(tensor, tensor, tensor).sum().backward()
    else:
        attention = wrapper.attention_of()
        module.grad(lambda x: attention(x, x, x).sum())(module.numpy.asarray(x))
    (stats,) = given
    np.testing.assert_array_equal(stats, cuflash.attention(x, x, x, return_stats=True)[2])


LARGE = [-1e4, -1e7, -1e9, -1e30, np.finfo(np.float32).min, 3e38]


@pytest.mark.parametrize("score", LARGE)
def test_rows_of_one_large_score_have_right_gradients_in_torch(example, score):
    torch = pytest.importorskip("torch")
    q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 4, 1, 2)
    v = torch.arange(8.0).reshape(1, 4, 1, 2).requires_grad_()
    out = example("torch_attention").attention(q, k, v, torch.full((4,), score))
    (dv,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(dv, torch.full_like(v, 0.25))


@pytest.mark.parametrize("jit", [False, True], ids=["at once", "jit"])
@pytest.mark.parametrize("score", LARGE)
def test_rows_of_one_large_score_have_right_gradients_in_jax(example, score, jit):
    jax = pytest.importorskip("jax")
    q, k = jax.numpy.zeros((1, 1, 1, 2)), jax.numpy.zeros((1, 4, 1, 2))
    bias = jax.numpy.full(4, score)
    attention = example("jax_attention").attention_of()
    gradient = jax.grad(lambda v: attention(q, k, v, bias).sum())
    dv = (jax.jit(gradient) if jit else gradient)(jax.numpy.arange(8.0).reshape(1, 4, 1, 2))
    np.testing.assert_allclose(dv, 0.25, rtol=1e-6)


def test_what_has_no_gradient_in_the_torch_example_is_refused(example):
    torch = pytest.importorskip("torch")
    attention, x = example("torch_attention").attention, torch.ones(1, 3, 2, 4)
    slopes = torch.ones(2, requires_grad=True)
    with pytest.raises(NotImplementedError, match="^cuflash.attention: alibi_slopes requires grad"):
        attention(x, x, x, alibi_slopes=slopes)
    with torch.no_grad():
        assert torch.equal(attention(x, x, x, alibi_slopes=slopes), x)


@pytest.mark.parametrize("given", [("bias",), ("sinks",), ()], ids=["bias", "sinks", "neither"])
def test_the_torch_example_without_bias_or_sinks(example, given):
    torch = pytest.importorskip("torch")
    q, k, v, dout = torch.randn((4, 2, 5, 4, 8), generator=torch.Generator().manual_seed(0))
    terms = {"bias": torch.ones(4, 5, 5), "sinks": torch.ones(4)}
    terms = {name: terms[name].requires_grad_() for name in given}
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = example("torch_attention").attention(*inputs, **terms, causal=True)
    found = torch.autograd.grad(out, [*inputs, *terms.values()], dout)
    with torch.no_grad():
        _, pullback = cuflash.attention_vjp(q, k, v, **terms, causal=True)
    expected = [x for x in pullback(dout) if x is not None]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("given", [("bias",), ("sinks",), ()], ids=["bias", "sinks", "neither"])
@pytest.mark.parametrize("jit", [False, True], ids=["at once", "jit"])
def test_the_jax_example_without_bias_or_sinks(example, given, jit):
    jax = pytest.importorskip("jax")
    q, k, v, dout = jax.random.normal(jax.random.key(0), (4, 2, 5, 4, 8))
    terms = {"bias": jax.numpy.ones((4, 5, 5)), "sinks": jax.numpy.ones(4)}
    terms = {name: terms[name] for name in given}
    attention = example("jax_attention").attention_of(causal=True)
    gradient = jax.grad(lambda inputs, terms: (dout * attention(*inputs, **terms)).sum(), (0, 1))
    gradient = jax.jit(gradient) if jit else gradient
    of_inputs, of_terms = gradient((q, k, v), terms)
    _, pullback = cuflash.attention_vjp(q, k, v, **terms, causal=True)
    expected = [x for x in pullback(dout) if x is not None]
    for x, y in zip([*of_inputs, *of_terms.values()], expected, strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_bias_that_vmap_shares_gets_the_sum_of_the_gradients(example):
    jax = pytest.importorskip("jax")
    x = jax.random.normal(jax.random.key(0), (2, 1, 5, 2, 4))
    bias = jax.random.normal(jax.random.key(1), (5, 5))
    attention = example("jax_attention").attention_of()
    mapped = jax.vmap(lambda x, bias: (x * attention(x, x, x, bias)).sum(), in_axes=(0, None))
    found = jax.grad(lambda bias: mapped(x, bias).sum())(bias)
    gradient = jax.grad(lambda bias, x: (x * attention(x, x, x, bias)).sum())
    np.testing.assert_allclose(found, gradient(bias, x[0]) + gradient(bias, x[1]), rtol=1e-5)


@pytest.fixture
def jax_inputs():
    """q, k, v, bias and sinks."""
    jax = pytest.importorskip("jax")
    keys = jax.random.split(jax.random.key(0), len(TERMS))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, TERMS.values(), strict=True)]


@pytest.mark.parametrize("second", range(len(TERMS)), ids=TERMS)
@pytest.mark.parametrize("first", range(len(TERMS)), ids=TERMS)
def test_second_derivatives_of_the_jax_example_raise(example, jax_inputs, first, second):
    jax = pytest.importorskip("jax")
    attention = example("jax_attention").attention_of()

    def gradient(*inputs):
        return jax.grad(lambda *inputs: attention(*inputs).sum(), first)(*inputs)

    def of_gradient(*inputs):
        return gradient(*inputs).sum()

    ways = [jax.grad(of_gradient, second)]
    if first == second:
        ways += [jax.jit(ways[0]), jax.grad(jax.jit(of_gradient), second)]
        ways += [jax.jacfwd(gradient, second)]
    for ask in ways:
        with pytest.raises(NotImplementedError, match=SECOND):
            ask(*jax_inputs)


def test_other_derivatives_of_the_jax_example(example, jax_inputs):
    jax = pytest.importorskip("jax")
    attention = example("jax_attention").attention_of()

    def loss(*inputs):
        return attention(*inputs).sum()

    with pytest.raises(NotImplementedError, match=SECOND):
        jax.hessian(loss)(*jax_inputs)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, tuple(jax_inputs), tuple(jax_inputs))
    expected = jax.grad(loss)(*jax_inputs)

    def with_constant_gradient(q):
        constant = jax.grad(loss)(jax.lax.stop_gradient(q), *jax_inputs[1:])
        return loss(q, *jax_inputs[1:]) + constant.sum()

    found = jax.grad(with_constant_gradient)(jax_inputs[0])
    for same in (found, jax.grad(jax.checkpoint(loss))(*jax_inputs)):
        np.testing.assert_allclose(same, expected, rtol=1e-6)


OPTIONS = {
    "kv_lens": np.array([2, 3], np.int32),
    "q_lens": np.array([3, 1], np.int32),
    "offset": np.array([0, 2], np.int32),
    "mask": np.arange(9).reshape(3, 3) % 4 != 3,
    "alibi_slopes": np.array([0.5, 0.25], np.float32),
}


@pytest.mark.parametrize("how", ["at once", "jit", "jit of the loss", "vmap"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_jax_traces(example, name, how):
    jax = pytest.importorskip("jax")
    x = np.random.default_rng(0).standard_normal((2, 3, 2, 4)).astype(np.float32)
    attention_of = example("jax_attention").attention_of

    def loss(x, option):
        return attention_of(causal=True, **{name: option})(x, x, x).sum()

    gradient = jax.grad(loss)
    attend = {
        "at once": gradient,
        "jit": jax.jit(gradient),
        "jit of the loss": jax.grad(jax.jit(loss)),
        "vmap": lambda *given: jax.vmap(gradient)(*(x[None] for x in given))[0],
    }[how]
    found = attend(jax.numpy.asarray(x), jax.numpy.asarray(OPTIONS[name]))
    out, pullback = cuflash.attention_vjp(x, x, x, causal=True, **{name: OPTIONS[name]})
    expected = sum(pullback(np.ones_like(out))[:3])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    plain, plain_pullback = cuflash.attention_vjp(x, x, x, causal=True)
    assert not np.allclose(sum(plain_pullback(np.ones_like(plain))[:3]), expected)


def test_an_offset_that_jax_traces_is_one_number(example):
    jax = pytest.importorskip("jax")
    x = jax.random.normal(jax.random.key(0), (2, 3, 2, 4))
    attention_of = example("jax_attention").attention_of
    found = jax.jit(lambda offset: attention_of(causal=True, offset=offset)(x, x, x))(1)
    np.testing.assert_array_equal(found, cuflash.attention(x, x, x, causal=True, offset=1))


@pytest.mark.parametrize("jit", [False, True], ids=["at once", "jit"])
def test_what_has_no_gradient_in_the_jax_example_is_refused(example, jit):
    jax = pytest.importorskip("jax")
    x, slopes = jax.numpy.ones((1, 3, 2, 4)), jax.numpy.ones(2)
    attention_of = example("jax_attention").attention_of
    gradient = jax.grad(lambda slopes: attention_of(alibi_slopes=slopes)(x, x, x).sum())
    message = "^cuflash.attention: alibi_slopes: a gradient was asked for; expected stop_gradient"
    with pytest.raises(NotImplementedError, match=message):
        (jax.jit(gradient) if jit else gradient)(slopes)


@pytest.mark.parametrize("wrap", ["vmap", "jit of vmap"])
def test_the_jax_example_within_vmap(example, wrap):
    jax = pytest.importorskip("jax")
    attention = example("jax_attention").attention_of(causal=True, softcap=2.0)
    x = jax.numpy.asarray(np.random.default_rng(0).standard_normal((2, 1, 5, 2, 4)), "bfloat16")
    gradient = jax.grad(lambda q, k, v: attention(q, k, v).astype("float32").sum())
    mapped = jax.vmap(gradient) if wrap == "vmap" else jax.jit(jax.vmap(gradient))
    found = mapped(x, x, x)
    assert found.dtype == x.dtype
    for i in range(2):
        np.testing.assert_array_equal(found[i], gradient(x[i], x[i], x[i]))


def test_the_gradients_of_the_model_are_those_of_finite_differences(char_gpt, tiny):
    rng = np.random.default_rng(0)
    weights = {
        name: 0.4 * rng.standard_normal(weight.shape)
        for name, weight in char_gpt.initial_weights(tiny, rng, np.float64).items()
    }
    text = rng.integers(ALPHABET, size=(2, CONTEXT + 1))

    def loss_of(weights):
        return char_gpt.loss_and_gradients(weights, tiny, text)[0]

    _, gradients = char_gpt.loss_and_gradients(weights, tiny, text)
    assert gradients.keys() == weights.keys()
    step = 1e-5
    for name, weight in weights.items():
        direction = rng.standard_normal(weight.shape)
        after, before = (
            loss_of({**weights, name: weight + sign * step * direction}) for sign in (1, -1)
        )
        found = float((gradients[name] * direction).sum())
        np.testing.assert_allclose(found, (after - before) / (2 * step), rtol=1e-5, err_msg=name)


def test_the_model_sees_no_character_before_its_turn(char_gpt, tiny):
    rng = np.random.default_rng(0)
    weights = char_gpt.initial_weights(tiny, rng, np.float64)
    weights = {name: rng.standard_normal(weight.shape) for name, weight in weights.items()}
    characters = rng.integers(ALPHABET, size=(1, CONTEXT))
    changed = characters.copy()
    changed[0, 4] = (changed[0, 4] + 1) % ALPHABET
    same, other = (char_gpt.gpt(weights, tiny, x)[0] for x in (characters, changed))
    np.testing.assert_allclose(same[:4], other[:4], rtol=1e-12)
    assert not np.allclose(same[4:], other[4:])


def test_training_lowers_the_held_out_loss(char_gpt, monkeypatch):
    alphabet, training, held_out = char_gpt.read_text()
    config = char_gpt.Config(len(alphabet), 32, channels=32, heads=2, layers=1, batch=4, rate=1e-2)
    monkeypatch.setattr(char_gpt, "WARM_UP_STEPS", 5)
    monkeypatch.setattr(char_gpt, "REPORTS", 3)
    weights, losses = char_gpt.train(config, training, held_out[:1000], 60, 600, seed=1)
    assert len(losses) == 3
    assert losses[-1] < losses[0] < np.log(len(alphabet))
    assert losses[-1] < 3.1  # characters guessed by their frequency cost as much
    text = char_gpt.sample(weights, config, alphabet, "The ", 40, seed=0)
    assert len(text) == 44 and text.startswith("The ")


def test_training_is_repeatable(char_gpt, tiny):
    text = np.random.default_rng(0).integers(ALPHABET, size=200)
    (first, losses), (second, again) = (
        char_gpt.train(tiny, text, text, steps=10, seconds=600, seed=3) for _ in range(2)
    )
    assert losses == again
    for name, weight in first.items():
        np.testing.assert_array_equal(weight, second[name])


def test_training_ends_by_its_time(char_gpt, capsys):
    alphabet, training, held_out = char_gpt.read_text()
    config = char_gpt.Config(len(alphabet), context=8, channels=8, heads=1, layers=1, batch=1)
    char_gpt.train(config, training, held_out[:100], steps=10**9, seconds=0.2, seed=0)
    last = capsys.readouterr().err.rstrip().rpartition("\r")[2]
    steps, of = re.search(r"(\d+)/(\d+) ", last).groups()
    assert last.startswith("100%") and int(steps) == int(of) > 0


def test_the_held_out_text_is_not_trained_on(char_gpt):
    alphabet, training, held_out = char_gpt.read_text()
    training, held_out = ("".join(alphabet[i] for i in part) for part in (training, held_out))
    paragraphs = held_out.split("\n")
    assert len(paragraphs) > 30
    assert not set(paragraphs) & set(training.split("\n"))


def test_the_script_starts(char_gpt, monkeypatch, capsys):
    monkeypatch.setattr(
        "sys.argv", ["train_char_gpt.py", "--steps", "1", "--seconds", "1", "--length", "2"]
    )
    monkeypatch.setattr(char_gpt, "held_out_loss", lambda *_: 0.0)
    char_gpt.main()
    assert "The " in capsys.readouterr().out
