"""Drawn pictures kept on disk: drawing one takes longer than a training step spends on it.

    python -m miniature.pictures FOLDER [--processes N]

A set is a folder of shards of SHARD pictures, each a pure function of the set's name and its number; an interrupted
drawing goes on with the shards that are missing.
"""

import argparse
import concurrent.futures
import hashlib
import json
import multiprocessing
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from tqdm import tqdm

from data_pipeline import avatars
from infinite_id_jax.errors import InputError
from infinite_id_jax.files import replacing

SIZE = 128
SHARD = 1024


class PictureSet(NamedTuple):
    """What a set holds: `size` pictures of random people of a split, or `photos` of each from number `first` on.

    They are the samples from number `seed` on.
    """

    split: str
    role: str
    size: int  # pictures
    photos: int = 0
    first: int = 0
    seed: int = 0


SETS = {
    "base": PictureSet("train", "base", 48 * SHARD),
    "identity": PictureSet("train", "identity", 40 * SHARD, photos=8),
    "base-test": PictureSet("test", "base", 2 * SHARD),
    "identity-test": PictureSet("test", "identity", 2 * SHARD, photos=8, first=2000),
    # For those that judge, of people whom the others do not see together with another picture of them.
    "judge": PictureSet("train", "base", 32 * SHARD, photos=8, first=6 * SHARD, seed=10**6),
}


class Pictures(NamedTuple):
    """A set. `labels` are those of avatars.CLASSES, -1 where a picture does not show an attribute;
    `keypoints` are the five points of the face in pixels."""

    images: UInt8[np.ndarray, "n s s 3"]
    captions: list[str]
    people: Int[np.ndarray, " n"]
    labels: Int[np.ndarray, "n attributes"]
    keypoints: Float[np.ndarray, "n 5 2"]

    @property
    def fingerprint(self) -> str:
        """Another for pictures that were drawn otherwise, which the first ones tell."""
        return hashlib.sha256(self.images[:8].tobytes() + self.labels[:8].tobytes()).hexdigest()[:16]


def read(folder: Path, name: str) -> Pictures:
    """The set `name` below `folder`, its images mapped into memory: several trainings share them.

    Raises InputError where it is not whole.
    """
    paths = _shards(folder, name)
    if not all(path.is_file() for path in paths):
        raise InputError(f"{folder / name} is not whole: run `python -m miniature.pictures {folder}`.")
    together = folder / name / "images.npy"
    if not together.is_file() or together.stat().st_mtime < max(path.stat().st_mtime for path in paths):
        with replacing(together) as beside:
            shape = (SETS[name].size, SIZE, SIZE, 3)
            images = np.lib.format.open_memmap(beside, mode="w+", dtype=np.uint8, shape=shape)
            for i, path in enumerate(paths):
                with np.load(path) as shard:
                    images[i * SHARD : (i + 1) * SHARD] = shard["images"]
            images.flush()
    captions, rest = [], {key: [] for key in ("people", "labels", "keypoints")}
    for path in paths:
        with np.load(path) as shard:
            captions += json.loads(str(shard["captions"]))
            for key, parts in rest.items():
                parts.append(shard[key])
    images = np.load(together, mmap_mode="r")
    return Pictures(images, captions, **{key: np.concatenate(parts) for key, parts in rest.items()})


def draw(folder: Path, names: Iterable[str] = tuple(SETS), processes: int | None = None) -> None:
    """Draw what is missing of these sets, in as many processes (None: one a core)."""
    todo = [(folder, name, i) for name in names for i, path in enumerate(_shards(folder, name)) if not path.is_file()]
    for _ in tqdm(_parallel(todo, processes), total=len(todo), unit="shard", desc="drawing"):
        pass


def _parallel(todo: list[tuple[Path, str, int]], processes: int | None) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(_draw_shard, *zip(*todo, strict=True)) if todo else ()


def _shards(folder: Path, name: str) -> list[Path]:
    return [folder / name / f"{i:05}.npz" for i in range(SETS[name].size // SHARD)]


def _draw_shard(folder: Path, name: str, index: int) -> None:
    chosen = SETS[name]
    samples = []
    for i in range(index * SHARD, (index + 1) * SHARD):
        person = chosen.first + i // chosen.photos if chosen.photos else None
        samples.append(avatars.sample(chosen.seed + i, chosen.split, chosen.role, person_index=person, size=SIZE))
    path = folder / name / f"{index:05}.npz"
    with replacing(path) as beside, beside.open("wb") as file:
        np.savez(
            file,
            images=np.stack([sample.image for sample in samples]),
            captions=np.array(json.dumps([sample.caption for sample in samples])),
            people=np.array([sample.person for sample in samples], np.int32),
            labels=np.array([list(sample.labels.values()) for sample in samples], np.int8),
            keypoints=np.stack([avatars.keypoints(sample.scene, SIZE, sample.seed) for sample in samples]),
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m miniature.pictures", description="Draws the pictures to train on.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the sets lie")
    parser.add_argument("--processes", type=int, help="that draw (default: one a core)")
    given = parser.parse_args(arguments)
    draw(given.folder, processes=given.processes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
