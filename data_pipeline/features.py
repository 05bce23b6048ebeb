"""The fourth stage: what the frozen encoders make of a photo, in batches that depend on the shard alone."""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import BFloat16, UInt8

from data_pipeline.config import PipelineConfig, read_configs
from data_pipeline.faces import FoundFace
from data_pipeline.ingest import reopen
from data_pipeline.records import PhotoRecord
from data_pipeline.targets import cut_target, target_size
from infinite_id_jax.conditioning import Split, encode_crops
from infinite_id_jax.stable_diffusion.clip_vision import preprocess
from infinite_id_jax.stable_diffusion.vae import AutoencoderKL, Posterior, to_pixels
from infinite_id_jax.typing import Array
from infinite_id_jax.weights.folder import load_image_encoder
from infinite_id_jax.weights.load import load_module


class Encoders:
    """CLIP's image encoder and the VAE of a model folder, compiled once for each size of picture."""

    def __init__(self, model: Path, config: PipelineConfig):
        """Raises InputError for weights that are missing or damaged."""
        self._config = config
        _, vae_config = read_configs(model)
        self._vae = nnx.split(
            load_module(lambda rngs: AutoencoderKL(vae_config, rngs=rngs), model / "vae", dtype=config.dtype)
        )
        self._clip: Split | None = None
        if config.id_features == "cached":
            self._clip = nnx.split(load_image_encoder(model / "image_encoder", dtype=config.dtype))

    def records(self, faces: Sequence[FoundFace]) -> Iterator[PhotoRecord]:
        """The records of a shard, by size of target, then in order; batches of equal size, the last one padded.

        Beam's RunInference would batch what happens to arrive together, and the last bits of a row depend on the
        shape of its batch: here they are a function of the shard, so that a shard made twice is the same file.
        """
        sizes = {face: target_size(*face.photo_size, self._config.resolutions) for face in faces}
        ordered = sorted(faces, key=lambda face: sizes[face])
        for size, group in itertools.groupby(ordered, key=lambda face: sizes[face]):
            same_size = list(group)
            for start in range(0, len(same_size), self._config.batch_size):
                yield from self._encode(same_size[start : start + self._config.batch_size], size)

    def _encode(self, faces: Sequence[FoundFace], size: int) -> Iterator[PhotoRecord]:
        targets = [cut_target(reopen(face.source), face.box, size) for face in faces]
        mean, std = self.posterior([target.picture for target in targets])
        states = [None] * len(faces) if self._clip is None else self.hidden_states([face.clip_crop for face in faces])
        for i, (face, target) in enumerate(zip(faces, targets, strict=True)):
            yield PhotoRecord(
                person=face.row.person,
                photo=str(face.row.sha256),
                caption=face.row.caption,
                clip_crop=face.clip_crop,
                recogniser_crop=face.recogniser_crop,
                face_embedding=face.embedding,
                clip_hidden_states=states[i],
                latent_mean=mean[i],
                latent_std=std[i],
                time_ids=target.time_ids,
            )

    def posterior(self, pictures: Sequence[UInt8[np.ndarray, "H W 3"]]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and std of the unscaled latents, bfloat16 [batch, H / 8, W / 8, c], of up to a batch of pictures."""
        mean, std = _posterior(*self._vae, self._padded(pictures))
        return np.asarray(mean), np.asarray(std)

    def hidden_states(self, crops: Sequence[UInt8[np.ndarray, "s s 3"]]) -> BFloat16[np.ndarray, "batch L C"]:
        """CLIP's states of the configured layer of up to a batch of crops."""
        assert self._clip is not None, "hidden states are cached only with id_features=cached"
        output = encode_crops(self._clip, preprocess(self._padded(crops)))
        return np.asarray(output.hidden_states(self._config.clip_layer).astype(jnp.bfloat16))

    def _padded(self, pictures: Sequence[np.ndarray]) -> UInt8[np.ndarray, "batch H W 3"]:
        return np.stack([*pictures, *[pictures[-1]] * (self._config.batch_size - len(pictures))])


@partial(jax.jit, static_argnums=0)
def _posterior(graph: Any, state: Any, pictures: Array) -> Posterior:
    pixels = to_pixels(pictures).astype(jax.tree.leaves(state)[0].dtype)
    posterior = nnx.merge(graph, state).encode(pixels)
    return Posterior(posterior.mean.astype(jnp.bfloat16), posterior.std.astype(jnp.bfloat16))
