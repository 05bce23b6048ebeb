"""One forward of SDXL's U-Net: this package against PyTorch diffusers.

python -m benchmarks.unet_forward [--device cpu|gpu] [--size tiny|small|full] [--json FILE]
"""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks import models
from benchmarks.compare import Case, Run, main, of_leaves, program_bytes


def cases(run: Run) -> Iterator[Case]:
    """A row alone, and the two of guidance."""
    import jax
    import torch
    from flax import nnx

    from infinite_id_jax.stable_diffusion.unet import AddedConditions
    from infinite_id_jax.training.flops import count_flops
    from infinite_id_jax.weights.folder import load_unet, read_settings

    size, folder = models.SIZES[run.size], models.write(run)
    unet = load_unet(folder / "model", read_settings(folder / "model"), dtype=run.dtype)
    theirs = models.peer(run).unet
    graph, state = nnx.split(unet)

    def forward(state: Any, *inputs: Any) -> jax.Array:
        return nnx.merge(graph, state)(*inputs)

    def peer(x: Any, t: Any, context: Any, added: dict[str, Any]) -> Any:
        with models.inference():
            return models.from_torch(theirs(x, t, context, added_cond_kwargs=added).sample)

    forward_flat, leaves = of_leaves(forward, state)
    for rows in (1, 2):
        rng = np.random.default_rng(2)
        context = rng.normal(size=(rows, 77, size.settings.unet.cross_attention_dim)).astype(np.float32)
        pooled = rng.normal(size=(rows, size.settings.unet.pooled_dim)).astype(np.float32)
        ids = np.full((rows, 6), [size.resolution, size.resolution, 0, 0, size.resolution, size.resolution], np.float32)
        x, t = models.latents(run, rows), np.full(rows, 601.0, np.float32)
        put = jax.device_put
        inputs = put(x), put(t), jax.numpy.asarray(context, run.dtype), AddedConditions(put(pooled), put(ids))
        x_ = models.to_torch(run, x)
        context_, pooled_ = (torch.from_numpy(a).to(x_) for a in (context, pooled))
        t_, ids_ = (torch.from_numpy(a).to(x_.device) for a in (t, ids))  # bfloat16 has no 601
        compiled = jax.jit(forward_flat).lower(leaves, *inputs).compile()
        yield Case(
            f"forward, {rows} x {size.resolution} px",
            partial(compiled, leaves, *inputs),
            partial(peer, x_, t_, context_, {"text_embeds": pooled_, "time_ids": ids_}),
            count_flops(forward, state, *inputs),
            program_bytes(compiled),
        )


if __name__ == "__main__":
    sys.exit(main("benchmarks.unet_forward", __doc__, cases, None))
