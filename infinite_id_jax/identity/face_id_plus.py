"""IP-Adapter-FaceID-Plus: tokens of a face embedding that look at CLIP's hidden states (ProjPlusModel)."""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from infinite_id_jax.identity.encoder import Mapper
from infinite_id_jax.identity.features import FaceFeatures, Needs, unit
from infinite_id_jax.identity.published import FACE_ID_RECOGNISER, PublishedConfig
from infinite_id_jax.identity.resampler import Perceiver
from infinite_id_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class FaceIDPlusConfig(PublishedConfig):
    """shortcut_scale: of what CLIP adds to the face tokens in version 2; None is version 1, which has CLIP's alone.

    The two versions' files look the same.
    """

    family: ClassVar[str] = "faceid_plus"
    title: ClassVar[str] = "IP-Adapter-FaceID-Plus"
    licence: ClassVar[str] = "the weights are for non-commercial research, as is insightface's recogniser"

    face_dim: int = 512
    face_hidden: int = 1024
    tokens: int = 4
    clip_dim: int = 1280
    depth: int = 4
    heads: int = 32
    hidden: int = 8192
    shortcut_scale: float | None = 1.0

    @property
    def version(self) -> str:
        return " V1" if self.shortcut_scale is None else " V2"

    @property
    def trained_recogniser(self) -> str | None:
        return FACE_ID_RECOGNISER if self.face_dim == 512 else None

    @property
    def needs(self) -> Needs:
        return Needs(self.clip_dim, "penultimate", self.face_dim, empty_image=True, arcface_crop=True)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"shortcut_scale": self.shortcut_scale}


class FaceIDPlusEncoder(nnx.Module):
    """Decision 4's mapper gives the latents of a perceiver over CLIP's tokens."""

    def __init__(self, config: FaceIDPlusConfig, *, rngs: nnx.Rngs):
        width = config.cross_attention_dim
        self.mapper = Mapper(config.face_dim, config.face_hidden, width, config.tokens, rngs=rngs)
        self.perceiver_resampler = Perceiver(
            config.clip_dim, width, width, config.depth, config.heads, 64, config.hidden, rngs=rngs
        )
        self.shortcut_scale = config.shortcut_scale

    def __call__(self, features: FaceFeatures) -> Float[Array, "B K D"]:
        """face_embedding [B, face_dim] and clip_hidden_states [B, L, clip_dim] -> [B, tokens, D]."""
        face = self.mapper(unit(jnp.asarray(features.face_embedding)))
        seen = self.perceiver_resampler(jnp.asarray(features.clip_hidden_states), face)
        return seen if self.shortcut_scale is None else face + self.shortcut_scale * seen
