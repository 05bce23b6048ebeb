"""One device and eight give the same latents; the rules put every array where they say."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from infinite_id_jax import FaceFeatures, InfiniteIDPipeline
from infinite_id_jax.errors import InputError
from infinite_id_jax.sharding import abstract_mesh, batch_sharding, make_mesh, parameter_sharding
from infinite_id_jax.stable_diffusion.kernels import PLAIN, compiling_for
from infinite_id_jax.stable_diffusion.resnet import Upsample2D

FAST = {"steps": 3, "height": 64, "width": 64, "output": "latent", "seed": 2}


def run(pipe, small):
    people = [pipe.encode_identity(FaceFeatures(**small.features(seed))) for seed in (10, 11)]
    return pipe(["a man in the snow", "a drawing of a dog"], people, style_merge="adain_mean", **FAST)


@pytest.fixture(scope="module")
def pipe(small_pipe):
    return small_pipe


@pytest.fixture(scope="module")
def one_device(pipe, small):
    return run(pipe, small)


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2"])
def test_a_mesh_gives_the_same_latents(one_device, small, mesh):
    """Twelve rows, which eight devices divide unevenly; heads divide by 2 only."""
    out = run(InfiniteIDPipeline.from_pretrained(small.model, small.adapter, mesh=mesh), small)
    # Measured: at most 3.2e-5, latents up to 21.
    np.testing.assert_allclose(out.latents, one_device.latents, atol=1e-4)
    np.testing.assert_allclose(out.text_stream_latents, one_device.text_stream_latents, atol=1e-4)


def test_weights_are_divided(small):
    pipe = InfiniteIDPipeline.from_pretrained(small.model, small.adapter, mesh="fsdp=4,tensor=2")
    state = dict(nnx.to_flat_state(pipe._unet[1]))
    attn1 = ("down_blocks", 1, "attentions", 0, "transformer_blocks", 0, "attn1")
    for leaf, part in ((("to_q", "kernel"), (16, 32)), (("to_out", "kernel"), (32, 16))):
        array = state[(*attn1, *leaf)][...]
        assert array.shape == (64, 64)
        assert array.addressable_shards[0].data.shape == part
    held = sum(v[...].addressable_shards[0].data.size for v in state.values())
    whole = sum(v[...].size for v in state.values())
    assert held < 0.3 * whole  # an eighth of the matrices, all of the small vectors


@pytest.mark.parametrize(("target", "kernels"), [(PLAIN, "3,3,64,64"), ("cpu", "2,2,64,64")])
def test_only_weights_are_gathered_where_pixels_are_doubled(target, kernels):
    """An upsampled feature map of all rows on each device would grow with their number."""
    mesh = make_mesh("fsdp=8")
    graph, state = nnx.split(Upsample2D(64, rngs=nnx.Rngs(0)))
    rule, rows = parameter_sharding(mesh), batch_sharding(mesh)
    state = jax.tree.map(lambda x: jax.device_put(x, rule("conv.weight", x.shape)), state)
    x = jax.device_put(jnp.ones((16, 8, 8, 64)), rows)
    with compiling_for(target), jax.set_mesh(mesh):
        compiled = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, x).compile()
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", str(compiled.as_text()))
    assert set(gathered) == {kernels}
    assert compiled.output_shardings.is_equivalent_to(rows, 4)


def test_an_axis_that_does_not_divide_stays_whole():
    rule = parameter_sharding(make_mesh("fsdp=8"))
    assert rule("mid_block.x.to_q.weight", (12, 16)).spec == jax.sharding.PartitionSpec(None, "tensor")
    assert rule("mid_block.x.to_q.weight", (16, 16)).spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    assert rule("conv_in.weight", (3, 3, 4, 32)).spec == jax.sharding.PartitionSpec(None, None, None, "fsdp")


def test_vectors_are_divided_by_no_fsdp():
    rule = parameter_sharding(make_mesh("fsdp=4,tensor=2"))
    assert rule("mid_block.x.norm1.weight", (16,)).spec == jax.sharding.PartitionSpec()
    assert rule("mid_block.x.norm1.bias", (16,)).spec == jax.sharding.PartitionSpec()
    assert rule("mid_block.x.to_q.bias", (16,)).spec == jax.sharding.PartitionSpec("tensor")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("data=16", "16 devices and 8 are present"),
        ("batch=2", "not of the form"),
        ("data", "not of the form"),
        ("data=0", "not of the form"),
        ("data=-1,fsdp=-1", "one may be -1"),
    ],
)
def test_meshes_that_cannot_be_made(spec, says):
    with pytest.raises(InputError, match=says):
        make_mesh(spec)
    if "present" not in says:  # or a dry run would count with what a run refuses
        with pytest.raises(InputError, match=says):
            abstract_mesh(spec)
