"""Classifier-free guidance and its rescaling, in float32 whatever the dtype of the predictions."""

import jax.numpy as jnp

from infinite_id_jax.typing import Array, Latents, Scalar


def classifier_free(uncond: Latents, cond: Latents, scale: Scalar) -> Latents:
    """uncond + scale (cond - uncond), scale 1 being the conditional prediction (Ho & Salimans 2022, Eq. 6).

    Their guidance strength w counts from zero: scale = 1 + w.
    """
    uncond, cond = uncond.astype(jnp.float32), cond.astype(jnp.float32)
    return uncond + scale * (cond - uncond)


def rescale(guided: Latents, cond: Latents, factor: Scalar) -> Latents:
    """Pull each guided sample's std to that of `cond` by a factor in [0, 1], 0 being the identity.

    The std is unbiased, over all axes but the batch (Lin et al. 2023, Sec. 3.4).
    """
    guided = guided.astype(jnp.float32)
    std_guided, std_cond = _std(guided), _std(cond)
    # A constant prediction has no std to match: it stays as it is, rather than 0/0.
    ratio = jnp.where(std_guided > 0, std_cond / jnp.where(std_guided > 0, std_guided, 1), 1)
    return factor * (guided * ratio) + (1 - factor) * guided


def _std(prediction: Latents) -> Array:
    return jnp.std(prediction.astype(jnp.float32), axis=(1, 2, 3), keepdims=True, ddof=1)
