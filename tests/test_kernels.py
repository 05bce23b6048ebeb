"""Every form of attention and convolution computes the same."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from infinite_id_jax.sharding import make_mesh
from infinite_id_jax.stable_diffusion import kernels
from infinite_id_jax.stable_diffusion.kernels import (
    GroupNorm,
    compiling_for,
    convolve,
    convolve_doubled,
    dot_product_attention,
    double,
    platform,
    product,
)
from infinite_id_jax.stable_diffusion.low_rank import LowRank
from infinite_id_jax.stable_diffusion.resnet import Upsample2D

NHWC = ("NHWC", "HWIO", "NHWC")


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def largest_error(ours, reference):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


def value_and_gradients(function, *arguments):
    """As one program: one by one, each operation would be compiled by itself."""

    @jax.jit  # a new one for each call: what a function reads may have been patched meanwhile
    def both(*arguments):
        value, backward = jax.vjp(function, *arguments)
        return value, backward(normal(9, *value.shape))

    return both(*arguments)


# 600 and 523 queries are taken in parts, 523 with some to spare.
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (64, 77), (64, 128), (512, 512), (600, 1200), (523, 258)])
def test_attention_by_rows_equals_the_plain_one(queries, keys):
    q, k, v = normal(0, 2, queries, 3, 8), normal(1, 2, keys, 3, 8), normal(2, 2, keys, 3, 8)
    ours = value_and_gradients(dot_product_attention, 3 * q, k, v)
    reference = value_and_gradients(jax.nn.dot_product_attention, 3 * q, k, v)
    assert largest_error(ours, reference) < 3e-6


def test_attention_survives_large_logits():
    q, k, v = normal(0, 1, 4, 1, 8), normal(1, 1, 5, 1, 8), normal(2, 1, 5, 1, 8)
    ours = value_and_gradients(dot_product_attention, 1e4 * q, k, v)
    assert largest_error(ours[0], jax.nn.dot_product_attention(1e4 * q, k, v)) < 1e-6
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(ours))


def test_attention_in_half_precision_keeps_its_dtype_and_its_softmax_in_float32():
    q, k, v = (normal(i, 2, 600, 2, 8).astype(jnp.bfloat16) for i in range(3))
    ours = dot_product_attention(q, k, v)
    exact = jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert ours.dtype == jnp.bfloat16
    assert largest_error(ours.astype(jnp.float32), exact) < 0.01


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((0, 1), (0, 1))])
@pytest.mark.parametrize(("size", "kernel"), [(4, (3, 3)), (5, (3, 3)), (5, (2, 3))])
def test_a_convolution_by_patches_equals_the_plain_one(strides, padding, size, kernel):
    x, weight = normal(0, 2, size, size, 6), normal(1, *kernel, 6, 64)

    def with_(function):
        return lambda x, w: function(x, w, strides, padding, dimension_numbers=NHWC)

    assert "conv_general_dilated" not in str(jax.make_jaxpr(with_(convolve))(x, weight))
    ours = value_and_gradients(with_(convolve), x, weight)
    assert largest_error(ours, value_and_gradients(with_(lax.conv_general_dilated), x, weight)) < 3e-6


@pytest.mark.parametrize(
    ("side", "kernel", "options", "target"),
    [
        (8, (3, 3), {}, "cpu"),
        (4, (1, 1), {}, "cpu"),
        (4, (3, 3), {"feature_group_count": 2}, "cpu"),
        (4, (3, 3), {"rhs_dilation": (2, 2)}, "cpu"),
        (4, (3, 3), {}, "gpu"),
    ],
)
def test_elsewhere_the_convolution_is_the_plain_one(side, kernel, options, target):
    x, weight = normal(0, 1, side, side, 6), normal(1, *kernel, 6 // options.get("feature_group_count", 1), 64)

    def call(x):
        padding = tuple((k // 2, k // 2) for k in kernel)
        return convolve(x, weight, (1, 1), padding, dimension_numbers=NHWC, **options)

    with compiling_for(target):
        assert "conv_general_dilated" in str(jax.make_jaxpr(call)(x))


@pytest.mark.parametrize("shape", [(2, 4, 5), (1, 1, 1)])
def test_doubling_and_a_convolution_in_one(shape):
    x, weight = normal(0, *shape, 6), normal(1, 3, 3, 6, 8)

    def plain(x, w):
        return lax.conv_general_dilated(double(x), w, (1, 1), ((1, 1), (1, 1)), dimension_numbers=NHWC)

    ours = value_and_gradients(convolve_doubled, x, weight)
    assert largest_error(ours, value_and_gradients(plain, x, weight)) < 3e-6  # measured: 3.1e-7
    half = convolve_doubled(x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    assert largest_error(half.astype(jnp.float32), plain(x, weight)) < 0.02


@pytest.mark.parametrize("size", [None, (8, 10), (7, 9)])
@pytest.mark.parametrize("lora", [False, True])
def test_all_ways_to_upsample_are_one(size, lora):
    """A cropped map, and a layer with a LoRA beside it, take the plain form."""
    module, x = Upsample2D(6, rngs=nnx.Rngs(0)), normal(0, 2, 4, 5, 6)
    module.conv.bias = nnx.Param(normal(1, 6))
    if lora:
        module.conv = LowRank(module.conv, normal(2, 3, 3, 6, 2), normal(3, 2, 6), 1.0, name="lora", scale=0.5)
    with compiling_for(kernels.PLAIN):
        expected = module(x, size)
    assert expected.shape == (2, *(size or (8, 10)), 6)
    assert largest_error(module(x, size), expected) < 1e-6


def test_the_target_is_chosen_for_a_while():
    assert platform() == "cpu"
    q = jnp.zeros((1, 600, 1, 8))
    with compiling_for("tpu"):
        assert platform() == "tpu"
        assert "scan" not in str(jax.make_jaxpr(dot_product_attention)(q, q, q))
    assert platform() == "cpu"
    assert "scan" in str(jax.make_jaxpr(dot_product_attention)(q, q, q))


@pytest.mark.parametrize("rows", [(7,), (2, 5), (2, 3, 4)])
def test_a_product_and_its_gradients_equal_the_plain_ones(rows):
    x, kernel = normal(0, *rows, 6), normal(1, 6, 8)

    def with_(function):
        return lambda x, w: function(x, w, (((x.ndim - 1,), (0,)), ((), ())))

    ours = value_and_gradients(with_(product), x, kernel)
    assert largest_error(ours, value_and_gradients(with_(lax.dot_general), x, kernel)) < 1e-6
    assert largest_error(jax.vmap(with_(product), (None, 0))(x, kernel[None]), ours[0][None]) < 1e-6
    with compiling_for("tpu"):
        assert "custom_vjp" not in str(jax.make_jaxpr(with_(product))(x, kernel))


@pytest.mark.parametrize("shape", [(2, 4, 5, 12), (1, 1, 1, 12), (3, 7, 12)])
def test_group_norm_and_its_gradients_equal_flaxs(shape):
    x = 3 + normal(0, *shape)
    flaxs = nnx.GroupNorm(12, 4, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0))
    ours = GroupNorm(12, 4, eps=1e-5, rngs=nnx.Rngs(0))
    parameters = {"scale": normal(1, 12), "bias": normal(2, 12)}

    def with_(module):
        graph, state = nnx.split(module)

        def call(x, parameters):
            nnx.replace_by_pure_dict(state, parameters)
            return nnx.merge(graph, state)(x)

        return call

    reference = value_and_gradients(with_(flaxs), x, parameters)
    assert largest_error(value_and_gradients(with_(ours), x, parameters), reference) < 1e-5
    half = ours(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize("mesh", [None, "data=2,fsdp=2,tensor=2"])
def test_attention_in_tiles_equals_the_plain_one(mesh, monkeypatch):
    """TPU's kernel as a plain program; with a mesh, on each device for its rows and heads."""
    from jax.experimental.pallas.ops.tpu import flash_attention as pallas

    monkeypatch.setattr(kernels, "_TILE", 128)
    monkeypatch.setattr(kernels, "_FLASH_TOKENS", 256)
    # Pallas' own TPU interpreter calls back from every device, and waits for ever where devices outnumber threads.
    monkeypatch.setattr(pallas.pl, "pallas_call", functools.partial(pallas.pl.pallas_call, interpret=True))
    q, k, v = normal(0, 4, 256, 2, 64), normal(1, 4, 512, 2, 64), normal(2, 4, 512, 2, 64)
    others = (  # no whole tiles, no heads of SDXL's: the plain one
        (normal(0, 4, 300, 2, 64), k, v),
        (normal(0, 4, 256, 2, 32), normal(1, 4, 256, 2, 32), normal(2, 4, 256, 2, 32)),
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(compiling_for("tpu"))
        if mesh:
            stack.enter_context(jax.set_mesh(make_mesh(mesh)))
        text, *plain = (str(jax.make_jaxpr(dot_product_attention)(*xs)) for xs in ((q, k, v), *others))
        ours = jax.jit(lambda *xs: value_and_gradients(dot_product_attention, *xs))(q, k, v)
        jax.block_until_ready(ours)
    assert "pallas_call" in text
    assert ("shard_map" in text) == bool(mesh)
    assert not [other for other in plain if "pallas_call" in other]
    expected = value_and_gradients(jax.nn.dot_product_attention, q, k, v)
    assert largest_error(ours, expected) < 1e-5


@pytest.mark.parametrize("mesh", [None, "data=2,fsdp=2,tensor=2"])
def test_cudnn_is_asked_for_what_it_has_kernels_for(mesh, monkeypatch):
    """On each device for its rows and heads, as a plain program here; for the VAE's one head of 512 never."""
    asked, plain = [], jax.nn.dot_product_attention

    def attend(q, k, v, implementation=None):
        asked.append(implementation)
        return plain(q, k, v)

    def heads(*shape, dtype=jnp.bfloat16):
        return tuple(normal(seed, *shape).astype(dtype) for seed in range(3))

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    monkeypatch.setattr(kernels, "_WEIGHTS", 256 * 256)
    cases = {  # what is asked for, and whether the plain form is left for some queries at a time
        "cudnn": heads(4, 300, 2, 64),
        "one row": heads(1, 64, 2, 64),
        "rows left over": heads(6, 64, 2, 64),
        "heads left over": heads(4, 64, 3, 64),
        "vae": heads(4, 300, 2, 512),
        "one key": (heads(4, 64, 2, 64)[0], *heads(4, 1, 2, 64)[1:]),
        "fp32": heads(4, 64, 2, 64, dtype=jnp.float32),
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(compiling_for("gpu"))
        if mesh:
            stack.enter_context(jax.set_mesh(make_mesh(mesh)))
        found = {name: (asked.clear(), jax.jit(dot_product_attention)(*xs), asked[:])[1:] for name, xs in cases.items()}
    expected = {name: ["cudnn"] for name in ("cudnn", "one row", "rows left over")}
    expected |= {"heads left over": [None if mesh else "cudnn"], "vae": [], "fp32": [None], "one key": [None]}
    assert {name: calls for name, (_, calls) in found.items()} == expected
    for name, xs in cases.items():
        assert largest_error(found[name][0].astype(jnp.float32), plain(*xs).astype(jnp.float32)) < 2e-2, name
