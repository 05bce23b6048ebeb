"""CLIP's encoders: parity with transformers on tiny random models, and the full-size trees."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from PIL import Image

from infinite_id_jax.errors import InputError
from infinite_id_jax.stable_diffusion.clip_text import CLIPTextModel, eos_position
from infinite_id_jax.stable_diffusion.clip_vision import CLIPVisionModel, preprocess, resize_and_crop
from infinite_id_jax.stable_diffusion.config import CLIPTextConfig, CLIPVisionConfig

# Measured over the 20 outputs of the 6 parity cases: at most 6.9e-7.
TOLERANCE = 2e-6

TINY_TEXT = CLIPTextConfig(
    vocab_size=99,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=16,
    projection_dim=20,
    eos_token_id=98,
    layer_norm_eps=1e-3,  # far from every default, so that an ignored setting shows
)
TINY_VISION = CLIPVisionConfig(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=20,
    patch_size=5,
    projection_dim=20,
    layer_norm_eps=1e-3,
)


def reference(config: CLIPTextConfig | CLIPVisionConfig) -> torch.nn.Module:
    """transformers' model of the same configuration."""
    text = isinstance(config, CLIPTextConfig)
    theirs = transformers.CLIPTextConfig if text else transformers.CLIPVisionConfig
    names = {field.name for field in dataclasses.fields(config)} - {"architectures"}
    their_config = theirs(**{name: getattr(config, name) for name in names}, attn_implementation="eager")
    if not text:
        return transformers.CLIPVisionModelWithProjection(their_config).eval()
    if config.with_projection:
        return transformers.CLIPTextModelWithProjection(their_config).eval()
    return transformers.CLIPTextModel(their_config).eval()


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights far from initialisation: no norm is the identity, no bias zero, attention is not uniform."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name or "layrnorm" in name:
            weight.copy_(0.4 * noise + (1.0 if name.endswith("weight") else 0.0))
        elif "embedding" in name and weight.ndim <= 2:
            weight.copy_(noise)
        else:
            weight.copy_(noise * (0.3 if weight.ndim == 1 else 1.5 * weight[0].numel() ** -0.5))


def torch_key(path: tuple[str | int, ...]) -> str:
    names = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    return ".".join(str(part) for part in (*path[:-1], names.get(str(path[-1]), path[-1])))


def torch_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    strip = ("text_model.", "vision_model.")
    return {
        next((key.removeprefix(p) for p in strip if key.startswith(p)), key): weight
        for key, weight in model.state_dict().items()
    }


def to_flax(path: tuple[str | int, ...], weight: torch.Tensor) -> torch.Tensor:
    if path[-1] == "kernel":
        return weight.permute(2, 3, 1, 0) if weight.ndim == 4 else weight.T
    return weight


def copy_weights(model: nnx.Module, theirs: torch.nn.Module) -> None:
    weights = torch_weights(theirs)
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    filled = [
        (path, leaf.replace(jnp.asarray(to_flax(path, weights[torch_key(path)]).numpy()))) for path, leaf in state
    ]
    nnx.update(model, nnx.from_flat_state(filled))


def relative_error(ours: jax.Array, theirs: torch.Tensor) -> float:
    expected = theirs.detach().numpy()
    assert ours.shape == expected.shape
    return float(np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max())


def token_rows(config: CLIPTextConfig) -> np.ndarray:
    """Rows whose EOS stand at different places: one early and padded with EOS, one last, one padded with id 0."""
    rows = np.random.default_rng(0).integers(1, config.vocab_size - 1, (3, config.max_position_embeddings))
    rows[0, 5:] = rows[1, -1] = rows[2, 7] = config.vocab_size - 1
    rows[2, 8:] = 0
    return rows.astype(np.int32)


@pytest.mark.parametrize(
    ("hidden_act", "architecture", "eos_token_id"),
    [
        ("quick_gelu", "CLIPTextModel", 98),
        ("gelu", "CLIPTextModelWithProjection", 98),
        ("quick_gelu", "CLIPTextModelWithProjection", 2),
        ("gelu", "CLIPTextModel", 2),
    ],
)
def test_text_equals_transformers(hidden_act, architecture, eos_token_id):
    config = dataclasses.replace(
        TINY_TEXT, hidden_act=hidden_act, architectures=(architecture,), eos_token_id=eos_token_id
    )
    theirs, ours = reference(config), CLIPTextModel(config, rngs=nnx.Rngs(0))
    randomise(theirs, seed=1)
    copy_weights(ours, theirs)
    rows = token_rows(config)

    expected = theirs(torch.from_numpy(rows).long(), output_hidden_states=True)
    output = nnx.jit(lambda model, ids: model(ids))(ours, rows)

    pooled = expected.text_embeds if config.with_projection else expected.pooler_output
    assert relative_error(output.last_hidden_state, expected.last_hidden_state) <= TOLERANCE
    assert relative_error(output.penultimate, expected.hidden_states[-2]) <= TOLERANCE
    assert relative_error(output.pooled, pooled) <= TOLERANCE


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_vision_equals_transformers(hidden_act):
    config = dataclasses.replace(TINY_VISION, hidden_act=hidden_act)
    theirs, ours = reference(config), CLIPVisionModel(config, rngs=nnx.Rngs(0))
    randomise(theirs, seed=2)
    copy_weights(ours, theirs)
    pixels = np.random.default_rng(1).normal(size=(2, 20, 20, 3)).astype(np.float32)

    expected = theirs(torch.from_numpy(pixels).permute(0, 3, 1, 2), output_hidden_states=True)
    output = nnx.jit(lambda model, images: model(images))(ours, pixels)

    pooled = theirs.vision_model.post_layernorm(expected.last_hidden_state[:, 0])
    assert relative_error(output.last_hidden_state, expected.last_hidden_state) <= TOLERANCE
    assert relative_error(output.penultimate, expected.hidden_states[-2]) <= TOLERANCE
    assert relative_error(output.pooled, pooled) <= TOLERANCE
    assert relative_error(output.image_embeds, expected.image_embeds) <= TOLERANCE


def test_text_is_causal():
    model = CLIPTextModel(TINY_TEXT, rngs=nnx.Rngs(0))
    rows = token_rows(TINY_TEXT)
    changed = rows.copy()
    changed[:, 9:] = 3
    encode = nnx.jit(lambda model, ids: model(ids).last_hidden_state)
    before, after = encode(model, rows), encode(model, changed)
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert np.abs(before[:, 9:] - after[:, 9:]).max() > 0.1


def test_eos_position_is_the_first_one():
    rows = jnp.array([[8, 4, 9, 9, 9], [8, 9, 0, 0, 0], [8, 1, 2, 3, 9]])
    np.testing.assert_array_equal(eos_position(rows, 9), [2, 1, 4])
    np.testing.assert_array_equal(eos_position(rows, 2), [2, 1, 4])


def test_parameters_decide_the_dtype():
    text, vision = CLIPTextModel(TINY_TEXT, rngs=nnx.Rngs(0)), CLIPVisionModel(TINY_VISION, rngs=nnx.Rngs(0))
    for model in (text, vision):
        nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(model, nnx.Param)))
    run = nnx.jit(lambda model, inputs: model(inputs))
    outputs = [*run(text, token_rows(TINY_TEXT)), *run(vision, jnp.ones((1, 20, 20, 3)))]
    assert {output.dtype for output in outputs} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("config", [TINY_TEXT, TINY_VISION])
def test_unknown_activation_is_named(config):
    model = CLIPTextModel if config is TINY_TEXT else CLIPVisionModel
    with pytest.raises(InputError, match="gelu_new"):
        model(dataclasses.replace(config, hidden_act="gelu_new"), rngs=nnx.Rngs(0))


def test_wrong_input_sizes_are_named():
    with pytest.raises(InputError, match=r"17 tokens.*16"):
        CLIPTextModel(TINY_TEXT, rngs=nnx.Rngs(0))(jnp.zeros((1, 17), jnp.int32))
    with pytest.raises(InputError, match=r"20 x 20.*24 x 20"):
        CLIPVisionModel(TINY_VISION, rngs=nnx.Rngs(0))(jnp.zeros((1, 24, 20, 3)))
    with pytest.raises(InputError, match="5 heads"):
        CLIPTextModel(dataclasses.replace(TINY_TEXT, num_attention_heads=5), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("width", "height"), [(301, 487), (640, 225), (100, 60), (224, 224)])
def test_preprocessing_equals_transformers(width, height):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    crop = resize_and_crop(Image.fromarray(pixels))
    expected = transformers.CLIPImageProcessorPil()(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
    # Measured: 4.8e-7 absolute, values to 2.1; the uint8 crop itself is equal.
    np.testing.assert_allclose(preprocess(crop[None])[0], expected[0].transpose(1, 2, 0), atol=2e-6)


def test_any_image_mode_becomes_rgb():
    for mode in ("L", "RGBA", "P"):
        assert resize_and_crop(Image.new(mode, (40, 30)), size=20).shape == (20, 20, 3)


def test_a_whole_clip_is_no_image_encoder(tmp_path):
    """Its widths stand in a part of its configuration, and would be taken for ViT-bigG/14's."""
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "clip", "vision_config": {"hidden_size": 1280}}')
    with pytest.raises(InputError, match=r"config\.json: This is a whole CLIP.*CLIPVisionModelWithProjection"):
        CLIPVisionConfig.from_json(path)
