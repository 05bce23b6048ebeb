"""From photos and prompts to images that keep the face and obey the text."""

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infinite_id_jax.command_line import exit_code, keep_compiled
from infinite_id_jax.errors import CutPromptWarning, InputError, NoFaceError
from infinite_id_jax.request import (
    check_options,
    fill_in,
    find_model,
    image_encoder_folder,
    read_prompts,
    report_cut_words,
)

if TYPE_CHECKING:
    from infinite_id_jax import Identity, InfiniteIDPipeline, Output
    from infinite_id_jax.faces.extract import ExtractedFace
    from infinite_id_jax.output_folder import OutputFolder, Row


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 2 for unusable input, 3 for a photo without a face, 130 if interrupted."""
    args = parser().parse_args(argv)
    return exit_code(
        lambda: run(args),
        debug=args.debug,
        interrupted="the same command goes on from here.",
        smaller="take a smaller --height and --width, a --batch-size of 1 or --dtype bfloat16.",
    )


def run(args: argparse.Namespace) -> int:
    """Check all that can be checked, then load, encode, denoise and save."""
    fill_in(args)
    prompts = read_prompts(args)
    check_options(args)
    faces = find_faces(args)
    model = find_model(args, faces)
    report_cut_words(args, model, [*prompts, args.negative_prompt or ""])
    folder, rows = plan(args, model, prompts, faces)
    todo = folder.missing(rows, overwrite=args.overwrite)
    total = f"{len(prompts)} prompts x {args.num_images} seeds x {folder.columns} identities"
    print(f"{total} = {len(rows) * folder.columns} images, {len(todo) * folder.columns} of them to be drawn.")
    if args.dry_run:
        print(f"Dry run: no weights were loaded and nothing was written to {args.output_dir}.")
        return 0
    folder.probe()
    pipe, identities = None, []
    if todo:
        from infinite_id_jax.people import checked_people

        keep_compiled()
        pipe = load_pipeline(args, model)
        identities = checked_people(encode(pipe, args, faces), args.style_merge)
    folder.prepare(rows)  # now that nothing is left to be refused
    if args.save_aligned:
        save_aligned(faces, Path(args.adapter), folder.path)
    if pipe is not None:
        draw(pipe, identities, args, todo, folder)
    heads = _pictures(faces) if folder.columns == len(faces) else []
    print(f"Done: {', '.join(map(str, folder.finish(rows, heads)))}")
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.add_argument("--id-image", action="append", required=True, metavar="PHOTO", help="photo of a person; repeatable")
    prompt = p.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", action="append", help="what to draw; repeatable")
    prompt.add_argument("--prompts-file", metavar="FILE", help="one prompt a line")
    p.add_argument("--output-dir", required=True, metavar="DIR", help="for the PNGs, grid.png and manifest.json")
    p.add_argument(
        "--model", required=True, metavar="PATH|HUB_ID", help="SDXL folder or file, owner/name[@revision], or miniature"
    )
    p.add_argument("--model-config", metavar="DIR", help="configurations of a single file that are not SDXL 1.0's")
    p.add_argument(
        "--lora", action="append", type=_lora, default=[], metavar="FILE[=SCALE]", help="LoRA for the model; repeatable"
    )
    p.add_argument("--adapter", metavar="PATH", help="adapter folder, or a published file (the miniature has its own)")
    p.add_argument("--image-encoder", metavar="PATH", help="CLIP image encoder (default: image_encoder/ of the model)")
    p.add_argument("--negative-prompt", help='what not to draw (default: zero embeddings; "" is encoded)')
    p.add_argument("--num-images", type=int, default=1, metavar="N", help="per prompt, with seeds SEED, SEED+1, ...")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the first image of each prompt (default 0)")
    p.add_argument("--steps", type=int, default=30, metavar="N", help="of the sampler (default 30)")
    p.add_argument("--guidance-scale", type=float, default=5.0, help="1 or less turns guidance off (default 5)")
    p.add_argument("--guidance-rescale", type=float, default=0.0, help="0 to 1, against oversaturation (default 0)")
    p.add_argument(
        "--guidance-range", type=_range, default=(0, None), metavar="A:B", help="steps with guidance (default all)"
    )
    p.add_argument(
        "--cache-interval", type=int, default=1, metavar="N", help="run the U-Net's inner levels every N steps"
    )
    p.add_argument("--height", type=int, help="pixels, a multiple of 8 (default: the model's)")
    p.add_argument("--width", type=int, help="as --height")
    p.add_argument("--scheduler", default="ddim", help="ddim, euler or dpm++ (default ddim)")
    p.add_argument("--batch-size", type=int, default=1, metavar="N", help="prompts and seeds drawn at once (default 1)")
    p.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 or auto: bfloat16 off the CPU")
    p.add_argument("--quantization", default="none", help="8-bit products in the U-Net: int8 or float8 (default none)")
    p.add_argument("--mesh", metavar="data=1,fsdp=1,tensor=1", help="divide the work over devices")
    p.add_argument("--dry-run", action="store_true", help="check everything, say what would be drawn, draw nothing")
    p.add_argument("--overwrite", action="store_true", help="replace images of another run in the output folder")
    p.add_argument("--debug", action="store_true", help="show tracebacks")

    face = p.add_argument_group("identity")
    face.add_argument(
        "--id-mode", default="mix", choices=("mix", "grid"), help="several photos: one person, or a column each"
    )
    face.add_argument(
        "--id-weights", type=float, nargs="+", metavar="W", help="with mix: interpolate, weights sum to 1"
    )
    face.add_argument(
        "--face-index", type=int, nargs="+", metavar="N", help="which face of each photo, or of all; 0 is the largest"
    )
    face.add_argument(
        "--faces", default="auto", metavar="BACKEND", help="auto, offline, insightface, insightface/PACK, miniature"
    )
    face.add_argument("--download-faces", action="store_true", help="let insightface fetch its packs (non-commercial)")
    face.add_argument("--save-aligned", action="store_true", help="also save the aligned crops of the photos")

    method = p.add_argument_group("method")
    method.add_argument(
        "--streams", default="two", help="two (Infinite-ID), or one: as published IP-Adapters sample (default two)"
    )
    method.add_argument("--attention", default="mixed", help="mixed, mutual or off (default mixed)")
    method.add_argument(
        "--style-merge", default="none", help="none, adain_mean (for style prompts) or adain (default none)"
    )
    method.add_argument("--text-stream", default="own", help="own or shared latents (default own)")
    method.add_argument(
        "--pooled-text", default="prompt", help="prompt or zeros, in the identity stream (default prompt)"
    )
    method.add_argument("--no-cross-merge", action="store_true", help="keep text out of the identity's cross-attention")
    method.add_argument(
        "--id-scale",
        type=_id_scale,
        default=1.0,
        metavar="X|JSON",
        help='weight of the identity (default 1), or of single blocks as {"up": {"block_0": [0, 1, 0]}}',
    )
    method.add_argument("--text-scale", type=float, default=1.0, help="weight of the text (default 1)")
    method.add_argument("--step-range", type=_range, default=(0, None), metavar="A:B", help="steps of mixed attention")
    method.add_argument("--layer-range", type=_range, default=(0, None), metavar="A:B", help="its layers, in order")
    return p


def _range(text: str) -> tuple[int, int | None]:
    try:
        first, last = text.split(":")
        return int(first or 0), int(last) if last else None
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form A:B, A: or :B") from None


def _id_scale(text: str) -> float | dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if isinstance(value, dict):
        return value
    try:
        return float(value)
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a JSON object of blocks") from None


def _lora(text: str) -> tuple[str, float]:
    """A path may hold a "=" of its own; a scale is a number after the last one."""
    file, equals, scale = text.rpartition("=")
    try:
        return (file, float(scale)) if equals else (text, 1.0)
    except ValueError:
        return text, 1.0


def find_faces(args: argparse.Namespace) -> list["ExtractedFace"]:
    """One face of each photo, before anything large is loaded."""
    from infinite_id_jax.faces.backends import get_backend
    from infinite_id_jax.faces.extract import extract_face
    from infinite_id_jax.faces.photo import open_photo

    photos = [open_photo(path) for path in args.id_image]
    backend = get_backend(args.faces, download=args.download_faces)
    given = args.face_index or [None]
    indices = given * len(photos) if len(given) == 1 else given
    faces = []
    for path, photo, index in zip(args.id_image, photos, indices, strict=True):
        with _naming(Path(path).name):
            face = extract_face(photo, backend, face_index=index)
        box = ", ".join(f"{x:.0f}" for x in face.face.box)
        print(f"{Path(path).name}: face {index or 0} of {face.count}, at ({box}), by {backend.name}.")
        faces.append(face)
    return faces


def plan(
    args: argparse.Namespace, model: Path, prompts: list[str], faces: list["ExtractedFace"]
) -> tuple["OutputFolder", list["Row"]]:
    """The folder and the rows of images to be."""
    from infinite_id_jax.files import fingerprint
    from infinite_id_jax.output_folder import OutputFolder, Row
    from infinite_id_jax.weights.lora import files_of

    settings = {
        **method_options(args),
        "dtype": _dtype(args),
        "quantization": args.quantization,
        "id_mode": args.id_mode,
        "id_weights": args.id_weights,
        "model": fingerprint(model),
        "model_config": None if args.model_config is None else fingerprint(Path(args.model_config)),
        "lora": [[*map(fingerprint, files_of(Path(file))), scale] for file, scale in args.lora],
        "adapter": fingerprint(Path(args.adapter)),
        "image_encoder": fingerprint(image_encoder_folder(args, model)),
        "faces": [_digest(face) for face in faces],
    }
    columns = len(faces) if args.id_mode == "grid" else 1
    rows = [Row(prompt, i, args.seed + n) for i, prompt in enumerate(prompts) for n in range(args.num_images)]
    return OutputFolder(Path(args.output_dir), settings, columns), rows


def method_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of the pipeline's call. Raises InputError for an unknown variant."""
    from infinite_id_jax.identity.config import Switches

    variant = {
        "streams": args.streams,
        "attention": args.attention,
        "style_merge": args.style_merge,
        "cross_merge": not args.no_cross_merge,
        "text_stream": args.text_stream,
        "pooled_text": args.pooled_text,
        "step_range": args.step_range,
        "layer_range": args.layer_range,
    }
    Switches(**variant)
    same = ("height", "width", "steps", "scheduler", "id_scale", "text_scale", "negative_prompt")
    same += ("guidance_scale", "guidance_rescale", "guidance_range", "cache_interval")
    return variant | {name: getattr(args, name) for name in same}


def load_pipeline(args: argparse.Namespace, model: Path) -> "InfiniteIDPipeline":
    from infinite_id_jax import InfiniteIDPipeline

    print(f"Loading {args.model} and the adapter {args.adapter} ...")
    return InfiniteIDPipeline.from_pretrained(
        model,
        args.adapter,
        dtype=_dtype(args),
        mesh=args.mesh,
        image_encoder=image_encoder_folder(args, model),
        config=args.model_config,
        lora=dict(args.lora),
        quantization=args.quantization,
    )


def _dtype(args: argparse.Namespace) -> str:
    if args.dtype != "auto":
        return args.dtype
    import jax

    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def encode(pipe: "InfiniteIDPipeline", args: argparse.Namespace, faces: list["ExtractedFace"]) -> list["Identity"]:
    """One identity of all photos (mix), or one of each (grid)."""
    identities = [pipe.encode_identity(face) for face in faces]
    if args.id_mode == "grid" or len(identities) == 1:
        return identities
    return [pipe.mix_identities(identities, args.id_weights)]


def draw(
    pipe: "InfiniteIDPipeline",
    identities: list["Identity"],
    args: argparse.Namespace,
    rows: list["Row"],
    folder: "OutputFolder",
) -> None:
    """Sample in batches of equal size, so that one program serves all, and save each batch when it is done."""
    import jax
    from tqdm import tqdm

    size = min(args.batch_size, len(rows))
    # JAX keeps no compiled program that reports its steps: only where they take long are they worth it.
    reports = jax.default_backend() == "cpu"
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    # XLA does not come back before a batch ends; in a thread of its own it lets this one hear Ctrl-C.
    worker = ThreadPoolExecutor(1)
    with tqdm(total=len(batches) * args.steps, unit="step", desc="Drawing") as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore", CutPromptWarning)  # told before the model was loaded

        def start(number: int) -> "Future[Output]":
            def show(step: int) -> None:
                bar.update(number * args.steps + step - bar.n)

            padded = batches[number] + batches[number][-1:] * (size - len(batches[number]))
            prompts, seeds = [row.prompt for row in padded], [row.seed for row in padded]
            options = {"seed": seeds, "progress": show if reports else None, **method_options(args)}
            return worker.submit(pipe, prompts, identities, **options)

        coming = start(0)
        for number, batch in enumerate(batches, start=1):
            images = list(coming.result().images or ())
            bar.update(number * args.steps - bar.n)
            if number < len(batches):
                coming = start(number)  # it is drawn while these are saved
            for p, row in enumerate(batch):
                folder.save(row, images[p * len(identities) : (p + 1) * len(identities)])


def save_aligned(faces: list["ExtractedFace"], adapter: Path, folder: Path) -> None:
    """The crops that the two encoders saw."""
    from PIL import Image

    from infinite_id_jax.files import replacing
    from infinite_id_jax.weights.adapter import read_adapter_config

    tight = read_adapter_config(adapter).needs.arcface_crop
    for i, face in enumerate(faces):
        seen = face.arcface_crop if tight else face.clip_crop
        for name, crop in (("clip", seen), ("recogniser", face.recogniser_crop)):
            with replacing(folder / f"aligned{i}-{name}.png") as beside:
                Image.fromarray(crop).save(beside, format="png")


def _pictures(faces: list["ExtractedFace"]) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(face.clip_crop) for face in faces]


def _digest(face: "ExtractedFace") -> str:
    """Tells photos apart in the request without saying anything of them."""
    return hashlib.sha256(face.clip_crop.tobytes() + face.embedding.tobytes()).hexdigest()[:16]


@contextlib.contextmanager
def _naming(photo: str) -> Iterator[None]:
    """Put the photo's name before what is said of it."""
    with warnings.catch_warnings(record=True) as caught:
        try:
            yield
        except NoFaceError as error:
            raise NoFaceError(f"{photo}: {error}") from None
        except InputError as error:
            raise InputError(f"{photo}: {error}") from None
    for warning in caught:
        print(f"warning: {photo}: {warning.message}", file=sys.stderr)


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what a terminal cannot show
    code = main()
    if code:
        sys.stdout.flush()
        os._exit(code)  # without waiting for the batch that is under way
    sys.exit(code)
