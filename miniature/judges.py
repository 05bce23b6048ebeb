"""The networks that only judge: what is seen in a picture (attributes), who it is, how well it fits a text.

They are trained on the set "judge", of people whom the recogniser and the adapters do not know, and never condition
anything.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from data_pipeline.avatars import CLASSES
from infinite_id_jax.faces import small_resnet
from infinite_id_jax.faces.small_resnet import SmallResNetConfig
from infinite_id_jax.images import softened
from infinite_id_jax.typing import Array
from miniature import faces, pictures
from miniature.fit import Batch, Budget, fit, rows

ATTRIBUTES = SmallResNetConfig(
    size=pictures.SIZE, widths=(48, 96, 128, 160), outputs=sum(len(values) for values in CLASSES.values())
)
RECOGNISER = SmallResNetConfig(size=96, widths=(64, 80, 112), outputs=96)
BUDGET = Budget(steps=3000, batch_size=64, learning_rate=2e-3, weight_decay=0.05)
_EXPRESSION = 3.0
RECOGNISER_BUDGET = Budget(steps=1600, batch_size=64, learning_rate=2e-3, weight_decay=0.05)


def train_attributes(folder: Path, drawn: pictures.Pictures) -> dict[str, Array]:
    """Arrays of `small_resnet` whose outputs are the logits of every class of every attribute, one after the other."""

    def batch_at(step: int) -> Batch:
        rng = np.random.default_rng((5, step))
        chosen = rows(5, step, BUDGET.batch_size, len(drawn.images))
        images = [_disturbed(drawn.images[i], rng) for i in chosen]
        return {"images": np.stack(images), "labels": drawn.labels[chosen].astype(np.int32)}

    arrays = small_resnet.initial(ATTRIBUTES, jax.random.key(5))
    return fit(arrays, attribute_loss, batch_at, BUDGET, folder, over=drawn.fingerprint)


def _disturbed(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shifted a little, brighter or darker, soft or noisy: a drawn picture is cleaner than a generated one."""
    y, x = rng.integers(-4, 5, size=2)
    moved = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="edge")[4 + y : 132 + y, 4 + x : 132 + x]
    if rng.random() < 0.4:  # never so soft that a small face has no expression
        moved = softened(moved, int(rng.integers(80, 120)))
    noise = rng.normal(0, rng.uniform(0, 8), (*image.shape[:2], 1)) if rng.random() < 0.5 else 0
    return np.clip(moved * rng.uniform(0.92, 1.08) + noise, 0, 255).astype(np.uint8)


def attribute_loss(arrays: dict[str, Array], batch: Mapping[str, Array], key: Array) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropy over attributes, of the pictures that show them; expressions, the smallest, weigh more."""
    del key
    logits = split(small_resnet.apply(ATTRIBUTES, arrays, batch["images"]))
    losses, right = [], {}
    for place, (name, one) in enumerate(logits.items()):
        label = batch["labels"][:, place]
        shown = label >= 0
        chosen = jnp.take_along_axis(jax.nn.log_softmax(one), jnp.maximum(label, 0)[:, None], 1)[:, 0]
        weight = _EXPRESSION if name == "expression" else 1.0
        losses.append(-weight * jnp.where(shown, chosen, 0).sum() / jnp.maximum(shown.sum(), 1))
        right[name] = jnp.where(shown, jnp.argmax(one, 1) == label, False).sum() / jnp.maximum(shown.sum(), 1)
    return jnp.mean(jnp.stack(losses)), right


def train_recogniser(folder: Path, drawn: pictures.Pictures, budget: Budget = RECOGNISER_BUDGET) -> dict[str, Array]:
    """The judging recogniser, who sees no picture of an eighth of the size: what it judges is drawn whole."""
    return faces.train_recogniser(folder, drawn, RECOGNISER, budget, softest=1.6, seed=13)


def split(outputs: Array) -> dict[str, Array]:
    """The logits of each attribute."""
    ends = np.cumsum([len(values) for values in CLASSES.values()])[:-1].tolist()
    return dict(zip(CLASSES, jnp.split(outputs, ends, axis=-1), strict=True))
