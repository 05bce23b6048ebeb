"""From a model folder to what a step needs: the frozen arrays in their places, the objective, the first state."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from infinite_id_jax.diffusion.schedule import ScheduleConfig
from infinite_id_jax.errors import InputError
from infinite_id_jax.identity.config import AdapterConfig
from infinite_id_jax.identity.inject import IdentityAdapter, initialise_from_base
from infinite_id_jax.sharding import batch_sharding, parameter_sharding
from infinite_id_jax.stable_diffusion.clip_text import CLIPTextModel
from infinite_id_jax.stable_diffusion.clip_vision import CLIPVisionModel
from infinite_id_jax.stable_diffusion.config import UNetConfig, VAEConfig
from infinite_id_jax.stable_diffusion.unet import UNet2DConditionModel
from infinite_id_jax.training.objective import Frozen, MethodConfig, Objective
from infinite_id_jax.training.state import (
    OptimizerConfig,
    TrainState,
    adapter_arrays,
    adapter_merger,
    initial_state,
    state_sharding,
)
from infinite_id_jax.weights.load import ShardingRule, abstract, described

CLIP_TOKENS = 257  # of an image in ViT-H/14 and ViT-bigG/14 at 224 px


def base_sharding(mesh: Mesh | AbstractMesh, sharded: bool) -> ShardingRule:
    """Where the arrays of the frozen base live: divided by the rule table, or whole on every device."""
    whole = NamedSharding(mesh, PartitionSpec())
    return parameter_sharding(mesh) if sharded else lambda key, shape: whole


def check_rows(rows: int, parts: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises InputError unless each of `parts` parts of a batch has as many rows of every device that divides it."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (devices * parts):
        raise InputError(
            f"data.batch_size {rows} does not divide over {devices} devices with optimizer.accumulate {parts}: give a "
            f"multiple of {devices * parts}."
        )


def make_objective(
    method: MethodConfig,
    adapter: AdapterConfig,
    schedule: ScheduleConfig,
    scaling_factor: float,
    unet: UNet2DConditionModel,
    *,
    vision: CLIPVisionModel | None = None,
    text: tuple[CLIPTextModel, CLIPTextModel] | None = None,
) -> tuple[Objective, Frozen]:
    """Split loaded (or abstract) models into what is compiled in and the arrays. Raises InputError for an adapter of
    another width than the model's.
    """
    graph, state = nnx.split(unet)
    see = None if vision is None else nnx.split(vision)
    read = None if text is None else (nnx.split(text[0]), nnx.split(text[1]))
    objective = Objective(
        method=method,
        schedule=schedule,
        scaling_factor=scaling_factor,
        clip_layer=adapter.clip_layer,
        adapter=adapter_merger(abstract(lambda rngs: IdentityAdapter(adapter, unet, rngs=rngs))),
        unet=graph,
        vision=None if see is None else see[0],
        text=None if read is None else (read[0][0], read[1][0]),
    )
    frozen = Frozen(state, None if see is None else see[1], None if read is None else (read[0][1], read[1][1]))
    return objective, frozen


def state_maker(
    objective: Objective, adapter: AdapterConfig, optimizer: OptimizerConfig, seed: int
) -> Callable[[Frozen], TrainState]:
    """A pure function from the base's arrays to the first state: mappers drawn from `seed`, projections the base's."""

    def make(frozen: Frozen) -> TrainState:
        unet = nnx.merge(objective.unet, frozen.unet)
        module = IdentityAdapter(adapter, unet, rngs=nnx.Rngs(seed))
        initialise_from_base(module, unet)
        arrays = {key: x.astype("float32") for key, x in adapter_arrays(module).items()}
        return initial_state(optimizer, arrays)

    return make


def abstract_state(make: Callable[[Frozen], TrainState], frozen: Frozen, mesh: Mesh | AbstractMesh) -> TrainState:
    """The shapes of the state, each with its place in the mesh."""
    shapes = jax.eval_shape(make, frozen)
    places = state_sharding(shapes, mesh)
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, places)


class AbstractInputs(NamedTuple):
    """What a step is traced from where there are no arrays: shapes with their places in a mesh."""

    objective: Objective
    frozen: Frozen
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]


def abstract_inputs(
    architecture: UNetConfig,
    adapter: AdapterConfig,
    method: MethodConfig,
    optimizer: OptimizerConfig,
    mesh: Mesh | AbstractMesh,
    *,
    rows: int,
    resolution: int,
    dtype: str = "bfloat16",
    sharded: bool = False,
) -> AbstractInputs:
    """A step of identity-enhanced training on `rows` records over all devices, with features computed offline."""
    unet = described(
        abstract(lambda rngs: UNet2DConditionModel(architecture, rngs=rngs)),
        dtype=dtype,
        sharding=base_sharding(mesh, sharded),
    )
    objective, frozen = make_objective(method, adapter, ScheduleConfig(), VAEConfig().scaling_factor, unet)
    state = abstract_state(state_maker(objective, adapter, optimizer, seed=0), frozen, mesh)

    def array(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), np.dtype(dtype), sharding=batch_sharding(mesh))

    side = resolution // VAEConfig().downscale
    batch = {
        "latent_mean": array((side, side, architecture.in_channels), "bfloat16"),
        "latent_std": array((side, side, architecture.in_channels), "bfloat16"),
        "time_ids": array((6,), "float32"),
        "face_embedding": array((adapter.face_dim,), "float32"),
        "clip_hidden_states": array((CLIP_TOKENS, adapter.clip_dim), "bfloat16"),
    }
    return AbstractInputs(objective, frozen, state, batch)
