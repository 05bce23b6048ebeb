"""The loader against what a training step consumes: records and images a second, on full-size random records.

A record is SDXL's at 1024 px with ViT-bigG's features (257 x 1664); an image takes two, the target and the identity
photo. The peer is ArrayRecord's own data source reading the same records in the same order in one thread, without
making anything of them. What a step needs is computed, not measured: an H200 at 45 % of its 989 bf16 TFLOP/s, an
image costing two forwards of 6.761 TFLOP.

    python -m benchmarks.loader [--records N] [--batch-size N] [--steps N] [--workers N ...] [--json FILE]

The files are as fresh as they are written, so the system's cache holds them: this measures the loader, not the disk.
"""

import argparse
import hashlib
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from data_pipeline.loader import Loader, LoaderConfig
from data_pipeline.records import DatasetSpec, PhotoDataset, PhotoRecord, finish, write_shard
from infinite_id_jax.errors import InputError
from infinite_id_jax.files import save_json

FULL_SIZE = DatasetSpec(
    face_backend="random",
    face_dim=512,
    clip_dim=1664,
    clip_tokens=257,
    clip_layer="last",
    clip_size=224,
    recogniser_size=112,
    latent_channels=4,
    id_features="cached",
    model="random",
)
LATENT = 128  # 1024 px
PHOTOS_PER_PERSON = 4
# Images a second that an H200 consumes: MFU x peak / (forwards x FLOPs of one at 1024 px).
NEEDED = 0.45 * 989e12 / (2 * 6.761e12)


def random_record(spec: DatasetSpec, person: str, photo: int, size: tuple[int, int], caption: str = "") -> PhotoRecord:
    """Of latents h, w; the same numbers give the same record."""
    name = hashlib.sha256(f"{person}/{photo}".encode()).hexdigest()
    rng = np.random.default_rng(int(name[:16], 16))

    def pixels(size: int) -> np.ndarray:
        return rng.integers(0, 256, (size, size, 3), dtype=np.uint8)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)

    height, width = 8 * size[0], 8 * size[1]
    return PhotoRecord(
        person=person,
        photo=name,
        caption=caption,
        clip_crop=pixels(spec.clip_size),
        recogniser_crop=pixels(spec.recogniser_size),
        face_embedding=rng.standard_normal(spec.face_dim, np.float32),
        clip_hidden_states=normal(spec.clip_tokens, spec.clip_dim) if spec.id_features == "cached" else None,
        latent_mean=normal(*size, spec.latent_channels),
        latent_std=np.abs(normal(*size, spec.latent_channels)),
        time_ids=np.array([height, width, 0, 0, height, width], np.int32),
    )


def write_records(folder: Path, records: int, shards: int = 4) -> None:
    """A training split of random full-size records."""

    def of_shard(shard: int) -> Iterator[PhotoRecord]:
        for i in range(shard, records, shards):
            yield random_record(
                FULL_SIZE, f"person-{i // shards % (records // PHOTOS_PER_PERSON)}", i, (LATENT, LATENT)
            )

    for shard in range(shards):
        write_shard(folder, "train", shard, shards, FULL_SIZE, of_shard(shard), "random")
    finish(folder, FULL_SIZE, {"train": shards}, "random")


def measure_raw(folder: Path, steps: int, batch_size: int) -> dict[str, Any]:
    """The peer: as many records as the loader reads, in random order, undecoded."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    source = ArrayRecordDataSource(sorted(str(path) for path in folder.glob("records/*array_record*")))
    order = np.random.default_rng(0).integers(len(source), size=2 * steps * batch_size)
    source[0]
    start = time.perf_counter()
    read = sum(len(source[int(i)]) for i in order)
    return _row("ArrayRecord alone", time.perf_counter() - start, len(order), read)


def measure_access(folder: Path, steps: int, batch_size: int) -> dict[str, Any]:
    """`Loader.batch`, one step after the other, in this thread."""
    loader = Loader(PhotoDataset(folder, "train"), LoaderConfig(batch_size))
    loader.batch(0)
    start = time.perf_counter()
    for step in range(steps):
        loader.batch(step)
    return _row("batch(step)", time.perf_counter() - start, 2 * steps * batch_size, _bytes(folder, steps, batch_size))


def measure_ahead(folder: Path, steps: int, batch_size: int, workers: int) -> dict[str, Any]:
    """`Loader.batches`, once it runs: the first steps start threads or processes and are not counted."""
    loader = Loader(PhotoDataset(folder, "train"), LoaderConfig(batch_size, workers=workers))
    batches = loader.batches(0)
    # What is read ahead of the clock must be little beside what is read under it.
    for _ in range(1 + max(workers, 1)):
        next(batches)
    start = time.perf_counter()
    for _ in range(steps):
        next(batches)
    seconds = time.perf_counter() - start
    batches.close()
    name = f"batches, {workers} workers" if workers else "batches, threads"
    return _row(name, seconds, 2 * steps * batch_size, _bytes(folder, steps, batch_size))


def _bytes(folder: Path, steps: int, batch_size: int) -> int:
    """That a loader reads: whole records, two for each row."""
    dataset = PhotoDataset(folder, "train")
    stored = sum(path.stat().st_size for path in folder.glob("records/*array_record*"))
    return 2 * steps * batch_size * stored // len(dataset)


def _row(name: str, seconds: float, records: int, read: int) -> dict[str, Any]:
    return {
        "name": name,
        "records_per_s": records / seconds,
        "images_per_s": records / 2 / seconds,
        "bytes_per_s": read / seconds,
        "milliseconds_per_record": 1e3 * seconds / records,
        "times_needed": records / 2 / seconds / NEEDED,
    }


def table(report: dict[str, Any]) -> str:
    lines = [f"{'':22}{'records/s':>12}{'images/s':>12}{'MB/s':>12}{'ms a record':>14}{'x needed':>12}"]
    for row in report["rows"]:
        lines.append(
            f"{row['name']:22}{row['records_per_s']:12.0f}{row['images_per_s']:12.0f}{row['bytes_per_s'] / 1e6:12.0f}"
            f"{row['milliseconds_per_record']:14.2f}{row['times_needed']:12.1f}"
        )
    lines.append(f"An H200 step needs {NEEDED:.1f} images/s: 45 % of 989 TFLOP/s, 2 x 6.761 TFLOP an image.")
    return "\n".join(lines)


def run(records: int, batch_size: int, steps: int, workers: list[int]) -> dict[str, Any]:
    """Write the records to a temporary folder and measure each way of reading them."""
    load = os.getloadavg()[0]  # before ours
    with tempfile.TemporaryDirectory(prefix="benchmark_loader_") as name:
        folder = Path(name)
        write_records(folder, records)
        rows = [measure_raw(folder, steps, batch_size), measure_access(folder, steps, batch_size)]
        rows += [measure_ahead(folder, steps, batch_size, count) for count in workers]
    return {
        "records": records,
        "batch_size": batch_size,
        "steps": steps,
        "needed_images_per_s": NEEDED,
        "machine": {"cpus": os.cpu_count(), "load_average": load, "python": platform.python_version()},
        "rows": rows,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--records", type=int, default=400, metavar="N", help="1.3 MB each (default 400)")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="default 4, as in the paper")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="batches measured (default 200)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default 0 1 2")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    args = parser.parse_args(arguments)
    least = 2 * PHOTOS_PER_PERSON
    if args.records < least or args.steps < 1:
        parser.error(f"--records {args.records} --steps {args.steps}: give {least} records and 1 step or more.")
    try:
        report = run(args.records, args.batch_size, args.steps, args.workers)
        print(table(report))
        if args.json:
            save_json(report, args.json)
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
