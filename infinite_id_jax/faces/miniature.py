"""The backend of the miniature's world: two small networks that find and know its people, not photographs of ours."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from infinite_id_jax.errors import InputError
from infinite_id_jax.faces import small_resnet
from infinite_id_jax.faces.align import similarity_transform, warp
from infinite_id_jax.faces.protocol import Crop, Face, Photo
from infinite_id_jax.faces.small_resnet import SmallResNetConfig

# Where the five points lie in the recogniser's crop, which holds hair and beard too.
TEMPLATE = np.array([[33.0, 41.0], [63.0, 41.0], [48.0, 53.7], [35.3, 64.7], [60.7, 64.7]])
DETECTOR = SmallResNetConfig(size=64, widths=(32, 64, 96), outputs=11)  # (x, y) of five points, presence
RECOGNISER = SmallResNetConfig(size=96, widths=(48, 96, 128), outputs=128)
MIN_SCORE = 0.5
PADDING = (128, 128, 128)
HEAD = 0.8  # of a photograph's beside the same points: eyes are further apart in drawings


class MiniatureFaces:
    """Detector and recogniser of avatars (`FaceBackend`), from two files in `folder`.

    Raises InputError where one of them is missing or damaged.
    """

    name = "miniature"
    embedding_dim = RECOGNISER.outputs

    def __init__(self, folder: Path) -> None:
        self._detector = network(folder / "detector.safetensors", DETECTOR)
        self._recogniser = network(folder / "recogniser.safetensors", RECOGNISER)

    def detect(self, photo: Photo) -> list[Face]:
        """Finds the one face that a picture of the miniature's world shows, or none."""
        small, side, corner = squared(photo)
        found = np.asarray(self._detector(small[None]), np.float64)[0]
        score = float(1 / (1 + np.exp(-found[10])))
        if score < MIN_SCORE:
            return []
        points = (found[:10].reshape(5, 2) + 0.5) * side - 0.5 + corner
        middle, reach = points.mean(axis=0), 1.6 * float(np.linalg.norm(points[1] - points[0]))
        (x0, y0), (x1, y1) = middle - reach, middle + reach
        return [Face((float(x0), float(y0), float(x1), float(y1)), score, points, HEAD)]

    def align(self, photo: Photo, face: Face) -> Crop:
        """Cuts the square in which the five points lie as near to TEMPLATE as they can."""
        return aligned(photo, face.keypoints)

    def embed(self, crop: Crop) -> Float[np.ndarray, "128"]:
        """Embeds a crop of `align`, not normalised."""
        return np.asarray(self._recogniser(crop[None]), np.float32)[0]


def aligned(photo: Photo, keypoints: Float[np.ndarray, "5 2"], margin: int = 0) -> Crop:
    """The recogniser's crop, with `margin` more pixels on each side."""
    transform = similarity_transform(keypoints, TEMPLATE + margin)
    return warp(photo, transform, RECOGNISER.size + 2 * margin, border="edge")


def squared(photo: Photo) -> tuple[Crop, int, Float[np.ndarray, "2"]]:
    """What the detector sees: a square around the photo, made small; its side and corner in pixels of the photo."""
    height, width = photo.shape[:2]
    side = max(height, width)
    square = Image.new("RGB", (side, side), PADDING)
    left, top = (side - width) // 2, (side - height) // 2
    square.paste(Image.fromarray(photo), (left, top))
    small = square.resize((DETECTOR.size, DETECTOR.size), Image.Resampling.BOX)
    return np.asarray(small), side, -np.array([left, top], np.float64)


def network(
    path: Path, config: SmallResNetConfig, call: Callable[..., jax.Array] = small_resnet.apply
) -> Callable[[np.ndarray], jax.Array]:
    """`call` of small_resnet with the arrays in a file, compiled. Raises InputError if it is missing or damaged."""
    try:
        stored: Mapping[str, np.ndarray] = load_file(path)
    except (OSError, SafetensorError):
        stored = {}
    wanted = jax.eval_shape(partial(small_resnet.initial, config), jax.random.key(0))
    if {name: array.shape for name, array in stored.items()} != {name: array.shape for name, array in wanted.items()}:
        raise InputError(f"{path} is missing or damaged: train it, or install infinite_id_jax, again.")
    arrays = {name: jnp.asarray(array, jnp.float32) for name, array in stored.items()}
    return jax.jit(partial(call, config, arrays))
