"""Cross-attention to the identity beside the text (Infinite-ID Eq. 6)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from infinite_id_jax.identity.adain import merge_style
from infinite_id_jax.identity.streams import Layout
from infinite_id_jax.stable_diffusion.attention import Attention, merge_heads, split_heads
from infinite_id_jax.stable_diffusion.kernels import Linear, dot_product_attention
from infinite_id_jax.typing import Array, Float, Scalar, Tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IdentityContext:
    """What the U-Net hands to every cross-attention without looking inside.

    With a layout, rows are the two streams': `identity` is [G, T, R, K, C], where T may be 1: the same for every text
    row. Without one, every row is an identity row with an `identity` [B, K, C] of its own, as in training and in
    single-stream sampling. `id_scale` is one number, or one for each layer in the order of files.
    """

    text: Tokens | None  # [B, L, C], all rows; None where no text is used at all (decision 19)
    identity: Float[Array, "*rows K C"]
    id_scale: Scalar | Float[Array | np.ndarray, " layers"] = 1.0
    text_scale: Scalar = 1.0
    layout: Layout | None = dataclasses.field(default=None, metadata={"static": True})
    style_merge: str = dataclasses.field(default="none", metadata={"static": True})
    cross_merge: bool = dataclasses.field(default=True, metadata={"static": True})


class IdentityProjection(nnx.Module):
    """K'_id and V'_id of one layer: the two linear maps that training adds to each cross-attention."""

    def __init__(self, cross_attention_dim: int, inner: int, *, rngs: nnx.Rngs):
        self.to_k_ip = Linear(cross_attention_dim, inner, use_bias=False, rngs=rngs)
        self.to_v_ip = Linear(cross_attention_dim, inner, use_bias=False, rngs=rngs)


class IdentityCrossAttention(nnx.Module):
    """Wraps a frozen `attn2`: text rows pass through it, identity rows also attend to their identity (Eq. 6)."""

    def __init__(self, base: Attention, projection: IdentityProjection, index: int):
        self.base = base
        self.projection = projection
        self.index = index  # of the layer, in the order of files

    def __call__(self, x: Tokens, context: IdentityContext) -> Tokens:
        """x [B, L, C] -> [B, L, C]; rows as `context.layout` divides them."""
        base, layout = self.base, context.layout
        q = split_heads(base.to_q(x), base.heads)
        text = None if context.text is None else self._text_keys(context.text.astype(x.dtype))
        k_id, v_id = self._identity_keys(context.identity, x.dtype)
        if layout is None:
            return base.to_out(merge_heads(self._merge(q, k_id, v_id, text, context)))
        if text is None:
            raise ValueError("The two streams need text: without it every row is an identity row, and no layout.")
        q_text, q_id = layout.split(q)
        (k_text, k_t), (v_text, v_t) = (layout.split(keys) for keys in text)
        identity = self._merge(
            q_id,
            jnp.broadcast_to(k_id, (*q_id.shape[:3], *k_id.shape[3:])),
            jnp.broadcast_to(v_id, (*q_id.shape[:3], *v_id.shape[3:])),
            (k_t, v_t),
            context,
        )
        return base.to_out(merge_heads(layout.join(_attend(q_text, k_text, v_text), identity)))

    def _text_keys(self, text: Tokens) -> tuple[Array, Array]:
        base = self.base
        return split_heads(base.to_k(text), base.heads), split_heads(base.to_v(text), base.heads)

    def _identity_keys(self, identity: Array, dtype: Any) -> tuple[Array, Array]:
        """K'_id and V'_id in the base's dtype: adapters may be kept in fp32 over a half-precision base."""
        k, v = (
            rearrange(project(identity).astype(dtype), "... (N D) -> ... N D", N=self.base.heads)
            for project in (self.projection.to_k_ip, self.projection.to_v_ip)
        )
        return k, v

    def _merge(
        self, q: Array, k_id: Array, v_id: Array, text: tuple[Array, Array] | None, context: IdentityContext
    ) -> Array:
        scale: Any = context.id_scale if jnp.ndim(context.id_scale) == 0 else jnp.asarray(context.id_scale)[self.index]
        text = text if context.cross_merge else None
        return merged_cross_attention(q, k_id, v_id, text, scale, context.text_scale, context.style_merge)


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
