"""IP-Adapter-Plus and Plus-Face: CLIP's penultimate hidden states through a resampler (IP-Adapter's resampler.py)."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx

from infinite_id_jax.identity.features import FaceFeatures, Needs
from infinite_id_jax.identity.published import PublishedConfig
from infinite_id_jax.identity.resampler import Resampler
from infinite_id_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class IPAdapterPlusConfig(PublishedConfig):
    family: ClassVar[str] = "ip_adapter_plus"
    title: ClassVar[str] = "IP-Adapter-Plus or Plus-Face"

    clip_dim: int = 1280
    queries: int = 16
    dim: int = 1280
    depth: int = 4
    heads: int = 20
    hidden: int = 5120

    @property
    def needs(self) -> Needs:
        return Needs(clip_dim=self.clip_dim, clip_layer="penultimate", empty_image=True)


class IPAdapterPlusEncoder(nnx.Module):
    """The resampler itself."""

    def __init__(self, config: IPAdapterPlusConfig, *, rngs: nnx.Rngs):
        self.resampler = Resampler(
            config.clip_dim,
            config.cross_attention_dim,
            queries=config.queries,
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            hidden=config.hidden,
            rngs=rngs,
        )

    def __call__(self, features: FaceFeatures) -> Float[Array, "B K D"]:
        """clip_hidden_states [B, L, clip_dim] -> [B, queries, D]. CLIP's answer to an image of zeros is nobody."""
        return self.resampler(jnp.asarray(features.clip_hidden_states))
