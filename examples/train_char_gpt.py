"""A small GPT, in plain arrays, learns to write like the Python manual.

    python examples/train_char_gpt.py

It reads `pydoc_data.topics`, the English text behind Python's help(), and learns to foretell each
next character. The same source runs on NumPy and, where a GPU serves, on CuPy.

No framework differentiates. Each layer is a function that returns its result and a pullback, as
`cuflash.attention_vjp` does: the pullback takes the gradient of the loss with respect to the result
and gives those with respect to the inputs. Backward calls the pullbacks in reverse.

Letters: B sequences of T characters, N = B T; C channels, H heads of size D = C / H; V characters
in the alphabet. Activations are (N, C), weights (in, out).
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pydoc_data.topics import topics
from typing import Any

import ml_dtypes
import numpy as np
from array_library import array_library
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import cuflash

Array = Any  # of NumPy or CuPy
Weights = dict[str, Array]
Pullback = Callable[[Array], Any]

xp = array_library()
# The cores share out the sequences: two threads in one small product would wait for each other.
one_blas_thread = threadpool_limits.wrap(limits=1, user_api="blas")

EPSILON = 1e-6  # keeps divisors away from 0
ROTARY_BASE = 10_000.0
ADAM_MEMORY, ADAM_SQUARE_MEMORY, WEIGHT_DECAY = 0.9, 0.98, 0.1
WARM_UP_STEPS = 30
REPORTS = 8  # of the held-out loss
HELD_OUT = 20  # one paragraph of so many is held out
SHORTEST_PROSE, WORDS_IN_PROSE = 80, 0.85  # characters; the share of letters and spaces in them
TEMPERATURE = 0.7  # of sampling; below 1 it keeps to what is likely


@dataclass(frozen=True)
class Config:
    """The sizes of the model and of its training."""

    alphabet: int  # V
    context: int = 128  # T
    channels: int = 128  # C
    heads: int = 4  # H
    layers: int = 3
    batch: int = 4  # B
    rate: float = 4e-3  # of learning, at its peak


# --- Layers: each returns its result and its pullback.


def linear(x: Array, weight: Array) -> tuple[Array, Pullback]:
    """x (N, in) @ weight (in, out). The pullback gives dx and dweight."""
    return x @ weight, lambda dy: (dy @ weight.T, x.T @ dy)


def rms_norm(x: Array) -> tuple[Array, Pullback]:
    """Each row over the root of its mean square."""
    inverse = 1 / xp.sqrt((x * x).mean(axis=1, keepdims=True) + EPSILON)
    y = x * inverse
    return y, lambda dy: inverse * (dy - y * (dy * y).mean(axis=1, keepdims=True))


def attention(x: Array, qkv: Array, project: Array, turns: Array) -> tuple[Array, Pullback]:
    """Each character gathers from those before it and itself. dx, dqkv and dproject."""
    length, heads, half = turns.shape
    projected, pull_qkv = linear(x, qkv)
    split = projected.reshape(-1, length, 3, heads, 2 * half)
    rotate(split, turns)
    q, k, v = (to_kernel(split[:, :, i]) for i in range(3))  # on NumPy not copied
    mixed, pull_attention = cuflash.attention_vjp(q, k, v, causal=True)
    y, pull_project = linear(mixed.reshape(x.shape).astype(x.dtype, copy=False), project)

    def pullback(dy: Array) -> tuple[Array, Array, Array]:
        dmixed, dproject = pull_project(dy)
        dq, dk, dv, *_ = pull_attention(to_kernel(dmixed.reshape(mixed.shape)))
        dsplit = xp.stack([g.astype(x.dtype, copy=False) for g in (dq, dk, dv)], axis=2)
        rotate(dsplit, turns.conj())
        return *pull_qkv(dsplit.reshape(projected.shape)), dproject

    return y, pullback


def mlp(x: Array, up: Array, down: Array) -> tuple[Array, Pullback]:
    """max(x @ up, 0)² @ down. dx, dup and ddown."""
    hidden, pull_up = linear(x, up)
    positive = xp.maximum(hidden, 0)
    y, pull_down = linear(positive * positive, down)

    def pullback(dy: Array) -> tuple[Array, Array, Array]:
        dsquare, ddown = pull_down(dy)
        return *pull_up(2 * positive * dsquare), ddown

    return y, pullback


def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    """The mean of -log softmax(logits)[target], in nats, and its gradient."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probs = shifted - xp.log(xp.exp(shifted).sum(axis=1, keepdims=True))
    target = xp.eye(logits.shape[1], dtype=logits.dtype)[targets]
    return -(log_probs * target).sum(axis=1).mean(), (xp.exp(log_probs) - target) / len(targets)


def rotate(qkv: Array, turns: Array) -> None:
    """Pair the channels of q and k in (B, T, 3, H, D) to complex numbers; times turns (T, H, D/2).

    Queries and keys turned by their positions meet at the difference of the positions.
    """
    pairs = qkv.view(turns.dtype)
    pairs[:, :, :2] *= turns[:, None]


def to_kernel(x: Array) -> Array:
    """GPU kernels take 16-bit numbers; bfloat16 has float32's range, which small gradients need."""
    return x if xp is np else x.astype(ml_dtypes.bfloat16)


# --- The model and its optimizer.


def initial_weights(config: Config, rng: np.random.Generator, dtype: Any = np.float32) -> Weights:
    """Normal; what a layer adds to its input starts at zero, and so do the logits."""
    c, weights = config.channels, {}
    shapes = {"embedding": (config.alphabet, c), "head": (c, config.alphabet)}
    for i in range(config.layers):
        shapes |= {f"qkv{i}": (c, 3 * c), f"project{i}": (c, c)}
        shapes |= {f"up{i}": (c, 4 * c), f"down{i}": (4 * c, c)}
    for name, shape in shapes.items():
        size = 1 if name == "embedding" else shape[0] ** -0.5
        size *= not name.startswith(("project", "down", "head"))
        weights[name] = xp.asarray(size * rng.standard_normal(shape), dtype)
    return weights


def gpt(weights: Weights, config: Config, characters: Array) -> tuple[Array, Pullback]:
    """The logits (N, V) of what follows each of characters (B, T). All weights' gradients."""
    dtype = weights["embedding"].dtype
    half = config.channels // config.heads // 2
    frequencies = xp.tile(ROTARY_BASE ** -(xp.arange(half) / half), (config.heads, 1))
    angles = xp.arange(characters.shape[1])[:, None, None] * frequencies
    turns = xp.exp(1j * angles).astype(np.result_type(dtype, np.complex64))
    branches = (
        (partial(attention, turns=turns), ("qkv", "project")),
        (mlp, ("up", "down")),
    )

    one_hot = xp.eye(config.alphabet, dtype=dtype)[characters.ravel()]
    x, pull_embedding = linear(one_hot, weights["embedding"])
    pullbacks = []
    for i in range(config.layers):
        for branch, kinds in branches:
            names = [f"{kind}{i}" for kind in kinds]
            normal, pull_norm = rms_norm(x)
            y, pull_branch = branch(normal, *(weights[name] for name in names))
            x = x + y
            pullbacks.append((pull_norm, pull_branch, names))
    normal, pull_last_norm = rms_norm(x)
    logits, pull_head = linear(normal, weights["head"])

    def pullback(dlogits: Array) -> Weights:
        gradients = {}
        dnormal, gradients["head"] = pull_head(dlogits)
        dx = pull_last_norm(dnormal)
        for pull_norm, pull_branch, names in reversed(pullbacks):
            dnormal, *dweights = pull_branch(dx)
            dx = dx + pull_norm(dnormal)
            gradients |= dict(zip(names, dweights, strict=True))
        _, gradients["embedding"] = pull_embedding(dx)
        return gradients

    return logits, pullback


class AdamW:
    """Steps by the mean gradient over the root of its mean square; weights decay."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.steps = weights, 0
        self.means = {name: xp.zeros_like(weight) for name, weight in weights.items()}
        self.squares = {name: xp.zeros_like(weight) for name, weight in weights.items()}

    def step(self, gradients: Weights, rate: float) -> None:
        self.steps += 1
        for name, gradient in gradients.items():
            weight, mean, square = self.weights[name], self.means[name], self.squares[name]
            mean += (1 - ADAM_MEMORY) * (gradient - mean)
            square += (1 - ADAM_SQUARE_MEMORY) * (gradient * gradient - square)
            # Both means started at zero.
            step = mean / (1 - ADAM_MEMORY**self.steps)
            step /= xp.sqrt(square / (1 - ADAM_SQUARE_MEMORY**self.steps)) + EPSILON
            weight -= rate * (step + WEIGHT_DECAY * weight)


# --- The text, training on it, and writing more of it.


def read_text() -> tuple[str, np.ndarray, np.ndarray]:
    """The alphabet; the text to train on and the text held out, as indices into the alphabet."""
    # Topics quote each other: a paragraph that is held out must not be trained on elsewhere.
    paragraphs = "\n\n".join(topics.values()).split("\n\n")
    prose = list(dict.fromkeys(filter(is_prose, (" ".join(p.split()) for p in paragraphs))))
    held_out = "\n".join(prose[::HELD_OUT])
    del prose[::HELD_OUT]
    training = "\n".join(prose)
    alphabet = "".join(sorted({*training, *held_out}))
    index = {character: i for i, character in enumerate(alphabet)}
    return alphabet, *(np.array([index[c] for c in text]) for text in (training, held_out))


def is_prose(paragraph: str) -> bool:
    """No heading, table or listing."""
    words = sum(c.isalpha() or c.isspace() for c in paragraph)
    return len(paragraph) >= SHORTEST_PROSE and words >= WORDS_IN_PROSE * len(paragraph)


def loss_and_gradients(weights: Weights, config: Config, text: Array) -> tuple[Array, Weights]:
    """Of foretelling each character of text (B, T + 1) but the first."""
    logits, pullback = gpt(weights, config, text[:, :-1])
    loss, dlogits = cross_entropy(logits, text[:, 1:].ravel())
    return loss, pullback(dlogits)


def held_out_loss(weights: Weights, config: Config, text: np.ndarray, pool: Executor) -> float:
    """The mean loss over the whole windows of the text."""
    rows = (len(text) - 1) // config.context
    inputs, targets = (text[i : i + rows * config.context].reshape(rows, -1) for i in (0, 1))

    def sum_of_part(start: int) -> float:
        part = slice(start, start + config.batch)
        logits, _ = gpt(weights, config, xp.asarray(inputs[part]))
        loss, _ = cross_entropy(logits, xp.asarray(targets[part].ravel()))
        return float(loss) * len(targets[part])

    return sum(pool.map(sum_of_part, range(0, rows, config.batch))) / rows


@one_blas_thread
def train(
    config: Config,
    training: np.ndarray,
    held_out: np.ndarray,
    steps: int,
    seconds: float,
    seed: int,
) -> tuple[Weights, list[float]]:
    """The weights after `steps`, or `seconds` if they are over first, and held-out losses."""
    rng = np.random.default_rng(seed)
    weights = initial_weights(config, rng)
    optimizer, losses = AdamW(weights), []
    # Each core takes an equal part of the batch; a GPU takes all of it.
    workers = math.gcd(config.batch, os.cpu_count() or 1) if xp is np else 1
    start, progress = time.perf_counter(), 0.0
    with ThreadPoolExecutor(workers) as pool, tqdm(total=steps, unit="step") as bar:
        while progress < 1:
            first = rng.integers(
                len(training) - config.context, size=(workers, config.batch // workers, 1)
            )
            parts = xp.asarray(training[first + np.arange(config.context + 1)])
            results = pool.map(partial(loss_and_gradients, weights, config), parts)
            part_losses, part_gradients = zip(*results, strict=True)
            gradients = {n: sum(g[n] for g in part_gradients) / workers for n in weights}
            warmth = min(1, (bar.n + 1) / WARM_UP_STEPS)
            optimizer.step(gradients, config.rate * warmth * (1 - progress))
            bar.update()
            progress = max(bar.n / steps, (time.perf_counter() - start) / seconds)
            if progress * REPORTS >= len(losses) + 1:
                loss = float(sum(part_losses)) / workers
                losses.append(held_out_loss(weights, config, held_out, pool))
                bar.write(f"step {bar.n:4}  trained {loss:.3f}  held out {losses[-1]:.3f}")
        bar.total = bar.n  # where the time was over before the steps, the bar ends full too
    return weights, losses


@one_blas_thread
def sample(
    weights: Weights, config: Config, alphabet: str, prompt: str, length: int, seed: int
) -> str:
    """The prompt and `length` characters that the model puts after it."""
    rng = np.random.default_rng(seed)
    text = [alphabet.index(character) for character in prompt]
    for _ in range(length):
        logits, _ = gpt(weights, config, xp.asarray(text[-config.context :])[None])
        # The largest sum of a logit and Gumbel noise is a draw from the softmax.
        noise = xp.asarray(rng.gumbel(size=len(alphabet)))
        text.append(int((logits[-1] / TEMPERATURE + noise).argmax()))
    return "".join(alphabet[i] for i in text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=75, help="training ends by then")
    parser.add_argument("--length", type=int, default=400, help="characters to write at the end")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    alphabet, training, held_out = read_text()
    config = Config(len(alphabet))
    weights, _ = train(config, training, held_out, options.steps, options.seconds, options.seed)
    print(sample(weights, config, alphabet, "The ", options.length, options.seed))


if __name__ == "__main__":
    main()
