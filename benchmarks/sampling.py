"""Whole sampling, prompts in and latents out: text-to-image and Infinite-ID's two streams against PyTorch diffusers.

    python -m benchmarks.sampling [--device cpu|gpu] [--size tiny|small|full] [--json FILE]

The peer of the two streams is the same method as diffusers attention processors: the runtime that `export.py` writes.
Text encoding counts on both sides, decoding on neither.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks import models
from benchmarks.compare import Case, Run, main, program_bytes

PEOPLE = (1, 4, 8)  # per prompt


def cases(run: Run) -> Iterator[Case]:
    """Text-to-image, then two streams with some identities per prompt."""
    from infinite_id_jax.identity.features import FaceFeatures

    ours, theirs = models.ours(run), models.peer(run)
    steps, start = models.SIZES[run.size].steps, models.latents(run, 1)
    shared = {"guidance_scale": 5.0}
    features = models.features(run, max(PEOPLE))
    people = [ours.encode_identity(FaceFeatures(**face)) for face in features]
    peer_people = [theirs.encode_identity(**face) for face in features]

    def plain() -> Any:
        with models.inference():
            options = {"latents": models.to_torch(run, start), "num_inference_steps": steps, "output_type": "latent"}
            options |= dict.fromkeys(("height", "width"), models.SIZES[run.size].resolution)
            return models.from_torch(theirs(models.PROMPT, **options, **shared).images)

    def mixed(count: int) -> Any:
        with models.inference():
            options = {"latents": models.to_torch(run, start), "steps": steps, "output": "latent"}
            found = theirs.sample(models.PROMPT, peer_people[:count], style_merge="adain_mean", **options, **shared)
            return models.from_torch(found.latents)

    call = partial(ours, models.PROMPT, steps=steps, latents=start, output="latent", **shared)
    yield _case(ours, f"text-to-image, {steps} steps", call, plain)
    for count in PEOPLE:
        two = partial(call, people[:count], style_merge="adain_mean")
        yield _case(ours, f"two streams, {count} identities", two, partial(mixed, count))


def _case(pipe: Any, name: str, call: Any, peer: Any) -> Case:
    """With the work and the memory of the one program that denoises."""
    compiled, flops = denoising_program(pipe, call)
    return Case(name, lambda: call().latents, peer, flops, program_bytes(compiled))


def denoising_program(pipe: Any, call: Callable[[], Any]) -> tuple[Any, float]:
    """What `call` of the pipeline runs on the device, compiled, and its FLOPs."""
    import jax

    from infinite_id_jax.sampling import sample_streams
    from infinite_id_jax.training.flops import count_flops

    seen: list[Any] = []
    sample = pipe._sample

    def noting(program: Any, unet: Any, **inputs: Any) -> Any:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), (unet, inputs))
        seen.append((program, *shapes))
        return sample(program, unet, **inputs)

    pipe._sample = noting
    try:
        call()
    finally:
        pipe._sample = sample
    program, unet, inputs = seen[0]
    flops = count_flops(lambda unet, inputs: sample_streams(program, unet, **inputs), unet, inputs)
    return sample.lower(program, unet, **inputs).compile(), flops


if __name__ == "__main__":
    sys.exit(main("benchmarks.sampling", __doc__, cases, None))
