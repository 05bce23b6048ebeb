"""LoRA files: every spelling against diffusers and PEFT, merged and kept beside the base, and what is refused."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from flax import nnx
from safetensors.torch import load_file, save_file

from infinite_id_jax.errors import InputError
from infinite_id_jax.sharding import make_mesh, parameter_sharding
from infinite_id_jax.stable_diffusion.clip_text import CLIPTextModel
from infinite_id_jax.stable_diffusion.kernels import PLAIN, compiling_for
from infinite_id_jax.stable_diffusion.low_rank import LowRank, set_lora_scale
from infinite_id_jax.stable_diffusion.unet import AddedConditions, UNet2DConditionModel
from infinite_id_jax.weights.compvis import unet_names
from infinite_id_jax.weights.export import torch_state
from infinite_id_jax.weights.folder import StableDiffusionXL, load_base, load_text_encoders, read_settings
from infinite_id_jax.weights.keys import key_map
from infinite_id_jax.weights.load import abstract
from infinite_id_jax.weights.lora import LoRA, attach_lora, files_of, merge_lora, read_lora
from infinite_id_jax.weights.settings import SDXL
from tests import reference_torch

STRENGTH = 0.7
PARTS = ("unet", "text_encoder", "text_encoder_2")

Factors = dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor, float]]
"""{(part, layer): (down, up, alpha)}, the layer as diffusers names it."""


def random_factors(pipe: Any, *, convolutions: bool = False, text: bool = True) -> Factors:
    """Of every attention, feed-forward and projection, at ranks that differ from layer to layer."""
    generator = torch.Generator().manual_seed(7)
    factors: Factors = {}
    for part in PARTS if text else PARTS[:1]:
        for name, layer in getattr(pipe, part).named_modules():
            inner = re.search(r"attn|ff|proj_|mlp", name)
            if not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) or not (
                inner or (convolutions and part == "unet")
            ):
                continue
            outputs, inputs, *size = layer.weight.shape
            rank = 1 + len(factors) % 3
            down = torch.randn(rank, inputs, *size, generator=generator) / layer.weight[0].numel() ** 0.5
            up = 0.3 * torch.randn(outputs, rank, *[1] * len(size), generator=generator)
            factors[part, name] = down, up, 2.0 + len(factors) % 4
    return factors


# The spellings of a file


def kohya(factors: Factors, rename: Callable[[str], str] = lambda name: name) -> dict[str, torch.Tensor]:
    short = dict(zip(PARTS, ("unet", "te1", "te2"), strict=True))
    tensors = {}
    for (part, name), (down, up, alpha) in factors.items():
        text = "" if part == "unet" or name.startswith("text_model.") else "text_model."
        name = rename(name) if part == "unet" else text + name
        stem = f"lora_{short[part]}_{name.replace('.', '_')}"
        tensors |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(alpha),
        }
    return tensors


def dotted(factors: Factors, down_name: str, up_name: str) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}.{leaf}.weight": tensor
        for (part, name), (down, up, _) in factors.items()
        for leaf, tensor in ((down_name, down), (up_name, up))
    }


def processors(factors: Factors) -> dict[str, torch.Tensor]:
    """diffusers before 0.18: attention alone, under its processor."""
    tensors = {}
    for (part, name), (down, up, _) in factors.items():
        if part == "unet" and (found := re.fullmatch(r"(.*attn\d)\.(to_q|to_k|to_v|to_out)(\.0)?", name)):
            stem = f"unet.{found[1]}.processor.{found[2]}_lora"
            tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
        if part != "unet" and (found := re.fullmatch(r"(.*self_attn)\.(q|k|v|out)_proj", name)):
            stem = f"{part}.{found[1]}.to_{found[2]}_lora"
            tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    return tensors


def linear_layers(factors: Factors) -> dict[str, torch.Tensor]:
    """diffusers before PEFT: text encoders say it at length."""
    tensors = dotted(factors, "lora.down", "lora.up")
    return {key.replace(".lora.", ".lora_linear_layer.") if "text" in key else key: x for key, x in tensors.items()}


SPELLINGS: dict[str, Callable[[Factors, Callable[[str], str]], dict[str, torch.Tensor]]] = {
    "kohya, original names": kohya,
    "kohya, diffusers' names": lambda factors, _: kohya(factors),
    "PEFT": lambda factors, _: dotted(factors, "lora_A", "lora_B"),
    "linear layers": lambda factors, _: linear_layers(factors),
    "processors": lambda factors, _: processors(factors),
}


class Reference(NamedTuple):
    """The tiny SDXL in diffusers and in ours, and a LoRA of one alpha: diffusers mistakes those that differ."""

    pipe: StableDiffusionXLPipeline
    base: StableDiffusionXL
    factors: Factors

    def original(self, name: str) -> str:
        return unet_names(self.base.unet.config)[f"{name}.weight"].removesuffix(".weight")


@pytest.fixture(scope="module")
def reference(tiny) -> Reference:
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny.model, add_watermarker=False)
    factors = {name: (down, up, 3.0) for name, (down, up, _) in random_factors(pipe, convolutions=True).items()}
    for name in ("add_embedding.linear_1", "add_embedding.linear_2"):  # which diffusers' reader of its own names loses
        del factors["unet", name]
    return Reference(pipe, load_base(tiny.model), factors)


def save(tensors: dict[str, torch.Tensor], path: Path) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


# One call of each part


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        "x": rng.normal(size=(2, 16, 16, 4)).astype(np.float32),
        "t": np.array([801.0, 101.0], np.float32),
        "text": rng.normal(size=(2, 9, reference_torch.CROSS_ATTENTION_DIM)).astype(np.float32),
        "pooled": rng.normal(size=(2, reference_torch.POOLED_DIM)).astype(np.float32),
        "time_ids": np.array([[128, 128, 0, 0, 128, 128]] * 2, np.float32),
        "ids": np.concatenate([rng.integers(0, 300, (2, 8)), np.full((2, 2), -1)], axis=1),
    }


@torch.no_grad()
def their_outputs(pipe: StableDiffusionXLPipeline) -> dict[str, np.ndarray]:
    given = {name: torch.from_numpy(array) for name, array in inputs().items()}
    added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
    unet = pipe.unet(given["x"].permute(0, 3, 1, 2), given["t"], given["text"], added_cond_kwargs=added).sample
    outputs = {"unet": unet.permute(0, 2, 3, 1)}
    for part in PARTS[1:]:
        model = getattr(pipe, part)
        ids = given["ids"].where(given["ids"] >= 0, model.config.eos_token_id)
        states = model(ids, output_hidden_states=True)
        outputs[part] = states.hidden_states[-2]
        outputs[f"{part} pooled"] = states.pooler_output if part == "text_encoder" else states.text_embeds
    return {name: output.numpy() for name, output in outputs.items()}


@partial(jax.jit, static_argnums=0)
def call(graph: nnx.GraphDef, state: nnx.State, *arguments: Any) -> Any:
    return nnx.merge(graph, state)(*arguments)


def our_outputs(base: StableDiffusionXL) -> dict[str, np.ndarray]:
    given = inputs()
    added = AddedConditions(given["pooled"], given["time_ids"])
    outputs = {"unet": call(*nnx.split(base.unet), given["x"], given["t"], given["text"], added)}
    for part, model in zip(PARTS[1:], base.text_encoders, strict=True):
        ids = np.where(given["ids"] >= 0, given["ids"], model.config.eos_token_id)
        states = call(*nnx.split(model), ids)
        outputs |= {part: states.penultimate, f"{part} pooled": states.pooled}
    return {name: np.asarray(output) for name, output in outputs.items()}


def assert_close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = np.abs(ours[name] - expected).max()
        print(f"{name}: {error:.1e}")
        assert error <= tolerance, name


@contextmanager
def loaded(pipe: StableDiffusionXLPipeline, path: Path) -> Iterator[None]:
    pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="lora")
    pipe.set_adapters("lora", STRENGTH)
    try:
        yield
    finally:
        pipe.unload_lora_weights()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_merged_as_diffusers_loads_it(reference, tmp_path, spelling):
    """Measured: the U-Net 2.6e-6 to 6.4e-6, the text encoders up to 3.6e-6."""
    pipe, base, factors = reference
    path = save(SPELLINGS[spelling](factors, reference.original), tmp_path / "lora.safetensors")
    plain = our_outputs(base)
    with loaded(pipe, path):
        theirs = their_outputs(pipe)
    merged = merge_lora(base, read_lora(path, base), STRENGTH)
    for name, output in theirs.items():
        assert np.abs(output - plain[name]).max() > 0.1, name  # it does something
    assert_close(our_outputs(merged), theirs, 2e-5)
    assert_close(our_outputs(base), plain, 0)  # the base is as it was


@pytest.mark.parametrize("clip", ["text_encoders.clip_{}.transformer.", "clip_{}."])
def test_the_dotted_names_of_comfyui_and_onetrainer(reference, tmp_path, clip):
    _, base, factors = reference
    parts = {"text_encoder": clip.format("l"), "text_encoder_2": clip.format("g")}
    tensors = {}
    for (part, name), (down, up, alpha) in factors.items():
        full = f"diffusion_model.{reference.original(name)}" if part == "unet" else f"{parts[part]}{name}"
        tensors |= {
            f"{full}.lora_down.weight": down,
            f"{full}.lora_up.weight": up,
            f"{full}.alpha": torch.tensor(alpha),
        }
    ours = read_lora(save(tensors, tmp_path / "dotted.safetensors"), base)
    expected = read_lora(save(kohya(factors, reference.original), tmp_path / "kohya.safetensors"), base)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_a_words_own_embedding_is_left_out_and_named(reference, tmp_path):
    _, base, factors = reference
    tensors = kohya(factors, reference.original)
    expected = read_lora(save(tensors, tmp_path / "plain.safetensors"), base)
    more = {"bundle_emb.anna.clip_l": torch.zeros(2, 768), "bundle_emb.anna.clip_g": torch.zeros(2, 1280)}
    with pytest.warns(UserWarning, match="brings embeddings of words of its own, which are left out: anna"):
        ours = read_lora(save(tensors | more, tmp_path / "bundled.safetensors"), base)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


# Beside the base


def test_kept_beside_the_base(reference, tmp_path):
    """Measured: 4.7e-6 from diffusers, 4.4e-6 from the merged base."""
    pipe, base, factors = reference
    path = save(kohya(factors, reference.original), tmp_path / "lora.safetensors")
    with loaded(pipe, path):
        theirs = their_outputs(pipe)
    lora = read_lora(path, base)
    beside = attach_lora(base, lora, "style", STRENGTH)
    assert_close(our_outputs(beside), theirs, 2e-5)
    assert_close(our_outputs(beside), our_outputs(merge_lora(base, lora, STRENGTH)), 2e-5)

    with compiling_for(PLAIN):  # beside a LoRA doubled maps are convolved in the plain form
        off, plain = our_outputs(at_strength(beside, "style", 0.0)), our_outputs(base)
        assert_close(off, plain, 1e-6)  # measured 1.2e-7: XLA orders the sums of another program otherwise
    programs = call._cache_size()
    assert_close(our_outputs(at_strength(beside, "style", 0.0)), plain, 2e-5)
    assert_close(
        our_outputs(at_strength(beside, "style", STRENGTH / 2)), our_outputs(merge_lora(base, lora, STRENGTH / 2)), 2e-5
    )
    assert call._cache_size() == programs  # no strength compiles anything
    assert_close(our_outputs(beside), theirs, 2e-5)  # nor is anything changed in place


def at_strength(base: StableDiffusionXL, name: str, scale: float) -> StableDiffusionXL:
    unet, first, second = set_lora_scale((base.unet, *base.text_encoders), name, scale)
    return base._replace(unet=unet, text_encoders=(first, second))


def text_only(base: StableDiffusionXL, path: Path, seed: int) -> LoRA:
    """A LoRA of the second text encoder's first layer: what does not depend on the part is quick to test there."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"):
        wide = 80 if name == "mlp.fc1" else 40
        stem = f"text_encoder_2.text_model.encoder.layers.0.{name}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(2, 40, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(wide, 2, generator=generator) / 10
    return read_lora(save(tensors, path), base)


def encode(model: Any) -> np.ndarray:
    return np.asarray(call(*nnx.split(model), np.arange(20).reshape(2, 10)).last_hidden_state)


def test_several(reference, tmp_path):
    """One around the other, each with a strength; a merge reaches the base below them."""
    base = reference.base
    first, second = (text_only(base, tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    both = attach_lora(attach_lora(base, first, "first", 0.5), second, "second", 2.0)
    expected = encode(merge_lora(merge_lora(base, first, 0.5), second, 2.0).text_encoders[1])
    assert np.abs(encode(both.text_encoders[1]) - expected).max() <= 1e-5  # measured
    again = merge_lora(attach_lora(base, second, "second", 2.0), first, 0.5)
    assert np.abs(encode(again.text_encoders[1]) - expected).max() <= 1e-5

    graph, state = nnx.split(at_strength(both, "first", 3.0).text_encoders[1])
    state = set_lora_scale(state, "second", 0.0)
    assert np.abs(encode(nnx.merge(graph, state)) - encode(merge_lora(base, first, 3.0).text_encoders[1])).max() <= 1e-5

    # At strength 0 the base's own numbers, bit for bit, where XLA does not order two programs otherwise.
    off: Any = at_strength(at_strength(both, "first", 0.0), "second", 0.0)
    with jax.disable_jit():
        ids = jnp.arange(20).reshape(2, 10)
        np.testing.assert_array_equal(off.text_encoders[1](ids).pooled, base.text_encoders[1](ids).pooled)

    # What is read of a layer is there, whatever is around it, and other files can be read against the result.
    layer: Any = both.text_encoders[1].encoder.layers[0].mlp.fc1
    assert isinstance(layer.base, LowRank)
    assert (layer.in_features, layer.out_features, layer.kernel.shape, layer.bias.shape) == (40, 80, (40, 80), (80,))
    assert text_only(both, tmp_path / "again.safetensors", 1).text_encoder_2.keys() == first.text_encoder_2.keys()
    assert both.unet is base.unet
    assert not isinstance(base.text_encoders[1].encoder.layers[0].mlp.fc1, LowRank)

    with pytest.raises(InputError, match="'first' in the model already"):
        attach_lora(both, second, "first")
    with pytest.raises(InputError, match=r"no LoRA 'third' .* it holds first, second"):
        set_lora_scale(state, "third", 1.0)
    with pytest.raises(InputError, match="none was loaded, or all were merged"):
        set_lora_scale(nnx.state(base.text_encoders[1]), "first", 1.0)


def test_beside_an_identity_adapter(reference, tmp_path):
    """Adapters wrap the same layers; taken out again, the LoRA is still there."""
    from infinite_id_jax.identity.low_rank import LowRankAttention, add_low_rank, remove_low_rank

    name = "mid_block.attentions.0.transformer_blocks.0.attn1"
    tensors = dotted({k: v for k, v in reference.factors.items() if k[1].startswith(name)}, "lora_A", "lora_B")
    lora = read_lora(save(tensors, tmp_path / "lora.safetensors"), reference.base)
    assert len(lora.unet) == 4
    attention = attach_lora(reference.base, lora, "style").unet.mid_block.attentions[0].transformer_blocks[0].attn1
    x = jnp.asarray(inputs()["text"])
    before = attention(x)
    low_rank = LowRankAttention(attention, 3, rngs=nnx.Rngs(0))
    add_low_rank(attention, low_rank)
    assert np.abs(attention(x) - before).max() > 1e-3
    remove_low_rank(attention)
    np.testing.assert_array_equal(attention(x), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_and_place_are_the_base_s(tiny, tmp_path, dtype):
    mesh = make_mesh("fsdp=2,tensor=2")
    settings = read_settings(tiny.model)
    encoders = load_text_encoders(tiny.model, settings, dtype=dtype, sharding=parameter_sharding(mesh))
    unet = abstract(lambda rngs: UNet2DConditionModel(settings.unet, rngs=rngs))
    base: Any = StableDiffusionXL(settings, unet, None, encoders, None)
    lora = text_only(base, tmp_path / "x.safetensors", 1)
    plain = encoders[1].encoder.layers[0].mlp.fc1.kernel[...]
    merged = merge_lora(base, lora).text_encoders[1]
    beside = attach_lora(base, lora, "x").text_encoders[1]
    kernel, update = merged.encoder.layers[0].mlp.fc1.kernel[...], lora.text_encoder_2["encoder.layers.0.mlp.fc1"]
    assert (kernel.dtype, kernel.sharding) == (plain.dtype, plain.sharding)
    summed = np.asarray(plain, np.float32) + update.down @ update.up
    np.testing.assert_allclose(
        np.asarray(kernel, np.float32), summed, rtol=2**-8 if dtype == "bfloat16" else 1e-6, atol=1e-6
    )
    assert encode(beside).dtype == plain.dtype
    if dtype == "float32":
        assert np.abs(encode(beside) - encode(merged)).max() <= 1e-5  # measured


# What files say besides


def kernels(base: StableDiffusionXL) -> dict[tuple[str, str], np.ndarray]:
    """{(part, layer): weight} in PyTorch's layout."""
    states = {part: torch_state(module) for part, module in zip(PARTS, (base.unet, *base.text_encoders), strict=True)}
    return {
        (part, key.removesuffix(".weight")): array
        for part, state in states.items()
        for key, array in state.items()
        if key.endswith(".weight")
    }


def assert_merged(base: StableDiffusionXL, lora: LoRA, factors: Factors, scale: float) -> None:
    """W + scale alpha / rank up down of every layer that `factors` names, and of no other; computed by PyTorch."""
    plain, merged = kernels(base), kernels(merge_lora(base, lora, scale))
    changes = {
        (part, name.removeprefix("text_model.")): scale
        * alpha
        / len(down)
        * torch.einsum("or...,ri...->oi...", up.double(), down.double())
        for (part, name), (down, up, alpha) in factors.items()
    }
    assert changes.keys() <= plain.keys()
    for key, weight in plain.items():
        if key in changes:
            np.testing.assert_allclose(merged[key], weight + changes[key].numpy(), rtol=0, atol=2e-6, err_msg=str(key))
            assert np.abs(merged[key] - weight).max() > 1e-3, key
        else:
            np.testing.assert_array_equal(merged[key], weight)


def test_every_layer_has_its_own_alpha_and_rank(reference, tmp_path):
    """Also the two layers and the differing alphas that diffusers mistakes; from a pickle, in half precision."""
    factors = {
        name: (down.half(), up.half(), alpha)
        for name, (down, up, alpha) in random_factors(reference.pipe, convolutions=True).items()
    }
    assert {down.ndim for down, _, _ in factors.values()} == {2, 4}
    assert {down.shape[2:] for down, _, _ in factors.values()} == {(), (1, 1), (3, 3)}
    torch.save(kohya(factors), tmp_path / "lora.pt")
    assert_merged(reference.base, read_lora(tmp_path / "lora.pt", reference.base), factors, 0.4)


def test_a_core_between_the_maps(reference, tmp_path):
    """LoCon's `lora_mid`: a small 3x3 convolution between two 1x1 ones, here composed by PyTorch."""
    generator, name = torch.Generator().manual_seed(0), "down_blocks.0.resnets.0.conv1"
    down, mid, up = (torch.randn(*shape, generator=generator) for shape in ((3, 32, 1, 1), (3, 3, 3, 3), (32, 3, 1, 1)))
    tensors = kohya({("unet", name): (down, up, 1.5)}, reference.original)
    stem = next(iter(tensors)).partition(".")[0]
    path = save(tensors | {f"{stem}.lora_mid.weight": mid}, tmp_path / "locon.safetensors")
    conv = torch.nn.functional.conv2d
    x = torch.eye(32 * 9).reshape(-1, 32, 3, 3)  # the composition's answer to each number of a 3x3 patch
    composed = conv(conv(conv(x, down), mid), up).reshape(32, 3, 3, 32).permute(3, 0, 1, 2)
    change = (
        kernels(merge_lora(reference.base, read_lora(path, reference.base)))["unet", name]
        - kernels(reference.base)["unet", name]
    )
    np.testing.assert_allclose(change, 1.5 / 3 * composed, atol=1e-5)


def test_linear_maps_written_as_convolutions(reference, tmp_path):
    name = "mid_block.attentions.0.proj_in"
    down, up, alpha = reference.factors["unet", name]
    tensors = kohya({("unet", name): (down[:, :, None, None], up[:, :, None, None], alpha)})
    lora = read_lora(save(tensors, tmp_path / "x.safetensors"), reference.base)
    assert_merged(reference.base, lora, {("unet", name): (down, up, alpha)}, 1.0)


TARGETS = ["to_q", "to_out.0", "ff.net.2", "conv1"]


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 6},
        {"lora_alpha": 6, "use_rslora": True},
        {"lora_alpha": 6, "alpha_pattern": {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 1}},
        {"lora_alpha": 6, "alpha_pattern": {"^mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 1}},
    ],
    ids=str,
)
def test_alphas_of_peft(reference, tiny, tmp_path, config):
    """What PEFT trained and saved, by itself and through diffusers: the alpha stands in a configuration."""
    unet = reference_torch.tiny_sdxl_unet()
    model = peft.get_peft_model(unet, peft.LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False, **config))
    settings = model.peft_config["default"]
    model.save_pretrained(tmp_path)
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft.get_peft_model_state_dict(model),
        unet_lora_adapter_metadata=settings.to_dict(),
    )
    expected = {
        ("unet", name.removeprefix("base_model.model.")): layer.get_delta_weight("default").detach()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    plain = kernels(reference.base)
    own = tmp_path / "adapter_model.safetensors"
    assert files_of(own) == [own, tmp_path / "adapter_config.json"]  # both say what a picture looks like
    assert files_of(tmp_path / "pytorch_lora_weights.safetensors") == [tmp_path / "pytorch_lora_weights.safetensors"]
    for file in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        lora = read_lora(tmp_path / file, reference.base)
        merged = kernels(merge_lora(reference.base, lora))
        assert len(lora.unet) == len(expected) > 50
        for key, change in expected.items():
            np.testing.assert_allclose(merged[key] - plain[key], change.numpy(), atol=2e-6, err_msg=str(key))


# Names, at full size


@pytest.fixture(scope="module")
def full_size() -> StableDiffusionXL:
    unet = abstract(lambda rngs: UNet2DConditionModel(SDXL.unet, rngs=rngs))
    first, second = (abstract(lambda rngs, c=c: CLIPTextModel(c, rngs=rngs)) for c in SDXL.text)
    return StableDiffusionXL(SDXL, unet, None, (first, second), None)


def weights_of(base: StableDiffusionXL) -> dict[tuple[str, str], tuple[int, ...]]:
    return {
        (part, entry.key.removesuffix(".weight")): entry.shape
        for part, module in zip(PARTS, (base.unet, *base.text_encoders), strict=True)
        for path, entry in key_map(module).items()
        if path[-1] == "kernel"
    }


@pytest.mark.parametrize("names", ["original", "diffusers'"])
def test_all_names_of_sdxl(full_size, tmp_path, names):
    """A LoRA of every layer of SDXL 1.0 in kohya's spelling finds each of them."""
    shapes = weights_of(full_size)
    inner = [name for part, name in shapes if part == "unet" and ".attentions." in name]
    assert (len(inner), len(shapes)) == (722, 794 + 72 + 193)
    zeros = {
        key: (
            torch.zeros(1, *shape[1:], dtype=torch.half),
            torch.zeros(shape[0], 1, *[1] * len(shape[2:]), dtype=torch.half),
            1.0,
        )
        for key, shape in shapes.items()
    }
    original = {
        key.removesuffix(".weight"): name.removesuffix(".weight") for key, name in unet_names(SDXL.unet).items()
    }
    tensors = kohya(zeros, original.__getitem__) if names == "original" else kohya(zeros)
    assert len(tensors) == 3 * len(shapes)  # no two layers have one name
    lora = read_lora(save(tensors, tmp_path / "full.safetensors"), full_size)
    assert {(part, name) for part, layers in lora._asdict().items() for name in layers} == shapes.keys()


def test_no_name_means_two_layers():
    """Underscores for dots could make two names one, in either spelling or between them."""
    layers: dict[str, set[str]] = {}
    for key, original in unet_names(SDXL.unet).items():
        for name in (key, original):
            layers.setdefault(name.replace(".", "_"), set()).add(key)
    assert all(len(found) == 1 for found in layers.values())


# What is refused


MID = "mid_block.attentions.0.proj_in"
PROJECTION = f"lora_unet_{MID.replace('.', '_')}"


def one_layer(stem: str = PROJECTION, inputs: int = 64) -> dict[str, torch.Tensor]:
    return factors_of((2, inputs), (64, 2), stem)


def factors_of(down: tuple[int, ...], up: tuple[int, ...], stem: str = PROJECTION) -> dict[str, torch.Tensor]:
    return {f"{stem}.lora_down.weight": torch.ones(down), f"{stem}.lora_up.weight": torch.ones(up)}


def keys(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.ones(2, 2) for name in names}


REFUSED = {
    "DoRA": (one_layer() | keys(f"{PROJECTION}.dora_scale"), "is a DoRA and not a plain LoRA"),
    "DoRA of PEFT": (keys(f"unet.{MID}.lora_magnitude_vector.weight"), "is a DoRA"),
    "LoHa": (keys(f"{PROJECTION}.hada_w1_a"), "is a LoHa"),
    "LoKr": (keys(f"{PROJECTION}.lokr_w1"), "is a LoKr"),
    "IA3": (keys(f"{PROJECTION}.on_input", f"{PROJECTION}.weight"), "is an IA3"),
    "IA3 of PEFT": (keys(f"base_model.model.{MID}.ia3_l"), "is an IA3"),
    "OFT": (keys(f"{PROJECTION}.oft_blocks"), "is an OFT"),
    "BOFT": (keys(f"base_model.model.{MID}.boft_R"), "is an OFT"),
    "differences": (one_layer() | keys("lora_unet_conv_in.diff"), "is a file of whole differences"),
    "SD 1.5": (one_layer("lora_te_text_model_encoder_layers_0_mlp_fc1"), "for SD 1.5 or SD 2: use one made for SDXL"),
    "SD 1.5's U-Net": (
        one_layer("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 768),
        r"is a LoRA for SD 1.5 \(cross-attention of width 768, and here 64\)",
    ),
    "SD 2's U-Net": (
        {"unet.up_blocks.1.attn2.processor.to_k_lora.down.weight": torch.ones(4, 1024)},
        "is a LoRA for SD 2",
    ),
    "SD 3": (keys("transformer.transformer_blocks.0.attn.to_q.lora_A.weight"), "for a diffusion transformer"),
    "SD 3 of kohya": (one_layer("lora_unet_joint_blocks_0_context_block_attn_qkv"), "for SD 3"),
    "Flux": (keys("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"), "for Flux"),
    "Flux of kohya": (one_layer("lora_unet_double_blocks_0_img_attn_qkv"), "for Flux"),
    "FaceID": (
        keys("image_proj.proj.0.weight", "ip_adapter.0.to_q_lora.down.weight"),
        "holds no LoRA but an IP-Adapter",
    ),
    "a checkpoint": (keys("model.diffusion_model.out.2.weight"), "holds no LoRA but a single-file checkpoint"),
    "anything": (keys("x"), "holds no LoRA: name it as what it is"),
    "no up": ({f"{PROJECTION}.lora_down.weight": torch.ones(2, 64)}, rf"unet.{MID} \(up missing\)"),
    "alpha alone": (one_layer() | keys("lora_unet_conv_out.alpha"), r"unet.conv_out \(down and up missing\)"),
    "shapes": (one_layer(inputs=32), r"proj_in \(\[2, 32\] and \[64, 2\] for a weight of \[64, 64\]\)"),
    "ranks": (factors_of((2, 64), (64, 3)), r"\[2, 64\] and \[64, 3\] for"),
    "a row": (factors_of((64,), ()), "are no factors"),
    "no rank": (factors_of((0, 64), (64, 0)), "cannot be read"),
    "many alphas": (one_layer() | keys(f"{PROJECTION}.alpha"), r"proj_in \(.*size 4"),
    "twice": (one_layer() | one_layer(f"unet.{MID}"), rf"in 2 places: unet.{MID}"),
    "a bias": (one_layer() | keys(f"unet.{MID}.lora_B.bias"), rf"unet.{MID}.lora_B.bias"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(reference, tmp_path, kind):
    tensors, cause = REFUSED[kind]
    path = save(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=cause) as error:
        read_lora(path, reference.base)
    assert str(error.value).startswith(str(path))


def test_all_that_does_not_fit_is_listed(reference, tmp_path):
    names = [f"lora_unet_no_such_layer_{i}" for i in range(9)]
    tensors = {key: x for name in names for key, x in one_layer(name).items()} | one_layer(inputs=32)
    with pytest.raises(InputError, match="does not fit this base, in 19 places") as error:
        read_lora(save(tensors, tmp_path / "x.safetensors"), reference.base)
    assert all(name in str(error.value) for name in [*names, "mid_block.attentions.0.proj_in"])


def test_files_that_cannot_be_read(reference, tmp_path):
    whole = save(one_layer(), tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-20])
    torch.save(torch.nn.Linear(1, 1), tmp_path / "x.pt")
    causes = {"cut.safetensors": "not a whole", "x.pt": "asks for torch", "absent": "missing", "": "folder"}
    for name, cause in causes.items():
        with pytest.raises(InputError, match=cause):
            read_lora(tmp_path / name, reference.base)
    tensors = load_file(tmp_path / "x.safetensors")
    for header in ("{", "3"):
        save_file(tensors, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": header})
        with pytest.raises(InputError, match="damaged header"):
            read_lora(tmp_path / "x.safetensors", reference.base)
    header = json.dumps({"unet.lora_alpha": "x"})
    save_file(tensors, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": header})
    with pytest.raises(InputError, match="alpha is 'x'"):
        read_lora(tmp_path / "x.safetensors", reference.base)
