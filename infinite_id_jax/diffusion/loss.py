"""The training objective: noise a latent, predict, compare (Infinite-ID Eq. 3; Ho et al. 2020, Eq. 14)."""

import jax.numpy as jnp
import numpy as np

from infinite_id_jax.typing import Array, Float, Int, Latents


def add_noise(
    x_0: Latents, eps: Latents, t: Int[Array, " B"], alpha_bar: Float[np.ndarray, " T"]
) -> tuple[Latents, Latents]:
    """(x_t, v): x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, and v = sqrt(alpha_bar_t) eps -
    sqrt(1 - alpha_bar_t) x_0 (Salimans & Ho 2022, Sec. 4), each row at its own t in [0, T).
    """
    signal = jnp.asarray(np.sqrt(alpha_bar), jnp.float32)[t][:, None, None, None]
    noise = jnp.asarray(np.sqrt(1 - alpha_bar), jnp.float32)[t][:, None, None, None]
    return signal * x_0 + noise * eps, signal * eps - noise * x_0


def squared_error(prediction: Latents, target: Latents) -> Float[Array, " B"]:
    """Mean over the pixels and channels of each row, in fp32."""
    return jnp.mean(jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32)), axis=(1, 2, 3))


def min_snr_weight(
    t: Int[Array, " B"], alpha_bar: Float[np.ndarray, " T"], gamma: float, prediction_type: str
) -> Float[Array, " B"]:
    """min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v (Hang et al. 2023, Sec. 3.4)."""
    snr = alpha_bar / (1 - alpha_bar)
    weight = np.minimum(snr, gamma) / (snr if prediction_type == "epsilon" else snr + 1)
    return jnp.asarray(weight, jnp.float32)[t]
