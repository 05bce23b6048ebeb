"""What shortcuts save in sampling that change its pictures and are off by default: against sampling without them.

    python -m benchmarks.shortcuts [--device cpu|gpu] [--size tiny|small|full] [--json FILE]

Both sides are ours: two streams with one identity. 8-bit products need the extra quantization. The error is that of
the final latents of random weights; what trained ones lose, judges measure in the miniature
(configs/miniature_variants.py).
"""

import sys
from collections.abc import Iterator
from functools import partial

from benchmarks import models
from benchmarks.compare import Case, Run, main


def cases(run: Run) -> Iterator[Case]:
    """Guidance in some of the steps, inner levels that are kept for some, and products of 8-bit numbers."""
    from infinite_id_jax.identity.features import FaceFeatures
    from infinite_id_jax.stable_diffusion.quantized import KINDS

    pipe, steps = models.ours(run), models.SIZES[run.size].steps
    person = pipe.encode_identity(FaceFeatures(**models.features(run, 1)[0]))
    options = {"steps": steps, "latents": models.latents(run, 1), "output": "latent", "guidance_scale": 5.0}
    call = partial(pipe, models.PROMPT, person, **options)
    for name, shortcut in (
        ("guidance in the first half of the steps", {"guidance_range": (0, steps // 2)}),
        ("inner levels in every second step", {"cache_interval": 2}),
        ("inner levels in every third step", {"cache_interval": 3}),
    ):
        short = partial(call, **shortcut)
        yield Case(name, lambda short=short: short().latents, lambda: call().latents)
    for kind in KINDS:
        short = partial(models.ours(run, quantization=kind), models.PROMPT, person, **options)
        yield Case(f"transformers in {kind}", lambda short=short: short().latents, lambda: call().latents)


if __name__ == "__main__":
    sys.exit(main("benchmarks.shortcuts", __doc__, cases, None))
