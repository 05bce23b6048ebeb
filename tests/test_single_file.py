"""Single-file checkpoints in the original layout, both ways, and the whole base back to diffusers.

The oracle of the names is diffusers' own conversion of such files.
"""

import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file

from examples.tiny_vocabulary import byte_symbols
from infinite_id_jax.diffusion.schedule import alphas_cumprod
from infinite_id_jax.errors import InputError
from infinite_id_jax.identity.inject import inject
from infinite_id_jax.sharding import make_mesh, parameter_sharding
from infinite_id_jax.stable_diffusion.clip_text import CLIPTextModel
from infinite_id_jax.stable_diffusion.tokenizer import EOS, MERGES, CLIPTokenizer
from infinite_id_jax.weights.adapter import load_adapter
from infinite_id_jax.weights.compvis import Placed, unet_names
from infinite_id_jax.weights.export import torch_state
from infinite_id_jax.weights.folder import (
    StableDiffusionXL,
    load_base,
    load_text_encoders,
    load_tokenizers,
    load_unet,
    read_settings,
    resolve,
)
from infinite_id_jax.weights.load import abstract, fill, open_tensors
from infinite_id_jax.weights.save_base import save_base, save_single_file
from infinite_id_jax.weights.settings import SDXL
from infinite_id_jax.weights.single_file import places
from tests.test_tokenizer import TEXTS, detailed_settings, reference
from tests.test_weights import Counted, files_limited_to

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def base(tiny) -> StableDiffusionXL:
    return load_base(tiny.model)


@pytest.fixture(scope="module")
def original(base, tmp_path_factory) -> Path:
    """The tiny SDXL in the original layout, written by us."""
    path = tmp_path_factory.mktemp("original") / "tiny.safetensors"
    save_single_file(base, path)
    return path


@pytest.fixture
def rewritten(original, tmp_path) -> Callable[..., Path]:
    """`rewritten(change)`: a copy of the file whose tensors `change` has changed in place, as by another program."""

    def rewrite(change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
        tensors = load_file(original)
        change(tensors)
        save_file(tensors, tmp_path / "changed.safetensors")
        return tmp_path / "changed.safetensors"

    return rewrite


def states(base: StableDiffusionXL) -> dict[str, dict[str, np.ndarray]]:
    models = (base.unet, base.vae, *base.text_encoders)
    return {part: torch_state(model) for part, model in zip(PARTS, models, strict=True)}


def assert_same(one: StableDiffusionXL, other: StableDiffusionXL) -> None:
    """Bit for bit, in every part."""
    assert one.settings == other.settings
    for part, state in states(one).items():
        again = states(other)[part]
        assert state.keys() == again.keys()
        for key, array in state.items():
            assert array.dtype == again[key].dtype
            assert array.tobytes() == again[key].tobytes(), (part, key)


def as_diffusers_converts(file: dict[str, torch.Tensor], models: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """The four state dicts of diffusers and transformers from a file's tensors; `models` are theirs, to configure."""
    converted = {
        "unet": convert_ldm_unet_checkpoint(dict(file), models["unet"].config),
        "vae": convert_ldm_vae_checkpoint(dict(file), models["vae"].config),
        "text_encoder": convert_ldm_clip_checkpoint(file),
        "text_encoder_2": convert_open_clip_checkpoint(
            models["text_encoder_2"], file, prefix="conditioner.embedders.1.model."
        ),
    }
    return {
        part: {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
        for part, state in converted.items()
    }


def their_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key.removeprefix("text_model."): tensor for key, tensor in model.state_dict().items()}


# The names


def full_size_models() -> dict[str, torch.nn.Module]:
    """SDXL as diffusers and transformers build it of its published configurations, without memory."""
    unet, vae, (first, second), *_ = SDXL
    with torch.device("meta"):
        return {
            "unet": diffusers.UNet2DConditionModel(**unet.to_dict()),
            "vae": diffusers.AutoencoderKL(
                **vae.to_dict(),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            ),
            "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**first.to_dict())),
            "text_encoder_2": transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**second.to_dict())),
        }


def test_full_size_names_and_shapes_invert_as_diffusers_does():
    """Every tensor of SDXL has its place, and diffusers' conversion of those places gives SDXL and nothing else."""
    tables = places(SDXL)
    assert [len(table) for table in tables.values()] == [1680, 248, 196, 517]
    stored = {place.key: place.stored_shape for table in tables.values() for place in table.values()}
    # The published file also holds position_ids and logit_scale, which are no parameters of SDXL.
    assert len(stored) == 2513
    parameters = 2_567_463_684 + 83_653_863 + 123_060_480 + 694_659_840
    assert sum(map(math.prod, stored.values())) == parameters
    assert stored["first_stage_model.encoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)
    assert stored["conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"] == (3840, 1280)
    file = {key: torch.empty(shape, device="meta") for key, shape in stored.items()}
    models = full_size_models()
    converted = as_diffusers_converts(file, models)
    for part, model in models.items():
        expected = {key: tuple(tensor.shape) for key, tensor in their_state(model).items()}
        assert {key: tuple(tensor.shape) for key, tensor in converted[part].items()} == expected
        assert {key: place.shape for key, place in tables[part].items()} == expected


def test_each_tensor_has_one_place():
    for table in places(SDXL).values():
        assert len({(place.key, place.third) for place in table.values()}) == len(table)
        thirds: dict[str, set[int]] = {}
        for place in table.values():
            thirds.setdefault(place.key, set()).add(place.third)
        stacked = {place.key for place in table.values() if place.form == "third"}
        assert all(numbers == ({0, 1, 2} if key in stacked else {0}) for key, numbers in thirds.items())


@pytest.mark.parametrize(
    ("part", "ours", "theirs"),
    [
        ("unet", "add_embedding.linear_2.bias", "model.diffusion_model.label_emb.0.2.bias"),
        ("unet", "down_blocks.1.downsamplers.0.conv.weight", "model.diffusion_model.input_blocks.6.0.op.weight"),
        ("unet", "up_blocks.0.upsamplers.0.conv.bias", "model.diffusion_model.output_blocks.2.2.conv.bias"),
        ("vae", "decoder.up_blocks.0.upsamplers.0.conv.bias", "first_stage_model.decoder.up.3.upsample.conv.bias"),
        (
            "vae",
            "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
            "first_stage_model.encoder.down.1.block.0.nin_shortcut.bias",
        ),
        (
            "text_encoder",
            "encoder.layers.11.mlp.fc2.bias",
            "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc2.bias",
        ),
        (
            "text_encoder_2",
            "encoder.layers.31.mlp.fc2.bias",
            "conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_proj.bias",
        ),
        ("text_encoder_2", "text_projection.weight", "conditioner.embedders.1.model.text_projection"),
    ],
)
def test_names_as_published(part, ours, theirs):
    assert places(SDXL)[part][ours].key == theirs


def test_unet_names_are_of_the_unet_alone():
    names = unet_names(SDXL.unet)
    assert names["mid_block.attentions.0.transformer_blocks.9.attn2.to_k.weight"] == (
        "middle_block.1.transformer_blocks.9.attn2.to_k.weight"
    )
    assert len(names) == len(set(names.values())) == 1680


# Out and in


def test_diffusers_reads_our_file_bit_for_bit(original, tiny):
    models = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
    }
    theirs = {part: kind.from_pretrained(tiny.model / part) for part, kind in models.items()}
    for part, state in as_diffusers_converts(load_file(original), theirs).items():
        expected = their_state(theirs[part])
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ours_to_a_file_to_ours_is_bit_exact(base, tiny, tmp_path, dtype):
    before = base if dtype == "float32" else load_base(tiny.model, dtype=dtype)
    save_single_file(before, tmp_path / "model.safetensors")
    assert_same(load_base(tmp_path / "model.safetensors", config=tiny.model, dtype=dtype), before)


def test_a_sharding_reads_each_element_of_the_file_once(original, base, tiny):
    """Also of stacked and transposed tensors, where several devices and several of our arrays share one."""
    sharding = parameter_sharding(make_mesh("data=2,fsdp=2,tensor=2"))
    settings = base.settings
    with ExitStack() as stack:
        file = {key: Counted(tensor) for key, tensor in open_tensors(original, stack).items()}
        table = places(settings)["text_encoder_2"]
        views = {key: Placed(file[place.key], place) for key, place in table.items()}
        encoder = fill(
            abstract(lambda rngs: CLIPTextModel(settings.text[1], rngs=rngs)), views, name="", sharding=sharding
        )
    read = {place.key for place in table.values()}
    assert all(tensor.read_elements == (np.prod(tensor.shape) if key in read else 0) for key, tensor in file.items())
    expected = states(base)["text_encoder_2"]
    assert all(np.array_equal(array, expected[key]) for key, array in torch_state(encoder).items())


def test_what_other_programs_leave_in_their_files_is_no_matter(rewritten, base, tiny):
    carried = {
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(2, 2),
        "denoiser.sigmas": torch.zeros(1000),
        "alphas_cumprod": torch.zeros(1000),
        "sqrt_recipm1_alphas_cumprod": torch.zeros(1000),
        "betas": torch.zeros(1000),
        "posterior_mean_coef1": torch.zeros(1000),
        "scale_factor": torch.tensor(0.13025),
        "first_stage_model.loss.logvar": torch.tensor(0.0),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "conditioner.embedders.0.transformer.text_projection.weight": torch.zeros(3, 3),
        "conditioner.embedders.0.logit_scale": torch.tensor(4.6),
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
    }
    assert_same(load_base(rewritten(lambda file: file.update(carried)), config=tiny.model), base)


# Configurations


def test_without_a_configuration_a_file_is_sdxl(original):
    """The widths of the tiny one are not SDXL's, and the error says what it was taken for."""
    says = r"tiny\.safetensors \(taken for SDXL 1\.0; .* --model-config .*\) does not fit.* of another shape"
    with pytest.raises(InputError, match=says):
        read_settings(original)


def test_a_configuration_may_say_less_than_all(tiny, original, tmp_path):
    for part in PARTS:
        (tmp_path / part).mkdir()
        shutil.copy(tiny.model / part / "config.json", tmp_path / part)
    with pytest.raises(InputError, match=r"has a text encoder of 1024 words: put its tokenizer/ there too"):
        read_settings(original, tmp_path)  # CLIP's own has 49,408
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(tiny.model / part, tmp_path / part)
    settings = read_settings(original, tmp_path)
    assert settings == read_settings(tiny.model)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"timestep_spacing": "trailing"}')
    expected = dataclasses.replace(settings.schedule, timestep_spacing="trailing")
    assert read_settings(original, tmp_path) == settings._replace(schedule=expected)


def test_configurations_that_are_none(tiny, original, tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path} is no folder with the configurations.*holds none of unet, vae"):
        read_settings(original, tmp_path)
    with pytest.raises(InputError, match=f"{tiny.model} is a folder with configurations of its own: leave out"):
        read_settings(tiny.model, tiny.model)


def without_scheduler(tiny, folder: Path) -> Path:
    return shutil.copytree(tiny.model, folder, ignore=shutil.ignore_patterns("scheduler", "*.safetensors"))


def test_the_marker_of_v_prediction(rewritten, base, tiny, tmp_path):
    config = without_scheduler(tiny, tmp_path / "config")
    path = rewritten(lambda file: file.update(v_pred=torch.zeros(0)))
    settings = read_settings(path, config)
    assert settings.schedule == dataclasses.replace(base.settings.schedule, prediction_type="v_prediction")
    assert read_settings(path, tiny.model) == base.settings  # a scheduler that is named goes before
    save_single_file(base._replace(settings=settings), tmp_path / "v.safetensors")
    assert_same(load_base(tmp_path / "v.safetensors", config=config), base._replace(settings=settings))


@pytest.mark.parametrize(("said", "expected"), [("v", "v_prediction"), ("epsilon", "epsilon")])
def test_what_a_header_says_of_the_prediction(original, tiny, tmp_path, said, expected):
    """As kohya's scripts write it."""
    save_file(load_file(original), tmp_path / "said.safetensors", metadata={"modelspec.prediction_type": said})
    config = without_scheduler(tiny, tmp_path / "config")
    assert read_settings(tmp_path / "said.safetensors", config).schedule.prediction_type == expected


def test_a_table_of_noise_is_sdxls_or_refused(rewritten, tiny, tmp_path):
    """Of zero terminal SNR after Lin et al. 2023, Alg. 1."""
    sdxl = torch.from_numpy(alphas_cumprod(SDXL.schedule))
    roots = sdxl.sqrt()
    zero = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2
    config = without_scheduler(tiny, tmp_path / "config")
    path = rewritten(lambda file: file.update(alphas_cumprod=sdxl.bfloat16()))
    assert read_settings(path, config).schedule == SDXL.schedule
    path = rewritten(lambda file: file.update(alphas_cumprod=zero.bfloat16()))
    with pytest.raises(InputError, match=r"has a table of noise that is not SDXL's.*name a configuration folder"):
        read_settings(path, config)


def test_zero_terminal_snr_needs_a_scheduler(rewritten, base, tiny, tmp_path):
    path = rewritten(lambda file: file.update(v_pred=torch.zeros(0), ztsnr=torch.zeros(0)))
    with pytest.raises(InputError, match=r"changed\.safetensors was trained to zero terminal SNR.*name a config"):
        read_settings(path, without_scheduler(tiny, tmp_path / "config"))
    assert read_settings(path, tiny.model) == base.settings


# Tokenizers: a file has none


def test_the_merges_are_those_that_clip_was_published_with():
    digest = hashlib.sha256(MERGES.read_bytes()).hexdigest()
    assert digest == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


@pytest.mark.parametrize("pad_token", [EOS, "!"])
def test_clips_own_tokenizer_as_transformers_has_it(base, tmp_path, pad_token):
    tokenizer = CLIPTokenizer.of_clip(pad_token)
    save_base(base._replace(tokenizers=(tokenizer, tokenizer)), tmp_path / "saved")
    folder = tmp_path / "saved" / "tokenizer"
    ids = tokenizer(TEXTS)
    np.testing.assert_array_equal(ids, reference(folder, TEXTS))
    np.testing.assert_array_equal(ids, CLIPTokenizer.from_folder(folder)(TEXTS))
    detailed_settings(folder, pad_token)  # SDXL's own in place of ours
    np.testing.assert_array_equal(ids, reference(folder, TEXTS))
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == list(range(49408))
    assert list(vocabulary)[:256] == list(byte_symbols().values())


def test_ids_as_published():
    """Of CLIP's and OpenCLIP's own examples, and of the specials."""
    first, second = CLIPTokenizer.of_clip(), CLIPTokenizer.of_clip("!")
    astronaut = [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407]
    text = "a photo of an astronaut riding a horse on mars"
    assert first([text])[0].tolist() == astronaut + [49407] * (77 - 12)
    assert second([text])[0].tolist() == astronaut + [0] * (77 - 12)
    assert first(["Hello World!", "a diagram", "a dog", "a cat"])[:, :5].tolist() == [
        [49406, 3306, 1002, 256, 49407],
        [49406, 320, 22697, 49407, 49407],
        [49406, 320, 1929, 49407, 49407],
        [49406, 320, 2368, 49407, 49407],
    ]


def test_tokenizers_of_a_file_are_clips_or_those_of_the_configuration(original, tiny, tmp_path):
    for tokenizer, pad_id in zip(load_tokenizers(original), (49407, 0), strict=True):
        assert tokenizer(["a dog"])[0, :5].tolist() == [49406, 320, 1929, 49407, pad_id]
    for ours, theirs in zip(load_tokenizers(original, tiny.model), load_tokenizers(tiny.model), strict=True):
        np.testing.assert_array_equal(ours(TEXTS), theirs(TEXTS))


# Refusals: one sentence that says what it looks like


def only(keys: dict[str, tuple[int, ...]]) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(file: dict[str, torch.Tensor]) -> None:
        file.clear()
        file.update({key: torch.zeros(shape) for key, shape in keys.items()})

    return change


def widened(channels: int) -> Callable[[dict[str, torch.Tensor]], None]:
    key = "model.diffusion_model.input_blocks.0.0.weight"
    return lambda file: file.update({key: torch.zeros(32, channels, 3, 3)})


def without(prefix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda file: [file.pop(key) for key in list(file) if key.startswith(prefix)]


UNET = "model.diffusion_model."
OTHERS = {
    "sd 1.5": (only({UNET + "out.2.bias": (4,), "cond_stage_model.transformer.x": (1,)}), "looks like SD 1.5: "),
    "sd 2": (only({UNET + "out.2.bias": (4,), "cond_stage_model.model.ln_final.bias": (1,)}), "looks like SD 2: "),
    "refiner": (only({"conditioner.embedders.0.model.ln_final.bias": (1280,)}), "looks like the SDXL refiner: "),
    "flux": (only({UNET + "double_blocks.0.img_mod.lin.bias": (4,)}), "looks like Flux: "),
    "flux alone": (only({"double_blocks.0.img_mod.lin.bias": (4,)}), "looks like Flux: "),
    "sd 3": (only({UNET + "joint_blocks.0.x_block.mlp.fc1.bias": (4,)}), "looks like SD 3: "),
    "edm": (lambda file: file.update(edm_mean=torch.zeros(4)), r"looks like .*EDM.*: "),
    "inpainting": (widened(9), r"looks like an inpainting model .*9 channels.*: "),
    "pix2pix": (widened(8), r"looks like an InstructPix2Pix model .*8 channels.*: "),
    "lora": (
        only({"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 2048)}),
        "looks like a LoRA",
    ),
    "adapter": (only({"ip_adapter.1.to_k_ip.weight": (640, 2048)}), "looks like an SDXL adapter: "),
    "one part": (only({"down_blocks.0.resnets.0.norm1.weight": (320,)}), "looks like a U-Net: "),
    "unknown": (only({"weight": (1,)}), "holds nothing known: "),
    "no vae": (without("first_stage_model."), "holds no VAE: take"),
    "u-net alone": (
        without("conditioner."),
        "holds no first text encoder and no second text encoder: take a checkpoint that holds the whole SDXL",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_refused_by_name(rewritten, tiny, name):
    change, words = OTHERS[name]
    path = rewritten(change)
    with pytest.raises(InputError, match=words) as refusal:
        read_settings(path, tiny.model)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)


def test_all_wrong_keys_in_one_error_under_the_names_of_the_file(rewritten, tiny):
    projection = "conditioner.embedders.1.model.text_projection"
    attention = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias"

    def change(file: dict[str, torch.Tensor]) -> None:
        del file[UNET + "out.2.bias"], file[attention]
        file[projection] = file[projection].T.contiguous()
        file["first_stage_model.decoder.extra"] = torch.zeros(1)

    path = rewritten(change)
    with pytest.raises(InputError) as refusal:
        load_base(path, config=tiny.model)
    for words in (
        f"{path} does not fit",
        f"2 missing: {attention}, {UNET}out.2.bias;",
        "1 surplus: first_stage_model.decoder.extra;",
        f"1 of another shape: {projection} (32x40 instead of 40x32)",
    ):
        assert words in str(refusal.value)


@pytest.mark.parametrize(
    "damage",
    [lambda x: x[:-1], lambda x: x[: len(x) // 2], lambda x: x[:100], lambda x: b"", lambda x: b"<html>" * 99],
    ids=["last byte", "half", "header", "empty", "html"],
)
def test_a_damaged_file_is_named(original, tiny, tmp_path, damage):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damage(original.read_bytes()))
    with pytest.raises(InputError, match=rf"{path} is not a whole safetensors file .*: fetch it again"):
        read_settings(path, tiny.model)


def test_one_flipped_bit_is_found_whichever_part_is_loaded(original, base, tiny, tmp_path):
    content = bytearray(original.read_bytes())
    content[-1] ^= 1
    path = tmp_path / "flipped.safetensors"
    path.write_bytes(content)
    settings = read_settings(path, tiny.model)  # which reads the header alone
    for load in (load_unet, load_text_encoders):
        with pytest.raises(InputError, match=re.escape(f"{path} is damaged (its checksum")):
            load(path, settings)
    shutil.copy(original, path)  # mended
    assert_same(load_base(path, config=tiny.model), base)


def test_resolve_takes_a_safetensors_file_and_no_pickle(original, tmp_path):
    assert resolve(original) == resolve(str(original)) == original
    for name in ("model.ckpt", "model.pt", "model.bin"):
        torch.save({}, tmp_path / name)
        with pytest.raises(InputError, match=f"{name} is a pickle, which can run code: convert it to safetensors"):
            resolve(tmp_path / name)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(InputError, match=r"model\.gguf is no model: give a folder in diffusers' layout, or one"):
        resolve(tmp_path / "model.gguf")


# The whole base back to diffusers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_folder_loads_bit_for_bit(base, tiny, tmp_path, dtype):
    before = base if dtype == "float32" else load_base(tiny.model, dtype=dtype)
    save_base(before, tmp_path / "base")
    assert_same(load_base(tmp_path / "base", dtype=dtype), before)
    for ours, theirs in zip(load_tokenizers(tmp_path / "base"), before.tokenizers, strict=True):
        np.testing.assert_array_equal(ours(TEXTS), theirs(TEXTS))
    for part in PARTS:
        file = next((tmp_path / "base" / part).glob("*.safetensors"))
        with ExitStack() as stack:
            open_tensors(file, stack).verify()
            assert len(open_tensors(file, stack).checks) == 1


def draw(pipeline: diffusers.StableDiffusionXLPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "latent"}
    return pipeline("a photo of a man", generator=torch.Generator().manual_seed(0), **options).images


def test_diffusers_draws_from_exports_as_from_the_folder_that_was_loaded(base, original, tiny, tmp_path):
    """The exported folder, and the single file through diffusers' own reader of such files."""
    load = diffusers.StableDiffusionXLPipeline
    save_base(base, tmp_path / "base")
    expected = load.from_pretrained(tiny.model)
    drawn = draw(expected)
    for pipeline in (
        load.from_pretrained(tmp_path / "base"),
        load.from_single_file(str(original), config=str(tmp_path / "base"), local_files_only=True),
    ):
        for part in PARTS:
            found, wanted = (getattr(each, part).state_dict() for each in (pipeline, expected))
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        # PyTorch's kernels round by where in memory an array lies. Measured: 1.5e-5, latents up to 12.
        torch.testing.assert_close(draw(pipeline), drawn, rtol=0, atol=1e-4)


def test_an_exported_folder_says_what_the_model_was(base, tmp_path):
    """Settings other than the defaults of any library."""
    schedule = dataclasses.replace(
        base.settings.schedule, prediction_type="v_prediction", timestep_spacing="trailing", beta_end=0.02
    )
    changed = base._replace(settings=base.settings._replace(schedule=schedule, zeros_for_no_negative=False))
    save_base(changed, tmp_path / "base")
    assert read_settings(tmp_path / "base") == changed.settings
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "base")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.config.force_zeros_for_empty_prompt is False
    ddim = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    assert (ddim.config.clip_sample, ddim.config.set_alpha_to_one, ddim.config.beta_end) == (False, False, 0.02)


def test_an_export_is_whole_or_not_there(base, tmp_path):
    folder, path = tmp_path / "base", tmp_path / "base.safetensors"
    with files_limited_to(2**18):
        for save, target in ((save_base, folder), (save_single_file, path)):
            with pytest.raises(InputError, match="cannot be written"):
                save(base, target)
            assert not target.exists()
    save_base(base, folder)
    with pytest.raises(InputError, match=f"{folder} exists already: name a folder that does not"):
        save_base(base, folder)


def test_a_base_with_an_adapter_in_it_is_not_exported(tiny, tmp_path):
    base = load_base(tiny.model)
    inject(base.unet, load_adapter(tiny.adapter, base.unet))
    for save in (save_base, save_single_file):
        with pytest.raises(InputError, match="has an adapter in it: eject that first"):
            save(base, tmp_path / "base")
    assert not (tmp_path / "base").exists()
