"""Face features to identity tokens c_id (Infinite-ID Eq. 4), and mixtures of people (A.7)."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from infinite_id_jax.errors import InputError
from infinite_id_jax.identity.config import AdapterConfig
from infinite_id_jax.identity.features import FaceFeatures, unit
from infinite_id_jax.identity.resampler import Resampler
from infinite_id_jax.stable_diffusion.kernels import Linear, layer_norm
from infinite_id_jax.typing import Array, Float


class Mapper(nnx.Module):
    """Linear, GELU, Linear to `tokens` tokens of width `dim`, LayerNorm per token (decisions 3 and 4)."""

    def __init__(self, dim_in: int, hidden: int, dim: int, tokens: int, *, rngs: nnx.Rngs):
        self.tokens = tokens
        self.fc_in = _linear(dim_in, hidden, rngs)
        self.fc_out = _linear(hidden, tokens * dim, rngs)
        self.norm = layer_norm(dim, rngs)

    def __call__(self, x: Float[Array, "*rows E"]) -> Float[Array, "*rows n D"]:
        tokens = self.fc_out(jax.nn.gelu(self.fc_in(x), approximate=False))
        return self.norm(rearrange(tokens, "... (n D) -> ... n D", n=self.tokens))


class InfiniteIDEncoder(nnx.Module):
    """M_clip over every hidden state of the CLIP image encoder, M_face over the recogniser's embedding (Eq. 4)."""

    def __init__(self, config: AdapterConfig, *, rngs: nnx.Rngs):
        width = config.cross_attention_dim
        if config.clip_mapper == "mlp":
            self.clip_mapper = Mapper(config.clip_dim, config.clip_hidden or config.clip_dim, width, 1, rngs=rngs)
        elif config.clip_mapper == "resampler":
            self.clip_mapper = Resampler(
                config.clip_dim,
                width,
                queries=config.resampler_queries,
                dim=config.resampler_dim,
                depth=config.resampler_depth,
                heads=config.resampler_heads,
                rngs=rngs,
            )
        if config.face_tokens:
            hidden = config.face_hidden or 2 * config.face_dim
            self.face_mapper = Mapper(config.face_dim, hidden, width, config.face_tokens, rngs=rngs)

    def __call__(self, features: FaceFeatures) -> Float[Array, "B K D"]:
        """c_id = [M_clip(hidden states), M_face(embedding)] (Eq. 4). Zeros: the unconditional one (decision 11)."""
        tokens = []
        if hasattr(self, "clip_mapper"):
            seen = self.clip_mapper(jnp.asarray(features.clip_hidden_states))
            tokens.append(seen.reshape(seen.shape[0], -1, seen.shape[-1]))  # one token of each, or the resampler's
        if hasattr(self, "face_mapper"):
            tokens.append(self.face_mapper(unit(jnp.asarray(features.face_embedding))))
        return jnp.concatenate(tokens, axis=1)


def _linear(dim_in: int, dim_out: int, rngs: nnx.Rngs) -> nnx.Linear:
    """Biases start at U(-1, 1) / sqrt(dim_in), as in PyTorch: with zeros the unconditional identity would enter the
    LayerNorm as exact zeros, where its gradient is 1 / sqrt(epsilon), 316 times that of a token of unit variance.
    """

    def bias(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32, **_: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -1, 1) / math.sqrt(dim_in)

    return Linear(dim_in, dim_out, bias_init=bias, rngs=rngs)


def mix(identities: Sequence[Float[Array, "_ D"]]) -> Float[Array, "K D"]:
    """Several people as one identity: their tokens side by side (A.7, Fig. 13)."""
    return jnp.concatenate(list(identities), axis=0)


def interpolate(identities: Sequence[Float[Array, "K D"]], weights: Sequence[float]) -> Float[Array, "K D"]:
    """The weighted sum of several people's tokens (A.7, Fig. 14). Raises InputError unless the weights sum to 1."""
    if len(weights) != len(identities):
        raise InputError(f"{len(weights)} weights for {len(identities)} identities: give one for each.")
    if not math.isclose(sum(weights), 1.0, abs_tol=1e-4):
        raise InputError(f"The identity weights sum to {sum(weights):g}: make them sum to 1.")
    if len({identity.shape for identity in identities}) > 1:
        raise InputError("Only identities of one person each can be interpolated: their token counts differ.")
    return sum((w * identity for w, identity in zip(weights, identities, strict=True)), jnp.zeros(()))


def stack(identities: Sequence[Float[Array, "_ D"]]) -> Float[Array, "M K D"]:
    """Identities of different token counts in one array: repeating all tokens of one is invisible to softmax.

    Raises InputError for counts whose least common multiple would be many times as long.
    """
    counts = [identity.shape[0] for identity in identities]
    length = math.lcm(*counts)
    if length > 4 * max(counts):
        raise InputError(f"Together identities of {counts} tokens take {length} each: draw them in several calls.")
    return jnp.stack([jnp.tile(identity, (length // identity.shape[0], 1)) for identity in identities])
