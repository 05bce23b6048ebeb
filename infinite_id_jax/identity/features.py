"""What the frozen encoders say of a face, and which part of it an adapter takes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from infinite_id_jax.errors import InputError
from infinite_id_jax.typing import Array

CLIP_LAYERS = ("last", "penultimate")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FaceFeatures:
    """Features of one face, or of a batch of them with an axis before.

    clip_hidden_states: of the CLIP image encoder [tokens, clip_dim]; face_embedding: the recogniser's [face_dim];
    clip_pooled: CLIP's projected image embedding [clip_dim]. An adapter reads what its `Needs` say;
    empty_clip_hidden_states: those of an image of zeros, which some adapters take for nobody; a pipeline with an
    image encoder computes them.
    """

    clip_hidden_states: np.ndarray | Array | None = None
    face_embedding: np.ndarray | Array | None = None
    clip_pooled: np.ndarray | Array | None = None
    empty_clip_hidden_states: np.ndarray | Array | None = None


@dataclasses.dataclass(frozen=True)
class Needs:
    """What an adapter takes of a face; a width of 0 means nothing of that encoder."""

    clip_dim: int = 0
    clip_layer: str = "last"  # hidden states of the "last" or the "penultimate" layer, or the "pooled" embedding
    face_dim: int = 0
    empty_image: bool = False  # nobody is CLIP's answer to an image of zeros; else features of zeros
    arcface_crop: bool = False  # CLIP sees the recogniser's tight crop; else the whole head

    @property
    def fields(self) -> dict[str, tuple[str | int, ...]]:
        """Names of the fields of FaceFeatures with their shapes; a word stands for any number."""
        fields: dict[str, tuple[str | int, ...]] = {}
        if self.clip_dim and self.clip_layer == "pooled":
            fields["clip_pooled"] = (self.clip_dim,)
        elif self.clip_dim:
            fields["clip_hidden_states"] = ("tokens", self.clip_dim)
        if self.face_dim:
            fields["face_embedding"] = (self.face_dim,)
        return fields

    def select(self, features: FaceFeatures) -> FaceFeatures:
        """The needed fields of one face as arrays. Raises InputError that names what is missing or of another shape."""
        fields = self.fields
        missing = [name for name in fields if getattr(features, name) is None]
        if missing:
            shapes = ", ".join(f"{name} [{', '.join(map(str, fields[name]))}]" for name in missing)
            raise InputError(f"This adapter also takes {shapes}: give it in FaceFeatures.")
        arrays = {name: jnp.asarray(getattr(features, name)) for name in fields}
        for name, array in arrays.items():
            form = fields[name]
            if array.ndim != len(form) or array.shape[-1] != form[-1]:
                raise InputError(
                    f"{name} has shape {list(array.shape)} and this adapter takes [{', '.join(map(str, form))}]: "
                    "compute it with the encoders the adapter was trained with."
                )
        return FaceFeatures(**arrays)


def unit(embedding: Array) -> Array:
    """A face embedding of length 1; zeros stay zeros: they are nobody (METHOD row 11)."""
    length = jnp.linalg.norm(embedding, axis=-1, keepdims=True)
    return embedding / jnp.maximum(length, 1e-12)
