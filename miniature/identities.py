"""The identity data of the adapters: photographs of the miniature's people, six or more each, as records."""

from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.generated import Drawing, DrawnPhoto, write_drawn
from infinite_id_jax.faces.align import clip_crop
from infinite_id_jax.faces.miniature import HEAD, RECOGNISER, MiniatureFaces
from infinite_id_jax.faces.protocol import Face
from infinite_id_jax.files import fingerprint
from infinite_id_jax.stable_diffusion.clip_vision import resize_and_crop
from miniature import pictures


def write(folder: Path, model: Path, drawn: pictures.Pictures) -> None:
    """Write the set "identity" with the features of a model folder; what an earlier call left is completed."""
    photos = pictures.SETS["identity"].photos
    faces = MiniatureFaces(model / "faces")

    def draw(person: int, photo: int, clip_size: int) -> DrawnPhoto:
        i = person * photos + photo
        found = faces.detect(drawn.images[i])
        if not found:  # which the offline stage would leave out; here every person has as many photos
            found = [Face((0.0, 0.0, 0.0, 0.0), 1.0, drawn.keypoints[i].astype(np.float64), HEAD)]
        crop = faces.align(drawn.images[i], found[0])
        # As the pipeline shows it to CLIP.
        head = resize_and_crop(Image.fromarray(clip_crop(drawn.images[i], found[0])), clip_size)
        return DrawnPhoto(drawn.images[i], drawn.captions[i], head, crop, faces.embed(crop))

    parameters = ("identity", len(drawn.images), fingerprint(model / "faces"))
    write_drawn(
        folder,
        model,
        Drawing("miniature", parameters, draw, RECOGNISER.outputs, RECOGNISER.size),
        people=len(drawn.images) // photos,
        photos=photos,
        size=pictures.SIZE,
        shards=8,
    )
