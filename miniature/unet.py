"""The miniature's U-Net: SDXL's blocks, text conditions and micro-conditioning, trained on captioned pictures."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float
from tqdm import tqdm

from configs.miniature import UNET
from infinite_id_jax.conditioning import encode_text
from infinite_id_jax.diffusion.loss import add_noise, squared_error
from infinite_id_jax.diffusion.schedule import ScheduleConfig, alphas_cumprod
from infinite_id_jax.files import replacing
from infinite_id_jax.images import softened
from infinite_id_jax.stable_diffusion.clip_text import CLIPTextModel
from infinite_id_jax.stable_diffusion.tokenizer import CLIPTokenizer
from infinite_id_jax.stable_diffusion.unet import AddedConditions, UNet2DConditionModel
from infinite_id_jax.stable_diffusion.vae import AutoencoderKL, to_pixels
from infinite_id_jax.typing import Array
from infinite_id_jax.weights.load import load_module
from miniature import clip, pictures
from miniature.fit import Batch, Budget, fit_module, rows

BUDGET = Budget(steps=12000, batch_size=32, learning_rate=1e-3, average=0.9985)
# After it, with more captions that say how the person looks: an adapter chooses among what the text could have said.
LOOKS = Budget(steps=5000, batch_size=32, learning_rate=8e-4, average=0.9985)
# v, not the noise: what a small network misses of the noise where little else is left (t = 850) is ten times as much of
# the picture, and there it is decided what the picture shows. Sampling starts at the last timestep: before it, where
# more of a picture is expected, noise alone is taken for one in grey (Lin et al. 2023).
SCHEDULE = ScheduleConfig(prediction_type="v_prediction", timestep_spacing="trailing")
_TEXT_DROP = 0.15  # rows without text, which guidance needs, and which are all that identities are trained on
_BATCH = 64  # pictures that are encoded at once
_FACE = 4.0  # what a face counts against its surroundings: of all that is said, an expression is the smallest
_SMALL = 0.1  # share of pictures that were smaller once, and say so in the micro-conditioning


class Latents(NamedTuple):
    """Posteriors of pictures, and SDXL's six numbers of micro-conditioning."""

    mean: np.ndarray  # [n, h, w, c], unscaled
    std: np.ndarray
    time_ids: np.ndarray  # [n, 6]


def encode(model: AutoencoderKL, drawn: pictures.Pictures, path: Path) -> Latents:
    """The latents of all pictures, kept in the file `path` until the encoder or the pictures are others."""
    graph, state = nnx.split(model)
    posterior = jax.jit(lambda images: nnx.merge(graph, state).encode(to_pixels(images)))

    def batch(start: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        chosen = [_once_smaller(image, start + i) for i, image in enumerate(drawn.images[start : start + _BATCH])]
        mean, std = posterior(np.stack([image for image, _ in chosen]))
        return np.asarray(mean, np.float16), np.asarray(std, np.float16), [side for _, side in chosen]

    first = batch(0)
    if path.is_file():
        with np.load(path) as stored:
            known = Latents(stored["mean"], stored["std"], stored["time_ids"])
        same = len(known.mean) == len(drawn.images)
        if same and np.allclose(known.mean[: len(first[0])], first[0], atol=1e-2):
            return known
    rest = [batch(start) for start in tqdm(range(_BATCH, len(drawn.images), _BATCH), "encoding")]
    means, stds, sides = zip(first, *rest, strict=True)
    size = pictures.SIZE
    ids = np.array([(side, side, 0, 0, size, size) for part in sides for side in part], np.float32)
    found = Latents(np.concatenate(means), np.concatenate(stds), ids)
    with replacing(path) as beside, beside.open("wb") as file:
        np.savez(file, mean=found.mean, std=found.std, time_ids=found.time_ids)
    return found


def _once_smaller(image: np.ndarray, i: int) -> tuple[np.ndarray, int]:
    """A picture and the side it once had."""
    rng = np.random.default_rng((6, i))
    if rng.random() >= _SMALL:
        return image, pictures.SIZE
    side = int(rng.integers(32, pictures.SIZE))
    return softened(image, side), side


def face_weights(keypoints: Float[np.ndarray, "n 5 2"], cells: int = UNET.sample_size) -> Float[np.ndarray, "n h w 1"]:
    """What each cell of a picture's latents counts, 1 in the mean: those of brows, eyes and mouth more than others."""
    centre = keypoints.mean(axis=1, keepdims=True)
    reach = 2.2 * np.abs(keypoints - centre).max(axis=1, keepdims=True)
    middles = (np.arange(cells) + 0.5) * (pictures.SIZE / cells)
    inside = np.abs(middles[None, :, None] - centre) < reach  # [n, cells, (x, y)]
    weights = np.where(inside[:, :, None, 1] & inside[:, None, :, 0], _FACE, 1.0)
    return (weights / weights.mean(axis=(1, 2), keepdims=True))[..., None].astype(np.float32)


class Painter(nnx.Module):
    """What is trained together: a contrastive loss leaves out of the text what few pictures are told apart by."""

    def __init__(self, texts: tuple[CLIPTextModel, CLIPTextModel], *, rngs: nnx.Rngs):
        self.unet = UNet2DConditionModel(UNET, rngs=rngs)
        self.texts = nnx.List(texts)


def texts_in(folder: Path) -> tuple[CLIPTextModel, CLIPTextModel]:
    """Both text encoders of a folder."""
    first, second = (
        load_module(lambda rngs, config=config: CLIPTextModel(config, rngs=rngs), folder / name)
        for name, config in (("text_encoder", clip.FIRST), ("text_encoder_2", clip.SECOND))
    )
    return first, second


def spread_timesteps(key: Array, count: int, steps: int) -> Array:
    """Uniform timesteps, one in each of `count` equal parts: a batch's error varies less than by independent ones."""
    return ((jnp.arange(count) + jax.random.uniform(key, (count,))) * (steps / count)).astype(jnp.int32)


def train(
    folder: Path,
    drawn: pictures.Pictures,
    latents: Latents,
    scaling_factor: float,
    painter: Painter,
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
    budget: Budget,
    every: int,
) -> Painter:
    """U-Net and text encoders learn on from captions that say what shows of the scene and, one in `every`, how the
    person looks."""
    alpha_bar = alphas_cumprod(SCHEDULE)

    def batch_at(step: int) -> Batch:
        chosen = rows(6, step, budget.batch_size, len(drawn.images))
        texts = [clip.text_of(tokenizers[0], drawn.labels[i], int(i) + step, every=every) for i in chosen]
        return {
            "mean": latents.mean[chosen],
            "std": latents.std[chosen],
            "time_ids": latents.time_ids[chosen],
            "weights": face_weights(drawn.keypoints[chosen]),
            **{name: tokenize(texts) for name, tokenize in zip(("ids", "ids_2"), tokenizers, strict=True)},
        }

    def loss(painter: Painter, batch: Mapping[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
        keys = jax.random.split(key, 4)
        mean, std = (batch[name].astype(jnp.float32) for name in ("mean", "std"))
        x_0 = scaling_factor * (mean + std * jax.random.normal(keys[0], mean.shape))
        eps = jax.random.normal(keys[1], mean.shape)
        t = spread_timesteps(keys[2], len(mean), len(alpha_bar))
        keep = jax.random.bernoulli(keys[3], 1 - _TEXT_DROP, mean.shape[:1])
        first, second = (nnx.split(text) for text in painter.texts)
        tokens, pooled = encode_text(first, second, batch["ids"], batch["ids_2"])
        x_t, v = add_noise(x_0, eps, t, alpha_bar)
        added = AddedConditions(pooled * keep[:, None], batch["time_ids"])
        scale = jnp.sqrt(batch["weights"])
        predicted = painter.unet(x_t, t.astype(jnp.float32), tokens * keep[:, None, None], added)
        error = squared_error(scale * predicted, scale * v)
        noisy = t >= len(alpha_bar) // 2
        return error.mean(), {"noisy_half": jnp.sum(error * noisy) / jnp.maximum(noisy.sum(), 1)}

    first, second = (nnx.split(text) for text in painter.texts)
    read = np.asarray(encode_text(first, second, *(tokenize(drawn.captions[:4]) for tokenize in tokenizers))[0])
    over = hashlib.sha256(latents.mean[:4].tobytes() + np.round(read, 2).tobytes()).hexdigest()[:16]
    return fit_module(painter, loss, batch_at, budget, folder, over=over)
