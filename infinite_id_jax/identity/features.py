"""What the frozen encoders say of a face, and which part of it an adapter takes."""

import dataclasses
from typing import Any

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
        """The needed fields of one face as fp32 arrays.

        Raises InputError that names what is missing, of another shape or not finite.
        """
        fields = self.fields
        missing = [name for name in fields if getattr(features, name) is None]
        if missing:
            shapes = ", ".join(f"{name} [{', '.join(map(str, fields[name]))}]" for name in missing)
            raise InputError(f"This adapter also takes {shapes}: give it in FaceFeatures.")
        return FaceFeatures(**{name: _checked(name, getattr(features, name), form) for name, form in fields.items()})

    def nobody(self, person: FaceFeatures, empty: Any) -> FaceFeatures:
        """What stands for no person beside `select`'s: zeros, or CLIP's answer to an image of zeros (decision 11).

        empty: that answer, [tokens, clip_dim], read where `empty_image` says so. Raises InputError as `select`.
        """
        zeros = jax.tree.map(np.zeros_like, person)
        if not self.empty_image or person.clip_hidden_states is None:
            return zeros
        shape = person.clip_hidden_states.shape
        return dataclasses.replace(zeros, clip_hidden_states=_checked("empty_clip_hidden_states", empty, shape))


def _checked(name: str, values: Any, form: tuple[str | int, ...]) -> np.ndarray:
    """One feature of one face in fp32. Raises InputError for another shape than `form` and for what is not finite."""
    try:
        array = np.asarray(values, np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} holds no numbers ({error}): give an array.") from None
    takes = f"this adapter takes [{', '.join(map(str, form))}]"
    if array.ndim == len(form) + 1 and array.shape[-1] == form[-1]:
        raise InputError(
            f"{name} has shape {list(array.shape)} and {takes} of one face: give each face of the batch by itself."
        )
    if array.ndim != len(form) or any(n not in ("tokens", size) for n, size in zip(form, array.shape, strict=True)):
        raise InputError(
            f"{name} has shape {list(array.shape)} and {takes}: compute it with the encoders the adapter was trained "
            "with."
        )
    if not array.size or not np.isfinite(array).all():
        raise InputError(f"{name} holds no numbers, or some that are not finite: compute it again from the photo.")
    return array


def unit(embedding: Array) -> Array:
    """A face embedding of length 1, computed in fp32; zeros stay zeros: they are nobody (decision 11)."""
    wide = embedding.astype(jnp.float32)
    length = jnp.linalg.norm(wide, axis=-1, keepdims=True)
    return (wide / jnp.maximum(length, 1e-12)).astype(embedding.dtype)
