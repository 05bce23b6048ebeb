"""The miniature's face networks: a detector of five points, and a recogniser trained with ArcFace's loss."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from data_pipeline import avatars
from data_pipeline.avatar_captions import generator
from data_pipeline.avatar_svg import BACKDROPS, backdrop, rasterise
from infinite_id_jax.faces import small_resnet
from infinite_id_jax.faces.miniature import DETECTOR, PADDING, RECOGNISER, aligned, squared
from infinite_id_jax.faces.small_resnet import SmallResNetConfig
from infinite_id_jax.identity.features import unit
from infinite_id_jax.images import softened
from infinite_id_jax.typing import Array
from miniature import pictures
from miniature.fit import Batch, Budget, fit, rows

DETECTOR_BUDGET = Budget(steps=1500, batch_size=64, learning_rate=2e-3)
RECOGNISER_BUDGET = Budget(steps=1200, batch_size=64, learning_rate=2e-3, weight_decay=0.05)
_SCALE, _MARGIN = 24.0, 0.3  # of ArcFace (Deng et al. 2019, Eq. 3)
_SHIFT = 2  # pixels by which a detector may miss
_WITHOUT = 0.2  # share of the detector's pictures in which there is nobody


# ---------------------------------------------------------------------------------------------------------------------
# The recogniser.


def train_recogniser(
    folder: Path,
    drawn: pictures.Pictures,
    config: SmallResNetConfig = RECOGNISER,
    budget: Budget = RECOGNISER_BUDGET,
    softest: float = 8.0,
    seed: int = 3,
) -> dict[str, Array]:
    """Arrays of `small_resnet` whose outputs point alike for pictures of one person, one in three from a smaller one.

    The centre that ArcFace's loss gives a person is the sum of one vector for each of their looks: people who share
    their hair teach the network of it together, where a centre of one's own would be learned from eight pictures.
    """
    people, classes = np.unique(drawn.people, return_inverse=True)
    looks = [dataclasses.astuple(avatars.person(int(i), "train")) for i in people]
    columns = [np.unique(column, return_inverse=True) for column in zip(*looks, strict=True)]
    starts = np.cumsum([0] + [len(values) for values, _ in columns])
    look_ids = np.stack([start + ids for start, (_, ids) in zip(starts, columns, strict=False)], axis=1)
    crops = aligned_crops(drawn)

    def batch_at(step: int) -> Batch:
        rng = np.random.default_rng((seed, step))
        chosen = rows(seed, step, budget.batch_size, len(crops))
        return {"crops": np.stack([disturbed(crops[i], rng, softest) for i in chosen]), "person": classes[chosen]}

    key = jax.random.key(seed)
    arrays: dict[str, Any] = {
        "network": small_resnet.initial(config, key),
        "looks": jax.random.normal(key, (int(starts[-1]), config.outputs)),
    }
    loss = partial(arcface_loss, config, look_ids)
    return fit(arrays, loss, batch_at, budget, folder, over=drawn.fingerprint)["network"]


def aligned_crops(drawn: pictures.Pictures) -> np.ndarray:
    """The recogniser's crops of all pictures, by the true points, with room to shift them."""
    return np.stack(
        [
            aligned(image, points.astype(np.float64), _SHIFT)
            for image, points in tqdm(zip(drawn.images, drawn.keypoints, strict=True), "aligning", len(drawn.images))
        ]
    )


def disturbed(crop: np.ndarray, rng: np.random.Generator, softest: float) -> np.ndarray:
    """Shifted by a detector's error, brighter or darker, one in three from a smaller picture, down to 1 / `softest`."""
    y, x = rng.integers(2 * _SHIFT + 1, size=2)
    size = crop.shape[0] - 2 * _SHIFT
    crop = crop[y : y + size, x : x + size]
    if rng.random() < 0.33:
        crop = softened(crop, int(size / rng.uniform(1.3, softest)))
    return np.clip(crop * rng.uniform(0.85, 1.15), 0, 255).astype(np.uint8)


def arcface_loss(
    config: SmallResNetConfig,
    look_ids: Int[np.ndarray, "people looks"],
    arrays: Mapping[str, Any],
    batch: Mapping[str, Array],
    key: Array,
) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy over people, with an angle added to the right one's (Deng et al. 2019, Eq. 3).

    `look_ids` are the rows of arrays["looks"] that make up each person.
    """
    del key
    embedding = unit(small_resnet.apply(config, arrays["network"], batch["crops"]))
    cosine = embedding @ unit(arrays["looks"][look_ids].sum(axis=1)).T
    right = jnp.take_along_axis(cosine, batch["person"][:, None], 1)
    wider = jnp.cos(jnp.arccos(jnp.clip(right, -1 + 1e-6, 1 - 1e-6)) + _MARGIN)
    is_right = jnp.arange(cosine.shape[1])[None] == batch["person"][:, None]
    logits = _SCALE * jnp.where(is_right, wider, cosine)
    top1 = jnp.mean(jnp.argmax(cosine, 1) == batch["person"])
    return -jnp.mean(jax.nn.log_softmax(logits)[is_right.nonzero(size=len(cosine))]), {"top1": top1}


# ---------------------------------------------------------------------------------------------------------------------
# The detector.


def train_detector(folder: Path, drawn: pictures.Pictures) -> dict[str, Array]:
    """Arrays of `small_resnet` that give five points and whether there is a face."""
    empty = [rasterise(backdrop(name, generator("empty", name)), pictures.SIZE)[..., :3] for name in BACKDROPS]

    def batch_at(step: int) -> Batch:
        rng = np.random.default_rng((4, step))
        chosen = rows(4, step, DETECTOR_BUDGET.batch_size, len(drawn.images))
        shown = [
            _without(drawn.images[i], empty, rng)
            if rng.random() < _WITHOUT
            else _placed(drawn.images[i], drawn.keypoints[i], rng)
            for i in chosen
        ]
        return {
            "small": np.stack([small for small, _ in shown]),
            "points": np.stack([points for _, points in shown]).astype(np.float32),
        }

    arrays = small_resnet.initial(DETECTOR, jax.random.key(4))
    return fit(arrays, detector_loss, batch_at, DETECTOR_BUDGET, folder, over=drawn.fingerprint)


def _placed(image: np.ndarray, points: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A picture cut, or set into a border, at random, one in three with the detail of a smaller one: what the detector
    sees, and the points in parts of it from -0.5 to 0.5."""
    height, width = image.shape[:2]
    if rng.random() < 0.33:
        image = softened(image, int(height / rng.uniform(1.3, 8)))
    if rng.random() < 0.5:
        cut = rng.integers(0, 14, size=4)
        image, points = image[cut[0] : height - cut[1], cut[2] : width - cut[3]], points - np.array([cut[2], cut[0]])
    else:
        border = rng.integers(0, 64, size=4)
        colour = PADDING if rng.random() < 0.5 else tuple(rng.integers(256, size=3).tolist())
        around = np.full((height + border[0] + border[1], width + border[2] + border[3], 3), colour, np.uint8)
        around[border[0] : border[0] + height, border[2] : border[2] + width] = image
        image, points = around, points + np.array([border[2], border[0]])
    small, side, corner = squared(image)
    return small, (points - corner + 0.5) / side - 0.5


def _without(image: np.ndarray, empty: list[np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A picture without a face: a scene, noise, or the corner of a picture, stretched."""
    kind = rng.integers(3)
    if kind == 0:
        image = empty[rng.integers(len(empty))]
    elif kind == 1:
        image = np.clip(rng.normal(rng.integers(256, size=3), rng.uniform(0, 90), image.shape), 0, 255).astype(np.uint8)
    else:
        side = int(rng.integers(16, 40))
        x, y = (0 if rng.random() < 0.5 else image.shape[0] - side for _ in range(2))
        image = image[y : y + side, x : x + side]
    return squared(np.ascontiguousarray(image))[0], np.full((5, 2), np.nan)


def detector_loss(arrays: dict[str, Array], batch: Mapping[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
    """Absolute error of the points where there is a face, and cross-entropy of whether there is."""
    del key
    found = small_resnet.apply(DETECTOR, arrays, batch["small"])
    points = batch["points"].reshape(-1, 10)
    there = ~jnp.isnan(points[:, 0])
    error = jnp.where(there[:, None], jnp.abs(found[:, :10] - jnp.nan_to_num(points)), 0.0).mean(1)
    presence = jax.nn.softplus(jnp.where(there, -found[:, 10], found[:, 10]))
    figures = {"error": error.sum() / there.sum(), "right": jnp.mean((found[:, 10] > 0) == there)}
    return 20 * error.mean() + presence.mean(), figures
