"""From photos of people to records that training reads: faces, CLIP features and latents.

python -m data_pipeline --input PHOTOS --output D --model SDXL [options] [-- options of the Beam runner]
"""

import argparse
import dataclasses
import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infinite_id_jax.command_line import INTERRUPTED
from infinite_id_jax.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from data_pipeline.config import PipelineConfig
    from data_pipeline.pipeline import Job
    from data_pipeline.sources import Source


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 2 for unusable input or a disk that refuses, 130 if interrupted."""
    args = parse(argv)
    _configure_logging(debug=args.debug)
    try:
        run(args)
    except (Exception, KeyboardInterrupt) as error:
        if _was_interrupted(error):
            print("\nInterrupted: the same command goes on from here.", file=sys.stderr)
            return INTERRUPTED
        if args.debug:
            traceback.print_exc()
        sentence, code = _explained(error) or (None, 1)
        if sentence is not None:
            print(f"error: {sentence}", file=sys.stderr)
            return code
        print(f"error: {type(error).__name__}: {error} (this is a defect; --debug shows where)", file=sys.stderr)
        return 1
    return 0


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; what stands after `--` is for the Beam runner."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser().parse_args(argv[:cut])
    args.runner_options = argv[cut + 1 :]
    return args


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m data_pipeline", description=__doc__.splitlines()[0] if __doc__ else None, allow_abbrev=False
    )
    p.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PHOTOS",
        help="a folder of a folder per person, a .csv or .parquet with columns path and person, WebDataset archives "
        "x-{0000..0009}.tar, or tfds:NAME",
    )
    p.add_argument("--output", required=True, metavar="D", help="for the records, provenance.jsonl and summary.json")
    p.add_argument("--model", required=True, metavar="PATH|HUB_ID", help="SDXL folder with vae/ and image_encoder/")
    p.add_argument(
        "--face-backend",
        default="auto",
        metavar="NAME",
        help="auto, offline, insightface or insightface/PACK (default auto)",
    )
    p.add_argument("--download-faces", action="store_true", help="let insightface fetch its packs (non-commercial)")
    p.add_argument("--runner", default="DirectRunner", help="any Beam runner (default DirectRunner, in this process)")
    p.add_argument("--dry-run", action="store_true", help="check everything, count the input, write nothing")
    p.add_argument("--debug", action="store_true", help="show tracebacks and what Beam says")

    content = p.add_argument_group("what the records hold (fixed once a folder is begun)")
    content.add_argument(
        "--resolutions", type=_sizes, metavar="512,1024", help="sizes of the target pictures (default both)"
    )
    content.add_argument(
        "--id-features", metavar="cached|on_device", help="store CLIP's features, or only the crops (default cached)"
    )
    content.add_argument("--clip-layer", metavar="last|penultimate", help="of CLIP's hidden states (default last)")
    content.add_argument("--dtype", metavar="float32|bfloat16", help="of the encoders (default float32)")
    content.add_argument("--batch-size", type=int, metavar="N", help="photos encoded at once (default 8)")
    content.add_argument("--validation-share", type=float, metavar="SHARE", help="of the people (default 0.02)")
    content.add_argument("--photos-per-shard", type=int, metavar="N", help="about that many (default 256)")

    kept = p.add_argument_group("which photos are kept")
    kept.add_argument("--min-photos", type=int, metavar="N", help="of a person (default 2)")
    kept.add_argument("--min-face", type=int, metavar="PX", help="shorter side of the face (default 48)")
    kept.add_argument("--min-score", type=float, metavar="SCORE", help="of the face detector (default 0.6)")
    kept.add_argument(
        "--similarity", type=float, metavar="COSINE", help="to the person's mean face (default: by backend)"
    )
    kept.add_argument("--near-duplicate", type=int, metavar="BITS", help="of 64 that may differ (default 4, -1: off)")
    return p


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(size) for size in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 512,1024") from None


def run(args: argparse.Namespace) -> None:
    """Check all that can be checked, then do what is missing and say what became of the photos."""
    from data_pipeline.config import check_same, save
    from data_pipeline.provenance import histogram
    from data_pipeline.sources import list_sources

    sources = list_sources(args.input)
    people = {source.row.person for source in sources if not source.row.reason}
    print(f"{len(sources)} photos of {len(people)} people.", file=sys.stderr)
    job = make_job(args, sources)
    check_same(job.config, job.folder)
    pipeline = _import_pipeline()
    pipeline.make_pipeline(args.runner, args.runner_options)
    if args.dry_run:
        print(f"Dry run: no photo was opened and nothing was written to {args.output}.")
        return
    save(job.config, job.folder)
    summary = pipeline.run(job, sources, args.runner, args.runner_options)
    print(histogram(summary))


def make_job(args: argparse.Namespace, sources: Sequence["Source"]) -> "Job":
    """Configuration and paths, checked without weights. Raises InputError for what does not fit."""
    from data_pipeline.config import model_fingerprint, read_configs, read_spec
    from data_pipeline.faces import recogniser_size
    from data_pipeline.sources import digest
    from infinite_id_jax.faces.backends import get_backend
    from infinite_id_jax.weights.folder import resolve
    from infinite_id_jax.weights.load import check_headers

    model = resolve(args.model)
    read_configs(model)
    backend = get_backend(args.face_backend, download=args.download_faces)
    config = _configuration(args, digest(sources), model_fingerprint(model), backend.name)
    spec = read_spec(model, config, backend.embedding_dim, recogniser_size(backend))
    check_headers(model / part for part in ("vae", "image_encoder"))
    # Workers may have another working directory.
    return _import_pipeline().Job(Path(args.output).absolute(), model.absolute(), config, spec)


def _configuration(args: argparse.Namespace, sources: str, model: str, backend: str) -> "PipelineConfig":
    from data_pipeline.config import SIMILARITY, PipelineConfig

    names = {field.name for field in dataclasses.fields(PipelineConfig)} - {"input", "model", "face_backend"}
    given: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "similarity" not in given:
        if (family := backend.partition("/")[0]) not in SIMILARITY:
            raise InputError(
                f"How alike two photos of one person are to {backend} is not known: give --similarity, a cosine."
            )
        given["similarity"] = SIMILARITY[family]
    return PipelineConfig(input=sources, model=model, face_backend=backend, **given)


def _import_pipeline() -> Any:
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # Beam's imports complain of parts of it that we do not use
    try:
        from data_pipeline import pipeline
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "apache_beam":
            raise
        raise MissingExtraError("The offline stage", "data") from None
    finally:
        logging.disable(disabled)
    return pipeline


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is at the root of an error: Beam raises another one in its place."""
    return error is not None and (isinstance(error, KeyboardInterrupt) or _was_interrupted(error.__context__))


def _explained(error: BaseException) -> tuple[str, int] | None:
    """Sentence and exit code of what the user can mend: Beam adds the step's name, or it is text of another process."""
    if isinstance(error, InputError):
        return re.sub(r" \[while running '.*", "", str(error), flags=re.DOTALL), error.exit_code
    found = re.findall(r"\.(?:Input|Photo|MissingExtra)Error: (.+?)(?: \[while running|$)", str(error), re.MULTILINE)
    if found:
        return found[-1], InputError.exit_code
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "The memory is full: take a smaller --batch-size, or --dtype bfloat16.", InputError.exit_code
    return None


def _configure_logging(*, debug: bool) -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("data_pipeline").setLevel(logging.INFO)
    if not debug:
        logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
        logging.getLogger("apache_beam.options").setLevel(logging.WARNING)  # which knows misspelt options


if __name__ == "__main__":
    code = main()
    if code == INTERRUPTED:
        sys.stdout.flush()
        os._exit(code)  # without waiting for the shard that was interrupted
    sys.exit(code)
