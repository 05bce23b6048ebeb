"""The pre-norm transformer that CLIP's text and vision encoders share (Radford et al. 2021, sections 2.4, 2.5).

Attribute names are transformers', so a path in the tree of parameters is the checkpoint's key.
"""

from collections.abc import Callable
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from infinite_id_jax.errors import InputError
from infinite_id_jax.stable_diffusion.config import CLIPTextConfig, CLIPVisionConfig
from infinite_id_jax.stable_diffusion.kernels import Linear, layer_norm
from infinite_id_jax.typing import Array, Float, Int, Tokens

CLIPConfig = CLIPTextConfig | CLIPVisionConfig


class EncoderOutput(NamedTuple):
    """Token states before any final norm."""

    last: Tokens
    penultimate: Tokens  # what the last layer receives: `hidden_states[-2]` in transformers


def quick_gelu(x: Array) -> Array:
    """OpenAI CLIP's x * sigmoid(1.702 x), which is not interchangeable with GELU: weights belong to one of them."""
    return x * jax.nn.sigmoid(1.702 * x)


def exact_gelu(x: Array) -> Array:
    """GELU by the error function, as OpenCLIP trains with."""
    return jax.nn.gelu(x, approximate=False)


def activation(name: str) -> Callable[[Array], Array]:
    """The MLP's nonlinearity by its `hidden_act` name; raises InputError for one that no CLIP here uses."""
    functions = {"quick_gelu": quick_gelu, "gelu": exact_gelu}
    if name not in functions:
        raise InputError(f"hidden_act={name!r} is not supported: CLIP models use {' or '.join(functions)}.")
    return functions[name]


def look_up(table: nnx.Embed, ids: Int[Array, "*B"]) -> Float[Array, "*B C"]:
    """Rows of an embedding in the parameter's own dtype: `nnx.Embed` itself answers in the dtype it was built with."""
    return jnp.take(table.embedding[...], ids, axis=0)


class Attention(nnx.Module):
    """Multi-head self-attention with biases; softmax in fp32 whatever the parameters' dtype."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        if config.hidden_size % config.num_attention_heads:
            raise InputError(
                f"hidden_size {config.hidden_size} does not divide into {config.num_attention_heads} heads: "
                "the CLIP configuration is damaged."
            )
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = Linear(width, width, rngs=rngs)
        self.k_proj = Linear(width, width, rngs=rngs)
        self.v_proj = Linear(width, width, rngs=rngs)
        self.out_proj = Linear(width, width, rngs=rngs)

    def __call__(self, x: Tokens, *, causal: bool) -> Tokens:
        q, k, v = (
            einops.rearrange(project(x), "B L (N D) -> B L N D", N=self.num_heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(einops.rearrange(attended, "B L N D -> B L (N D)"))


class MLP(nnx.Module):
    """Two linear layers around the configuration's activation."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        self.activation = activation(config.hidden_act)
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: Tokens) -> Tokens:
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        self.self_attn = Attention(config, rngs=rngs)
        self.layer_norm1 = layer_norm(config.hidden_size, rngs, config.layer_norm_eps)
        self.mlp = MLP(config, rngs=rngs)
        self.layer_norm2 = layer_norm(config.hidden_size, rngs, config.layer_norm_eps)

    def __call__(self, x: Tokens, *, causal: bool) -> Tokens:
        x = x + self.self_attn(self.layer_norm1(x), causal=causal)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """The stack of layers; `causal` hides later tokens from earlier ones, as text needs."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        self.layers = nnx.List([EncoderLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: Tokens, *, causal: bool) -> EncoderOutput:
        penultimate = x
        for layer in self.layers:
            penultimate, x = x, layer(x, causal=causal)
        return EncoderOutput(last=x, penultimate=penultimate)
