"""Infinite-ID's two-stream sampling in PyTorch, the oracle of the parity tests.

Written from the paper (arXiv 2403.11781) alone, with attention processors over diffusers' U-Net, and with
another structure than the package: each guidance half and each stream is a U-Net call of its own. The text
stream records the keys and values of its self-attention layers; the identity stream looks them up.
"""

import contextlib
import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from examples.tiny_vocabulary import EOS, write_tokenizer

TEXT_WIDTHS = (24, 40)  # unequal, so that a swap of the two text encoders shows
CROSS_ATTENTION_DIM = sum(TEXT_WIDTHS)
POOLED_DIM = 32

SDXL_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


# Tiny random models in the shape of SDXL


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter anew, so that no bias is 0, no norm is the identity, and activations stay O(1)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.1 * noise + float(name.endswith("weight")))
    return model.eval().requires_grad_(False)


THREE_LEVELS: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64, 64),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (2, 4, 4),
}
TWO_LEVELS: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (2, 4),
}


def tiny_sdxl_unet(seed: int = 0, levels: dict[str, Any] = THREE_LEVELS) -> UNet2DConditionModel:
    """SDXL's U-Net in small: the same three levels, 17 transformer blocks of depths 1 and 2 instead of 70.

    TWO_LEVELS has 4 blocks, which compile sooner, for what does not depend on the levels.
    """
    unet = UNet2DConditionModel(
        **levels,
        sample_size=16,
        cross_attention_dim=CROSS_ATTENTION_DIM,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + POOLED_DIM,
    )
    return randomise(unet, seed)


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """SDXL's VAE in small, with the same factor 8 between pixels and latents."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        sample_size=128,
        scaling_factor=0.13025,
    )
    return randomise(vae, seed)


def tiny_text_encoders(
    seed: int = 0, vocab_size: int = 1000, eos_token_id: int | None = None
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """SDXL's two text encoders in small; `eos_token_id` (default: the last id) marks the pooled position."""
    eos = vocab_size - 1 if eos_token_id is None else eos_token_id
    first, second = (
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=4,
            hidden_act=activation,
            projection_dim=POOLED_DIM,
            bos_token_id=eos - 1,
            eos_token_id=eos,
            pad_token_id=pad,
        )
        for width, activation, pad in zip(TEXT_WIDTHS, ("quick_gelu", "gelu"), (eos, 0), strict=True)
    )
    return randomise(CLIPTextModel(first), seed), randomise(CLIPTextModelWithProjection(second), seed + 1)


def tiny_vision(seed: int = 0) -> CLIPVisionModelWithProjection:
    """OpenCLIP's vision encoder in small: 224 px in patches of 14, so 257 tokens, here of width 32."""
    config = CLIPVisionConfig(
        image_size=224,
        patch_size=14,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="gelu",
        projection_dim=POOLED_DIM,
    )
    return randomise(CLIPVisionModelWithProjection(config), seed)


def save_tiny_sdxl(folder: Path | str, seed: int = 0, levels: dict[str, Any] = THREE_LEVELS) -> Path:
    """Write a whole model folder in diffusers' layout, readable by StableDiffusionXLPipeline."""
    folder = Path(folder)
    write_tokenizer(folder / "tokenizer", pad_token=EOS)
    write_tokenizer(folder / "tokenizer_2", pad_token="!")
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    first, second = tiny_text_encoders(seed + 2, len(vocabulary), vocabulary[EOS])
    models = {
        "unet": tiny_sdxl_unet(seed, levels),
        "vae": tiny_vae(seed + 1),
        "text_encoder": first,
        "text_encoder_2": second,
        "image_encoder": tiny_vision(seed + 4),
    }
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        index[name] = [type(model).__module__.split(".")[0], type(model).__name__]
    scheduler = SDXL_SCHEDULER | {"set_alpha_to_one": False, "clip_sample": False}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": "EulerDiscreteScheduler"} | scheduler, indent=2), encoding="utf-8"
    )
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return folder


def sdxl_ddim() -> DDIMScheduler:
    """DDIM as SDXL's configuration has it."""
    return DDIMScheduler(**SDXL_SCHEDULER, set_alpha_to_one=False, clip_sample=False)


# The adapter: two mappers (Eq. 4) and two linear maps per cross-attention layer (Eq. 6)


def cross_attention_indices(unet: UNet2DConditionModel) -> dict[str, int]:
    """`attn2` processor name -> its index n among all the U-Net's processors (order down, up, mid)."""
    return {name: n for n, name in enumerate(unet.attn_processors) if ".attn2." in name}


def adapter_state_dict(
    unet: UNet2DConditionModel, clip_dim: int = 32, face_dim: int = 16, face_tokens: int = 1, seed: int = 0
) -> dict[str, Tensor]:
    """A random adapter for `unet` in the published key format; face_mapper's hidden width is 2 * face_dim."""
    width = unet.config.cross_attention_dim
    shapes: dict[str, tuple[int, ...]] = {}
    for mapper, dim, hidden, out in (
        ("clip_mapper", clip_dim, clip_dim, width),
        ("face_mapper", face_dim, 2 * face_dim, width * face_tokens),
    ):
        shapes |= {f"{mapper}.proj.0.weight": (hidden, dim), f"{mapper}.proj.0.bias": (hidden,)}
        shapes |= {f"{mapper}.proj.2.weight": (out, hidden), f"{mapper}.proj.2.bias": (out,)}
        shapes |= {f"{mapper}.norm.weight": (width,), f"{mapper}.norm.bias": (width,)}
    for name, n in cross_attention_indices(unet).items():
        shape = tuple(unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape)
        shapes |= {f"ip_adapter.{n}.to_k_ip.weight": shape, f"ip_adapter.{n}.to_v_ip.weight": shape}
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for key, shape in shapes.items():
        scale = 0.1 if len(shape) == 1 else 1 / math.sqrt(shape[1])
        adapter[key] = scale * torch.randn(shape, generator=generator) + float(key.endswith("norm.weight"))
    return adapter


class Identity(NamedTuple):
    """One person: CLIP's hidden states [257, clip_dim] and the raw face embedding [face_dim]."""

    clip_hidden_states: Tensor
    face_embedding: Tensor


class IdentityTokens(NamedTuple):
    """One person as an adapter of any family maps it: c_id [K, C], and nobody's tokens for guidance."""

    c_id: Tensor
    c_null: Tensor


def map_tokens(adapter: dict[str, Tensor], mapper: str, x: Tensor) -> Tensor:
    """Linear, exact GELU, Linear, LayerNorm per token: [n, dim] -> [n * tokens, C], C the norm's width."""
    w = {key.removeprefix(mapper + "."): value for key, value in adapter.items() if key.startswith(mapper)}
    x = F.gelu(F.linear(x, w["proj.0.weight"], w["proj.0.bias"]))
    x = F.linear(x, w["proj.2.weight"], w["proj.2.bias"])
    x = x.reshape(-1, len(w["norm.weight"]))
    return F.layer_norm(x, x.shape[-1:], w["norm.weight"], w["norm.bias"])


def identity_tokens(adapter: dict[str, Tensor], identity: Identity) -> Tensor:
    """c_id = [M_clip(E_clip), M_face(E_face / |E_face|)], [257 + face tokens, C] (Eq. 4)."""
    clip_hidden_states, face_embedding = identity
    face = face_embedding / torch.linalg.vector_norm(face_embedding)
    return _concatenate_mapped(adapter, clip_hidden_states, face)


def unconditional_tokens(adapter: dict[str, Tensor], identity: Identity) -> Tensor:
    """The mappers applied to zeros of `identity`'s shapes: the identity of guidance's unconditional half."""
    return _concatenate_mapped(adapter, *(torch.zeros_like(x) for x in identity))


def _concatenate_mapped(adapter: dict[str, Tensor], clip: Tensor, face: Tensor) -> Tensor:
    clip_tokens = map_tokens(adapter, "clip_mapper", clip)
    return torch.cat([clip_tokens, map_tokens(adapter, "face_mapper", face[None])])


# Attention (Eq. 5 to 8)

Restyle = Callable[[Tensor, Tensor], Tensor]
KeyValues = dict[str, tuple[Tensor, Tensor]]  # by the name of the attention processor


def adain_mean(x: Tensor, y: Tensor) -> Tensor:
    """Move the token mean of x [B, L, C] to that of y [B, L', C], per sample and channel (Eq. 8)."""
    return x - x.mean(1, keepdim=True) + y.mean(1, keepdim=True)


def adain(x: Tensor, y: Tensor) -> Tensor:
    """Move mean and standard deviation of x over its tokens to those of y (StyleAligned, Eq. 6)."""

    def std(z: Tensor) -> Tensor:
        return (z.var(1, unbiased=True, keepdim=True) + 1e-5).sqrt()

    return (x - x.mean(1, keepdim=True)) / std(x) * std(y) + y.mean(1, keepdim=True)


STYLE_MERGES: dict[str, Restyle] = {"none": lambda x, _: x, "adain_mean": adain_mean, "adain": adain}


def attend(heads: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax(Q K^T / sqrt(d)) V per head, over [B, L, heads * d] (Eq. 2)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


@dataclass
class RecordingSelfAttention:
    """Plain self-attention that leaves its keys and values in `memory[name]`."""

    name: str
    memory: KeyValues

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        key, value = attn.to_k(hidden_states), attn.to_v(hidden_states)
        self.memory[self.name] = key, value
        return attn.to_out[0](attend(attn.heads, attn.to_q(hidden_states), key, value))


@dataclass
class MixedSelfAttention:
    """Eq. 5: Q_id attends to [K_id, K_t] and [V_id, V_t], K_id and V_id restyled after the text stream's."""

    text_key: Tensor
    text_value: Tensor
    restyle: Restyle

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        key = self.restyle(attn.to_k(hidden_states), self.text_key)
        value = self.restyle(attn.to_v(hidden_states), self.text_value)
        key, value = torch.cat([key, self.text_key], 1), torch.cat([value, self.text_value], 1)
        return attn.to_out[0](attend(attn.heads, attn.to_q(hidden_states), key, value))


@dataclass
class MutualSelfAttention:
    """MasaCtrl's attention: Q_id attends to the text stream's keys and values alone."""

    text_key: Tensor
    text_value: Tensor

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        out = attend(attn.heads, attn.to_q(hidden_states), self.text_key, self.text_value)
        return attn.to_out[0](out)


@dataclass
class IdentityCrossAttention:
    """Eq. 6 for rows with identity tokens c_id [B, L, C]; without `merge` the text stays out altogether."""

    to_k_ip: Tensor
    to_v_ip: Tensor
    c_id: Tensor
    restyle: Restyle
    merge: bool
    id_scale: float
    text_scale: float

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        query = attn.to_q(hidden_states)
        key, value = F.linear(self.c_id, self.to_k_ip), F.linear(self.c_id, self.to_v_ip)
        if not self.merge:
            return attn.to_out[0](self.id_scale * attend(attn.heads, query, key, value))
        text_key, text_value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        key, value = self.restyle(key, text_key), self.restyle(value, text_value)
        out = self.id_scale * attend(attn.heads, query, key, value)
        out = out + self.text_scale * attend(attn.heads, query, text_key, text_value)
        return attn.to_out[0](out)


# The two streams


class Text(NamedTuple):
    """A prompt batch: token embeddings [P, 77, C] and pooled vectors [P, D]."""

    embeds: Tensor
    pooled: Tensor

    def repeat(self, times: int) -> "Text":
        """Each prompt `times` times in a row: prompt-major."""
        return Text(*(x.repeat_interleave(times, 0) for x in self))


@dataclass(frozen=True)
class Switches:
    """The method's switches; self-attention stays plain at steps and layers outside [first, last)."""

    attention: str = "mixed"  # mixed, mutual, off
    style_merge: str = "none"  # none, adain_mean, adain
    cross_merge: bool = True
    id_scale: float = 1.0
    text_scale: float = 1.0
    text_stream: str = "own"  # own, shared
    pooled_text: str = "prompt"  # prompt, zeros: what the identity stream gets
    first_step: int = 0
    last_step: int | None = None
    first_layer: int = 0
    last_layer: int | None = None

    def __post_init__(self):
        assert self.attention in ("mixed", "mutual", "off")
        assert self.style_merge in STYLE_MERGES
        assert self.text_stream in ("own", "shared")
        assert self.pooled_text in ("prompt", "zeros")


def self_attention_layers(unet: UNet2DConditionModel) -> list[str]:
    """The `attn1` processor names in the order in which they run: down, mid, up."""
    stages = ["down_blocks", "mid_block", "up_blocks"]
    names = [name for name in unet.attn_processors if ".attn1." in name]
    return sorted(names, key=lambda name: stages.index(name.split(".")[0]))


def call_unet(unet: UNet2DConditionModel, processors: dict[str, Any], x: Tensor, t: Tensor, text: Text) -> Tensor:
    """One U-Net call with some processors replaced for its duration; SDXL's sizes are x's own, uncropped."""
    height, width = 8 * x.shape[-2], 8 * x.shape[-1]
    time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=x.dtype).expand(len(x), -1)
    before = unet.attn_processors
    unet.set_attn_processor(before | processors)
    try:
        added = {"text_embeds": text.pooled, "time_ids": time_ids}
        return unet(x, t, encoder_hidden_states=text.embeds, added_cond_kwargs=added).sample
    finally:
        unet.set_attn_processor(before)


def run_text_stream(unet: UNet2DConditionModel, x: Tensor, t: Tensor, text: Text) -> tuple[Tensor, KeyValues]:
    """Plain SDXL: the prediction, and the keys and values of every self-attention layer."""
    memory: KeyValues = {}
    recorders = {name: RecordingSelfAttention(name, memory) for name in self_attention_layers(unet)}
    return call_unet(unet, recorders, x, t, text), memory


def run_identity_stream(
    unet: UNet2DConditionModel,
    adapter: dict[str, Tensor],
    x: Tensor,
    t: Tensor,
    text: Text,
    c_id: Tensor,
    memory: KeyValues,
    step: int,
    switches: Switches,
) -> Tensor:
    """The prediction for identity rows x [R, 4, h, w]; `text`, `c_id` and `memory` have a row for each."""
    s, restyle = switches, STYLE_MERGES[switches.style_merge]
    processors: dict[str, Any] = {
        name: IdentityCrossAttention(
            adapter[f"ip_adapter.{n}.to_k_ip.weight"],
            adapter[f"ip_adapter.{n}.to_v_ip.weight"],
            c_id, restyle, s.cross_merge, s.id_scale, s.text_scale,
        )
        for name, n in cross_attention_indices(unet).items()
    }  # fmt: skip
    if s.attention != "off" and s.first_step <= step and (s.last_step is None or step < s.last_step):
        for name in self_attention_layers(unet)[s.first_layer : s.last_layer]:
            mixed = s.attention == "mixed"
            processors[name] = (
                MixedSelfAttention(*memory[name], restyle) if mixed else MutualSelfAttention(*memory[name])
            )
    if s.pooled_text == "zeros":
        text = text._replace(pooled=torch.zeros_like(text.pooled))
    return call_unet(unet, processors, x, t, text)


def guide(uncond: Tensor, cond: Tensor, scale: float, rescale: float) -> Tensor:
    """Classifier-free guidance, then rescaled towards cond's standard deviation (arXiv 2305.08891)."""
    eps = uncond + scale * (cond - uncond)
    std_ratio = cond.std((1, 2, 3), keepdim=True) / eps.std((1, 2, 3), keepdim=True)
    return rescale * (eps * std_ratio) + (1 - rescale) * eps


@contextlib.contextmanager
def inner_levels_kept(unet: UNet2DConditionModel, fresh: set[int], calls: int = 4) -> Iterator[None]:
    """DeepCache by force: all levels run in every step, but their last inner output is that of the last fresh step.

    A step calls the U-Net `calls` times, always in the same order, each with a memory of its own.
    """
    kept: dict[int, Tensor] = {}
    count = itertools.count()

    def replace(module: Any, inputs: Any, output: Tensor) -> Tensor:
        step, call = divmod(next(count), calls)
        if step in fresh:
            kept[call] = output
        return kept[call]

    hook = unet.up_blocks[-2].register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def two_stream_sample(
    unet: UNet2DConditionModel,
    adapter: dict[str, Tensor],
    latents: Tensor,
    prompt: Text,
    identities: list[Identity] | list[IdentityTokens],
    negative: Text | None = None,
    *,
    identity_unet: UNet2DConditionModel | None = None,
    guidance_scale: float = 5.0,
    guidance_rescale: float = 0.0,
    guided_steps: range | None = None,
    steps: int = 30,
    scheduler: Any = None,
    **switches: Any,
) -> tuple[Tensor, Tensor | None]:
    """Denoise P prompts x M identities from unit noise [P, 4, h, w]; `switches` are the fields of `Switches`.

    `identity_unet`, where given, is the U-Net of the identity stream: with an adapter's LoRA merged into it.
    Returns the identity latents [P * M, 4, h, w], prompt-major, and the text latents [P, 4, h, w] (None if
    the text stream is shared).
    """
    s = Switches(**switches)
    shared, per_prompt = s.text_stream == "shared", len(identities)
    if negative is None:
        negative = Text(*(torch.zeros_like(x) for x in prompt))
    people = [
        IdentityTokens(identity_tokens(adapter, identity), unconditional_tokens(adapter, identity))
        if isinstance(identity, Identity)
        else identity
        for identity in identities
    ]
    c_id, c_null = (torch.stack(tokens) for tokens in zip(*people, strict=True))

    # A scheduler each: multistep solvers remember the predictions of their own trajectory.
    id_scheduler, text_scheduler = (copy.deepcopy(scheduler or sdxl_ddim()) for _ in range(2))
    for each in (id_scheduler, text_scheduler):
        each.set_timesteps(steps)
    x_text = latents * text_scheduler.init_noise_sigma
    x_id = x_text.repeat_interleave(per_prompt, 0)

    for step, t in enumerate(id_scheduler.timesteps):
        input_id = id_scheduler.scale_model_input(x_id, t)
        input_text = input_id if shared else text_scheduler.scale_model_input(x_text, t)
        eps_id, eps_text = [], []
        for text, tokens in ((negative, c_null), (prompt, c_id)):  # nothing passes between guidance's halves
            rows, c_rows = text.repeat(per_prompt), tokens.repeat(len(latents), 1, 1)
            eps, memory = run_text_stream(unet, input_text, t, rows if shared else text)
            if not shared:
                memory = {
                    name: (k.repeat_interleave(per_prompt, 0), v.repeat_interleave(per_prompt, 0))
                    for name, (k, v) in memory.items()
                }
            eps_text.append(eps)
            eps_id.append(
                run_identity_stream(identity_unet or unet, adapter, input_id, t, rows, c_rows, memory, step, s)
            )
        here = guided_steps is None or step in guided_steps
        guided = guide(*eps_id, guidance_scale, guidance_rescale) if here else eps_id[1]
        x_id = id_scheduler.step(guided, t, x_id).prev_sample
        if not shared:
            guided = guide(*eps_text, guidance_scale, guidance_rescale) if here else eps_text[1]
            x_text = text_scheduler.step(guided, t, x_text).prev_sample
    return x_id, None if shared else x_text
