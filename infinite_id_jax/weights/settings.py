"""What a model says of itself without its weights: read from the configurations of a folder in diffusers' layout."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from infinite_id_jax.diffusion.schedule import ScheduleConfig
from infinite_id_jax.errors import InputError
from infinite_id_jax.stable_diffusion.config import CLIPTextConfig, UNetConfig, VAEConfig, read_json


class Settings(NamedTuple):
    """Configurations of the four models, of the noise, and of an absent negative prompt."""

    unet: UNetConfig
    vae: VAEConfig
    text: tuple[CLIPTextConfig, CLIPTextConfig]
    schedule: ScheduleConfig
    zeros_for_no_negative: bool  # negative_prompt=None is zeros rather than an encoded ""


SDXL = Settings(
    unet=UNetConfig(
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816
    ),
    vae=VAEConfig(),
    text=(
        CLIPTextConfig(),
        CLIPTextConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            hidden_act="gelu",
            projection_dim=1280,
            architectures=("CLIPTextModelWithProjection",),
        ),
    ),
    schedule=ScheduleConfig(),
    zeros_for_no_negative=True,
)
"""Stability's SDXL 1.0, and all that was finetuned from it."""


def settings_of_folder(folder: Path) -> Settings:
    """The settings of a folder; what it does not configure is SDXL's. Raises InputError for another family's part."""
    given: dict[str, Any] = {}
    for part, kind in (("unet", UNetConfig), ("vae", VAEConfig)):
        if (folder / part).is_dir():
            given[part] = kind.from_json(folder / part / "config.json")
    text = tuple(
        CLIPTextConfig.from_json(folder / part / "config.json") if (folder / part).is_dir() else config
        for part, config in zip(("text_encoder", "text_encoder_2"), SDXL.text, strict=True)
    )
    # SDXL's second encoder projects, even where its file does not name its class.
    second = dataclasses.replace(text[1], architectures=SDXL.text[1].architectures)
    if (folder / "scheduler").is_dir():
        given["schedule"] = _schedule(folder / "scheduler" / "scheduler_config.json")
    index = folder / "model_index.json"
    if index.exists():
        given["zeros_for_no_negative"] = read_json(index).get("force_zeros_for_empty_prompt", True)
    settings = SDXL._replace(**given, text=(text[0], second))
    if settings.unet.addition_embed_type != "text_time":
        raise InputError(f"{folder} holds no SDXL (its U-Net takes no pooled text): sampling needs an SDXL model.")
    _check_parts(folder, settings)
    return settings


def _check_parts(folder: Path, settings: Settings) -> None:
    """Raises InputError for parts that do not go together, such as those of a model that inpaints."""
    unet, vae, text = settings.unet, settings.vae, settings.text
    for what, ours, others in (
        ("latents of {} channels, its autoencoder those of {}", unet.in_channels, vae.latent_channels),
        ("latents of {} channels and gives {}", unet.in_channels, unet.out_channels),
        ("text of width {}, its encoders give {}", unet.cross_attention_dim, sum(one.hidden_size for one in text)),
        ("pooled text of {} numbers, its second encoder gives {}", unet.pooled_dim, text[1].projection_dim),
    ):
        if ours != others:
            raise InputError(
                f"{folder} holds a U-Net that takes {what.format(ours, others)}: only plain text-to-image models are "
                "sampled, not those that inpaint or edit."
            )


def _schedule(path: Path) -> ScheduleConfig:
    try:
        return ScheduleConfig.from_dict(read_json(path))
    except InputError as error:
        raise error if str(path) in str(error) else InputError(f"{path}: {error}") from None
