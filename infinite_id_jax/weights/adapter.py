"""Adapters in files: a folder of ours (`adapter_config.json` beside `adapter.safetensors`), or a published file."""

import dataclasses
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from infinite_id_jax.errors import InputError
from infinite_id_jax.files import save_json
from infinite_id_jax.identity.config import AdapterConfig, EncoderConfig
from infinite_id_jax.identity.face_id_plus import FaceIDPlusConfig
from infinite_id_jax.identity.inject import IdentityAdapter, make_encoder
from infinite_id_jax.identity.published import PublishedConfig
from infinite_id_jax.stable_diffusion.config import BASES, read_json
from infinite_id_jax.stable_diffusion.unet import UNet2DConditionModel
from infinite_id_jax.weights.export import save_tensors, torch_state
from infinite_id_jax.weights.ip_adapter import recognise
from infinite_id_jax.weights.keys import key_map
from infinite_id_jax.weights.load import ShardingRule, Tensor, Tensors, abstract, check_keys, fill, open_tensors
from infinite_id_jax.weights.pickles import SUFFIXES as PICKLES
from infinite_id_jax.weights.settings import SDXL

CONFIG, WEIGHTS = "adapter_config.json", "adapter.safetensors"
FILES = (".safetensors", *PICKLES)


def find_adapter(path: Path) -> Path:
    """The file of weights of an adapter folder, or the file itself. Raises InputError where there is none, or several.

    A folder without our configuration may hold one published file.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        kind = "file" if path.suffix in FILES else "folder"
        raise InputError(
            f"The adapter {kind} {path} does not exist: give a folder with {CONFIG} and {WEIGHTS}, or a published file."
        )
    if (path / CONFIG).is_file() or (path / WEIGHTS).is_file():
        return path / WEIGHTS
    files = sorted(file for file in path.iterdir() if file.suffix in FILES)
    if len(files) == 1:
        return files[0]
    found = f"holds {len(files)} files of weights ({', '.join(file.name for file in files)})" if files else "holds none"
    raise InputError(f"The adapter folder {path} has no {CONFIG} and {found}: name one file.")


def read_adapter_config(path: Path) -> EncoderConfig:
    """What the adapter at `path` is. Raises InputError for a missing or damaged file and for anything unknown."""
    with ExitStack() as stack:
        return _read_config(path, None, stack)


def check_adapter(path: Path, unet: UNet2DConditionModel) -> EncoderConfig:
    """What the adapter is, its keys and shapes held against `unet`, which may be abstract; reads headers alone.

    Raises InputError as `load_adapter` does, but for what only the numbers tell.
    """
    with ExitStack() as stack:
        return _opened(path, unet, stack)[0].config


def load_adapter(
    path: Path, unet: UNet2DConditionModel, *, dtype: str = "float32", sharding: ShardingRule | None = None
) -> IdentityAdapter:
    """An adapter for `unet`. Raises InputError if a file is damaged or keys or shapes do not fit."""
    with ExitStack() as stack:
        adapter, tensors = _opened(path, unet, stack)
        return fill(adapter, tensors, name=str(find_adapter(path)), dtype=dtype, sharding=sharding)


def _opened(path: Path, unet: UNet2DConditionModel, stack: ExitStack) -> tuple[IdentityAdapter, Tensors]:
    """The adapter without its numbers, and where they are."""
    file = find_adapter(path)
    tensors = open_tensors(file, stack)
    config = _read_config(path, tensors, stack)
    adapter = abstract(lambda rngs: IdentityAdapter(config, unet, rngs=rngs))
    check_keys(_shapes(adapter), tensors, str(file))
    return adapter, tensors


def _shapes(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    return {entry.key: entry.shape for entry in key_map(module).values()}


def _read_config(path: Path, tensors: dict[str, Tensor] | None, stack: ExitStack) -> EncoderConfig:
    """From the folder's JSON file; what that does not say, and a published adapter's whole, from the tensors."""
    file = find_adapter(path)
    values, said = {"format": "ip_adapter"}, file.with_name(CONFIG)
    if file.name == WEIGHTS and (path.is_dir() or said.is_file()):  # a folder's file is no less than the folder
        values = read_json(said)
    if values.get("format") == "ip_adapter":
        config = recognise(open_tensors(file, stack) if tensors is None else tensors, file)
        return _as_saved(config, values, said)
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


def _as_saved(config: PublishedConfig, values: dict[str, Any], path: Path) -> PublishedConfig:
    """A published adapter with what its folder of ours says of it. Raises InputError where the weights contradict."""
    if values.get("family", config.family) != config.family:
        raise InputError(
            f"{path} says {values['family']!r} and the weights are {config.family}: write the folder again."
        )
    if not isinstance(config, FaceIDPlusConfig) or "shortcut_scale" not in values:
        return config
    scale = values["shortcut_scale"]
    if scale is not None and (
        isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale)
    ):
        raise InputError(f"{path}: shortcut_scale {scale!r} is neither a finite number nor null: write 1.0, or null.")
    return dataclasses.replace(config, shortcut_scale=scale)


def _width(tensors: dict[str, Tensor], key: str) -> int | None:
    """Inner widths are read off the file; an absent key is reported with all the others."""
    return tensors[key].shape[0] if key in tensors else None


def save_adapter(adapter: IdentityAdapter, folder: Path) -> None:
    """Write the adapter, weights first, so that a folder with a configuration is whole."""
    write_adapter(adapter.config, torch_state(adapter), folder)


def read_adapter(path: Path) -> tuple[EncoderConfig, dict[str, np.ndarray]]:
    """An adapter as it is in its file: {PyTorch key: array in PyTorch's layout}, every bit.

    Raises InputError for a damaged file and for keys and shapes that do not fit: of SDXL's width all of them, of
    another, where the U-Net is not known, those of the encoder.
    """
    with ExitStack() as stack:
        file = find_adapter(path)
        tensors = open_tensors(file, stack)
        config = _read_config(path, tensors, stack)
        check_keys(_expected(config, tensors), tensors, str(file))
        tensors.verify()
        return config, {key: tensor.read((slice(None),) * len(tensor.shape)) for key, tensor in tensors.items()}


def _expected(config: EncoderConfig, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter whose base is not at hand."""
    if config.cross_attention_dim in BASES:
        unet = abstract(lambda rngs: UNet2DConditionModel(SDXL.unet, rngs=rngs))
        return _shapes(abstract(lambda rngs: IdentityAdapter(config, unet, rngs=rngs)))
    encoder = _shapes(abstract(lambda rngs: nnx.Dict(identity_encoder=make_encoder(config, rngs))))
    return encoder | {key: tensor.shape for key, tensor in tensors.items() if key.startswith("ip_adapter.")}


def torch_layout(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays as training keeps them into PyTorch's layout: every matrix of an adapter is a linear map's."""
    return {key: array.T if array.ndim == 2 else array for key, array in arrays.items()}


def write_adapter(config: EncoderConfig, tensors: Mapping[str, np.ndarray], folder: Path) -> None:
    """As `save_adapter`, for tensors in PyTorch's layout."""
    save_tensors(tensors, folder / WEIGHTS)
    save_json(config.to_dict(), folder / CONFIG)
