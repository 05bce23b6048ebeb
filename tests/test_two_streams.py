"""Two-stream sampling against the independent PyTorch reference, and the laws of the method."""

import re

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file

from benchmarks.sampling import denoising_program
from infinite_id_jax import FaceFeatures
from tests import reference_torch as reference

# Of the output's scale. The reference itself moves by 2e-5 between fp32 and fp64 where AdaIN divides by the deviation
# of few tokens.
TOLERANCE = 3e-5

PROMPTS = ["a photo of a man in the snow", "a drawing of a dog"]


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(2, 8, 8, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def oracle(tiny):
    """Runs the PyTorch reference over the same files: (id latents, text latents) in NHWC."""
    diffusers = StableDiffusionXLPipeline.from_pretrained(tiny.model, image_encoder=None, feature_extractor=None)
    adapter = load_file(tiny.adapter / "adapter.safetensors")
    people = [reference.Identity(*(torch.from_numpy(x) for x in tiny.features(seed).values())) for seed in (10, 11)]

    def run(noise, **kwargs):
        with torch.no_grad():
            tokens, _, pooled, _ = diffusers.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        return tuple(
            x if x is None else nhwc(x)
            for x in reference.two_stream_sample(
                diffusers.unet, adapter, nchw(noise), reference.Text(tokens, pooled), people, **kwargs
            )
        )

    run.unet = diffusers.unet
    return run


@pytest.fixture(scope="module")
def people(pipe, tiny):
    return [pipe.encode_identity(FaceFeatures(**tiny.features(seed))) for seed in (10, 11)]


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.numpy().transpose(0, 2, 3, 1)


def error(ours, theirs) -> float:
    """Largest absolute error relative to the scale of the output."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def sample(pipe, people, noise, **kwargs):
    return pipe(PROMPTS, people, latents=noise, output="latent", **kwargs)


@pytest.mark.parametrize("style_merge", ["none", "adain_mean", "adain"])
@pytest.mark.parametrize("attention", ["mixed", "mutual", "off"])
def test_guided_trajectories_match_the_reference(pipe, people, noise, oracle, attention, style_merge):
    # The reference takes most of this test's time.
    steps = 30 if (attention, style_merge) == ("mixed", "adain_mean") else 10
    out = sample(pipe, people, noise, attention=attention, style_merge=style_merge, steps=steps)
    identity, text = oracle(noise, attention=attention, style_merge=style_merge, steps=steps)
    # Measured: 1.0e-6 to 1.9e-6; over 30 steps for all nine, 1.1e-6 to 1.7e-6.
    assert error(out.latents, identity) <= TOLERANCE
    assert error(out.text_stream_latents, text) <= TOLERANCE


def scheduler(name):
    if name == "ddim":
        return None
    kind = {"euler": EulerDiscreteScheduler, "dpm++": DPMSolverMultistepScheduler}[name]
    return kind.from_config(reference.sdxl_ddim().config)


# Each case turns several switches away from their defaults; each compiles a program of its own.
SWITCHES = [
    {"text_stream": "shared", "cross_merge": False, "pooled_text": "zeros", "scheduler": "ddim"},
    {"text_stream": "shared", "attention": "mutual", "style_merge": "adain_mean", "scheduler": "ddim"},
    {"scheduler": "euler", "guidance_rescale": 0.7, "step_range": (1, 4), "layer_range": (2, 7)},
    {"scheduler": "dpm++", "id_scale": 0.6, "text_scale": 1.3, "guidance_scale": 3.0, "step_range": (2, None)},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "-".join(map(str, s.values())))
def test_every_switch_matches_the_reference(pipe, people, noise, oracle, switches):
    theirs = {k: v for k, v in switches.items() if k not in ("step_range", "layer_range", "scheduler")}
    for unit in ("step", "layer"):
        if f"{unit}_range" in switches:
            theirs[f"first_{unit}"], theirs[f"last_{unit}"] = switches[f"{unit}_range"]
    identity, text = oracle(noise, steps=6, scheduler=scheduler(switches["scheduler"]), **theirs)
    out = sample(pipe, people, noise, steps=6, **switches)
    # Measured: at most 1.8e-6.
    assert error(out.latents, identity) <= TOLERANCE
    if switches.get("text_stream") == "shared":
        assert text is None
        assert out.text_stream_latents is None
    else:
        assert error(out.text_stream_latents, text) <= TOLERANCE


@pytest.mark.parametrize("text_stream", ["own", "shared"])
def test_guidance_in_some_steps_matches_the_reference(pipe, people, noise, oracle, text_stream):
    options = {"guidance_rescale": 0.7, "text_stream": text_stream, "steps": 6}
    identity, text = oracle(noise, guided_steps=range(1, 4), **options)
    out = sample(pipe, people, noise, guidance_range=(1, 4), **options)
    assert error(out.latents, identity) <= TOLERANCE
    if text is not None:
        assert error(out.text_stream_latents, text) <= TOLERANCE


@pytest.mark.parametrize("guided", [None, (1, 4)])
def test_kept_inner_levels_match_the_reference(pipe, people, noise, oracle, guided):
    """They are fresh in every second step, and in the first that has guidance."""
    fresh = {0, 2, 4} if guided is None else {0, 1, 2, 4}
    theirs = {} if guided is None else {"guided_steps": range(*guided)}
    ours = {} if guided is None else {"guidance_range": guided}
    with reference.inner_levels_kept(oracle.unet, fresh):
        identity, text = oracle(noise, steps=6, **theirs)
    out = sample(pipe, people, noise, steps=6, cache_interval=2, **ours)
    assert error(out.latents, identity) <= TOLERANCE
    assert error(out.text_stream_latents, text) <= TOLERANCE
    assert error(sample(pipe, people, noise, steps=6, **ours).latents, identity) > 1e-3


@pytest.mark.parametrize("streams", ["none", "two"])
def test_guidance_in_no_step_is_no_guidance(pipe, people, noise, streams):
    given = None if streams == "none" else people
    never = sample(pipe, given, noise, steps=2, guidance_range=(0, 0)).latents
    off = sample(pipe, given, noise, steps=2, guidance_scale=1.0).latents
    assert error(never, off) <= 1e-6


def test_switches_are_not_the_same_picture(pipe, people, noise):
    """Parity would also hold for a switch that neither side reads."""
    base = sample(pipe, people, noise, steps=6).latents  # as many as above, where this program is compiled
    for change in ({"id_scale": 0.5}, {"text_scale": 0.5}, {"guidance_scale": 2.0}, {"guidance_rescale": 0.5}):
        assert error(sample(pipe, people, noise, steps=6, **change).latents, base) > 1e-3


def test_text_to_image_matches_diffusers(pipe, tiny, noise):
    """Tokenizers, text encoders, micro-conditioning, guidance and DDIM, against diffusers' own pipeline."""
    diffusers = StableDiffusionXLPipeline.from_pretrained(tiny.model, image_encoder=None, feature_extractor=None)
    diffusers.scheduler = reference.sdxl_ddim()
    diffusers.set_progress_bar_config(disable=True)
    negatives = ["blurry", "a cat, ugly"]
    common = {"num_inference_steps": 30, "guidance_scale": 5.0, "height": 64, "width": 64, "output_type": "latent"}
    theirs = diffusers(PROMPTS, negative_prompt=negatives, latents=nchw(noise), **common).images
    ours = pipe(PROMPTS, negative_prompt=negatives, latents=noise, output="latent").latents
    # Measured: 1.1e-6.
    assert error(ours, nhwc(theirs)) <= 1e-5


def test_images_match_diffusers(pipe, tiny, noise):
    """As above without a negative prompt (zero embeddings), down to pixels."""
    diffusers = StableDiffusionXLPipeline.from_pretrained(tiny.model, image_encoder=None, feature_extractor=None)
    diffusers.scheduler = reference.sdxl_ddim()
    diffusers.set_progress_bar_config(disable=True)
    common = {"num_inference_steps": 30, "guidance_scale": 5.0, "height": 64, "width": 64}
    theirs = diffusers(PROMPTS, latents=nchw(noise), output_type="np", **common).images
    ours = pipe(PROMPTS, latents=noise, output="numpy").images
    # Measured: 3.8e-6.
    assert np.abs(ours - theirs).max() <= 7e-5


def test_keys_of_text_and_identities_are_made_once_for_all_steps(pipe, people, noise):
    """The compiler takes them out of the loop over steps: whoever calls the U-Net need not."""
    program, _ = denoising_program(pipe, lambda: sample(pipe, people, noise, steps=6))
    lines = program.as_text().splitlines()
    identities = 2 * len(people) * people[0].tokens.shape[0]  # both halves of guidance
    texts = 2 * (len(PROMPTS) + len(PROMPTS) * len(people)) * 77
    called_in = {name: place for line, place in _within(lines) for name in re.findall(r"calls=%?([\w.-]+)", line)}
    products = rf"= f32\[({identities}|{texts}),\d+\]\S* dot\("
    made = [called_in.get(place, place) for line, place in _within(lines) if re.search(products, line)]
    assert len(made) >= 4 * len(pipe.adapter.ip_adapter)
    assert set(made) == {"ENTRY"}


def _within(lines):
    """Each line of an HLO text with the computation it stands in."""
    inside = ""
    for line in lines:
        if line.endswith("{"):
            inside = line.split()[0].lstrip("%")
        yield line, inside
