"""A whole SDXL out again: a folder for diffusers, or one file in the original layout for ComfyUI and the like."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from infinite_id_jax.errors import InputError
from infinite_id_jax.files import save_json, write_folder
from infinite_id_jax.stable_diffusion.low_rank import lora_names
from infinite_id_jax.stable_diffusion.tokenizer import BOS, EOS, CLIPTokenizer
from infinite_id_jax.weights.compvis import stored
from infinite_id_jax.weights.export import save_tensors, save_weights, torch_state
from infinite_id_jax.weights.folder import StableDiffusionXL
from infinite_id_jax.weights.keys import key_map
from infinite_id_jax.weights.settings import Settings
from infinite_id_jax.weights.single_file import places

Parts = Iterable[tuple[str, nnx.Module]]
"""(name of diffusers' folder, module) of the U-Net, the VAE and the two text encoders."""

# What stands in model_index.json: the library and the class that reads each part.
_CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "scheduler": ("diffusers", "EulerDiscreteScheduler"),
}


def save_base(base: StableDiffusionXL, folder: Path) -> None:
    """Write a folder that `StableDiffusionXLPipeline.from_pretrained` reads, in the arrays' own dtypes.

    The folder is whole or not there. Raises InputError if it exists already, for a base with an adapter or a LoRA in
    it, and for what the disk refuses.
    """
    if folder.exists():
        raise InputError(f"{folder} exists already: name a folder that does not.")
    parts = _plain_parts(base)
    write_folder(folder, lambda beside: fill_folder(beside, base.settings, base.tokenizers, parts))


def save_single_file(base: StableDiffusionXL, path: Path) -> None:
    """Write one safetensors file in the original layout, in the arrays' own dtypes; whole or not there.

    It says nothing of configurations, of which its readers know SDXL's, but v-prediction, by the marker `v_pred`.
    Raises InputError for a base with an adapter or a LoRA in it, and for what the disk refuses.
    """
    write_single_file(path, base.settings, _plain_parts(base))


def fill_folder(
    folder: Path, settings: Settings, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer], parts: Parts
) -> None:
    """As `save_base`, into a folder that nobody reads yet; of `parts`, plain ones, one at a time is held."""
    for part, module in parts:
        if _CLASSES[part][0] == "diffusers":
            save_weights(module, folder / part / "diffusion_pytorch_model.safetensors")
        else:
            save_tensors(_transformers_state(module), folder / part / "model.safetensors")
        del module  # before the next is made
    for part, tokenizer in zip(("tokenizer", "tokenizer_2"), tokenizers, strict=True):
        _save_tokenizer(tokenizer, folder / part)
    for path, content in _configurations(settings, tokenizers).items():
        save_json(content, folder / path)


def write_single_file(path: Path, settings: Settings, parts: Parts) -> None:
    """As `save_single_file`; of `parts`, plain ones, one at a time is held beside what the file is to have."""
    tensors: dict[str, np.ndarray] = {}
    for part, module in parts:
        tensors |= stored(places(settings)[part], torch_state(module))
        del module  # before the next is made
    if settings.schedule.prediction_type == "v_prediction":
        tensors["v_pred"] = np.zeros(0, np.float32)
    save_tensors(tensors, path)


def _plain_parts(base: StableDiffusionXL) -> list[tuple[str, nnx.Module]]:
    """The modules by the names of their folders. Raises InputError for what is not of the base alone."""
    first, second = base.text_encoders
    parts: list[tuple[str, nnx.Module]] = [
        ("unet", base.unet),
        ("vae", base.vae),
        ("text_encoder", first),
        ("text_encoder_2", second),
    ]
    for part, module in parts:
        if {entry.key for entry in key_map(module).values()} == places(base.settings)[part].keys():
            continue
        names = {"unet": "U-Net", "vae": "VAE"}
        loras = ", ".join(sorted(lora_names(module)))
        what, cure = (f"the LoRA {loras} beside its layers", "merge") if loras else ("an adapter in it", "eject")
        raise InputError(
            f"The {names.get(part, part)} to save has {what}: {cure} that first, or save the base as it was loaded."
        )
    return parts


def _transformers_state(encoder: nnx.Module) -> dict[str, np.ndarray]:
    """Under the prefix that transformers below 5 insists on, and later ones read too."""
    return {
        key if key.startswith("text_projection") else f"text_model.{key}": array
        for key, array in torch_state(encoder).items()
    }


def _configurations(settings: Settings, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]) -> dict[str, dict[str, Any]]:
    """{path in the folder: its JSON}; what is not said is the default of diffusers and transformers, and ours."""
    unet, vae, text, schedule, zeros_for_no_negative = settings
    levels = len(vae.block_out_channels)
    vae_only = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": unet.sample_size * vae.downscale,
    }
    configurations = {
        "unet/config.json": unet.to_dict() | {"_class_name": _CLASSES["unet"][1]},
        "vae/config.json": vae.to_dict() | vae_only | {"_class_name": _CLASSES["vae"][1]},
        # Without clipping DDIM made from this configuration is SDXL's too.
        "scheduler/scheduler_config.json": dataclasses.asdict(schedule)
        | {"clip_sample": False, "_class_name": _CLASSES["scheduler"][1]},
        "model_index.json": {"_class_name": "StableDiffusionXLPipeline"}
        | {part: list(library_and_class) for part, library_and_class in _CLASSES.items()}
        | {"image_encoder": [None, None], "feature_extractor": [None, None]}
        | {"force_zeros_for_empty_prompt": zeros_for_no_negative},
    }
    for part, config, tokenizer in zip(("text_encoder", "text_encoder_2"), text, tokenizers, strict=True):
        configurations[f"{part}/config.json"] = config.to_dict() | {
            "model_type": "clip_text_model",
            "architectures": [_CLASSES[part][1]],
            "bos_token_id": tokenizer.bos_id,
            "pad_token_id": tokenizer.pad_id,
        }
    return configurations


def _save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """vocab.json, merges.txt and settings: what every version of transformers reads as a CLIPTokenizer."""
    folder.mkdir(parents=True)
    tokenizer.backend.model.save(str(folder))
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = {
        str(token_id): {field: getattr(token, field) for field in fields}
        for token_id, token in tokenizer.backend.get_added_tokens_decoder().items()
    }
    named = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": tokenizer.pad_token}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": tokenizer.max_length,
        "do_lower_case": True,
        "added_tokens_decoder": added,
    }
    save_json(settings | named, folder / "tokenizer_config.json")
    save_json(named, folder / "special_tokens_map.json")
