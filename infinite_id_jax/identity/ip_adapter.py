"""IP-Adapter: CLIP's pooled image embedding as a few tokens (Ye et al. 2023, arXiv 2308.06721, Sec. 3.2)."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from infinite_id_jax.identity.features import FaceFeatures, Needs
from infinite_id_jax.identity.published import PublishedConfig
from infinite_id_jax.stable_diffusion.kernels import Linear, layer_norm
from infinite_id_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class IPAdapterConfig(PublishedConfig):
    family: ClassVar[str] = "ip_adapter"
    title: ClassVar[str] = "IP-Adapter"

    clip_dim: int = 1280
    tokens: int = 4

    @property
    def needs(self) -> Needs:
        return Needs(clip_dim=self.clip_dim, clip_layer="pooled")


class IPAdapterEncoder(nnx.Module):
    """Linear to all tokens at once, then LayerNorm."""

    def __init__(self, config: IPAdapterConfig, *, rngs: nnx.Rngs):
        width = config.cross_attention_dim
        self.tokens = config.tokens
        self.proj = Linear(config.clip_dim, config.tokens * width, rngs=rngs)
        self.norm = layer_norm(width, rngs)

    def __call__(self, features: FaceFeatures) -> Float[Array, "B K D"]:
        """clip_pooled [B, clip_dim] -> [B, tokens, D]. Zeros are nobody."""
        return self.norm(rearrange(self.proj(jnp.asarray(features.clip_pooled)), "B (n D) -> B n D", n=self.tokens))
