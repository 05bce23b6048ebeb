"""From photos and prompts to images that keep the face and obey the text."""

import argparse
import contextlib
import hashlib
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infinite_id_jax.errors import InputError

if TYPE_CHECKING:
    from infinite_id_jax import Identity, InfiniteIDPipeline
    from infinite_id_jax.faces.extract import ExtractedFace
    from infinite_id_jax.output_folder import OutputFolder, Row


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 2 for unusable input, 3 for a photo without a face, 130 if interrupted."""
    args = parser().parse_args(argv)
    try:
        with _messages_as_lines():
            run(args)
    except KeyboardInterrupt:
        print("\nInterrupted: the same command goes on from here.", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        if isinstance(error, InputError):
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        print(f"error: {type(error).__name__}: {error} (this is a defect; --debug shows where)", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace) -> None:
    """Check all that can be checked, then load, encode, denoise and save."""
    prompts = read_prompts(args)
    check_options(args)
    faces = find_faces(args)
    folder, rows = plan(args, prompts, faces)
    todo = [row for row in rows if not folder.is_done(row, overwrite=args.overwrite)]
    total = f"{len(prompts)} prompts x {args.num_images} seeds x {folder.columns} identities"
    print(f"{total} = {len(rows) * folder.columns} images, {len(todo) * folder.columns} of them to be drawn.")
    if args.dry_run:
        print(f"Dry run: no weights were loaded and nothing was written to {args.output_dir}.")
        return
    folder.check_writable()
    if todo:
        pipe = load_pipeline(args)
        report_cut_words(pipe, prompts)
        draw(pipe, encode(pipe, args, faces), args, todo, folder)
    if args.save_aligned:
        save_aligned(faces, folder.path)
    heads = _pictures(faces) if folder.columns == len(faces) else []
    print(f"Done: {', '.join(map(str, folder.finish(rows, heads)))}")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.add_argument("--id-image", action="append", required=True, metavar="PHOTO", help="photo of a person; repeatable")
    prompt = p.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", action="append", help="what to draw; repeatable")
    prompt.add_argument("--prompts-file", metavar="FILE", help="one prompt a line")
    p.add_argument("--output-dir", required=True, metavar="DIR", help="for the PNGs, grid.png and manifest.json")
    p.add_argument("--model", required=True, metavar="PATH|HUB_ID", help="SDXL folder, or owner/name[@revision]")
    p.add_argument("--adapter", required=True, metavar="PATH", help="adapter folder")
    p.add_argument("--image-encoder", metavar="PATH", help="CLIP image encoder (default: image_encoder/ of the model)")
    p.add_argument("--negative-prompt", help='what not to draw (default: zero embeddings; "" is encoded)')
    p.add_argument("--num-images", type=int, default=1, metavar="N", help="per prompt, with seeds SEED, SEED+1, ...")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--steps", type=int, default=30)
    p.add_argument("--guidance-scale", type=float, default=5.0, help="1 or less turns guidance off (default 5)")
    p.add_argument("--guidance-rescale", type=float, default=0.0, help="0 to 1, against oversaturation (default 0)")
    p.add_argument("--height", type=int, help="pixels, a multiple of 8 (default: the model's)")
    p.add_argument("--width", type=int)
    p.add_argument("--scheduler", default="ddim", help="ddim, euler or dpm++ (default ddim)")
    p.add_argument("--batch-size", type=int, default=1, metavar="N", help="prompts drawn at once (default 1)")
    p.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 or auto: bfloat16 off the CPU")
    p.add_argument("--mesh", metavar="data=1,fsdp=1,tensor=1", help="divide the work over devices")
    p.add_argument("--dry-run", action="store_true", help="check everything, say what would be drawn, write nothing")
    p.add_argument("--overwrite", action="store_true", help="replace images of another run in the output folder")
    p.add_argument("--debug", action="store_true", help="show tracebacks")

    face = p.add_argument_group("identity")
    face.add_argument(
        "--id-mode", default="mix", choices=("mix", "grid"), help="several photos: one person, or a column each"
    )
    face.add_argument(
        "--id-weights", type=float, nargs="+", metavar="W", help="with mix: interpolate, weights sum to 1"
    )
    face.add_argument("--face-index", type=int, metavar="N", help="which face of a group photo; 0 is the largest")
    face.add_argument("--faces", default="auto", metavar="BACKEND", help="auto, offline or insightface (default auto)")
    face.add_argument("--download-faces", action="store_true", help="let insightface fetch its packs (non-commercial)")
    face.add_argument("--save-aligned", action="store_true", help="also save the aligned crops of the photos")

    method = p.add_argument_group("method")
    method.add_argument("--attention", default="mixed", help="mixed, mutual or off (default mixed)")
    method.add_argument("--style-merge", default="none", help="none, adain_mean (for style prompts) or adain")
    method.add_argument("--text-stream", default="own", help="own or shared latents (default own)")
    method.add_argument("--pooled-text", default="prompt", help="prompt or zeros, in the identity stream")
    method.add_argument("--no-cross-merge", action="store_true", help="keep text out of the identity's cross-attention")
    method.add_argument("--id-scale", type=float, default=1.0, help="weight of the identity (default 1)")
    method.add_argument("--text-scale", type=float, default=1.0, help="weight of the text (default 1)")
    method.add_argument("--step-range", type=_range, default=(0, None), metavar="A:B", help="steps of mixed attention")
    method.add_argument("--layer-range", type=_range, default=(0, None), metavar="A:B", help="its layers, in order")
    return p


def _range(text: str) -> tuple[int, int | None]:
    first, colon, last = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form A:B, A: or :B")
    return int(first or 0), int(last) if last else None


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Raises InputError for an empty prompt, or a file that is missing, empty or no text."""
    if args.prompts_file is None:
        if not all(prompt.strip() for prompt in args.prompt):
            raise InputError("--prompt is empty: say what to draw.")
        return args.prompt
    try:
        lines = Path(args.prompts_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts-file {args.prompts_file} cannot be read as text: {error}.") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"--prompts-file {args.prompts_file} holds no prompt: write one a line.")
    return prompts


def check_options(args: argparse.Namespace) -> None:
    """What needs no file. Raises InputError that names the option."""
    for name in ("num_images", "batch_size", "steps"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(args, name)}.")
    for name in ("height", "width"):
        if getattr(args, name) is not None and (getattr(args, name) < 8 or getattr(args, name) % 8):
            raise InputError(f"--{name} {getattr(args, name)} is not a multiple of 8.")
    if args.id_weights is not None and args.id_mode == "grid":
        raise InputError("--id-weights interpolates people and goes with --id-mode mix.")
    if args.id_weights is not None and len(args.id_weights) != len(args.id_image):
        raise InputError(f"{len(args.id_weights)} --id-weights for {len(args.id_image)} photos: give one for each.")


def find_faces(args: argparse.Namespace) -> list["ExtractedFace"]:
    """One face of each photo, before anything large is loaded."""
    from infinite_id_jax.faces.backends import get_backend
    from infinite_id_jax.faces.extract import extract_face
    from infinite_id_jax.faces.photo import open_photo

    photos = [open_photo(path) for path in args.id_image]
    backend = get_backend(args.faces, download=args.download_faces)
    faces = []
    for path, photo in zip(args.id_image, photos, strict=True):
        try:
            face = extract_face(photo, backend, face_index=args.face_index)
        except InputError as error:
            raise type(error)(f"{Path(path).name}: {error}") from None
        box = ", ".join(f"{x:.0f}" for x in face.face.box)
        print(f"{Path(path).name}: a face at ({box}), 1 of {face.count}, by {backend.name}.")
        faces.append(face)
    return faces


def plan(
    args: argparse.Namespace, prompts: list[str], faces: list["ExtractedFace"]
) -> tuple["OutputFolder", list["Row"]]:
    """Check models and options against each other, without weights; the folder and the rows of images to be."""
    from infinite_id_jax.diffusion.samplers import trajectory
    from infinite_id_jax.files import fingerprint
    from infinite_id_jax.output_folder import OutputFolder, Row
    from infinite_id_jax.weights.adapter import read_adapter_config
    from infinite_id_jax.weights.folder import read_settings, resolve

    args.model = resolve(args.model)
    base = read_settings(args.model)
    adapter = read_adapter_config(Path(args.adapter))
    adapter.check_fits(base.unet.cross_attention_dim)
    adapter.check_recogniser("in use", len(faces[0].embedding))
    trajectory(args.scheduler, base.schedule, args.steps)
    settings = {
        **method_options(args),
        "dtype": _dtype(args),
        "id_weights": args.id_weights,
        "model": fingerprint(args.model),
        "adapter": fingerprint(Path(args.adapter)),
        "faces": [_digest(face) for face in faces],
    }
    if args.image_encoder is not None:
        settings["image_encoder"] = fingerprint(Path(args.image_encoder))
    columns = len(faces) if args.id_mode == "grid" else 1
    rows = [Row(prompt, i, args.seed + n) for i, prompt in enumerate(prompts) for n in range(args.num_images)]
    return OutputFolder(Path(args.output_dir), settings, columns), rows


def method_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of the pipeline's call. Raises InputError for an unknown variant."""
    from infinite_id_jax.identity.config import Switches

    variant = {
        "attention": args.attention,
        "style_merge": args.style_merge,
        "cross_merge": not args.no_cross_merge,
        "text_stream": args.text_stream,
        "pooled_text": args.pooled_text,
        "step_range": args.step_range,
        "layer_range": args.layer_range,
    }
    Switches(**variant)
    numbers = ("height", "width", "steps", "guidance_scale", "guidance_rescale", "scheduler", "id_scale", "text_scale")
    return variant | {name: getattr(args, name) for name in numbers} | {"negative_prompt": args.negative_prompt}


def load_pipeline(args: argparse.Namespace) -> "InfiniteIDPipeline":
    from infinite_id_jax import InfiniteIDPipeline

    print(f"Loading {args.model.name} and the adapter {Path(args.adapter).name} ...")
    return InfiniteIDPipeline.from_pretrained(
        args.model, args.adapter, dtype=_dtype(args), mesh=args.mesh, image_encoder=args.image_encoder
    )


def _dtype(args: argparse.Namespace) -> str:
    if args.dtype != "auto":
        return args.dtype
    import jax

    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def report_cut_words(pipe: "InfiniteIDPipeline", prompts: Sequence[str]) -> None:
    """CLIP reads 77 tokens; say which words of a longer prompt it does not see."""
    for prompt in prompts:
        cut = pipe.cut_words(prompt)
        if cut:
            print(f'warning: the prompt "{prompt[:40]}..." is too long; these words are cut: {cut}', file=sys.stderr)


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
    from tqdm import tqdm

    size = min(args.batch_size, len(rows))
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    with tqdm(total=len(batches) * args.steps, unit="step", desc="Drawing") as bar:
        for number, batch in enumerate(batches):
            padded = batch + batch[-1:] * (size - len(batch))
            out = pipe(
                [row.prompt for row in padded],
                identities,
                seed=[row.seed for row in padded],
                progress=lambda step, done=number * args.steps: bar.update(done + step - bar.n),
                **method_options(args),
            )
            for p, row in enumerate(batch):
                folder.save(row, out.images[p * len(identities) : (p + 1) * len(identities)])


def save_aligned(faces: list["ExtractedFace"], folder: Path) -> None:
    """The crops that the two encoders saw."""
    from PIL import Image

    for i, face in enumerate(faces):
        Image.fromarray(face.clip_crop).save(folder / f"aligned{i}-clip.png")
        Image.fromarray(face.recogniser_crop).save(folder / f"aligned{i}-recogniser.png")


def _pictures(faces: list["ExtractedFace"]) -> list[Any]:
    from PIL import Image

    return [Image.fromarray(face.clip_crop) for face in faces]


def _digest(face: "ExtractedFace") -> str:
    """Tells photos apart in the request without saying anything of them."""
    return hashlib.sha256(face.clip_crop.tobytes() + face.embedding.tobytes()).hexdigest()[:16]


@contextlib.contextmanager
def _messages_as_lines() -> Iterator[None]:
    """Warnings and log messages as one line each, for a person to read."""
    logging.basicConfig(format="note: %(message)s", level=logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        yield


if __name__ == "__main__":
    sys.exit(main())
