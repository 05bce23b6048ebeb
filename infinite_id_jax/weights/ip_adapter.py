"""Published adapters: recognised by their keys and shapes, and our own under their keys where the structure allows."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from infinite_id_jax.errors import InputError
from infinite_id_jax.identity.config import AdapterConfig, EncoderConfig
from infinite_id_jax.identity.face_id import FaceIDConfig
from infinite_id_jax.identity.face_id_plus import FaceIDPlusConfig
from infinite_id_jax.identity.ip_adapter import IPAdapterConfig
from infinite_id_jax.identity.ip_adapter_full import IPAdapterFullConfig
from infinite_id_jax.identity.ip_adapter_plus import IPAdapterPlusConfig
from infinite_id_jax.identity.published import PublishedConfig
from infinite_id_jax.weights.causes import looks_like
from infinite_id_jax.weights.load import Tensor

T = TypeVar("T")

HEAD_DIM = 64  # of every resampler that was published
INSTANT_ID_DIM = 512  # InstantID's resampler reads a face embedding where Plus reads CLIP
KOLORS = (1024, 2048)  # Kolors' reads a ViT-L/14 and is as wide as its U-Net, whose cross-attentions have SDXL's width
_PARTS = ("image_proj.", "ip_adapter.")


class _Shapes:
    """Shapes below `image_proj.`; what is missing there is found out when the weights are filled in."""

    def __init__(self, tensors: Mapping[str, Tensor], path: Path):
        self.tensors, self.path = tensors, path

    def __contains__(self, key: str) -> bool:
        return f"image_proj.{key}" in self.tensors

    def size(self, key: str, axis: int) -> int:
        tensor = self.tensors.get(f"image_proj.{key}")
        if tensor is None or len(tensor.shape) <= axis:
            raise InputError(f"{self.path} misses image_proj.{key}, by which its widths are known: fetch it again.")
        return tensor.shape[axis]

    def perceiver(self, prefix: str = "") -> dict[str, int]:
        """Depth, heads and inner width of the perceiver's layers."""
        first = f"{prefix}layers.0."
        found = [re.match(rf"image_proj\.{re.escape(prefix)}layers\.(\d+)\.", key) for key in self.tensors]
        numbers = {int(match[1]) for match in found if match}
        if numbers != set(range(len(numbers))):  # a large number alone would be as many layers to build
            raise InputError(f"{self.path} is damaged: its layers are not numbered from 0 on; fetch it again.")
        return {
            "depth": len(numbers),
            "heads": self.size(f"{first}0.to_q.weight", 0) // HEAD_DIM,
            "hidden": self.size(f"{first}1.1.weight", 0),
        }


def recognise(tensors: Mapping[str, Tensor], path: Path) -> PublishedConfig:
    """The family and the widths of a published file with these keys.

    FaceID-Plus V1 and V2 have the same keys: V1 is taken where the file's name says "plus" without "plusv2", as the
    one published for SDXL is V2. Raises InputError, with what the file looks like, for anything else.
    """
    shapes = _Shapes(tensors, path)
    family = next((make for sign, make in _FAMILIES if sign in shapes), None)
    keys = [key for key in tensors if key.endswith(".to_k_ip.weight")]
    if family is None or not keys or len(tensors[keys[0]].shape) < 2 or not tensors[keys[0]].shape[1]:
        kind = looks_like({key: tensor.shape for key, tensor in tensors.items()})
        absent = [part for part in _PARTS if not any(key.startswith(part) for key in tensors)]
        if len(absent) == 1 and all(key.startswith(_PARTS) for key in tensors):
            raise InputError(f"{path} is half {kind}: it holds nothing below {absent[0]}; fetch it again whole.")
        raise InputError(
            f"{path} is no identity adapter of a known family{f': it looks like {kind}' if kind else ''}; give an "
            "IP-Adapter, Plus, Full-Face, FaceID or FaceID-Plus file for SDXL, or an adapter folder."
        )
    return family(shapes, tensors[keys[0]].shape[1])


def _lora_rank(shapes: _Shapes) -> int:
    ranks = (tensor.shape[0] for key, tensor in shapes.tensors.items() if key.endswith("_lora.down.weight"))
    return next(ranks, 0)


def _plain(shapes: _Shapes, width: int) -> PublishedConfig:
    tokens = shapes.size("proj.weight", 0) // width
    return IPAdapterConfig(width, _lora_rank(shapes), clip_dim=shapes.size("proj.weight", 1), tokens=tokens)


def _plus(shapes: _Shapes, width: int) -> PublishedConfig:
    clip_dim = shapes.size("proj_in.weight", 1)
    if clip_dim == INSTANT_ID_DIM:
        raise InputError(
            f"{shapes.path} looks like InstantID's adapter, which needs InstantID's ControlNet and is not built: "
            "use FaceID or FaceID-Plus."
        )
    queries, dim = shapes.size("latents", 1), shapes.size("latents", 2)
    if (clip_dim, dim) == KOLORS:
        raise InputError(f"{shapes.path} looks like Kolors' adapter, whose base is not built: use one for SDXL.")
    return IPAdapterPlusConfig(
        width, _lora_rank(shapes), clip_dim=clip_dim, queries=queries, dim=dim, **shapes.perceiver()
    )


def _full(shapes: _Shapes, width: int) -> PublishedConfig:
    return IPAdapterFullConfig(width, _lora_rank(shapes), clip_dim=shapes.size("proj.0.weight", 1))


def _face_id(shapes: _Shapes, width: int) -> PublishedConfig:
    if "unnorm" in shapes.path.name.lower():
        raise InputError(
            f"{shapes.path} was trained on face embeddings as they come, and here they have length 1: use "
            "ip-adapter-faceid-portrait_sdxl.bin, which was trained so."
        )
    return FaceIDConfig(
        width,
        _lora_rank(shapes),
        face_dim=shapes.size("proj.0.weight", 1),
        hidden=shapes.size("proj.0.weight", 0),
        tokens=shapes.size("proj.2.weight", 0) // width,
    )


def _face_id_plus(shapes: _Shapes, width: int) -> PublishedConfig:
    name = shapes.path.name.lower()
    version_1 = "plus" in name and not re.search("plus[-_ ]?v2", name)  # both have one shape
    return FaceIDPlusConfig(
        width,
        _lora_rank(shapes),
        face_dim=shapes.size("proj.0.weight", 1),
        face_hidden=shapes.size("proj.0.weight", 0),
        tokens=shapes.size("proj.2.weight", 0) // width,
        clip_dim=shapes.size("perceiver_resampler.proj_in.weight", 1),
        shortcut_scale=None if version_1 else 1.0,
        **shapes.perceiver("perceiver_resampler."),
    )


# A key that the family alone has among those below it.
_FAMILIES: tuple[tuple[str, Callable[[_Shapes, int], PublishedConfig]], ...] = (
    ("latents", _plus),
    ("proj.3.weight", _full),
    ("perceiver_resampler.proj_in.weight", _face_id_plus),
    ("proj.weight", _plain),
    ("proj.2.weight", _face_id),
)


# {name in the releases: (key of ours, key of the same tensor in a release)}, in order.
_AS_PUBLISHED: dict[str, tuple[tuple[str, str], ...]] = {
    "ip-adapter-faceid_sdxl": ((r"^face_mapper\.", "image_proj."),),
    "ip-adapter-plus_sdxl": ((r"^clip_mapper\.", "image_proj."),),
    "ip-adapter-full-face_sdxl": ((r"^clip_mapper\.norm\.", "image_proj.proj.3."), (r"^clip_mapper\.", "image_proj.")),
}
_RELEASES = {
    "ip_adapter": "ip-adapter_sdxl",
    "ip_adapter_plus": "ip-adapter-plus_sdxl",
    "ip_adapter_full": "ip-adapter-full-face_sdxl",
    "faceid": "ip-adapter-faceid_sdxl",
    "faceid_plus": "ip-adapter-faceid-plusv2_sdxl",
}


def as_published(config: EncoderConfig, tensors: Mapping[str, T]) -> tuple[str, dict[str, T]]:
    """(a release's name, tensors under its keys), as diffusers' `load_ip_adapter` reads them.

    Raises InputError for an adapter that no published family computes.
    """
    if isinstance(config, PublishedConfig):
        first_version = isinstance(config, FaceIDPlusConfig) and config.shortcut_scale is None
        name = _RELEASES[config.family]
        return name.replace("plusv2", "plus") if first_version else name, dict(tensors)
    assert isinstance(config, AdapterConfig)
    name = _structure(config)
    named = dict(tensors)
    for pattern, replacement in _AS_PUBLISHED[name]:
        named = {re.sub(pattern, replacement, key): tensor for key, tensor in named.items()}
    return name, named


def _structure(config: AdapterConfig) -> str:
    """The release whose encoder is that of an adapter of ours."""
    if config.clip_mapper == "none":
        return "ip-adapter-faceid_sdxl"
    if config.face_tokens:
        raise InputError(
            "This adapter puts CLIP's tokens and face tokens into one attention, which no published family does: "
            "export it with --format diffusers, which brings its own runtime, or train with adapter.face_tokens=0."
        )
    if config.clip_layer != "penultimate":
        raise InputError(
            f"This adapter sees CLIP's {config.clip_layer} hidden states and published families the penultimate ones: "
            "export it with --format diffusers, which brings its own runtime, or train with clip_layer=penultimate."
        )
    return "ip-adapter-plus_sdxl" if config.clip_mapper == "resampler" else "ip-adapter-full-face_sdxl"


def check_comfyui(config: EncoderConfig) -> None:
    """Raise InputError unless ComfyUI's IPAdapter nodes take the adapter: their sizes are fixed (IPAdapterPlus.py)."""
    if isinstance(config, IPAdapterFullConfig) or (isinstance(config, AdapterConfig) and config.clip_mapper == "mlp"):
        raise InputError(
            "ComfyUI's IPAdapter nodes take no adapter with a token for each of CLIP's hidden states over SDXL: export "
            "it with --format diffusers, or train with adapter.clip_mapper=resampler."
        )
    if not isinstance(config, AdapterConfig):
        return
    if config.clip_mapper == "resampler":
        names, fixed = ("queries", "dim", "depth", "heads"), (16, 1280, 4, 20)
        wanted = {f"resampler_{name}": size for name, size in zip(names, fixed, strict=True)}
    else:
        wanted = {"face_dim": 512, "face_tokens": 16}
    others = [f"{name}={size}" for name, size in wanted.items() if getattr(config, name) != size]
    if others:
        raise InputError(f"ComfyUI's IPAdapter nodes take such an adapter with {', '.join(others)} only: train it so.")
