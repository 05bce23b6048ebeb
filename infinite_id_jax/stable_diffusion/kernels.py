"""Attention and the layers that work is spent in, in the form that the hardware does best.

What was chosen on a CPU was measured there (docs/performance.md); every form is held to the same result by tests.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from infinite_id_jax.typing import Array, Float, Heads, KeyHeads

_ROWS = 256  # queries whose weights over all keys a CPU holds at once: with SDXL's heads they fit its caches

_FLASH_TOKENS = 2048  # queries from which a TPU takes tiles: SDXL's 64 x 64 at 1024 px
_FLASH_HEAD = 64  # numbers of a head: those of other models, and the VAE's, are left to XLA
_TILE = 512  # of queries and keys
_FUSED_HEAD = 128  # numbers of a head, a multiple of 8, that cuDNN takes on every GPU from Ampere on
_AMPERE = 8  # its compute capability
_WEIGHTS = 2**24  # of one head that are held at once where no kernel spares them: SDXL's at 1024 px
_ROW_AXES, _HEAD_AXES = ("data", "fsdp"), ("tensor",)  # of the mesh (sharding.py)

PLAIN = "plain"  # no platform at all: every layer in XLA's own form
compiling_for = jax.make_user_context(None)
"""`with compiling_for("tpu"):` chooses for that platform in what is traced inside, whatever JAX runs on here."""


def platform() -> str:
    """What is compiled for, "cpu", "gpu" or "tpu": JAX's default backend unless `compiling_for` says otherwise."""
    return compiling_for.value or jax.default_backend()


def dot_product_attention(q: Heads, k: KeyHeads, v: KeyHeads) -> Heads:
    """softmax(q k^T / sqrt(D)) v over [B, L, N, D], softmax in fp32 (Infinite-ID Eq. 2).

    Half precision on a GPU takes cuDNN's fused kernel, a TPU Pallas' where there are many tokens, and a CPU some
    queries at a time, as do the others where all L x L weights would be many.
    """
    where = platform()
    if where == "gpu" and _fused(q, k) and _divides(q):
        return _on_each_device(partial(jax.nn.dot_product_attention, implementation="cudnn"), q, k, v)
    if where == "tpu" and _in_tiles(q, k) and _divides(q):
        return _on_each_device(_attend_in_tiles, q, k, v)
    if where == "cpu" or (where != PLAIN and q.shape[1] * k.shape[1] > _WEIGHTS):
        return _attend_by_rows(q, k, v)
    return jax.nn.dot_product_attention(q, k, v)


def _fused(q: Array, k: Array) -> bool:
    """Whether cuDNN has a kernel for these heads; it has none for the VAE's one head of 512, nor for a single token."""
    if 1 in (q.shape[1], k.shape[1]):
        return False
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return half and q.shape[-1] <= _FUSED_HEAD and q.shape[-1] % 8 == 0 and _from_ampere_on()


def _from_ampere_on() -> bool:
    """Whether the GPU is of a generation that the kernels are for; those compiled for elsewhere are."""
    if compiling_for.value:
        return True
    generation = str(getattr(jax.local_devices()[0], "compute_capability", "")).partition(".")[0]
    return generation.isdigit() and int(generation) >= _AMPERE


def _in_tiles(q: Array, k: Array) -> bool:
    """Whether heads are SDXL's, and queries and keys many and whole tiles."""
    many = q.shape[1] >= _FLASH_TOKENS
    return many and q.shape[-1] == _FLASH_HEAD and not (q.shape[1] % _TILE or k.shape[1] % _TILE)


def _devices(axes: Sequence[str]) -> int:
    """Over how many devices of the mesh these axes divide."""
    return math.prod(jax.sharding.get_abstract_mesh().shape.get(axis, 1) for axis in axes)


def _divides(q: Array) -> bool:
    """Whether each device of the mesh has whole heads."""
    return q.shape[2] % _devices(_HEAD_AXES) == 0


def _on_each_device(attend: Callable[..., Array], q: Array, k: Array, v: Array) -> Array:
    """A kernel on each device for its rows and heads: the compiler divides none by itself, or only where queries and
    keys lie alike. The mesh is the one of `jax.set_mesh`, if any. Where there are fewer rows than devices (one stream's
    of a small batch), or some are left over, the last devices work on rows of zeros."""
    if jax.sharding.get_abstract_mesh().empty:
        return attend(q, k, v)
    more = -len(q) % _devices(_ROW_AXES)
    filled = (jnp.pad(x, ((0, more), (0, 0), (0, 0), (0, 0))) if more else x for x in (q, k, v))
    place = jax.sharding.PartitionSpec(_ROW_AXES, None, _HEAD_AXES)
    divided = jax.shard_map(attend, in_specs=(place, place, place), out_specs=place, check_vma=False)
    return divided(*filled)[: len(q)]


def _attend_in_tiles(*heads: Array) -> Array:
    """Pallas' flash attention for TPUs (Dao et al. 2022) of q, k, v."""
    from jax.experimental.pallas.ops.tpu import flash_attention as pallas

    tile = dict.fromkeys((field.name for field in dataclasses.fields(pallas.BlockSizes)), _TILE)
    sizes = pallas.BlockSizes(**tile | {"block_b": 1})
    q, k, v = (x.transpose(0, 2, 1, 3) for x in heads)
    return pallas.flash_attention(q, k, v, sm_scale=q.shape[-1] ** -0.5, block_sizes=sizes).transpose(0, 2, 1, 3)


def _attend_by_rows(q: Array, k: Array, v: Array) -> Array:
    """Keys stand transposed in memory, so that every product reads rows; weights are computed again in the gradient."""
    keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)  # [B, N, D, K], [B, N, K, D]
    queries = (q * q.shape[-1] ** -0.5).transpose(0, 2, 1, 3)  # [B, N, L, D]
    length, on_cpu = queries.shape[2], platform() == "cpu"
    most = _ROWS if on_cpu else max(_ROWS, _WEIGHTS // k.shape[1])
    if length <= (2 * most if on_cpu else most):
        return _weigh(queries, keys, values).transpose(0, 2, 1, 3)
    parts = -(-length // most)
    rows = -(-length // parts)
    padded = jnp.pad(queries, ((0, 0), (0, 0), (0, parts * rows - length), (0, 0)))
    split = jnp.moveaxis(padded.reshape(*padded.shape[:2], parts, rows, -1), 2, 0)
    attended = lax.map(jax.checkpoint(lambda part: _weigh(part, keys, values)), split)  # [parts, B, N, rows, D]
    return jnp.moveaxis(attended, 0, 2).reshape(padded.shape)[:, :, :length].transpose(0, 2, 1, 3)


def _weigh(q: Float[Array, "B N L D"], keys: Float[Array, "B N D K"], v: Float[Array, "B N K D"]) -> Array:
    rows = (((3,), (2,)), ((0, 1), (0, 1)))
    logits = lax.dot_general(q, keys, rows, preferred_element_type=jnp.float32)
    weights = jnp.exp(logits - lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    summed = lax.dot_general(weights.astype(v.dtype), v, rows, preferred_element_type=jnp.float32)
    return (summed / weights.sum(axis=-1, keepdims=True)).astype(q.dtype)


def double(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Nearest neighbours at twice the height and width.

    Left to itself the compiler gathers all rows on every device behind it, to divide the next convolution's channels.
    """
    return divide_rows(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


def convolve_doubled(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C D"]) -> Float[Array, "B h w D"]:
    """`double` and a convolution of 3 x 3 with a border of zeros, in four ninths of the products.

    Of three neighbours in a doubled map two are one pixel: each of the four places that come of a pixel sees 2 x 2
    pixels, by a kernel whose numbers are sums of the given one's.
    """

    def folded(kernel: Array, axis: int) -> tuple[Array, Array]:
        first, middle, last = (lax.index_in_dim(kernel, i, axis) for i in range(3))
        join = partial(lax.concatenate, dimension=axis)
        return join((first, middle + last)), join((first + middle, last))

    def places(wide: Array, row: int) -> list[Array]:
        return [
            lax.conv_general_dilated(
                x,
                part.astype(kernel.dtype),
                (1, 1),
                ((1 - row, row), (1 - column, column)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            for column, part in enumerate(folded(wide, 1))
        ]

    rows = [jnp.stack(places(part, row), axis=3) for row, part in enumerate(folded(kernel.astype(jnp.float32), 0))]
    batch, height, width, _ = x.shape
    return divide_rows(jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, -1))


def divide_rows(x: Array) -> Array:
    """The same, its rows over the mesh of `jax.set_mesh`, if any (sharding.py)."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    rest = [jax.sharding.PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return lax.with_sharding_constraint(x, jax.sharding.PartitionSpec(_ROW_AXES, *rest))


def convolve(
    x: Array, kernel: Array, strides: Sequence[int], padding: Any, *, dimension_numbers: Any, **options: Any
) -> Array:
    """`lax.conv_general_dilated` of NHWC and HWIO, for `nnx.Conv`.

    Where the kernel is larger than what it passes over, a CPU takes one product of patches and kernel: XLA's own
    convolution has too few pixels there to divide.
    """
    height, width, _, channels_out = kernel.shape
    pixels = x.shape[0] * x.shape[1] * x.shape[2]
    dilations = [*(options.get("lhs_dilation") or ()), *(options.get("rhs_dilation") or ())]
    plain = options.get("feature_group_count", 1) == 1 and set(dilations) <= {1} and not isinstance(padding, str)
    if platform() == "cpu" and plain and height * width > 1 and pixels < channels_out:
        return _convolve_patches(x, kernel, strides, padding)
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=dimension_numbers, **options)


def _convolve_patches(x: Array, kernel: Array, strides: Sequence[int], padding: Any) -> Array:
    height, width, channels_in, channels_out = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = ((size - k) // s + 1 for size, k, s in zip(x.shape[1:3], (height, width), strides, strict=True))
    shifted = [
        x[:, i : i + strides[0] * (rows - 1) + 1 : strides[0], j : j + strides[1] * (columns - 1) + 1 : strides[1]]
        for i in range(height)
        for j in range(width)
    ]
    patches = jnp.concatenate(shifted, axis=-1).reshape(-1, height * width * channels_in)
    product = patches @ kernel.reshape(-1, channels_out)
    return product.reshape(x.shape[0], rows, columns, channels_out)


class Linear(nnx.Linear):
    """`nnx.Linear`, with `product` for its product."""

    def __init__(self, in_features: int, out_features: int, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(in_features, out_features, dot_general=product, rngs=rngs, **options)


def product(x: Array, kernel: Array, dimension_numbers: Any, **options: Any) -> Array:
    """`lax.dot_general` of [..., C] and a kernel [C, D].

    JAX makes the kernel's gradient as the transpose of [D, C], which a CPU takes up to four times longer for.
    """
    if platform() == "cpu":
        return _product(x, kernel)
    return lax.dot_general(x, kernel, dimension_numbers, **options)


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    return x @ kernel


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _product_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    rows = tuple(range(x.ndim - 1))
    return gradient @ kernel.T, lax.dot_general(x, gradient, ((rows, rows), ((), ())))


_product.defvjp(_product_forward, _product_backward)


def layer_norm(channels: int, rngs: nnx.Rngs, eps: float = 1e-5) -> nnx.LayerNorm:
    """LayerNorm over channels; the variance in two passes, as E[x^2] - E[x]^2 cancels on CLIP's large channels."""
    return nnx.LayerNorm(channels, epsilon=eps, use_fast_variance=False, rngs=rngs)


class GroupNorm(nnx.Module):
    """Group normalisation in two passes in fp32, over each channel first and then over the channels of its group.

    No array of the input's size is brought into groups and back, which costs a CPU time.
    """

    def __init__(self, channels: int, groups: int, *, eps: float, rngs: nnx.Rngs):
        """Raises ValueError for groups that do not divide the channels."""
        if channels % groups:
            raise ValueError(f"{groups} groups do not divide {channels} channels.")
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.groups, self.eps = groups, eps

    def __call__(self, x: Float[Array, "B *size C"]) -> Float[Array, "B *size C"]:
        """Of any number of axes between rows and channels."""
        size = tuple(range(1, x.ndim - 1))
        aligned = (1,) * (x.ndim - 1) + (-1,)

        def over_group(y: Array) -> Array:
            means = y.mean(axis=size).reshape(x.shape[0], self.groups, -1).mean(axis=-1)
            return jnp.expand_dims(jnp.repeat(means, x.shape[-1] // self.groups, axis=-1), size)

        scale, bias = (p[...].astype(jnp.float32).reshape(aligned) for p in (self.scale, self.bias))
        wide = x.astype(jnp.float32)
        centred = wide - over_group(wide)
        normed = centred * (lax.rsqrt(over_group(jnp.square(centred)) + self.eps) * scale)
        return (normed + bias).astype(x.dtype)
