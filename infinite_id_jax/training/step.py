"""One step of training, and the loss on held-out people, as pure functions of arrays."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jax import lax

from infinite_id_jax.training.objective import Batch, Draw, Frozen, Objective, draw, row_losses
from infinite_id_jax.training.state import Arrays, OptimizerConfig, TrainState, make_optimizer
from infinite_id_jax.typing import Array, Bool, Float, Int

R = TypeVar("R")

BINS = 10
"""Timesteps are reported in so many equal parts, the least noisy first."""


class Metrics(NamedTuple):
    """Of one step. Sums over bins, so that they add up over steps; the error counts without its min-SNR weight."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    error_by_bin: Float[Array, " bins"]
    rows_by_bin: Float[Array, " bins"]
    failed_at: Array


def train_step(
    objective: Objective,
    optimizer: OptimizerConfig,
    sharding: Mapping[str, jax.sharding.Sharding] | None,
    frozen: Frozen,
    state: TrainState,
    batch: Batch,
    key: Array,
) -> tuple[TrainState, Metrics]:
    """Draw noise for step `state.step` of the run that `key` seeds, and move the adapter down the gradient.

    `sharding` says where each adapter array and its gradient live. Once a loss or gradient is not finite, nothing
    changes any more but `failed_at`: the host may look late and still finds the last good state.
    """
    drawn = draw(objective, jax.random.fold_in(key, state.step), batch)
    parts = optimizer.accumulate
    gradient, metrics = _gradient(objective, state.adapter, frozen, _parts(batch, parts), _parts(drawn, parts))
    if sharding is not None:  # the sum over devices may then stop at each one's share: a reduce-scatter
        gradient = {name: lax.with_sharding_constraint(x, sharding[name]) for name, x in gradient.items()}
    norm = optax.tree.norm(gradient)
    updates, moments = make_optimizer(optimizer).update(gradient, state.optimizer, state.adapter)
    adapter: Any = optax.apply_updates(state.adapter, updates)
    decay = optimizer.ema_decay
    ema = None if decay is None else jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state.ema, adapter)

    finite = jnp.isfinite(metrics.loss) & jnp.isfinite(norm)
    failed_at = jnp.where((state.failed_at < 0) & ~finite, state.step, state.failed_at)
    new = TrainState(state.step + 1, adapter, ema, moments, failed_at)
    old = TrainState(state.step, state.adapter, state.ema, state.optimizer, failed_at)
    kept = jax.tree.map(lambda a, b: jnp.where(failed_at < 0, a, b), new, old)
    return kept, metrics._replace(grad_norm=norm, failed_at=failed_at)


def _gradient(
    objective: Objective, arrays: Arrays, frozen: Frozen, batch: Batch, drawn: Draw
) -> tuple[Arrays, Metrics]:
    """Mean over all rows of [parts, rows, ...], one part after the other."""

    def loss(arrays: Arrays, batch: Batch, drawn: Draw) -> tuple[Array, Metrics]:
        rows = row_losses(objective, arrays, frozen, batch, drawn)
        mean = jnp.mean(rows.weight * rows.error)
        bins = jax.nn.one_hot(rows.t * BINS // objective.schedule.num_train_timesteps, BINS)
        return mean, Metrics(mean, jnp.zeros(()), rows.error @ bins, bins.sum(axis=0), jnp.zeros((), jnp.int32))

    def part(total: tuple[Arrays, Metrics], rows: tuple[Batch, Draw]) -> tuple[tuple[Arrays, Metrics], None]:
        gradient, metrics = jax.grad(loss, has_aux=True)(arrays, *rows)
        return jax.tree.map(jnp.add, total, (gradient, metrics)), None

    parts = drawn.t.shape[0]
    rows = jax.tree.map(lambda x: x[0], (batch, drawn))
    if parts == 1:
        return jax.grad(loss, has_aux=True)(arrays, *rows)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(jax.grad(loss, has_aux=True), arrays, *rows))
    (gradient, metrics), _ = lax.scan(part, zeros, (batch, drawn))
    mean = metrics._replace(loss=metrics.loss / parts)
    return jax.tree.map(lambda x: x / parts, gradient), mean


def _parts(rows: R, parts: int) -> R:
    """[B, ...] -> [parts, B / parts, ...], each part with rows of every device."""
    return jax.tree.map(lambda x: rearrange(x, "(B parts) ... -> parts B ...", parts=parts), rows)


class Held(NamedTuple):
    """Mean error over held-out rows: with the right identity, with another person's, and with none."""

    right: Float[Array, ""]
    other: Float[Array, ""]
    none: Float[Array, ""]


def validation_step(objective: Objective, arrays: Arrays, frozen: Frozen, batch: Batch, key: Array) -> Held:
    """The unweighted error on noise that `key` fixes; "other" gives each row the identity of the next one of another
    `person` [B], and is not a number where the batch has none.
    """
    drawn = draw(objective, key, batch)
    identity = [name for name in ("clip_hidden_states", "clip_crop", "face_embedding") if name in batch]
    following, there = _next_other(batch["person"])
    other = {name: jnp.take(x, following, axis=0) if name in identity else x for name, x in batch.items()}
    everyone, nobody = jnp.ones_like(drawn.keep), jnp.zeros_like(drawn.keep)
    cases = ((batch, everyone), (other, everyone), (batch, nobody))
    means = [
        row_losses(objective, arrays, frozen, rows, drawn._replace(keep=keep)).error.mean() for rows, keep in cases
    ]
    return Held(means[0], jnp.where(there, means[1], jnp.nan), means[2])


def _next_other(person: Int[Array, " B"]) -> tuple[Int[Array, " B"], Bool[Array, ""]]:
    """For each row the next one, going around, of another person; and whether there is any."""
    rows = jnp.arange(len(person))
    ahead = (rows[:, None] + 1 + rows[None, :]) % len(person)
    others = person[ahead] != person[:, None]
    return ahead[rows, jnp.argmax(others, axis=1)], others.any()
