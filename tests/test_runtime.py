"""The PyTorch runtime of exported adapters against the JAX pipeline, in a process without JAX, and diffusers."""

import importlib.util
import json
import os
import shutil
import subprocess
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from safetensors.torch import load_file, save_file

import infinite_id_jax.weights
from infinite_id_jax import FaceFeatures, InfiniteIDPipeline
from infinite_id_jax.faces.extract import ExtractedFace
from infinite_id_jax.faces.protocol import Face
from tests import published, reference_torch
from tests.conftest import write_adapter

RUNTIME = Path(infinite_id_jax.weights.__file__).with_name("infinite_id_diffusers.py")
PROMPTS = ["a photo of a man in the snow", "a drawing of a dog"]

# Programs that tests/test_two_streams.py compiles too, but for the one stream.
CASES = {
    "paper": {"steps": 30},
    "mutual": {"steps": 10, "attention": "mutual", "style_merge": "adain_mean"},
    "shared": {"steps": 6, "text_stream": "shared", "cross_merge": False, "pooled_text": "zeros"},
    "one": {"steps": 6, "streams": "one", "style_merge": "adain_mean", "id_scale": 0.6, "negative_prompt": "blurry"},
    "ranges": {"steps": 6, "step_range": (1, 4), "layer_range": (2, 7), "guidance_rescale": 0.7, "scheduler": "euler"},
}

PROGRAM = """
import json, sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler

torch.set_num_threads(1)
folder, model = Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, str(folder))
from infinite_id_diffusers import InfiniteIDPipeline

job, given, found = json.loads((folder / "job.json").read_text()), np.load(folder / "given.npz"), {}
doors = {
    "custom_pipeline": DiffusionPipeline.from_pretrained(
        model, custom_pipeline=str(folder / "infinite_id_diffusers.py"), trust_remote_code=True
    ),
    "import": InfiniteIDPipeline.from_pretrained(model),
}
for door, pipe in doors.items():
    pipe.load_infinite_id(folder)
    people = [
        pipe.encode_identity(clip_hidden_states=hidden, face_embedding=face)
        for hidden, face in zip(given["clip_hidden_states"], given["face_embedding"])
    ]
    for name, options in job["cases"].items():
        if door == "import" and name != "paper":
            continue
        if options.pop("scheduler", "ddim") == "euler":  # no other case after it
            pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        out = pipe.sample(job["prompts"], people, latents=torch.from_numpy(given["latents"]), output="np", **options)
        found[f"{door} {name} images"], found[f"{door} {name} identity"] = out.images, out.latents.numpy()
        if out.text_stream_latents is not None:
            found[f"{door} {name} text"] = out.text_stream_latents.numpy()
assert "jax" not in sys.modules
np.savez(folder / "found.npz", **found)
"""


def requirements(*names: str) -> dict[str, Distribution]:
    """The installed distributions of these names, and of all they require."""
    found: dict[str, Distribution] = {}
    queue = list(names)
    while queue:
        name = canonicalize_name(queue.pop())
        if name not in found:
            found[name] = distribution(name)
            required = (Requirement(line) for line in found[name].requires or ())
            queue += [r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def torch_only(tmp_path_factory) -> Path:
    """The interpreter of an environment that has what the runtime needs, and no JAX."""
    folder = tmp_path_factory.mktemp("torch_only")
    venv.create(folder, symlinks=True, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    for package in requirements("torch", "diffusers", "transformers", "safetensors", "pillow").values():
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(package.locate_file(top))))
    return folder / "bin" / "python"


def run(python: Path, *arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    env |= {"OMP_NUM_THREADS": "1"}
    return subprocess.run([python, *arguments], env=env, cwd=home, capture_output=True, text=True)


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(2, 8, 8, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def found(tiny, torch_only, noise, tmp_path_factory) -> dict[str, np.ndarray]:
    """What the runtime makes of all CASES, two prompts and two people, in a process without JAX."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(tiny.adapter, folder, dirs_exist_ok=True)
    shutil.copy(RUNTIME, folder)
    features = [tiny.features(seed) for seed in (10, 11)]
    stacked = {name: np.stack([each[name] for each in features]) for name in features[0]}
    np.savez(folder / "given.npz", latents=nchw(noise).numpy(), **stacked)
    (folder / "job.json").write_text(json.dumps({"prompts": PROMPTS, "cases": CASES}))
    done = run(torch_only, "-c", PROGRAM, str(folder), str(tiny.model), home=folder)
    assert done.returncode == 0, done.stderr
    return dict(np.load(folder / "found.npz"))


@pytest.fixture(scope="module")
def people(pipe, tiny):
    return [pipe.encode_identity(FaceFeatures(**tiny.features(seed))) for seed in (10, 11)]


@pytest.fixture(scope="module")
def runtime():
    """The runtime file as a module of this process."""
    spec = importlib.util.spec_from_file_location("infinite_id_diffusers", RUNTIME)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def theirs(runtime, tiny):
    """The runtime's pipeline with the tiny adapter."""
    made = runtime.InfiniteIDPipeline.from_pretrained(tiny.model)
    made.set_progress_bar_config(disable=True)
    made.load_infinite_id(tiny.adapter)
    return made


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def nhwc(x: np.ndarray) -> np.ndarray:
    return x.transpose(0, 2, 3, 1)


def error(one, other) -> float:
    """Largest absolute error relative to the scale of the output."""
    one, other = np.asarray(one), np.asarray(other)
    return float(np.abs(one - other).max() / np.abs(other).max())


def test_the_process_has_no_jax(torch_only, tmp_path):
    for name in ("jax", "flax", "infinite_id_jax"):
        done = run(torch_only, "-c", f"import {name}", home=tmp_path)
        assert f"ModuleNotFoundError: No module named '{name}'" in done.stderr


def test_samples_equal_those_of_jax_through_both_doors(found, pipe, people, noise):
    """One test, so that one worker alone starts the process without JAX."""
    for name, options in CASES.items():
        out = pipe(PROMPTS, people, latents=noise, output="numpy" if name == "paper" else "latent", **options)
        # Measured: 1.1e-6 to 2.0e-6; the text stream at most 1.3e-6.
        assert error(nhwc(found[f"custom_pipeline {name} identity"]), out.latents) <= 1e-4, name
        text = found.get(f"custom_pipeline {name} text")
        assert (text is None) == (out.text_stream_latents is None), name
        if text is not None:
            assert error(nhwc(text), out.text_stream_latents) <= 1e-4, name
        if name == "paper":  # Measured: 2.8e-6.
            assert np.abs(found["custom_pipeline paper images"] - out.images).max() <= 1e-4
    for what in ("identity", "text", "images"):
        np.testing.assert_array_equal(found[f"import paper {what}"], found[f"custom_pipeline paper {what}"])


@pytest.fixture(scope="module")
def oracle(theirs, tiny):
    """The PyTorch reference of the other tests over the runtime's own U-Net: (identity latents, text latents)."""
    adapter = load_file(tiny.adapter / "adapter.safetensors")
    features = [reference_torch.Identity(*map(torch.from_numpy, tiny.features(seed).values())) for seed in (10, 11)]
    with torch.no_grad():
        tokens, _, pooled, _ = theirs.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    return lambda latents, **kwargs: reference_torch.two_stream_sample(
        theirs.unet, adapter, latents, reference_torch.Text(tokens, pooled), features, **kwargs
    )


@pytest.fixture(scope="module")
def two(theirs, tiny):
    return [theirs.encode_identity(**tiny.features(seed)) for seed in (10, 11)]


@pytest.mark.parametrize(
    "switches",
    [
        {"guidance_scale": 1.0, "style_merge": "adain"},
        {"text_stream": "shared", "style_merge": "adain", "text_scale": 1.3},
        {"attention": "off", "guidance_scale": 3.0},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_more_switches_equal_those_of_the_reference(theirs, two, noise, oracle, switches):
    out = theirs.sample(PROMPTS, two, latents=nchw(noise), steps=4, output="latent", **switches)
    identity, text = oracle(nchw(noise), steps=4, **switches)
    # Measured: 0.4e-6 to 1.5e-6.
    assert error(out.latents, identity) <= 1e-5
    assert (text is None) == (out.text_stream_latents is None)
    if text is not None:
        assert error(out.text_stream_latents, text) <= 1e-5


def test_the_pipeline_stays_plain_sdxl(runtime, theirs, two, tiny, noise):
    """A call is diffusers' own, before sampling and after it, also after an error."""
    options = {"latents": nchw(noise)[:1], "num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
    before = theirs("a dog", **options).images
    theirs.sample("a dog", two, steps=1, latents=nchw(noise)[:1])
    with pytest.raises(ValueError, match="divisible by 8"):
        theirs.sample("a dog", two, height=65, width=64)
    assert torch.equal(theirs("a dog", **options).images, before)
    plain = runtime.StableDiffusionXLPipeline.from_pretrained(tiny.model)
    plain.scheduler = reference_torch.sdxl_ddim()
    plain.set_progress_bar_config(disable=True)
    assert torch.equal(plain("a dog", **options).images, before)


def test_the_schedule_is_that_of_sdxl(runtime, theirs, tiny):
    """Whatever the scheduler that was there leaves unsaid."""
    ours = reference_torch.sdxl_ddim()
    ours.set_timesteps(30)
    for there in (EulerDiscreteScheduler(), EulerDiscreteScheduler.from_config(ours.config)):
        made = runtime.InfiniteIDPipeline(**theirs.components | {"scheduler": there})
        made.load_infinite_id(tiny.adapter)
        made.scheduler.set_timesteps(30)
        assert torch.equal(made.scheduler.timesteps, ours.timesteps)
        assert torch.equal(made.scheduler.alphas_cumprod, ours.alphas_cumprod)
        assert made.scheduler.final_alpha_cumprod == ours.final_alpha_cumprod
        assert not made.scheduler.config.clip_sample


def test_a_row_of_noise_belongs_to_its_seed(theirs, two):
    def sample(prompts, seed):
        return theirs.sample(prompts, two[0], height=64, width=64, steps=2, output="latent", seed=seed).latents

    both = sample(["a dog", "a dog"], 3)
    assert error(sample("a dog", 4), both[1:]) <= 1e-5
    assert error(both[0], both[1]) > 0.1
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    assert torch.equal(sample(["a dog", "a dog"], generators), both)


def test_mixtures_equal_those_of_jax(pipe, theirs, people, two):
    for weights in (None, [0.3, 0.7]):
        ours, mixed = pipe.mix_identities(people, weights), theirs.mix_identities(two, weights)
        for part in ("tokens", "unconditional"):  # Measured: 3.2e-7.
            assert error(getattr(mixed, part), getattr(ours, part)) <= 1e-5
    crowd = [theirs.mix_identities(two), two[0]]  # of unequal length
    out = theirs.sample("a dog", crowd, height=64, width=64, steps=1, output="latent")
    alone = theirs.sample("a dog", two[0], height=64, width=64, steps=1, output="latent")
    assert error(out.latents[1:], alone.latents) <= 1e-5


def test_a_head_is_seen_as_in_jax(pipe, theirs, runtime):
    crop = np.random.default_rng(1).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    face = np.ones(16, np.float32)
    found_face = Face((0.0, 0.0, 96.0, 96.0), 1.0, np.zeros((5, 2), np.float32))
    ours = pipe.encode_identity(ExtractedFace(found_face, 1, crop, crop, crop, face))
    found = theirs.encode_identity(Image.fromarray(crop), face_embedding=face)
    assert error(found.tokens, ours.tokens) <= 1e-4  # Measured: 1.7e-6.


# Published adapters, and other shapes of ours


def features_of(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"clip_hidden_states": (257, 32), "face_embedding": 16, "clip_pooled": 32}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("family", published.FAMILIES)
def test_published_adapters_sample_as_in_diffusers(runtime, theirs, tiny, noise, tmp_path, family):
    state = published.random_state(family, theirs.unet)
    if family != "faceid":  # diffusers takes ten seconds to load a LoRA: once is enough
        state = {key: value for key, value in state.items() if "_lora" not in key}
    file = (tmp_path / published.FILES[family]).with_suffix(".safetensors")
    save_file(state, file)
    made = runtime.InfiniteIDPipeline(**theirs.components)
    made.set_progress_bar_config(disable=True)
    made.load_infinite_id(file)
    features = features_of(3)
    person = made.encode_identity(**features)

    diffusers = published.Diffusers(tiny.model, file, version_2=family == "faceid_plusv2")
    empty = made._see(None)["clip_hidden_states"]
    hidden = torch.stack([empty, torch.from_numpy(features["clip_hidden_states"])])
    face = torch.nn.functional.normalize(torch.from_numpy(features["face_embedding"]), dim=0)
    face = torch.stack([torch.zeros_like(face), face])
    pooled = torch.from_numpy(features["clip_pooled"])
    pooled = torch.stack([torch.zeros_like(pooled), pooled])
    inputs = {"ip_adapter": (pooled,), "faceid": (face,)}.get(family, (face, hidden) if "face" in family else (hidden,))

    tokens = diffusers.tokens(*inputs)
    assert error(person.unconditional, tokens[0]) <= 1e-5  # Measured: at most 4.2e-7.
    assert error(person.tokens, tokens[1]) <= 1e-5
    theirs_latents = diffusers.sample(PROMPTS, nchw(noise), *inputs, num_inference_steps=10, guidance_scale=5.0)
    ours = made.sample(PROMPTS, person, latents=nchw(noise), streams="one", steps=10, output="latent")
    assert error(ours.latents, theirs_latents) <= 1e-4  # Measured: at most 1.5e-6.
    if family == "faceid":  # the LoRA is the identity stream's alone
        adapter = {key: value for key, value in state.items() if "_lora" not in key}
        with torch.no_grad():
            text, _, text_pooled, _ = made.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        identity, text_latents = reference_torch.two_stream_sample(
            made.unet,
            adapter,
            nchw(noise),
            reference_torch.Text(text, text_pooled),
            [reference_torch.IdentityTokens(*person)],
            identity_unet=published.merged_lora(made.unet, state),
            steps=3,
        )
        out = made.sample(PROMPTS, person, latents=nchw(noise), steps=3, output="latent")
        assert error(out.latents, identity) <= 1e-5  # Measured: 1.6e-6.
        assert error(out.text_stream_latents, text_latents) <= 1e-5


@pytest.mark.parametrize(("mapper", "face_tokens"), [("resampler", 1), ("none", 4), ("mlp", 0)])
def test_other_shapes_of_our_adapter(runtime, theirs, tiny, tmp_path, mapper, face_tokens):
    folder = write_adapter(tmp_path / "adapter", clip_dim=32, face_dim=16, face_tokens=max(face_tokens, 1))
    state, config = load_file(folder / "adapter.safetensors"), json.loads((folder / "adapter_config.json").read_text())
    config |= {"clip_mapper": mapper, "face_tokens": face_tokens}
    if mapper != "mlp":
        state = {key: value for key, value in state.items() if not key.startswith("clip_mapper.")}
    if mapper == "resampler":
        plus = published.random_state("ip_adapter_plus", theirs.unet)
        state |= {k.replace("image_proj.", "clip_mapper."): v for k, v in plus.items() if k.startswith("image_proj.")}
        config |= {"resampler_queries": 4, "resampler_dim": 48, "resampler_heads": 2, "resampler_depth": 4}
    if not face_tokens:
        state = {key: value for key, value in state.items() if not key.startswith("face_mapper.")}
    save_file(state, folder / "adapter.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    made = runtime.InfiniteIDPipeline(**theirs.components)
    made.load_infinite_id(folder)
    features = features_of(4)
    found = made.encode_identity(**features)
    ours = InfiniteIDPipeline.from_pretrained(tiny.model, folder).encode_identity(FaceFeatures(**features))
    for part in ("tokens", "unconditional"):
        assert error(getattr(found, part), getattr(ours, part)) <= 1e-5  # Measured: at most 1.7e-6.


# What it refuses


def test_files_that_are_not_whole_are_refused(runtime, pipe, tmp_path):
    pipe.save_adapter(tmp_path)
    file = tmp_path / "adapter.safetensors"
    whole = file.read_bytes()
    runtime.read_adapter(tmp_path)
    for at in (len(whole) - 3, len(whole) // 2):  # one bit of a tensor
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"adapter.safetensors is damaged \(its checksum"):
            runtime.read_adapter(tmp_path)
    for bad in (whole[:-100], whole[:50], b"not safetensors", b""):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="is no whole adapter"):
            runtime.read_adapter(tmp_path)
    file.write_bytes(whole)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is no whole adapter"):
        runtime.read_adapter(tmp_path)
    with pytest.raises(ValueError, match="nowhere is no whole adapter"):
        runtime.read_adapter(tmp_path / "nowhere")


def test_adapters_of_something_else_are_refused(runtime, theirs, tiny, tmp_path):
    state = load_file(tiny.adapter / "adapter.safetensors")
    made = runtime.InfiniteIDPipeline(**theirs.components)

    def load(state):
        save_file(state, tmp_path / "it.safetensors")
        made.load_infinite_id(tmp_path / "it.safetensors")

    with pytest.raises(ValueError, match="has no ip_adapter"):
        load({key: value for key, value in state.items() if "to_k_ip" not in key})
    with pytest.raises(ValueError, match=r"to_k_ip.weight \[64, 48\]; this model takes \[64, 64\]"):
        load({key: value[..., :48].contiguous() if "_ip." in key else value for key, value in state.items()})
    with pytest.raises(ValueError, match="no identity adapter of a known family"):
        load({key: value for key, value in state.items() if "mapper" not in key})
    assert made.adapter is None


def test_requests_that_cannot_be_met_are_refused(runtime, theirs, two, tiny, noise):
    latents, features = nchw(noise), tiny.features(1)
    empty = runtime.InfiniteIDPipeline(**theirs.components)
    for call, words in (
        (lambda: empty.encode_identity(**features), "Identities need an adapter"),
        (lambda: theirs.encode_identity(clip_hidden_states=features["clip_hidden_states"]), "takes face_embedding"),
        (lambda: theirs.mix_identities(two, [0.5, 0.6]), "sum to 1"),
        (lambda: theirs.mix_identities(two, [1.0]), "one for each identity"),
        (lambda: theirs.sample([], two), "at least one prompt"),
        (lambda: theirs.sample("a dog", []), "one identity"),
        (lambda: theirs.sample("a dog", two, latents=latents), r"\[2, 4, 8, 8\]; \[1, 4, 8, 8\] is needed"),
        (lambda: theirs.sample("a dog", two, attention="some"), "choose from mixed, mutual, off"),
        (lambda: theirs.sample("a dog", two, streams="one", text_stream="shared"), "text_stream concerns"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_half_precision(runtime, theirs, tiny, noise):
    """The adapter follows the model to its dtype."""
    made = runtime.InfiniteIDPipeline.from_pretrained(tiny.model, torch_dtype=torch.bfloat16)
    made.set_progress_bar_config(disable=True)
    made.load_infinite_id(tiny.adapter)
    person = made.encode_identity(**tiny.features(10))
    out = made.sample("a dog", person, latents=nchw(noise)[:1], steps=2, output="latent").latents
    exact = theirs.encode_identity(**tiny.features(10))
    exact = theirs.sample("a dog", exact, latents=nchw(noise)[:1], steps=2, output="latent").latents
    assert out.dtype == torch.bfloat16
    assert 1e-4 < error(out.float(), exact) <= 0.1  # Measured: 0.02.
