"""Two-stream sampling against the independent PyTorch reference, and the laws of the method."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file

from infinite_id_jax import FaceFeatures
from infinite_id_jax.errors import InputError
from tests import reference_torch as reference

PROMPTS = ["a photo of a man in the snow", "a drawing of a dog"]


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(5).normal(size=(2, 8, 8, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def oracle(tiny):
    """Runs the PyTorch reference over the same files: (id latents, text latents) in NHWC."""
    diffusers = StableDiffusionXLPipeline.from_pretrained(tiny.model, image_encoder=None, feature_extractor=None)
    adapter = load_file(tiny.adapter / "adapter.safetensors")
    people = [
        reference.Identity(*(torch.from_numpy(x) for x in tiny.features(seed).values())) for seed in (10, 11)
    ]

    def run(noise, **kwargs):
        with torch.no_grad():
            tokens, _, pooled, _ = diffusers.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        return tuple(
            x if x is None else nhwc(x)
            for x in reference.two_stream_sample(
                diffusers.unet, adapter, nchw(noise), reference.Text(tokens, pooled), people, **kwargs
            )
        )

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
def test_thirty_guided_steps_match_the_reference(pipe, people, noise, oracle, attention, style_merge):
    out = sample(pipe, people, noise, attention=attention, style_merge=style_merge)
    identity, text = oracle(noise, attention=attention, style_merge=style_merge)
    print("ERR", attention, style_merge, error(out.latents, identity), error(out.text_stream_latents, text))
    assert error(out.latents, identity) <= 1e-3
    assert error(out.text_stream_latents, text) <= 1e-3
