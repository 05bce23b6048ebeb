"""export.py: from checkpoints and adapters to what PyTorch reads, bit for bit, and what it refuses."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from flax import nnx
from safetensors.torch import load_file

import export
from infinite_id_jax import FaceFeatures, InfiniteIDPipeline
from infinite_id_jax.identity.config import AdapterConfig
from infinite_id_jax.identity.inject import IdentityAdapter
from infinite_id_jax.training.checkpoint import Checkpoints
from infinite_id_jax.training.state import OptimizerConfig, adapter_arrays, initial_state
from infinite_id_jax.weights.adapter import read_adapter_config, save_adapter
from infinite_id_jax.weights.export import torch_state
from infinite_id_jax.weights.folder import load_unet, read_settings
from tests import published, reference_torch
from tests.published import FAMILIES, Diffusers

PROMPTS = ["a photo of a man in the snow", "a drawing of a dog"]
WIDTHS = {"clip_dim": 32, "face_dim": 16, "cross_attention_dim": 64}


@pytest.fixture(scope="module")
def unet(tiny):
    return load_unet(tiny.model, read_settings(tiny.model))


def adapter(unet, **change) -> IdentityAdapter:
    return IdentityAdapter(AdapterConfig(**(WIDTHS | change)), unet, rngs=nnx.Rngs(7))


def run(*options: object) -> int:
    return export.main([str(option) for option in options])


def assert_holds(file, state: dict[str, np.ndarray]) -> None:
    """Every bit."""
    found = load_file(file)
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(found[key], torch.from_numpy(np.array(value))), key


# Training's checkpoints


@pytest.fixture(scope="module", params=[None, 0.9], ids=["no average", "average"])
def trained(request, unet, tmp_path_factory):
    """A run's output folder, and the adapter that its newest checkpoint stands for."""
    folder, modules = tmp_path_factory.mktemp("run"), []
    run = {"adapter": AdapterConfig(**WIDTHS).to_dict(), "data": {"dataset": "0123456789abcdef"}, "dtype": "float32"}
    checkpoints = Checkpoints(folder / "checkpoints", 2, run)
    for step in (9, 10):
        module = IdentityAdapter(AdapterConfig(**WIDTHS), unet, rngs=nnx.Rngs(step))
        state = initial_state(OptimizerConfig(ema_decay=request.param), adapter_arrays(module))
        if request.param is not None:  # the average is what is exported, not the newest weights
            state = dataclasses.replace(state, adapter={key: x + 1 for key, x in state.adapter.items()})
        state = dataclasses.replace(state, step=jnp.asarray(step, jnp.int32))
        checkpoints.save(state, step)
        modules.append(module)
    checkpoints.wait()
    checkpoints.close()
    rows = ["step,loss,validation_loss", "5,0.5,0.25", "10,0.125,", "15,0.0,0.0"]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    return folder, *modules


def test_a_checkpoint_becomes_an_adapter_folder_bit_for_bit(trained, tiny, tmp_path, capsys):
    folder, before, newest = trained
    assert run("--checkpoint", folder, "--output", tmp_path / "out", "--base-model", "owner/sdxl") == 0
    assert str(tmp_path / "out" / "adapter.safetensors") in capsys.readouterr().out
    assert_holds(tmp_path / "out" / "adapter.safetensors", torch_state(newest))
    again = InfiniteIDPipeline.from_pretrained(tiny.model, tmp_path / "out").adapter
    for key, value in torch_state(again).items():
        np.testing.assert_array_equal(value, torch_state(newest)[key])

    card = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "base_model: owner/sdxl",
        "10 steps",
        "0123456789abcdef",
        "| loss | 0.125 |",
        "| validation_loss | 0.25 |",
    ):
        assert said in card

    assert run("--checkpoint", folder / "checkpoints" / "9", "--output", tmp_path / "nine") == 0
    assert_holds(tmp_path / "nine" / "adapter.safetensors", torch_state(before))


def test_a_damaged_checkpoint_is_named(trained, tmp_path, capsys):
    import shutil

    folder = shutil.copytree(trained[0], tmp_path / "run")
    for file in (folder / "checkpoints" / "10" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    assert run("--checkpoint", folder, "--output", tmp_path / "out") == 2
    assert f"{folder}/checkpoints/10 cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Adapters


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["infinite_id", "comfyui"])
def test_published_adapters_keep_every_bit(family, form, tmp_path):
    state = published.random_state(family, reference_torch.tiny_sdxl_unet())
    file = published.write(family, tmp_path, {key: value.half() for key, value in state.items()})
    fits = form == "infinite_id" or family != "ip_adapter_full"
    assert run("--checkpoint", file, "--output", tmp_path / "out", "--format", form) == (0 if fits else 2)
    if fits:
        [written] = (tmp_path / "out").glob("*.safetensors")
        assert_holds(written, {key: value.half().numpy() for key, value in state.items()})
        # Its name, or the configuration beside it, tells the two versions of FaceID-Plus apart.
        assert read_adapter_config(tmp_path / "out") == read_adapter_config(file)


# {structure: what it is in the releases' terms}
STRUCTURES = {
    "faceid_sdxl": {"clip_mapper": "none", "face_tokens": 4},
    "plus_sdxl": {
        "face_tokens": 0, "clip_mapper": "resampler", "clip_layer": "penultimate",
        "resampler_dim": 48, "resampler_heads": 2, "resampler_queries": 4,
    },
    "full-face_sdxl": {"face_tokens": 0, "clip_layer": "penultimate"},
}  # fmt: skip


@pytest.mark.parametrize("family", STRUCTURES)
def test_unmodified_diffusers_samples_as_we_do_where_the_structure_allows(
    family, unet, tiny, compiled, tmp_path, record_property
):
    save_adapter(adapter(unet, **STRUCTURES[family]), tmp_path / "ours")
    assert run("--checkpoint", tmp_path / "ours", "--output", tmp_path / "out", "--format", "diffusers") == 0
    theirs = Diffusers(tiny.model, tmp_path / "out" / f"ip-adapter-{family}.safetensors")

    features = FaceFeatures(**tiny.features(0))
    length = np.linalg.norm(features.face_embedding)
    seen = features.face_embedding / length if family == "faceid_sdxl" else features.clip_hidden_states
    noise = np.random.default_rng(5).normal(size=(2, 8, 8, 4)).astype(np.float32)
    pair = torch.tensor(np.stack([np.zeros_like(seen), seen]))
    latents = torch.from_numpy(np.ascontiguousarray(noise.transpose(0, 3, 1, 2)))
    expected = theirs.sample(PROMPTS, latents, pair, num_inference_steps=5, guidance_scale=5.0)

    pipe = InfiniteIDPipeline.from_pretrained(tiny.model, tmp_path / "out")
    person = pipe.encode_identity(features)
    out = pipe(PROMPTS, person, latents=noise, steps=5, streams="one", output="latent").latents
    error = float(np.abs(out - expected.permute(0, 2, 3, 1).numpy()).max() / expected.abs().max())
    record_property("diffusers", error)
    assert error <= 1e-3  # measured: 2.5e-6 at most (Full)


def test_comfyui_takes_a_face_alone_as_portrait(unet, tmp_path):
    save_adapter(adapter(unet, clip_mapper="none", face_dim=512, face_tokens=16), tmp_path / "ours")
    assert run("--checkpoint", tmp_path / "ours", "--output", tmp_path / "out", "--format", "comfyui") == 0
    state = load_file(tmp_path / "out" / "ip-adapter-faceid_sdxl.safetensors")
    shapes = {key: tuple(value.shape) for key, value in state.items() if key.startswith("image_proj.")}
    expected = published.projection_shapes("faceid", published.Sizes(width=64, tokens=16))
    assert shapes == {f"image_proj.{key}": shape for key, shape in expected.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, "puts CLIP's tokens and face tokens into one attention"),
        ({"face_tokens": 0}, "sees CLIP's last hidden states"),
        (STRUCTURES["full-face_sdxl"], "adapter.clip_mapper=resampler"),
        (STRUCTURES["plus_sdxl"], "with resampler_queries=16, resampler_dim=1280, resampler_heads=20 only"),
        (STRUCTURES["faceid_sdxl"], "with face_dim=512, face_tokens=16 only"),
    ],
)
def test_comfyui_refuses_what_its_nodes_do_not_compute(unet, tmp_path, capsys, change, says):
    save_adapter(adapter(unet, **change), tmp_path / "ours")
    assert run("--checkpoint", tmp_path / "ours", "--output", tmp_path / "out", "--format", "comfyui") == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run("--checkpoint", tmp_path / "ours", "--output", tmp_path / "out", "--format", "diffusers") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "README.md", "adapter.safetensors", "adapter_config.json", "infinite_id_diffusers.py", "pipeline.py",
    }  # fmt: skip


def test_diffusers_finds_the_pipeline_in_the_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert run("--checkpoint", tiny.adapter, "--output", tmp_path / "out", "--format", "diffusers") == 0
    pipe = DiffusionPipeline.from_pretrained(
        tiny.model, custom_pipeline=str(tmp_path / "out"), trust_remote_code=True, image_encoder=None
    )
    pipe.load_infinite_id(tmp_path / "out")
    person = pipe.encode_identity(**tiny.features(0))
    assert person.tokens.shape[-2:] == (258, 64)


# A whole base


def test_a_base_goes_out_and_comes_back(tiny, unet, tmp_path):
    assert run("--checkpoint", tiny.model, "--output", tmp_path / "folder", "--format", "diffusers") == 0
    assert_holds(tmp_path / "folder" / "unet" / "diffusion_pytorch_model.safetensors", torch_state(unet))
    assert run("--checkpoint", tmp_path / "folder", "--output", tmp_path / "file", "--format", "comfyui") == 0
    [file] = (tmp_path / "file").iterdir()
    assert file.name == "folder.safetensors"
    assert any(key.startswith("model.diffusion_model.input_blocks.") for key in load_file(file))


# What cannot be exported


def test_each_mistake_gets_one_sentence(tiny, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "text.safetensors").write_text("no weights")
    out = tmp_path / "out"
    for options, says in (
        (["--checkpoint", tiny.adapter, "--output", tmp_path / "there"], "exists already"),
        (["--checkpoint", tmp_path / "none", "--output", out], "none does not exist"),
        (["--checkpoint", tmp_path / "there", "--output", out], "has no adapter_config.json and holds none"),
        (["--checkpoint", tmp_path / "text.safetensors", "--output", out], "is not a whole safetensors file"),
        (["--checkpoint", tiny.adapter, "--output", out, "--data", tmp_path / "data"], "no finished dataset"),
        (["--checkpoint", tiny.adapter, "--output", out, "--dtype", "float16"], "concerns a whole SDXL"),
        (["--checkpoint", tiny.model, "--output", out, "--dtype", "int8"], "--dtype int8 is unknown"),
    ):
        assert run(*options) == 2
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1
        assert not out.exists()


def test_the_card_tells_of_the_data(tiny, tmp_path):
    from data_pipeline.provenance import Row, save_rows, summarise

    rows = [
        Row(0, "a.jpg", "ann", licence="CC0", source="museum"),
        Row(1, "b.jpg", "ann", licence="CC0", source="museum"),
        Row(2, "c.jpg", "bob", licence="CC-BY"),
        Row(3, "d.jpg", "eve", reason="no_face", licence="CC-BY-NC"),
    ]
    save_rows(rows, tmp_path / "provenance.jsonl")
    (tmp_path / "summary.json").write_text(json.dumps(summarise(rows, "0")))
    options = ("--checkpoint", tiny.adapter, "--output", tmp_path / "out", "--data", tmp_path, "--licence", "MIT")
    assert run(*options) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "| photos | 3 |",
        "| people | 2 |",
        "CC0 (2), CC-BY (1)",
        "museum (2), unknown (1)",
        "MIT. These weights",
    ):
        assert said in card
