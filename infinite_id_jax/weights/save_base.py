"""A whole SDXL out again: a folder for diffusers, or one file in the original layout for ComfyUI and the like."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from infinite_id_jax.errors import InputError
from infinite_id_jax.files import save_json, write_folder
from infinite_id_jax.stable_diffusion.clip_text import CLIPTextModel
from infinite_id_jax.stable_diffusion.tokenizer import BOS, EOS, CLIPTokenizer
from infinite_id_jax.weights.compvis import stored
from infinite_id_jax.weights.export import save_tensors, save_weights, torch_state
from infinite_id_jax.weights.folder import StableDiffusionXL
from infinite_id_jax.weights.single_file import places

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

    The folder is whole or not there. Raises InputError if it exists already, for a U-Net with an adapter in it, and for
    what the disk refuses.
    """
    if folder.exists():
        raise InputError(f"{folder} exists already: name a folder that does not.")

    def write(beside: Path) -> None:
        save_tensors(_plain_state(base), beside / "unet" / "diffusion_pytorch_model.safetensors")
        save_weights(base.vae, beside / "vae" / "diffusion_pytorch_model.safetensors")
        for part, encoder in zip(("text_encoder", "text_encoder_2"), base.text_encoders, strict=True):
            save_tensors(_transformers_state(encoder), beside / part / "model.safetensors")
        for part, tokenizer in zip(("tokenizer", "tokenizer_2"), base.tokenizers, strict=True):
            _save_tokenizer(tokenizer, beside / part)
        for path, content in _configurations(base).items():
            save_json(content, beside / path)

    write_folder(folder, write)


def save_single_file(base: StableDiffusionXL, path: Path) -> None:
    """Write one safetensors file in the original layout, in the arrays' own dtypes; whole or not there.

    It says nothing of configurations, of which its readers know SDXL's, but v-prediction, by the marker `v_pred`.
    Raises InputError for a U-Net with an adapter in it, and for what the disk refuses.
    """
    states = (_plain_state(base), *map(torch_state, (base.vae, *base.text_encoders)))
    tensors: dict[str, np.ndarray] = {}
    for state, part in zip(states, places(base.settings).values(), strict=True):
        tensors |= stored(part, state)
    if base.settings.schedule.prediction_type == "v_prediction":
        tensors["v_pred"] = np.zeros(0, np.float32)
    save_tensors(tensors, path)


def _plain_state(base: StableDiffusionXL) -> dict[str, np.ndarray]:
    state = torch_state(base.unet)
    if state.keys() != places(base.settings)["unet"].keys():
        raise InputError("The U-Net to save has an adapter in it: eject that first, or save the base as it was loaded.")
    return state


def _transformers_state(encoder: CLIPTextModel) -> dict[str, np.ndarray]:
    """Under the prefix that transformers below 5 insists on, and later ones read too."""
    return {
        key if key.startswith("text_projection") else f"text_model.{key}": array
        for key, array in torch_state(encoder).items()
    }


def _configurations(base: StableDiffusionXL) -> dict[str, dict[str, Any]]:
    """{path in the folder: its JSON}; what is not said is the default of diffusers and transformers, and ours."""
    unet, vae, text, schedule, zeros_for_no_negative = base.settings
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
    for part, config, tokenizer in zip(("text_encoder", "text_encoder_2"), text, base.tokenizers, strict=True):
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
