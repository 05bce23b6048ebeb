"""Cross-attention to the identity beside the text (Infinite-ID Eq. 6)."""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from infinite_id_jax.identity.adain import merge_style
from infinite_id_jax.identity.streams import Layout
from infinite_id_jax.stable_diffusion.attention import Attention, dot_product_attention, merge_heads, split_heads
from infinite_id_jax.typing import Array, Float, Scalar, Tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IdentityContext:
    """What the U-Net hands to every cross-attention without looking inside."""

    text: Tokens  # [B, L, C], all rows
    identity: Float[Array, "G T R K C"]  # c_id of the identity rows; T may be 1: the same for every text row
    id_scale: Scalar
    text_scale: Scalar
    layout: Layout = dataclasses.field(metadata={"static": True})
    style_merge: str = dataclasses.field(default="none", metadata={"static": True})
    cross_merge: bool = dataclasses.field(default=True, metadata={"static": True})


class IdentityProjection(nnx.Module):
    """K'_id and V'_id of one layer: the two linear maps that training adds to each cross-attention."""

    def __init__(self, cross_attention_dim: int, inner: int, *, rngs: nnx.Rngs):
        self.to_k_ip = nnx.Linear(cross_attention_dim, inner, use_bias=False, rngs=rngs)
        self.to_v_ip = nnx.Linear(cross_attention_dim, inner, use_bias=False, rngs=rngs)


class IdentityCrossAttention(nnx.Module):
    """Wraps a frozen `attn2`: text rows pass through it, identity rows also attend to their identity."""

    def __init__(self, base: Attention, projection: IdentityProjection):
        self.base = base
        self.projection = projection

    def __call__(self, x: Tokens, context: IdentityContext) -> Tokens:
        """x [B, L, C] -> [B, L, C]; rows as `context.layout` divides them."""
        base, heads, layout = self.base, self.base.heads, context.layout
        text = context.text.astype(x.dtype)
        q_text, q_id = layout.split(split_heads(base.to_q(x), heads))
        k_text, k_t = layout.split(split_heads(base.to_k(text), heads))
        v_text, v_t = layout.split(split_heads(base.to_v(text), heads))
        # Adapters may be kept in fp32 over a half-precision base.
        k_id, v_id = (
            rearrange(project(context.identity).astype(x.dtype), "G T R K (N D) -> G T R K N D", N=heads)
            for project in (self.projection.to_k_ip, self.projection.to_v_ip)
        )
        identity = merged_cross_attention(
            q_id,
            jnp.broadcast_to(k_id, (*q_id.shape[:3], *k_id.shape[3:])),
            jnp.broadcast_to(v_id, (*q_id.shape[:3], *v_id.shape[3:])),
            (k_t, v_t) if context.cross_merge else None,
            context.id_scale,
            context.text_scale,
            context.style_merge,
        )
        return base.to_out(merge_heads(layout.join(_attend(q_text, k_text, v_text), identity)))


def merged_cross_attention(
    q: Float[Array, "*rows L N D"],
    k_id: Float[Array, "*rows K N D"],
    v_id: Float[Array, "*rows K N D"],
    text: tuple[Float[Array, "*rows T N D"], Float[Array, "*rows T N D"]] | None,
    id_scale: Scalar,
    text_scale: Scalar,
    style_merge: str = "none",
) -> Float[Array, "*rows L N D"]:
    """id_scale Attn(Q, K'_id, V'_id) + text_scale Attn(Q, K'_t, V'_t) (Eq. 6), K'_id and V'_id shifted first (Eq. 7).

    `text` is (K'_t, V'_t), or None where the text term is off.
    """
    if text is None:
        return (id_scale * _attend(q, k_id, v_id)).astype(q.dtype)
    k_t, v_t = text
    identity = _attend(q, merge_style(style_merge, k_id, k_t), merge_style(style_merge, v_id, v_t))
    return (id_scale * identity + text_scale * _attend(q, k_t, v_t)).astype(q.dtype)


def _attend(q: Array, k: Array, v: Array) -> Array:
    """Attention over [..., L, N, D] with any leading axes."""
    rows = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    return dot_product_attention(*rows).reshape(q.shape)
