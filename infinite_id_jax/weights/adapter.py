"""Adapters in files: a folder of ours (`adapter_config.json` beside `adapter.safetensors`), or a published file."""

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from infinite_id_jax.errors import InputError
from infinite_id_jax.files import save_json
from infinite_id_jax.identity.config import AdapterConfig, EncoderConfig
from infinite_id_jax.identity.face_id_plus import FaceIDPlusConfig
from infinite_id_jax.identity.inject import IdentityAdapter
from infinite_id_jax.stable_diffusion.config import read_json
from infinite_id_jax.stable_diffusion.unet import UNet2DConditionModel
from infinite_id_jax.weights.export import save_tensors, torch_state
from infinite_id_jax.weights.ip_adapter import recognise
from infinite_id_jax.weights.load import ShardingRule, Tensor, abstract, fill, open_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"


def find_adapter(path: Path) -> Path:
    """The file of weights of an adapter folder, or the file itself. Raises InputError where there is none, or several.

    A folder without our configuration may hold one published file.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        kind = "file" if path.suffix in (".safetensors", ".bin") else "folder"
        raise InputError(
            f"The adapter {kind} {path} does not exist: give a folder with {CONFIG} and {WEIGHTS}, or a published file."
        )
    if (path / CONFIG).is_file() or (path / WEIGHTS).is_file():
        return path / WEIGHTS
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin"))
    if len(files) == 1:
        return files[0]
    found = f"holds {len(files)} files of weights ({', '.join(file.name for file in files)})" if files else "holds none"
    raise InputError(f"The adapter folder {path} has no {CONFIG} and {found}: name one file.")


def read_adapter_config(path: Path) -> EncoderConfig:
    """What the adapter at `path` is. Raises InputError for a missing or damaged file and for anything unknown."""
    with ExitStack() as stack:
        return _read_config(path, None, stack)


def load_adapter(
    path: Path, unet: UNet2DConditionModel, *, dtype: str = "float32", sharding: ShardingRule | None = None
) -> IdentityAdapter:
    """An adapter for `unet`. Raises InputError if a file is damaged or the widths do not fit."""
    file = find_adapter(path)
    with ExitStack() as stack:
        tensors = open_tensors(file, stack)
        config = _read_config(path, tensors, stack)
        adapter = abstract(lambda rngs: IdentityAdapter(config, unet, rngs=rngs))
        return fill(adapter, tensors, name=str(file), dtype=dtype, sharding=sharding)


def _read_config(path: Path, tensors: dict[str, Tensor] | None, stack: ExitStack) -> EncoderConfig:
    """From the folder's JSON file; what that does not say, and a published adapter's whole, from the tensors."""
    file = find_adapter(path)
    values: dict[str, Any] = {"format": "ip_adapter"}
    if path.is_dir() and file.name == WEIGHTS:
        values = read_json(path / CONFIG)
    if values.get("format") == "ip_adapter":
        config = recognise(open_tensors(file, stack) if tensors is None else tensors, file)
        if isinstance(config, FaceIDPlusConfig) and "shortcut_scale" in values:
            return dataclasses.replace(config, shortcut_scale=values["shortcut_scale"])
        return config
    try:
        config = AdapterConfig.from_dict(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if tensors is None:
        return config
    return dataclasses.replace(
        config,
        clip_hidden=_width(tensors, "clip_mapper.proj.0.weight"),
        face_hidden=_width(tensors, "face_mapper.proj.0.weight"),
    )


def _width(tensors: dict[str, Tensor], key: str) -> int | None:
    """Inner widths are read off the file; an absent key is reported with all the others."""
    return tensors[key].shape[0] if key in tensors else None


def save_adapter(adapter: IdentityAdapter, folder: Path) -> None:
    """Write the adapter, weights first, so that a folder with a configuration is whole."""
    write_adapter(adapter.config, torch_state(adapter), folder)


def read_adapter(path: Path) -> tuple[EncoderConfig, dict[str, np.ndarray]]:
    """An adapter as it is in its file: {PyTorch key: array in PyTorch's layout}, every bit. Raises InputError."""
    with ExitStack() as stack:
        tensors = open_tensors(find_adapter(path), stack)
        config = _read_config(path, tensors, stack)
        tensors.verify()
        return config, {key: tensor.read((slice(None),) * len(tensor.shape)) for key, tensor in tensors.items()}


def torch_layout(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays as training keeps them into PyTorch's layout: every matrix of an adapter is a linear map's."""
    return {key: array.T if array.ndim == 2 else array for key, array in arrays.items()}


def write_adapter(config: EncoderConfig, tensors: Mapping[str, np.ndarray], folder: Path) -> None:
    """As `save_adapter`, for tensors in PyTorch's layout."""
    save_tensors(tensors, folder / WEIGHTS)
    save_json(config.to_dict(), folder / CONFIG)
