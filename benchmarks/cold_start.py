"""From a new process to the first image: import, load, compile, draw; with and without programs kept from last time.

    python -m benchmarks.cold_start [--device cpu|gpu] [--size tiny|small|full] [--json FILE]

Weights are in the system's file cache on both sides, as the first, untimed round leaves them. The peer is not compiled
unless `--compile-peer` asks for it: who draws one image would not.
"""

import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import models
from benchmarks.compare import Case, Run, main, take_jax
from benchmarks.meter import in_fresh_process

OPTIONS = {"guidance_scale": 5.0}


def cases(run: Run) -> Iterator[Case]:
    """Text-to-image."""
    models.write(run)
    peer = partial(in_fresh_process, first_image_of_peer, run)
    yield Case("first image, nothing kept", partial(in_fresh_process, first_image, run, None), peer)
    with tempfile.TemporaryDirectory(prefix="compiled_") as kept:
        yield Case("first image, programs kept", partial(in_fresh_process, first_image, run, Path(kept)), peer)


def first_image(run: Run, kept: Path | None) -> np.ndarray:
    """[1, H, W, 3] in [0, 1]; compiled programs are kept in `kept`, where there is one."""
    import jax

    take_jax(run.device)
    if kept is None:
        jax.config.update("jax_enable_compilation_cache", False)
    else:
        jax.config.update("jax_compilation_cache_dir", str(kept))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    steps, latents = models.SIZES[run.size].steps, models.latents(run, 1)
    out = models.ours(run)(models.PROMPT, steps=steps, latents=latents, output="numpy", **OPTIONS)
    return np.asarray(out.images)


def first_image_of_peer(run: Run) -> np.ndarray:
    """The same by diffusers."""
    size = models.SIZES[run.size]
    with models.inference():
        out = models.peer(run)(
            models.PROMPT,
            num_inference_steps=size.steps,
            latents=models.to_torch(run, models.latents(run, 1)),
            height=size.resolution,
            width=size.resolution,
            output_type="np",
            **OPTIONS,
        )
    return np.asarray(out.images)


if __name__ == "__main__":
    sys.exit(main("benchmarks.cold_start", __doc__, cases, ["--no-compile-peer", *sys.argv[1:]]))
