"""The adapter, and how it is put into a frozen U-Net and taken out again."""

from typing import Any

from flax import nnx

from infinite_id_jax.errors import InputError
from infinite_id_jax.identity.config import AdapterConfig, EncoderConfig, Switches
from infinite_id_jax.identity.cross_attention import IdentityCrossAttention, IdentityProjection
from infinite_id_jax.identity.encoder import InfiniteIDEncoder
from infinite_id_jax.identity.face_id import FaceIDConfig, FaceIDEncoder
from infinite_id_jax.identity.face_id_plus import FaceIDPlusConfig, FaceIDPlusEncoder
from infinite_id_jax.identity.features import FaceFeatures
from infinite_id_jax.identity.ip_adapter import IPAdapterConfig, IPAdapterEncoder
from infinite_id_jax.identity.ip_adapter_full import IPAdapterFullConfig, IPAdapterFullEncoder
from infinite_id_jax.identity.ip_adapter_plus import IPAdapterPlusConfig, IPAdapterPlusEncoder
from infinite_id_jax.identity.low_rank import LowRankAttention, add_low_rank, remove_low_rank, set_rows
from infinite_id_jax.identity.mixed_attention import bind
from infinite_id_jax.identity.published import PublishedConfig
from infinite_id_jax.identity.streams import Layout
from infinite_id_jax.stable_diffusion.attention import Attention, BasicTransformerBlock
from infinite_id_jax.stable_diffusion.unet import UNet2DConditionModel
from infinite_id_jax.typing import Array, Bool, Float

_ENCODERS: dict[type[EncoderConfig], Any] = {
    AdapterConfig: InfiniteIDEncoder,
    IPAdapterConfig: IPAdapterEncoder,
    IPAdapterPlusConfig: IPAdapterPlusEncoder,
    IPAdapterFullConfig: IPAdapterFullEncoder,
    FaceIDConfig: FaceIDEncoder,
    FaceIDPlusConfig: FaceIDPlusEncoder,
}


def make_encoder(config: EncoderConfig, rngs: nnx.Rngs) -> Any:
    """The module that gives c_id for an adapter of this kind."""
    return _ENCODERS[type(config)](config, rngs=rngs)


class AdapterParam(nnx.Param):
    """An array that training changes and an adapter file holds: `nnx.split(model, AdapterParam, ...)` finds them."""


class IdentityAdapter(nnx.Module):
    """An encoder of identities and one projection for each cross-attention of `unet`: what Infinite-ID trains.

    Some published adapters also bring low-rank maps for every attention.
    """

    def __init__(self, config: EncoderConfig, unet: UNet2DConditionModel, *, rngs: nnx.Rngs):
        config.check_fits(unet.config.cross_attention_dim)
        self.config = config
        self.identity_encoder = make_encoder(config, rngs)
        attentions = _attentions(unet)
        self.ip_adapter = nnx.List(
            IdentityProjection(config.cross_attention_dim, cross.to_out.in_features, rngs=rngs)
            for _, cross in attentions
        )
        if isinstance(config, PublishedConfig) and config.lora_rank:
            both = [attention for pair in attentions for attention in pair]
            self.lora = nnx.List(LowRankAttention(attention, config.lora_rank, rngs=rngs) for attention in both)
        _mark_as_adapter(self)

    def __call__(self, features: FaceFeatures) -> Float[Array, "B K D"]:
        """c_id of a batch of faces; the features that `config.needs` names are read (Eq. 4)."""
        return self.identity_encoder(features)


def _attentions(unet: UNet2DConditionModel) -> list[tuple[Attention, Attention]]:
    """(attn1, attn2) of every block in the order of files, whether an adapter is in or not."""
    return [
        (block.attn1, block.attn2.base if isinstance(block.attn2, IdentityCrossAttention) else block.attn2)
        for block in transformer_blocks(unet, "files")
    ]


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


def block_names(unet: UNet2DConditionModel) -> list[str]:
    """Where the blocks lie, in the order of files: "down_blocks.1.attentions.0.transformer_blocks.0", ..."""
    levels = [("down_blocks", unet.down_blocks), ("up_blocks", unet.up_blocks), ("mid_block", [unet.mid_block])]
    return [
        f"{name if name == 'mid_block' else f'{name}.{i}'}.attentions.{j}.transformer_blocks.{k}"
        for name, blocks in levels
        for i, level in enumerate(blocks)
        for j, transformer in enumerate(getattr(level, "attentions", ()))
        for k in range(len(transformer.transformer_blocks))
    ]


def inject(unet: UNet2DConditionModel, adapter: IdentityAdapter) -> None:
    """Wrap every `attn2` of `unet` in place, and what the adapter has low-rank maps for.

    Raises InputError if an adapter is already in.
    """
    blocks = transformer_blocks(unet, "files")
    if any(isinstance(block.attn2, IdentityCrossAttention) for block in blocks):
        raise InputError("This U-Net already holds an adapter: eject it first.")
    if hasattr(adapter, "lora"):
        both = [attention for pair in _attentions(unet) for attention in pair]
        for attention, low_rank in zip(both, adapter.lora, strict=True):
            add_low_rank(attention, low_rank)
    for i, (block, projection) in enumerate(zip(blocks, adapter.ip_adapter, strict=True)):
        block.attn2 = IdentityCrossAttention(block.attn2, projection, i)


def eject(unet: UNet2DConditionModel) -> None:
    """Take the adapter out again, in place: what is left is bit-equal to the model before `inject`."""
    for block in transformer_blocks(unet, "files"):
        if isinstance(block.attn2, IdentityCrossAttention):
            block.attn2 = block.attn2.base
            remove_low_rank(block.attn1)
            remove_low_rank(block.attn2)


def mix_streams(unet: UNet2DConditionModel, layout: Layout, switches: Switches, active: Bool[Array, ""] | None) -> None:
    """Let the text stream reach the identity stream in `unet`'s self-attentions (in place; `active` may be traced).

    Low-rank maps of the adapter keep to the identity rows.
    """
    for pair in _attentions(unet):
        for attention in pair:
            set_rows(attention, layout)
    if switches.attention == "off":
        return
    attend = bind(layout, switches.attention, switches.style_merge, active)
    for i, block in enumerate(transformer_blocks(unet, "execution")):
        if switches.covers(i):
            block.attn1.attend = attend


def initialise_from_base(adapter: IdentityAdapter, unet: UNet2DConditionModel) -> None:
    """Start every identity projection as a copy of the frozen `to_k` and `to_v` (decision 23)."""
    for block, projection in zip(transformer_blocks(unet, "files"), adapter.ip_adapter, strict=True):
        projection.to_k_ip.kernel[...] = block.attn2.to_k.kernel[...]
        projection.to_v_ip.kernel[...] = block.attn2.to_v.kernel[...]
