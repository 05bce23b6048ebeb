"""CLIP's vision encoder (OpenCLIP ViT-bigG/14 or ViT-H/14) and the preparation of its images."""

from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from infinite_id_jax.errors import InputError
from infinite_id_jax.stable_diffusion.clip import Encoder
from infinite_id_jax.stable_diffusion.config import CLIPVisionConfig
from infinite_id_jax.stable_diffusion.kernels import Linear, layer_norm
from infinite_id_jax.typing import Array, Float, Tokens, UInt8

# Per-channel RGB statistics of CLIP's training images (openai/CLIP, clip.py).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class VisionOutput(NamedTuple):
    """What identity encoders take from an image; token 0 is the class token."""

    last_hidden_state: Tokens  # the last layer's output, without the post norm
    penultimate: Tokens  # before the last layer
    pooled: Float[Array, "B C"]  # the class token after the post norm
    image_embeds: Float[Array, "B E"]  # `pooled` in the space shared with the text

    def hidden_states(self, layer: str) -> Tokens:
        """Of the "penultimate" layer, or else of the last."""
        return self.penultimate if layer == "penultimate" else self.last_hidden_state


class VisionEmbeddings(nnx.Module):
    """Patches, the class token before them, and learned positions."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        self.image_size = config.image_size
        patch = (config.patch_size, config.patch_size)
        self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (config.hidden_size,)))
        self.patch_embedding = nnx.Conv(
            config.num_channels, config.hidden_size, patch, strides=patch, padding="VALID", use_bias=False, rngs=rngs
        )
        self.position_embedding = nnx.Embed(config.tokens, config.hidden_size, rngs=rngs)

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Tokens:
        if pixels.shape[1:3] != (self.image_size, self.image_size):
            raise InputError(
                f"The image encoder takes {self.image_size} x {self.image_size} pixels, "
                f"not {pixels.shape[1]} x {pixels.shape[2]}: use `resize_and_crop` first."
            )
        # Pixels arrive in fp32; the parameters decide the dtype of everything after.
        patches = self.patch_embedding(pixels.astype(self.patch_embedding.kernel[...].dtype))
        patches = einops.rearrange(patches, "B h w C -> B (h w) C")
        class_token = einops.repeat(self.class_embedding[...], "C -> B 1 C", B=patches.shape[0])
        tokens = jnp.concatenate([class_token, patches], axis=1)  # [B, 1 + h w, C]
        return tokens + self.position_embedding.embedding[...][None]


class CLIPVisionModel(nnx.Module):
    """transformers' CLIPVisionModelWithProjection; raises InputError for an unknown `hidden_act`."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = VisionEmbeddings(config, rngs=rngs)
        self.pre_layrnorm = layer_norm(config.hidden_size, rngs, config.layer_norm_eps)  # the checkpoints' spelling
        self.encoder = Encoder(config, rngs=rngs)
        self.post_layernorm = layer_norm(config.hidden_size, rngs, config.layer_norm_eps)
        self.visual_projection = Linear(config.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> VisionOutput:
        """Encode images normalised by `preprocess`, H = W = `config.image_size`; InputError for another size."""
        states = self.encoder(self.pre_layrnorm(self.embeddings(pixels)), causal=False)
        pooled = self.post_layernorm(states.last[:, 0])
        return VisionOutput(states.last, states.penultimate, pooled, self.visual_projection(pooled))


def preprocess(crops: UInt8[Array | np.ndarray, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Normalise RGB crops of the model's size by CLIP's channel statistics, in fp32."""
    mean, std = (jnp.array(statistic).reshape(1, 1, 1, 3) for statistic in (MEAN, STD))
    return (jnp.asarray(crops, jnp.float32) / 255 - mean) / std


def resize_and_crop(image: Image.Image, size: int = 224) -> UInt8[np.ndarray, "size size 3"]:
    """Bicubic resize of the shortest side to `size`, then the central square, as transformers' CLIPImageProcessor."""
    width, height = image.size
    shortest = min(width, height)
    # The long side is floored and the crop's corner too: one pixel of difference moves every patch.
    width, height = size * width // shortest, size * height // shortest
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))
