"""From a photo to the one face that the identity encoder needs."""

import warnings
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from infinite_id_jax.errors import InputError, NoFaceError
from infinite_id_jax.faces.align import clip_crop, similarity_crop
from infinite_id_jax.faces.protocol import Crop, Face, FaceBackend, Photo

# Detectors look for a head with some room around it; a tight crop gets it as a share of its longer side.
PADDINGS = (0.25, 0.75)
PADDING_GRAY = 128
_SEARCHED = 1280  # pixels of a photo's longer side that are given a border: detectors look at no more


@dataclass(frozen=True)
class ExtractedFace:
    """A face of a photo with what the two encoders take of it: FA(x) in Infinite-ID's Eq. 4.

    `count` is the number of faces in the photo, `clip_crop` the head [size, size, 3] for CLIP, `arcface_crop` the
    tight crop of the same size that FaceID-Plus shows to CLIP, `recogniser_crop` the backend's own crop and
    `embedding` its raw float32 vector.
    """

    face: Face
    count: int
    clip_crop: Crop
    arcface_crop: Crop
    recogniser_crop: UInt8[np.ndarray, "r r 3"]  # of a side of its own
    embedding: Float[np.ndarray, " d"]
    recogniser: str = ""  # the backend's name, where one found it


def extract_face(
    photo: Photo, backend: FaceBackend, *, face_index: int | None = None, crop_size: int = 224
) -> ExtractedFace:
    """Finds, aligns and embeds one face of the photo: number `face_index`, counted from 0, the largest.

    Without an index the largest is taken, with a UserWarning when there are several. Raises NoFaceError
    when no face is found, even with a border around the photo, and InputError when the index is too high.
    """
    faces = detect_faces(photo, backend)
    if not faces:
        raise NoFaceError("No face was found in the photo: give one with a sharp, well lit face turned to the camera.")
    if face_index is None and len(faces) > 1:
        warnings.warn(
            f"The photo has {len(faces)} faces; the largest is taken. Choose another with "
            f"--face-index 0 to {len(faces) - 1}, largest first.",
            UserWarning,
            stacklevel=2,
        )
    index = face_index or 0
    if not 0 <= index < len(faces):
        raise InputError(f"There is no face {index}: the photo has {len(faces)}, numbered from 0, the largest.")
    face = faces[index]
    recogniser_crop = backend.align(photo, face)
    return ExtractedFace(
        face=face,
        count=len(faces),
        clip_crop=clip_crop(photo, face, crop_size),
        arcface_crop=similarity_crop(photo, face.keypoints, crop_size),
        recogniser_crop=recogniser_crop,
        embedding=backend.embed(recogniser_crop),
        recogniser=backend.name,
    )


def detect_faces(photo: Photo, backend: FaceBackend) -> list[Face]:
    """Finds the faces of a photo, the largest first; a photo that shows none is tried again with a border."""
    faces, small = backend.detect(photo), None
    for share in PADDINGS:
        if faces:
            break
        small = _reduced(photo) if small is None else small
        faces = _detect_padded(small, backend, round(share * max(small.shape)), photo.shape[1] / small.shape[1])
    return sorted(faces, key=lambda face: face.area, reverse=True)


def _reduced(photo: Photo) -> UInt8[np.ndarray, "h w 3"]:
    """A border around a panorama would be a hundred times as many pixels as it has."""
    height, width = photo.shape[:2]
    scale = _SEARCHED / max(height, width)
    if scale >= 1:
        return photo
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0))


def _detect_padded(photo: Photo, backend: FaceBackend, border: int, ratio: float) -> list[Face]:
    """Faces in the pixels of the photo that this one is `ratio` times smaller than."""
    padded = np.pad(photo, ((border, border), (border, border), (0, 0)), constant_values=PADDING_GRAY)
    faces = []
    for face in backend.detect(padded):
        x0, y0, x1, y1 = (ratio * (side - border) for side in face.box)
        faces.append(replace(face, box=(x0, y0, x1, y1), keypoints=ratio * (face.keypoints - border)))
    return faces
