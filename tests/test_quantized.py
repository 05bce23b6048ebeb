"""Products of 8-bit numbers: against PyTorch's arithmetic, where they are, and with what they go together."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import save_file

from infinite_id_jax import FaceFeatures, InfiniteIDPipeline
from infinite_id_jax.errors import InputError, MissingExtraError
from infinite_id_jax.stable_diffusion.kernels import Linear
from infinite_id_jax.stable_diffusion.quantized import KINDS, QuantizedLinear
from tests import published, reference_torch

NOISE = np.random.default_rng(5).normal(size=(2, 8, 8, 4)).astype(np.float32)
PROMPTS = ["a photo of a man in the snow", "a drawing of a dog"]
LARGEST = {"int8": 127.5, "float8": 448.0}  # of int8 half a step more than there are numbers, by qwix


def drawn(pipe: InfiniteIDPipeline, small) -> np.ndarray:
    people = [pipe.encode_identity(FaceFeatures(**small.features(seed))) for seed in (10, 11)]
    return np.asarray(pipe(PROMPTS, people, latents=NOISE, steps=2, output="latent").latents)


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def eight_bits(x: torch.Tensor, axis: int, kind: str) -> torch.Tensor:
    """Rounded to the numbers that there are, by the largest of an axis, and back."""
    scale = x.abs().amax(axis, keepdim=True) / LARGEST[kind]
    rounded = torch.round(x / scale).clamp(-127, 127) if kind == "int8" else (x / scale).to(torch.float8_e4m3fn)
    return rounded.double() * scale.double()


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_rounded_rows_and_columns(kind):
    rng = np.random.default_rng(1)
    x, kernel, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 7, 96), (96, 40), (40,)))
    x *= np.arange(1, 8, dtype=np.float32)[:, None]  # rows of other sizes have other scales
    # The largest of a row or column are positive: qwix rounds its negative to -127 or -128 as float noise will have it.
    x[..., 0], kernel[0] = 1.1 * np.abs(x).max(-1), 1.1 * np.abs(kernel).max(0)
    linear = Linear(96, 40, rngs=nnx.Rngs(0))
    linear.kernel, linear.bias = nnx.Param(jnp.array(kernel)), nnx.Param(jnp.array(bias))
    ours = np.asarray(jax.jit(QuantizedLinear(linear, kind))(x))
    product = eight_bits(torch.from_numpy(x), -1, kind) @ eight_bits(torch.from_numpy(kernel), 0, kind)
    theirs = product.numpy() + bias
    np.testing.assert_allclose(ours, theirs, atol=1e-6 * np.abs(theirs).max())  # measured: 1.3e-7
    plain = x @ kernel + bias
    assert error(ours, plain) == pytest.approx({"int8": 0.007, "float8": 0.028}[kind], rel=0.3)  # measured


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_products_do_not_overflow_half_precision(kind, dtype):
    """SDXL's longest: of 5,120 numbers near the largest that there is."""
    rng = np.random.default_rng(2)
    x, kernel = (rng.uniform(0.5, 1, size=shape).astype(np.float32) for shape in ((3, 5120), (5120, 8)))
    linear = Linear(5120, 8, use_bias=False, rngs=nnx.Rngs(0))
    linear.kernel = nnx.Param(jnp.array(kernel / 5120, dtype))
    ours = jax.jit(QuantizedLinear(linear, kind))(jnp.array(x, dtype))
    assert ours.dtype == dtype
    assert error(np.asarray(ours, np.float32), x @ kernel / 5120) < 0.01  # measured: 5e-4, in bfloat16 2.2e-3


@pytest.fixture(scope="module")
def pipe(small_pipe):
    return small_pipe


@pytest.fixture(scope="module")
def full(pipe, small) -> np.ndarray:
    return drawn(pipe, small)


@pytest.fixture(scope="module")
def int8(small) -> InfiniteIDPipeline:
    return InfiniteIDPipeline.from_pretrained(small.model, small.adapter, quantization="int8")


def test_what_every_pixel_passes_in_every_step_is_quantized(int8):
    for path, leaf in nnx.to_flat_state(int8._unet[1]):
        name = ".".join(map(str, path))
        transformer = "attentions" in name and "norm" not in name and "to_k_ip" not in name and "to_v_ip" not in name
        text = "attn2" in name and ("to_k" in name or "to_v" in name)
        assert (leaf[...].dtype == np.int8) == (transformer and not text and name.endswith("kernel")), name


def test_images_change_a_little(full, int8, small):
    assert error(drawn(int8, small), full) == pytest.approx(0.026, rel=0.5)  # measured
    float8 = InfiniteIDPipeline.from_pretrained(small.model, small.adapter, quantization="float8")
    assert error(drawn(float8, small), full) == pytest.approx(0.108, rel=0.5)  # measured


def test_eight_devices_hold_the_same_numbers(full, int8, small):
    """Sums in another order round a few rows' numbers to their neighbours, and these others in the layers behind."""
    divided = InfiniteIDPipeline.from_pretrained(
        small.model, small.adapter, quantization="int8", mesh="data=2,fsdp=2,tensor=2"
    )
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(pipe._unet[1]) for pipe in (int8, divided)))
    assert error(drawn(divided, small), full) == pytest.approx(0.026, rel=0.5)  # measured


def test_loras_beside_the_base_stay_as_they_are(int8, small, tmp_path):
    generator = torch.Generator().manual_seed(3)
    stem = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {
        f"{stem}.lora_{n}.weight": torch.randn(s, generator=generator) for n, s in (("A", (2, 64)), ("B", (64, 2)))
    }
    save_file(factors, tmp_path / "lora.safetensors")
    lora = {str(tmp_path / "lora.safetensors"): 0.7}
    load = partial(InfiniteIDPipeline.from_pretrained, small.model, small.adapter, lora=lora, merge_lora=False)
    full, quantized = load(), load(quantization="int8")
    assert error(drawn(quantized, small), drawn(full, small)) < 0.06  # measured: 0.030
    quantized.set_lora_scale(tmp_path / "lora.safetensors", 0.0)
    np.testing.assert_allclose(drawn(quantized, small), drawn(int8, small), atol=1e-3)


def test_adapters_with_low_rank_maps_go_beside_it(small, tmp_path):
    state = published.random_state("faceid", reference_torch.tiny_sdxl_unet(levels=reference_torch.TWO_LEVELS))
    file = published.write("faceid", tmp_path, state)
    load = partial(InfiniteIDPipeline.from_pretrained, small.model, file)
    face = FaceFeatures(face_embedding=np.random.default_rng(2).normal(size=16).astype(np.float32))

    def out(pipe: InfiniteIDPipeline) -> np.ndarray:
        person = pipe.encode_identity(face)
        return np.asarray(pipe(PROMPTS, person, latents=NOISE, steps=2, streams="one", output="latent").latents)

    assert 0 < error(out(load(quantization="int8")), out(load())) < 0.07  # measured: 0.035


def test_an_unknown_kind_is_named_before_anything_is_read(small):
    with pytest.raises(InputError, match="Unknown quantization 'int4': choose from none, int8, float8"):
        InfiniteIDPipeline.from_pretrained(small.model / "nowhere", quantization="int4")


def test_the_extra_is_named_where_it_is_missing(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(MissingExtraError, match=r"\.\[quantization\]"):
        InfiniteIDPipeline.from_pretrained(small.model, quantization="int8")
