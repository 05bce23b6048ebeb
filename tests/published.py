"""Published adapters in PyTorch: files with random weights under the releases' key names, and diffusers' answers.

Shapes follow the releases' module definitions (IP-Adapter: ip_adapter.py, resampler.py, ip_adapter_faceid.py).
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from tests import reference_torch

FAMILIES = ("ip_adapter", "ip_adapter_plus", "ip_adapter_full", "faceid", "faceid_plus", "faceid_plusv2")
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """Widths of a family's projection; the defaults are those of SDXL's releases over ViT-H."""

    width: int = 2048  # of cross-attention
    pooled: int = 1280  # of ViT-bigG's image embedding
    clip: int = 1280
    face: int = 512
    tokens: int = 4
    queries: int = 16
    dim: int = 1280  # of the Plus resampler
    heads: int = 20
    face_heads: int = 32
    depth: int = 4
    rank: int = 128


TINY = Sizes(width=64, pooled=32, clip=32, face=16, queries=4, dim=48, heads=2, face_heads=2, rank=3)


def _linear(name: str, dim_in: int, dim_out: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (dim_out, dim_in)} | ({f"{name}.bias": (dim_out,)} if bias else {})


def _norm(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def _perceiver(name: str, dim_in: int, dim: int, heads: int, s: Sizes) -> Shapes:
    shapes = _linear(f"{name}proj_in", dim_in, dim) | _linear(f"{name}proj_out", dim, s.width)
    shapes |= _norm(f"{name}norm_out", s.width)
    for i in range(s.depth):
        layer = f"{name}layers.{i}"
        shapes |= _norm(f"{layer}.0.norm1", dim) | _norm(f"{layer}.0.norm2", dim)
        shapes |= _linear(f"{layer}.0.to_q", dim, 64 * heads, bias=False)
        shapes |= _linear(f"{layer}.0.to_kv", dim, 128 * heads, bias=False)
        shapes |= _linear(f"{layer}.0.to_out", 64 * heads, dim, bias=False)
        shapes |= _norm(f"{layer}.1.0", dim) | _linear(f"{layer}.1.1", dim, 4 * dim, bias=False)
        shapes |= _linear(f"{layer}.1.3", 4 * dim, dim, bias=False)
    return shapes


def projection_shapes(family: str, s: Sizes) -> Shapes:
    """What stands below `image_proj.` in a release of `family`."""
    if family == "ip_adapter":
        return _linear("proj", s.pooled, s.tokens * s.width) | _norm("norm", s.width)
    if family == "ip_adapter_plus":
        return {"latents": (1, s.queries, s.dim)} | _perceiver("", s.clip, s.dim, s.heads, s)
    if family == "ip_adapter_full":
        return _linear("proj.0", s.clip, s.clip) | _linear("proj.2", s.clip, s.width) | _norm("proj.3", s.width)
    shapes = _linear("proj.0", s.face, 2 * s.face) | _linear("proj.2", 2 * s.face, s.tokens * s.width)
    shapes |= _norm("norm", s.width)
    if family == "faceid":
        return shapes
    return shapes | _perceiver("perceiver_resampler.", s.clip, s.width, s.face_heads, s)


def shapes(family: str, unet: UNet2DConditionModel, s: Sizes) -> Shapes:
    """All keys of a release for `unet`: projection, identity maps, and FaceID's LoRA."""
    found = {f"image_proj.{key}": shape for key, shape in projection_shapes(family, s).items()}
    for n, name in enumerate(unet.attn_processors):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        maps = {"to_q": attention.to_q, "to_k": attention.to_k, "to_v": attention.to_v, "to_out": attention.to_out[0]}
        if ".attn2." in name:
            found |= {f"ip_adapter.{n}.{key}_ip.weight": tuple(maps[key].weight.shape) for key in ("to_k", "to_v")}
        for key, linear in maps.items() if family.startswith("faceid") else ():
            dim_out, dim_in = linear.weight.shape
            found[f"ip_adapter.{n}.{key}_lora.down.weight"] = (s.rank, dim_in)
            found[f"ip_adapter.{n}.{key}_lora.up.weight"] = (dim_out, s.rank)
    return found


def random_state(family: str, unet: UNet2DConditionModel, s: Sizes = TINY, seed: int = 0) -> dict[str, Tensor]:
    """Random weights for these keys, norms about 1, activations O(1)."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes(family, unet, s).items():
        is_norm = len(shape) == 1 and key.endswith(".weight")
        scale = 0.1 if len(shape) == 1 else 1 / math.sqrt(shape[-1])
        state[key] = scale * torch.randn(shape, generator=generator) + float(is_norm)
    return state


FILES = {
    "ip_adapter": "ip-adapter_sdxl.safetensors",
    "ip_adapter_plus": "ip-adapter-plus-face_sdxl_vit-h.safetensors",
    "ip_adapter_full": "ip-adapter-full-face_sdxl.safetensors",
    "faceid": "ip-adapter-faceid_sdxl.bin",
    "faceid_plus": "ip-adapter-faceid-plus_sdxl.bin",
    "faceid_plusv2": "ip-adapter-faceid-plusv2_sdxl.bin",
}


def write(family: str, folder: Path, state: dict[str, Tensor]) -> Path:
    """A file as released: safetensors, or a pickle of two dictionaries."""
    path = folder / FILES[family]
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        nested: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for key, value in state.items():
            part, _, rest = key.partition(".")
            nested[part][rest] = value
        torch.save(nested, path)
    return path


def merged_lora(unet: UNet2DConditionModel, state: dict[str, Tensor]) -> UNet2DConditionModel:
    """A copy of `unet` with a FaceID's LoRA added to its attention."""
    merged = copy.deepcopy(unet)
    for n, name in enumerate(unet.attn_processors):
        attention = merged.get_submodule(name.removesuffix(".processor"))
        maps = {"to_q": attention.to_q, "to_k": attention.to_k, "to_v": attention.to_v, "to_out": attention.to_out[0]}
        for key, linear in maps.items():
            lora = f"ip_adapter.{n}.{key}_lora"
            linear.weight.data += state[f"{lora}.up.weight"] @ state[f"{lora}.down.weight"]
    return merged


class Diffusers:
    """diffusers' own SDXL pipeline with a release loaded by `load_ip_adapter`."""

    def __init__(self, model: Path, file: Path, version_2: bool = False):
        self.pipe = StableDiffusionXLPipeline.from_pretrained(model, image_encoder=None, feature_extractor=None)
        self.pipe.scheduler = reference_torch.sdxl_ddim()
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=None)
        self.projection: Any = self.pipe.unet.encoder_hid_proj.image_projection_layers[0]
        self.version_2 = version_2
        if version_2:
            self.projection.shortcut = True

    @torch.no_grad()
    def tokens(self, embeds: Tensor, clip: Tensor | None = None) -> Tensor:
        """The projection's output for rows of features: [B, C] or [B, L, C], and the second input of FaceID-Plus."""
        if clip is not None:
            self.projection.clip_embeds = clip[:, None]
        return self.projection(embeds)

    def sample(
        self, prompts: list[str], latents: Tensor, embeds: Tensor, clip: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Latents after guided sampling; `embeds` and `clip` hold nobody and the person, [2, ...]."""
        if clip is not None:
            self.projection.clip_embeds = clip[:, None].repeat_interleave(len(prompts), 0)
        height, width = (8 * side for side in latents.shape[-2:])
        return self.pipe(
            prompts,
            latents=latents,
            ip_adapter_image_embeds=[embeds[:, None]],
            height=height,
            width=width,
            output_type="latent",
            **kwargs,
        ).images
