"""Latents to pixels: this package against PyTorch diffusers.

python -m benchmarks.vae_decode [--device cpu|gpu] [--size tiny|small|full] [--json FILE]
"""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks import models
from benchmarks.compare import Case, Run, main, of_leaves, program_bytes


def cases(run: Run) -> Iterator[Case]:
    """One picture."""
    import jax
    from flax import nnx

    from infinite_id_jax.training.flops import count_flops
    from infinite_id_jax.weights.folder import load_vae, read_settings

    folder, x = models.write(run), models.latents(run, 1)
    graph, state = nnx.split(load_vae(folder / "model", read_settings(folder / "model"), dtype=run.dtype))
    theirs = models.peer(run).vae
    latents, their_latents = jax.numpy.asarray(x, run.dtype), models.to_torch(run, x)

    def decode(state: Any, latents: Any) -> jax.Array:
        return nnx.merge(graph, state).decode(latents)

    def peer() -> Any:
        with models.inference():
            return models.from_torch(theirs.decode(their_latents).sample)

    decode_flat, leaves = of_leaves(decode, state)
    compiled = jax.jit(decode_flat).lower(leaves, latents).compile()
    yield Case(
        f"decode, 1 x {models.SIZES[run.size].resolution} px",
        partial(compiled, leaves, latents),
        peer,
        count_flops(decode, state, latents),
        program_bytes(compiled),
    )


if __name__ == "__main__":
    sys.exit(main("benchmarks.vae_decode", __doc__, cases, None))
