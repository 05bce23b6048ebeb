"""CLIP's text encoder: SDXL's first (ViT-L's, quick GELU) and its second (OpenCLIP bigG's, with projection)."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from infinite_id_jax.errors import InputError
from infinite_id_jax.stable_diffusion.clip import Encoder, look_up
from infinite_id_jax.stable_diffusion.config import CLIPTextConfig
from infinite_id_jax.stable_diffusion.kernels import Linear, layer_norm
from infinite_id_jax.typing import Array, Float, Int, Tokens

LEGACY_EOS = 2  # configurations written before transformers 4.31 hold this instead of the vocabulary's EOS


class TextOutput(NamedTuple):
    """What diffusion models take from a prompt."""

    last_hidden_state: Tokens  # after the final norm: SD 1.5 and 2.1
    penultimate: Tokens  # before the last layer, without the final norm: SDXL
    pooled: Float[Array, "B E"]  # the EOS token's last hidden state, projected where the model has a projection


class TextEmbeddings(nnx.Module):
    """Token and learned position embeddings."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.position_embedding = nnx.Embed(config.max_position_embeddings, config.hidden_size, rngs=rngs)

    def __call__(self, input_ids: Int[Array, "B L"]) -> Tokens:
        length, positions = input_ids.shape[1], self.position_embedding.num_embeddings
        if length > positions:
            raise InputError(
                f"The prompt has {length} tokens, the text encoder positions for {positions}: "
                "take the tokenizer of the same model folder."
            )
        return look_up(self.token_embedding, input_ids) + look_up(self.position_embedding, jnp.arange(length))[None]


class CLIPTextModel(nnx.Module):
    """transformers' CLIPTextModel, or CLIPTextModelWithProjection if `config.with_projection`.

    Raises InputError for an unknown `hidden_act`.
    """

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = TextEmbeddings(config, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.final_layer_norm = layer_norm(config.hidden_size, rngs, config.layer_norm_eps)
        if config.with_projection:
            self.text_projection = Linear(config.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)

    def __call__(self, input_ids: Int[Array, "B L"]) -> TextOutput:
        """Encode token ids [B, L], L up to `max_position_embeddings`, each row with an EOS."""
        states = self.encoder(self.embeddings(input_ids), causal=True)
        last_hidden_state = self.final_layer_norm(states.last)
        rows = jnp.arange(input_ids.shape[0])
        pooled = last_hidden_state[rows, eos_position(input_ids, self.config.eos_token_id)]  # [B, C]
        if self.config.with_projection:
            pooled = self.text_projection(pooled)
        return TextOutput(last_hidden_state, states.penultimate, pooled)


def eos_position(input_ids: Int[Array, "B L"], eos_token_id: int) -> Int[Array, " B"]:
    """Position of each row's first EOS; a legacy configuration does not know its id, only that it is the highest."""
    return jnp.argmax(input_ids if eos_token_id == LEGACY_EOS else input_ids == eos_token_id, axis=-1)
