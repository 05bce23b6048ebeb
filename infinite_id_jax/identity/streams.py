"""The two streams as rows of one batch, so that one U-Net call serves both.

One guidance half holds T text rows and then T x R identity rows, R for each text row, text-row-major; the
unconditional half comes before the conditional one (decisions 7 to 10): [text_u, id_u, text_c, id_c].
"""

import dataclasses

import jax.numpy as jnp
from einops import rearrange, repeat

from infinite_id_jax.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the rows of one batch are divided."""

    text_rows: int  # T, in one guidance half
    identities: int  # R, identity rows per text row; 0 is plain text-to-image
    halves: int = 2  # 1 without guidance

    def split(self, x: Float[Array, "B ..."]) -> tuple[Float[Array, "G T ..."], Float[Array, "G T R ..."]]:
        """[B, ...] -> text rows [G, T, ...] and identity rows [G, T, R, ...], G the guidance halves."""
        x = rearrange(x, "(G rows) ... -> G rows ...", G=self.halves)
        text, identity = x[:, : self.text_rows], x[:, self.text_rows :]
        return text, rearrange(identity, "G (T R) ... -> G T R ...", T=self.text_rows, R=self.identities)

    def join(self, text: Float[Array, "G T ..."], identity: Float[Array, "G T R ..."]) -> Float[Array, "B ..."]:
        """The inverse of `split`."""
        identity = rearrange(identity, "G T R ... -> G (T R) ...")
        return rearrange(jnp.concatenate([text, identity], axis=1), "G rows ... -> (G rows) ...")

    def spread(self, text: Float[Array, "T ..."]) -> Float[Array, "rows ..."]:
        """What belongs to the text rows of one half, copied to their identity rows: noise, prompts, seeds."""
        return jnp.concatenate([text, repeat(text, "T ... -> (T R) ...", R=self.identities)])

    def double(self, x: Float[Array, "rows ..."]) -> Float[Array, "B ..."]:
        """The same rows in every guidance half."""
        return jnp.concatenate([x] * self.halves)
