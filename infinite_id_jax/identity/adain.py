"""Style merging: identity features take the statistics of text features (Infinite-ID Eq. 7 and 8)."""

from collections.abc import Callable

import jax.numpy as jnp

from infinite_id_jax.errors import InputError
from infinite_id_jax.typing import Array, Float

Features = Float[Array, "*rows L N D"]
"""Keys or values [..., L, N, D]: statistics go over the tokens L, per row and channel (N, D)."""

Reference = Float[Array, "*rows K N D"]


def adain_mean(x: Features, y: Reference) -> Features:
    """x - mean(x) + mean(y), in fp32 (Eq. 8)."""
    x32, y32 = x.astype(jnp.float32), y.astype(jnp.float32)
    shifted = x32 - x32.mean(-3, keepdims=True) + y32.mean(-3, keepdims=True)
    return shifted.astype(x.dtype)


def adain(x: Features, y: Reference) -> Features:
    """(x - mean(x)) / std(x) * std(y) + mean(y), in fp32: the ablation of Fig. 7 (StyleAligned, Eq. 2)."""
    x32, y32 = x.astype(jnp.float32), y.astype(jnp.float32)
    normalised = (x32 - x32.mean(-3, keepdims=True)) / _std(x32)
    return (normalised * _std(y32) + y32.mean(-3, keepdims=True)).astype(x.dtype)


def _std(x: Array) -> Array:
    """Square root of the unbiased variance over the tokens plus 1e-5, as StyleAligned's code has it."""
    return jnp.sqrt(x.var(-3, keepdims=True, ddof=1) + 1e-5)


STYLE_MERGES: dict[str, Callable[[Array, Array], Array]] = {
    "none": lambda x, y: x,
    "adain_mean": adain_mean,
    "adain": adain,
}


def merge_style(name: str, x: Features, y: Reference) -> Features:
    """`x` shifted towards `y` by the rule `name`. Raises InputError for an unknown name."""
    if name not in STYLE_MERGES:
        raise InputError(f"Unknown style_merge {name!r}: choose from {', '.join(STYLE_MERGES)}.")
    return STYLE_MERGES[name](x, y)
