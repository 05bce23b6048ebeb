"""The autoencoder between pixels and latents (diffusers' AutoencoderKL)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from infinite_id_jax.stable_diffusion.attention import Attention
from infinite_id_jax.stable_diffusion.config import VAEConfig
from infinite_id_jax.stable_diffusion.kernels import GroupNorm
from infinite_id_jax.stable_diffusion.resnet import (
    Downsample2D,
    FeatureMap,
    Resized,
    ResnetBlock2D,
    Upsample2D,
    conv3x3,
)
from infinite_id_jax.typing import Array, Float, Image, Latents, UInt8

_EPS = 1e-6


class Posterior(NamedTuple):
    """A diagonal Gaussian over unscaled latents: multiply samples by `config.scaling_factor` for the U-Net."""

    mean: Latents
    std: Latents


class PixelAttention(nnx.Module):
    """One head of self-attention over all pixels, with biases and a residual."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(channels, groups, eps=_EPS, rngs=rngs)
        self.attention = Attention(channels, channels, 1, channels, bias=True, rngs=rngs)

    def __call__(self, x: FeatureMap) -> FeatureMap:
        tokens = rearrange(self.group_norm(x), "B H W C -> B (H W) C")
        return x + self.attention(tokens).reshape(x.shape)


class MidBlock2D(nnx.Module):
    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        self.resnets = nnx.List(_resnet(channels, channels, groups, rngs) for _ in range(2))
        self.attentions = nnx.List([PixelAttention(channels, groups, rngs=rngs)])

    def __call__(self, x: FeatureMap) -> FeatureMap:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class EncoderBlock2D(nnx.Module):
    def __init__(self, config: VAEConfig, channels_in: int, channels: int, *, last: bool, rngs: nnx.Rngs):
        widths = [channels_in] + [channels] * (config.layers_per_block - 1)
        self.resnets = nnx.List(_resnet(width, channels, config.norm_num_groups, rngs) for width in widths)
        if not last:
            self.downsamplers = nnx.List([Downsample2D(channels, asymmetric=True, rngs=rngs)])

    def __call__(self, x: FeatureMap) -> Resized:
        for resnet in self.resnets:
            x = resnet(x)
        return self.downsamplers[0](x) if hasattr(self, "downsamplers") else x


class DecoderBlock2D(nnx.Module):
    def __init__(self, config: VAEConfig, channels_in: int, channels: int, *, last: bool, rngs: nnx.Rngs):
        widths = [channels_in] + [channels] * config.layers_per_block
        self.resnets = nnx.List(_resnet(width, channels, config.norm_num_groups, rngs) for width in widths)
        if not last:
            self.upsamplers = nnx.List([Upsample2D(channels, rngs=rngs)])

    def __call__(self, x: FeatureMap) -> Resized:
        for resnet in self.resnets:
            x = resnet(x)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


class Encoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = conv3x3(config.in_channels, channels[0], rngs)
        self.down_blocks = nnx.List(
            EncoderBlock2D(config, channels[max(i - 1, 0)], width, last=i == len(channels) - 1, rngs=rngs)
            for i, width in enumerate(channels)
        )
        self.mid_block = MidBlock2D(channels[-1], groups, rngs=rngs)
        self.conv_norm_out = GroupNorm(channels[-1], groups, eps=_EPS, rngs=rngs)
        self.conv_out = conv3x3(channels[-1], 2 * config.latent_channels, rngs)

    def __call__(self, x: Image) -> Resized:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = conv3x3(config.latent_channels, channels[0], rngs)
        self.mid_block = MidBlock2D(channels[0], groups, rngs=rngs)
        self.up_blocks = nnx.List(
            DecoderBlock2D(config, channels[max(i - 1, 0)], width, last=i == len(channels) - 1, rngs=rngs)
            for i, width in enumerate(channels)
        )
        self.conv_norm_out = GroupNorm(channels[-1], groups, eps=_EPS, rngs=rngs)
        self.conv_out = conv3x3(channels[-1], config.out_channels, rngs)

    def __call__(self, z: Latents) -> Resized:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Pixels in [-1, 1] to a posterior over latents an eighth of the size, and back. fp16 overflows: fp32 or bf16."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = nnx.Conv(2 * config.latent_channels, 2 * config.latent_channels, (1, 1), rngs=rngs)
        self.post_quant_conv = nnx.Conv(config.latent_channels, config.latent_channels, (1, 1), rngs=rngs)

    def encode(self, image: Image) -> Posterior:
        """Image [B, H, W, 3] in [-1, 1] -> mean and std [B, H/8, W/8, c]; the log-variance is cut to [-30, 20]."""
        mean, logvar = jnp.split(self.quant_conv(self.encoder(image)), 2, axis=-1)
        return Posterior(mean, jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0)))

    def decode(self, z: Latents) -> Float[Array, "B H W 3"]:
        """Unscaled latents [B, h, w, c] -> image [B, 8h, 8w, 3], about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))


def to_pixels(images: UInt8[Array, "B H W 3"]) -> Image:
    """RGB bytes as the pixels of `AutoencoderKL`, fp32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def _resnet(channels_in: int, channels_out: int, groups: int, rngs: nnx.Rngs) -> ResnetBlock2D:
    return ResnetBlock2D(channels_in, channels_out, time_dim=None, groups=groups, eps=_EPS, rngs=rngs)
