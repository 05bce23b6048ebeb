"""Self-attention of the identity stream over both streams (Infinite-ID Eq. 5, Fig. 3)."""

import jax.numpy as jnp
from einops import rearrange, repeat
from jax import lax

from infinite_id_jax.identity.adain import merge_style
from infinite_id_jax.identity.streams import Layout
from infinite_id_jax.stable_diffusion.kernels import dot_product_attention
from infinite_id_jax.typing import Array, Attend, Bool, Heads, KeyHeads


def mixed_attention(
    q: Heads,
    k: KeyHeads,
    v: KeyHeads,
    *,
    layout: Layout,
    mode: str = "mixed",
    style_merge: str = "none",
    active: Bool[Array, ""] | None = None,
) -> Heads:
    """Text rows attend to themselves; identity rows to themselves and to their text row.

    mixed:  Q_id over K = [K_id, K_t], V = [V_id, V_t] (Eq. 5), K_id and V_id first shifted by `style_merge` (Eq. 7).
    mutual: Q_id over K_t, V_t (MasaCtrl; the ablation of Table 1).
    Where the traced `active` is false, the rows attend to themselves only.
    """
    q_text, q_id = layout.split(q)
    k_text, k_id = layout.split(k)
    v_text, v_id = layout.split(v)

    def own(_: None) -> Array:
        return dot_product_attention(_rows(q_id), _rows(k_id), _rows(v_id))

    def merged(_: None) -> Array:
        k_t, v_t = (repeat(x, "G T ... -> G T R ...", R=layout.identities) for x in (k_text, v_text))
        if mode == "mutual":
            return dot_product_attention(_rows(q_id), _rows(k_t), _rows(v_t))
        keys = jnp.concatenate([merge_style(style_merge, k_id, k_t), k_t], axis=-3)
        values = jnp.concatenate([merge_style(style_merge, v_id, v_t), v_t], axis=-3)
        return dot_product_attention(_rows(q_id), _rows(keys), _rows(values))

    text = dot_product_attention(*(rearrange(x, "G T ... -> (G T) ...") for x in (q_text, k_text, v_text)))
    identity = merged(None) if active is None else lax.cond(active, merged, own, None)
    return layout.join(text.reshape(q_text.shape), identity.reshape(q_id.shape))


def bind(layout: Layout, mode: str, style_merge: str, active: Bool[Array, ""] | None) -> Attend:
    """`mixed_attention` as the base's `attend(q, k, v)`."""

    def attend(q: Array, k: Array, v: Array) -> Array:
        return mixed_attention(q, k, v, layout=layout, mode=mode, style_merge=style_merge, active=active)

    return attend


def _rows(x: Array) -> Array:
    return rearrange(x, "G T R L N D -> (G T R) L N D")
