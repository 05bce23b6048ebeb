"""Eight simulated devices, shapes checked at run time, and tiny random models made by the PyTorch original."""

import json
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# Both must stand before JAX starts.
os.environ["XLA_FLAGS"] = (
    # Tiny models are compiled for longer than they run: optimised code made a run of 20 training steps
    # two thirds slower.
    "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600 "
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120 " + os.environ.get("XLA_FLAGS", "")
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

from jaxtyping import install_import_hook

install_import_hook(["infinite_id_jax", "data_pipeline", "miniature"], "beartype.beartype")

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from configs import debug
from tests import reference_torch

# A job in a shell's background ignores SIGINT, and so would every program that a test starts to interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_numpy_rank_promotion", "raise")
torch.set_num_threads(1)  # tests run side by side: threads that wait for each other made torch 20 times slower


class Tiny(NamedTuple):
    """Random weights in the shape of SDXL: for tests of mechanism only."""

    model: Path
    adapter: Path
    clip_dim: int = 32
    face_dim: int = 16

    def features(self, seed: int) -> dict[str, np.ndarray]:
        """Random features of a "person", as FaceFeatures takes them."""
        rng = np.random.default_rng(seed)
        return {
            "clip_hidden_states": rng.normal(size=(257, self.clip_dim)).astype(np.float32),
            "face_embedding": rng.normal(size=self.face_dim).astype(np.float32),
        }


def write_adapter(
    folder: Path,
    *,
    clip_dim: int,
    face_dim: int,
    face_tokens: int = 1,
    seed: int = 1,
    levels: dict[str, Any] = reference_torch.THREE_LEVELS,
) -> Path:
    """A random adapter folder for the tiny SDXL, written by the PyTorch reference."""
    unet = reference_torch.tiny_sdxl_unet(levels=levels)
    weights = reference_torch.adapter_state_dict(unet, clip_dim, face_dim, face_tokens, seed)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter.safetensors")
    config = {
        "format": "infinite_id",
        "clip_dim": clip_dim,
        "face_dim": face_dim,
        "face_tokens": face_tokens,
        "cross_attention_dim": unet.config.cross_attention_dim,
        "clip_mapper": "mlp",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


write_small_adapter = partial(write_adapter, levels=reference_torch.TWO_LEVELS)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    model = reference_torch.save_tiny_sdxl(folder / "model")
    return Tiny(model, write_adapter(folder / "adapter", clip_dim=32, face_dim=16))


@pytest.fixture(scope="session")
def pipe(tiny: Tiny):
    from infinite_id_jax import InfiniteIDPipeline

    return InfiniteIDPipeline.from_pretrained(tiny.model, tiny.adapter)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """With a U-Net of two levels."""
    folder = tmp_path_factory.mktemp("small")
    model = reference_torch.save_tiny_sdxl(folder / "model", levels=reference_torch.TWO_LEVELS)
    return Tiny(model, write_small_adapter(folder / "adapter", clip_dim=32, face_dim=16))


@pytest.fixture(scope="session")
def small_pipe(small: Tiny):
    from infinite_id_jax import InfiniteIDPipeline

    return InfiniteIDPipeline.from_pretrained(small.model, small.adapter)


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache of compiled programs for all processes of a test run, in place of the user's own."""
    folder = tmp_path_factory.getbasetemp().parent / "compiled"  # that of all workers of this test run
    with pytest.MonkeyPatch.context() as patch:
        # Small programs too: hundreds of them, which each process would compile again.
        for name, value in (("compilation_cache_dir", str(folder)), ("persistent_cache_min_compile_time_secs", 0)):
            patch.setenv(f"JAX_{name.upper()}", str(value))
            jax.config.update(f"jax_{name}", value)
        yield


@pytest.fixture(scope="session")
def debug_inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of train.py that name a tiny model and a dataset of drawn people, made once."""
    config = debug.prepare(tmp_path_factory.mktemp("inputs"), debug.config)
    return [f"--set=model.path={config.model.path}", f"--set=data.path={config.data.path}"]
