"""A perceiver that reads many tokens into a few (IP-Adapter's resampler.py, after Flamingo)."""

import jax
import jax.numpy as jnp
from flax import nnx

from infinite_id_jax.stable_diffusion.attention import merge_heads, split_heads
from infinite_id_jax.stable_diffusion.kernels import Linear, dot_product_attention, layer_norm
from infinite_id_jax.typing import Array, Float, Tokens


class PerceiverAttention(nnx.Module):
    """Latents attend to the tokens and to themselves, without biases."""

    def __init__(self, dim: int, heads: int, head_dim: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.norm1 = layer_norm(dim, rngs)
        self.norm2 = layer_norm(dim, rngs)
        self.to_q = Linear(dim, heads * head_dim, use_bias=False, rngs=rngs)
        self.to_kv = Linear(dim, 2 * heads * head_dim, use_bias=False, rngs=rngs)
        self.out = Linear(heads * head_dim, dim, use_bias=False, rngs=rngs)

    def __call__(self, x: Tokens, latents: Float[Array, "B n C"]) -> Float[Array, "B n C"]:
        x, latents = self.norm1(x), self.norm2(latents)
        k, v = jnp.split(self.to_kv(jnp.concatenate([x, latents], axis=1)), 2, axis=-1)
        q, k, v = (split_heads(part, self.heads) for part in (self.to_q(latents), k, v))
        return self.out(merge_heads(dot_product_attention(q, k, v)))


class FeedForward(nnx.Module):
    """LayerNorm, then two maps without biases around the exact GELU."""

    def __init__(self, dim: int, hidden: int, *, rngs: nnx.Rngs):
        self.norm = layer_norm(dim, rngs)
        self.fc_in = Linear(dim, hidden, use_bias=False, rngs=rngs)
        self.fc_out = Linear(hidden, dim, use_bias=False, rngs=rngs)

    def __call__(self, x: Tokens) -> Tokens:
        return self.fc_out(jax.nn.gelu(self.fc_in(self.norm(x)), approximate=False))


class PerceiverLayer(nnx.Module):
    def __init__(self, dim: int, heads: int, head_dim: int, hidden: int, *, rngs: nnx.Rngs):
        self.attention = PerceiverAttention(dim, heads, head_dim, rngs=rngs)
        self.mlp = FeedForward(dim, hidden, rngs=rngs)


class Perceiver(nnx.Module):
    """The layers between two projections; latents come from outside."""

    def __init__(
        self, dim_in: int, dim: int, dim_out: int, depth: int, heads: int, head_dim: int, hidden: int, *, rngs: nnx.Rngs
    ):
        self.proj_in = Linear(dim_in, dim, rngs=rngs)
        self.layers = nnx.List(PerceiverLayer(dim, heads, head_dim, hidden, rngs=rngs) for _ in range(depth))
        self.proj_out = Linear(dim, dim_out, rngs=rngs)
        self.norm_out = layer_norm(dim_out, rngs)

    def __call__(self, x: Tokens, latents: Float[Array, "B n _"]) -> Float[Array, "B n _"]:
        """x [B, L, dim_in], latents [B, n, dim] -> [B, n, dim_out]."""
        x = self.proj_in(x)
        for layer in self.layers:
            latents = layer.attention(x, latents) + latents
            latents = layer.mlp(latents) + latents
        return self.norm_out(self.proj_out(latents))


class Resampler(nnx.Module):
    """A perceiver with latents of its own: the mapper of IP-Adapter-Plus."""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        *,
        queries: int = 16,
        dim: int = 1280,
        depth: int = 4,
        heads: int = 20,
        head_dim: int = 64,
        hidden: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.perceiver = Perceiver(dim_in, dim, dim_out, depth, heads, head_dim, hidden or 4 * dim, rngs=rngs)
        self.latents = nnx.Param(jax.random.normal(rngs.params(), (1, queries, dim)) / dim**0.5)

    def __call__(self, x: Tokens) -> Float[Array, "B n _"]:
        """x [B, L, dim_in] -> [B, queries, dim_out]."""
        latents = jnp.broadcast_to(self.latents[...], (x.shape[0], *self.latents.shape[1:]))
        return self.perceiver(x, latents)
