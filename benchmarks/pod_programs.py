"""SDXL's training and sampling steps, compiled for machines that are not here. `benchmarks.pods` is the command."""

import dataclasses
import importlib.util
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from infinite_id_jax.errors import InputError

# jax is imported where it is used: the environment must be set before.

# data, fsdp and tensor; -1 is what the others leave.
LAYOUTS = {"data": (-1, 1, 1), "fsdp": (1, -1, 1), "tensor": (-1, 1, 2)}
TEXT_TOKENS = 77
# Little effort compiles sooner.
_OPTIONS = {"tpu": {"exec_time_optimization_effort": -1.0}, "cuda": {}}
# What XLA asks of an H100 SXM (NVIDIA's H100 data sheet and CUDA's occupancy tables for compute capability 9.0).
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Compiled(NamedTuple):
    """A program, the FLOPs of one of its chips, and the seconds its compilation took."""

    program: Any
    flops: float
    seconds: float


def find_compiler(platform: str) -> None:
    """Make a platform's compiler known to JAX without a chip of it. Raises InputError where it is not installed.

    To be called for all platforms before the first use of JAX.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if platform == "tpu":
        os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
        libtpu = _installed("libtpu", "Compiling for TPUs needs their compiler: pip install libtpu.")
        os.environ.setdefault("TPU_LIBRARY_PATH", str(libtpu / "libtpu.so"))
    else:
        missing = "Compiling for GPUs needs their compiler: install the extra cuda."
        _installed("jax_plugins.xla_cuda13", missing)
        cuda = _installed("nvidia", missing) / "cu13"
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        # There is no GPU on which one of several forms of a product could be tried.
        flags = f"--xla_gpu_cuda_data_dir={cuda} --xla_gpu_autotune_level=0"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()


def _installed(package: str, missing: str) -> Path:
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(missing)
    return Path(next(iter(spec.submodule_search_locations)))


def make_mesh(platform: str, topology: str, chips: int, layout: str) -> Any:
    """All chips of a topology, on the project's axes."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh

    from infinite_id_jax.sharding import AXES

    if platform == "tpu":
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    else:
        described = topologies.get_topology_desc(
            platform="cuda", topology_name="cuda", target_config=_H100, topology=topology
        )
    if len(described.devices) != chips:
        raise InputError(f"The topology {topology} has {len(described.devices)} devices, not {chips}.")
    rest = chips // math.prod(size for size in LAYOUTS[layout] if size > 0)
    shape = [rest if size < 0 else size for size in LAYOUTS[layout]]
    devices: list[Any] = list(described.devices)
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def _model(size: str) -> tuple[Any, Any]:
    """The architecture and the adapter of a size of `benchmarks.models`: full is configs/infinite_id_sdxl.py's."""
    from benchmarks.models import FACE_DIM, SIZES
    from configs.infinite_id_sdxl import config

    unet, clip_dim = SIZES[size].settings.unet, SIZES[size].clip_dim
    widths = {"clip_dim": clip_dim, "face_dim": FACE_DIM, "cross_attention_dim": unet.cross_attention_dim}
    return unet, dataclasses.replace(config.adapter, **widths)


def compile_training(platform: str, mesh: Any, size: str, rows: int, resolution: int, remat: str) -> Compiled:
    """The step of `configs/infinite_id_sdxl.py` on `rows` images over all chips."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from configs.infinite_id_sdxl import config
    from infinite_id_jax.training.objective import MethodConfig
    from infinite_id_jax.training.setup import abstract_inputs
    from infinite_id_jax.training.step import train_step

    objective, frozen, state, batch = abstract_inputs(
        *_model(size),
        MethodConfig(identity_drop=config.method.identity_drop, remat=remat),
        config.optimizer,
        mesh,
        rows=rows,
        resolution=resolution,
        sharded=_sharded(mesh),
    )
    places = jax.tree.map(lambda x: x.sharding, state)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    step = partial(train_step, objective, config.optimizer, places.adapter)
    lower = partial(jax.jit(step, donate_argnums=1, out_shardings=(places, None)).lower, frozen, state, batch, key)
    return _compiled(platform, mesh, lower, step, frozen, state, batch, key)


def compile_sampling(platform: str, mesh: Any, size: str, prompts: int, resolution: int) -> Compiled:
    """One guided step of two streams, one identity a prompt, as `InfiniteIDPipeline` takes it."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.sharding import NamedSharding, PartitionSpec

    from infinite_id_jax.diffusion.samplers import trajectory
    from infinite_id_jax.diffusion.schedule import ScheduleConfig
    from infinite_id_jax.identity.config import Switches
    from infinite_id_jax.identity.inject import IdentityAdapter, block_names, inject
    from infinite_id_jax.identity.streams import Layout
    from infinite_id_jax.sampling import Controls, Program, TextCondition, sample_streams
    from infinite_id_jax.sharding import batch_sharding
    from infinite_id_jax.stable_diffusion.config import VAEConfig
    from infinite_id_jax.stable_diffusion.unet import UNet2DConditionModel
    from infinite_id_jax.training.setup import CLIP_TOKENS, base_sharding
    from infinite_id_jax.weights.load import abstract, described

    c, config = _model(size)
    place = {"dtype": "bfloat16", "sharding": base_sharding(mesh, _sharded(mesh))}
    unet = described(abstract(lambda rngs: UNet2DConditionModel(c, rngs=rngs)), **place)
    adapter = described(abstract(lambda rngs: IdentityAdapter(config, unet, rngs=rngs)), **place)
    blocks = len(block_names(unet))
    inject(unet, adapter)
    graph, state = nnx.split(unet)
    whole = NamedSharding(mesh, PartitionSpec())

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    program = Program(
        graph, Switches(), "ddim", "epsilon", Layout(text_rows=prompts, identities=1), batch=batch_sharding(mesh)
    )
    side, number = resolution // VAEConfig().downscale, partial(array, dtype=jnp.float32)
    assert c.projection_class_embeddings_input_dim
    assert c.addition_time_embed_dim
    pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
    inputs = {
        "noise": number(prompts, side, side, c.in_channels),
        "text": TextCondition(array(2, prompts, TEXT_TOKENS, c.cross_attention_dim), array(2, prompts, pooled)),
        "identity": array(2, 1, CLIP_TOKENS + config.face_tokens, c.cross_attention_dim),
        "time_ids": number(6),
        "controls": Controls(number(), number(), number(blocks), number()),
        "trajectory": trajectory("ddim", ScheduleConfig(), 1),
    }
    sample = jax.jit(sample_streams, static_argnums=0, donate_argnames="noise")
    lower = partial(sample.lower, program, state, **inputs)
    return _compiled(platform, mesh, lower, lambda s, i: sample_streams(program, s, **i), state, inputs)


def _sharded(mesh: Any) -> bool:
    return mesh.shape["fsdp"] * mesh.shape["tensor"] > 1


def _compiled(
    platform: str, mesh: Any, lower: Callable[[], Any], function: Callable[..., Any], *arguments: Any
) -> Compiled:
    """FLOPs are those of `function`; chips of the tensor axis divide its products, and each convolves all channels."""
    import jax

    from infinite_id_jax.sharding import compiler_options
    from infinite_id_jax.stable_diffusion.kernels import compiling_for
    from infinite_id_jax.training.flops import count_flops

    total, convolved = count_flops(function, *arguments), count_flops(function, *arguments, convolutions_only=True)
    flops = (total + (mesh.shape["tensor"] - 1) * convolved) / mesh.size
    options = _OPTIONS[platform] | (compiler_options(mesh) or {})
    start = time.perf_counter()
    with compiling_for("gpu" if platform == "cuda" else platform), jax.set_mesh(mesh):
        program = lower().compile(compiler_options=options)
    return Compiled(program, flops, time.perf_counter() - start)
