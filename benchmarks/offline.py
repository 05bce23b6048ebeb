"""The offline stage by its parts: photos a second of each, and where the time of a photo goes.

python -m benchmarks.offline [--photos N] [--side PX] [--resolution PX] [--model PATH] [--json FILE]

The photos are one portrait (NASA's of Eileen Collins, from scikit-image) turned, mirrored and cropped; without --model
the encoders are of the examples' tiny size, so that the table shows the rest. Each part runs alone over all photos,
then the whole runs through Beam in this process, as the command does. `--hostile N` instead sends N damaged or
malicious inputs through the command and counts what becomes of them.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
from PIL import Image, ImageOps

from benchmarks.meter import Meter
from data_pipeline import __main__ as command
from data_pipeline import ingest, pipeline
from data_pipeline.faces import FoundFace, find_face
from data_pipeline.features import Encoders
from data_pipeline.identities import verify_people
from data_pipeline.records import write_shard
from data_pipeline.sources import Source, list_sources
from data_pipeline.targets import cut_target
from examples.tiny_sdxl import write_model
from infinite_id_jax.errors import InputError
from infinite_id_jax.faces.align import clip_crop
from infinite_id_jax.faces.backends import get_backend
from infinite_id_jax.faces.extract import detect_faces
from infinite_id_jax.faces.photo import open_photo
from infinite_id_jax.files import save_json

PHOTOS_PER_PERSON = 6


def write_photos(folder: Path, count: int, side: int) -> None:
    """`count` JPEGs of `side` pixels, no two alike, of made-up people with one face."""
    rng = np.random.default_rng(0)
    portrait = Image.fromarray(skimage.data.astronaut()).crop((70, 0, 400, 330))
    for i in range(count):
        person = folder / f"person {i // PHOTOS_PER_PERSON}"
        person.mkdir(parents=True, exist_ok=True)
        picture = ImageOps.mirror(portrait) if i % 2 else portrait
        picture = picture.rotate(float(rng.uniform(-25, 25)), fillcolor=tuple(rng.integers(0, 255, 3).tolist()))
        left, top, right, bottom = (int(x) for x in rng.integers(0, 25, 4))
        picture = picture.crop((left, top, 330 - right, 330 - bottom)).resize((side, side))
        picture.save(person / f"{i}.jpg", quality=90)


def measure(job: pipeline.Job, sources: Sequence[Source], meter: Meter) -> list[FoundFace]:
    """Time each part over all photos; returns the faces that are kept."""
    with meter.phase("read, sha256"):
        contents = [ingest.read_bytes(source) for source in sources]
        hashes = [hashlib.sha256(content).hexdigest() for content in contents]
    assert len(set(hashes)) == len(sources)
    with meter.phase("decode, three times"):  # to check it, to find the face, to encode it
        photos, _, _ = ([open_photo(content) for content in contents] for _ in range(3))
    with meter.phase("perceptual hash"):
        _ = [ingest.difference_hash(photo) for photo in photos]
    backend = get_backend(job.config.face_backend)
    with meter.phase("detect"):
        faces = [detect_faces(photo, backend)[0] for photo in photos]
    with meter.phase("align, crop"):
        crops = [backend.align(photo, face) for photo, face in zip(photos, faces, strict=True)]
        _ = [clip_crop(photo, face, job.spec.clip_size) for photo, face in zip(photos, faces, strict=True)]
    with meter.phase("recognise"):
        _ = [backend.embed(crop) for crop in crops]
    examined = [dataclasses.replace(source, row=ingest.examine(source)) for source in sources]
    results = [find_face(source, backend, job.config, job.spec.clip_size) for source in examined]
    found = [face for face in results if isinstance(face, FoundFace)]
    with meter.phase("verify"):
        kept, _ = verify_people(found, job.config)
    size, batch = job.config.resolutions[0], job.config.batch_size
    by_index = {source.row.index: photo for source, photo in zip(sources, photos, strict=True)}
    with meter.phase("cut target"):
        pictures = [cut_target(by_index[face.row.index], face.box, size).picture for face in kept]
    encoders = Encoders(job.model, job.config)
    encoders.posterior(pictures[:1])  # compiles
    encoders.hidden_states([kept[0].clip_crop])
    with meter.phase("VAE"):
        for start in range(0, len(kept), batch):
            encoders.posterior(pictures[start : start + batch])
    with meter.phase("CLIP"):
        for start in range(0, len(kept), batch):
            encoders.hidden_states([face.clip_crop for face in kept[start : start + batch]])
    records = list(encoders.records(kept))
    with meter.phase("write"):
        write_shard(job.folder / "alone", "train", 0, 1, job.spec, records, job.config.hash)
    return kept


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the photos, time the parts, then the whole."""
    load = os.getloadavg()[0]  # before ours
    write_photos(folder / "photos", args.photos, args.side)
    model = args.model
    if model is None:
        model = folder / "model"
        write_model(model)
    options = ("--face-backend", args.face_backend, "--resolutions", str(args.resolution), "--validation-share", "0")
    where = ("--input", str(folder / "photos"), "--output", str(folder / "D"), "--model", str(model))
    parsed = command.parse([*where, *options, "--near-duplicate", "0", "--batch-size", str(args.batch_size)])
    sources = list_sources(parsed.input)
    job = command.make_job(parsed, sources)
    meter = Meter()
    kept = measure(job, sources, meter)
    start = time.perf_counter()
    summary = pipeline.run(job, sources, "DirectRunner", ())
    whole = time.perf_counter() - start
    assert summary["kept"] == len(kept)
    seconds = {name: phase.seconds[0] for name, phase in meter.phases.items()}
    return {
        "photos": args.photos,
        "kept": len(kept),
        "side": args.side,
        "resolution": args.resolution,
        "model": str(args.model or "tiny"),
        "face_backend": job.config.face_backend,
        "machine": {"cpus": os.cpu_count(), "load_average": load, "python": platform.python_version()},
        "stages_s": seconds,
        "stages_photos_per_s": {name: args.photos / value for name, value in seconds.items()},
        "whole_s": whole,  # with loading and compiling
        "whole_photos_per_s": args.photos / whole,
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    total = sum(report["stages_s"].values())
    lines = [
        f"{report['photos']} photos of {report['side']} px, {report['kept']} kept; targets of {report['resolution']} "
        f"px, model {report['model']}, faces by {report['face_backend']}",
        f"{'stage':<22}{'ms a photo':>12}{'photos/s':>12}{'share':>8}",
    ]
    for name, seconds in report["stages_s"].items():
        rate = report["stages_photos_per_s"][name]
        lines.append(f"{name:<22}{1000 / rate:>12.2f}{rate:>12.0f}{seconds / total:>8.1%}")
    lines.append(f"{'sum':<22}{1000 * total / report['photos']:>12.2f}{report['photos'] / total:>12.1f}")
    whole = report["whole_photos_per_s"]
    lines.append(f"{'through Beam':<22}{1000 / whole:>12.2f}{whole:>12.1f}  with loading and compiling")
    return "\n".join(lines)


def run_hostile(count: int, folder: Path) -> dict[str, Any]:
    """Send `count` hostile inputs and one person's photos through the command in a process of its own."""
    from tests.hostile import unexpected, write_hostile

    write_model(folder / "model")
    write_photos(folder / "photos", PHOTOS_PER_PERSON, 400)
    expected = write_hostile(folder / "photos", count)
    where = ("--input", str(folder / "photos"), "--output", str(folder / "D"), "--model", str(folder / "model"))
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "data_pipeline", *where, "--face-backend", "mtcnn_dlib", "--resolutions", "128"],
        cwd=Path(__file__).parents[1],
        stdout=sys.stderr,
    )
    lines = (folder / "D" / "provenance.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    summary = json.loads((folder / "D" / "summary.json").read_text())
    assert summary["kept"] + summary["rejected"] == summary["input"] == len(rows) == count + PHOTOS_PER_PERSON
    return {
        "hostile": count,
        "exit_code": done.returncode,
        "seconds": time.perf_counter() - start,
        "unexpected": unexpected(expected, rows),
        "summary": summary,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offline", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--photos", type=int, default=48, metavar="N", help="how many (default 48)")
    parser.add_argument("--side", type=int, default=768, metavar="PX", help="of the photos (default 768)")
    parser.add_argument("--resolution", type=int, default=128, metavar="PX", help="of the targets (default 128)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="of the encoders (default 8)")
    parser.add_argument("--model", type=Path, metavar="PATH", help="SDXL folder (default: tiny random weights)")
    parser.add_argument("--face-backend", default="mtcnn_dlib", metavar="NAME", help="default mtcnn_dlib")
    parser.add_argument("--hostile", type=int, metavar="N", help="count what becomes of N hostile inputs instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    args = parser.parse_args(arguments)
    if args.photos < 2 or (args.hostile is not None and args.hostile < 1):
        parser.error("give 2 photos or more.")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="offline_") as folder:
            if args.hostile is not None:
                report = run_hostile(args.hostile, Path(folder))
                print(
                    f"{args.hostile} hostile inputs: exit code {report['exit_code']}, {report['seconds']:.0f} s, "
                    f"{len(report['unexpected'])} not as expected {report['unexpected'] or ''}"
                )
            else:
                report = run(args, Path(folder))
                print(table(report))
        if args.json:
            save_json(report, args.json)
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
