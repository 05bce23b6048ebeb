"""The Beam graph: elements are blocks of the input, then shards of people, so that a kill loses no finished one."""

import collections
import dataclasses
import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner.fn_runner import FnApiRunner
from apache_beam.utils.shared import Shared

from data_pipeline import ingest, records
from data_pipeline.config import PipelineConfig
from data_pipeline.faces import FoundFace, find_face
from data_pipeline.identities import verify_people
from data_pipeline.provenance import Row, load_rows, save_rows, summarise
from data_pipeline.sources import Source
from infinite_id_jax.errors import InputError
from infinite_id_jax.faces.backends import get_backend
from infinite_id_jax.files import save_json

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """What every worker is told; the folders must be the same for all of them."""

    folder: Path  # of the output
    model: Path
    config: PipelineConfig
    spec: records.DatasetSpec


@dataclasses.dataclass(frozen=True)
class Shard:
    """All photos of some people, who are in one split."""

    split: str
    number: int
    count: int  # shards of the split
    photos: tuple[Source, ...]

    def __str__(self) -> str:
        return f"{self.split} shard {self.number + 1} of {self.count}"


Beside = tuple[Shard, list[FoundFace], list[Row]]
"""A shard on its way, with the faces that are still in and the rows of those that are out."""


def run(job: Job, sources: Sequence[Source], runner: str, options: Sequence[str]) -> dict[str, Any]:
    """Do what is missing of a job; returns the summary.

    Raises InputError for what the disk refuses and when no photo is kept, and whatever the runner raises.
    """
    pieces = list(enumerate(ingest.blocks(sources)))
    todo = [piece for piece in pieces if not ingest.block_path(job.folder, piece[0]).exists()]
    if todo:
        logger.info("reading %d photos", sum(len(block) for _, block in todo))
        with make_pipeline(runner, options) as pipeline:
            _ = pipeline | beam.Create(todo) | beam.Reshuffle() | "ingest" >> beam.ParDo(_Ingest(job.folder))
    examined = ingest.collect(job.folder, sources)
    shards = plan(examined, job.config)
    missing = [shard for shard in shards if not _is_complete(job, shard)]
    if missing:
        logger.info("%d of %d shards are to be made", len(missing), len(shards))
        encoders = Shared()
        with make_pipeline(runner, options) as pipeline:
            _ = (
                pipeline
                | beam.Create(missing)
                | beam.Reshuffle()  # or the runner would give all shards to one worker
                | "faces" >> beam.ParDo(_FindFaces(job))
                | "verify" >> beam.ParDo(_Verify(job))
                | "encode and write" >> beam.ParDo(_Write(job, encoders))
            )
    return _finish(job, examined, shards)


def plan(sources: Iterable[Source], config: PipelineConfig) -> list[Shard]:
    """Which shard each photo that was not rejected goes to: by hash of its person, of a share or more for each."""
    people: dict[str, list[Source]] = collections.defaultdict(list)
    for source in sources:
        if not source.row.reason:
            people[source.row.person].append(source)
    shards = []
    for split in records.SPLITS if config.validation_share else records.SPLITS[:1]:
        chosen = [person for person in people if records.split_of(person, config.validation_share) == split]
        count = max(1, math.ceil(sum(len(people[person]) for person in chosen) / config.photos_per_shard))
        photos: list[list[Source]] = [[] for _ in range(count)]
        for person in chosen:
            photos[_shard_of(person, count)] += people[person]
        shards += [Shard(split, number, count, tuple(group)) for number, group in enumerate(photos)]
    return shards


def _shard_of(person: str, count: int) -> int:
    # Not the bits that chose the split: of these, validation people have only small values.
    return int.from_bytes(hashlib.sha256(f"shard of {person}".encode()).digest()[:8], "big") % count


def make_pipeline(runner: str, options: Sequence[str]) -> beam.Pipeline:
    """An empty pipeline on a runner by name. Raises InputError for an unknown one and for options that it lacks.

    For "DirectRunner" Beam would first try Prism, a server that it downloads; here it is the runner within the process.
    """
    try:
        if runner == "DirectRunner":
            return beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions(list(options)))
        return beam.Pipeline(options=PipelineOptions([f"--runner={runner}", *options]))
    except ValueError as error:
        raise InputError(f"--runner {runner} cannot be used: {' '.join(str(error).split())}") from None


class _Ingest(beam.DoFn):
    def __init__(self, folder: Path):
        self._folder = folder

    def process(self, element: tuple[int, Sequence[Source]]) -> Iterator[None]:
        ingest.ingest_block(self._folder, *element)
        yield from ()


class _FindFaces(beam.DoFn):
    def __init__(self, job: Job):
        self._job = job

    def setup(self) -> None:
        # One for each thread of a worker: the detectors hold state while they run.
        self._backend = get_backend(self._job.config.face_backend)

    def process(self, element: Shard) -> Iterator[Beside]:
        found: list[FoundFace] = []
        rejected: list[Row] = []
        for source in element.photos:
            face = find_face(source, self._backend, self._job.config, self._job.spec.clip_size)
            (rejected if isinstance(face, Row) else found).append(face)  # pyright: ignore[reportArgumentType]
        logger.info("%s: %d faces in %d photos", element, len(found), len(element.photos))
        yield element, found, rejected


class _Verify(beam.DoFn):
    def __init__(self, job: Job):
        self._job = job

    def process(self, element: Beside) -> Iterator[Beside]:
        shard, found, rejected = element
        kept, more = verify_people(found, self._job.config)
        yield shard, kept, rejected + more


class _Write(beam.DoFn):
    """Encodes and writes in one step, a batch at a time: a shard's features need never be in memory together."""

    def __init__(self, job: Job, encoders: Shared):
        self._job, self._shared = job, encoders

    def setup(self) -> None:
        from data_pipeline.features import Encoders

        # The weights are loaded once for all threads of a worker process.
        self._encoders = self._shared.acquire(lambda: Encoders(self._job.model, self._job.config))

    def process(self, element: Beside) -> Iterator[None]:
        shard, kept, rejected = element
        job = self._job
        rows = [dataclasses.replace(face.row, split=shard.split) for face in kept] + rejected
        # Before the shard, whose mark says that both are there.
        save_rows(sorted(rows, key=lambda row: row.index), _rows_path(job, shard))
        records.write_shard(
            job.folder,
            shard.split,
            shard.number,
            shard.count,
            job.spec,
            self._encoders.records(kept),
            job.config.hash,
        )
        logger.info("%s: %d photos written", shard, len(kept))
        yield from ()


def _rows_path(job: Job, shard: Shard) -> Path:
    return job.folder / "work" / f"{shard.split}-{shard.number:05}-of-{shard.count:05}.jsonl"


def _is_complete(job: Job, shard: Shard) -> bool:
    done = records.shard_is_complete(job.folder, shard.split, shard.number, shard.count, job.config.hash)
    return done and _rows_path(job, shard).exists()


def _finish(job: Job, examined: Sequence[Source], shards: Sequence[Shard]) -> dict[str, Any]:
    """Gather the rows, check that they account for every photo, and declare the dataset finished."""
    rows = {source.row.index: source.row for source in examined if source.row.reason}
    for shard in shards:
        for row in load_rows(_rows_path(job, shard), len(shard.photos)):
            assert row.index not in rows, row
            rows[row.index] = row
    summary = summarise([rows[source.row.index] for source in examined], job.config.hash)
    assert summary["kept"] + summary["rejected"] == len(examined)
    for left in (*job.folder.glob(".*.partial"), *job.folder.glob("work/.*.partial")):  # by a run that was killed
        left.unlink()
    save_rows((rows[source.row.index] for source in examined), job.folder / "provenance.jsonl")
    save_json(summary, job.folder / "summary.json")
    if not summary["kept"]:
        raise InputError(f"No photo was kept: {job.folder / 'provenance.jsonl'} says why.")
    counts = collections.Counter(shard.split for shard in shards)
    records.finish(job.folder, job.spec, counts, job.config.hash)
    return summary
