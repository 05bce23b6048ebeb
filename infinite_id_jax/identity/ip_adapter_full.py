"""IP-Adapter-Full-Face: each of CLIP's penultimate hidden states to one token (ip_adapter.py, MLPProjModel)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from infinite_id_jax.identity.features import FaceFeatures, Needs
from infinite_id_jax.identity.published import PublishedConfig
from infinite_id_jax.stable_diffusion.kernels import Linear, layer_norm
from infinite_id_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class IPAdapterFullConfig(PublishedConfig):
    family: ClassVar[str] = "ip_adapter_full"
    title: ClassVar[str] = "IP-Adapter-Full-Face"

    clip_dim: int = 1280

    @property
    def needs(self) -> Needs:
        return Needs(clip_dim=self.clip_dim, clip_layer="penultimate", empty_image=True)


class IPAdapterFullEncoder(nnx.Module):
    """Linear, GELU, Linear, LayerNorm per hidden state."""

    def __init__(self, config: IPAdapterFullConfig, *, rngs: nnx.Rngs):
        width = config.cross_attention_dim
        self.fc_in = Linear(config.clip_dim, config.clip_dim, rngs=rngs)
        self.fc_out = Linear(config.clip_dim, width, rngs=rngs)
        self.last_norm = layer_norm(width, rngs)

    def __call__(self, features: FaceFeatures) -> Float[Array, "B K D"]:
        """clip_hidden_states [B, K, clip_dim] -> [B, K, D]. CLIP's answer to an image of zeros is nobody."""
        hidden = self.fc_in(jnp.asarray(features.clip_hidden_states))
        return self.last_norm(self.fc_out(jax.nn.gelu(hidden, approximate=False)))
