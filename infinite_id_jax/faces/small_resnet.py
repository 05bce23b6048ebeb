"""A small residual network from a square picture to a vector: what the miniature's faces are found and known by.

Arrays are a flat dictionary of plain names, as they lie in a safetensors file; kernels are [height, width, in, out].
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from infinite_id_jax.typing import Array, Float

_GROUPS = 8


class SmallResNetConfig(NamedTuple):
    """A picture of `size` pixels, in patches of 4 to begin with, halved before each further one of `widths`."""

    size: int
    widths: tuple[int, ...]
    outputs: int

    @property
    def final(self) -> int:
        """Side of the last feature map."""
        return self.size // 2 ** (len(self.widths) + 1)


def initial(config: SmallResNetConfig, key: Array) -> dict[str, Array]:
    """Random arrays (He et al. 2015); the last layer of each residual branch starts at zero."""
    shapes: dict[str, tuple[int, ...]] = {}
    before = 4 * 3
    for i, width in enumerate(config.widths):
        side = 1 if i else 3
        shapes[f"{i}.halve.kernel"] = (side, side, 4 * before, width)
        shapes |= {f"{i}.{part}.kernel": (3, 3, width, width) for part in "ab"}
        before = width
    shapes["head.kernel"] = (config.final**2 * before, config.outputs)
    arrays = {}
    for place, (name, shape) in enumerate(shapes.items()):
        fan_in = 1
        for side in shape[:-1]:
            fan_in *= side
        scale = 0.0 if name.endswith(".b.kernel") else (2 / fan_in) ** 0.5
        scale *= 0.1 if name == "head.kernel" else 1.0  # features of many blocks add up
        arrays[name] = scale * jax.random.normal(jax.random.fold_in(key, place), shape)
        part = name.removesuffix(".kernel")
        arrays[f"{part}.bias"] = jnp.zeros(shape[-1])
        if part != "head":
            arrays[f"{part}.scale"] = jnp.ones(shape[-1])
    return arrays


def apply(config: SmallResNetConfig, arrays: Mapping[str, Array], images: Array) -> Float[Array, "B outputs"]:
    """Images [B, size, size, 3] in 0..255 to raw outputs."""
    x = features(config, arrays, images)
    return x.reshape(x.shape[0], -1) @ arrays["head.kernel"] + arrays["head.bias"][None]


def features(config: SmallResNetConfig, arrays: Mapping[str, Array], images: Array) -> Float[Array, "B h w C"]:
    """The last feature map, of `config.final` pixels a side."""
    x = _halved(images.astype(jnp.float32) / 127.5 - 1)
    for i in range(len(config.widths)):
        x = jax.nn.relu(_layer(arrays, f"{i}.halve", _halved(x)))
        x = jax.nn.relu(x + _layer(arrays, f"{i}.b", jax.nn.relu(_layer(arrays, f"{i}.a", x))))
    return x


def _halved(x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
    """Each 2 x 2 pixels as one of four times the channels: on a CPU the gradient of a stride is slow."""
    return rearrange(x, "B (h p) (w q) C -> B h w (p q C)", p=2, q=2)


def _layer(arrays: Mapping[str, Array], name: str, x: Array) -> Array:
    """Convolution, then GroupNorm with the layer's own scale and bias."""
    kernel = arrays[f"{name}.kernel"]
    x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    # Moments of each channel first, then of the group: one pass over the map in place of several.
    mean, square = (moment.reshape(len(x), _GROUPS, -1).mean(-1) for moment in (x.mean((1, 2)), (x * x).mean((1, 2))))
    scale = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + 1e-5)
    mean, scale = (jnp.repeat(each, x.shape[-1] // _GROUPS, axis=1)[:, None, None, :] for each in (mean, scale))
    weight, bias = (arrays[f"{name}.{part}"].reshape(1, 1, 1, -1) for part in ("scale", "bias"))
    return (x - mean) * scale * weight + bias
