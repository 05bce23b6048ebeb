"""IP-Adapter-FaceID: a recogniser's embedding as a few tokens (IP-Adapter's ip_adapter_faceid.py, MLPProjModel)."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from infinite_id_jax.identity.encoder import Mapper
from infinite_id_jax.identity.features import FaceFeatures, Needs, unit
from infinite_id_jax.identity.published import FACE_ID_RECOGNISER, PublishedConfig
from infinite_id_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class FaceIDConfig(PublishedConfig):
    family: ClassVar[str] = "faceid"
    title: ClassVar[str] = "IP-Adapter-FaceID"
    licence: ClassVar[str] = "the weights are for non-commercial research, as is insightface's recogniser"

    face_dim: int = 512
    hidden: int = 1024
    tokens: int = 4

    @property
    def trained_recogniser(self) -> str | None:
        return FACE_ID_RECOGNISER if self.face_dim == 512 else None

    @property
    def needs(self) -> Needs:
        return Needs(face_dim=self.face_dim)


class FaceIDEncoder(nnx.Module):
    """Decision 4's mapper."""

    def __init__(self, config: FaceIDConfig, *, rngs: nnx.Rngs):
        self.mapper = Mapper(config.face_dim, config.hidden, config.cross_attention_dim, config.tokens, rngs=rngs)

    def __call__(self, features: FaceFeatures) -> Float[Array, "B K D"]:
        """face_embedding [B, face_dim], of any length -> [B, tokens, D]. Zeros are nobody."""
        return self.mapper(unit(jnp.asarray(features.face_embedding)))
