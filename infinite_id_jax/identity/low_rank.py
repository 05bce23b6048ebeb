"""Low-rank maps that adapters such as FaceID add to every attention, on the identity rows alone."""

from flax import nnx

from infinite_id_jax.identity.streams import Layout
from infinite_id_jax.stable_diffusion.attention import Attention
from infinite_id_jax.stable_diffusion.kernels import Linear
from infinite_id_jax.stable_diffusion.low_rank import LowRank
from infinite_id_jax.stable_diffusion.quantized import QuantizedLinear
from infinite_id_jax.typing import Array, Tokens

_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")


class LowRankMap(nnx.Module):
    """up(down(x)), of rank `rank` (LoRA, Hu et al. 2021, Sec. 4.1, with alpha equal to the rank)."""

    def __init__(self, dim_in: int, dim_out: int, rank: int, *, rngs: nnx.Rngs):
        self.down = Linear(dim_in, rank, use_bias=False, rngs=rngs)
        self.up = Linear(rank, dim_out, use_bias=False, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.up(self.down(x))


class LowRankAttention(nnx.Module):
    """One map for each projection of an attention."""

    def __init__(self, attention: Attention, rank: int, *, rngs: nnx.Rngs):
        for name in _PROJECTIONS:
            linear = getattr(attention, name)
            setattr(self, f"{name}_lora", LowRankMap(linear.in_features, linear.out_features, rank, rngs=rngs))


class IdentityRowsLinear(nnx.Module):
    """A frozen linear map, and beside it a low-rank one for the identity rows of `layout`, or for all without one."""

    def __init__(self, base: nnx.Linear | LowRank | QuantizedLinear, low_rank: LowRankMap):
        self.base = base
        self.low_rank = low_rank
        self.in_features, self.out_features = base.in_features, base.out_features
        self.layout: Layout | None = None

    def __call__(self, x: Tokens) -> Tokens:
        y = self.base(x)
        if self.layout is None:
            return y + self.low_rank(x).astype(y.dtype)
        text, identity = self.layout.split(y)
        return self.layout.join(text, identity + self.low_rank(self.layout.split(x)[1]).astype(y.dtype))


def add_low_rank(attention: Attention, low_rank: LowRankAttention) -> None:
    """Put the maps beside those of `attention`, in place."""
    for name in _PROJECTIONS:
        wrapped = IdentityRowsLinear(getattr(attention, name), getattr(low_rank, f"{name}_lora"))
        setattr(attention, name, wrapped)


def remove_low_rank(attention: Attention) -> None:
    """Undo `add_low_rank`."""
    for name in _PROJECTIONS:
        linear = getattr(attention, name)
        if isinstance(linear, IdentityRowsLinear):
            setattr(attention, name, linear.base)


def set_rows(attention: Attention, layout: Layout) -> None:
    """Which rows the maps of `attention` are for, if it has any."""
    for name in _PROJECTIONS:
        linear = getattr(attention, name)
        if isinstance(linear, IdentityRowsLinear):
            linear.layout = layout
