"""What a step costs before anything is allocated: parameters, bytes on each device, floating-point operations."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from infinite_id_jax.training.flops import count_flops, unet_flops
from infinite_id_jax.training.objective import Draw, Frozen, Objective, draw, row_losses
from infinite_id_jax.training.state import Arrays, TrainState
from infinite_id_jax.typing import Array


class Budget(NamedTuple):
    """Of one step over all devices, bytes on each of them."""

    base_parameters: int
    adapter_parameters: int
    step_flops: float  # the U-Net's, counted at two forwards
    all_flops: float  # of every product, forward and backward, the adapter's too, nothing computed twice
    bytes_each: dict[str, int]

    @property
    def text(self) -> str:
        """A table for people."""
        rows = [
            ("base parameters", f"{self.base_parameters:,}"),
            ("adapter parameters", f"{self.adapter_parameters:,}"),
            ("a step, as two forwards of the U-Net", f"{self.step_flops / 1e12:,.2f} TFLOP"),
            ("a step, every product counted", f"{self.all_flops / 1e12:,.2f} TFLOP"),
            *((f"{name}, each device", f"{size / 2**30:,.3f} GiB") for name, size in self.bytes_each.items()),
            ("sum, each device", f"{sum(self.bytes_each.values()) / 2**30:,.3f} GiB"),
        ]
        return "\n".join(f"{name:<62}{value:>18}" for name, value in rows)


def make_budget(
    objective: Objective,
    frozen: Frozen,
    state: TrainState,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    mesh: AbstractMesh,
    parts: int,
) -> Budget:
    """Count from abstract arrays; `frozen`, `state` and `batch` carry their shardings, `parts` is the accumulation."""
    plain = dataclasses.replace(objective, method=dataclasses.replace(objective.method, remat="none"))
    drawn = jax.eval_shape(lambda key, rows: draw(objective, key, rows), jax.random.key(0), batch)

    def loss(objective: Objective, arrays: Arrays, frozen: Frozen, batch: Any, drawn: Draw) -> Array:
        return jnp.mean(row_losses(objective, arrays, frozen, batch, drawn).error)

    inputs = (state.adapter, frozen, batch, drawn)
    shape = batch["latent_mean"].shape[:3]
    rows = math.prod(mesh.shape[axis] for axis in ("data", "fsdp"))
    return Budget(
        base_parameters=sum(x.size for x in jax.tree.leaves(frozen.unet)),
        adapter_parameters=sum(x.size for x in jax.tree.leaves(state.adapter)),
        step_flops=2 * unet_flops(objective.unet, frozen.unet, *shape),
        all_flops=count_flops(lambda arrays, *xs: jax.grad(lambda a: loss(plain, a, *xs))(arrays), *inputs),
        bytes_each={
            "frozen models": _bytes(frozen),
            "adapter (fp32)": _bytes(state.adapter),
            "gradient (fp32)": _bytes(state.adapter),
            "optimiser": _bytes(state.optimizer),
            "average": _bytes(state.ema),
            "batch": _bytes(batch),
            f"kept for the backward pass (remat {objective.method.remat})": _residuals(objective, loss, inputs)
            // rows
            // parts,
        },
    )


def _bytes(tree: Any) -> int:
    """Of one device's share."""
    return sum(
        math.prod(x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _residuals(objective: Objective, loss: Any, inputs: tuple[Any, ...]) -> int:
    """Bytes that live from the forward to the backward pass, inputs not counted again."""

    def keep(arrays: Arrays, *rest: Any) -> Any:
        return jax.vjp(lambda a: loss(objective, a, *rest), arrays)[1]

    jaxpr = jax.make_jaxpr(keep)(*inputs).jaxpr
    given = {id(v) for v in [*jaxpr.invars, *jaxpr.constvars]}
    kept = {id(v): v.aval for v in jaxpr.outvars if hasattr(v, "aval") and id(v) not in given}
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in kept.values())
