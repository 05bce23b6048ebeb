"""A whole SDXL from a folder in diffusers' layout, or from the hub when a hub id is given."""

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

from infinite_id_jax.diffusion.schedule import ScheduleConfig
from infinite_id_jax.errors import InputError, MissingExtraError
from infinite_id_jax.stable_diffusion.clip_text import CLIPTextModel
from infinite_id_jax.stable_diffusion.clip_vision import CLIPVisionModel
from infinite_id_jax.stable_diffusion.config import (
    CLIPTextConfig,
    CLIPVisionConfig,
    UNetConfig,
    VAEConfig,
    read_json,
)
from infinite_id_jax.stable_diffusion.tokenizer import CLIPTokenizer
from infinite_id_jax.stable_diffusion.unet import UNet2DConditionModel
from infinite_id_jax.stable_diffusion.vae import AutoencoderKL
from infinite_id_jax.weights.load import ShardingRule, load_module

_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w.-]+(@[\w.-]+)?")


class Settings(NamedTuple):
    """What a model folder says of itself without its weights."""

    unet: UNetConfig
    vae: VAEConfig
    text: tuple[CLIPTextConfig, CLIPTextConfig]
    schedule: ScheduleConfig
    zeros_for_no_negative: bool  # negative_prompt=None is zeros rather than an encoded ""


class StableDiffusionXL(NamedTuple):
    """The frozen base, as modules with their arrays in place."""

    settings: Settings
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: tuple[CLIPTextModel, CLIPTextModel]
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]


def resolve(source: str | Path) -> Path:
    """A local folder as it is, or the local copy of a hub id "owner/name" or "owner/name@revision".

    The hub is asked only for an id whose first part is no local folder. Raises InputError for anything else.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{source} is a file: give the model's folder in diffusers' layout.")
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source) or path.parent.is_dir():
        raise InputError(f"The model folder {source} does not exist: check the path, or give a hub id owner/name.")
    return _download(source)


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtraError(f"{hub_id} is no local folder, and loading it from the hub", "hub") from None
    name, _, revision = hub_id.partition("@")
    patterns = ["*.json", "*.txt", *(f"{part}/*.safetensors" for part in (*_PARTS, "image_encoder"))]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds: network, authorisation, unknown name
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{hub_id} is no local folder and the hub did not give it: {reason}") from None


def read_settings(folder: Path) -> Settings:
    """The configurations of an SDXL folder. Raises InputError for a part that is missing or of another family."""
    missing = [part for part in _PARTS if not (folder / part).is_dir()]
    if missing:
        raise InputError(f"{folder} is not a whole SDXL folder in diffusers' layout: {', '.join(missing)} missing.")
    unet = UNetConfig.from_json(folder / "unet" / "config.json")
    if unet.addition_embed_type != "text_time":
        raise InputError(f"{folder} holds no SDXL (its U-Net takes no pooled text): sampling needs an SDXL model.")
    schedule = folder / "scheduler" / "scheduler_config.json"
    try:
        schedule_config = ScheduleConfig.from_dict(read_json(schedule))
    except InputError as error:
        raise error if str(schedule) in str(error) else InputError(f"{schedule}: {error}") from None
    index = folder / "model_index.json"
    options = read_json(index) if index.exists() else {}
    return Settings(
        unet=unet,
        vae=VAEConfig.from_json(folder / "vae" / "config.json"),
        text=(
            CLIPTextConfig.from_json(folder / "text_encoder" / "config.json"),
            # SDXL's second encoder projects, even where its file does not name its class.
            dataclasses.replace(
                CLIPTextConfig.from_json(folder / "text_encoder_2" / "config.json"),
                architectures=("CLIPTextModelWithProjection",),
            ),
        ),
        schedule=schedule_config,
        zeros_for_no_negative=options.get("force_zeros_for_empty_prompt", True),
    )


def load_base(folder: Path, *, dtype: str = "float32", sharding: ShardingRule | None = None) -> StableDiffusionXL:
    """Load all of an SDXL folder; the VAE stays in fp32 where `dtype` is float16, which overflows in it."""
    settings = read_settings(folder)
    return StableDiffusionXL(
        settings,
        unet=load_unet(folder, settings, dtype=dtype, sharding=sharding),
        vae=load_vae(folder, settings, dtype="float32" if dtype == "float16" else dtype, sharding=sharding),
        text_encoders=load_text_encoders(folder, settings, dtype=dtype, sharding=sharding),
        tokenizers=load_tokenizers(folder),
    )


def load_unet(
    folder: Path, settings: Settings, *, dtype: str = "float32", sharding: ShardingRule | None = None
) -> UNet2DConditionModel:
    return load_module(
        lambda rngs: UNet2DConditionModel(settings.unet, rngs=rngs), folder / "unet", dtype=dtype, sharding=sharding
    )


def load_vae(
    folder: Path, settings: Settings, *, dtype: str = "float32", sharding: ShardingRule | None = None
) -> AutoencoderKL:
    return load_module(
        lambda rngs: AutoencoderKL(settings.vae, rngs=rngs), folder / "vae", dtype=dtype, sharding=sharding
    )


def load_text_encoders(
    folder: Path, settings: Settings, *, dtype: str = "float32", sharding: ShardingRule | None = None
) -> tuple[CLIPTextModel, CLIPTextModel]:
    first, second = (
        load_module(lambda rngs, c=config: CLIPTextModel(c, rngs=rngs), folder / part, dtype=dtype, sharding=sharding)
        for part, config in zip(("text_encoder", "text_encoder_2"), settings.text, strict=True)
    )
    return first, second


def load_tokenizers(folder: Path) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    return CLIPTokenizer.from_folder(folder / "tokenizer"), CLIPTokenizer.from_folder(folder / "tokenizer_2")


def load_image_encoder(
    folder: Path, *, dtype: str = "float32", sharding: ShardingRule | None = None
) -> CLIPVisionModel:
    """The CLIP image encoder in `folder` (for SDXL: the image_encoder of the IP-Adapter releases, ViT-bigG/14)."""
    if not folder.is_dir():
        raise InputError(
            f"There is no CLIP image encoder at {folder}: put one there (ViT-bigG/14 for adapters of clip_dim 1664), "
            "or name its folder with image_encoder= or --image-encoder."
        )
    config = CLIPVisionConfig.from_json(folder / "config.json")
    return load_module(lambda rngs: CLIPVisionModel(config, rngs=rngs), folder, dtype=dtype, sharding=sharding)
