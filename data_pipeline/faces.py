"""The second stage: the one face of each photo, with the crops that the encoders take."""

import dataclasses

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from data_pipeline.config import PipelineConfig
from data_pipeline.ingest import reopen
from data_pipeline.provenance import Row
from data_pipeline.sources import Source
from infinite_id_jax.errors import InputError
from infinite_id_jax.faces.align import ARCFACE_TEMPLATE, clip_crop
from infinite_id_jax.faces.extract import detect_faces
from infinite_id_jax.faces.protocol import Face, FaceBackend
from infinite_id_jax.stable_diffusion.clip_vision import resize_and_crop

# By area: of two people side by side neither is the photo's subject, while passers-by are much smaller.
DOMINANCE = 2.0


@dataclasses.dataclass(frozen=True, eq=False)
class FoundFace:
    """A photo that shows one face; about 200 KB, so that a shard of them fits in memory."""

    source: Source
    photo_size: tuple[int, int]  # height, width
    box: tuple[float, float, float, float]
    clip_crop: UInt8[np.ndarray, "s s 3"]
    recogniser_crop: UInt8[np.ndarray, "r r 3"]
    embedding: Float32[np.ndarray, " E"]  # raw

    @property
    def row(self) -> Row:
        return self.source.row


def find_face(source: Source, backend: FaceBackend, config: PipelineConfig, clip_size: int) -> FoundFace | Row:
    """The face that is the photo's subject, or the row with the reason why there is none.

    Faces below `min_score` do not count. Of several the largest is taken if its area is twice the next one's.
    Raises InputError if the photo has changed since it was hashed.
    """
    photo = reopen(source)
    faces = [face for face in detect_faces(photo, backend) if face.score >= config.min_score]
    row = dataclasses.replace(source.row, faces=len(faces))
    if not faces:
        return row.rejected("no_face")
    face = faces[0]
    row = dataclasses.replace(row, face_size=face_size(face), score=round(face.score, 4))
    if len(faces) > 1 and face.area < DOMINANCE * faces[1].area:
        return row.rejected("many_faces", f"{len(faces)} faces")
    if face_size(face) < config.min_face:
        return row.rejected("small_face", f"{face_size(face)} px, {config.min_face} are asked for")
    try:
        # As the pipeline shows it to CLIP.
        crop = resize_and_crop(Image.fromarray(clip_crop(photo, face)), clip_size)
        recogniser_crop = backend.align(photo, face)
    except InputError as error:  # the points coincide
        return row.rejected("no_face", str(error))
    height, width = photo.shape[:2]
    return FoundFace(
        source=dataclasses.replace(source, row=row),
        photo_size=(height, width),
        box=face.box,
        clip_crop=crop,
        recogniser_crop=recogniser_crop,
        embedding=backend.embed(recogniser_crop),
    )


def face_size(face: Face) -> int:
    """The shorter side of the box in whole pixels."""
    x0, y0, x1, y1 = face.box
    return round(min(x1 - x0, y1 - y0))


def recogniser_size(backend: FaceBackend) -> int:
    """Pixels a side of the backend's crop, found by cutting one."""
    face = Face((19.0, 25.0, 92.0, 112.0), 1.0, ARCFACE_TEMPLATE)
    return backend.align(np.full((112, 112, 3), 128, np.uint8), face).shape[0]
