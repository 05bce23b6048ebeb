"""What a face backend must do: find faces with five points, cut the recogniser's crop, embed it."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

# infinite_id_jax.typing brings jax; this package must import in a blink and run where jax is absent.
Photo = UInt8[np.ndarray, "H W 3"]
Crop = UInt8[np.ndarray, "side side 3"]
Keypoints = Float[np.ndarray, "5 2"]


@dataclass(frozen=True)
class Face:
    """One detected face, in pixels of the photo; pixel centres lie at integers, as in OpenCV.

    `keypoints` are (x, y) of left eye, right eye, nose, left and right mouth corner, left and right as
    seen in the image. `score` is the detector's confidence in [0, 1]. Points and box may lie outside
    the photo when a face is cut off at its edge.
    """

    box: tuple[float, float, float, float]  # x0, y0, x1, y1
    score: float
    keypoints: Keypoints
    head: float = 1.0  # how large the head is beside its points, of a photograph's

    @property
    def area(self) -> float:
        """Area of the box in square pixels."""
        x0, y0, x1, y1 = self.box
        return (x1 - x0) * (y1 - y0)


@runtime_checkable
class FaceBackend(Protocol):
    """A detector and the recogniser that belongs to it."""

    @property
    def name(self) -> str:
        """The name `get_backend` knows it by; embeddings of two names cannot be compared."""
        ...

    @property
    def embedding_dim(self) -> int:
        """Length of the embedding: `face_dim` of an adapter trained on it."""
        ...

    def detect(self, photo: Photo) -> list[Face]:
        """Finds all faces of an RGB photo, in any order."""
        ...

    def align(self, photo: Photo, face: Face) -> Crop:
        """Cuts the upright square RGB crop that the recogniser was trained on."""
        ...

    def embed(self, crop: Crop) -> Float[np.ndarray, " d"]:
        """Turns the crop of `align` into the recogniser's raw, not normalised, float32 embedding."""
        ...
