"""Device meshes and the one table of partition rules.

Axes: `data` replicates the weights and divides the batch; `fsdp` divides both; `tensor` divides attention heads and
feed-forward widths within a layer.
"""

import math
import re
from collections.abc import Callable, Mapping

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from infinite_id_jax.errors import InputError

AXES = ("data", "fsdp", "tensor")

# (pattern of the PyTorch key, spec of our array); first match wins. Kernels are [in, out] or [h, w, in, out].
_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # Heads and hidden units leave a layer on `tensor` ...
    (
        r"\.(to_q|to_k|to_v|to_k_ip|to_v_ip|net\.0\.proj|q_proj|k_proj|v_proj|fc1)\.weight$",
        PartitionSpec("fsdp", "tensor"),
    ),
    (r"\.(to_q|to_k|to_v|net\.0\.proj|q_proj|k_proj|v_proj|fc1)\.bias$", PartitionSpec("tensor")),
    # ... and the next map sums over them.
    (r"\.(to_out\.0|net\.2|out_proj|fc2)\.weight$", PartitionSpec("tensor", "fsdp")),
    (r"\.weight$", PartitionSpec("fsdp")),
)


def make_mesh(spec: str | Mapping[str, int] | Mesh | None) -> Mesh | None:
    """A mesh from "data=2,fsdp=2,tensor=1" or {"data": 2}; None stays None (one device).

    Raises InputError for unknown axes or more devices than there are.
    """
    if spec is None or isinstance(spec, Mesh):
        return spec
    sizes = _parse(spec) if isinstance(spec, str) else dict(spec)
    unknown = sorted(sizes.keys() - set(AXES))
    if unknown or any(size < 1 for size in sizes.values()):
        raise InputError(f"The mesh {spec!r} is not of the form data=1,fsdp=1,tensor=1 with sizes of 1 or more.")
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    needed, present = math.prod(shape), jax.device_count()
    if needed > present:
        raise InputError(f"The mesh {spec!r} needs {needed} devices and {present} are present: make it smaller.")
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:needed])


def _parse(spec: str) -> dict[str, int]:
    try:
        return {name.strip(): int(size) for name, size in (part.split("=") for part in spec.split(","))}
    except ValueError:
        raise InputError(f"The mesh {spec!r} is not of the form data=1,fsdp=1,tensor=1.") from None


def parameter_sharding(mesh: Mesh | None) -> Callable[[str, tuple[int, ...]], NamedSharding] | None:
    """(PyTorch key, shape of our array) -> where it lives, for the weight loader; None without a mesh."""
    if mesh is None:
        return None

    def rule(key: str, shape: tuple[int, ...]) -> NamedSharding:
        spec = next((spec for pattern, spec in _RULES if re.search(pattern, key)), PartitionSpec())
        if len(shape) == 4:  # a convolution: divide its output channels
            spec = PartitionSpec(None, None, None, "fsdp")
        return NamedSharding(mesh, _fitting(spec, shape, mesh))

    return rule


def _fitting(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Leave an axis whole where its size does not divide it."""
    return PartitionSpec(
        *(name if name and size % mesh.shape[name] == 0 else None for name, size in zip(spec, shape, strict=False))
    )


def batch_sharding(mesh: Mesh | None) -> NamedSharding | None:
    """Rows over `data` and `fsdp`."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
