"""What goes into and comes out of the denoising loop: noise, text, faces, pixels. Each is one compiled function."""

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from infinite_id_jax.errors import InputError
from infinite_id_jax.sharding import gathered
from infinite_id_jax.stable_diffusion.clip_vision import VisionOutput
from infinite_id_jax.stable_diffusion.config import MAX_SIDE, UNetConfig
from infinite_id_jax.stable_diffusion.kernels import divide_rows
from infinite_id_jax.typing import Array, Float, Int, UInt

MAX_SEED = 2**32 - 1
DTYPES = ("float32", "bfloat16", "float16")

Split = tuple[nnx.GraphDef, Any]
"""A module as `nnx.split` gives it: its structure, which is compiled in, and its arrays."""


def check_dtype(dtype: str) -> None:
    """Raises InputError for a precision that is unknown, or that the device does not compute in."""
    if dtype not in DTYPES:
        raise InputError(f"Unknown dtype {dtype!r}: choose from {', '.join(DTYPES)}.")
    if dtype == "float16" and jax.default_backend() == "cpu":
        raise InputError("float16 does not run on a CPU: take float32 or bfloat16.")


def check_finite(numbers: np.ndarray) -> None:
    """Raises InputError where a model left the range of its numbers: such an image would be black."""
    if not np.isfinite(numbers).all():
        raise InputError(
            "The model gave numbers that are not finite: take the dtype bfloat16 or float32, and smaller scales of "
            "adapter and LoRA."
        )


def checked_prompts(prompts: str | Sequence[str]) -> list[str]:
    """One prompt or several as a list. Raises InputError for none."""
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    if not listed:
        raise InputError("There is no prompt: give at least one.")
    return listed


@partial(jax.jit, static_argnums=1)
def seeded_noise(seeds: UInt[Array, " P"] | np.ndarray, shape: tuple[int, int, int]) -> Float[Array, "P h w c"]:
    """Unit normal noise, each row from its own seed: a row is the same in any batch."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


def initial_noise(
    count: int, shape: tuple[int, int, int], seed: int | Sequence[int], latents: np.ndarray | Array | None
) -> Float[Array, "P h w c"]:
    """Unit normal noise of `count` prompt rows; always a fresh buffer, because sampling donates it.

    Raises InputError for latents of another shape, and for seeds that are out of range or not one for each row.
    """
    if latents is not None:
        if np.shape(latents) != (count, *shape):
            raise InputError(f"latents have shape {list(np.shape(latents))}; {[count, *shape]} is needed.")
        return jnp.array(latents, jnp.float32, copy=True)
    return seeded_noise(np.asarray(checked_seeds(seed, count), np.uint32), shape)


def checked_seeds(seed: Any, count: int) -> list[int]:
    """One for each of `count` rows, of one number or as many. Raises InputError for what is none or out of range."""
    try:
        if isinstance(seed, Sequence | np.ndarray):
            seeds = [operator.index(each) for each in seed]
        else:
            seeds = [operator.index(seed) + row for row in range(count)]
    except TypeError:
        raise InputError(f"The seed is {seed!r}: give a whole number, or one for each prompt.") from None
    if len(seeds) != count:
        raise InputError(f"{len(seeds)} seeds for {count} prompts: give one number, or one for each prompt.")
    if not all(0 <= s <= MAX_SEED for s in seeds):
        raise InputError(f"Seeds lie between 0 and {MAX_SEED}: choose another than {seed}.")
    return seeds


def latent_shape(
    height: int | None, width: int | None, latents: np.ndarray | Array | None, unet: UNetConfig, factor: int
) -> tuple[int, int, int]:
    """[h, w, c] of a picture of height x width pixels; without them of the given latents, or the model's own size.

    Raises InputError for pixels that are no multiple of `factor`, those of a latent.
    """
    if latents is not None and np.ndim(latents) == 4:
        default = (np.shape(latents)[1] * factor, np.shape(latents)[2] * factor)
    else:
        default = (unet.sample_size * factor,) * 2
    size = {"height": default[0] if height is None else height, "width": default[1] if width is None else width}
    for name, pixels in size.items():
        if pixels < factor or pixels % factor:
            nearest = max(factor, round(pixels / factor) * factor)
            raise InputError(f"The {name} {pixels} is not a multiple of {factor}: take {nearest}.")
        if pixels > MAX_SIDE:
            raise InputError(f"The {name} {pixels} is more than {MAX_SIDE}: SDXL draws about 1024 pixels a side.")
    return size["height"] // factor, size["width"] // factor, unet.in_channels


def time_ids(height: int, width: int) -> Float[np.ndarray, "6"]:
    """SDXL's micro-conditioning for an uncropped picture: original size, crop top-left, target size in pixels."""
    return np.asarray([height, width, 0, 0, height, width], np.float32)


def encode_text(
    first: Split, second: Split, ids: Int[Array | np.ndarray, "P L"], ids_2: Int[Array | np.ndarray, "P L"]
) -> tuple[Float[Array, "P L C"], Float[Array, "P D"]]:
    """SDXL's text condition: penultimate states of both encoders side by side, and the second one's pooled text."""
    return _encode_text(first[0], second[0], first[1], second[1], ids, ids_2)


@partial(jax.jit, static_argnums=(0, 1))
def _encode_text(graph: Any, graph_2: Any, state: Any, state_2: Any, ids: Array, ids_2: Array) -> tuple[Array, Array]:
    out, out_2 = nnx.merge(graph, state)(ids), nnx.merge(graph_2, state_2)(ids_2)
    return jnp.concatenate([out.penultimate, out_2.penultimate], axis=-1), out_2.pooled


def encode_crops(model: Split, pixels: Float[Array, "B H W 3"]) -> VisionOutput:
    """The CLIP image encoder."""
    return _apply(model[0], model[1], pixels)


def map_features(adapter: Split, features: Any) -> Float[Array, "B K D"]:
    """A batch of FaceFeatures to identity tokens (Infinite-ID Eq. 4)."""
    return _apply(adapter[0], adapter[1], features)


@partial(jax.jit, static_argnums=0)
def _apply(graph: Any, state: Any, inputs: Any) -> Any:
    return nnx.merge(graph, state)(inputs)


def decode(vae: Split, latents: Float[np.ndarray, "B h w c"], rows: int) -> Float[np.ndarray, "B H W 3"]:
    """Unscaled latents to pixels in [0, 1], `rows` at a time, because decoding is what takes the memory."""
    pixels = []
    for start in range(0, len(latents), rows):
        part = latents[start : start + rows]
        padded = np.concatenate([part, np.repeat(part[-1:], rows - len(part), axis=0)])
        pixels.append(gathered(_decode(vae[0], vae[1], padded))[: len(part)])
    return np.concatenate(pixels)


@partial(jax.jit, static_argnums=0)
def _decode(graph: Any, state: Any, latents: Array) -> Array:
    vae = nnx.merge(graph, state)
    image = vae.decode(divide_rows(latents.astype(jax.tree.leaves(state)[0].dtype))).astype(jnp.float32)
    return jnp.clip(image / 2 + 0.5, 0.0, 1.0)
