"""Identity-preserved personalization of SDXL in JAX: Infinite-ID's two streams, from one photo and a prompt."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infinite_id_jax.pipeline import FaceFeatures, Identity, InfiniteIDPipeline, Output

__all__ = ["FaceFeatures", "Identity", "InfiniteIDPipeline", "Output"]


def __getattr__(name: str) -> Any:
    """JAX is imported when the pipeline is first asked for, so that `--help` and input errors come at once."""
    if name in __all__:
        from infinite_id_jax import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
