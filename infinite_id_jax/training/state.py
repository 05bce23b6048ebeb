"""What training changes: the adapter's arrays, their average, the optimiser's moments, a counter."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from infinite_id_jax.errors import InputError
from infinite_id_jax.identity.inject import AdapterParam, IdentityAdapter
from infinite_id_jax.sharding import parameter_sharding
from infinite_id_jax.weights.keys import key_map

Arrays = dict[str, Any]
"""The adapter as {PyTorch key: array in our layout}, or the arrays' shapes or places."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (decision 24) and what stands around it.

    Raises InputError for a value out of range.
    """

    learning_rate: float = 1e-4  # constant after the warm-up
    warmup_steps: int = 0  # linear from 0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float | None = None  # clip the global norm of the gradient
    ema_decay: float | None = None  # keep an exponential moving average, which the final adapter then is
    accumulate: int = 1  # divide each batch into so many parts, one after the other

    def __post_init__(self) -> None:
        positive = min(self.learning_rate, self.eps) > 0
        if not positive or self.warmup_steps < 0 or self.weight_decay < 0 or self.accumulate < 1:
            raise InputError(
                "optimizer: learning_rate and eps must be positive, warmup_steps and weight_decay not negative, "
                "and accumulate 1 or more."
            )
        for name in ("beta1", "beta2", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise InputError(f"optimizer.{name} is {value}: give a number from 0 to below 1.")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise InputError(f"optimizer.max_grad_norm is {self.max_grad_norm}: give a positive number, or None.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a checkpoint holds beside a few numbers of the run: arrays, or their shapes or places."""

    step: Any  # int32, steps taken
    adapter: Arrays  # fp32, whatever the dtype of the base
    ema: Any  # Arrays, or None
    optimizer: Any
    failed_at: Any  # int32, the first step whose loss or gradient was not finite, -1 while there is none

    @property
    def result(self) -> Arrays:
        """What the run would leave if it ended here: the average where one is kept."""
        return self.adapter if self.ema is None else self.ema


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW with a constant rate after a linear warm-up, behind the clipping of the gradient."""
    rate = config.learning_rate
    schedule = optax.linear_schedule(rate / (config.warmup_steps + 1), rate, config.warmup_steps)
    adamw = optax.adamw(
        schedule if config.warmup_steps else rate,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    return (
        adamw if config.max_grad_norm is None else optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)
    )


def initial_state(config: OptimizerConfig, adapter: Arrays) -> TrainState:
    """The state before the first step; traceable, so that it can be made in place on many devices."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        adapter=adapter,
        ema=None if config.ema_decay is None else jax.tree.map(jnp.copy, adapter),
        optimizer=make_optimizer(config).init(adapter),
        failed_at=jnp.full((), -1, jnp.int32),
    )


def state_sharding(state: TrainState, mesh: Mesh | AbstractMesh) -> TrainState:
    """Where each array of an (abstract) state lives: moments and average as the arrays they belong to."""
    rule, whole = parameter_sharding(mesh), NamedSharding(mesh, PartitionSpec())

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
        return rule(names[-1], leaf.shape) if names else whole

    return jax.tree_util.tree_map_with_path(place, state)


def adapter_arrays(adapter: IdentityAdapter) -> Arrays:
    """{PyTorch key: array in our layout}, by which rules and checkpoints name them."""
    flat = dict(nnx.to_flat_state(nnx.state(adapter, AdapterParam)))
    return {entry.key: flat[path][...] for path, entry in key_map(adapter).items()}


def adapter_merger(adapter: IdentityAdapter) -> Callable[[Mapping[str, Any]], IdentityAdapter]:
    """The inverse of `adapter_arrays`, for an adapter of the same (perhaps abstract) structure."""
    graph, _ = nnx.split(adapter)
    paths = {entry.key: path for path, entry in key_map(adapter).items()}

    def merge(arrays: Mapping[str, Any]) -> IdentityAdapter:
        leaves = [(path, AdapterParam(arrays[key])) for key, path in paths.items()]
        return nnx.merge(graph, nnx.from_flat_state(leaves))

    return merge
