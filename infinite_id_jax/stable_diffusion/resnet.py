"""Residual blocks and resampling, shared by the U-Net and the VAE (diffusers' resnet.py)."""

import jax
from flax import nnx

from infinite_id_jax.stable_diffusion.kernels import GroupNorm, Linear, convolve, convolve_doubled, double, platform
from infinite_id_jax.typing import Array, Float

FeatureMap = Float[Array, "B H W C"]
Resized = Float[Array, "B _ _ _"]
"""A feature map of the same rows, of another size or width."""


def conv3x3(channels_in: int, channels_out: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(channels_in, channels_out, (3, 3), padding=1, conv_general_dilated=convolve, rngs=rngs)


class ResnetBlock2D(nnx.Module):
    """Two convolutions behind GroupNorm and SiLU, the time embedding added between them, and a residual."""

    def __init__(
        self, channels_in: int, channels_out: int, *, time_dim: int | None, groups: int, eps: float, rngs: nnx.Rngs
    ):
        self.norm1 = GroupNorm(channels_in, groups, eps=eps, rngs=rngs)
        self.conv1 = conv3x3(channels_in, channels_out, rngs)
        if time_dim is not None:
            self.time_emb_proj = Linear(time_dim, channels_out, rngs=rngs)
        self.norm2 = GroupNorm(channels_out, groups, eps=eps, rngs=rngs)
        self.conv2 = conv3x3(channels_out, channels_out, rngs)
        if channels_in != channels_out:
            self.conv_shortcut = nnx.Conv(channels_in, channels_out, (1, 1), rngs=rngs)

    def __call__(self, x: FeatureMap, time_embedding: Float[Array, "B T"] | None = None) -> Resized:
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        if time_embedding is not None:
            hidden = hidden + self.time_emb_proj(jax.nn.silu(time_embedding))[:, None, None, :]
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return hidden + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Downsample2D(nnx.Module):
    """Halve height and width with a strided convolution; the VAE pads only below and to the right."""

    def __init__(self, channels: int, *, asymmetric: bool = False, rngs: nnx.Rngs):
        padding = ((0, 1), (0, 1)) if asymmetric else ((1, 1), (1, 1))
        self.conv = nnx.Conv(
            channels, channels, (3, 3), strides=2, padding=padding, conv_general_dilated=convolve, rngs=rngs
        )

    def __call__(self, x: FeatureMap) -> Resized:
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Double height and width (nearest), then convolve."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = conv3x3(channels, channels, rngs)

    def __call__(self, x: FeatureMap, size: tuple[int, ...] | None = None) -> Resized:
        """`size` crops the doubled map where the way down halved an odd size."""
        whole = size is None or (size[0], size[1]) == (2 * x.shape[1], 2 * x.shape[2])
        if whole and platform() == "cpu" and isinstance(self.conv, nnx.Conv):  # no LoRA is beside it
            assert self.conv.bias is not None
            return convolve_doubled(x, self.conv.kernel[...]) + self.conv.bias[...].reshape(1, 1, 1, -1)
        x = double(x)
        if size is not None:
            x = x[:, : size[0], : size[1]]
        return self.conv(x)
