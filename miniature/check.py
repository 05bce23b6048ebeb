"""How good the miniature's parts are on people and pictures that nothing was trained on."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from data_pipeline.avatars import CLASSES
from infinite_id_jax.faces.miniature import RECOGNISER, MiniatureFaces, aligned, network
from infinite_id_jax.faces.small_resnet import SmallResNetConfig
from infinite_id_jax.files import save_json
from infinite_id_jax.identity.features import unit
from infinite_id_jax.images import shrunk
from infinite_id_jax.stable_diffusion.vae import to_pixels
from miniature import judges, pictures, vae

_PEOPLE = 200  # among whom somebody is looked for
_BATCH = 64


def write(folder: Path, drawn: Callable[[str], pictures.Pictures]) -> None:
    """Write FOLDER/check.json, and print it."""
    base, identity = drawn("base-test"), drawn("identity-test")
    found: dict[str, Any] = {
        "autoencoder": autoencoder(folder / "model" / "vae", base),
        "detector": detector(MiniatureFaces(folder / "model" / "faces"), base.images, base.keypoints),
        **{f"detector_{by}": smaller(MiniatureFaces(folder / "model" / "faces"), identity, by) for by in (2, 4, 8)},
        "recogniser": rank_1(folder / "model" / "faces" / "recogniser.safetensors", RECOGNISER, identity),
        "judge_recogniser": rank_1(folder / "judges" / "recogniser.safetensors", judges.RECOGNISER, identity),
        "judge_attributes": attributes(folder / "judges" / "attributes.safetensors", base),
    }
    save_json(found, folder / "check.json")
    for part, figures in found.items():
        print(f"{part}: {', '.join(f'{name} {value:.3f}' for name, value in figures.items())}")


def autoencoder(folder: Path, drawn: pictures.Pictures) -> dict[str, float]:
    """PSNR of whole pictures in decibels, by style."""
    graph, state = nnx.split(vae.read(folder))

    @jax.jit
    def quality(images: jax.Array) -> jax.Array:
        image, model = to_pixels(images), nnx.merge(graph, state)
        return vae.psnr(model.decode(model.encode(image).mean), image)

    found = _batched(quality, drawn.images)
    style = drawn.labels[:, list(CLASSES).index("style")]
    return {"all": float(found.mean())} | {
        name: float(found[style == k].mean()) for k, name in enumerate(CLASSES["style"])
    }


def smaller(faces: MiniatureFaces, drawn: pictures.Pictures, by: int) -> dict[str, float]:
    """The same of photographs with the detail of a `by`-th of their size."""
    count = 2 * _PEOPLE
    return detector(faces, [shrunk(image, by) for image in drawn.images[:count]], drawn.keypoints[:count])


def detector(faces: MiniatureFaces, images: Iterable[np.ndarray], keypoints: np.ndarray) -> dict[str, float]:
    """The share of faces that are found, and how many pixels their points miss by."""
    missed = []
    for image, points in zip(images, keypoints, strict=True):
        found = faces.detect(image)
        missed.append(np.linalg.norm(found[0].keypoints - points, axis=1).mean() if found else np.nan)
    return {"found": float(np.mean(~np.isnan(missed))), "pixels": float(np.nanmean(missed))}


def rank_1(path: Path, config: SmallResNetConfig, drawn: pictures.Pictures) -> dict[str, float]:
    """How often the nearest first photo, of those of `_PEOPLE` people, is that of the right person; and cosines.

    The crops are cut by the true points: the detector has figures of its own.
    """
    photos = pictures.SETS["identity-test"].photos
    shown = zip(drawn.images[: _PEOPLE * photos], drawn.keypoints, strict=False)
    crops = np.stack([aligned(image, points.astype(np.float64)) for image, points in shown])
    vectors = np.asarray(unit(jnp.asarray(_batched(network(path, config), crops))))
    by_person = vectors.reshape(_PEOPLE, photos, -1)
    gallery, probes = by_person[:, 0], by_person[:, 1:]
    cosines = np.einsum("pkd,gd->pkg", probes, gallery)
    right = cosines.argmax(-1) == np.arange(_PEOPLE)[:, None]
    same = cosines[np.arange(_PEOPLE), :, np.arange(_PEOPLE)]
    others = cosines.transpose(0, 2, 1)[~np.eye(_PEOPLE, dtype=bool)]
    return {
        "rank_1": float(right.mean()),
        "cosine_same_person": float(same.mean()),
        "cosine_two_people": float(others.mean()),
        "cosine_two_people_95": float(np.percentile(others, 95)),
    }


def attributes(path: Path, drawn: pictures.Pictures) -> dict[str, float]:
    """Accuracy of each attribute, of the pictures that show it."""
    logits = judges.split(jnp.asarray(_batched(network(path, judges.ATTRIBUTES), drawn.images)))
    found = {}
    for place, (name, one) in enumerate(logits.items()):
        label = drawn.labels[:, place]
        found[name] = float(np.mean(np.asarray(one).argmax(1)[label >= 0] == label[label >= 0]))
    return found


def _batched(call: Callable[[np.ndarray], jax.Array], images: np.ndarray) -> Float[np.ndarray, " n *rest"]:
    return np.concatenate([np.asarray(call(images[i : i + _BATCH])) for i in range(0, len(images), _BATCH)])
