"""What a user calls: order, seeds, batches, compilation, adapters and errors."""

import dataclasses
import gc
import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from infinite_id_jax import FaceFeatures, InfiniteIDPipeline
from infinite_id_jax.conditioning import initial_noise
from infinite_id_jax.errors import CutPromptWarning, InputError
from infinite_id_jax.faces.extract import ExtractedFace
from infinite_id_jax.faces.protocol import Face
from infinite_id_jax.identity.config import AdapterConfig
from infinite_id_jax.identity.face_id import FaceIDConfig
from infinite_id_jax.people import Identity, checked_people
from infinite_id_jax.weights.folder import describe_base
from tests.conftest import write_small_adapter

FAST = {"steps": 2, "height": 64, "width": 64, "output": "latent"}


@pytest.fixture(scope="module")
def pipe(small_pipe):
    return small_pipe


@pytest.fixture(scope="module")
def people(pipe, small):
    return [pipe.encode_identity(FaceFeatures(**small.features(seed))) for seed in (10, 11)]


def compilations(pipe) -> int:
    return pipe._sample._cache_size()


def test_prompts_seeds_scales_and_identities_do_not_recompile(pipe, people):
    pipe(["a man", "a dog"], people, **FAST)
    before = compilations(pipe)
    pipe(["a woman in the snow", "a cat"], people[::-1], seed=[7, 3], **FAST)
    pipe(["a man", "a dog"], people, negative_prompt="blurry", guidance_scale=7.5, guidance_rescale=0.3, **FAST)
    pipe(["a man", "a dog"], people, id_scale=0.3, text_scale=1.2, latents=np.ones((2, 8, 8, 4)), **FAST)
    pipe(["a man", "a dog"], people, progress=None, **FAST)
    assert compilations(pipe) == before
    pipe(["a man", "a dog"], people, attention="off", **FAST)  # the count does count
    assert compilations(pipe) == before + 1


def test_images_come_in_prompt_major_order(pipe, people):
    both = pipe(["a man", "a dog"], people, seed=[1, 2], **FAST)
    assert both.latents.shape == (4, 8, 8, 4)
    assert both.text_stream_latents.shape == (2, 8, 8, 4)
    for p, (prompt, seed) in enumerate((("a man", 1), ("a dog", 2))):
        for m, person in enumerate(people):
            alone = pipe(prompt, person, seed=seed, **FAST)
            # The same image alone or in any batch. Measured: 1.8e-5, latents up to 12.
            np.testing.assert_allclose(both.latents[2 * p + m], alone.latents[0], atol=1e-4)
    differences = [np.abs(both.latents[0] - both.latents[i]).max() for i in (1, 2, 3)]
    assert min(differences) > 1e-2


def test_the_text_stream_is_plain_sdxl(pipe, people):
    """Features flow from text to identity only, so the text rows end where text-to-image ends."""
    streams = pipe(["a man", "a dog"], people, seed=5, **FAST)
    plain = pipe(["a man", "a dog"], seed=5, **FAST)
    assert plain.latents.shape == (2, 8, 8, 4)
    np.testing.assert_allclose(streams.text_stream_latents, plain.latents, atol=1e-4)


def test_without_identity_and_mixing_the_identity_stream_is_plain_sdxl(pipe, people):
    """id_scale 0, mixing off, the prompt's text, which is plain SDXL."""
    out = pipe(["a man", "a dog"], people, seed=5, attention="off", id_scale=0.0, **FAST)
    for p in range(2):
        for m in range(2):
            np.testing.assert_allclose(out.latents[2 * p + m], out.text_stream_latents[p], atol=1e-4)


def test_an_integer_seed_counts_up(pipe):
    a = pipe(["a man", "a man"], seed=4, **FAST)
    b = pipe(["a man", "a man"], seed=[4, 5], **FAST)
    np.testing.assert_array_equal(a.latents, b.latents)
    assert np.abs(a.latents[0] - a.latents[1]).max() > 1e-2


def test_a_second_text_encoder_projects_even_if_its_file_names_no_class(small, tmp_path, pipe):
    model = shutil.copytree(small.model, tmp_path / "model")
    path = model / "text_encoder_2" / "config.json"
    config = json.loads(path.read_text())
    del config["architectures"]
    path.write_text(json.dumps(config))
    assert InfiniteIDPipeline.from_pretrained(model).settings == pipe.settings


def test_words_beyond_the_text_encoders_are_told(pipe):
    assert pipe.cut_words("a man in the snow") == ""
    long = "snow " * 300 + "lighthouse"
    assert pipe.cut_words(long).endswith("lighthouse")
    for prompts in ((long, None), ("a man", long), ("a man", [long])):
        with pytest.warns(CutPromptWarning, match="too long; .* lighthouse"):
            pipe(prompts[0], negative_prompt=prompts[1], **FAST)


def test_guidance_of_one_is_the_conditional_prediction(pipe, people):
    """It runs half the rows; a scale next to 1 in the full program gives the same picture."""
    half = pipe(["a man", "a dog"], people, guidance_scale=1.0, **FAST)
    full = pipe(["a man", "a dog"], people, guidance_scale=1.0 + 1e-6, **FAST)
    np.testing.assert_allclose(half.latents, full.latents, atol=1e-3)


def test_outputs(pipe, people):
    calls = {k: v for k, v in FAST.items() if k != "output"}
    steps = []
    pil = pipe("a man", people, output="pil", progress=steps.append, **calls)
    floats = pipe("a man", people, output="numpy", **calls)
    assert steps == [1, 2]
    assert all(isinstance(image, Image.Image) and image.size == (64, 64) for image in pil.images)
    assert floats.images.shape == (2, 64, 64, 3)
    assert 0 <= floats.images.min() <= floats.images.max() <= 1
    np.testing.assert_allclose(np.asarray(pil.images[1]) / 255, floats.images[1], atol=0.51 / 255)
    assert pipe("a man", people, **FAST).images is None


def test_mixtures_stand_beside_single_people(pipe, people):
    pair = pipe.mix_identities(people)
    assert pair.tokens.shape == (516, 64)
    between = pipe.mix_identities(people, [0.5, 0.5])
    assert between.tokens.shape == (258, 64)
    together = pipe("a man", [pair, people[0]], **FAST)
    alone = pipe("a man", people[0], **FAST)
    np.testing.assert_allclose(together.latents[1], alone.latents[0], atol=1e-4)
    assert np.abs(together.latents[0] - together.latents[1]).max() > 1e-3
    one_sided = pipe("a man", pipe.mix_identities(people, [1.0, 0.0]), **FAST)
    np.testing.assert_allclose(one_sided.latents, alone.latents, atol=1e-4)


def test_an_adapter_round_trip_is_bit_exact(pipe, small, tmp_path):
    pipe.save_adapter(tmp_path / "copy")
    from safetensors.numpy import load_file

    original, copy = (load_file(folder / "adapter.safetensors") for folder in (small.adapter, tmp_path / "copy"))
    assert original.keys() == copy.keys()
    for key, array in original.items():
        np.testing.assert_array_equal(array, copy[key])
    assert InfiniteIDPipeline.from_pretrained(small.model, tmp_path / "copy").adapter.config == pipe.adapter.config


def test_half_precision_draws_nearly_the_same(pipe, people, small):
    half = InfiniteIDPipeline.from_pretrained(small.model, small.adapter, dtype="bfloat16")
    same = [half.encode_identity(FaceFeatures(**small.features(seed))) for seed in (10, 11)]
    ours, full = (p(["a man", "a dog"], who, **FAST).latents for p, who in ((half, same), (pipe, people)))
    # Measured: 0.033 of the largest latent; bfloat16 keeps 8 bits.
    assert np.abs(ours - full).max() <= 0.08 * np.abs(full).max()


def test_loras_merged_or_beside_the_weights(small, tmp_path):
    """Both draw the same; beside them, another strength compiles nothing; two files are one after the other."""
    files = []
    for number, layer in enumerate(("attn1.to_q", "attn2.to_v")):
        generator = torch.Generator().manual_seed(number)
        stem = f"unet.mid_block.attentions.0.transformer_blocks.0.{layer}.lora"
        shapes = {"A": (2, 64), "B": (64, 2)}
        state = {f"{stem}_{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        files.append(tmp_path / f"{number}.safetensors")
        save_file(state, files[-1])

    def draw(pipe):
        return pipe("a man", seed=3, **FAST).latents

    merged = draw(InfiniteIDPipeline.from_pretrained(small.model, lora=dict(zip(files, (0.5, 1.0), strict=True))))
    beside = InfiniteIDPipeline.from_pretrained(small.model, lora=files, merge_lora=False)
    full, before = draw(beside), compilations(beside)
    beside.set_lora_scale(files[0], 0.5)
    np.testing.assert_allclose(draw(beside), merged, atol=1e-4)  # measured: 1.3e-5, latents up to 12
    assert np.abs(full - merged).max() > 1e-2
    assert compilations(beside) == before
    with pytest.raises(InputError, match="The LoRA's scale is nan"):
        beside.set_lora_scale(files[0], np.nan)
    with pytest.raises(InputError, match=r"1\.safetensors is named twice"):
        InfiniteIDPipeline.from_pretrained(small.model, lora=[files[1], tmp_path / "." / "1.safetensors"])
    with pytest.raises(InputError, match=r"The scale of .*0\.safetensors is inf"):
        InfiniteIDPipeline.from_pretrained(small.model, lora={files[0]: np.inf})


def test_several_face_tokens(small, tmp_path):
    folder = write_small_adapter(tmp_path / "four", clip_dim=32, face_dim=16, face_tokens=4)
    person = InfiniteIDPipeline.from_pretrained(small.model, folder).encode_identity(FaceFeatures(**small.features(1)))
    assert person.tokens.shape == (261, 64)


def test_a_photograph_becomes_an_identity(small, tmp_path):
    """The real detector and recogniser on a real photo, then CLIP, then the mappers."""
    from tests.photos import astronaut

    folder = write_small_adapter(tmp_path / "dlib", clip_dim=32, face_dim=128)
    pipe = InfiniteIDPipeline.from_pretrained(small.model, folder, faces="offline")
    path = tmp_path / "astronaut.png"
    Image.fromarray(np.asarray(astronaut())).save(path)
    person = pipe.encode_identity(path)
    assert person.tokens.shape == (258, 64)
    assert person.face.clip_crop.shape == (224, 224, 3)
    again = pipe.encode_identity(person.face)
    np.testing.assert_array_equal(person.tokens, again.tokens)
    from_pil = pipe.encode_identity(Image.open(path))
    np.testing.assert_array_equal(person.tokens, from_pil.tokens)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"scheduler": "ddpm"}, "ddpm"),
        ({"style_merge": "mean"}, "style_merge"),
        ({"attention": "both"}, "attention"),
        ({"text_stream": "third"}, "text_stream"),
        ({"output": "jpeg"}, "output"),
        ({"height": 70}, "height 70 is not a multiple of 8: take 72"),
        ({"width": 0}, "width 0"),
        ({"width": 16384}, "width 16384 is more than 8192"),
        ({"guidance_rescale": 7.5}, "guidance_rescale 7.5 is out of range"),
        ({"steps": 0}, "0 steps"),
        ({"seed": -1}, "Seeds lie between 0 and 4294967295"),
        ({"seed": [1, 2, 3]}, "3 seeds for 1 prompts"),
        ({"latents": np.full((1, 8, 8, 4), np.nan)}, "not finite: take the dtype bfloat16 or float32"),
        ({"step_range": (2, None)}, "step_range begins at 2 and there are 2 steps"),
        ({"guidance_range": (3, 9)}, "guidance_range begins at 3 and there are 2 steps"),
        ({"layer_range": (99, None)}, r"layer_range begins at 99 and there are \d+ layers"),
        ({"latents": np.zeros((1, 4, 8, 8))}, r"\[1, 4, 8, 8\]"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"negative_prompt": ["a", "b"], "guidance_scale": 1.0}, "2 negative prompts for 1 prompts"),
        ({"text_scale": np.nan}, "text_scale is nan"),
        ({"guidance_scale": np.inf}, "guidance_scale is inf"),
        ({"step_range": (3, 1)}, r"step_range \(3, 1\) is no range"),
        ({"cache_interval": 0}, "cache_interval 0 is too small: give 1 or more"),
        ({"guidance_range": (3, 1)}, r"guidance_range \(3, 1\) is no range"),
        ({"layer_range": (-1, None)}, r"layer_range \(-1, None\) is no range"),
    ],
)
def test_calls_that_cannot_be_used(pipe, people, call, says):
    with pytest.raises(InputError, match=says):
        pipe("a man", people, **{**FAST, **call})


def test_what_is_no_identity_is_told_how_to_become_one(pipe, small):
    """As without these tests' checks of types, which would come before."""
    for wrong, kind in ((FaceFeatures(**small.features(0)), "FaceFeatures"), ("anna.jpg", "str"), ([None], "NoneType")):
        with pytest.raises(InputError, match=f"A {kind} is no identity: make one of it with encode_identity"):
            checked_people(wrong)


@pytest.mark.parametrize("seed", [1.5, [1.5], "7", None])
def test_seeds_are_whole_numbers(seed):
    with pytest.raises(InputError, match="give a whole number, or one for each prompt"):
        getattr(initial_noise, "__wrapped__", initial_noise)(1, (2, 2, 4), seed, None)


def test_adain_needs_several_tokens_and_as_many_of_each(people):
    both = people[0].tokens, people[0].unconditional
    one, two = (Identity(*(tokens[:n] for tokens in both)) for n in (1, 2))
    for merge, shown, says in (
        ("adain_mean", [one], "of a single one nothing would be left"),
        ("adain", [two, people[1]], "which differ in number here"),
    ):
        with pytest.raises(InputError, match=says):
            checked_people(shown, merge)
        assert checked_people(shown) == shown
    assert checked_people([two, people[1]], "adain_mean") == [two, people[1]]


def test_inner_levels_are_run_anew_where_mixing_begins_and_ends(pipe, people):
    """Of steps 0 and 1 kept together, the second alone is mixed: it is not what the first kept."""
    options = {**FAST, "cache_interval": 2}
    off = pipe("a man", people, attention="off", **options).latents
    late, early, always = (
        pipe("a man", people, step_range=steps, **options).latents for steps in ((1, None), (0, 1), (0, None))
    )
    assert np.abs(late - off).max() > 1e-3
    assert np.abs(early - always).max() > 1e-3


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("unet", {"in_channels": 9}, "takes latents of 9 channels, its autoencoder those of 4"),
        ("unet", {"out_channels": 8}, "takes latents of 4 channels and gives 8"),
        ("text_encoder", {"hidden_size": 32}, "takes text of width 64, its encoders give"),
        ("text_encoder_2", {"projection_dim": 24}, "pooled text of"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(small, tmp_path, part, change, says):
    shutil.copytree(small.model, tmp_path / "model")
    path = tmp_path / "model" / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=says):
        describe_base(tmp_path / "model")


def test_embeddings_of_another_recogniser_are_refused():
    """Of as many numbers: only the name tells."""
    for config, known, other in (
        (FaceIDConfig(), "insightface/buffalo_l", "insightface/antelopev2"),
        (AdapterConfig(recogniser="miniature", face_dim=128), "miniature", "offline"),
    ):
        config.check_recogniser(known, config.face_dim)
        config.check_recogniser("of one's own", config.face_dim)
        with pytest.raises(InputError, match=f"of {known}, which those of {other} cannot be compared with"):
            config.check_recogniser(other, config.face_dim)
    AdapterConfig(face_dim=128).check_recogniser("offline", 128)
    assert AdapterConfig.from_dict(AdapterConfig(recogniser="miniature").to_dict()).recogniser == "miniature"


def test_a_face_says_which_recogniser_saw_it(small, tmp_path):
    """As a photo does, in whatever pipeline it was found."""
    folder = shutil.copytree(small.adapter, tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recogniser": "miniature"}))
    pipe = InfiniteIDPipeline.from_pretrained(small.model, folder)
    crop, numbers = np.zeros((224, 224, 3), np.uint8), np.ones(pipe.adapter.config.face_dim, np.float32)
    face = ExtractedFace(Face((0.0, 0.0, 9.0, 9.0), 1.0, np.zeros((5, 2))), 1, crop, crop, crop, numbers, "offline")
    with pytest.raises(InputError, match="of miniature, which those of offline cannot be compared with"):
        pipe.encode_identity(face)
    for name in ("miniature", ""):
        pipe.encode_identity(dataclasses.replace(face, recogniser=name))


def test_a_pipeline_that_told_of_its_steps_can_be_forgotten(small):
    """Compiled programs stay, and hold what they call."""
    told = []
    pipe = InfiniteIDPipeline.from_pretrained(small.model)
    pipe("a man", progress=told.append, **FAST)
    assert told == [1, 2]
    gone = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None


def test_models_and_features_that_do_not_fit(pipe, small, tmp_path):
    with pytest.raises(InputError, match="no prompt"):
        pipe([], **FAST)
    features = small.features(0)
    with pytest.raises(
        InputError, match=r"clip_hidden_states has shape \[257, 31\] and this adapter takes \[tokens, 32\]"
    ):
        pipe.encode_identity(FaceFeatures(features["clip_hidden_states"][:, :31], features["face_embedding"]))
    with pytest.raises(
        InputError, match=r"face_embedding has shape \[1, 16\] .* give each face of the batch by itself"
    ):
        pipe.encode_identity(FaceFeatures(features["clip_hidden_states"], features["face_embedding"][None]))
    with pytest.raises(InputError, match=r"adapter folder .* does not exist"):
        InfiniteIDPipeline.from_pretrained(small.model, tmp_path / "none")
    with pytest.raises(InputError, match="float8"):
        InfiniteIDPipeline.from_pretrained(small.model, dtype="float8")
    with pytest.raises(InputError, match="float16 does not run on a CPU"):
        InfiniteIDPipeline.from_pretrained(small.model, dtype="float16")
    bare = InfiniteIDPipeline.from_pretrained(small.model)
    with pytest.raises(InputError, match="need an adapter"):
        bare.encode_identity(FaceFeatures(**features))
    wide = write_small_adapter(tmp_path / "wide", clip_dim=32, face_dim=16)
    config = wide / "adapter_config.json"
    config.write_text(config.read_text().replace('"cross_attention_dim": 64', '"cross_attention_dim": 768'))
    with pytest.raises(InputError, match="width 768, the model 64"):
        InfiniteIDPipeline.from_pretrained(small.model, wide)
