"""Shape aliases and the legend of axes.

Axes: B batch rows, H W height and width, L tokens (K of keys and values), N heads, D head dim, C channels, S steps.
Streams: P prompts, M identities per prompt, T text rows (of one guidance half), R identity rows per text row.
Images and latents are NHWC inside; layouts change only at import and export.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, UInt, UInt8

Heads = Float[Array, "B L N D"]  # queries, split into heads
KeyHeads = Float[Array, "B K N D"]  # keys or values
Tokens = Float[Array, "B L C"]
Latents = Float[Array, "B h w c"]
Image = Float[Array, "B H W 3"]  # in [-1, 1]
Scalar = Float[Array, ""] | float | np.floating

Attend = Callable[[Array, Array, Array], Array]
"""`attend(q, k, v)` over [B, L, N, D]: the one seam of the frozen base's self-attention."""

Denoise = Callable[[Array, Array, Array, Any], tuple[Array, Any]]
"""`denoise(x_t, t, i, kept)`: the guided prediction for latents [B, h, w, c] at timestep t, step i of the sampler; and
what is kept for the next step, arrays of the same shapes every time."""

__all__ = [
    "Array", "Attend", "Bool", "Denoise", "Float", "Heads", "Image", "Int", "KeyHeads", "Latents",
    "Scalar", "Tokens", "UInt", "UInt8",
]  # fmt: skip
