"""export.py: from checkpoints and adapters to what PyTorch reads, bit for bit, and what it refuses."""

import dataclasses
import gc
import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from flax import nnx
from safetensors.torch import load_file, save_file

import export
import train
from configs import debug
from data_pipeline.provenance import Row, save_rows, summarise
from infinite_id_jax import FaceFeatures, InfiniteIDPipeline
from infinite_id_jax.errors import InputError
from infinite_id_jax.identity.config import AdapterConfig
from infinite_id_jax.identity.inject import IdentityAdapter
from infinite_id_jax.sharding import make_mesh
from infinite_id_jax.training.checkpoint import Checkpoints
from infinite_id_jax.training.state import OptimizerConfig, adapter_arrays, initial_state
from infinite_id_jax.weights.adapter import load_adapter, read_adapter_config, save_adapter
from infinite_id_jax.weights.export import save_tensors, torch_state
from infinite_id_jax.weights.folder import load_base, load_unet, read_settings
from infinite_id_jax.weights.lora import LoRA, Update, attach_lora
from infinite_id_jax.weights.model_card import Facts, model_card
from infinite_id_jax.weights.save_base import save_base, save_single_file
from tests import published, reference_torch
from tests.published import FAMILIES, Diffusers
from tests.test_loader import write as write_dataset

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


@pytest.fixture
def data(tmp_path) -> Path:
    """What the card reads of a dataset."""
    rows = [
        Row(0, "a.jpg", "ann", licence="CC0", source="museum"),
        Row(1, "b.jpg", "ann", licence="CC0", source="museum"),
        Row(2, "c.jpg", "bob", licence="CC-BY"),
        Row(3, "d.jpg", "eve", reason="no_face", licence="CC-BY-NC"),
    ]
    folder = tmp_path / "data"
    folder.mkdir()
    save_rows(rows, folder / "provenance.jsonl")
    (folder / "summary.json").write_text(json.dumps(summarise(rows, "0")))
    return folder


# Training's checkpoints


@pytest.fixture(scope="module")
def description(tiny, tmp_path_factory):
    """What train.py writes down of a run."""
    data = tmp_path_factory.mktemp("data")
    write_dataset(data)
    config = dataclasses.replace(
        debug.config,
        adapter=AdapterConfig(**WIDTHS),
        model=dataclasses.replace(debug.config.model, path=str(tiny.model)),
        data=dataclasses.replace(debug.config.data, path=str(data)),
        run=dataclasses.replace(debug.config.run, validate_every=0),
    )
    loader = train.open_data(config, make_mesh("data=1")).train.loader
    model = train.Model(tiny.model, None, None, None, None, None)
    return train.describe_run(config, model, loader)


@pytest.fixture(scope="module", params=[None, 0.9], ids=["no average", "average"])
def trained(request, unet, description, tmp_path_factory):
    """A run's output folder, and the adapter that its newest checkpoint stands for."""
    folder, modules = tmp_path_factory.mktemp("run"), []
    checkpoints = Checkpoints(folder / "checkpoints", 2, description)
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
    rows = ["step,loss,validation_loss", "5,0.5,0.25", "10,0.125,", "15,0.0,0.0", "torn,1", ""]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    return folder, *modules


def test_a_checkpoint_becomes_an_adapter_folder_bit_for_bit(trained, unet, description, tmp_path, capsys):
    folder, before, newest = trained
    assert run("--checkpoint", folder, "--output", tmp_path / "out", "--base-model", "owner/sdxl") == 0
    assert str(tmp_path / "out" / "adapter.safetensors") in capsys.readouterr().out
    assert_holds(tmp_path / "out" / "adapter.safetensors", torch_state(newest))
    again = load_adapter(tmp_path / "out", unet)
    for key, value in torch_state(again).items():
        np.testing.assert_array_equal(value, torch_state(newest)[key])

    card = (tmp_path / "out" / "README.md").read_text()
    for said in (
        'base_model: "owner/sdxl"',
        "10 steps",
        f"| fingerprint of the dataset | {description['data']['dataset']} |",
        f"| model.unet | {description['model']['unet']} |",
        "| optimizer.learning_rate | 0.001 |",
        "| adapter.clip_mapper | mlp |",
        "| loss | 0.125 |",
        "| validation_loss | 0.25 |",
    ):
        assert said in card

    assert run("--checkpoint", folder / "checkpoints" / "9", "--output", tmp_path / "nine") == 0
    assert_holds(tmp_path / "nine" / "adapter.safetensors", torch_state(before))


def test_a_damaged_checkpoint_is_named(trained, tmp_path, capsys):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    for file in (folder / "checkpoints" / "10" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    assert run("--checkpoint", folder, "--output", tmp_path / "out") == 2
    assert f"{folder}/checkpoints/10 cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_without_checkpoints(tiny, tmp_path, capsys):
    """One that has saved none yet, and one of which only the result was kept."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "metrics.csv").write_text("step,loss\n1,0.5\n")
    for path in (folder, folder / "checkpoints"):
        assert run("--checkpoint", path, "--output", tmp_path / "out") == 2
        assert "a run of train.py that has saved nothing yet" in capsys.readouterr().err
    shutil.copytree(tiny.adapter, folder / "adapter")
    assert run("--checkpoint", folder, "--output", tmp_path / "out") == 0
    names = "adapter.safetensors"
    assert_holds(tmp_path / "out" / names, {k: v.numpy() for k, v in load_file(tiny.adapter / names).items()})


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
    family, unet, tiny, tmp_path, record_property
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
    expected = theirs.sample(PROMPTS, latents, pair, num_inference_steps=10, guidance_scale=5.0)

    pipe = InfiniteIDPipeline.from_pretrained(tiny.model, tmp_path / "out")
    person = pipe.encode_identity(features)
    out = pipe(PROMPTS, person, latents=noise, steps=10, streams="one", output="latent").latents
    error = float(np.abs(out - expected.permute(0, 2, 3, 1).numpy()).max() / expected.abs().max())
    record_property("diffusers", error)
    assert error <= 2e-5  # measured: 1.5e-6 at most (Full)


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


# The code in the cards


def code_blocks(folder: Path) -> list[str]:
    """The Python in the card, with two steps in place of thirty."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert all("steps=30" in block for block in blocks)
    return [block.replace("steps=30", "steps=2") for block in blocks]


@pytest.fixture
def modules(tmp_path, monkeypatch) -> None:
    """Where diffusers copies the code that it runs."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


# The others have an input as one of these, or as ours below.
@pytest.mark.parametrize("family", ["ip_adapter", "ip_adapter_plus", "faceid_plus", "faceid_plusv2"])
def test_the_code_in_a_card_of_a_published_family_runs(family, tiny, modules, tmp_path):
    """With this project's runtime and with diffusers' `load_ip_adapter`, whose projection gives what it should."""
    state = published.random_state(family, reference_torch.tiny_sdxl_unet())
    state = {key: value for key, value in state.items() if "_lora." not in key}  # which takes seconds to load
    file = published.write(family, tmp_path, state)
    out = tmp_path / "out"
    assert run("--checkpoint", file, "--output", out, "--format", "diffusers") == 0
    generator = torch.Generator().manual_seed(3)
    hidden, empty, pooled, face = (torch.randn(shape, generator=generator) for shape in ((257, 32), (257, 32), 32, 16))
    seen = {
        "clip_hidden_states": hidden,
        "empty_clip_hidden_states": empty,
        "clip_pooled": pooled,
        "face_embedding": face / face.norm(),
    }
    runtime, plain = code_blocks(out)
    names = {"SDXL": str(tiny.model), "FOLDER": str(out), **seen}
    exec(runtime, dict(names))
    exec(plain, names)
    assert names["image"].size == (128, 128)
    projection = names["pipe"].unet.encoder_hid_proj.image_projection_layers[0]
    needs = read_adapter_config(file).needs
    clip = torch.stack([empty, hidden])
    first = seen["face_embedding"] if needs.face_dim else pooled
    embeds = clip if family == "ip_adapter_plus" else torch.stack([torch.zeros_like(first), first])
    theirs = Diffusers(tiny.model, file, family == "faceid_plusv2")
    expected = theirs.tokens(embeds, clip if family.startswith("faceid_plus") else None)
    torch.testing.assert_close(projection(names["pair"][:, 0]), expected, rtol=0, atol=0)


def test_the_code_in_our_cards_runs(tiny, unet, modules, tmp_path):
    features = tiny.features(0)
    for form in ("infinite_id", "diffusers"):
        assert run("--checkpoint", tiny.adapter, "--output", tmp_path / form, "--format", form) == 0
        names = {"SDXL": str(tiny.model), "FOLDER": str(tmp_path / form), "features": FaceFeatures(**features)}
        [block] = code_blocks(tmp_path / form)
        names |= features
        exec(block.replace('"person.jpg"', "features"), names)
        assert names["person"].tokens.shape[-2:] == (258, 64)
    for structure in ("faceid_sdxl", "full-face_sdxl"):  # of the face alone, and of CLIP alone
        ours, out = tmp_path / f"ours {structure}", tmp_path / structure
        save_adapter(adapter(unet, **STRUCTURES[structure]), ours)
        assert run("--checkpoint", ours, "--output", out, "--format", "diffusers") == 0
        names = {"SDXL": str(tiny.model), "FOLDER": str(out)}
        names |= {name: torch.from_numpy(value) for name, value in features.items()}
        for block in code_blocks(out):
            exec(block, dict(names))


@pytest.mark.parametrize("family", ["faceid", "ip_adapter_plus"])
def test_the_card_for_comfyui_claims_no_more_than_was_done(family, tmp_path):
    file = published.write(family, tmp_path, published.random_state(family, reference_torch.tiny_sdxl_unet()))
    assert run("--checkpoint", file, "--output", tmp_path / "out", "--format", "comfyui") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "It was not run in ComfyUI." in card
    assert ("models/loras" in card) == ("pip install peft" in card) == (family == "faceid")


def test_what_users_write_stays_text_in_the_card():
    """In YAML, in Markdown's tables and in running text."""
    base, licence = 'my "SDXL": v2 # final\n- x', "CC BY-NC 4.0 | <b>`only`</b>\nfor research."
    facts = Facts("x", base_model=base, licence=licence, step=3, run={"data": {"dataset": "0"}, "a|`b`": "<i>\n*x*"})
    card = model_card(facts, {"a": "b"}, "")
    _, header, text = card.split("---\n", 2)
    said = yaml.safe_load(header)
    assert said["base_model"] == 'my "SDXL": v2 # final - x'
    assert said["license"] == "other"
    assert said["license_name"] == "cc-by-nc-4.0-b-only-b-for-research"
    assert r"| a\|\`b\` | \<i\> \*x\* |" in text
    assert r"CC BY-NC 4.0 \| \<b\>\`only\`\</b\> for research. These weights" in text
    for odd in ("", "\x7f\udcff", "許諾"):
        assert "license_name" not in yaml.safe_load(model_card(Facts("x", licence=odd), {}, "").split("---\n")[1])


# A whole base


def test_a_base_goes_out_and_comes_back(tiny, unet, tmp_path, capsys):
    """Its CLIP image encoder too, which is copied; the code in its card runs."""
    model = shutil.copytree(tiny.model, tmp_path / "sdxl-1.0")
    folder = tmp_path / "folder"
    options = ("--base-model", "owner/sdxl", "--licence", "MIT")
    assert run("--checkpoint", model, "--output", folder, "--format", "diffusers", *options) == 0
    assert "in float32; image_encoder copied unchanged" in capsys.readouterr().out
    assert_holds(folder / "unet" / "diffusion_pytorch_model.safetensors", torch_state(unet))
    for file in (model / "image_encoder").iterdir():
        assert (folder / "image_encoder" / file.name).read_bytes() == file.read_bytes()
    (model / "image_encoder" / "notes.bin").write_bytes(b"a pickle, maybe")
    card = (folder / "README.md").read_text()
    for said in ('license_name: "mit"', "# Stable Diffusion XL in float32, made from sdxl-1.0", "| image_encoder/ |"):
        assert said in card
    assert str(tmp_path) not in card
    names = {"FOLDER": str(folder)}
    [block] = code_blocks(folder)
    exec(block, names)
    assert names["pipe"].image_encoder.config.hidden_size == tiny.clip_dim

    copied = tmp_path / "copied"
    copied.mkdir()
    (copied / "model_index.json").write_text("{}")
    export.copy_parts(model, copied, ["image_encoder"])
    assert not (copied / "image_encoder" / "notes.bin").exists()
    (tmp_path / "secret.json").write_text("{}")
    (model / "image_encoder" / "more.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(InputError, match=r"more\.json is a link out of the model"):
        export.copy_parts(model, tmp_path / "refused", ["image_encoder"])
    (model / "image_encoder" / "more.json").unlink()

    assert run("--checkpoint", model, "--output", tmp_path / "file", "--format", "comfyui") == 0
    assert "image_encoder left out" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "file").iterdir()} == {"README.md", "sdxl-1.0.safetensors"}
    state = load_file(tmp_path / "file" / "sdxl-1.0.safetensors")
    assert any(key.startswith("model.diffusion_model.input_blocks.") for key in state)
    assert "Put `sdxl-1.0.safetensors` into" in (tmp_path / "file" / "README.md").read_text()

    single = ("--checkpoint", tmp_path / "file" / "sdxl-1.0.safetensors", "--output", tmp_path / "back")
    assert run(*single) == 2  # a tiny one
    assert "name it with --model-config" in capsys.readouterr().err
    assert run(*single, "--model-config", model) == 0
    assert_holds(tmp_path / "back" / "unet" / "diffusion_pytorch_model.safetensors", torch_state(unet))


def test_a_base_in_half_precision_says_where_it_is_not(tiny, data, tmp_path, capsys):
    options = ("--dtype", "float16", "--data", data)
    assert run("--checkpoint", tiny.model, "--output", tmp_path / "half", *options) == 0
    kind = "Stable Diffusion XL in float16 (the VAE in float32, as it overflows in float16)"
    assert kind in capsys.readouterr().out
    card = (tmp_path / "half" / "README.md").read_text()
    assert kind in card
    assert "| photos | 3 |" in card
    for part, dtype in (("unet", torch.float16), ("vae", torch.float32), ("text_encoder", torch.float16)):
        [file] = (tmp_path / "half" / part).glob("*.safetensors")
        assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}


def test_one_part_of_a_base_is_held_at_a_time(tiny):
    """Whenever Python may collect garbage by itself."""
    gc.collect()
    gc.disable()
    try:
        before = held()
        parts = export.base_parts(tiny.model, read_settings(tiny.model), "float32")
        assert next(parts)[0] == "unet"
        unet = held() - before
        part, vae = next(parts)
        assert part == "vae"
        assert sum(array.nbytes for array in jax.tree.leaves(nnx.state(vae))) == held() - before < unet / 10
    finally:
        gc.enable()


def held() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


def test_a_damaged_part_of_a_base_leaves_nothing(tiny, tmp_path, capsys):
    """It is found after others were written."""
    model = shutil.copytree(tiny.model, tmp_path / "model")
    [file] = (model / "text_encoder_2").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    assert run("--checkpoint", model, "--output", tmp_path / "out") == 2
    assert f"{file} is not a whole safetensors file" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_base_with_a_lora_beside_it_is_not_saved(tiny, tmp_path):
    base = load_base(tiny.model)
    for part, module, layer in (
        ("unet", base.unet, "time_embedding.linear_1"),
        ("text_encoder", base.text_encoders[0], "encoder.layers.0.self_attn.q_proj"),
    ):
        outputs, inputs = torch_state(module)[f"{layer}.weight"].shape
        update = Update(np.ones((inputs, 1), np.float32), np.ones((1, outputs), np.float32), 1.0)
        attached = attach_lora(base, LoRA({}, {}, {})._replace(**{part: {layer: update}}), "anna")
        for save in (save_base, save_single_file):
            with pytest.raises(InputError, match="has the LoRA anna beside its layers: merge that first"):
                save(attached, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_equal_tensors_make_equal_files_that_others_may_read(tmp_path):
    tensors = {f"layer.{i}": np.full((i + 1, 2), i, np.float32) for i in range(5)}
    for i in range(6):
        save_tensors(tensors, tmp_path / f"{i}.safetensors")
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(6)}) == 1
    old = os.umask(0o027)
    try:
        save_tensors(tensors, tmp_path / "masked.safetensors")
        (tmp_path / "plain").write_text("")
    finally:
        os.umask(old)
    mode = (tmp_path / "plain").stat().st_mode
    assert mode & 0o777 == 0o640
    assert (tmp_path / "masked.safetensors").stat().st_mode == mode


# What cannot be exported


def test_each_mistake_gets_one_sentence(tiny, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "nope.pt").write_text("no weights")
    lora = {f"lora_unet_x.lora_{way}.weight": torch.zeros(2, 2) for way in ("up", "down")}
    save_file(lora, tmp_path / "lora.safetensors")
    torch.save(lora, tmp_path / "lora.ckpt")
    (tmp_path / "link").symlink_to("nowhere")
    unet, below = tiny.model / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "nope.pt" / "deep" / "out"
    out = tmp_path / "out"
    for options, says in (
        (["--checkpoint", tiny.adapter, "--output", tmp_path / "there"], "exists already"),
        (["--checkpoint", tiny.adapter, "--output", tmp_path / "link"], "exists already"),
        (["--checkpoint", tmp_path / "gone", "--output", below], f"below {tmp_path / 'nope.pt'}, which is no folder"),
        (["--checkpoint", tmp_path / "none", "--output", out], "none does not exist: check the path."),
        (["--checkpoint", "owner/name", "--output", out], "only local files are exported"),
        (["--checkpoint", "/dev/null", "--output", out], "/dev/null is neither a file nor a folder"),
        (["--checkpoint", "x" * 300, "--output", out], "cannot be used (File name too long)"),
        (["--checkpoint", tiny.adapter, "--output", tmp_path / ("x" * 300)], "--output has a name of 300 letters"),
        (["--checkpoint", tmp_path / "nope.pt", "--output", out], "is no PyTorch file"),
        (["--checkpoint", tmp_path / "lora.safetensors", "--output", out], "it looks like a LoRA"),
        (["--checkpoint", tmp_path / "lora.ckpt", "--output", out], "it looks like a LoRA"),
        (["--checkpoint", unet, "--output", out], "it looks like a U-Net"),
        (["--checkpoint", tmp_path / "there", "--output", out], "has no adapter_config.json and holds none"),
        (["--checkpoint", tmp_path / "text.safetensors", "--output", out], "is not a whole safetensors file"),
        (["--checkpoint", tiny.adapter, "--output", out, "--data", tmp_path / "data"], "no finished dataset"),
        (["--checkpoint", tiny.model, "--output", out, "--data", tmp_path / "data"], "no finished dataset"),
        (["--checkpoint", tiny.adapter, "--output", out, "--dtype", "float16"], "concerns a whole SDXL"),
        (["--checkpoint", tiny.adapter, "--output", out, "--model-config", tiny.model], "concerns a whole SDXL in a"),
        (["--checkpoint", tiny.model, "--output", out, "--dtype", "int8"], "--dtype int8 is unknown"),
    ):
        assert run(*options) == 2
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1
        assert not out.exists()


def test_the_card_tells_of_the_data(tiny, data, tmp_path):
    options = ("--checkpoint", tiny.adapter, "--output", tmp_path / "out", "--data", data, "--licence", "MIT")
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
