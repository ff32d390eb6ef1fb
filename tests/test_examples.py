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


def test_a_second_derivative_of_the_torch_example_is_refused(example):
    torch = pytest.importorskip("torch")
    x = torch.ones(1, 3, 2, 4, requires_grad=True)
    out = example("torch_attention").attention(x, x, x)
    (gradient,) = torch.autograd.grad((out * out).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


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
