"""The PyTorch runtime of exported adapters against the JAX pipeline, in a process without JAX, and diffusers."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.utils
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
    "paper": {"steps": 10},
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
        if door == "import" and name != "one":
            continue
        if options.pop("scheduler", "ddim") == "euler":  # no other case after it
            pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        options["output"] = "np" if name == "paper" else "latent"
        out = pipe.sample(job["prompts"], people, latents=torch.from_numpy(given["latents"]), **options)
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "infinite_id_diffusers", module)  # torch.compile looks it up
        spec.loader.exec_module(module)
        yield module


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
        # Measured: 8.7e-7 to 2.1e-6; the text stream at most 1.7e-6.
        assert error(nhwc(found[f"custom_pipeline {name} identity"]), out.latents) <= 4e-5, name
        text = found.get(f"custom_pipeline {name} text")
        assert (text is None) == (out.text_stream_latents is None), name
        if text is not None:
            assert error(nhwc(text), out.text_stream_latents) <= 3e-5, name
        if name == "paper":  # Measured: 2.8e-6.
            assert np.abs(found["custom_pipeline paper images"] - out.images).max() <= 5e-5
    np.testing.assert_array_equal(found["import one identity"], found["custom_pipeline one identity"])


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
        {"text_stream": "shared", "cross_merge": False, "pooled_text": "zeros"},
        {"attention": "mutual", "style_merge": "adain_mean"},
        {"attention": "off", "guidance_scale": 3.0},
        {"step_range": [1, np.int64(3)], "layer_range": [0, None]},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_more_switches_equal_those_of_the_reference(theirs, two, noise, oracle, switches):
    out = theirs.sample(PROMPTS, two, latents=nchw(noise), steps=4, output="latent", **switches)
    named = {key: x for key, x in switches.items() if not key.endswith("_range")}
    for unit in ("step", "layer"):
        if f"{unit}_range" in switches:
            named[f"first_{unit}"], named[f"last_{unit}"] = switches[f"{unit}_range"]
    identity, text = oracle(nchw(noise), steps=4, **named)
    # Measured: 0.4e-6 to 1.5e-6.
    assert error(out.latents, identity) <= 1e-5
    assert (text is None) == (out.text_stream_latents is None)
    if text is not None:
        assert error(out.text_stream_latents, text) <= 1e-5


def test_compiled_the_unet_is_one_program_for_all_steps(theirs, two, noise):
    """And another for the steps without mixed attention; torch.compile gives up where each step is another."""
    torch._dynamo.reset()
    programs = torch._dynamo.utils.counters["stats"]
    theirs.unet.compile(backend="eager", fullgraph=True)
    try:
        for step_range, made in (((0, None), 1), ((0, None), 0), ((2, 4), 1)):
            before = programs["unique_graphs"]
            options = {"latents": nchw(noise), "steps": 4, "output": "latent", "step_range": step_range}
            theirs.sample(PROMPTS, two, **options)
            assert programs["unique_graphs"] - before == made, step_range
    finally:
        theirs.unet._compiled_call_impl = None
        torch._dynamo.reset()


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


def test_seeds_in_any_form(runtime):
    shape, first = (2, 4, 8, 8), torch.Generator().manual_seed(3)
    expected = runtime.draw(shape, 3)
    for same in (np.int64(3), [3, np.int32(4)], (3, torch.Generator().manual_seed(4)), np.array([3, 4])):
        assert torch.equal(runtime.draw(shape, same), expected)
    assert torch.equal(runtime.draw(shape, first)[:1], expected[:1])


def test_mixtures_equal_those_of_jax(pipe, theirs, people, two):
    for weights in (None, [0.3, 0.7]):
        ours, mixed = pipe.mix_identities(people, weights), theirs.mix_identities(two, weights)
        for part in ("tokens", "unconditional"):  # Measured: 3.2e-7.
            assert error(getattr(mixed, part), getattr(ours, part)) <= 6e-6
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
    assert error(found.tokens, ours.tokens) <= 3e-5  # Measured: 1.7e-6.


# Published adapters, and other shapes of ours


def features_of(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"clip_hidden_states": (257, 32), "face_embedding": 16, "clip_pooled": 32}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("family", published.FAMILIES)
def test_published_adapters_sample_as_in_diffusers(runtime, theirs, tiny, noise, tmp_path, family):
    state = {key: x for key, x in published.random_state(family, theirs.unet).items() if "_lora" not in key}
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
    assert error(person.unconditional, tokens[0]) <= 8e-6  # Measured: at most 4.2e-7.
    assert error(person.tokens, tokens[1]) <= 8e-6
    theirs_latents = diffusers.sample(PROMPTS, nchw(noise), *inputs, num_inference_steps=10, guidance_scale=5.0)
    ours = made.sample(PROMPTS, person, latents=nchw(noise), streams="one", steps=10, output="latent")
    assert error(ours.latents, theirs_latents) <= 3e-5  # Measured: at most 1.5e-6.


@pytest.mark.parametrize("family", ["faceid", "faceid_plusv2"])
def test_a_lora_is_the_identity_streams_alone(runtime, theirs, noise, tmp_path, family):
    """In one stream it is the whole U-Net's; tests/test_adapters.py has diffusers' loader of such files."""
    state = published.random_state(family, theirs.unet)
    file = (tmp_path / published.FILES[family]).with_suffix(".safetensors")
    save_file(state, file)
    made = runtime.InfiniteIDPipeline(**theirs.components)
    made.set_progress_bar_config(disable=True)
    made.load_infinite_id(file)
    person = made.encode_identity(**features_of(3))
    plain, merged = {key: x for key, x in state.items() if "_lora" not in key}, published.merged_lora(made.unet, state)
    with torch.no_grad():
        text, _, text_pooled, _ = made.encode_prompt(PROMPTS[0], do_classifier_free_guidance=False)
    identity, text_latents = reference_torch.two_stream_sample(
        made.unet,
        plain,
        nchw(noise)[:1],
        reference_torch.Text(text, text_pooled),
        [reference_torch.IdentityTokens(*person)],
        identity_unet=merged,
        steps=2,
    )
    out = made.sample(PROMPTS[0], person, latents=nchw(noise)[:1], steps=2, output="latent")
    assert error(out.latents, identity) <= 1e-5  # Measured: 1.6e-6.
    assert error(out.text_stream_latents, text_latents) <= 1e-5
    save_file(plain, file)
    other = runtime.InfiniteIDPipeline(**theirs.components | {"unet": merged})
    other.set_progress_bar_config(disable=True)
    other.load_infinite_id(file)
    ours, expected = (
        each.sample(PROMPTS[0], person, latents=nchw(noise)[:1], steps=1, streams="one", output="latent").latents
        for each in (made, other)
    )
    assert error(ours, expected) <= 1e-5


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
    faceid, plus = (published.random_state(family, theirs.unet) for family in ("faceid", "ip_adapter_plus"))
    key, norm = "ip_adapter.1.to_k_ip.weight", "clip_mapper.norm.weight"
    kolors = plus | {
        "image_proj.proj_in.weight": torch.zeros(2048, 1024),
        "image_proj.latents": torch.zeros(1, 16, 2048),
    }
    instant = plus | {"image_proj.proj_in.weight": torch.zeros(48, 512)}
    pulid = {"id_adapter.latents": torch.zeros(1, 5, 48)}
    narrow = {key: x[..., :48].contiguous() if "_ip." in key else x for key, x in state.items()}
    for bad, words in (
        ({key: x for key, x in state.items() if "to_k_ip" not in key}, f"adapter's {key} is missing"),
        (narrow, rf"{key} \[64, 48\] does not fit \(.*64.*\): give an adapter for this model"),
        ({key: x for key, x in state.items() if "mapper" not in key}, "no adapter of a known family: give IP-Adapter"),
        (pulid, "no adapter of a known family"),
        (instant, "is InstantID's adapter"),
        (kolors, "is Kolors' adapter"),
        (state | {"ip_adapter.99.to_k_ip.weight": state[key]}, r"1 tensors of no use to this model \(ip_adapter.99"),
        (state | {"ip_adapter.0.to_k_ip.weight": state[key]}, r"no use to this model \(ip_adapter.0.to_k"),
        (state | {"extra": torch.zeros(1)}, r"no use to this model \(extra\)"),
        (state | {"image_proj.norm.weight": torch.zeros(1)}, r"no use to this model \(image_proj.norm.weight\)"),
        (state | {norm: torch.zeros(63)}, rf"adapter's {norm} \[63\] does not fit"),
        (state | {"clip_mapper.proj.0.bias": torch.zeros(1)}, "clip_mapper.proj.0.* does not fit"),
        (state | {"face_mapper.proj.2.weight": torch.zeros(64, 31)}, r"face_mapper.proj.2.weight \[64, 31\] does not"),
        (state | {"face_mapper.proj.2.weight": torch.zeros(64)}, r"face_mapper.proj.2.weight \[64\] does not"),
        (plus | {"image_proj.latents": torch.zeros(2, 4, 48)}, "does not fit"),
        (
            plus | {"image_proj.layers.5.0.to_q.weight": torch.zeros(128, 48)},
            r"no use to this model \(image_proj.layers",
        ),
        (
            {key: x for key, x in faceid.items() if key != "ip_adapter.2.to_q_lora.up.weight"},
            "2.to_q_lora.up.* missing",
        ),
        (faceid | {"ip_adapter.3.to_v_lora.up.weight": torch.zeros(64, 4)}, "3.to_v_lora.up.* does not fit"),
    ):
        save_file({key: x.clone() for key, x in bad.items()}, tmp_path / "it.safetensors")
        with pytest.raises(ValueError, match=words):
            made.load_infinite_id(tmp_path / "it.safetensors")
    assert made.adapter is None


@pytest.mark.parametrize("family", ["ours", *published.FAMILIES])
def test_each_tensor_of_an_adapter_is_needed(runtime, theirs, tiny, family):
    if family == "ours":
        state = load_file(tiny.adapter / "adapter.safetensors")
    else:
        state = published.random_state(family, theirs.unet)
    config = {"shortcut_scale": 1.0}
    runtime.Adapter(state, config).check(theirs.unet)
    for key in (key for key in state if not key.startswith("ip_adapter.") or key.startswith("ip_adapter.3.")):
        without = runtime.Adapter({other: x for other, x in state.items() if other != key}, config)
        if without.needs:  # without its sign it is of no family
            with pytest.raises(ValueError, match=r"is missing|of no use"):
                without.check(theirs.unet)
        with pytest.raises(ValueError, match=r"does not fit"):
            runtime.Adapter(state | {key: torch.cat([state[key]] * 2)}, config).check(theirs.unet)


def test_pickles_are_sent_to_the_export(runtime, tmp_path):
    for name in ("ip-adapter_sdxl.bin", "a.pt", "a.CKPT"):
        with pytest.raises(ValueError, match=f"--checkpoint .*{name} --format diffusers` of infinite_id_jax"):
            runtime.read_adapter(tmp_path / name)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="is no whole adapter"):
        runtime.read_adapter(tmp_path)


def test_features_are_taken_in_any_form(theirs, tiny):
    features = tiny.features(10)
    expected = theirs.encode_identity(**features).tokens
    for form in (torch.tensor, np.float64, np.ndarray.tolist, lambda x: torch.tensor(x).double().requires_grad_()):
        found = theirs.encode_identity(**{name: form(x) for name, x in features.items()}).tokens
        assert error(found, expected) <= 1e-5
        assert not found.requires_grad
    half = {name: torch.tensor(x).half() for name, x in features.items()}
    assert error(theirs.encode_identity(**half).tokens, expected) <= 1e-2
    hidden, face = features.values()
    for hidden_states, embedding, words in (
        (hidden[None], face, r"clip_hidden_states \[1, 257, 32\] .*finite numbers, \[any, 32\]"),
        (hidden[:, :31], face, r"clip_hidden_states \[257, 31\]"),
        (hidden[:0], face, r"clip_hidden_states \[0, 32\]"),
        (hidden, face[None], r"face_embedding \[1, 16\] .*finite numbers, \[16\]"),
        (hidden, face[:15], r"face_embedding \[15\]"),
        (hidden, face * np.float32(np.nan), r"face_embedding \[16\], not finite,"),
    ):
        with pytest.raises(ValueError, match=words):
            theirs.encode_identity(clip_hidden_states=hidden_states, face_embedding=embedding)


def test_requests_that_cannot_be_met_are_refused(runtime, theirs, two, tiny, noise):
    latents, features = nchw(noise), tiny.features(1)
    empty, blind = (runtime.InfiniteIDPipeline(**theirs.components | {"image_encoder": None}) for _ in range(2))
    blind.load_infinite_id(tiny.adapter)
    crop, face = Image.new("RGB", (64, 64)), {"face_embedding": features["face_embedding"]}
    for call, words in (
        (lambda: empty.encode_identity(**features), "Identities need an adapter"),
        (lambda: theirs.encode_identity(clip_hidden_states=features["clip_hidden_states"]), "takes face_embedding"),
        (lambda: blind.encode_identity(crop, **face), r"takes clip_hidden_states: .* head_crop .* image_encoder="),
        (lambda: theirs.mix_identities(two, [0.5, 0.6]), "sum to 1"),
        (lambda: theirs.mix_identities(two, [1.0]), "one for each identity"),
        (lambda: theirs.sample([], two), "at least one prompt"),
        (lambda: theirs.sample("a dog", []), "one identity"),
        (lambda: theirs.sample("a dog", two, latents=latents), r"\[2, 4, 8, 8\]; \[1, 4, 8, 8\] is needed"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention": "some"}, "choose from mixed, mutual, off"),
        ({"streams": "one", "text_stream": "shared"}, "text_stream concerns"),
        ({"streams": "one", "layer_range": [1, None]}, "layer_range concerns"),
        ({"style": "adain", "steps": 2}, "takes no style: its switches are streams, attention"),
        ({"id_scale": {"up": 1.0}}, r"id_scale \{'up': 1.0\} cannot be used: give one finite number"),
        ({"id_scale": float("nan")}, "id_scale nan cannot be used"),
        ({"text_scale": float("inf")}, "text_scale inf cannot be used"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan cannot be used"),
        ({"guidance_rescale": "0.7"}, "guidance_rescale '0.7' cannot be used"),
        ({"steps": 0}, "steps 0 cannot be used: give one whole number of 1 or more"),
        ({"steps": -3}, "steps -3 cannot be used"),
        ({"steps": 2.0}, "steps 2.0 cannot be used"),
        ({"step_range": (-2, None)}, r"step_range \(-2, None\) is no range"),
        ({"step_range": (3, 1)}, r"step_range \(3, 1\) is no range"),
        ({"layer_range": [0.0, 2]}, r"layer_range \[0.0, 2\] is no range"),
        ({"layer_range": 3}, "layer_range 3 is no range"),
        ({"seed": [1, 2]}, r"seed \[1, 2\] cannot be used"),
        ({"seed": 1.5}, "seed 1.5 cannot be used"),
        ({"seed": None}, "seed None cannot be used"),
    ],
    ids=str,
)
def test_options_that_cannot_be_used_are_refused(theirs, two, options, words):
    with pytest.raises(ValueError, match=words):
        theirs.sample("a dog", two, **options)


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
