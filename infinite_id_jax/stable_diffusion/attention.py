"""Attention and the transformer of the U-Net (diffusers' attention_processor.py, attention.py, transformer_2d.py)."""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from infinite_id_jax.stable_diffusion.kernels import GroupNorm, Linear, dot_product_attention, layer_norm
from infinite_id_jax.typing import Array, Attend, Float, Heads, Tokens


def split_heads(x: Tokens, heads: int) -> Heads:
    return rearrange(x, "B L (N D) -> B L N D", N=heads)


def merge_heads(x: Heads) -> Tokens:
    return rearrange(x, "B L N D -> B L (N D)")


class Attention(nnx.Module):
    """Multi-head attention; self-attention without a context, cross-attention with one.

    `attend` is the seam: a pure function of (q, k, v) that another one may replace.
    """

    def __init__(
        self, query_dim: int, context_dim: int, heads: int, head_dim: int, *, bias: bool = False, rngs: nnx.Rngs
    ):
        inner = heads * head_dim
        self.heads = heads
        self.to_q = Linear(query_dim, inner, use_bias=bias, rngs=rngs)
        self.to_k = Linear(context_dim, inner, use_bias=bias, rngs=rngs)
        self.to_v = Linear(context_dim, inner, use_bias=bias, rngs=rngs)
        self.to_out = Linear(inner, query_dim, rngs=rngs)
        self.attend: Attend = dot_product_attention

    def __call__(self, x: Tokens, context: Float[Array, "B K _"] | None = None) -> Tokens:
        """x [B, L, C], context [B, L', C'] -> [B, L, C]."""
        context = x if context is None else context
        q = split_heads(self.to_q(x), self.heads)
        k = split_heads(self.to_k(context), self.heads)
        v = split_heads(self.to_v(context), self.heads)
        return self.to_out(merge_heads(self.attend(q, k, v)))


class FeedForward(nnx.Module):
    """GEGLU with the exact GELU: (a * gelu(b)) W, hidden width 4 C."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.proj = Linear(dim, 8 * dim, rngs=rngs)
        self.out = Linear(4 * dim, dim, rngs=rngs)

    def __call__(self, x: Tokens) -> Tokens:
        hidden, gate = jnp.split(self.proj(x), 2, axis=-1)
        return self.out(hidden * jax.nn.gelu(gate, approximate=False))


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention, feed-forward, each behind a LayerNorm and a residual."""

    def __init__(self, dim: int, heads: int, cross_attention_dim: int, *, rngs: nnx.Rngs):
        self.norm1 = layer_norm(dim, rngs)
        self.attn1 = Attention(dim, dim, heads, dim // heads, rngs=rngs)
        self.norm2 = layer_norm(dim, rngs)
        # Called as attn2(x, context) and nothing else, so that a wrapper may take its place.
        self.attn2: Any = Attention(dim, cross_attention_dim, heads, dim // heads, rngs=rngs)
        self.norm3 = layer_norm(dim, rngs)
        self.ff = FeedForward(dim, rngs=rngs)

    def __call__(self, x: Tokens, context: Any) -> Tokens:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """Transformer blocks over the pixels of a feature map, with a residual around them."""

    def __init__(
        self,
        channels: int,
        heads: int,
        layers: int,
        cross_attention_dim: int,
        *,
        groups: int,
        linear_projection: bool,
        rngs: nnx.Rngs,
    ):
        self.norm = GroupNorm(channels, groups, eps=1e-6, rngs=rngs)
        self.proj_in = _projection(channels, linear_projection, rngs)
        self.transformer_blocks = nnx.List(
            BasicTransformerBlock(channels, heads, cross_attention_dim, rngs=rngs) for _ in range(layers)
        )
        self.proj_out = _projection(channels, linear_projection, rngs)

    def __call__(self, x: Float[Array, "B H W C"], context: Any) -> Float[Array, "B H W C"]:
        height = x.shape[1]
        tokens = rearrange(self.proj_in(self.norm(x)), "B H W C -> B (H W) C")
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(rearrange(tokens, "B (H W) C -> B H W C", H=height))


def _projection(channels: int, linear: bool, rngs: nnx.Rngs) -> nnx.Linear | nnx.Conv:
    """SD 1.5 projects with a 1x1 convolution, SD 2 and SDXL with a linear map: equal but for the weight's shape."""
    if linear:
        return Linear(channels, channels, rngs=rngs)
    return nnx.Conv(channels, channels, (1, 1), rngs=rngs)
