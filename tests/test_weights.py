"""Weights in and out: file formats, key names of every age, shardings, damaged files, model folders."""

import json
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchVAE
from diffusers import UNet2DConditionModel as TorchUNet
from flax import nnx, serialization, traverse_util
from jax.sharding import PartitionSpec
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

from infinite_id_jax.errors import InputError
from infinite_id_jax.files import replacing
from infinite_id_jax.sharding import make_mesh, parameter_sharding
from infinite_id_jax.stable_diffusion.clip_text import CLIPTextModel
from infinite_id_jax.stable_diffusion.config import CLIPTextConfig, UNetConfig, VAEConfig
from infinite_id_jax.stable_diffusion.unet import UNet2DConditionModel
from infinite_id_jax.stable_diffusion.vae import AutoencoderKL
from infinite_id_jax.weights.export import save_weights, torch_state
from infinite_id_jax.weights.folder import load_base, load_image_encoder, read_settings, resolve
from infinite_id_jax.weights.keys import current_key, key_map
from infinite_id_jax.weights.load import abstract, fill, load_module, open_tensors
from tests import reference_torch


class Model(NamedTuple):
    """One tiny model: PyTorch's, how we make ours, and the folder PyTorch wrote."""

    torch: Any
    make: Callable[[nnx.Rngs], nnx.Module]
    folder: Path
    file: str

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {key.removeprefix("text_model."): value for key, value in self.torch.state_dict().items()}


def small_unet() -> TorchUNet:
    """Every kind of SDXL's layers, in two levels."""
    unet = TorchUNet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        cross_attention_dim=24,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    return reference_torch.randomise(unet, 0)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("models")
    made = {
        "unet": (small_unet(), UNetConfig, UNet2DConditionModel),
        "vae": (reference_torch.tiny_vae(), VAEConfig, AutoencoderKL),
        "text": (reference_torch.tiny_text_encoders()[1], CLIPTextConfig, CLIPTextModel),
    }
    models = {}
    for name, (theirs, config_class, kind) in made.items():
        theirs.save_pretrained(folder / name)
        config = config_class.from_json(folder / name / "config.json")
        file = "model.safetensors" if name == "text" else "diffusion_pytorch_model.safetensors"
        models[name] = Model(theirs, lambda rngs, k=kind, c=config: k(c, rngs=rngs), folder / name, file)
    return models


@pytest.fixture(scope="module")
def text(models) -> Model:
    """The smallest model, for what does not depend on the architecture."""
    return models["text"]


def read(model: Model, source: Path, **kwargs: Any) -> dict[str, np.ndarray]:
    return torch_state(load_module(model.make, source, **kwargs))


def assert_equal(ours: dict[str, np.ndarray], theirs: dict[str, torch.Tensor]) -> None:
    """Bit for bit; through fp32, which holds every bfloat16 and float16."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert str(ours[key].dtype) == str(value.dtype).removeprefix("torch."), key
        np.testing.assert_array_equal(ours[key].astype(np.float32), value.float().numpy(), err_msg=key)


# Files as diffusers and transformers write them


@pytest.mark.parametrize("name", ["unet", "vae", "text"])
def test_single_file(models, name):
    assert_equal(read(models[name], models[name].folder), models[name].weights)


def test_layouts(models):
    """Kernels are [in, out] and [h, w, in, out]: a square matrix loaded untransposed would keep its shape."""
    unet: Any = load_module(models["unet"].make, models["unet"].folder)
    block, key = unet.mid_block.attentions[0].transformer_blocks[1], "mid_block.attentions.0.transformer_blocks.1"
    weights = models["unet"].weights
    np.testing.assert_array_equal(block.attn1.to_out.kernel[...], weights[f"{key}.attn1.to_out.0.weight"].T)
    np.testing.assert_array_equal(
        unet.mid_block.resnets[1].conv2.kernel[...], weights["mid_block.resnets.1.conv2.weight"].permute(2, 3, 1, 0)
    )


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["vae", "text"])
def test_variants_and_shards(models, name, variant, shards, tmp_path):
    """The names of files are whatever diffusers and transformers choose."""
    model = models[name]
    total = sum(value.nbytes for value in model.weights.values())
    limit = "5GB" if shards == 1 else f"{total // 2000}KB"
    model.torch.save_pretrained(tmp_path, variant=variant, max_shard_size=limit)
    files = [path.name for path in tmp_path.glob("*.safetensors")]
    assert (len(files) >= 2) == (shards > 1)
    assert all(("fp16" in file) == (variant == "fp16") for file in files)
    assert_equal(read(model, tmp_path), model.weights)


def test_full_precision_goes_before_the_fp16_variant(text, tmp_path):
    for name, dtype in (("model.safetensors", torch.float32), ("model.fp16.safetensors", torch.float16)):
        save_file({key: value.to(dtype) for key, value in text.weights.items()}, tmp_path / name)
    assert_equal(read(text, tmp_path), text.weights)


@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_dtypes(text, tmp_path, stored, wanted):
    held = {key: value.to(getattr(torch, stored)) for key, value in text.weights.items()}
    save_file(held, tmp_path / "model.safetensors")
    expected = {key: value.to(getattr(torch, wanted)) for key, value in held.items()}
    assert_equal(read(text, tmp_path, dtype=wanted), expected)


def test_text_encoders_of_every_age(text, tmp_path):
    """transformers has written `text_model.` before most keys, and the positions as a buffer."""
    old = {key if key.startswith("text_projection") else f"text_model.{key}": x for key, x in text.weights.items()}
    save_file(old | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, tmp_path / "model.safetensors")
    assert_equal(read(text, tmp_path), text.weights)


OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def test_vae_of_before_diffusers_0_12(models, tmp_path):
    vae, old = models["vae"], {}
    for key, value in vae.weights.items():
        for new, name in OLD_ATTENTION.items():
            key = key.replace(f".attentions.0.{new}.", f".attentions.0.{name}.")
        old[key] = value
    assert len(old.keys() - vae.weights.keys()) == 2 * 4 * 2
    save_file(old, tmp_path / vae.file)
    assert_equal(read(vae, tmp_path), vae.weights)


# Flax checkpoints


def flax_checkpoint(model: torch.nn.Module) -> bytes:
    """What the last Flax classes (diffusers 0.35, transformers 4.57) saved, by their naming rule.

    diffusers joins a list's name and index, transformers keeps them apart under `text_model`; weights are kernels
    with the input before the output, scales of norms, or embeddings; the VAE has its attention's first names.
    """
    modules, flat = dict(model.named_modules()), {}
    for key, value in model.state_dict().items():
        path, _, leaf = key.rpartition(".")
        kind, array = modules[path], value.numpy()
        if leaf == "weight" and isinstance(kind, torch.nn.Conv2d):
            leaf, array = "kernel", array.transpose(2, 3, 1, 0)
        elif leaf == "weight" and isinstance(kind, torch.nn.Linear):
            leaf, array = "kernel", array.T
        elif leaf == "weight":
            leaf = "embedding" if isinstance(kind, torch.nn.Embedding) else "scale"
        if isinstance(model, TorchVAE):
            for new, name in OLD_ATTENTION.items():
                path = re.sub(rf"\.{new}$", f".{name}", path)
        if not path.startswith("text_"):
            path = re.sub(r"\.(\d+)(?=\.|$)", r"_\1", path)
        flat["/".join([*path.split("."), leaf])] = np.ascontiguousarray(array)
    return serialization.msgpack_serialize(traverse_util.unflatten_dict(flat, sep="/"))


# Read off the parameter trees of those classes.
FLAX_KEYS = {
    "unet": (
        "diffusion_flax_model.msgpack",
        "time_embedding/linear_1/kernel",
        "add_embedding/linear_2/bias",
        "down_blocks_1/attentions_0/transformer_blocks_0/attn2/to_out_0/kernel",
        "mid_block/attentions_0/transformer_blocks_1/ff/net_0/proj/kernel",
        "up_blocks_1/resnets_0/conv_shortcut/kernel",
        "conv_norm_out/scale",
    ),
    "vae": (
        "diffusion_flax_model.msgpack",
        "encoder/mid_block/attentions_0/query/kernel",
        "decoder/mid_block/attentions_0/proj_attn/bias",
        "decoder/up_blocks_0/upsamplers_0/conv/kernel",
        "post_quant_conv/kernel",
    ),
    "text": (
        "flax_model.msgpack",
        "text_model/embeddings/token_embedding/embedding",
        "text_model/encoder/layers/2/self_attn/out_proj/kernel",
        "text_model/final_layer_norm/scale",
        "text_projection/kernel",
    ),
}


@pytest.mark.parametrize("name", FLAX_KEYS)
def test_flax_checkpoint(models, name, tmp_path):
    file, *known = FLAX_KEYS[name]
    content = flax_checkpoint(models[name].torch)
    assert set(known) <= traverse_util.flatten_dict(serialization.msgpack_restore(content), sep="/").keys()
    (tmp_path / file).write_bytes(content)
    assert_equal(read(models[name], tmp_path), models[name].weights)


# Sharded straight from the file


def test_load_to_a_sharding(models):
    mesh = make_mesh("data=1,fsdp=4,tensor=2")
    model = models["unet"]
    unet: Any = load_module(model.make, model.folder, sharding=parameter_sharding(mesh))
    assert_equal(torch_state(unet), model.weights)
    kernel = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.kernel[...]
    assert kernel.sharding.spec == PartitionSpec("fsdp", "tensor")
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(24 // 4, 32 // 2)}
    assert len({shard.device for shard in kernel.addressable_shards}) == 8
    arrays = [array for array in jax.tree.leaves(nnx.state(unet)) if array.ndim > 1]
    held = sum(array.addressable_shards[0].data.nbytes for array in arrays)
    # Convolutions are divided by 4, all else by 8. Measured: 0.19.
    assert held / sum(array.nbytes for array in arrays) < 0.25


class Counted:
    """A tensor that counts the elements read from it."""

    def __init__(self, tensor: Any):
        self.tensor, self.shape, self.read_elements = tensor, tensor.shape, 0

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        part = self.tensor.read(index)
        self.read_elements += part.size
        return part


def test_each_element_is_read_once_however_many_replicas(text):
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    with ExitStack() as stack:
        tensors = {key: Counted(x) for key, x in open_tensors(text.folder, stack).items()}
        fill(abstract(text.make), tensors, name="text", sharding=parameter_sharding(mesh))
    assert all(x.read_elements == np.prod(x.shape) for x in tensors.values())


# Laws of the key map, and export


@pytest.mark.parametrize("name", ["unet", "vae", "text"])
def test_key_map_is_bijective(models, name):
    module = abstract(models[name].make)
    entries = key_map(module)
    assert entries.keys() == {path for path, _ in nnx.to_flat_state(nnx.state(module))}
    assert len({entry.key for entry in entries.values()}) == len(entries)
    assert all(current_key(entry.key) == entry.key for entry in entries.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["unet", "vae", "text"])
def test_export_is_bit_exact(models, name, dtype, tmp_path):
    module = load_module(models[name].make, models[name].folder, dtype=dtype)
    save_weights(module, tmp_path / models[name].file)
    written = load_file(tmp_path / models[name].file)
    assert_equal(torch_state(module), written)
    expected = {key: value.to(getattr(torch, dtype)) for key, value in models[name].weights.items()}
    assert_equal(read(models[name], tmp_path, dtype=dtype), expected)


@pytest.mark.parametrize(
    ("name", "kind"), [("unet", TorchUNet), ("vae", TorchVAE), ("text", CLIPTextModelWithProjection)]
)
def test_exported_files_load_in_pytorch(models, name, kind, tmp_path):
    model = models[name]
    shutil.copy(model.folder / "config.json", tmp_path)
    save_weights(load_module(model.make, model.folder), tmp_path / model.file)
    again, report = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    found, expected = again.state_dict(), model.torch.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# Damage: one sentence that names the file and the cure


def refused(text: Model, source: Path, *words: str) -> None:
    with pytest.raises(InputError) as refusal:
        load_module(text.make, source)
    message = str(refusal.value)
    assert "\n" not in message
    for word in (*words, str(source.parent if source.suffix else source)):
        assert word in message, message


def sharded(text: Model, folder: Path) -> Path:
    text.torch.save_pretrained(folder, max_shard_size="60KB")
    return folder / "model.safetensors.index.json"


def test_missing_folder_and_file(text, tmp_path):
    refused(text, tmp_path / "nowhere", "is missing", "check the path")
    refused(text, tmp_path / "flax_model.msgpack", "is missing", "check the path")
    refused(text, tmp_path, "holds no weights", "download the model again")


def test_shards_without_their_index_are_no_weights(text, tmp_path):
    sharded(text, tmp_path).unlink()
    refused(text, tmp_path, "holds no weights", "index")


def test_missing_shard(text, tmp_path):
    sharded(text, tmp_path)
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    refused(text, tmp_path, lost.name, "fetch")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "\x00", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": []}}']
)
def test_damaged_index(text, tmp_path, content):
    sharded(text, tmp_path).write_text(content)
    refused(text, tmp_path, "model.safetensors.index.json is damaged", "fetch it again")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_names_no_file_elsewhere(text, tmp_path, name):
    sharded(text, tmp_path).write_text(json.dumps({"weight_map": {"a": name}}))
    refused(text, tmp_path, f"names the weights {name}, outside of its folder")


@pytest.mark.parametrize(
    "damage",
    [lambda x: x[:-1], lambda x: x[: len(x) // 2], lambda x: x[:100], lambda x: b"", lambda x: b"<html>" * 99],
    ids=["last byte", "half", "header", "empty", "html"],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_damaged_safetensors(text, tmp_path, damage, shards):
    if shards > 1:
        sharded(text, tmp_path)
    else:
        shutil.copy(text.folder / text.file, tmp_path)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    path.write_bytes(damage(path.read_bytes()))
    refused(text, tmp_path, str(path), "not a whole safetensors file", "fetch it again")


@pytest.mark.parametrize("damage", [lambda x: x[:-1], lambda x: x[:50], lambda x: b"", lambda x: b"\x07"])
def test_damaged_msgpack(text, tmp_path, damage):
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(damage(flax_checkpoint(text.torch)))
    refused(text, tmp_path, str(path), "not a whole Flax checkpoint", "fetch it again")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "diffusion_pytorch_model.bin", "model.ckpt"])
def test_pickles_are_refused(text, tmp_path, name):
    torch.save(text.weights, tmp_path / name)
    refused(text, tmp_path, name, "pickle", "convert it to safetensors")


def test_names_in_files_cannot_write_to_a_terminal(tmp_path):
    escape = "\x1b[2J" + "x" * 1000
    save_file({escape: torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"surplus: \\x1b\[2Jx+\.\.\.") as refused:
        load_module(lambda rngs: nnx.Linear(2, 2, rngs=rngs), tmp_path / "a.safetensors")
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 800


def test_all_wrong_keys_in_one_error(text, tmp_path):
    weights = dict(text.weights)
    del weights["final_layer_norm.bias"], weights["encoder.layers.0.mlp.fc1.bias"]
    weights["lora.down.weight"] = torch.zeros(2, 2)
    weights["text_projection.weight"] = torch.zeros(5, 7)
    save_file(weights, tmp_path / "model.safetensors")
    refused(
        text,
        tmp_path,
        "2 missing: encoder.layers.0.mlp.fc1.bias, final_layer_norm.bias;",
        "1 surplus: lora.down.weight;",
        "1 of another shape: text_projection.weight (5x7 instead of 32x40).",
        "Use weights that belong to this configuration",
    )


# Writing


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond `size`, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_leaves_nothing_and_keeps_the_old_file(text, tmp_path):
    path, module = tmp_path / "new" / "model.safetensors", load_module(text.make, text.folder)
    with files_limited_to(4096), pytest.raises(InputError, match=r"model\.safetensors cannot be written.*free some"):
        save_weights(module, path)
    assert not list(path.parent.iterdir())
    save_weights(module, path)
    before = path.read_bytes()
    with files_limited_to(4096), pytest.raises(InputError):
        save_weights(module, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_written_is_refused(text, tmp_path):
    module = load_module(text.make, text.folder)
    (tmp_path / "file").touch()
    (tmp_path / "folder.safetensors").mkdir()
    for path in (tmp_path / "file" / "sub" / "model.safetensors", tmp_path / "folder.safetensors"):
        with pytest.raises(InputError, match="cannot be written") as refusal:
            save_weights(module, path)
        assert str(path) in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.safetensors"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_nothing(tmp_path, failure):
    def interrupted():
        with replacing(tmp_path / "file") as beside:
            beside.write_text("half")
            raise failure

    with pytest.raises(failure):
        interrupted()
    assert not list(tmp_path.iterdir())


# Model folders


def test_resolve_takes_a_folder_as_it_is(tmp_path):
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path


def test_resolve_refuses_what_is_no_model(tmp_path, monkeypatch):
    """A mistyped path beside real folders is not asked of the hub, even if it reads like a hub id."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "sdxl.safetensors").touch()
    missing = [tmp_path / "sdxl", Path("owner/name"), "models/sdxl", "sdxl", "./owner/name", "a/b/c", "owner/name@"]
    for source in missing:
        with pytest.raises(InputError, match=f"{source} does not exist: check the path"):
            resolve(source)
    assert resolve("sdxl.safetensors") == Path("sdxl.safetensors")
    for name, says in (("sdxl.ckpt", "is a pickle"), ("notes.txt", "is no model")):
        (tmp_path / name).touch()
        with pytest.raises(InputError, match=f"{name} {says}"):
            resolve(name)


@pytest.mark.parametrize("hub_id", ["nobody/nothing", "nobody/nothing@0123abc"])
def test_hub_id_offline(hub_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"{hub_id} is no local folder and the hub did not give it: .") as refusal:
        resolve(hub_id)
    assert "\n" not in str(refusal.value)


def test_the_hub_is_asked_for_half_precision_only_where_there_is_no_other(tmp_path, monkeypatch):
    whole, half = (f"diffusion_pytorch_model{variant}.safetensors" for variant in ("", ".fp16"))
    small, wanted = ["model_index.json", "tokenizer/merges.txt"], [f"unet/{whole}", f"vae/{half}"]
    others = [f"unet/{half}", "unet/openvino_model.bin", "sd_xl_base_1.0.safetensors"]
    asked = []

    def fetch(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: [*others, *small, *wanted])
    assert resolve("owner/name@main") == tmp_path
    assert asked == [("owner/name", "main", [*small, *wanted])]


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    return shutil.copytree(tiny.model, tmp_path / "sdxl")


def change(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_incomplete_folder_names_its_missing_parts(folder):
    for part in ("vae", "tokenizer_2"):
        shutil.rmtree(folder / part)
    with pytest.raises(InputError, match=r"sdxl is not a whole SDXL folder.*: vae, tokenizer_2 missing"):
        load_base(folder)


def test_sd15_is_refused_for_sampling(folder):
    """By its layout, and by its U-Net where the layout is SDXL's."""
    change(folder / "unet" / "config.json", addition_embed_type=None)
    with pytest.raises(InputError, match="holds no SDXL"):
        read_settings(folder)
    for part in ("text_encoder_2", "tokenizer_2"):
        shutil.rmtree(folder / part)
    with pytest.raises(InputError, match="text_encoder_2, tokenizer_2 missing"):
        read_settings(folder)


@pytest.mark.parametrize("file", ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_damaged_and_missing_settings_name_their_file_once(folder, file):
    for damage, words in ((lambda path: path.write_text("{"), "cannot be read as JSON"), (Path.unlink, "is missing")):
        damage(folder / file)
        with pytest.raises(InputError, match=words) as refusal:
            read_settings(folder)
        assert str(refusal.value).count(str(folder / file)) == 1


def test_settings_are_the_folders(folder):
    change(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    settings = read_settings(folder)
    assert settings.zeros_for_no_negative is False
    assert settings.unet.block_out_channels == (32, 64, 64)
    assert [config.with_projection for config in settings.text] == [False, True]
    (folder / "model_index.json").unlink()
    assert read_settings(folder).zeros_for_no_negative is True


def test_fp16_leaves_the_vae_in_fp32(folder):
    base = load_base(folder, dtype="float16")
    dtypes = {name: {str(x.dtype) for x in jax.tree.leaves(nnx.state(getattr(base, name)))} for name in ("unet", "vae")}
    assert dtypes == {"unet": {"float16"}, "vae": {"float32"}}


def test_missing_image_encoder_says_where_it_belongs(tmp_path):
    with pytest.raises(InputError, match=r"no CLIP image encoder at .*image_encoder: .*--image-encoder"):
        load_image_encoder(tmp_path / "image_encoder")
