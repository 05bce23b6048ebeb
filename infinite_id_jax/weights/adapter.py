"""Adapter folders: `adapter_config.json` beside `adapter.safetensors`."""

import dataclasses
from contextlib import ExitStack
from pathlib import Path

from infinite_id_jax.errors import InputError
from infinite_id_jax.files import save_json
from infinite_id_jax.identity.config import AdapterConfig
from infinite_id_jax.identity.inject import IdentityAdapter
from infinite_id_jax.stable_diffusion.config import read_json
from infinite_id_jax.stable_diffusion.unet import UNet2DConditionModel
from infinite_id_jax.weights.export import save_weights
from infinite_id_jax.weights.load import ShardingRule, Tensor, abstract, fill, open_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Raises InputError if the folder is missing, or no adapter folder of ours."""
    if not folder.is_dir():
        raise InputError(f"The adapter folder {folder} does not exist: it holds {CONFIG} and {WEIGHTS}.")
    try:
        return AdapterConfig.from_dict(read_json(folder / CONFIG))
    except InputError as error:
        raise error if str(folder) in str(error) else InputError(f"{folder}: {error}") from None


def load_adapter(
    folder: Path, unet: UNet2DConditionModel, *, dtype: str = "float32", sharding: ShardingRule | None = None
) -> IdentityAdapter:
    """An adapter for `unet`. Raises InputError if a file is damaged or the widths do not fit."""
    config = read_adapter_config(folder)
    with ExitStack() as stack:
        tensors = open_tensors(folder / WEIGHTS, stack)
        config = dataclasses.replace(
            config,
            clip_hidden=_width(tensors, "clip_mapper.proj.0.weight"),
            face_hidden=_width(tensors, "face_mapper.proj.0.weight"),
        )
        adapter = abstract(lambda rngs: IdentityAdapter(config, unet, rngs=rngs))
        return fill(adapter, tensors, name=str(folder / WEIGHTS), dtype=dtype, sharding=sharding)


def _width(tensors: dict[str, Tensor], key: str) -> int | None:
    """Inner widths are read off the file; an absent key is reported with all the others."""
    return tensors[key].shape[0] if key in tensors else None


def save_adapter(adapter: IdentityAdapter, folder: Path) -> None:
    """Write the adapter, weights first, so that a folder with a configuration is whole."""
    save_weights(adapter, folder / WEIGHTS)
    save_json(adapter.config.to_dict(), folder / CONFIG)
