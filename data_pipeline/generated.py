"""A dataset of drawn people (drawing.py), complete with the features of a model: for the debug configuration."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from data_pipeline import records
from data_pipeline.config import PipelineConfig, model_fingerprint, read_spec
from data_pipeline.drawing import RADIUS, Identity, Scene, picture
from data_pipeline.features import Encoders
from infinite_id_jax.conditioning import time_ids
from infinite_id_jax.errors import InputError

FACE_DIM = 32
RECOGNISER_SIZE = 32
_DRAWING = 1  # counted up when the same seeds draw another picture
_CLIP_MARGIN, _RECOGNISER_MARGIN = 1.75, 0.75  # radii of the head from its centre: hair and chin; the face alone


class DrawnPhoto(NamedTuple):
    """A photo of nobody, with what a face backend would have made of it."""

    pixels: UInt8[np.ndarray, "s s 3"]
    caption: str
    clip_crop: UInt8[np.ndarray, "c c 3"]
    recogniser_crop: UInt8[np.ndarray, "r r 3"]
    face_embedding: Float32[np.ndarray, " E"]


class Drawing(NamedTuple):
    """Who draws: `draw` of the number of a person, of a photo, and the side of CLIP's crop; a pure function.

    `name` and `parameters` tell it from others, whose datasets are not to be mixed up with its own.
    """

    name: str
    parameters: tuple[float | int | str, ...]
    draw: Callable[[int, int, int], DrawnPhoto]
    face_dim: int
    recogniser_size: int


def write_generated(
    folder: Path,
    model: Path,
    *,
    people: int,
    photos: int,
    size: int,
    seed: int,
    id_features: str = "cached",
    shards: int = 2,
    radius: tuple[float, float] = RADIUS,
) -> None:
    """Write `photos` photos each of `people` people at `size` pixels, an eighth of the people for validation.

    `radius`: the least and the greatest of a head, in parts of the picture.
    At least one person is for validation. What an earlier call left is completed. InputError if `folder` holds
    another dataset, or for fewer than 2 people.
    """
    drawing = Drawing(
        "generated",
        (_DRAWING, people, photos, size, seed, shards, *radius),
        partial(_draw, seed, size, radius),
        FACE_DIM,
        RECOGNISER_SIZE,
    )
    write_drawn(folder, model, drawing, people=people, photos=photos, size=size, id_features=id_features, shards=shards)


def write_drawn(
    folder: Path,
    model: Path,
    drawing: Drawing,
    *,
    people: int,
    photos: int,
    size: int,
    id_features: str = "cached",
    shards: int = 2,
) -> None:
    """As `write_generated`, with any drawing."""
    if people < 2:
        raise InputError(f"people={people}: give 2 or more, one of them is for validation.")
    config = PipelineConfig(
        input=hashlib.sha256(json.dumps(drawing.parameters).encode()).hexdigest()[:16],
        model=model_fingerprint(model),
        face_backend=drawing.name,
        similarity=-1.0,
        resolutions=(size,),
        id_features=id_features,
    )
    if _is_finished(folder, config):
        return
    spec = read_spec(model, config, drawing.face_dim, drawing.recogniser_size)
    held_out = max(people // 8, 1)
    names = {"train": range(people - held_out), "validation": range(people - held_out, people)}
    counts = {"train": shards, "validation": 1}
    encoders = None
    for split, shard in ((split, shard) for split, count in counts.items() for shard in range(count)):
        if records.shard_is_complete(folder, split, shard, counts[split], config.hash):
            continue
        encoders = encoders or Encoders(model, config)
        photographed = list(itertools.product(names[split][shard :: counts[split]], range(photos)))
        found = _records(photographed, encoders, config, spec.clip_size, drawing)
        records.write_shard(folder, split, shard, counts[split], spec, found, config.hash)
    records.finish(folder, spec, counts, config.hash)


def _is_finished(folder: Path, config: PipelineConfig) -> bool:
    """InputError if another dataset is."""
    try:
        saved = json.loads((folder / "dataset.json").read_bytes())["configuration"]
    except FileNotFoundError:
        return False
    if saved != config.hash:
        raise InputError(f"{folder} holds a dataset made with other parameters: choose another folder, or delete it.")
    return True


def _records(
    photographed: list[tuple[int, int]], encoders: Encoders, config: PipelineConfig, clip_size: int, drawing: Drawing
) -> Iterator[records.PhotoRecord]:
    """The records of some (person, photo), encoded in batches of the configured size."""
    (size,) = config.resolutions
    for start in range(0, len(photographed), config.batch_size):
        batch = photographed[start : start + config.batch_size]
        drawn = [drawing.draw(person, photo, clip_size) for person, photo in batch]
        mean, std = encoders.posterior([one.pixels for one in drawn])
        cached = config.id_features == "cached"
        states = encoders.hidden_states([one.clip_crop for one in drawn]) if cached else [None] * len(batch)
        for i, (person, _) in enumerate(batch):
            yield records.PhotoRecord(
                person=f"person-{person:05}",
                photo=hashlib.sha256(drawn[i].pixels.tobytes()).hexdigest(),
                caption=drawn[i].caption,
                clip_crop=drawn[i].clip_crop,
                recogniser_crop=drawn[i].recogniser_crop,
                face_embedding=drawn[i].face_embedding,
                clip_hidden_states=states[i],
                latent_mean=mean[i],
                latent_std=std[i],
                time_ids=time_ids(size, size).astype(np.int32),
            )


def _draw(seed: int, size: int, radius: tuple[float, float], person: int, photo: int, clip_size: int) -> DrawnPhoto:
    scene = Scene.from_seed(hash_seed(seed, person, photo), radius)
    image = picture(Identity.from_seed(hash_seed(seed, person)), scene, size)
    face = _head(image, scene, _RECOGNISER_MARGIN, RECOGNISER_SIZE)
    head = _head(image, scene, _CLIP_MARGIN, clip_size)
    return DrawnPhoto(np.asarray(image), scene.caption, head, face, embed(face))


def hash_seed(*numbers: int) -> int:
    """One seed of several, so that no two people share photos' seeds."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big")


def embed(face: UInt8[np.ndarray, "r r 3"]) -> Float32[np.ndarray, " E"]:
    """A fixed random projection of the 16 x 16 thumbnail of an aligned face, of norm about 1.

    It stands in for a face recogniser, which knows no drawings.
    """
    pixels = np.asarray(Image.fromarray(face).resize((16, 16), Image.Resampling.BOX), np.float32).ravel() / 255 - 0.5
    matrix = np.random.default_rng(0).standard_normal((FACE_DIM, pixels.size), np.float32)
    return matrix @ pixels / np.float32(np.sqrt(FACE_DIM * pixels.size) * 0.3)


def _head(image: Image.Image, scene: Scene, margin: float, size: int) -> UInt8[np.ndarray, "size size 3"]:
    box = scene.head_box(image.width, margin)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
