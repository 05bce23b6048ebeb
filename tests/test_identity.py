"""The laws of the method (docs/method.md's facts), on the functions that state its equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from infinite_id_jax.errors import InputError
from infinite_id_jax.identity import encoder
from infinite_id_jax.identity.adain import adain, adain_mean
from infinite_id_jax.identity.config import AdapterConfig, Switches
from infinite_id_jax.identity.cross_attention import IdentityContext, IdentityCrossAttention, merged_cross_attention
from infinite_id_jax.identity.features import FaceFeatures
from infinite_id_jax.identity.inject import (
    AdapterParam,
    eject,
    initialise_from_base,
    inject,
    transformer_blocks,
)
from infinite_id_jax.identity.mixed_attention import mixed_attention
from infinite_id_jax.identity.streams import Layout
from infinite_id_jax.stable_diffusion.attention import merge_heads, split_heads
from infinite_id_jax.stable_diffusion.config import UNetConfig
from infinite_id_jax.stable_diffusion.kernels import dot_product_attention
from infinite_id_jax.stable_diffusion.unet import AddedConditions, UNet2DConditionModel
from infinite_id_jax.weights.adapter import load_adapter
from infinite_id_jax.weights.export import torch_state
from infinite_id_jax.weights.load import load_module

CLOSE = {"rtol": 0, "atol": 2e-6}  # measured: at most 6e-7, outputs of order 1


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture
def qkv():
    """Queries of 9 tokens, 6 identity keys and values, 4 of text: 2 rows, 3 heads of 5."""
    return (
        normal(0, 2, 9, 3, 5),
        normal(1, 2, 6, 3, 5),
        normal(2, 2, 6, 3, 5),
        normal(3, 2, 4, 3, 5),
        normal(4, 2, 4, 3, 5),
    )


@pytest.fixture(scope="module")
def unet(tiny):
    config = UNetConfig.from_json(tiny.model / "unet" / "config.json")
    return lambda: load_module(lambda rngs: UNet2DConditionModel(config, rngs=rngs), tiny.model / "unet")


def test_adain_mean_moves_the_mean_and_nothing_else(qkv):
    _, x, _, y, _ = qkv
    out = adain_mean(x, y)
    np.testing.assert_allclose(out.mean(1), y.mean(1), **CLOSE)
    np.testing.assert_allclose(out - out.mean(1, keepdims=True), x - x.mean(1, keepdims=True), **CLOSE)


def test_adain_takes_mean_and_deviation(qkv):
    _, x, _, y, _ = qkv
    out = adain(x, y)
    np.testing.assert_allclose(out.mean(1), y.mean(1), **CLOSE)
    # std(x) / sqrt(var(x) + 1e-5) is not quite 1
    np.testing.assert_allclose(out.std(1, ddof=1), y.std(1, ddof=1), rtol=1e-4)


def test_adain_mean_commutes_with_the_head_split(qkv):
    _, x, _, y, _ = qkv
    flat = adain_mean(merge_heads(x)[:, :, None], merge_heads(y)[:, :, None])[:, :, 0]
    np.testing.assert_allclose(split_heads(flat, 3), adain_mean(x, y), **CLOSE)


def test_a_shift_of_all_keys_is_invisible_to_cross_attention(qkv):
    """So AdaIN-mean on K'_id in cross-attention changes nothing ..."""
    q, k_id, v_id, k_t, _ = qkv
    shifted = dot_product_attention(q, adain_mean(k_id, k_t), v_id)
    np.testing.assert_allclose(shifted, dot_product_attention(q, k_id, v_id), **CLOSE)


def test_adain_mean_on_values_adds_one_vector_to_every_query(qkv):
    """... and on V'_id it adds mean(V'_t) - mean(V'_id) to the identity term of Eq. 6."""
    q, k_id, v_id, k_t, v_t = qkv
    plain = merged_cross_attention(q, k_id, v_id, (k_t, v_t), 0.7, 1.0, "none")
    merged = merged_cross_attention(q, k_id, v_id, (k_t, v_t), 0.7, 1.0, "adain_mean")
    shift = v_t.mean(1, keepdims=True) - v_id.mean(1, keepdims=True)
    np.testing.assert_allclose(merged - plain, jnp.broadcast_to(0.7 * shift, q.shape), **CLOSE)


def test_cross_attention_is_the_weighted_sum_of_two(qkv):
    q, k_id, v_id, k_t, v_t = qkv
    both = merged_cross_attention(q, k_id, v_id, (k_t, v_t), 0.3, 0.9)
    identity, text = dot_product_attention(q, k_id, v_id), dot_product_attention(q, k_t, v_t)
    np.testing.assert_allclose(both, 0.3 * identity + 0.9 * text, **CLOSE)
    np.testing.assert_allclose(merged_cross_attention(q, k_id, v_id, None, 0.3, 0.9), 0.3 * identity, **CLOSE)


@pytest.fixture
def rows():
    """q, k, v of one guidance half with 2 text rows and 2 identity rows each."""
    return Layout(2, 2, halves=1), *(normal(seed, 6, 9, 3, 5) for seed in (5, 6, 7))


def test_mixed_attention_reads_both_streams_and_leaves_the_text_alone(rows):
    layout, q, k, v = rows
    out = mixed_attention(q, k, v, layout=layout)
    np.testing.assert_allclose(out[:2], dot_product_attention(q[:2], k[:2], v[:2]), **CLOSE)
    for row, text in ((2, 0), (3, 0), (4, 1), (5, 1)):  # text-row-major
        keys, values = (jnp.concatenate([x[row], x[text]])[None] for x in (k, v))
        np.testing.assert_allclose(out[row], dot_product_attention(q[row][None], keys, values)[0], **CLOSE)


def test_the_key_shift_does_matter_in_mixed_attention(rows):
    """It re-weights the identity block against the text block."""
    layout, q, k, v = rows
    k = k.at[2:].add(1.0)  # an offset that AdaIN-mean takes away
    v = v.at[2:].set(v[2:] - v[2:].mean(1, keepdims=True) + v[jnp.array([0, 0, 1, 1])].mean(1, keepdims=True))
    plain = mixed_attention(q, k, v, layout=layout)
    merged = mixed_attention(q, k, v, layout=layout, style_merge="adain_mean")
    assert jnp.abs(plain - merged)[2:].max() > 0.05  # the values' means agree already: only keys can do this


def test_mixed_attention_of_equal_streams_is_self_attention(rows):
    """Every key twice halves every weight: with Z_id = Z_t nothing changes."""
    layout, q, k, v = rows
    k, v = (x.at[2:].set(x[jnp.array([0, 0, 1, 1])]) for x in (k, v))
    out = mixed_attention(q, k, v, layout=layout)
    np.testing.assert_allclose(out, dot_product_attention(q, k, v), **CLOSE)


def test_mutual_attention_reads_the_text_stream_alone(rows):
    layout, q, k, v = rows
    out = mixed_attention(q, k, v, layout=layout, mode="mutual")
    np.testing.assert_allclose(out[4], dot_product_attention(q[4:5], k[1:2], v[1:2])[0], **CLOSE)


@pytest.mark.parametrize("active", [True, False])
def test_a_traced_step_turns_mixing_on_and_off(rows, active):
    layout, q, k, v = rows
    out = jax.jit(lambda on: mixed_attention(q, k, v, layout=layout, active=on))(jnp.asarray(active))
    expected = mixed_attention(q, k, v, layout=layout) if active else dot_product_attention(q, k, v)
    np.testing.assert_allclose(out, expected, **CLOSE)


@pytest.mark.parametrize(("text_rows", "identities", "halves"), [(2, 3, 2), (3, 0, 1), (1, 1, 2)])
def test_a_layout_splits_and_joins(text_rows, identities, halves):
    layout = Layout(text_rows, identities, halves)
    x = jnp.arange(halves * text_rows * (1 + identities) * 2.0).reshape(-1, 2)
    text, identity = layout.split(x)
    assert text.shape == (halves, text_rows, 2)
    assert identity.shape == (halves, text_rows, identities, 2)
    np.testing.assert_array_equal(layout.join(text, identity), x)


def test_step_and_layer_ranges():
    switches = Switches(step_range=(2, 5), layer_range=(1, None))
    assert [bool(switches.active(jnp.asarray(i))) for i in range(6)] == [False, False, True, True, True, False]
    assert [switches.covers(i) for i in range(3)] == [False, True, True]
    assert Switches().active(jnp.asarray(0)) is None
    for wrong in ({"attention": "cross"}, {"style_merge": "AdaIN"}, {"step_range": (3, 2)}, {"layer_range": (-1, 2)}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Switches(**wrong)


def test_inject_then_eject_is_bit_equal(unet, tiny):
    model = unet()
    before = {path: np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}
    graph = nnx.graphdef(model)
    inject(model, load_adapter(tiny.adapter, model))
    assert isinstance(model.mid_block.attentions[0].transformer_blocks[0].attn2, IdentityCrossAttention)
    assert nnx.graphdef(model) != graph
    with pytest.raises(InputError, match="already"):
        inject(model, load_adapter(tiny.adapter, unet()))
    eject(model)
    assert nnx.graphdef(model) == graph
    after = {path: np.asarray(v[...]) for path, v in nnx.to_flat_state(nnx.state(model))}
    assert before.keys() == after.keys()
    for path, array in before.items():
        np.testing.assert_array_equal(array, after[path])


def test_the_adapter_is_all_that_trains(unet, tiny):
    """The filter on AdapterParam finds every adapter array in the injected model and none of the base's."""
    model = unet()
    frozen = {id(v) for _, v in nnx.to_flat_state(nnx.state(model))}
    base = len(frozen)
    inject(model, load_adapter(tiny.adapter, model))
    _, trainable, rest = nnx.split(model, AdapterParam, ...)
    assert len(nnx.to_flat_state(rest)) == base
    assert len(nnx.to_flat_state(trainable)) == 2 * len(transformer_blocks(model, "files"))


def test_the_gradient_reaches_every_projection(unet, tiny):
    """Through the frozen base, from the identity row's prediction."""
    model = unet()
    inject(model, load_adapter(tiny.adapter, model))
    graph, trainable, frozen = nnx.split(model, AdapterParam, ...)
    layout = Layout(1, 1, halves=1)
    context = IdentityContext(normal(0, 2, 77, 64), normal(1, 1, 1, 1, 6, 64), 1.0, 1.0, layout)
    added = AddedConditions(normal(2, 2, 32), jnp.zeros((2, 6)))

    def loss(adapter):
        out = nnx.merge(graph, adapter, frozen)(normal(3, 2, 8, 8, 4), jnp.array([500.0, 500.0]), context, added)
        return (out[1] ** 2).mean()

    gradient = jax.jit(jax.grad(loss))(trainable)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradient))


def test_projections_start_as_copies_of_the_frozen_ones(unet, tiny):
    """Decision 23, in the files' order and not the order of execution."""
    model = unet()
    adapter = load_adapter(tiny.adapter, model)
    initialise_from_base(adapter, model)
    for block, projection in zip(transformer_blocks(model, "files"), adapter.ip_adapter, strict=True):
        np.testing.assert_array_equal(projection.to_k_ip.kernel[...], block.attn2.to_k.kernel[...])
        np.testing.assert_array_equal(projection.to_v_ip.kernel[...], block.attn2.to_v.kernel[...])
    tensors = torch_state(adapter)
    last = model.mid_block.attentions[0].transformer_blocks[-1].attn2  # the files' last, not the last to run
    number = max(int(key.split(".")[1]) for key in tensors if key.startswith("ip_adapter."))
    np.testing.assert_array_equal(tensors[f"ip_adapter.{number}.to_k_ip.weight"], last.to_k.kernel[...].T)


def test_zero_features_stay_zero_in_the_face_mapper(unet, tiny):
    """The unconditional identity is the mappers of zeros, with no division by a zero norm."""
    adapter = load_adapter(tiny.adapter, unet())
    tokens = adapter(FaceFeatures(jnp.zeros((1, 5, 32)), jnp.zeros((1, 16))))
    assert tokens.shape == (1, 6, 64)
    assert bool(jnp.isfinite(tokens).all())
    np.testing.assert_allclose(tokens[0, 0], tokens[0, 4], **CLOSE)  # one mapper for all CLIP tokens
    once, doubled = (adapter(FaceFeatures(jnp.zeros((1, 1, 32)), k * jnp.ones((1, 16)))) for k in (1.0, 2.0))
    np.testing.assert_allclose(doubled, once, **CLOSE)  # L2-normalised


def test_mixing_and_interpolation():
    a, b = normal(0, 4, 3), normal(1, 4, 3)
    np.testing.assert_array_equal(encoder.mix([a, b]), jnp.concatenate([a, b]))
    np.testing.assert_allclose(encoder.interpolate([a, b], [0.25, 0.75]), 0.25 * a + 0.75 * b, **CLOSE)
    with pytest.raises(InputError, match=r"sum to 0\.9"):
        encoder.interpolate([a, b], [0.4, 0.5])
    with pytest.raises(InputError, match="1 weights for 2"):
        encoder.interpolate([a, b], [1.0])
    with pytest.raises(InputError, match="token counts"):
        encoder.interpolate([a, encoder.mix([a, b])], [0.5, 0.5])


def test_unlike_mixtures_do_not_stack_to_a_multiple_of_all():
    with pytest.raises(
        InputError, match=r"Together identities of \[8, 12, 20\] tokens take 120 each: draw them in several calls"
    ):
        encoder.stack([normal(0, count, 3) for count in (8, 12, 20)])


def test_stacking_unequal_identities_is_invisible_to_attention():
    """A person of 4 tokens beside a pair of 8: the first one's tokens are repeated."""
    q, one, two = normal(0, 1, 9, 1, 3), normal(1, 4, 3), normal(2, 8, 3)
    stacked = encoder.stack([one, two])
    assert stacked.shape == (2, 8, 3)
    alone, repeated = one[None, :, None], stacked[:1, :, None]
    np.testing.assert_allclose(
        dot_product_attention(q, repeated, repeated), dot_product_attention(q, alone, alone), **CLOSE
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "ip_adapter"}, "not 'infinite_id'"),
        ({"clip_mapper": "conv"}, "'conv' is not of mlp, resampler, none"),
        ({"clip_mapper": "none", "face_tokens": 0}, "neither a clip_mapper nor face_tokens"),
        ({"face_dim": 0}, "whole number from 1"),
        ({"clip_dim": "1664"}, "whole number from 1"),
        ({"resampler_depth": 10**9}, "resampler_depth must be a whole number from 1"),  # which would be built
        ({"face_hidden": "32"}, "face_hidden must be a whole number from 1"),
        ({"clip_layer": "first"}, "is not of"),
        ({"lora_rank": 4}, "unknown keys lora_rank"),
    ],
)
def test_adapter_configurations_that_cannot_be_used(change, says):
    good = {"clip_dim": 32, "face_dim": 16, "face_tokens": 1, "cross_attention_dim": 64, "clip_mapper": "mlp"}
    assert AdapterConfig.from_dict({"format": "infinite_id", **good}).to_dict().items() >= good.items()
    with pytest.raises(InputError, match=says):
        AdapterConfig.from_dict({"format": "infinite_id", **good, **change})
