"""One forward of SDXL's U-Net: this package against PyTorch diffusers.

python -m benchmarks.unet_forward [--device cpu|gpu] [--size tiny|small|full] [--json FILE]
"""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks import models
from benchmarks.compare import Case, Run, main, program_bytes


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

    for rows in (1, 2):
        rng = np.random.default_rng(2)
        context = rng.normal(size=(rows, 77, size.settings.unet.cross_attention_dim)).astype(np.float32)
        pooled = rng.normal(size=(rows, size.settings.unet.pooled_dim)).astype(np.float32)
        ids = np.full((rows, 6), [size.resolution, size.resolution, 0, 0, size.resolution, size.resolution], np.float32)
        x, t = models.latents(run, rows), np.full(rows, 601.0, np.float32)
        arguments = (
            state,
            x,
            t,
            jax.numpy.asarray(context, run.dtype),
            AddedConditions(jax.numpy.asarray(pooled), jax.numpy.asarray(ids)),
        )
        compiled = jax.jit(forward).lower(*arguments).compile()
        on_device = [
            models.to_torch(run, a) if a.ndim == 4 else torch.from_numpy(a) for a in (x, t, context, pooled, ids)
        ]
        place = on_device[0].device, on_device[0].dtype
        x_, t_, context_, pooled_, ids_ = (a.to(*place) for a in on_device)

        def peer(x: Any = x_, t: Any = t_, context: Any = context_, pooled: Any = pooled_, ids: Any = ids_) -> Any:
            with models.inference():
                added = {"text_embeds": pooled, "time_ids": ids}
                return models.from_torch(theirs(x, t, context, added_cond_kwargs=added).sample)

        yield Case(
            f"forward, {rows} x {size.resolution} px",
            lambda compiled=compiled, arguments=arguments: np.asarray(compiled(*arguments), np.float32),
            peer,
            count_flops(forward, *arguments),
            program_bytes(compiled),
        )


if __name__ == "__main__":
    sys.exit(main("benchmarks.unet_forward", __doc__, cases, None))
