"""From a model folder to what a step needs: the frozen arrays in their places, the objective, the first state."""

from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from infinite_id_jax.diffusion.schedule import ScheduleConfig
from infinite_id_jax.identity.config import AdapterConfig
from infinite_id_jax.identity.inject import IdentityAdapter, initialise_from_base
from infinite_id_jax.sharding import parameter_sharding
from infinite_id_jax.stable_diffusion.clip_text import CLIPTextModel
from infinite_id_jax.stable_diffusion.clip_vision import CLIPVisionModel
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
from infinite_id_jax.weights.load import ShardingRule, abstract


def base_sharding(mesh: Mesh | AbstractMesh, sharded: bool) -> ShardingRule:
    """Where the arrays of the frozen base live: divided by the rule table, or whole on every device."""
    whole = NamedSharding(mesh, PartitionSpec())
    return parameter_sharding(mesh) if sharded else lambda key, shape: whole


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
