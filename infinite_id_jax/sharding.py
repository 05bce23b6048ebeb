"""Device meshes and the one table of partition rules.

Axes: `data` replicates the weights and divides the batch; `fsdp` divides both; `tensor` divides attention heads and
feed-forward widths within a layer.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, overload

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from infinite_id_jax.errors import InputError

T = TypeVar("T")

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


@overload
def make_mesh(spec: None) -> None: ...
@overload
def make_mesh(spec: str | Mapping[str, int] | Mesh) -> Mesh: ...
def make_mesh(spec: str | Mapping[str, int] | Mesh | None) -> Mesh | None:
    """A mesh from "data=2,fsdp=2,tensor=1" or {"data": 2}; None stays None (one device).

    One axis may be -1: it takes all devices that the others leave. Raises InputError for unknown axes, more devices
    than there are, or none of some process.
    """
    if spec is None or isinstance(spec, Mesh):
        return spec
    sizes = _sizes(spec)
    present = jax.device_count()
    for axis in [axis for axis, size in sizes.items() if size == -1]:
        sizes[axis] = max(1, present // math.prod(size for size in sizes.values() if size > 0))
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    needed = math.prod(shape)
    if needed > present:
        raise InputError(f"The mesh {spec!r} needs {needed} devices and {present} are present: make it smaller.")
    devices = jax.devices()[:needed]
    if idle := set(range(jax.process_count())) - {device.process_index for device in devices}:
        raise InputError(
            f"The mesh {spec!r} takes {needed} of {present} devices, none of them of process {sorted(idle)}: give one "
            "axis -1, as in data=-1, or start fewer processes."
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def abstract_mesh(spec: str) -> AbstractMesh:
    """The mesh of machines that are not here, to count with; an axis of -1 counts as 1."""
    sizes = _sizes(spec)
    shape = tuple(max(1, sizes.get(axis, 1)) for axis in AXES)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)


def _sizes(spec: str | Mapping[str, int]) -> dict[str, int]:
    """The size of each axis that is named, at most one of them -1."""
    if isinstance(spec, str):
        try:
            sizes = {name.strip(): int(size) for name, size in (part.split("=") for part in spec.split(","))}
        except ValueError:
            sizes = {spec: 0}  # no axis, and so refused
    else:
        sizes = dict(spec)
    given = list(sizes.values())
    if sizes.keys() - set(AXES) or given.count(-1) > 1 or any(size < 1 and size != -1 for size in given):
        raise InputError(
            f"The mesh {spec!r} is not of the form data=1,fsdp=1,tensor=1 with sizes of 1 or more (one may be -1)."
        )
    return sizes


def parameter_sharding(mesh: Mesh | AbstractMesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """(PyTorch key, shape of our array) -> where it lives, for the weight loader."""

    def rule(key: str, shape: tuple[int, ...]) -> NamedSharding:
        spec = next((spec for pattern, spec in _RULES if re.search(pattern, key)), PartitionSpec())
        if len(shape) == 4:  # a convolution: divide its output channels
            spec = PartitionSpec(None, None, None, "fsdp")
        if len(shape) == 1 and spec == PartitionSpec("fsdp"):  # a norm's scale: gathering it costs more than keeping it
            spec = PartitionSpec()
        return NamedSharding(mesh, _fitting(spec, shape, mesh))

    return rule


def _fitting(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Leave an axis whole where its size does not divide it."""
    return PartitionSpec(
        *(name if name and size % mesh.shape[name] == 0 else None for name, size in zip(spec, shape, strict=False))
    )


def compiler_options(mesh: Mesh | None) -> dict[str, Any] | None:
    """What XLA is to be told beside a program that runs on a mesh.

    On TPUs: not to break products of divided weights into steps around a ring, for which it would hold these weights
    twice (docs/performance.md has what that takes).
    """
    if mesh is None or mesh.devices.flat[0].platform != "tpu":
        return None
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Rows over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def rows_of_process(sharding: NamedSharding, rows: int) -> list[int]:
    """Which rows of a batch the devices of this process hold, in order."""
    places: Any = sharding.addressable_devices_indices_map((rows,)).values()
    return sorted({row for (place,) in places for row in range(rows)[place]})


def to_devices(
    batch: Mapping[str, np.ndarray], sharding: NamedSharding, rows: int, held: Sequence[int]
) -> dict[str, jax.Array]:
    """Global arrays of `rows` rows from the rows `held` by this process. Copies in the background."""
    position = {row: i for i, row in enumerate(held)}

    def place(array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:  # a slice for each axis
            wanted = range(rows)[index[0]]
            return array[position[wanted[0]] : position[wanted[-1]] + 1]

        return jax.make_array_from_callback((rows, *array.shape[1:]), sharding, part)

    return {name: place(array) for name, array in batch.items()}


def gathered(tree: T) -> T:
    """The arrays of all processes' devices, whole and on the host of every process."""
    from jax.experimental import multihost_utils

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)
