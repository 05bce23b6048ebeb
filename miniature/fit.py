"""The one training loop of the miniature's parts: AdamW with a cosine, an average of the weights, going on where it
was."""

import concurrent.futures
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from tqdm import tqdm

from infinite_id_jax.errors import InputError
from infinite_id_jax.files import replacing, save_json
from infinite_id_jax.typing import Array

M = TypeVar("M", bound=nnx.Module)
T = TypeVar("T")
Batch = Mapping[str, np.ndarray]
Loss = Callable[[Any, Mapping[str, Array], Array], tuple[Array, dict[str, Array]]]
"""(module or tree of arrays, batch, key) -> the loss to minimise and the figures to log."""


class Budget(NamedTuple):
    """How long and how fast a part is trained."""

    steps: int
    batch_size: int
    learning_rate: float  # the peak, after a warm-up and before a cosine to 0
    warmup: int = 100
    weight_decay: float = 0.01
    average: float = 0.998  # decay of the mean of the weights, which is what is kept
    clip: float = 1.0


class _State(NamedTuple):
    """All arrays as vectors: optax spends 0.1 s a step on hundreds of small ones on a CPU."""

    weights: Array
    average: Array
    optimizer: Any
    step: Array


def fit_module(
    module: M, loss: Loss, batch_at: Callable[[int], Batch], budget: Budget, folder: Path, *, over: str = ""
) -> M:
    """`fit` of a module's arrays; `loss` gets the module."""
    graph, arrays = nnx.split(module)

    def of_arrays(arrays: Any, *rest: Any) -> tuple[Array, dict[str, Array]]:
        return loss(nnx.merge(graph, arrays), *rest)

    return nnx.merge(graph, fit(arrays, of_arrays, batch_at, budget, folder, over=over))


def fit(
    arrays: T,
    loss: Loss,
    batch_at: Callable[[int], Batch],
    budget: Budget,
    folder: Path,
    *,
    over: str = "",
    log_every: int = 50,
) -> T:
    """Train a tree of arrays on `batch_at(0)`, `batch_at(1)`, ...; the average of its values.

    folder/state.npz holds where it stands, every five minutes; folder/curve.jsonl the figures of `loss`. A finished
    training is not repeated. `over` tells apart what the training stands on, such as frozen encoders. Raises InputError
    where the folder holds a training of another budget, other shapes or over something else.
    """
    vector, unravel = ravel_pytree(arrays)
    _settle(folder / "training.json", {**budget._asdict(), "numbers": vector.size, "over": over})
    optimizer = _optimizer(budget)

    def losses(weights: Array, batch: Mapping[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        return loss(unravel(weights), batch, key)

    @jax.jit
    def advance(state: _State, batch: Mapping[str, Array]) -> tuple[_State, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(0), state.step)
        (value, figures), gradient = jax.value_and_grad(losses, has_aux=True)(state.weights, batch, key)
        updates, moments = optimizer.update(gradient, state.optimizer, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        assert isinstance(weights, jax.Array)
        decay = jnp.minimum(budget.average, (1 + state.step) / (10 + state.step))
        average = decay * state.average + (1 - decay) * weights
        figures = {"loss": value, "gradient": jnp.linalg.norm(gradient), **figures}
        return _State(weights, average, moments, state.step + 1), figures

    state = _restore(_State(vector, vector, optimizer.init(vector), jnp.zeros((), jnp.int32)), folder)
    start, saved, logged = int(state.step), time.monotonic(), []
    folder.mkdir(parents=True, exist_ok=True)
    _forget(folder / "curve.jsonl", start)
    progress = tqdm(total=budget.steps, initial=start, desc=folder.name, mininterval=30)
    began = time.monotonic()
    try:
        for step, batch in _ahead(batch_at, range(start, budget.steps)):
            state, figures = advance(state, batch)
            logged.append(figures)
            progress.update()
            if (step + 1) % log_every == 0 or step + 1 == budget.steps:
                means = {key: float(np.mean([one[key] for one in logged])) for key in figures}
                _log(
                    folder / "curve.jsonl",
                    {"step": step + 1, "began": start, "seconds": time.monotonic() - began, **means},
                )
                progress.set_postfix({key: f"{value:.4g}" for key, value in means.items()}, refresh=False)
                logged = []
            if time.monotonic() - saved > 300:
                _save(state, folder)
                saved = time.monotonic()
    finally:
        progress.close()
        _save(state, folder)
    return unravel(state.average)


def _optimizer(budget: Budget) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(0.0, budget.learning_rate, budget.warmup, budget.steps)
    return optax.chain(
        optax.clip_by_global_norm(budget.clip), optax.adamw(rate, b2=0.99, weight_decay=budget.weight_decay)
    )


def _ahead(batch_at: Callable[[int], Batch], steps: range) -> Iterator[tuple[int, Batch]]:
    """Batches, the next one made while this one is used."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        coming = pool.submit(batch_at, steps[0]) if steps else None
        for step in steps:
            assert coming is not None
            batch = coming.result()
            coming = pool.submit(batch_at, step + 1)
            yield step, batch


def _settle(path: Path, content: dict[str, Any]) -> None:
    known = json.loads(path.read_text()) if path.is_file() else content
    if known != content:
        changed = ", ".join(f"{n} {known.get(n)}, now {v}" for n, v in content.items() if known.get(n) != v)
        raise InputError(f"{path.parent} holds another training ({changed}): delete it, or name another folder.")
    save_json(content, path)


def _restore(state: _State, folder: Path) -> _State:
    path = folder / "state.npz"
    if not path.is_file():
        return state
    with np.load(path) as stored:
        leaves, structure = jax.tree.flatten(state)
        return jax.tree.unflatten(structure, [jnp.asarray(stored[f"arr_{i}"]) for i in range(len(leaves))])


def _save(state: _State, folder: Path) -> None:
    with replacing(folder / "state.npz") as beside, beside.open("wb") as file:
        np.savez(file, *(np.asarray(leaf) for leaf in jax.tree.leaves(state)))


def _log(path: Path, figures: dict[str, int | float]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(figures) + "\n")


def _forget(path: Path, start: int) -> None:
    """Take back what was logged after the step that is gone back to: a killed process had logged more than it saved."""
    if path.is_file():
        known = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
        with replacing(path) as beside:
            beside.write_text("".join(line for line in known if json.loads(line)["step"] <= start))


def rows(seed: int, step: int, count: int, of: int) -> np.ndarray:
    """`count` of the numbers below `of`, drawn for a step alone."""
    return np.random.default_rng((seed, step)).integers(of, size=count)
