"""The PyTorch reference is right: it is diffusers' SDXL where the method adds nothing, and keeps the paper's laws.

In double precision, so that what the laws call equal is told from what is merely close. Every figure is a
maximal absolute difference, relative to the largest value of what is expected.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention
from torch import Tensor

from tests import reference_torch as reference
from tests.reference_torch import Identity, Switches, Text

ATTENTIONS = ("mixed", "mutual", "off")
STYLES = ("none", "adain_mean", "adain")
ROUNDING = 8e-13  # for what is equal up to the order of sums; the largest measured is 4.5e-14
VISIBLE = 1e-3  # what a switch must change at least; the smallest measured is 3.4e-3, in one step at t = 1


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads cost these tiny tensors more than they bring: 20 times, where tests share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return reference.tiny_sdxl_unet().double()


@pytest.fixture(scope="module")
def adapter(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    return {key: weight.double() for key, weight in reference.adapter_state_dict(unet).items()}


@pytest.fixture(scope="module")
def diffusers_sdxl(tiny) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny.model, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(torch.float64)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise(prompts: int) -> Tensor:
    return draw(prompts, 4, 8, 8, seed=1)


def words(prompts: int, seed: int = 2) -> Text:
    return Text(draw(prompts, 77, reference.CROSS_ATTENTION_DIM, seed=seed), draw(prompts, 32, seed=seed + 50))


def person(seed: int) -> Identity:
    return Identity(draw(257, 32, seed=seed), draw(16, seed=seed + 50))


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


class Sampler:
    """`sample(...)`: one prompt and one person, negative prompt included, unless told otherwise; three steps."""

    def __init__(self, unet: UNet2DConditionModel, adapter: dict[str, Tensor]):
        self.unet, self.adapter = unet, adapter

    def __call__(self, **changes: Any) -> tuple[Tensor, Tensor | None]:
        arguments = {"prompt": words(1), "identities": [person(4)], "negative": words(1, seed=3), "steps": 3}
        arguments |= changes
        arguments.setdefault("latents", noise(len(arguments["prompt"].embeds)))
        return reference.two_stream_sample(self.unet, self.adapter, **arguments)


@pytest.fixture(scope="module")
def sample(unet: UNet2DConditionModel, adapter: dict[str, Tensor]) -> Sampler:
    return Sampler(unet, adapter)


@pytest.fixture(scope="module")
def by_default(sample: Sampler) -> Tensor:
    return sample()[0]


# Against diffusers' own SDXL


@pytest.mark.parametrize(
    ("scheduler", "negative"),
    [
        (DDIMScheduler, None),
        (DDIMScheduler, "blurry"),
        (EulerDiscreteScheduler, ""),
        (DPMSolverMultistepScheduler, "blurry"),
    ],
)
def test_without_identity_both_streams_are_diffusers_sdxl(diffusers_sdxl, adapter, scheduler, negative):
    prompts = ["a woman in the snow", "an oil painting of a man"]
    diffusers_sdxl.scheduler = scheduler.from_config(diffusers_sdxl.scheduler.config)
    negatives = None if negative is None else [negative] * 2
    expected = diffusers_sdxl(
        prompts, negative_prompt=negatives, latents=noise(2), height=64, width=64, output_type="latent",
        num_inference_steps=5, guidance_scale=5.0, guidance_rescale=0.3,
    ).images  # fmt: skip

    tokens, no_tokens, pooled, no_pooled = diffusers_sdxl.encode_prompt(prompts, negative_prompt=negatives)
    identity, text = reference.two_stream_sample(
        diffusers_sdxl.unet, adapter, noise(2), Text(tokens, pooled), [person(4)],
        None if negative is None else Text(no_tokens, no_pooled),
        guidance_rescale=0.3, steps=5, scheduler=diffusers_sdxl.scheduler, attention="off", id_scale=0.0,
    )  # fmt: skip
    assert error(identity, expected) < ROUNDING
    assert error(text, expected) < ROUNDING


def test_sizes_follow_the_latents(diffusers_sdxl, adapter):
    latents = draw(1, 4, 8, 24, seed=1)
    diffusers_sdxl.scheduler = reference.sdxl_ddim()
    tokens, _, pooled, _ = diffusers_sdxl.encode_prompt("a man", do_classifier_free_guidance=False)
    expected = diffusers_sdxl(
        "a man", latents=latents, height=64, width=192, num_inference_steps=2, output_type="latent"
    ).images
    _, text = reference.two_stream_sample(
        diffusers_sdxl.unet, adapter, latents, Text(tokens, pooled), [person(4)], steps=2
    )
    assert error(text, expected) < ROUNDING


def test_sampling_leaves_the_unet_as_it_was(unet, sample):
    before = unet.attn_processors
    sample()
    assert unet.attn_processors == before


# The switches


def test_text_stream_is_plain_sdxl_whatever_the_identity_does(sample):
    _, plain = sample(attention="off", id_scale=0.0, steps=2)
    for attention in ATTENTIONS:
        _, text = sample(attention=attention, style_merge="adain", pooled_text="zeros", steps=2)
        assert torch.equal(text, plain)


@pytest.mark.parametrize(
    ("attention", "style_merge"), [*(("mixed", style) for style in STYLES), ("mutual", "none"), ("off", "none")]
)
def test_streams_that_agree_cannot_change_each_other(sample, attention, style_merge):
    # At id_scale 0 both streams hold the same features: attending to keys twice, exchanging them or moving
    # their statistics onto themselves changes nothing.
    identity, text = sample(attention=attention, style_merge=style_merge, id_scale=0.0, steps=2)
    assert error(identity, text) < ROUNDING
    shared, _ = sample(attention=attention, style_merge=style_merge, id_scale=0.0, steps=2, text_stream="shared")
    assert error(shared, text) < ROUNDING


def test_with_attention_off_the_text_stream_has_no_say(sample):
    own, text = sample(attention="off")
    assert torch.equal(own, sample(attention="off", text_stream="shared")[0])
    assert error(own, text) > VISIBLE


def test_every_attention_and_style_gives_its_own_image(sample):
    images = [sample(attention=a, style_merge=s, steps=2)[0] for a in ATTENTIONS for s in STYLES]
    differences = [error(x, y) for i, x in enumerate(images) for y in images[:i]]
    assert min(differences) > VISIBLE


@pytest.mark.parametrize(
    "switch",
    [
        {"id_scale": 0.5},
        {"text_scale": 0.5},
        {"cross_merge": False},
        {"pooled_text": "zeros"},
        {"text_stream": "shared"},
        {"negative": None},
        {"guidance_rescale": 0.7},
        {"prompt": words(1, seed=8)},
        {"identities": [person(9)]},
    ],
    ids=lambda switch: next(iter(switch)),
)
def test_every_switch_changes_the_identity_stream(sample, by_default, switch):
    assert error(sample(**switch)[0], by_default) > VISIBLE


@pytest.mark.parametrize("switch", ["attention", "style_merge", "text_stream", "pooled_text"])
def test_unknown_switch_values_are_refused(switch):
    with pytest.raises(AssertionError):
        Switches(**{switch: "unknown"})


def test_shared_text_stream_sees_the_identity_latents(sample):
    # The streams start from one noise, so they part only after the first step.
    first, none = sample(text_stream="shared", steps=1)
    assert none is None
    assert error(first, sample(steps=1)[0]) < ROUNDING


def test_without_cross_merge_and_mixed_attention_no_text_enters(sample):
    silent = {"cross_merge": False, "attention": "off", "pooled_text": "zeros", "steps": 2}
    one, _ = sample(**silent)
    other, _ = sample(**silent, prompt=words(1, seed=8), negative=None, style_merge="adain")
    assert torch.equal(one, other)


def test_guidance_halves_do_not_mix(sample):
    # Guidance 0 is the unconditional half alone, guidance 1 the conditional one.
    everything_else = {"prompt": words(1, seed=8), "identities": [person(9)]}
    unconditional, _ = sample(guidance_scale=0.0)
    assert error(sample(guidance_scale=0.0, **everything_else)[0], unconditional) < ROUNDING
    conditional, _ = sample(guidance_scale=1.0)
    assert error(sample(guidance_scale=1.0, negative=None)[0], conditional) < ROUNDING


def test_images_are_prompt_major_and_do_not_know_each_other(sample):
    people, prompts, negatives = [person(4), person(5), person(6)], words(2), words(2, seed=3)
    for text_stream in ("own", "shared"):
        switches = {"text_stream": text_stream, "style_merge": "adain", "steps": 2}
        together, _ = sample(prompt=prompts, negative=negatives, identities=people, **switches)
        for p, m in ((0, 1), (1, 2)):
            prompt, negative = (Text(*(x[p : p + 1] for x in text)) for text in (prompts, negatives))
            alone, _ = sample(
                latents=noise(2)[p : p + 1], prompt=prompt, negative=negative, identities=[people[m]], **switches
            )
            assert error(together[3 * p + m : 3 * p + m + 1], alone) < ROUNDING


# Steps and layers


@pytest.mark.parametrize("attention", ["mixed", "mutual"])
def test_mixing_nowhere_is_no_mixing(sample, attention):
    # The style merge in cross-attention stays: the ranges concern self-attention alone.
    one_step = {"style_merge": "adain_mean", "steps": 1}
    off, _ = sample(attention="off", **one_step)
    for nowhere in ({"last_step": 0}, {"first_step": 1}, {"last_layer": 0}, {"first_layer": 17}):
        assert torch.equal(sample(attention=attention, **nowhere, **one_step)[0], off)
    assert error(sample(attention=attention, **one_step)[0], off) > VISIBLE


def test_each_end_of_the_ranges_counts(sample, by_default):
    for part in ({"last_step": 1}, {"first_step": 1}, {"last_layer": 9}, {"first_layer": 9}):
        image, _ = sample(**part)
        assert error(image, by_default) > VISIBLE
    assert torch.equal(sample(first_step=0, last_step=3, first_layer=0, last_layer=17)[0], by_default)


def test_self_attention_layers_are_counted_as_they_run(unet):
    ran: list[str] = []
    layers = reference.self_attention_layers(unet)
    hooks = [
        unet.get_submodule(name.removesuffix(".processor")).register_forward_hook(
            lambda *_, name=name: ran.append(name)
        )
        for name in layers
    ]
    with torch.no_grad():
        reference.call_unet(unet, {}, noise(1), torch.tensor(1), words(1))
    for hook in hooks:
        hook.remove()
    assert ran == layers
    assert len(ran) == 17


# The adapter


def test_adapter_keys_are_the_published_ones_on_the_full_sdxl():
    with torch.device("meta"):
        full = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
        )
    ranges: dict[str, list[int]] = {}
    for name, n in reference.cross_attention_indices(full).items():
        ranges.setdefault(name.split(".attentions")[0], []).append(n)
    assert {name: (indices[0], indices[-1]) for name, indices in ranges.items()} == {
        "down_blocks.1": (1, 7),
        "down_blocks.2": (9, 47),
        "up_blocks.0": (49, 107),
        "up_blocks.1": (109, 119),
        "mid_block": (121, 139),
    }
    assert [n for indices in ranges.values() for n in indices] == list(range(1, 140, 2))


@pytest.mark.parametrize("face_tokens", [1, 4])
def test_identity_tokens_are_clip_tokens_then_face_tokens(unet, face_tokens):
    weights, someone = reference.adapter_state_dict(unet, face_tokens=face_tokens), person(4)
    adapter = {key: weight.double() for key, weight in weights.items()}
    tokens = reference.identity_tokens(adapter, someone)
    assert tokens.shape == (257 + face_tokens, reference.CROSS_ATTENTION_DIM)
    other_face = reference.identity_tokens(adapter, someone._replace(face_embedding=draw(16, seed=9)))
    same = (tokens == other_face).all(dim=1)
    assert same[:257].all()
    assert not same[257:].any()


def test_only_the_direction_of_the_face_embedding_counts(adapter):
    someone = person(4)
    louder = someone._replace(face_embedding=7 * someone.face_embedding)
    tokens = reference.identity_tokens(adapter, someone)
    assert error(reference.identity_tokens(adapter, louder), tokens) < ROUNDING


def test_unconditional_tokens_belong_to_nobody(adapter):
    tokens = reference.unconditional_tokens(adapter, person(4))
    assert torch.equal(tokens, reference.unconditional_tokens(adapter, person(5)))
    # Zeros in every place: one token 257 times, but for last bits that depend on how PyTorch divides the rows.
    torch.testing.assert_close(tokens[:257], tokens[:1].expand(257, -1), rtol=0, atol=1e-6)
    assert tokens.isfinite().all()


# The laws of Eq. 5 to 8, on one attention layer


@pytest.fixture
def layer() -> Attention:
    attention = Attention(query_dim=64, heads=4, dim_head=16, cross_attention_dim=64)
    return reference.randomise(attention, 7).double()


def cross_attend(layer: Attention, style_merge: str, id_scale: float = 1.0, text_scale: float = 1.0) -> Tensor:
    maps = draw(2, 64, 64, seed=11) / 8
    processor = reference.IdentityCrossAttention(
        *maps, draw(2, 9, 64, seed=12), reference.STYLE_MERGES[style_merge], True, id_scale, text_scale
    )
    return processor(layer, draw(2, 5, 64, seed=13), draw(2, 77, 64, seed=14))


def test_adain_mean_in_cross_attention_adds_one_vector_to_every_query(layer):
    # The shift of the keys cancels in the softmax; the shift of the values comes through whole.
    added = cross_attend(layer, "adain_mean", id_scale=0.7) - cross_attend(layer, "none", id_scale=0.7)
    v_t = layer.to_v(draw(2, 77, 64, seed=14)).mean(1, keepdim=True)
    v_id = (draw(2, 9, 64, seed=12) @ (draw(2, 64, 64, seed=11)[1] / 8).T).mean(1, keepdim=True)
    expected = 0.7 * (v_t - v_id) @ layer.to_out[0].weight.T
    assert error(added, expected.expand_as(added)) < ROUNDING


def test_cross_attention_is_the_scaled_sum_of_its_two_terms(layer):
    bias = layer.to_out[0].bias
    id_term = cross_attend(layer, "adain", text_scale=0.0) - bias
    text_term = cross_attend(layer, "adain", id_scale=0.0) - bias
    both = cross_attend(layer, "adain", id_scale=0.6, text_scale=1.5)
    assert error(both, 0.6 * id_term + 1.5 * text_term + bias) < ROUNDING
    text = draw(2, 77, 64, seed=14)
    assert error(text_term + bias, layer(draw(2, 5, 64, seed=13), text)) < ROUNDING  # diffusers' own attention


def test_the_shift_of_the_keys_matters_in_mixed_attention(layer):
    x, x_t = draw(2, 5, 64, seed=13), draw(2, 5, 64, seed=15)
    key, value, key_t, value_t = layer.to_k(x), layer.to_v(x), layer.to_k(x_t), layer.to_v(x_t)

    def mixed(key: Tensor, value: Tensor) -> Tensor:
        joined = torch.cat([key, key_t], 1), torch.cat([value, value_t], 1)
        return layer.to_out[0](reference.attend(4, layer.to_q(x), *joined))

    restyle = reference.adain_mean
    actual = reference.MixedSelfAttention(key_t, value_t, restyle)(layer, x)
    assert error(actual, mixed(restyle(key, key_t), restyle(value, value_t))) < ROUNDING
    assert error(actual, mixed(key, restyle(value, value_t))) > VISIBLE


def test_mutual_attention_to_oneself_is_plain_self_attention(layer):
    x = draw(2, 5, 64, seed=13)
    actual = reference.MutualSelfAttention(layer.to_k(x), layer.to_v(x))(layer, x)
    assert error(actual, layer(x)) < ROUNDING


def test_adain_moves_the_statistics_of_each_sample_and_channel():
    x, y = draw(2, 9, 8, seed=1), 3 * draw(2, 77, 8, seed=2) + 1
    shifted, restyled = reference.adain_mean(x, y), reference.adain(x, y)
    for moved in (shifted, restyled):
        assert error(moved.mean(1), y.mean(1)) < ROUNDING
    assert error(shifted.std(1), x.std(1)) < ROUNDING
    assert error(restyled.std(1), y.std(1)) < 2e-5  # measured 7.4e-6: the 1e-5 inside the root


@pytest.mark.parametrize("restyle", [reference.adain_mean, reference.adain])
def test_restyling_commutes_with_the_head_split(restyle):
    x, y = draw(2, 9, 8, seed=1), draw(2, 77, 8, seed=2)
    heads = [restyle(x[..., i : i + 4], y[..., i : i + 4]) for i in (0, 4)]
    assert error(torch.cat(heads, -1), restyle(x, y)) < ROUNDING
