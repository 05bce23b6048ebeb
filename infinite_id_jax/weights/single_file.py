"""A whole SDXL in one safetensors file in the original layout, as Stability published it and ComfyUI keeps it."""

import dataclasses
import re
from collections.abc import Mapping
from contextlib import ExitStack
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from safetensors import safe_open

from infinite_id_jax.diffusion.schedule import ScheduleConfig, alphas_cumprod
from infinite_id_jax.errors import InputError
from infinite_id_jax.weights.causes import looks_like
from infinite_id_jax.weights.compvis import (
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    UNET,
    VAE,
    Place,
    Placed,
    open_clip_places,
    text_places,
    unet_places,
    vae_places,
)
from infinite_id_jax.weights.load import Tensor, Tensors, check_keys, open_tensors
from infinite_id_jax.weights.settings import SDXL, Settings

_PREFIXES = {"U-Net": UNET, "VAE": VAE, "first text encoder": TEXT_ENCODER, "second text encoder": TEXT_ENCODER_2}
# (pattern of a key, what a checkpoint with such a key is), the first that matches wins.
_OTHERS: tuple[tuple[str, str], ...] = (
    (r"^cond_stage_model\.transformer\.", "SD 1.5"),
    (r"^cond_stage_model\.model\.", "SD 2"),
    (r"^conditioner\.embedders\.0\.model\.", "the SDXL refiner"),
    (r"^(model\.diffusion_model\.)?double_blocks\.", "Flux"),
    (r"^(model\.diffusion_model\.)?joint_blocks\.", "SD 3"),
    (r"^edm_(mean|std)$|^edm_vpred\.", "an SDXL trained on EDM's noise (Playground 2.5)"),
)
_ROUNDING = 0.01  # of a table in bfloat16; that of zero terminal SNR is 0.03 off
_INPUTS = {9: "an inpainting model", 8: "an InstructPix2Pix model"}  # by channels, where plain SDXL has 4
# What checkpoints carry beside the four models: averages of training, tables of noise, markers, what SDXL never uses.
_DROPPED = re.compile(
    r"(model_ema|denoiser|first_stage_model\.loss)\..*|"
    r"\w*alphas_cumprod(_prev)?|betas|posterior_\w+|lvlb_weights|logvar|scale_factor|v_pred|ztsnr|"
    r"conditioner\.embedders\.0\.(transformer\.)?(text_projection(\.weight)?|logit_scale)|"
    r"conditioner\.embedders\.1\.model\.logit_scale"
)


def places(settings: Settings) -> dict[str, dict[str, Place]]:
    """{part of diffusers' folder: {diffusers' key: its place in the file}}."""
    return {
        "unet": unet_places(settings.unet),
        "vae": vae_places(settings.vae),
        "text_encoder": text_places(settings.text[0]),
        "text_encoder_2": open_clip_places(settings.text[1]),
    }


def check_single_file(path: Path, settings: Settings) -> None:
    """Read the header alone. Raises InputError for a damaged file, another family, and for keys that do not fit."""
    with ExitStack() as stack:
        open_parts(path, settings, stack)


def open_parts(path: Path, settings: Settings, stack: ExitStack) -> dict[str, Tensors]:
    """{part of diffusers' folder: {diffusers' key: tensor}}; raises as `check_single_file`."""
    found = open_tensors(path, stack)
    _refuse_others(path, found, settings)
    expected = {place.key: place.stored_shape for part in places(settings).values() for place in part.values()}
    name = (
        str(path)
        if settings.unet != SDXL.unet
        else f"{path} (taken for SDXL 1.0; to sample another shape, name it with --model-config or config=)"
    )
    check_keys(expected, {key: tensor for key, tensor in found.items() if not _DROPPED.fullmatch(key)}, name)
    status, parts = path.stat(), {}
    for part, tensors in places(settings).items():
        parts[part] = Tensors()
        parts[part].update({key: Placed(found[place.key], place) for key, place in tensors.items()})
        parts[part].checks.append(partial(_verify, path, status.st_size, status.st_mtime_ns))
    return parts


@lru_cache
def _verify(path: Path, size: int, changed: int) -> None:
    """The parts share one checksum: it is computed for the first, and remembered while the file stays the same."""
    with ExitStack() as stack:
        open_tensors(path, stack).verify()


def _refuse_others(path: Path, found: Mapping[str, Tensor], settings: Settings) -> None:
    """One sentence for what is no SDXL, instead of thousands of keys."""
    for sign, kind in _OTHERS:
        if any(re.search(sign, key) for key in found):
            raise InputError(f"{path} looks like {kind}: sampling needs an SDXL model.")
    missing = [part for part, prefix in _PREFIXES.items() if not any(key.startswith(prefix) for key in found)]
    if len(missing) == len(_PREFIXES):
        kind = looks_like({key: tensor.shape for key, tensor in found.items()})
        raise InputError(
            f"{path} {f'looks like {kind}' if kind else 'holds nothing known'}: a model in one file holds a whole SDXL "
            "in the original layout (model.diffusion_model, first_stage_model, conditioner)."
        )
    if missing:
        raise InputError(f"{path} holds no {' and no '.join(missing)}: take a checkpoint that holds the whole SDXL.")
    key, channels = f"{UNET}input_blocks.0.0.weight", settings.unet.in_channels
    shape = found[key].shape if key in found else ()
    if len(shape) == 4 and shape[1] != channels:
        raise InputError(
            f"{path} looks like {_INPUTS.get(shape[1], 'another model')} (its U-Net takes {shape[1]} channels): "
            f"sampling needs a plain SDXL, of {channels}."
        )


def marked_schedule(path: Path) -> ScheduleConfig:
    """SDXL's noise, with v-prediction where the file is marked `v_pred`, as ComfyUI reads it, or says so in its header,
    as kohya's scripts do.

    Raises InputError for the mark of zero terminal SNR, `ztsnr`, and for a table of noise that is not SDXL's.
    """
    with ExitStack() as stack:
        tensors = open_tensors(path, stack)
        markers = tensors.keys() & {"v_pred", "ztsnr"}
        stored = tensors.get("alphas_cumprod")
        table = None if stored is None else np.asarray(stored.read((slice(None),)), np.float64)
    ours = alphas_cumprod(SDXL.schedule)
    other = table is not None and (table.shape != ours.shape or np.abs(table - ours).max() > _ROUNDING)
    if other or "ztsnr" in markers:
        why = "has a table of noise that is not SDXL's" if other else "is marked ztsnr"
        raise InputError(
            f"{path} was trained to zero terminal SNR or on other noise (it {why}), which is not built: take another "
            "model, or name a configuration folder with the scheduler to sample it with."
        )
    velocity = "v_pred" in markers or _said(path) in ("v", "v_prediction")
    return dataclasses.replace(SDXL.schedule, prediction_type="v_prediction") if velocity else SDXL.schedule


def _said(path: Path) -> str:
    """What the header says that the model predicts."""
    with safe_open(path, framework="numpy") as file:
        return (file.metadata() or {}).get("modelspec.prediction_type", "")
