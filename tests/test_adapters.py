"""Published adapters: recognised, imported and sampled as diffusers does, and as Infinite-ID's identity stream."""

import dataclasses
import functools
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file

from infinite_id_jax import FaceFeatures, InfiniteIDPipeline
from infinite_id_jax.errors import InputError
from infinite_id_jax.identity.config import AdapterConfig
from infinite_id_jax.identity.cross_attention import IdentityContext
from infinite_id_jax.identity.features import unit
from infinite_id_jax.identity.inject import IdentityAdapter, block_names, eject, inject
from infinite_id_jax.identity.scales import layer_scales
from infinite_id_jax.stable_diffusion.config import UNetConfig
from infinite_id_jax.stable_diffusion.unet import AddedConditions, UNet2DConditionModel
from infinite_id_jax.weights import infinite_id_diffusers
from infinite_id_jax.weights.adapter import (
    find_adapter,
    load_adapter,
    read_adapter,
    read_adapter_config,
    save_adapter,
)
from infinite_id_jax.weights.export import torch_state
from infinite_id_jax.weights.folder import load_unet, read_settings
from infinite_id_jax.weights.keys import key_map
from infinite_id_jax.weights.load import abstract, check_keys, open_tensors
from tests import published, reference_torch
from tests.published import FAMILIES, TINY, Diffusers

PROMPTS = ["a photo of a man in the snow", "a drawing of a dog"]
SDXL = UNetConfig(
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816
)


class Case(NamedTuple):
    """One family: its file, our pipeline with it, and diffusers'."""

    family: str
    state: dict[str, torch.Tensor]
    file: Path
    pipe: InfiniteIDPipeline
    diffusers: Diffusers
    features: FaceFeatures  # a face embedding of length 1, as diffusers' users give it

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """diffusers' two inputs, nobody first."""
        needs = read_adapter_config(self.file).needs
        hidden = None
        if needs.clip_layer == "penultimate":
            empty = self.pipe._hidden_states_of_zeros
            hidden = torch.tensor(np.stack([empty, self.features.clip_hidden_states]))
        only = self.features.clip_pooled if needs.clip_layer == "pooled" else self.features.face_embedding
        pair = torch.tensor(np.stack([np.zeros_like(only), only]))
        return (pair, hidden) if needs.face_dim or hidden is None else (hidden, None)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tiny, tmp_path_factory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    unet = reference_torch.tiny_sdxl_unet()
    state = published.random_state(request.param, unet)
    file = published.write(request.param, folder, state)
    pipe = InfiniteIDPipeline.from_pretrained(tiny.model, file)
    rng = np.random.default_rng(3)
    hidden, face, pooled = (rng.normal(size=shape).astype(np.float32) for shape in ((257, 32), 16, 32))
    features = FaceFeatures(hidden, face / np.linalg.norm(face), pooled)
    diffusers = Diffusers(tiny.model, file, request.param == "faceid_plusv2")
    return Case(request.param, state, file, pipe, diffusers, features)


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(2, 8, 8, 4)).astype(np.float32)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, arrays, x, t, context, added):
    """One program for all adapters of a structure."""
    return nnx.merge(graph, arrays)(x, t, context, added)


def error(ours: Any, theirs: torch.Tensor) -> float:
    """Largest absolute error relative to the scale of the output."""
    expected = theirs.numpy()
    return float(np.abs(np.asarray(ours) - expected).max() / np.abs(expected).max())


# Against diffusers


# The errors stand in the report of `pytest --junitxml` too, for docs/interop.md.


def test_projections_match_diffusers(case, record_property):
    person = case.pipe.encode_identity(case.features)
    nobody, somebody = case.diffusers.tokens(*case.inputs)
    found = max(error(person.tokens, somebody), error(person.unconditional, nobody))
    record_property("projection", found)
    assert found <= 1e-5  # measured: 1.1e-6 at most (Plus)
    assert error(person.unconditional, somebody) > 1e-2


def test_a_forward_of_the_unet_matches_diffusers(case, tiny, record_property):
    """Rows of different timesteps, texts and people."""
    generator = torch.Generator().manual_seed(1)
    x, text, pooled = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 77, 64), (2, 32)))
    t, time_ids = torch.tensor([7.0, 601.0]), torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).expand(2, -1)
    embeds, clip = case.inputs
    if clip is not None:
        case.diffusers.projection.clip_embeds = clip[:, None]
    with torch.no_grad():
        theirs = case.diffusers.pipe.unet(
            x,
            t,
            text,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids, "image_embeds": [embeds[:, None]]},
        ).sample

    person = case.pipe.encode_identity(case.features)
    context = IdentityContext(jnp.asarray(text.numpy()), jnp.stack([person.unconditional, person.tokens]))
    added = AddedConditions(jnp.asarray(pooled.numpy()), jnp.asarray(time_ids.numpy()))
    ours = forward(*case.pipe._unet, jnp.asarray(x.permute(0, 2, 3, 1).numpy()), jnp.asarray(t.numpy()), context, added)
    found = error(ours, theirs.permute(0, 2, 3, 1))
    record_property("forward", found)
    assert found <= 2e-5  # measured: 2.1e-6 at most (FaceID-Plus V2)


def test_guided_single_stream_trajectories_match_diffusers(case, noise, record_property):
    person = case.pipe.encode_identity(case.features)
    out = case.pipe(PROMPTS, person, latents=noise, steps=10, streams="one", output="latent")
    embeds, clip = case.inputs
    theirs = case.diffusers.sample(PROMPTS, nchw(noise), embeds, clip, num_inference_steps=10, guidance_scale=5.0)
    found = error(out.latents, theirs.permute(0, 2, 3, 1))
    record_property("one stream", found)
    assert found <= 2e-5  # measured: 1.8e-6 at most (FaceID)
    assert out.text_stream_latents is None


# Against the PyTorch reference of Infinite-ID


def test_two_stream_trajectories_match_the_reference(case, noise, record_property):
    """With mixed attention and AdaIN-mean; the LoRA, where there is one, in the identity stream alone."""
    person = case.pipe.encode_identity(case.features)
    out = case.pipe(PROMPTS, person, latents=noise, steps=5, style_merge="adain_mean", output="latent")
    pipe = case.diffusers.pipe
    with torch.no_grad():
        tokens, _, pooled, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    unet = reference_torch.tiny_sdxl_unet()
    nobody, somebody = case.diffusers.tokens(*case.inputs)
    identity, text = reference_torch.two_stream_sample(
        unet,
        case.state,
        nchw(noise),
        reference_torch.Text(tokens, pooled),
        [reference_torch.IdentityTokens(somebody, nobody)],
        identity_unet=published.merged_lora(unet, case.state) if case.family.startswith("faceid") else None,
        steps=5,
        style_merge="adain_mean",
    )
    assert text is not None
    found = error(out.latents, identity.permute(0, 2, 3, 1))
    record_property("two streams", found)
    assert found <= 5e-5  # measured: 3.2e-6 at most (FaceID-Plus V2)
    assert error(out.text_stream_latents, text.permute(0, 2, 3, 1)) <= 5e-5


SCALES = [
    {"down": {"block_2": [0.0, 1.0]}, "up": {"block_0": [0.0, 1.0, 0.5]}},
    {"down": 0.3, "mid": 1.0, "up": {"block_1": 0.7}},
]


def test_scales_of_blocks_are_those_of_diffusers(tiny, noise, tmp_path):
    state = published.random_state("ip_adapter", reference_torch.tiny_sdxl_unet())
    file = published.write("ip_adapter", tmp_path, state)
    pipe, theirs = InfiniteIDPipeline.from_pretrained(tiny.model, file), Diffusers(tiny.model, file)
    pooled = np.random.default_rng(0).normal(size=32).astype(np.float32)
    person = pipe.encode_identity(FaceFeatures(clip_pooled=pooled))
    embeds = torch.tensor(np.stack([np.zeros_like(pooled), pooled]))
    images = []
    for scale in (*SCALES, 0.0):
        theirs.pipe.set_ip_adapter_scale(scale)
        expected = theirs.sample(PROMPTS, nchw(noise), embeds, num_inference_steps=10, guidance_scale=5.0)
        images.append(pipe(PROMPTS, person, latents=noise, steps=10, streams="one", id_scale=scale, output="latent"))
        # Measured: 1.5e-6 at most.
        assert error(images[-1].latents, expected.permute(0, 2, 3, 1)) <= 3e-5
    plain = pipe(PROMPTS, latents=noise, steps=10, output="latent").latents
    np.testing.assert_allclose(images[-1].latents, plain, atol=1e-5)  # measured: 2e-6
    assert np.abs(images[0].latents - plain).max() > 1e-3


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        ({"left": 1.0}, "'left': choose from down, mid, up"),
        ({"down": {"block_0": 1.0}}, r"down_blocks\.0, which has no cross-attention: the model has down_blocks\.1"),
        ({"down": {"2": [1.0]}}, r"1 numbers for down_blocks\.2, which has 2 transformers"),
        ({"mid": {"block_0": 1.0}}, r"mid\.block_0"),
        ({"up": {"first": 1.0}}, r"up\.first"),
        ({"up": "much"}, "id_scale of up_blocks is 'much': give a finite number"),
        ({"mid": float("inf")}, "id_scale of mid_block is inf"),
        (float("nan"), "id_scale is nan"),
    ],
)
def test_scales_that_cannot_be_used(scale, says):
    with pytest.raises(InputError, match=says):
        layer_scales(block_names(sdxl()), scale)


def test_one_stream_refuses_what_concerns_the_text_stream(pipe, tiny):
    person = pipe.encode_identity(FaceFeatures(**tiny.features(0)))
    for option in ({"attention": "mutual"}, {"text_stream": "shared"}, {"step_range": (1, None)}):
        with pytest.raises(InputError, match=f"{next(iter(option))} concerns the text stream"):
            pipe(PROMPTS, person, streams="one", **option)
    with pytest.raises(InputError, match="Unknown streams 'three'"):
        pipe(PROMPTS, person, streams="three")


def test_missing_features_are_named(case):
    needed = read_adapter_config(case.file).needs.fields
    with pytest.raises(InputError, match="also takes .*" + ".*".join(needed)):
        case.pipe.encode_identity(FaceFeatures())


def test_an_empty_image_may_be_given(case):
    """Where there is no image encoder at hand, its answer to an image of zeros is."""
    bare = with_adapter(case.pipe.adapter)
    if not read_adapter_config(case.file).needs.empty_image:
        bare.encode_identity(case.features)
        return
    with pytest.raises(InputError, match="give FaceFeatures its empty_clip_hidden_states too"):
        bare.encode_identity(case.features)
    ours = case.pipe.encode_identity(case.features)
    given = bare.encode_identity(complete(case))
    np.testing.assert_array_equal(given.unconditional, ours.unconditional)
    with pytest.raises(InputError, match=r"empty_clip_hidden_states has shape \[9, 32\] and .* takes \[257, 32\]"):
        bare.encode_identity(dataclasses.replace(case.features, empty_clip_hidden_states=np.zeros((9, 32))))


def with_adapter(adapter: IdentityAdapter | None) -> InfiniteIDPipeline:
    """What turns features into identities, without a base and an image encoder."""
    bare = InfiniteIDPipeline.__new__(InfiniteIDPipeline)
    bare.adapter, bare._make_image_encoder, bare.mesh = adapter, None, None
    return bare


def complete(case: Case) -> FaceFeatures:
    return dataclasses.replace(case.features, empty_clip_hidden_states=case.pipe._hidden_states_of_zeros)


def test_features_in_any_precision_give_half_precision_identities(case, tiny):
    """All identities have the adapter's dtype: another would be another program."""
    unet = load_unet(tiny.model, read_settings(tiny.model))
    exact = case.pipe.encode_identity(case.features)
    half = with_adapter(load_adapter(case.file, unet, dtype="bfloat16"))
    for dtype in (np.float64, jnp.bfloat16):
        features = jax.tree.map(lambda x, dtype=dtype: np.asarray(x).astype(dtype), complete(case))
        person = half.encode_identity(features)
        for ours, expected in ((person.tokens, exact.tokens), (person.unconditional, exact.unconditional)):
            assert ours.dtype == jnp.bfloat16
            assert error(ours.astype(jnp.float32), torch.tensor(np.asarray(expected))) <= 0.05  # measured: 0.019 (Plus)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nobody_has_an_embedding_of_zeros_in_any_precision(dtype):
    embeddings = jnp.stack([jnp.zeros(512), jnp.full(512, 40.0)]).astype(dtype)  # of which 512 squares leave fp16
    nobody, somebody = np.asarray(unit(embeddings), np.float32)
    np.testing.assert_array_equal(nobody, 0)
    np.testing.assert_allclose(somebody, 512**-0.5, rtol=4e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(case, value):
    for name in read_adapter_config(case.file).needs.fields:
        damaged = np.array(getattr(case.features, name))
        damaged[..., 3] = value
        with pytest.raises(InputError, match=f"{name} holds no numbers, or some that are not finite"):
            case.pipe.encode_identity(dataclasses.replace(case.features, **{name: damaged}))


@pytest.mark.parametrize("case", ["faceid_plusv2"], indirect=True)  # which has all that the others have
def test_a_mesh_and_a_batch_of_people_change_nothing(case, tiny, noise):
    """Rows of several people in prompt-major order, on one device and on eight, with a LoRA on some rows."""
    other = dataclasses.replace(complete(case), face_embedding=case.features.face_embedding[::-1])
    pair = (complete(case), other)
    options = {"latents": noise, "steps": 5, "style_merge": "adain_mean", "output": "latent"}
    alone = [case.pipe(PROMPTS, case.pipe.encode_identity(x), **options).latents for x in pair]
    spread = InfiniteIDPipeline.from_pretrained(tiny.model, case.file, mesh="data=2,fsdp=2,tensor=2")
    for pipe in (case.pipe, spread):
        both = pipe(PROMPTS, [pipe.encode_identity(x) for x in pair], **options)
        expected = np.stack(alone, axis=1).reshape(both.latents.shape)
        # Measured: 3.2e-6 of the largest latent on the mesh, nothing on one device.
        assert error(both.latents, torch.tensor(expected)) <= 2e-5
    assert np.abs(alone[0] - alone[1]).max() > 1e-2


# Files


@functools.cache
def sdxl() -> UNet2DConditionModel:
    return abstract(lambda rngs: UNet2DConditionModel(SDXL, rngs=rngs))


def write_header(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A safetensors file of zeros in fp16 that takes no room on the disk."""
    header, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


# What is said of each of SDXL's releases.
RELEASES = {
    "ip_adapter": "the pooled image embedding of OpenCLIP ViT-bigG/14",
    "ip_adapter_plus": "the penultimate hidden states of OpenCLIP ViT-H/14",
    "ip_adapter_full": "the penultimate hidden states of OpenCLIP ViT-H/14",
    "faceid": "a face embedding of 512 numbers (ArcFace), with a LoRA of rank 128",
    "faceid_plus": "FaceID-Plus V1",
    "faceid_plusv2": "FaceID-Plus V2",
}


@pytest.fixture(scope="module")
def torch_sdxl():
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel as TorchUNet

    with init_empty_weights():
        return TorchUNet.from_config(
            {
                **SDXL.to_dict(),
                "down_block_types": list(SDXL.down_block_types),
                "up_block_types": list(SDXL.up_block_types),
                "transformer_layers_per_block": list(SDXL.transformer_layers),
                "attention_head_dim": list(SDXL.heads),
                "block_out_channels": list(SDXL.block_out_channels),
            }
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_releases_of_full_size_fit_with_nothing_left_over(family, torch_sdxl, tmp_path):
    name = published.FILES[family].replace(".bin", ".safetensors")
    shapes = published.shapes(family, torch_sdxl, published.Sizes())
    file = write_header(tmp_path / name, shapes)
    config = read_adapter_config(file)
    assert RELEASES[family] in config.describe()
    assert config.cross_attention_dim == 2048
    adapter = abstract(lambda rngs: IdentityAdapter(config, sdxl(), rngs=rngs))
    expected = {entry.key: entry.shape for entry in key_map(adapter).values()}
    assert expected == shapes
    with ExitStack() as stack:
        check_keys(expected, open_tensors(file, stack), name)


@pytest.mark.parametrize("change", ["a layer of number 10^9", "a width of 0"])
def test_a_header_of_a_few_bytes_asks_for_no_large_model(change, torch_sdxl, tmp_path):
    shapes = published.shapes("ip_adapter_plus", torch_sdxl, published.Sizes())
    if change == "a width of 0":
        shapes = {key: (shape[0], 0) if key.endswith("to_k_ip.weight") else shape for key, shape in shapes.items()}
    else:
        shapes["image_proj.layers.1000000000.0.to_q.weight"] = (1280, 1280)
    with pytest.raises(InputError, match=r"not numbered from 0 on|no identity adapter of a known family"):
        read_adapter_config(write_header(tmp_path / "x.safetensors", shapes))


@pytest.mark.parametrize(
    ("name", "version"),
    [("faceid-plusv2_sdxl", 2), ("faceid-plus-v2", 2), ("Plus_V2", 2), ("my-plus-faceid-plusv2", 2), ("mine", 2),
     ("faceid-plus_sd15", 1), ("faceid-plus_v1", 1)],
)  # fmt: skip
def test_the_version_of_face_id_plus_is_told_by_the_name(name, version, torch_sdxl, tmp_path):
    """Alike here and in the runtime that is exported; the files' keys and shapes are the same."""
    shapes = published.shapes("faceid_plusv2", torch_sdxl, published.Sizes())
    file = write_header(tmp_path / f"{name}.safetensors", shapes)
    assert f"FaceID-Plus V{version}" in read_adapter_config(file).describe()
    assert infinite_id_diffusers.is_version_1(file) == (version == 1)


def test_the_order_of_files_is_that_of_the_releases():
    """down_blocks.1 = 1-7, down_blocks.2 = 9-47, up_blocks.0 = 49-107, up_blocks.1 = 109-119, mid = 121-139."""
    numbers: dict[str, list[int]] = {}
    names = block_names(sdxl())
    assert len(names) == 70
    for i, name in enumerate(names):
        numbers.setdefault(name.split(".attentions")[0], []).append(2 * i + 1)
    ends = {name: (found[0], found[-1]) for name, found in numbers.items()}
    assert ends == {
        "down_blocks.1": (1, 7),
        "down_blocks.2": (9, 47),
        "up_blocks.0": (49, 107),
        "up_blocks.1": (109, 119),
        "mid_block": (121, 139),
    }


def test_a_round_trip_keeps_every_bit(case, tiny, tmp_path):
    case.pipe.save_adapter(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter.safetensors")
    assert saved.keys() == case.state.keys()
    for key, value in case.state.items():
        assert torch.equal(saved[key], value), key
    config = read_adapter_config(tmp_path / "saved")  # V1 and V2 are told apart without the file's name
    file = tmp_path / "saved" / "adapter.safetensors"
    assert read_adapter_config(file) == config
    assert infinite_id_diffusers.read_adapter(file).config == infinite_id_diffusers.read_adapter(file.parent).config
    assert config == read_adapter_config(case.file)
    again = load_adapter(tmp_path / "saved", load_unet(tiny.model, read_settings(tiny.model)))
    for key, value in torch_state(again).items():
        np.testing.assert_array_equal(value, saved[key])


def test_inject_then_eject_leaves_the_unet_as_it_was(tiny, tmp_path):
    settings = read_settings(tiny.model)
    unet = load_unet(tiny.model, settings)
    before = torch_state(unet)
    file = published.write("faceid", tmp_path, published.random_state("faceid", reference_torch.tiny_sdxl_unet()))
    adapter = load_adapter(file, unet)
    inject(unet, adapter)
    assert torch_state(unet).keys() != before.keys()
    with pytest.raises(InputError, match="already holds an adapter"):
        inject(unet, adapter)
    eject(unet)
    after = torch_state(unet)
    assert after.keys() == before.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)


def altered(**changes: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a tiny Plus release, some of them changed, or left out where None."""
    found = published.shapes("ip_adapter_plus", reference_torch.tiny_sdxl_unet(), TINY)
    found |= {key.replace("__", "."): shape for key, shape in changes.items()}
    return {key: shape for key, shape in found.items() if shape is not None}


REFUSED = {
    "InstantID": (altered(image_proj__proj_in__weight=(48, 512)), "looks like InstantID's adapter"),
    "a LoRA": ({"lora_unet_down_blocks_1_attn2_to_k.lora_down.weight": (4, 64)}, "looks like a LoRA"),
    "a U-Net": ({"down_blocks.0.resnets.0.conv1.weight": (4, 4, 3, 3)}, "looks like a U-Net"),
    "a checkpoint": ({"model.diffusion_model.out.2.weight": (4, 4, 3, 3)}, "looks like a single-file checkpoint"),
    "PhotoMaker": (
        {"id_encoder.visual_projection.weight": (2048, 1024), "lora_weights.x.to_q_lora.down.weight": (64, 640)},
        "looks like PhotoMaker",
    ),
    "PuLID": ({"id_adapter.latents": (1, 16, 2048), "id_adapter_attn_layers.0.id_to_k.weight": (640, 2048)}, "PuLID"),
    "Kolors": (
        altered(image_proj__proj_in__weight=(2048, 1024), image_proj__latents=(1, 16, 2048)),
        "looks like Kolors' adapter",
    ),
    "no identity maps": (
        {"image_proj.latents": (1, 4, 48)},
        r"half an IP-Adapter: it holds nothing below ip_adapter\.",
    ),
    "no projection": (
        {"ip_adapter.1.to_k_ip.weight": (640, 2048)},
        r"half an SDXL adapter: it holds nothing below image_proj\.",
    ),
    "no widths": (altered(image_proj__proj_in__weight=None), r"misses image_proj\.proj_in\.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_of_another_kind_are_refused_with_what_they_look_like(name, tmp_path):
    shapes, says = REFUSED[name]
    with pytest.raises(InputError, match=says):
        read_adapter_config(write_header(tmp_path / "file.safetensors", shapes))


def test_embeddings_of_any_length_are_not_what_we_give(tmp_path):
    shapes = published.shapes("faceid", reference_torch.tiny_sdxl_unet(), TINY)
    with pytest.raises(InputError, match="here they have length 1: use ip-adapter-faceid-portrait_sdxl"):
        read_adapter_config(write_header(tmp_path / "ip-adapter-faceid-portrait_sdxl_unnorm.safetensors", shapes))


def test_a_folder_that_contradicts_its_weights_is_refused(case, tmp_path):
    case.pipe.save_adapter(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    changes = [({"family": "instant_id"}, "says 'instant_id' and the weights are")]
    if case.family.startswith("faceid_plus"):
        changes += [({"shortcut_scale": value}, "shortcut_scale") for value in ("1.0", True, float("nan"), [1.0])]
    for change, says in changes:
        file.write_text(json.dumps(saved | change))
        with pytest.raises(InputError, match=says):
            read_adapter_config(tmp_path)


def test_reading_without_a_base_holds_the_keys_against_sdxl(torch_sdxl, tmp_path):
    """What export reads; here headers of which the numbers are never reached."""
    shapes = published.shapes("ip_adapter", torch_sdxl, published.Sizes())
    last = {key: shape for key, shape in shapes.items() if not key.startswith("ip_adapter.139.to_k")}
    narrow = shapes | {"ip_adapter.1.to_v_ip.weight": (320, 2048), "ip_adapter.141.to_k_ip.weight": (1280, 2048)}
    old = {key: tuple(768 if n == 2048 else n for n in shape) for key, shape in shapes.items()}
    old["image_proj.proj.weight"], old["image_proj.proj.bias"] = (4 * 768, 1024), (4 * 768,)
    for number, (changed, says) in enumerate(
        (
            (last, r"1 missing: ip_adapter\.139\.to_k_ip\.weight"),
            (narrow, r"1 surplus: ip_adapter\.141\.to_k_ip.*1 of another shape: ip_adapter\.1\.to_v_ip.*320x2048"),
            (old, "it looks like one for SD 1.5"),
        )
    ):
        with pytest.raises(InputError, match=says):
            read_adapter(write_header(tmp_path / f"{number}.safetensors", changed))
    tiny_shapes = published.shapes("ip_adapter", reference_torch.tiny_sdxl_unet(), TINY)
    tiny_shapes["image_proj.norm.weight"] = (63,)
    with pytest.raises(InputError, match=r"image_proj\.norm\.weight \(63 instead of 64\)"):
        read_adapter(write_header(tmp_path / "tiny.safetensors", tiny_shapes))


def test_an_adapter_for_another_base_is_refused_with_its_cause(tiny, tmp_path):
    state = published.random_state("ip_adapter", reference_torch.tiny_sdxl_unet())
    for width, like in ((768, "SD 1.5"), (1024, "SD 2")):
        wide = {
            key: torch.zeros(value.shape[0] * width // 64, *value.shape[1:])
            if key.startswith("image_proj.proj")
            else torch.zeros(*value.shape[:-1], width)
            for key, value in state.items()
        }
        path = published.write("ip_adapter", tmp_path, wide)
        with pytest.raises(InputError, match=f"width {width}, the model 64: it looks like one for {like};"):
            InfiniteIDPipeline.from_pretrained(tiny.model, path)
    # The right width, but layers of another U-Net: every key is told.
    del state["ip_adapter.33.to_k_ip.weight"], state["ip_adapter.33.to_v_ip.weight"]
    state["ip_adapter.35.to_k_ip.weight"] = torch.zeros(64, 64)
    path = published.write("ip_adapter", tmp_path, state)
    says = r"2 missing: ip_adapter\.33\.to_k_ip.*1 surplus: ip_adapter\.35.*this looks like an IP-Adapter"
    with pytest.raises(InputError, match=says):
        InfiniteIDPipeline.from_pretrained(tiny.model, path)


def test_a_folder_may_hold_one_published_file(tmp_path):
    unet = reference_torch.tiny_sdxl_unet()
    with pytest.raises(InputError, match=r"has no adapter_config\.json and holds none"):
        find_adapter(tmp_path)
    path = published.write("ip_adapter", tmp_path, published.random_state("ip_adapter", unet))
    assert find_adapter(tmp_path) == path
    published.write("faceid", tmp_path, published.random_state("faceid", unet))
    with pytest.raises(InputError, match=r"holds 2 files of weights \(ip-adapter-faceid_sdxl\.bin, "):
        find_adapter(tmp_path)


# Checksums


def test_one_flipped_bit_is_found(tiny, pipe, tmp_path):
    pipe.save_adapter(tmp_path)
    file = tmp_path / "adapter.safetensors"
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    unet = load_unet(tiny.model, read_settings(tiny.model))
    for place in (start, (start + len(whole)) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(InputError, match=r"adapter\.safetensors is damaged \(its checksum"):
            load_adapter(tmp_path, unet)
    file.write_bytes(whole)
    load_adapter(tmp_path, unet)


def test_a_bit_flipped_in_the_header_is_found(tiny, pipe, tmp_path):
    """Whatever it hits (a name, a type, a shape, an offset, the checksum), the file is not taken for whole."""
    pipe.save_adapter(tmp_path)
    file = tmp_path / "adapter.safetensors"
    whole = file.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    unet = load_unet(tiny.model, read_settings(tiny.model))
    rng, refused, pipe_state = np.random.default_rng(0), [], torch_state(pipe.adapter)
    for place in rng.integers(0, end, 60):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(0, 7)
        file.write_bytes(damaged)
        try:
            loaded = torch_state(load_adapter(tmp_path, unet))
        except InputError as error:
            refused.append(str(error))
        else:  # the name of the field that holds the checksum
            for key, value in pipe_state.items():
                np.testing.assert_array_equal(loaded[key], value)
    assert len(refused) >= 50
    assert all(str(tmp_path) in message for message in refused)


@pytest.mark.parametrize("size", [0, 4, 100, -5])
def test_truncated_files_are_named(tiny, pipe, tmp_path, size):
    pipe.save_adapter(tmp_path)
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(InputError, match=r"adapter\.safetensors is not a whole safetensors file"):
        InfiniteIDPipeline.from_pretrained(tiny.model, tmp_path)


# Our own adapters of other structures


@pytest.mark.parametrize(
    "change",
    [
        {"clip_mapper": "resampler", "resampler_dim": 48, "resampler_heads": 2, "resampler_queries": 4},
        {"clip_mapper": "none", "face_tokens": 4},
        {"face_tokens": 0, "clip_layer": "penultimate"},
    ],
    ids=["resampler", "face only", "CLIP only"],
)
def test_other_structures_are_kept_in_folders(tiny, tmp_path, change):
    unet = load_unet(tiny.model, read_settings(tiny.model))
    config = AdapterConfig(**{"clip_dim": 32, "face_dim": 16, "cross_attention_dim": 64} | change)
    adapter = IdentityAdapter(config, unet, rngs=nnx.Rngs(0))
    save_adapter(adapter, tmp_path)
    again = load_adapter(tmp_path, unet)
    before, after = torch_state(adapter), torch_state(again)
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)
    features = FaceFeatures(**{name: x[None] for name, x in tiny.features(0).items()})
    tokens = again(features)
    expected = {"resampler": 5, "none": 4}.get(str(change.get("clip_mapper")), 257)
    assert tokens.shape == (1, expected, 64)
    np.testing.assert_array_equal(tokens, adapter(features))
