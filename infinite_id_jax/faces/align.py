"""Upright face crops by a similarity transform: 112 px for a recogniser, 224 px with hair and chin for CLIP.

Coordinates are (x, y) with pixel centres at integers, as in OpenCV. A transform is the 2x3 matrix
[[a, -b, tx], [b, a, ty]] that takes points of the photo to points of the crop.
"""

import math
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from infinite_id_jax.errors import InputError
from infinite_id_jax.faces.protocol import Crop, Face, Keypoints, Photo

Similarity = Float[np.ndarray, "2 3"]

# The five points of the 112 x 112 crop on which ArcFace recognisers are trained (insightface, face_align.py).
ARCFACE_TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)

# Half the side of the head crop in units of the face, and how far its centre lies below the eyes:
# FFHQ's alignment (Karras et al. 2019, appendix A) has 2.0, 1.8 and 0.1 and may cut the hair; this is wider.
HEAD_PER_EYE_DISTANCE = 2.4
HEAD_PER_EYE_TO_MOUTH = 2.15
HEAD_CENTRE_BELOW_EYES = 0.05


def similarity_transform(source: Float[np.ndarray, "n 2"], target: Float[np.ndarray, "n 2"]) -> Similarity:
    """The rotation, uniform scale and shift that take `source` to `target` with the least squared error.

    In two dimensions Umeyama's solution (1991, eq. 40-42, without reflections) is a complex regression:
    target = (a + ib) source + t. Raises InputError when all source points coincide.
    """
    z, w = source @ [1, 1j], target @ [1, 1j]
    z_mean, w_mean = z.mean(), w.mean()
    spread = np.sum(np.abs(z - z_mean) ** 2)
    if not spread > 1e-8:
        raise InputError("The points of the face coincide: give a photo in which the face is larger.")
    turn = np.sum(np.conj(z - z_mean) * (w - w_mean)) / spread
    shift = w_mean - turn * z_mean
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


def warp(photo: Photo, transform: Similarity, size: int, *, border: Literal["black", "edge"]) -> Crop:
    """Cuts the [size, size, 3] crop that `transform` maps the photo to, antialiased where it shrinks.

    Beyond the photo the crop is black or repeats the photo's edge.
    """
    inverse = np.linalg.inv(np.vstack([transform, [0, 0, 1]]))[:2]
    region, origin = _source_region(photo, inverse, size, border)
    image = Image.fromarray(region)
    # Shrink first, with a filter as wide as the step, so that the resampling below sees one pixel per pixel.
    per_pixel = max(1.0, math.hypot(inverse[0, 0], inverse[1, 0]))
    shrunk = (max(1, round(image.width / per_pixel)), max(1, round(image.height / per_pixel)))
    image = image.resize(shrunk, Image.Resampling.LANCZOS, reducing_gap=3.0)
    ratio = np.array(image.size) / region.shape[1::-1]
    # Pillow's coordinates put pixel centres at halves.
    linear = inverse[:, :2] * ratio[:, None]
    constant = (inverse[:, 2] - inverse[:, :2] @ [0.5, 0.5] + 0.5 - origin) * ratio
    coefficients = np.column_stack([linear, constant]).ravel().tolist()
    crop = image.transform((size, size), Image.Transform.AFFINE, tuple(coefficients), Image.Resampling.BICUBIC)
    return np.asarray(crop)


def _source_region(
    photo: Photo, inverse: Similarity, size: int, border: str
) -> tuple[UInt8[np.ndarray, "h w 3"], np.ndarray]:
    """The rectangle of the photo that the crop covers, with a rim for the filters, and its origin."""
    corners = np.array([[-0.5, -0.5], [size - 0.5, -0.5], [-0.5, size - 0.5], [size - 0.5, size - 0.5]])
    covered = corners @ inverse[:, :2].T + inverse[:, 2]
    rim = 4 * max(1.0, math.hypot(inverse[0, 0], inverse[1, 0]))
    (left, top), (right, bottom) = (
        np.floor(covered.min(0) - rim).astype(int),
        np.ceil(covered.max(0) + rim).astype(int),
    )
    columns, rows = np.arange(left, right + 1), np.arange(top, bottom + 1)
    height, width = photo.shape[:2]
    region = photo[rows.clip(0, height - 1)][:, columns.clip(0, width - 1)]
    if border == "black":
        region[(rows < 0) | (rows >= height)] = 0
        region[:, (columns < 0) | (columns >= width)] = 0
    return region, np.array([left, top])


def similarity_crop(photo: Photo, keypoints: Keypoints, size: int = 112) -> Crop:
    """Cuts the five-point crop of ArcFace: the points come to lie on the template, black beyond the photo.

    Raises InputError when the points coincide.
    """
    # Scaling about pixel edges keeps the crop's content the same at any size.
    template = (ARCFACE_TEMPLATE + 0.5) * (size / 112) - 0.5
    return warp(photo, similarity_transform(keypoints, template), size, border="black")


def clip_crop(photo: Photo, face: Face, size: int = 224) -> Crop:
    """Cuts the whole head, with hair and chin, upright, repeating the photo's edge beyond the photo.

    Upright is what the eyes say, steadied by the mouth: in a profile the eyes alone nearly coincide.
    Raises InputError when the points coincide.
    """
    left_eye, right_eye, _, left_mouth, right_mouth = face.keypoints @ [1, 1j]
    eyes, mouth = (left_eye + right_eye) / 2, (left_mouth + right_mouth) / 2
    across, down = right_eye - left_eye, mouth - eyes
    direction = across + down / 1j  # the way down the face, turned a quarter, points across it
    half_side = face.head * max(HEAD_PER_EYE_DISTANCE * abs(across), HEAD_PER_EYE_TO_MOUTH * abs(down))
    if not (abs(direction) > 1e-4 and half_side > 1e-4):
        raise InputError("The points of the face coincide: give a photo in which the face is larger.")
    axis = half_side * direction / abs(direction)
    centre = eyes + HEAD_CENTRE_BELOW_EYES * down
    source = np.array([centre, centre + axis])
    target = np.array([(size - 1) / 2 * (1 + 1j), (size - 1) / 2 * (1 + 1j) + size / 2])
    transform = similarity_transform(_points(source), _points(target))
    return warp(photo, transform, size, border="edge")


def _points(z: np.ndarray) -> Float[np.ndarray, "n 2"]:
    return np.stack([np.real(z), np.imag(z)], axis=-1)
