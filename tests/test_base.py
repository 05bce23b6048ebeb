"""The frozen base: parity with diffusers on tiny random models, and full-size keys and shapes without any memory."""

import json
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKL as TorchVAE
from diffusers import UNet2DConditionModel as TorchUNet
from flax import nnx

from infinite_id_jax.errors import InputError
from infinite_id_jax.stable_diffusion.clip_text import CLIPTextModel
from infinite_id_jax.stable_diffusion.clip_vision import CLIPVisionModel
from infinite_id_jax.stable_diffusion.config import CLIPTextConfig, CLIPVisionConfig, UNetConfig, VAEConfig
from infinite_id_jax.stable_diffusion.unet import AddedConditions, UNet2DConditionModel
from infinite_id_jax.stable_diffusion.vae import AutoencoderKL
from infinite_id_jax.weights.keys import current_key, key_map
from infinite_id_jax.weights.load import abstract, load_module
from tests import reference_torch

# Tiny U-Nets of the two older families; SDXL's is reference_torch.tiny_sdxl_unet.

SMALL: dict[str, Any] = {
    "sample_size": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (16, 32, 48),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}


def tiny_sd15() -> TorchUNet:
    """1x1 convolutions as projections, and one number of heads (under the name attention_head_dim)."""
    return reference_torch.randomise(TorchUNet(**SMALL, attention_head_dim=4), 20)


def tiny_sd21() -> TorchUNet:
    """Linear projections and heads per level, queries times keys in fp32."""
    special = {"use_linear_projection": True, "attention_head_dim": (1, 2, 6), "upcast_attention": True}
    return reference_torch.randomise(TorchUNet(**SMALL, **special), 21)


FAMILIES = {"sdxl": reference_torch.tiny_sdxl_unet, "sd15": tiny_sd15, "sd21": tiny_sd21}


def forget(path: Path, *keys: str) -> None:
    """Take settings out of a JSON file, as a file has it that is older than they are."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in keys}))


def jitted(module: nnx.Module, method: str = "__call__") -> Any:
    """A method as a compiled function, with little optimisation: compiling is what takes a test's time."""
    graph, state = nnx.split(module)
    quick = {"xla_backend_optimization_level": 0}
    run = jax.jit(lambda state, *args: getattr(nnx.merge(graph, state), method)(*args), compiler_options=quick)
    return partial(run, state)


@pytest.fixture(scope="module")
def unets(tmp_path_factory) -> Callable[[str], tuple[TorchUNet, Any]]:
    """A family's U-Net in PyTorch, and ours as a compiled function, loaded from the folder diffusers wrote."""

    @cache
    def load(family: str) -> tuple[TorchUNet, Any]:
        theirs, folder = FAMILIES[family](), tmp_path_factory.mktemp(family)
        theirs.save_pretrained(folder)
        if family == "sd15":  # its published config.json has neither
            forget(folder / "config.json", "use_linear_projection", "transformer_layers_per_block")
        config = UNetConfig.from_json(folder / "config.json")
        return theirs, jitted(load_module(lambda rngs: UNet2DConditionModel(config, rngs=rngs), folder))

    return load


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.numpy().transpose(0, 2, 3, 1)


def error(ours: Any, theirs: np.ndarray) -> float:
    """Largest absolute error relative to the scale of the output."""
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize(("family", "height", "width"), [("sdxl", 9, 11), ("sd15", 18, 10), ("sd21", 16, 8)])
def test_unet_matches_diffusers(unets, family, height, width):
    """Rows of one batch differ in everything; odd sizes are halved upwards and cropped on the way up."""
    theirs, ours = unets(family)
    rng = np.random.default_rng(height)
    x = rng.normal(size=(3, height, width, 4)).astype(np.float32)
    t = np.array([981.0, 500.5, 1.0], np.float32)
    context = rng.normal(size=(3, 7, theirs.config.cross_attention_dim)).astype(np.float32)
    added, kwargs = None, None
    if theirs.config.addition_embed_type:
        pooled = rng.normal(size=(3, reference_torch.POOLED_DIM)).astype(np.float32)
        time_ids = np.array([[1024, 1024, 0, 0, 1024, 1024], [512, 768, 8, 64, 640, 640], [0] * 6], np.float32)
        added = AddedConditions(jnp.asarray(pooled), jnp.asarray(time_ids))
        kwargs = {"text_embeds": torch.from_numpy(pooled), "time_ids": torch.from_numpy(time_ids)}
    with torch.no_grad():
        expected = theirs(nchw(x), torch.from_numpy(t), torch.from_numpy(context), added_cond_kwargs=kwargs).sample
    # Measured: SDXL 1.3e-6, SD 1.5 1.4e-6, SD 2.1 0.9e-6.
    assert error(ours(x, t, context, added), nhwc(expected)) <= 2e-5


@pytest.fixture(scope="module")
def vaes(tmp_path_factory) -> tuple[TorchVAE, AutoencoderKL]:
    theirs, folder = reference_torch.tiny_vae(), tmp_path_factory.mktemp("vae")
    theirs.save_pretrained(folder)
    config = VAEConfig.from_json(folder / "config.json")
    return theirs, load_module(lambda rngs: AutoencoderKL(config, rngs=rngs), folder)


def test_vae_encodes_as_diffusers(vaes):
    theirs, ours = vaes
    image = np.random.default_rng(0).uniform(-1, 1, size=(2, 40, 24, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.encode(nchw(image)).latent_dist
    posterior = jitted(ours, "encode")(image)
    # Measured: mean 1.5e-6, std 0.4e-6.
    assert error(posterior.mean, nhwc(expected.mean)) <= 2e-5
    assert error(posterior.std, nhwc(expected.std)) <= 8e-6


def test_vae_decodes_as_diffusers(vaes):
    theirs, ours = vaes
    z = np.random.default_rng(1).normal(size=(2, 5, 3, 4)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.decode(nchw(z)).sample
    # Measured: 1.1e-6.
    assert error(jitted(ours, "decode")(z), nhwc(expected)) <= 2e-5


# The published configurations: what makes each architecture, as its config.json has it.

SDXL_UNET: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "class_embed_type": None,
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
    "use_linear_projection": True,
}
SD15_UNET: dict[str, Any] = {  # written by diffusers 0.6, which knew fewer settings
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
SD21_UNET: dict[str, Any] = SD15_UNET | {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": True,
}
SDXL_VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "layers_per_block": 2,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
CLIP_L_TEXT: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
BIG_G_TEXT: dict[str, Any] = {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
BIG_G_VISION: dict[str, Any] = {
    "hidden_act": "gelu",
    "hidden_size": 1664,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_hidden_layers": 48,
    "patch_size": 14,
    "projection_dim": 1280,
}
H_VISION = BIG_G_VISION | {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "projection_dim": 1024
}  # fmt: skip

# Name: (our module, our configuration, PyTorch's module, config.json, parameters, tensors). The first five are SDXL's.
FULL_SIZE = {
    "sdxl": (UNet2DConditionModel, UNetConfig, TorchUNet, SDXL_UNET, 2_567_463_684, 1680),
    "sdxl-vae": (AutoencoderKL, VAEConfig, TorchVAE, SDXL_VAE, 83_653_863, 248),
    "clip-l-text": (CLIPTextModel, CLIPTextConfig, transformers.CLIPTextModel, CLIP_L_TEXT, 123_060_480, 196),
    "bigg-text": (
        CLIPTextModel, CLIPTextConfig, transformers.CLIPTextModelWithProjection, BIG_G_TEXT, 694_659_840, 517
    ),
    "bigg-vision": (
        CLIPVisionModel, CLIPVisionConfig, transformers.CLIPVisionModelWithProjection, BIG_G_VISION, 1_844_907_264, 776
    ),
    "h-vision": (
        CLIPVisionModel, CLIPVisionConfig, transformers.CLIPVisionModelWithProjection, H_VISION, 632_076_800, 520
    ),
    "sd15": (UNet2DConditionModel, UNetConfig, TorchUNet, SD15_UNET, 859_520_964, 686),
    "sd21": (UNet2DConditionModel, UNetConfig, TorchUNet, SD21_UNET, 865_910_724, 686),
}  # fmt: skip


def on_meta(kind: type[torch.nn.Module], content: dict[str, Any]) -> torch.nn.Module:
    """PyTorch's module with shapes alone."""
    with torch.device("meta"):
        if issubclass(kind, transformers.PreTrainedModel):
            return kind(kind.config_class(**content))
        return kind(**content)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_keys_and_shapes_are_pytorchs(name):
    ours, config_class, theirs, content, parameters, tensors = FULL_SIZE[name]
    state = on_meta(theirs, content).state_dict()
    expected = {current_key(key): tuple(value.shape) for key, value in state.items()}
    config = config_class.from_dict(content)
    entries = key_map(abstract(lambda rngs: ours(config, rngs=rngs))).values()
    assert {entry.key: entry.shape for entry in entries} == expected
    assert len(entries) == tensors
    assert sum(math.prod(entry.shape) for entry in entries) == parameters


# Refusals


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class_embed_type", "timestep"),
        ("num_class_embeds", 1000),
        ("act_fn", "gelu"),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("addition_embed_type", "image"),
        ("encoder_hid_dim_type", "text_proj"),
        ("time_cond_proj_dim", 256),
        ("resnet_time_scale_shift", "scale_shift"),
        ("attention_type", "gated"),
        ("down_block_types", ["DownBlock2D", "CrossAttnDownBlock2D", "KDownBlock2D"]),
        ("up_block_types", ["CrossAttnUpBlock2D", "CrossAttnDownBlock2D", "UpBlock2D"]),
        ("block_out_channels", [320, 640]),
        ("norm_num_groups", 48),
        ("norm_num_groups", 0),
        ("attention_head_dim", [5, 10]),
        ("transformer_layers_per_block", [1, 2, 10, 10]),
        ("layers_per_block", [2, 2, 2]),
        ("cross_attention_dim", [768, 768, 768]),
    ],
)
def test_unet_of_another_architecture_is_refused_by_name(tmp_path, key, value):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SDXL_UNET))
    UNetConfig.from_json(path)
    path.write_text(json.dumps(SDXL_UNET | {key: value}))
    with pytest.raises(InputError, match=key) as refusal:
        UNetConfig.from_json(path)
    assert str(path) in str(refusal.value)


def test_sdxl_without_the_width_of_its_added_conditions_is_refused():
    config = UNetConfig.from_dict(SDXL_UNET | {"projection_class_embeddings_input_dim": None})
    with pytest.raises(InputError, match="projection_class_embeddings_input_dim"):
        abstract(lambda rngs: UNet2DConditionModel(config, rngs=rngs))


@pytest.mark.parametrize(
    ("key", "value"), [("act_fn", "gelu"), ("mid_block_add_attention", False), ("use_quant_conv", False)]
)
def test_vae_of_another_architecture_is_refused_by_name(key, value):
    with pytest.raises(InputError, match=key):
        VAEConfig.from_dict(SDXL_VAE | {key: value})


def test_an_old_vae_scales_as_diffusers_does():
    """SD 1.5's config.json is older than scaling_factor."""
    old = {key: value for key, value in SDXL_VAE.items() if key != "scaling_factor"}
    assert VAEConfig.from_dict(old).scaling_factor == on_meta(TorchVAE, old).config.scaling_factor
