"""A whole SDXL from a folder in diffusers' layout, from one file in the original layout, or from the hub."""

import fnmatch
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from flax import nnx

from infinite_id_jax.errors import InputError, MissingExtraError
from infinite_id_jax.files import is_hub_id, miniature
from infinite_id_jax.stable_diffusion.clip_text import CLIPTextModel
from infinite_id_jax.stable_diffusion.clip_vision import CLIPVisionModel
from infinite_id_jax.stable_diffusion.config import CLIPVisionConfig
from infinite_id_jax.stable_diffusion.tokenizer import EOS, CLIPTokenizer
from infinite_id_jax.stable_diffusion.unet import UNet2DConditionModel
from infinite_id_jax.stable_diffusion.vae import AutoencoderKL
from infinite_id_jax.weights.load import ShardingRule, abstract, fill, load_module
from infinite_id_jax.weights.settings import SDXL, Settings, settings_of_folder
from infinite_id_jax.weights.single_file import check_single_file, marked_schedule, open_parts

M = TypeVar("M", bound=nnx.Module)
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", *_TOKENIZERS, "scheduler")
_HUB_WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder")


class StableDiffusionXL(NamedTuple):
    """The frozen base, as modules with their arrays in place."""

    settings: Settings
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: tuple[CLIPTextModel, CLIPTextModel]
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]


def resolve(source: str | Path) -> Path:
    """A local folder or file as it is, or the local copy of a hub id "owner/name" or "owner/name@revision".

    "miniature" is the small model of the package's own (a folder of that name is "./miniature"). The hub is asked only
    for an id whose first part is no local folder. Raises InputError for anything else.
    """
    if source == "miniature":
        return miniature()
    path = Path(source).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
        return path
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin") and path.exists():
        raise InputError(f"{source} is a pickle, which can run code: convert it to safetensors.")
    if path.exists():
        raise InputError(
            f"{source} is no model: give a folder in diffusers' layout, or one .safetensors file in the original one."
        )
    if isinstance(source, Path) or not is_hub_id(source) or path.parent.is_dir():
        raise InputError(f"The model folder {source} does not exist: check the path, or give a hub id owner/name.")
    return _download(source)


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError:
        raise MissingExtraError(f"{hub_id} is no local folder, and loading it from the hub", "hub") from None
    name, _, revision = hub_id.partition("@")
    patterns = ["*.json", "*.txt", *(f"{part}/*.safetensors" for part in _HUB_WEIGHTS)]
    with suppress(Exception):  # without the network, what was fetched before is asked for next
        patterns = _needed(HfApi().list_repo_files(name, revision=revision or None))
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds: network, authorisation, unknown name
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{hub_id} is no local folder and the hub did not give it: {reason}") from None


def _needed(files: Sequence[str]) -> list[str]:
    """Of a repository: what is small, and each part's weights, in half precision only where there are no others."""
    small = [file for file in files if file.endswith((".json", ".txt"))]
    parts = [fnmatch.filter(files, f"{part}/*.safetensors") for part in _HUB_WEIGHTS]
    full = [[file for file in part if ".fp16" not in file] for part in parts]
    return small + [file for part, whole in zip(parts, full, strict=True) for file in whole or part]


def image_encoder_beside(model: Path) -> Path:
    """Where a model's CLIP image encoder is looked for: in its folder, or beside its single file."""
    return (model if model.is_dir() else model.parent) / "image_encoder"


def read_settings(model: Path, config: Path | None = None) -> Settings:
    """The configurations of an SDXL, checked against the header of a file. Raises InputError for another family.

    A file has none of its own: `config` is a folder in diffusers' layout, without weights, that has them. What it
    does not have, or all of them without it, is SDXL 1.0's.
    """
    if model.is_dir():
        if config is not None:
            raise InputError(f"{model} is a folder with configurations of its own: leave out {config}.")
        missing = [part for part in _PARTS if not (model / part).is_dir()]
        if missing:
            raise InputError(f"{model} is not a whole SDXL folder in diffusers' layout: {', '.join(missing)} missing.")
        return settings_of_folder(model)
    settings = SDXL if config is None else _configured(config)
    check_single_file(model, settings)
    scheduled = config is not None and (config / "scheduler").is_dir()
    return settings if scheduled else settings._replace(schedule=marked_schedule(model))


def _configured(config: Path) -> Settings:
    if not any((config / part).is_dir() for part in _PARTS):
        raise InputError(
            f"{config} is no folder with the configurations of a model: it holds none of {', '.join(_PARTS)}."
        )
    settings = settings_of_folder(config)
    for part, encoder, sdxl in zip(_TOKENIZERS, settings.text, SDXL.text, strict=True):
        if encoder.vocab_size != sdxl.vocab_size and not (config / part).is_dir():
            raise InputError(f"{config} has a text encoder of {encoder.vocab_size} words: put its {part}/ there too.")
    return settings


def describe_base(model: Path, config: Path | None = None) -> StableDiffusionXL:
    """As `load_base`, with shapes in place of arrays: reads settings and tokenizers alone."""
    settings = read_settings(model, config)
    first, second = (abstract(lambda rngs, c=config: CLIPTextModel(c, rngs=rngs)) for config in settings.text)
    return StableDiffusionXL(
        settings,
        unet=abstract(lambda rngs: UNet2DConditionModel(settings.unet, rngs=rngs)),
        vae=abstract(lambda rngs: AutoencoderKL(settings.vae, rngs=rngs)),
        text_encoders=(first, second),
        tokenizers=load_tokenizers(model, config),
    )


def load_base(
    model: Path, *, config: Path | None = None, dtype: str = "float32", sharding: ShardingRule | None = None
) -> StableDiffusionXL:
    """Load all of an SDXL; the VAE stays in fp32 where `dtype` is float16, which overflows in it."""
    settings = read_settings(model, config)
    return StableDiffusionXL(
        settings,
        unet=load_unet(model, settings, dtype=dtype, sharding=sharding),
        vae=load_vae(model, settings, dtype="float32" if dtype == "float16" else dtype, sharding=sharding),
        text_encoders=load_text_encoders(model, settings, dtype=dtype, sharding=sharding),
        tokenizers=load_tokenizers(model, config),
    )


def load_unet(
    model: Path, settings: Settings, *, dtype: str = "float32", sharding: ShardingRule | None = None
) -> UNet2DConditionModel:
    return _load(lambda rngs: UNet2DConditionModel(settings.unet, rngs=rngs), model, "unet", settings, dtype, sharding)


def load_vae(
    model: Path, settings: Settings, *, dtype: str = "float32", sharding: ShardingRule | None = None
) -> AutoencoderKL:
    return _load(lambda rngs: AutoencoderKL(settings.vae, rngs=rngs), model, "vae", settings, dtype, sharding)


def load_text_encoders(
    model: Path, settings: Settings, *, dtype: str = "float32", sharding: ShardingRule | None = None
) -> tuple[CLIPTextModel, CLIPTextModel]:
    first, second = (
        _load(lambda rngs, c=config: CLIPTextModel(c, rngs=rngs), model, part, settings, dtype, sharding)
        for part, config in zip(("text_encoder", "text_encoder_2"), settings.text, strict=True)
    )
    return first, second


def _load(
    make: Callable[[nnx.Rngs], M],
    model: Path,
    part: str,
    settings: Settings,
    dtype: str,
    sharding: ShardingRule | None,
) -> M:
    if model.is_dir():
        return load_module(make, model / part, dtype=dtype, sharding=sharding)
    with ExitStack() as stack:
        tensors = open_parts(model, settings, stack)[part]
        return fill(abstract(make), tensors, name=str(model), dtype=dtype, sharding=sharding)


def load_tokenizers(model: Path, config: Path | None = None) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """A file has no tokenizers: they are those of `config`, or CLIP's, of which the second pads with "!"."""
    folder = model if model.is_dir() else config
    first, second = (
        CLIPTokenizer.from_folder(folder / part)
        if folder is not None and (folder / part).is_dir()
        else CLIPTokenizer.of_clip(pad_token)
        for part, pad_token in zip(_TOKENIZERS, (EOS, "!"), strict=True)
    )
    return first, second


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
