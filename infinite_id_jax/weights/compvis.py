"""Names of SDXL's tensors in the original layout (Stability's generative-models, sd_xl_base_1.0.safetensors).

A table per model says where each of diffusers' modules lies in the original; it follows from the configuration and is
read in both directions. Three kinds of tensors are stored in another shape as well (see `Place`).
"""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from flax import nnx

from infinite_id_jax.stable_diffusion.clip_text import CLIPTextModel
from infinite_id_jax.stable_diffusion.config import CLIPTextConfig, UNetConfig, VAEConfig
from infinite_id_jax.stable_diffusion.unet import UNet2DConditionModel
from infinite_id_jax.stable_diffusion.vae import AutoencoderKL
from infinite_id_jax.weights.keys import key_map
from infinite_id_jax.weights.load import Tensor, abstract

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT_ENCODER, TEXT_ENCODER_2 = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."

Shape = tuple[int, ...]
Form = Literal["same", "transposed", "convolution", "third"]


class Place(NamedTuple):
    """Where diffusers' tensor of `shape` lies in the original file, and how.

    "transposed": CLIP's text projection is [in, out]. "convolution": the VAE's attention is made of 1x1 convolutions.
    "third": PyTorch's MultiheadAttention stacks queries, keys and values; this one's number is `third`.
    """

    key: str
    shape: Shape
    form: Form = "same"
    third: int = 0

    @property
    def stored_shape(self) -> Shape:
        """The shape under `key` in the original file."""
        match self.form:
            case "transposed":
                return self.shape[::-1]
            case "convolution":
                return (*self.shape, 1, 1)
            case "third":
                return (3 * self.shape[0], *self.shape[1:])
            case "same":
                return self.shape


class Placed:
    """Diffusers' tensor, seen in the original one at `place`: of a part, only that part of the file is read."""

    def __init__(self, stored: Tensor, place: Place):
        self._stored, self._place, self.shape = stored, place, place.shape

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        match self._place.form:
            case "transposed":
                return self._stored.read(index[::-1]).T
            case "convolution":
                return self._stored.read((*index, slice(0, 1), slice(0, 1)))[..., 0, 0]
            case "third":
                start, stop, _ = index[0].indices(self.shape[0])
                first = self._place.third * self.shape[0]
                return self._stored.read((slice(first + start, first + stop), *index[1:]))
            case "same":
                return self._stored.read(index)


def stored(places: Mapping[str, Place], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Diffusers' {key: array} as the original file holds them: the way out, as `Placed` is the way in."""
    arrays: dict[str, np.ndarray] = {}
    for key, place in places.items():
        array = tensors[key]
        match place.form:
            case "transposed":
                arrays[place.key] = np.ascontiguousarray(array.T)
            case "third":
                stack = arrays.setdefault(place.key, np.empty(place.stored_shape, array.dtype))
                stack[place.third * len(array) :][: len(array)] = array
            case _:
                arrays[place.key] = array.reshape(place.stored_shape)
    return arrays


# The tables: {module of diffusers': module of the original}. What lies below a listed module keeps its name.


@lru_cache
def unet_places(config: UNetConfig) -> dict[str, Place]:
    """{diffusers' key: its place}, as of each of these four."""
    modules = _unet_modules(config)
    shapes = _shapes(lambda rngs: UNet2DConditionModel(config, rngs=rngs))
    return {key: Place(UNET + _renamed(key, modules), shape) for key, shape in shapes.items()}


def unet_names(config: UNetConfig) -> dict[str, str]:
    """{diffusers' key: the original's below `model.diffusion_model.`} of each of the U-Net's tensors."""
    return {key: place.key.removeprefix(UNET) for key, place in unet_places(config).items()}


@lru_cache
def vae_places(config: VAEConfig) -> dict[str, Place]:
    modules = _vae_modules(config)
    linear = re.compile(r"\.attentions\.0\.to_.*weight$")
    shapes = _shapes(lambda rngs: AutoencoderKL(config, rngs=rngs))
    return {
        key: Place(VAE + _renamed(key, modules), shape, "convolution" if linear.search(key) else "same")
        for key, shape in shapes.items()
    }


@lru_cache
def text_places(config: CLIPTextConfig) -> dict[str, Place]:
    """SDXL's first text encoder: in both layouts the module of transformers."""
    shapes = _shapes(lambda rngs: CLIPTextModel(config, rngs=rngs))
    return {key: Place(TEXT_ENCODER + key, shape) for key, shape in shapes.items()}


@lru_cache
def open_clip_places(config: CLIPTextConfig) -> dict[str, Place]:
    """SDXL's second text encoder: in the original OpenCLIP's module."""
    modules = _open_clip_modules(config)
    places = {}
    for key, shape in _shapes(lambda rngs: CLIPTextModel(config, rngs=rngs)).items():
        name = TEXT_ENCODER_2 + _renamed(key, modules)
        if match := re.fullmatch(r"(.*\.attn)\.([qkv])_proj\.(weight|bias)", name):
            places[key] = Place(f"{match[1]}.in_proj_{match[3]}", shape, "third", "qkv".index(match[2]))
        elif key in _OPEN_CLIP_ARRAYS:
            array, form = _OPEN_CLIP_ARRAYS[key]
            places[key] = Place(TEXT_ENCODER_2 + array, shape, form)
        else:
            places[key] = Place(name, shape)
    return places


def _shapes(make: Callable[[nnx.Rngs], nnx.Module]) -> dict[str, Shape]:
    return {entry.key: entry.shape for entry in key_map(abstract(make)).values()}


_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_LAYER = {
    "self_attn": "attn",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OPEN_CLIP_ARRAYS: dict[str, tuple[str, Form]] = {  # bare parameters of its root
    "embeddings.position_embedding.weight": ("positional_embedding", "same"),
    "text_projection.weight": ("text_projection", "transposed"),
}


def _unet_modules(config: UNetConfig) -> dict[str, str]:
    """The original counts all blocks of the way down in one list, and all of the way up in another."""
    modules = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        **_below("mid_block.resnets.0", "middle_block.0", _UNET_RESNET),
        "mid_block.attentions.0": "middle_block.1",
        **_below("mid_block.resnets.1", "middle_block.2", _UNET_RESNET),
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    levels, layers, count = len(config.block_out_channels), config.layers_per_block, 1
    for i in range(levels):
        for j in range(layers):
            modules |= _below(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{count}.0", _UNET_RESNET)
            modules[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{count}.1"
            count += 1
        if i < levels - 1:
            modules[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
            count += 1
    for i, kind in enumerate(config.up_block_types):
        for j in range(layers + 1):
            count = i * (layers + 1) + j
            modules |= _below(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{count}.0", _UNET_RESNET)
            modules[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{count}.1"
        behind = 2 if kind.startswith("CrossAttn") else 1  # the upsampler shares the block of the last resnet
        modules[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{count}.{behind}"
    return modules


def _vae_modules(config: VAEConfig) -> dict[str, str]:
    """The original numbers the decoder's blocks by resolution, so that the first to run is the last by number."""
    modules = {}
    levels = len(config.block_out_channels)
    for side in ("encoder", "decoder"):
        modules[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        for i in range(2):
            modules[f"{side}.mid_block.resnets.{i}"] = f"{side}.mid.block_{i + 1}"
        modules |= _below(f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1", _VAE_ATTENTION)
    for i in range(levels):
        up = levels - 1 - i
        for j in range(config.layers_per_block + 1):
            modules[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
            modules[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{up}.block.{j}"
        modules[f"encoder.down_blocks.{i}.downsamplers.0"] = f"encoder.down.{i}.downsample"
        modules[f"decoder.up_blocks.{i}.upsamplers.0"] = f"decoder.up.{up}.upsample"
    for module, name in list(modules.items()):
        if ".resnets." in module:
            modules[f"{module}.conv_shortcut"] = f"{name}.nin_shortcut"
    return modules


def _open_clip_modules(config: CLIPTextConfig) -> dict[str, str]:
    modules = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}
    for i in range(config.num_hidden_layers):
        modules |= _below(f"encoder.layers.{i}", f"transformer.resblocks.{i}", _OPEN_CLIP_LAYER)
    return modules


def _below(module: str, name: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{module}.{ours}": f"{name}.{theirs}" for ours, theirs in names.items()}


def _renamed(key: str, modules: Mapping[str, str]) -> str:
    """`key` with its longest listed module renamed; a key of none keeps its name."""
    parts = key.split(".")
    for n in range(len(parts), 0, -1):
        module = ".".join(parts[:n])
        if module in modules:
            return ".".join([modules[module], *parts[n:]])
    return key
