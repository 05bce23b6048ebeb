"""The miniature's CLIP: two text encoders and an image encoder, trained to find each other (Radford et al. 2021)."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import UInt8
from PIL import Image

from data_pipeline.avatar_captions import SHIRT_BELOW, WORDS, caption, generator, with_looks
from data_pipeline.avatars import CLASSES
from infinite_id_jax.faces.align import clip_crop
from infinite_id_jax.faces.miniature import HEAD, aligned
from infinite_id_jax.faces.protocol import Crop, Face
from infinite_id_jax.identity.features import unit
from infinite_id_jax.images import softened
from infinite_id_jax.stable_diffusion.clip_text import CLIPTextModel
from infinite_id_jax.stable_diffusion.clip_vision import CLIPVisionModel, preprocess
from infinite_id_jax.stable_diffusion.config import CLIPTextConfig, CLIPVisionConfig
from infinite_id_jax.stable_diffusion.tokenizer import CLIPTokenizer
from infinite_id_jax.typing import Array
from miniature import pictures, vocabulary
from miniature.fit import Batch, Budget, fit_module, rows

VISION = CLIPVisionConfig(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=96,
    patch_size=12,
    projection_dim=128,
)
_TEXT = CLIPTextConfig(
    vocab_size=vocabulary.SIZE,
    eos_token_id=vocabulary.SIZE - 1,
    max_position_embeddings=vocabulary.MAX_LENGTH,
    projection_dim=128,
)
FIRST = dataclasses.replace(
    _TEXT, hidden_size=96, intermediate_size=384, num_hidden_layers=2, num_attention_heads=3, projection_dim=96
)
SECOND = dataclasses.replace(
    _TEXT,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    hidden_act="gelu",
    architectures=("CLIPTextModelWithProjection",),
)
BUDGET = Budget(steps=1000, batch_size=96, learning_rate=1e-3)
# The judge sees other pictures, in other pieces.
JUDGE_VISION = dataclasses.replace(VISION, num_hidden_layers=3, image_size=128, patch_size=16)
_LENGTH = 44  # tokens in training: later positions are padding, which causal attention hides from a text's end


class Contrast(nnx.Module):
    """An image encoder, one or two text encoders, and the temperature."""

    def __init__(self, vision: CLIPVisionConfig, texts: tuple[CLIPTextConfig, ...], *, rngs: nnx.Rngs):
        self.vision = CLIPVisionModel(vision, rngs=rngs)
        self.texts = nnx.List([CLIPTextModel(config, rngs=rngs) for config in texts])
        # An encoder without a projection of its own gets one for the training.
        self.projections = nnx.List(
            [
                nnx.Linear(config.hidden_size, vision.projection_dim, use_bias=False, rngs=rngs)
                for config in texts
                if not config.with_projection
            ]
        )
        self.log_scale = nnx.Param(jnp.log(1 / 0.07))

    def __call__(self, pixels: Array, ids: Array) -> tuple[Array, list[Array]]:
        """Unit vectors of the images, and of the texts by each encoder."""
        pooled = [text(ids).pooled for text in self.texts]
        own = iter(self.projections)
        projected = [p if t.config.with_projection else next(own)(p) for p, t in zip(pooled, self.texts, strict=True)]
        return unit(self.vision(pixels).image_embeds), [unit(x) for x in projected]


def train(folder: Path, drawn: pictures.Pictures, tokenize: CLIPTokenizer, budget: Budget = BUDGET) -> Contrast:
    """The image encoder and both text encoders of the miniature."""
    model = Contrast(VISION, (FIRST, SECOND), rngs=nnx.Rngs(1))
    return _train(model, folder, drawn, tokenize, budget, head_crop, softest=8.0, seed=2)


def train_judge(folder: Path, drawn: pictures.Pictures, tokenize: CLIPTokenizer) -> Contrast:
    """One that is shown no photograph of an eighth of the size: what it judges is drawn whole."""
    model = Contrast(JUDGE_VISION, (SECOND,), rngs=nnx.Rngs(11))
    return _train(model, folder, drawn, tokenize, BUDGET, face_crop, softest=1.6, seed=12)


def head_crop(image: UInt8[np.ndarray, "s s 3"], keypoints: np.ndarray, size: int) -> Crop:
    """The head that identities are encoded from, by the points of the face."""
    return clip_crop(image, Face((0.0, 0.0, 0.0, 0.0), 1.0, keypoints.astype(np.float64), HEAD), size)


def face_crop(image: UInt8[np.ndarray, "s s 3"], keypoints: np.ndarray, size: int) -> Crop:
    """The aligned face that CLIP-I compares, as the recogniser sees it: no clothes, and little of what is behind."""
    face = Image.fromarray(aligned(image, keypoints.astype(np.float64)))
    return np.asarray(face.resize((size, size), Image.Resampling.BICUBIC))


def _train(
    model: Contrast,
    folder: Path,
    drawn: pictures.Pictures,
    tokenize: CLIPTokenizer,
    budget: Budget,
    crop: Callable[[np.ndarray, np.ndarray, int], Crop],
    *,
    softest: float,
    seed: int,
) -> Contrast:
    """On whole pictures and, as often, what `crop` cuts of them; one in four from a smaller one, down to `softest`."""
    size = model.vision.config.image_size

    def batch_at(step: int) -> Batch:
        chosen = rows(seed, step, budget.batch_size, len(drawn.images))
        rng = np.random.default_rng((seed + 1, step))
        images = []
        for i in chosen:
            image = drawn.images[i]
            if rng.random() < 0.25:
                image = softened(image, int(pictures.SIZE / rng.uniform(1.3, softest)))
            if rng.random() < 0.5:
                images.append(crop(image, drawn.keypoints[i], size))
            else:
                images.append(np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)))
        texts = [text_of(tokenize, drawn.labels[i], int(i) + step, every=2) for i in chosen]
        ids = tokenize(texts)[:, :_LENGTH]
        ids[:, -1] = tokenize.eos_id  # of the few that are longer: without an end nothing could be read off
        return {"pixels": np.stack(images), "ids": ids}

    return fit_module(model, loss, batch_at, budget, folder, over=drawn.fingerprint)


def text_of(tokenize: CLIPTokenizer, labels: np.ndarray, seed: int, *, every: int) -> str:
    """A caption of what shows, one in `every` with how the person looks, where that fits."""
    plain = retold(labels, seed)
    if seed % every:
        return plain
    said = with_looks(plain, visible(labels), seed)
    return plain if len(tokenize.backend.encode(said).ids) > _LENGTH - 2 else said


def retold(labels: np.ndarray, seed: int) -> str:
    """A caption of all that shows of a scene, or, as often, of a random part of it; hats and accessories always."""
    shown, rng = visible(labels), generator("retold", seed)
    share = min(1.0, 2 * rng.random())
    said = {name: shown[name] for name in WORDS if name in shown and rng.random() < share}
    said |= {name: shown[name] for name in ("hat", "accessory") if name in shown}
    if "clothing" not in said and shown.get("clothing") in SHIRT_BELOW:
        said.pop("clothing_colour", None)
    return caption(said, shown["style"], seed)


def visible(labels: np.ndarray) -> dict[str, str]:
    """What shows of a picture's attributes, by name."""
    return {name: values[label] for (name, values), label in zip(CLASSES.items(), labels, strict=True) if label >= 0}


def loss(model: Contrast, batch: Mapping[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
    """Symmetric cross-entropy over the batch, the mean over text encoders; `top1` is of the last one."""
    del key
    images, texts = model(preprocess(batch["pixels"]), batch["ids"])
    scale = jnp.exp(jnp.minimum(model.log_scale[...], jnp.log(100.0)))
    losses, right = [], jnp.zeros(())
    for text in texts:
        logits = scale * images @ text.T
        for direction in (logits, logits.T):
            losses.append(-jnp.mean(jnp.diagonal(jax.nn.log_softmax(direction))))
        right = jnp.mean(jnp.argmax(logits, 1) == jnp.arange(len(logits)))
    return jnp.mean(jnp.stack(losses)), {"top1": right, "scale": scale}
