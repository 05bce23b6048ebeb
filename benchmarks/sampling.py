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
OPTIONS = {"guidance_scale": 5.0}


def cases(run: Run) -> Iterator[Case]:
    """Text-to-image, then two streams with some identities per prompt."""
    pipe, calls = our_calls(run)
    for (name, call), peer in zip(calls.items(), peer_calls(run).values(), strict=True):
        yield _case(pipe, name, call, peer)


def our_calls(run: Run) -> tuple[Any, dict[str, Callable[[], Any]]]:
    """The pipeline, and what is asked of it by name."""
    from infinite_id_jax.identity.features import FaceFeatures

    pipe, steps = models.ours(run), models.SIZES[run.size].steps
    people = [pipe.encode_identity(FaceFeatures(**face)) for face in models.features(run, max(PEOPLE, default=0))]
    call = partial(pipe, models.PROMPT, steps=steps, latents=models.latents(run, 1), output="latent", **OPTIONS)
    two = {two_streams(count): partial(call, people[:count], style_merge="adain_mean") for count in PEOPLE}
    return pipe, {f"text-to-image, {steps} steps": call, **two}


def peer_calls(run: Run) -> dict[str, Callable[[], Any]]:
    """The same of the peer, final latents."""
    pipe, size, start = models.peer(run), models.SIZES[run.size], models.latents(run, 1)
    people = [pipe.encode_identity(**face) for face in models.features(run, max(PEOPLE, default=0))]

    def plain() -> Any:
        with models.inference():
            options = {"latents": models.to_torch(run, start), "num_inference_steps": size.steps}
            options |= {"height": size.resolution, "width": size.resolution, "output_type": "latent"}
            return models.from_torch(pipe(models.PROMPT, **options, **OPTIONS).images)

    def mixed(count: int) -> Any:
        with models.inference():
            options = {"latents": models.to_torch(run, start), "steps": size.steps, "output": "latent"}
            found = pipe.sample(models.PROMPT, people[:count], style_merge="adain_mean", **options, **OPTIONS)
            return models.from_torch(found.latents)

    return {f"text-to-image, {size.steps} steps": plain, **{two_streams(n): partial(mixed, n) for n in PEOPLE}}


def two_streams(people: int) -> str:
    """What the row is called."""
    return f"two streams, {people} identities"


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
