"""A frozen U-Net whose transformers multiply 8-bit numbers, for which hardware has up to twice the rate of 16 bits."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from infinite_id_jax.errors import InputError, MissingExtraError
from infinite_id_jax.stable_diffusion.attention import BasicTransformerBlock, Transformer2DModel
from infinite_id_jax.stable_diffusion.low_rank import LowRank
from infinite_id_jax.typing import Array, Float

KINDS = {"int8": jnp.int8, "float8": jnp.float8_e4m3fn}
# What every pixel passes through in every step; keys and values of text are few, and computed once.
_LAYERS = {
    BasicTransformerBlock: (
        *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out"),
        *("attn2.to_q", "attn2.to_out"),
        *("ff.proj", "ff.out"),
    ),
    Transformer2DModel: ("proj_in", "proj_out"),
}


class QuantizedLinear(nnx.Module):
    """x W + b as a product of 8-bit numbers: W with a scale for each output, x with one for each row (by qwix)."""

    def __init__(self, base: nnx.Linear, kind: str):
        """The kernel stays where its devices have it."""
        kernel = _by_outputs(base.kernel[...], kind)
        self.kernel, self.scale = nnx.Param(kernel.qvalue), nnx.Param(kernel.scale)  # [in, out], [1, out]
        self.bias = base.bias
        self.in_features, self.out_features = base.in_features, base.out_features

    def __call__(self, x: Float[Array, "*axes in"]) -> Float[Array, "*axes out"]:
        qwix, kernel = _qwix(), self.kernel[...]
        # Scales are of fp32: the sums of products that they multiply are beyond float16 and finer than bfloat16.
        rows = qwix.quantize(x.astype(jnp.float32), kernel.dtype, channelwise_axes=tuple(range(x.ndim - 1)))
        over = (((x.ndim - 1,), (0,)), ((), ()))
        y = qwix.dot_general(rows, qwix.QArray(kernel, self.scale[...]), over).astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].reshape((1,) * (x.ndim - 1) + (-1,))


@partial(jax.jit, static_argnames="kind")  # one program for each shape, and there are few
def _by_outputs(kernel: Array, kind: str) -> Any:
    return _qwix().quantize(kernel.astype(jnp.float32), KINDS[kind], channelwise_axes=(1,))


def checked_kind(kind: str) -> str:
    """Raises InputError for a kind that is not known, MissingExtraError where qwix is needed and not installed."""
    if kind not in ("none", *KINDS):
        raise InputError(f"Unknown quantization {kind!r}: choose from none, {', '.join(KINDS)}.")
    if kind != "none":
        _qwix()
    return kind


def quantize(unet: nnx.Module, kind: str) -> None:
    """Put 8-bit numbers in place of the kernels of all transformers of `unet`, in place, before an adapter is injected.

    kind: int8, float8 (e4m3), or none. LoRAs beside the kernels stay as they are. Raises as `checked_kind`.
    """
    if checked_kind(kind) == "none":
        return
    for _, module in list(nnx.iter_modules(unet)):
        for path in _LAYERS.get(type(module), ()):
            *owners, name = path.split(".")
            owner: Any = module
            for part in owners:
                owner = getattr(owner, part)
            while isinstance(getattr(owner, name), LowRank):
                owner, name = getattr(owner, name), "base"
            layer = getattr(owner, name)
            if isinstance(layer, nnx.Linear):  # SD 1.5 projects with a convolution
                setattr(owner, name, QuantizedLinear(layer, kind))


def _qwix() -> Any:
    try:
        import qwix
    except ImportError:
        raise MissingExtraError("Quantization", "quantization") from None
    return qwix
