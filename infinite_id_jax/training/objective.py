"""The loss of identity-enhanced training (Infinite-ID Eq. 3, Sec. 3.2), and of its entangled ablation (Table 1)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from infinite_id_jax import conditioning
from infinite_id_jax.diffusion.loss import add_noise, min_snr_weight, squared_error
from infinite_id_jax.diffusion.schedule import ScheduleConfig, alphas_cumprod
from infinite_id_jax.errors import InputError
from infinite_id_jax.identity.cross_attention import IdentityContext
from infinite_id_jax.identity.features import FaceFeatures
from infinite_id_jax.identity.inject import IdentityAdapter, inject
from infinite_id_jax.stable_diffusion.clip_vision import preprocess
from infinite_id_jax.stable_diffusion.unet import AddedConditions
from infinite_id_jax.training.remat import REMAT, rematerialise
from infinite_id_jax.training.state import Arrays
from infinite_id_jax.typing import Array, Bool, Float, Int, Latents

Batch = Mapping[str, Any]
"""Rows of training pairs: latent_mean, latent_std [B, h, w, c] of the target's posterior (unscaled), time_ids [B, 6],
and of another photo of the person face_embedding [B, E] with clip_hidden_states [B, L, C] or, to be encoded on the
device, clip_crop [B, s, s, 3] in 0..255. The entangled ablation adds input_ids and input_ids_2 [B, 77]."""


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    """Decisions 19 to 22. Raises InputError for a value out of range."""

    entangled: bool = False  # text-image pairs with the text term active (decision 20): give the text encoders
    identity_drop: float = 0.1  # share of rows trained on the unconditional identity (decisions 11 and 22); see `draw`
    min_snr_gamma: float | None = None  # weight the timesteps (Hang et al. 2023); None is the paper's plain mean
    remat: str = "blocks"  # one of training.remat.REMAT; changes memory and time, not results

    def __post_init__(self) -> None:
        if not 0 <= self.identity_drop < 1:
            raise InputError(f"method.identity_drop is {self.identity_drop}: give a share from 0 to below 1.")
        if self.min_snr_gamma is not None and self.min_snr_gamma <= 0:
            raise InputError(f"method.min_snr_gamma is {self.min_snr_gamma}: give a positive number (5), or None.")
        if self.remat not in REMAT:
            raise InputError(f"Unknown method.remat {self.remat!r}: choose from {', '.join(REMAT)}.")


class Frozen(NamedTuple):
    """The arrays that never change: of the U-Net, and of the encoders that run on the device."""

    unet: nnx.State
    vision: nnx.State | None = None
    text: tuple[nnx.State, nnx.State] | None = None


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is compiled in: the structures of the models, the schedule, the variant."""

    method: MethodConfig
    schedule: ScheduleConfig
    scaling_factor: float  # of the VAE's latents
    clip_layer: str
    adapter: Callable[[Mapping[str, Any]], IdentityAdapter]  # from arrays
    unet: nnx.GraphDef
    vision: nnx.GraphDef | None = None
    text: tuple[nnx.GraphDef, nnx.GraphDef] | None = None


class Draw(NamedTuple):
    """The randomness of a step, row by row, so that it is the same however rows are divided over devices."""

    posterior: Latents  # unit normal
    eps: Latents  # unit normal
    t: Int[Array, " B"]
    keep: Bool[Array, " B"]  # False: the unconditional identity
    keep_text: Bool[Array, " B"]  # False: no text, in the entangled ablation


class RowLosses(NamedTuple):
    """Of each row: the squared error of the prediction, its weight, the timestep."""

    error: Float[Array, " B"]
    weight: Float[Array, " B"]
    t: Int[Array, " B"]


def draw(objective: Objective, key: Array, batch: Batch) -> Draw:
    """Uniform timesteps, normal noise, and what is dropped.

    As IP-Adapter's training drops (tutorial_train_sdxl.py): the identity, the text, or both, each in half of
    `identity_drop` of the rows. Identity-enhanced training has no text to drop.
    """
    keys = jax.random.split(key, 4)
    shape, drop = batch["latent_mean"].shape, objective.method.identity_drop
    keep = jax.random.bernoulli(keys[3], 1 - drop, shape[:1])
    text_drop = jnp.where(keep, min(1.0, drop / (2 - 2 * drop)), 0.5)
    return Draw(
        posterior=jax.random.normal(keys[0], shape),
        eps=jax.random.normal(keys[1], shape),
        t=jax.random.randint(keys[2], shape[:1], 0, objective.schedule.num_train_timesteps),
        keep=keep,
        keep_text=jax.random.bernoulli(jax.random.fold_in(keys[3], 1), 1 - text_drop),
    )


def row_losses(objective: Objective, arrays: Arrays, frozen: Frozen, batch: Batch, drawn: Draw) -> RowLosses:
    """Noise each target, predict the noise (or v) from the identity alone, compare.

    The adapter's products run in the base's dtype, whatever dtype `arrays` are kept in.
    """
    method, schedule = objective.method, objective.schedule
    unet = nnx.merge(objective.unet, frozen.unet)
    dtype = unet.conv_in.kernel[...].dtype
    adapter = objective.adapter(jax.tree.map(lambda x: x.astype(dtype), arrays))
    inject(unet, adapter)
    rematerialise(unet, method.remat)

    mean, std = (batch[name].astype(jnp.float32) for name in ("latent_mean", "latent_std"))
    x_0 = objective.scaling_factor * (mean + std * drawn.posterior)
    alpha_bar = alphas_cumprod(schedule)
    x_t, v = add_noise(x_0, drawn.eps, drawn.t, alpha_bar)
    target = drawn.eps if schedule.prediction_type == "epsilon" else v

    hidden = hidden_states(objective, frozen, batch) * drawn.keep[:, None, None]
    embedding = batch["face_embedding"] * drawn.keep[:, None]
    c_id = adapter(FaceFeatures(hidden.astype(dtype), embedding.astype(dtype)))
    text, pooled = _text(objective, frozen, batch, drawn.keep_text)
    added = AddedConditions(pooled, batch["time_ids"])
    prediction = unet(x_t, drawn.t.astype(jnp.float32), IdentityContext(text, c_id), added)

    error = squared_error(prediction, target)
    if method.min_snr_gamma is None:
        return RowLosses(error, jnp.ones_like(error), drawn.t)
    weight = min_snr_weight(drawn.t, alpha_bar, method.min_snr_gamma, schedule.prediction_type)
    return RowLosses(error, weight, drawn.t)


def hidden_states(objective: Objective, frozen: Frozen, batch: Batch) -> Float[Array, "B L C"]:
    """Those of the batch, or those of its crops by the encoder that is compiled in."""
    if "clip_hidden_states" in batch:
        return batch["clip_hidden_states"]
    if objective.vision is None or frozen.vision is None:
        raise ValueError("Crops need the image encoder in the objective.")
    out = conditioning.encode_crops((objective.vision, frozen.vision), preprocess(batch["clip_crop"]))
    return out.hidden_states(objective.clip_layer)


def _text(objective: Objective, frozen: Frozen, batch: Batch, keep: Array) -> tuple[Array | None, Array]:
    """Text tokens and pooled text: none and zeros (decisions 19, 21), or the caption's, if kept, where entangled."""
    if objective.text is not None and frozen.text is not None:
        first, second = zip(objective.text, frozen.text, strict=True)
        tokens, pooled = conditioning.encode_text(first, second, batch["input_ids"], batch["input_ids_2"])
        return tokens * keep[:, None, None], pooled * keep[:, None]
    width = nnx.merge(objective.unet, frozen.unet).config.pooled_dim
    return None, jnp.zeros((batch["time_ids"].shape[0], width))
