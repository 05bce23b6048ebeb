"""The backend of the paper's kind: insightface's SCRFD detects, its ArcFace recognises (512-d).

The package is MIT; its model packs, which it downloads, are for non-commercial research only.
"""

import functools
import importlib
import logging
import os
import warnings
from pathlib import Path
from types import ModuleType

import numpy as np
from jaxtyping import Float

from infinite_id_jax.errors import InputError, MissingExtraError
from infinite_id_jax.faces.align import similarity_crop
from infinite_id_jax.faces.protocol import Crop, Face, Photo

PACKS = ("buffalo_l", "antelopev2")  # in order of preference, the first that of published FaceIDs; they do not compare
DETECTION_SIZE = (640, 640)  # given at each call: the package's default changed in 1.0

logger = logging.getLogger(__name__)


class ArcFace:
    """SCRFD with ArcFace of one model pack (`FaceBackend`).

    Raises MissingExtraError without the extra `insightface`, and InputError for a pack that is not complete.
    """

    def __init__(self, pack: str, folder: Path) -> None:
        app = import_insightface("insightface.app")
        _say_licence()
        try:
            models = app.FaceAnalysis(name=str(folder), allowed_modules=["detection", "recognition"]).models
            self._detector, self._recogniser = models["detection"], models["recognition"]
        except Exception as error:  # a bare AssertionError, KeyError or any of onnxruntime's
            raise InputError(
                f"The insightface pack `{pack}` is damaged or incomplete: delete its folder, fetch it again."
            ) from error
        for model in (self._detector, self._recogniser):
            model.prepare(ctx_id=0)
        self.name = f"insightface/{pack}"
        self.embedding_dim = int(self._recogniser.output_shape[-1])

    def detect(self, photo: Photo) -> list[Face]:
        """Finds all faces of an RGB photo at 640 px."""
        boxes, keypoints = self._detector.detect(_to_bgr(photo), input_size=DETECTION_SIZE)
        return [
            Face((x0, y0, x1, y1), score, points.astype(np.float64))
            for (x0, y0, x1, y1, score), points in zip(boxes.tolist(), keypoints, strict=True)
        ]

    def align(self, photo: Photo, face: Face) -> Crop:
        """Cuts the five-point similarity crop, 112 px in both packs."""
        return similarity_crop(photo, face.keypoints, int(self._recogniser.input_size[0]))

    def embed(self, crop: Crop) -> Float[np.ndarray, " d"]:
        """Embeds a crop of `align`: 512 floats, not normalised."""
        return self._recogniser.get_feat(_to_bgr(crop)).ravel().astype(np.float32)


def find_pack(pack: str) -> Path | None:
    """The folder that holds the pack's ONNX files under $INSIGHTFACE_HOME (else ~/.insightface), if any.

    antelopev2's archive holds one more folder of that name, so both places are looked at.
    """
    folder = _home() / "models" / pack
    return next((place for place in (folder, folder / pack) if any(place.glob("*.onnx"))), None)


def fetch_pack(pack: str) -> Path:
    """Lets insightface download and unpack the pack; InputError when it cannot be had."""
    storage = import_insightface("insightface.utils.storage")
    _say_licence()
    # An empty folder, left by an interrupted download, would pass for a pack: hence force.
    try:
        storage.download("models", pack, force=True, root=str(_home()))
    except Exception as error:  # requests', zipfile's and the system's own, and a bare RuntimeError
        raise InputError(
            f"The insightface pack `{pack}` could not be downloaded ({type(error).__name__}): "
            "check the network, or unpack it by hand into ~/.insightface/models."
        ) from error
    folder = find_pack(pack)
    if folder is None:
        raise InputError(f"The download of the insightface pack `{pack}` holds no models: fetch it by hand.")
    return folder


def import_insightface(module: str) -> ModuleType:
    """Imports a module of insightface; MissingExtraError when it or onnxruntime is absent."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its dependencies deprecate much while they load
            return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError("The face backend `insightface`", "insightface") from error


def _home() -> Path:
    return Path(os.environ.get("INSIGHTFACE_HOME") or "~/.insightface").expanduser()


def _to_bgr(photo: Photo) -> Photo:
    return np.ascontiguousarray(photo[..., ::-1])


@functools.cache
def _say_licence() -> None:
    logger.warning("insightface's model packs are licensed for non-commercial research only.")
