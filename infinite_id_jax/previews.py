"""What an adapter in training draws: prompts down, people across."""

from collections.abc import Sequence

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from PIL import Image

from infinite_id_jax.identity.inject import IdentityAdapter
from infinite_id_jax.images import labelled_grid
from infinite_id_jax.pipeline import FaceFeatures, InfiniteIDPipeline
from infinite_id_jax.weights.folder import StableDiffusionXL


def preview(
    base: StableDiffusionXL,
    adapter: IdentityAdapter,
    people: Sequence[FaceFeatures],
    crops: Sequence[np.ndarray],
    prompts: Sequence[str],
    *,
    steps: int,
    mesh: Mesh | None = None,
) -> Image.Image:
    """A grid with the people's `crops` as heads of its columns and the prompts as labels of its rows."""
    pipe = InfiniteIDPipeline(base._replace(unet=nnx.clone(base.unet)), adapter, mesh=mesh)
    identities = [pipe.encode_identity(features) for features in people]
    images = pipe(list(prompts), identities, steps=steps).images
    columns = len(people)
    rows = [list(images or ())[row * columns : (row + 1) * columns] for row in range(len(prompts))]
    return labelled_grid(rows, prompts, [Image.fromarray(crop) for crop in crops])
