"""Gives the decoder back the texture that an absolute error averages away: hatching, dots, grain.

A critic of patches learns to tell decoded pieces from drawn ones, the decoder to pass for drawn (Esser et al. 2021,
Sec. 3.1). The encoder, and so every latent, stays as it is.
"""

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from infinite_id_jax.stable_diffusion.vae import AutoencoderKL, to_pixels
from infinite_id_jax.typing import Array, Float
from miniature import pictures, vae
from miniature.fit import Budget, fit

BUDGET = Budget(steps=1200, batch_size=16, learning_rate=5e-4, average=0.998)
_WEIGHT = 0.1  # of the critic's opinion beside the difference of pixels
_WIDTHS = (32, 64, 96)


def polish(folder: Path, model: AutoencoderKL, drawn: pictures.Pictures) -> AutoencoderKL:
    """The autoencoder with a decoder trained on."""
    graph, decoder, rest = nnx.split(model, _is_decoder, ...)

    def loss(arrays: dict[str, Any], batch: Mapping[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        image = to_pixels(batch["images"])
        posterior = nnx.merge(graph, arrays["decoder"], rest).encode(image)
        z = jax.lax.stop_gradient(posterior.mean + posterior.std * jax.random.normal(key, posterior.mean.shape))
        again = nnx.merge(graph, arrays["decoder"], rest).decode(z)
        # Each of the two learns from its own terms alone.
        fixed = jax.lax.stop_gradient(arrays["critic"])
        passes = -critic(fixed, again).mean()
        told_drawn = jax.nn.relu(1 - critic(arrays["critic"], image)).mean()
        told_decoded = jax.nn.relu(1 + critic(arrays["critic"], jax.lax.stop_gradient(again))).mean()
        figures = {"psnr": vae.psnr(again, image).mean(), "passes": passes, "told": told_drawn + told_decoded}
        return vae.difference(again, image) + _WEIGHT * passes + told_drawn + told_decoded, figures

    arrays = {"decoder": decoder, "critic": initial_critic(jax.random.key(20))}
    over = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(rest))).hexdigest()[:16]
    batch_at = partial(vae.pieces, drawn, BUDGET.batch_size, 21)
    return nnx.merge(graph, fit(arrays, loss, batch_at, BUDGET, folder, over=over)["decoder"], rest)


def _is_decoder(path: tuple[Any, ...], _: Any) -> bool:
    return path[0] in ("decoder", "post_quant_conv")


def initial_critic(key: Array) -> dict[str, Array]:
    """Random arrays of `critic`."""
    arrays, before = {}, 3
    for i, width in enumerate((*_WIDTHS, 1)):
        arrays[f"{i}.kernel"] = jax.random.normal(jax.random.fold_in(key, i), (4, 4, before, width)) / np.sqrt(
            8 * before
        )
        arrays[f"{i}.bias"] = jnp.zeros(width)
        before = width
    return arrays


def critic(arrays: Mapping[str, Array], image: Float[Array, "B H W 3"]) -> Float[Array, "B h w 1"]:
    """How drawn each patch looks: convolutions of 4 x 4, the first two of stride 2 (PatchGAN, Isola et al. 2017)."""
    x = image
    for i in range(len(_WIDTHS) + 1):
        stride = 2 if i < 2 else 1
        x = jax.lax.conv_general_dilated(
            x, arrays[f"{i}.kernel"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ) + arrays[f"{i}.bias"].reshape(1, 1, 1, -1)
        x = jax.nn.leaky_relu(x, 0.2) if i < len(_WIDTHS) else x
    return x
