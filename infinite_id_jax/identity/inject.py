"""The adapter, and how it is put into a frozen U-Net and taken out again."""

from collections.abc import Iterator

import jax.numpy as jnp
from flax import nnx

from infinite_id_jax.errors import InputError
from infinite_id_jax.identity.config import AdapterConfig, Switches
from infinite_id_jax.identity.cross_attention import IdentityCrossAttention, IdentityProjection
from infinite_id_jax.identity.encoder import ClipMapper, FaceMapper
from infinite_id_jax.identity.mixed_attention import bind
from infinite_id_jax.identity.streams import Layout
from infinite_id_jax.stable_diffusion.attention import BasicTransformerBlock
from infinite_id_jax.stable_diffusion.unet import UNet2DConditionModel
from infinite_id_jax.typing import Array, Bool, Float


class AdapterParam(nnx.Param):
    """An array that training changes and an adapter file holds: `nnx.split(model, AdapterParam, ...)` finds them."""


class IdentityAdapter(nnx.Module):
    """Everything Infinite-ID trains: both mappers and one projection for each cross-attention of `unet`."""

    def __init__(self, config: AdapterConfig, unet: UNet2DConditionModel, *, rngs: nnx.Rngs):
        config.check_fits(unet.config.cross_attention_dim)
        self.config = config
        self.clip_mapper = ClipMapper(config, rngs=rngs)
        self.face_mapper = FaceMapper(config, rngs=rngs)
        width = config.cross_attention_dim
        self.ip_adapter = nnx.List(
            IdentityProjection(width, heads * head_dim, rngs=rngs) for heads, head_dim in _head_shapes(unet)
        )
        _mark_as_adapter(self)

    def __call__(
        self, clip_hidden_states: Float[Array, "B L C"], face_embedding: Float[Array, "B E"]
    ) -> Float[Array, "B K D"]:
        """c_id = [M_clip(hidden states), M_face(embedding)] (Eq. 4). Zeros give the unconditional identity."""
        tokens = [self.clip_mapper(clip_hidden_states), self.face_mapper(face_embedding)]
        return jnp.concatenate(tokens, axis=1)


def _head_shapes(unet: UNet2DConditionModel) -> Iterator[tuple[int, int]]:
    for block in transformer_blocks(unet, "files"):
        attention = block.attn2.base if isinstance(block.attn2, IdentityCrossAttention) else block.attn2
        yield attention.heads, attention.to_k.out_features // attention.heads


def _mark_as_adapter(module: nnx.Module) -> None:
    for _, node in nnx.iter_modules(module):
        for name, value in list(vars(node).items()):
            if isinstance(value, nnx.Param):
                setattr(node, name, AdapterParam(value[...]))


def transformer_blocks(unet: UNet2DConditionModel, order: str) -> list[BasicTransformerBlock]:
    """All transformer blocks in the order of `files` (down, up, mid: diffusers' processors) or of `execution`."""
    down, mid, up = list(unet.down_blocks), [unet.mid_block], list(unet.up_blocks)
    levels = [*down, *up, *mid] if order == "files" else [*down, *mid, *up]
    return [
        block
        for level in levels
        for transformer in getattr(level, "attentions", ())
        for block in transformer.transformer_blocks
    ]


def inject(unet: UNet2DConditionModel, adapter: IdentityAdapter) -> None:
    """Wrap every `attn2` of `unet` in place. Raises InputError if an adapter is already in."""
    blocks = transformer_blocks(unet, "files")
    if any(isinstance(block.attn2, IdentityCrossAttention) for block in blocks):
        raise InputError("This U-Net already holds an adapter: eject it first.")
    for block, projection in zip(blocks, adapter.ip_adapter, strict=True):
        block.attn2 = IdentityCrossAttention(block.attn2, projection)


def eject(unet: UNet2DConditionModel) -> None:
    """Take the adapter out again, in place: what is left is bit-equal to the model before `inject`."""
    for block in transformer_blocks(unet, "files"):
        if isinstance(block.attn2, IdentityCrossAttention):
            block.attn2 = block.attn2.base


def mix_streams(unet: UNet2DConditionModel, layout: Layout, switches: Switches, active: Bool[Array, ""] | None) -> None:
    """Let the text stream reach the identity stream in `unet`'s self-attentions (in place; `active` may be traced)."""
    if switches.attention == "off":
        return
    attend = bind(layout, switches.attention, switches.style_merge, active)
    for i, block in enumerate(transformer_blocks(unet, "execution")):
        if switches.covers(i):
            block.attn1.attend = attend


def initialise_from_base(adapter: IdentityAdapter, unet: UNet2DConditionModel) -> None:
    """Start every identity projection as a copy of the frozen `to_k` and `to_v` (METHOD row 23)."""
    for block, projection in zip(transformer_blocks(unet, "files"), adapter.ip_adapter, strict=True):
        projection.to_k_ip.kernel[...] = block.attn2.to_k.kernel[...]
        projection.to_v_ip.kernel[...] = block.attn2.to_v.kernel[...]
