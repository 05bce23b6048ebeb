"""Low-rank maps beside the layers of a frozen model (LoRA, Hu et al. 2021), whose strength may change at any time."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from infinite_id_jax.errors import InputError
from infinite_id_jax.typing import Array, Float

T = TypeVar("T")


class LoRAScale(nnx.Variable):
    """The strength of one LoRA in one layer; the metadata `lora` is its name."""


class LowRank(nnx.Module):
    """base(x) + scale * ratio * up(down(x)), of a Linear, a Conv or another LowRank (LoRA, Sec. 4.1).

    `down` [..., in, rank] has the kernel size of a convolution, `up` is [rank, out]; `ratio` is alpha / rank. What
    callers read of a layer they find here too.
    """

    def __init__(
        self,
        base: "nnx.Linear | nnx.Conv | LowRank",
        down: Float[Array, "*size in rank"],
        up: Float[Array, "rank out"],
        ratio: float,
        *,
        name: str,
        scale: float,
    ):
        self.base = base
        self.down = _with_kernel(innermost(base), down)
        self.up = nnx.Param(up)
        self.ratio = ratio
        self.scale = LoRAScale(jnp.float32(scale), lora=name)

    def __call__(self, x: Float[Array, "*axes in"]) -> Float[Array, "*others out"]:
        y = self.base(x)
        change = jnp.dot(self.down(x), self.up[...])
        return y + (self.scale[...] * self.ratio * change).astype(y.dtype)

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def kernel(self) -> nnx.Param:
        return self.base.kernel

    @property
    def bias(self) -> nnx.Param | None:
        return self.base.bias


def innermost(layer: nnx.Linear | nnx.Conv | LowRank) -> nnx.Linear | nnx.Conv:
    """The frozen layer itself."""
    while isinstance(layer, LowRank):
        layer = layer.base
    return layer


def _with_kernel(layer: nnx.Linear | nnx.Conv, kernel: Array) -> nnx.Linear | nnx.Conv:
    """The same layer (strides and padding of a convolution) with another kernel and no bias."""
    layer = nnx.merge(*nnx.split(layer))
    layer.kernel = nnx.Param(kernel)
    layer.bias, layer.use_bias, layer.out_features = None, False, kernel.shape[-1]
    return layer


def lora_names(tree: object) -> set[str]:
    """Of all LoRAs that a module, a state, or any list or tuple of them holds."""
    leaves = jax.tree.leaves(tree, is_leaf=_is_variable)
    return {leaf.get_metadata()["lora"] for leaf in leaves if isinstance(leaf, LoRAScale)}


def set_lora_scale(tree: T, name: str, scale: float) -> T:
    """`tree` (a module, a state, or any list or tuple of them) with another strength of one LoRA.

    Arrays are shared, nothing is changed in place, and programs compiled for `tree` serve the result. Raises
    InputError if it holds no LoRA of this name.
    """
    present = lora_names(tree)
    if name not in present:
        among = f"it holds {', '.join(sorted(present))}" if present else "none was loaded, or all were merged"
        raise InputError(f"The model holds no LoRA {name!r} with a strength of its own: {among}.")

    def changed(leaf: object) -> object:
        if isinstance(leaf, LoRAScale) and leaf.get_metadata()["lora"] == name:
            return leaf.replace(jnp.float32(scale))
        return leaf

    return jax.tree.map(changed, tree, is_leaf=_is_variable)


def _is_variable(node: object) -> bool:
    return isinstance(node, nnx.Variable)
