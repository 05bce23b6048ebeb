"""The denoising U-Net of SDXL, SD 2 and SD 1.5 (diffusers' UNet2DConditionModel)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from infinite_id_jax.errors import InputError
from infinite_id_jax.stable_diffusion.attention import Transformer2DModel
from infinite_id_jax.stable_diffusion.config import UNetConfig
from infinite_id_jax.stable_diffusion.kernels import GroupNorm, Linear
from infinite_id_jax.stable_diffusion.resnet import (
    Downsample2D,
    FeatureMap,
    Resized,
    ResnetBlock2D,
    Upsample2D,
    conv3x3,
)
from infinite_id_jax.typing import Array, Float, Latents


class AddedConditions(NamedTuple):
    """SDXL's second conditioning: pooled text and (original h, w, crop top, left, target h, w) in pixels."""

    pooled: Float[Array, "B C"]
    time_ids: Float[Array, "B 6"]


def sinusoidal_embedding(
    x: Float[Array, " B"], dim: int, *, flip_sin_to_cos: bool = True, freq_shift: int = 0
) -> Float[Array, "B dim"]:
    """Frequencies 10000^(-i / (dim/2 - freq_shift)), cosines first if flipped, in fp32."""
    half = dim // 2
    frequencies = jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = x.astype(jnp.float32)[:, None] * frequencies[None, :]
    parts = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(parts, axis=-1)


class TimestepEmbedding(nnx.Module):
    def __init__(self, dim_in: int, dim: int, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(dim_in, dim, rngs=rngs)
        self.linear_2 = Linear(dim, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "B C"]) -> Float[Array, "B T"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class _Level(NamedTuple):
    """What the blocks of one resolution have in common."""

    config: UNetConfig
    channels: int
    heads: int
    layers: int  # transformer blocks behind each resnet, 0 for none
    time_dim: int

    def resnet(self, channels_in: int, rngs: nnx.Rngs) -> ResnetBlock2D:
        return ResnetBlock2D(
            channels_in,
            self.channels,
            time_dim=self.time_dim,
            groups=self.config.norm_num_groups,
            eps=self.config.norm_eps,
            rngs=rngs,
        )

    def attention(self, rngs: nnx.Rngs) -> Transformer2DModel:
        return Transformer2DModel(
            self.channels,
            self.heads,
            self.layers,
            self.config.cross_attention_dim,
            groups=self.config.norm_num_groups,
            linear_projection=self.config.use_linear_projection,
            rngs=rngs,
        )


class DownBlock2D(nnx.Module):
    """Resnets, each followed by a transformer where the level has one, then a downsampler unless it is the last."""

    def __init__(self, level: _Level, channels_in: int, *, last: bool, rngs: nnx.Rngs):
        count = level.config.layers_per_block
        widths = [channels_in] + [level.channels] * (count - 1)
        self.resnets = nnx.List(level.resnet(width, rngs) for width in widths)
        if level.layers:
            self.attentions = nnx.List(level.attention(rngs) for _ in range(count))
        if not last:
            self.downsamplers = nnx.List([Downsample2D(level.channels, rngs=rngs)])

    def __call__(self, x: FeatureMap, time_embedding: Array, context: Any) -> tuple[Resized, list[Array]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time_embedding)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, context)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock2D(nnx.Module):
    def __init__(self, level: _Level, *, rngs: nnx.Rngs):
        self.resnets = nnx.List(level.resnet(level.channels, rngs) for _ in range(2))
        self.attentions = nnx.List([level.attention(rngs)])

    def __call__(self, x: FeatureMap, time_embedding: Array, context: Any) -> FeatureMap:
        x = self.resnets[0](x, time_embedding)
        return self.resnets[1](self.attentions[0](x, context), time_embedding)


class UpBlock2D(nnx.Module):
    """As DownBlock2D, each resnet taking one skip, then an upsampler unless it is the last."""

    def __init__(self, level: _Level, channels_in: int, skip_channels: list[int], *, last: bool, rngs: nnx.Rngs):
        widths = [channels_in] + [level.channels] * (len(skip_channels) - 1)
        self.resnets = nnx.List(
            level.resnet(width + skip, rngs) for width, skip in zip(widths, skip_channels, strict=True)
        )
        if level.layers:
            self.attentions = nnx.List(level.attention(rngs) for _ in skip_channels)
        if not last:
            self.upsamplers = nnx.List([Upsample2D(level.channels, rngs=rngs)])

    def __call__(self, x: FeatureMap, skips: list[Array], time_embedding: Array, context: Any) -> Resized:
        """Takes its skips from the end of the list."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(jnp.concatenate([x, skips.pop()], axis=-1), time_embedding)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, context)
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, skips[-1].shape[1:3])
        return x


class UNet2DConditionModel(nnx.Module):
    """Predicts the noise (or v) in latents; which of the three families, the configuration says."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels = config.block_out_channels
        time_dim = channels[0] * 4
        self.conv_in = conv3x3(config.in_channels, channels[0], rngs)
        self.time_embedding = TimestepEmbedding(channels[0], time_dim, rngs=rngs)
        if config.addition_embed_type == "text_time":
            width = config.projection_class_embeddings_input_dim
            if width is None or config.addition_time_embed_dim is None:
                raise InputError(
                    "UNetConfig: addition_embed_type text_time needs addition_time_embed_dim and "
                    "projection_class_embeddings_input_dim: fetch unet/config.json again."
                )
            self.add_embedding = TimestepEmbedding(width, time_dim, rngs=rngs)

        down = _levels(config, config.down_block_types, time_dim)
        up = _levels(config, config.up_block_types[::-1], time_dim)
        self.down_blocks = nnx.List()
        skips = [channels[0]]
        for i, level in enumerate(down):
            last = i == len(down) - 1
            self.down_blocks.append(DownBlock2D(level, channels[max(i - 1, 0)], last=last, rngs=rngs))
            skips += [level.channels] * (config.layers_per_block + (not last))

        self.mid_block = MidBlock2D(_mid_level(config, time_dim), rngs=rngs)

        self.up_blocks = nnx.List()
        width = channels[-1]
        for i, level in reversed(list(enumerate(up))):
            taken = [skips.pop() for _ in range(config.layers_per_block + 1)]
            self.up_blocks.append(UpBlock2D(level, width, taken, last=i == 0, rngs=rngs))
            width = level.channels

        self.conv_norm_out = GroupNorm(channels[0], config.norm_num_groups, eps=config.norm_eps, rngs=rngs)
        self.conv_out = conv3x3(channels[0], config.out_channels, rngs)

    def __call__(
        self, x: Latents, t: Float[Array, " B"], context: Any, added: AddedConditions | None = None
    ) -> Latents:
        """x [B, h, w, c] at timesteps t [B] -> prediction [B, h, w, c] in the model's dtype.

        `context` goes to every cross-attention as it is: text embeddings [B, L, C] in the base model.
        """
        return self.with_inner(x, t, context, added)[0]

    def with_inner(
        self,
        x: Latents,
        t: Float[Array, " B"],
        context: Any,
        added: AddedConditions | None = None,
        inner: FeatureMap | None = None,
    ) -> tuple[Latents, FeatureMap]:
        """The prediction, and what the inner levels hand to the outermost one.

        With `inner` of an earlier step only the outermost level runs (Ma et al. 2023, DeepCache, its first branch).
        """
        dtype = self.conv_in.kernel[...].dtype
        embedding = self._time_embedding(t, added, dtype)
        x = self.conv_in(x.astype(dtype))
        skips = [x]
        for block in self.down_blocks if inner is None else self.down_blocks[:1]:
            x, block_skips = block(x, embedding, context)
            skips += block_skips
        if inner is None:
            x = self.mid_block(x, embedding, context)
            for block in self.up_blocks[:-1]:
                x = block(x, skips, embedding, context)
            inner = x
        outermost = self.up_blocks[-1]
        x = outermost(inner, skips[: len(outermost.resnets)], embedding, context)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x))), inner

    def _time_embedding(self, t: Array, added: AddedConditions | None, dtype: Any) -> Array:
        c = self.config
        sinusoids = {"flip_sin_to_cos": c.flip_sin_to_cos, "freq_shift": c.freq_shift}
        embedding = self.time_embedding(sinusoidal_embedding(t, c.block_out_channels[0], **sinusoids).astype(dtype))
        if c.addition_time_embed_dim is not None and added is not None:
            rows = added.time_ids.shape[0]
            ids = sinusoidal_embedding(added.time_ids.reshape(-1), c.addition_time_embed_dim, **sinusoids)
            condition = jnp.concatenate([added.pooled.astype(dtype), ids.reshape(rows, -1).astype(dtype)], axis=-1)
            embedding = embedding + self.add_embedding(condition)
        return embedding


def _levels(config: UNetConfig, block_types: tuple[str, ...], time_dim: int) -> list[_Level]:
    """One per resolution, finest first."""
    levels = []
    for i, block_type in enumerate(block_types):
        layers = config.transformer_layers[i] if block_type.startswith("CrossAttn") else 0
        levels.append(_Level(config, config.block_out_channels[i], config.heads[i], layers, time_dim))
    return levels


def _mid_level(config: UNetConfig, time_dim: int) -> _Level:
    return _Level(config, config.block_out_channels[-1], config.heads[-1], config.transformer_layers[-1], time_dim)
