"""Identity-preserved personalization of SDXL in JAX: Infinite-ID's two streams, from one photo and a prompt."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infinite_id_jax.errors import InputError, NoFaceError
    from infinite_id_jax.identity.config import Switches
    from infinite_id_jax.images import save_image
    from infinite_id_jax.pipeline import FaceFeatures, Identity, InfiniteIDPipeline, Output

__all__ = [
    "FaceFeatures", "Identity", "InfiniteIDPipeline", "InputError", "NoFaceError", "Output", "Switches", "save_image",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """JAX is imported when the pipeline is first asked for, so that `--help` and input errors come at once."""
    if name in ("InputError", "NoFaceError"):
        from infinite_id_jax import errors

        return getattr(errors, name)
    if name == "save_image":
        from infinite_id_jax import images

        return images.save_image
    if name in __all__:
        from infinite_id_jax import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
