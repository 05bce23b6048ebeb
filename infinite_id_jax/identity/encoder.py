"""Face embeddings to identity tokens c_id (Infinite-ID Eq. 4), and mixtures of people (A.7)."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from infinite_id_jax.errors import InputError
from infinite_id_jax.identity.config import AdapterConfig
from infinite_id_jax.typing import Array, Float


class ClipMapper(nnx.Module):
    """M_clip: each hidden state of the CLIP image encoder to one identity token (METHOD row 3)."""

    def __init__(self, config: AdapterConfig, *, rngs: nnx.Rngs):
        hidden = config.clip_hidden or config.clip_dim
        self.proj_in = _linear(config.clip_dim, hidden, rngs)
        self.proj_out = _linear(hidden, config.cross_attention_dim, rngs)
        self.norm = nnx.LayerNorm(config.cross_attention_dim, epsilon=1e-5, use_fast_variance=False, rngs=rngs)

    def __call__(self, hidden_states: Float[Array, "B L C"]) -> Float[Array, "B L D"]:
        hidden = jax.nn.gelu(self.proj_in(hidden_states), approximate=False)
        return self.norm(self.proj_out(hidden))


class FaceMapper(nnx.Module):
    """M_face: the recogniser's embedding, L2-normalised, to n identity tokens (METHOD row 4)."""

    def __init__(self, config: AdapterConfig, *, rngs: nnx.Rngs):
        hidden = config.face_hidden or 2 * config.face_dim
        self.tokens = config.face_tokens
        self.proj_in = _linear(config.face_dim, hidden, rngs)
        self.proj_out = _linear(hidden, config.face_tokens * config.cross_attention_dim, rngs)
        self.norm = nnx.LayerNorm(config.cross_attention_dim, epsilon=1e-5, use_fast_variance=False, rngs=rngs)

    def __call__(self, embedding: Float[Array, "B E"]) -> Float[Array, "B n D"]:
        """The zero embedding stays zero: it is the unconditional identity (row 11)."""
        length = jnp.linalg.norm(embedding, axis=-1, keepdims=True)
        hidden = self.proj_in(embedding / jnp.maximum(length, 1e-12))
        tokens = self.proj_out(jax.nn.gelu(hidden, approximate=False))
        return self.norm(rearrange(tokens, "B (n D) -> B n D", n=self.tokens))


def _linear(dim_in: int, dim_out: int, rngs: nnx.Rngs) -> nnx.Linear:
    """Biases start at U(-1, 1) / sqrt(dim_in), as in PyTorch: with zeros the unconditional identity would enter the
    LayerNorm as exact zeros, where its gradient is 1 / sqrt(epsilon), 316 times that of a token of unit variance.
    """

    def bias(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32, **_: Any) -> Array:
        return jax.random.uniform(key, shape, dtype, -1, 1) / math.sqrt(dim_in)

    return nnx.Linear(dim_in, dim_out, bias_init=bias, rngs=rngs)


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
    """Identities of different token counts in one array: repeating all tokens of one is invisible to softmax."""
    length = math.lcm(*(identity.shape[0] for identity in identities))
    return jnp.stack([jnp.tile(identity, (length // identity.shape[0], 1)) for identity in identities])
