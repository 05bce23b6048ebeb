"""The miniature's autoencoder: 128 pixels to 16 x 16 latents, trained on pieces of 64 pixels of every style."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from flax import nnx
from jaxtyping import UInt8

from infinite_id_jax.stable_diffusion.config import VAEConfig
from infinite_id_jax.stable_diffusion.vae import AutoencoderKL, to_pixels
from infinite_id_jax.typing import Array, Float
from infinite_id_jax.weights.load import load_module
from miniature import pictures
from miniature.fit import Batch, Budget, fit_module, rows

CONFIG = VAEConfig(
    latent_channels=8, block_out_channels=(16, 24, 48, 96), layers_per_block=1, norm_num_groups=8, scaling_factor=1.0
)
BUDGET = Budget(steps=3000, batch_size=16, learning_rate=2e-3)
PIECE = 64  # pixels of a side: four pieces cost what one picture does, and are more different from each other
# Weight of the posterior's divergence, summed over latents, beside the mean error of a pixel. With 1e-5 a posterior was
# a tenth as wide as its latent, half of what latents hold was finer than 16 pixels, and a U-Net learned little from
# them. With four channels and 5e-5 a judge took a sixth of the expressions in decoded pictures for others, in drawn
# ones an eighth.
_KL = 2.5e-5
_HALVED = 0.25  # weight of latents of half the size, which are to show the picture of half the size


def train(folder: Path, drawn: pictures.Pictures, budget: Budget = BUDGET) -> AutoencoderKL:
    """The autoencoder; the `scaling_factor` of its latents is not yet known."""
    batch_at = partial(pieces, drawn, budget.batch_size, 0)
    return fit_module(AutoencoderKL(CONFIG, rngs=nnx.Rngs(0)), loss, batch_at, budget, folder, over=drawn.fingerprint)


def pieces(drawn: pictures.Pictures, count: int, seed: int, step: int) -> Batch:
    """Pieces of random pictures, cut where latents begin: what repeats every few pixels stays in step with them."""
    rng = np.random.default_rng((seed + 1, step))
    corners = rng.integers((pictures.SIZE - PIECE) // 8 + 1, size=(count, 2)) * 8
    chosen = rows(seed, step, count, len(drawn.images))
    images = [drawn.images[i, y : y + PIECE, x : x + PIECE] for i, (y, x) in zip(chosen, corners, strict=True)]
    return {"images": np.stack(images)}


def read(folder: Path) -> AutoencoderKL:
    """The autoencoder of a model's vae/."""
    config = VAEConfig.from_json(folder / "config.json")
    return load_module(lambda rngs: AutoencoderKL(config, rngs=rngs), folder)


def scaled(model: AutoencoderKL, images: UInt8[np.ndarray, "n s s 3"]) -> AutoencoderKL:
    """The same, with the `scaling_factor` that gives latents of these images unit variance."""
    graph, state = nnx.split(model)
    posterior = jax.jit(lambda part: nnx.merge(graph, state).encode(to_pixels(part)))
    means, stds = zip(*(posterior(images[i : i + 32]) for i in range(0, len(images), 32)), strict=True)
    variance = np.var(np.concatenate(means)) + np.mean(np.square(np.concatenate(stds)))
    model.config = dataclasses.replace(model.config, scaling_factor=round(float(variance**-0.5), 5))
    return model


def loss(vae: AutoencoderKL, batch: Mapping[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
    """The difference of the decoded image, at two sizes, and the posterior's divergence from unit normal.

    Latents that can be made smaller like a picture have few details that are not the picture's (scale equivariance,
    Skorokhodov et al. 2025), and these are what a diffusion model learns last.
    """
    image = to_pixels(batch["images"])
    posterior = vae.encode(image)
    z = posterior.mean + posterior.std * jax.random.normal(key, posterior.mean.shape)
    again = vae.decode(z)
    halved = difference(vae.decode(_half(z)), _half(image))
    divergence = 0.5 * (posterior.mean**2 + posterior.std**2 - 1 - 2 * jnp.log(posterior.std))
    per_image = divergence.sum((1, 2, 3)).mean() / (image.shape[1] * image.shape[2] / 64**2)
    figures = {"psnr": psnr(again, image).mean(), "kl": per_image, "std": posterior.std.mean()}
    return difference(again, image) + _HALVED * halved + _KL * per_image, figures


def _half(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    return reduce(x, "B (h p) (w q) C -> B h w C", "mean", p=2, q=2)


def difference(again: Float[Array, "B H W 3"], image: Float[Array, "B H W 3"]) -> Array:
    """Absolute and squared error of pixels, and absolute error of differences of neighbours (edges)."""
    error = again - image
    edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
    return jnp.abs(error).mean() + edges + jnp.square(error).mean()


def psnr(again: Float[Array, "B H W 3"], image: Float[Array, "B H W 3"]) -> Float[Array, " B"]:
    """Of values in [-1, 1], in decibels."""
    return 10 * jnp.log10(4 / jnp.square(jnp.clip(again, -1, 1) - image).mean((1, 2, 3)))
