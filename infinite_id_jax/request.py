"""What was asked on the command line, checked in seconds, before anything slow is started."""

import argparse
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from infinite_id_jax.errors import CutPromptWarning, InputError, finite
from infinite_id_jax.files import miniature
from infinite_id_jax.stable_diffusion.config import MAX_SIDE

if TYPE_CHECKING:
    from infinite_id_jax.faces.extract import ExtractedFace
    from infinite_id_jax.identity.features import Needs


def fill_in(args: argparse.Namespace) -> None:
    """The miniature's own adapter and face backend. Raises InputError without its weights, or without an adapter."""
    if args.model == "miniature":
        args.adapter = args.adapter or str(miniature() / "adapter")
        args.faces = "miniature" if args.faces == "auto" else args.faces
    if args.adapter is None:
        raise InputError("--adapter is missing: name an adapter's folder, or a published adapter's file.")


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Raises InputError for an empty prompt, or a file that is missing, empty or no text."""
    if args.prompts_file is None:
        prompts = args.prompt
        if not all(prompt.strip() for prompt in prompts):
            raise InputError("--prompt is empty: say what to draw.")
    else:
        prompts = _lines(Path(args.prompts_file))
    for text in [*prompts, args.negative_prompt or ""]:
        try:
            text.encode()
        except UnicodeEncodeError:  # what a shell hands over when the bytes are not UTF-8
            raise InputError(f"The prompt {text!r} is not valid Unicode: write it in UTF-8.") from None
    return prompts


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"--prompts-file {file} cannot be read ({error.strerror}): check the path.") from None
    except UnicodeDecodeError:
        raise InputError(f"--prompts-file {file} is not text in UTF-8: save it as UTF-8.") from None
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise InputError(f"--prompts-file {file} holds no prompt: write one a line.")
    return prompts


def check_options(args: argparse.Namespace) -> None:
    """What needs no file. Raises InputError that names the option."""
    for name in ("num_images", "batch_size", "steps", "cache_interval"):
        if getattr(args, name) < 1:
            raise InputError(f"{_flag(name)} {getattr(args, name)} is too small: give 1 or more.")
    for name in ("height", "width"):
        pixels = getattr(args, name)
        if pixels is not None and pixels > MAX_SIDE:
            raise InputError(f"{_flag(name)} {pixels} is more than {MAX_SIDE}: SDXL draws about 1024 pixels a side.")
        if pixels is not None and (pixels < 8 or pixels % 8):
            raise InputError(f"{_flag(name)} {pixels} is not a multiple of 8: take {max(8, round(pixels / 8) * 8)}.")
    for name in ("guidance_scale", "guidance_rescale", "text_scale"):
        finite(_flag(name), getattr(args, name))
    if not isinstance(args.id_scale, dict):  # whose numbers are looked at where the model's blocks are known
        finite("--id-scale", args.id_scale)
    for name in ("step_range", "layer_range", "guidance_range"):
        first, end = getattr(args, name)
        if first < 0 or (end is not None and end < first):
            raise InputError(f"{_flag(name)} {first}:{'' if end is None else end} is no range: give A:B, 0 <= A <= B.")
    for file, scale in args.lora:
        finite(f"The scale of --lora {file}", scale)
    if not 0 <= args.guidance_rescale <= 1:
        raise InputError(f"--guidance-rescale {args.guidance_rescale} is out of range: give 0 to 1.")
    if args.seed < 0 or args.seed + args.num_images > 2**32:
        last = f" to {args.seed + args.num_images - 1}" if args.num_images > 1 else ""
        raise InputError(f"--seed {args.seed}{last} is out of range: seeds lie between 0 and {2**32 - 1}.")
    if args.id_weights is not None:
        _check_id_weights(args)
    if args.face_index is not None and len(args.face_index) not in (1, len(args.id_image)):
        count = f"{len(args.face_index)} numbers for {len(args.id_image)} photos"
        raise InputError(f"--face-index has {count}: give one for all, or one for each.")


def _check_id_weights(args: argparse.Namespace) -> None:
    weights = args.id_weights
    if args.id_mode == "grid":
        raise InputError("--id-weights has no meaning in a grid: it interpolates people with --id-mode mix.")
    if len(weights) != len(args.id_image):
        raise InputError(f"--id-weights has {len(weights)} numbers for {len(args.id_image)} photos: give one for each.")
    if not math.isclose(sum(weights), 1.0, abs_tol=1e-4):
        raise InputError(f"--id-weights sum to {sum(weights):g}: make them sum to 1.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def find_model(args: argparse.Namespace, faces: list["ExtractedFace"]) -> Path:
    """The model's folder, after checking it, the adapter, the faces and the devices against each other without weights.

    Raises InputError for what does not fit, and for a weight file that is missing or cut short.
    """
    from infinite_id_jax.conditioning import DTYPES, check_dtype
    from infinite_id_jax.diffusion.samplers import trajectory
    from infinite_id_jax.identity.config import check_reach
    from infinite_id_jax.identity.inject import block_names
    from infinite_id_jax.identity.scales import layer_scales
    from infinite_id_jax.sharding import make_mesh
    from infinite_id_jax.stable_diffusion.quantized import checked_kind
    from infinite_id_jax.weights.adapter import check_adapter
    from infinite_id_jax.weights.folder import describe_base, resolve
    from infinite_id_jax.weights.load import check_headers
    from infinite_id_jax.weights.lora import checked_loras, read_lora

    checked_kind(args.quantization)
    if args.dtype not in ("auto", *DTYPES):
        raise InputError(f"--dtype {args.dtype} is unknown: choose auto, {', '.join(DTYPES)}.")
    if args.dtype != "auto":
        check_dtype(args.dtype)
    make_mesh(args.mesh)
    model, adapter_path = resolve(args.model), Path(args.adapter)
    described = describe_base(model, _model_config(args))
    base, adapter = described.settings, check_adapter(adapter_path, described.unet)
    with warnings.catch_warnings():
        if not args.dry_run:
            warnings.simplefilter("ignore")  # what there is to say of a file is said when it is loaded
        for file in checked_loras([file for file, _ in args.lora]):
            read_lora(Path(file), described)
    layers = block_names(described.unet)
    layer_scales(layers, args.id_scale)
    ranges = {name: getattr(args, name) for name in ("guidance_range", "step_range", "layer_range")}
    check_reach(args.steps, len(layers), **ranges)
    trajectory(args.scheduler, base.schedule, args.steps)
    adapter.check_recogniser(faces[0].recogniser or "in use", len(faces[0].embedding))
    image_encoder = None
    if adapter.needs.clip_dim:
        image_encoder = image_encoder_folder(args, model)
        _check_image_encoder(image_encoder, adapter.needs)
    print(f"{adapter_path.name}: {adapter.describe()}.")
    # The header of a single file has been read with its settings.
    parts = [model / part for part in ("unet", "vae", "text_encoder", "text_encoder_2")] if model.is_dir() else []
    check_headers(parts if image_encoder is None else [*parts, image_encoder])
    # A folder's own size stands for none, so that both say the same of an image.
    args.height, args.width = (size or base.unet.sample_size * base.vae.downscale for size in (args.height, args.width))
    return model


def _model_config(args: argparse.Namespace) -> Path | None:
    return None if args.model_config is None else Path(args.model_config)


def image_encoder_folder(args: argparse.Namespace, model: Path) -> Path:
    """Where the CLIP image encoder is: in the model's folder, or beside its single file."""
    if args.image_encoder is not None:
        return Path(args.image_encoder)
    from infinite_id_jax.weights.folder import image_encoder_beside

    return image_encoder_beside(model)


def _check_image_encoder(folder: Path, needs: "Needs") -> None:
    from infinite_id_jax.stable_diffusion.config import CLIPVisionConfig

    if not folder.is_dir():
        raise InputError(f"There is no CLIP image encoder at {folder}: name its folder with --image-encoder.")
    config = CLIPVisionConfig.from_json(folder / "config.json")
    width = config.projection_dim if needs.clip_layer == "pooled" else config.hidden_size
    if width != needs.clip_dim:
        what = "whose pooled embedding has" if needs.clip_layer == "pooled" else "of"
        raise InputError(
            f"The adapter was trained on a CLIP image encoder {what} width {needs.clip_dim} and {folder} has {width}: "
            "name the right one with --image-encoder (ViT-bigG/14 has hidden states of 1664 and pooled embeddings of "
            "1280, ViT-H/14 1280 and 1024)."
        )


def report_cut_words(args: argparse.Namespace, model: Path, texts: Sequence[str]) -> None:
    """CLIP reads 77 tokens; say which words of a longer text it does not see."""
    from infinite_id_jax.stable_diffusion.tokenizer import unseen_words
    from infinite_id_jax.weights.folder import load_tokenizers

    tokenizers = load_tokenizers(model, _model_config(args))
    for text in dict.fromkeys(texts):
        cut = unseen_words(tokenizers, text)
        if cut:
            print(f"warning: {CutPromptWarning(text, cut)}", file=sys.stderr)
