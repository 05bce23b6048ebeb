"""The identity data of the adapters: photographs of the miniature's people, six or more each, as records."""

from pathlib import Path

from PIL import Image

from data_pipeline.generated import Drawing, DrawnPhoto, write_drawn
from infinite_id_jax.errors import InputError, NoFaceError
from infinite_id_jax.faces.extract import extract_face
from infinite_id_jax.faces.miniature import RECOGNISER, MiniatureFaces
from infinite_id_jax.files import fingerprint
from infinite_id_jax.stable_diffusion.clip_vision import resize_and_crop
from miniature import pictures


def write(folder: Path, model: Path, drawn: pictures.Pictures) -> None:
    """Write the set "identity" with the features of a model folder; what an earlier call left is completed."""
    photos = pictures.SETS["identity"].photos
    faces = MiniatureFaces(model / "faces")

    def draw(person: int, photo: int, clip_size: int) -> DrawnPhoto:
        i = person * photos + photo
        try:
            face = extract_face(drawn.images[i], faces)
        except NoFaceError:  # which the offline stage would leave out; here every person has as many photos
            raise InputError(f"The miniature's detector finds nobody in picture {i}: train it longer.") from None
        head = resize_and_crop(Image.fromarray(face.clip_crop), clip_size)  # as the pipeline shows it to CLIP
        return DrawnPhoto(drawn.images[i], drawn.captions[i], head, face.recogniser_crop, face.embedding)

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
