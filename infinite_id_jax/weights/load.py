"""Weights from files into device arrays: safetensors (one file or shards), pickles and old Flax msgpack.

Arrays are read one at a time and go straight to their devices in the asked dtype, so the host holds one tensor beside
what the devices hold; a checksum, where a file has one, is compared before, and msgpack holds all at once. Every
missing, surplus or mis-shaped key is named in one error.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import ml_dtypes  # noqa: F401  (teaches numpy, and through it safetensors, bfloat16)
import numpy as np
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open

from infinite_id_jax.errors import InputError, shown
from infinite_id_jax.weights import checksum
from infinite_id_jax.weights.causes import looks_like
from infinite_id_jax.weights.keys import Entry, current_key, flax_key, key_map
from infinite_id_jax.weights.pickles import SUFFIXES as PICKLES
from infinite_id_jax.weights.pickles import open_pickle

M = TypeVar("M", bound=nnx.Module)
ShardingRule = Callable[[str, tuple[int, ...]], Sharding]
"""(PyTorch key, our shape) -> where that array lives."""


@runtime_checkable
class Tensor(Protocol):
    """An array in a file: its shape, and parts of it on demand."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def read(self, index: tuple[slice, ...]) -> np.ndarray: ...


class _SafeTensor:
    def __init__(self, file: Any, name: str, path: Path):
        self._slice, self._path, self._name = file.get_slice(name), path, name
        self.shape = tuple(self._slice.get_shape())

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        if self._slice.get_dtype().startswith("F8"):  # for which numpy has no type
            raise InputError(f"{self._path}: {self._name} has 8-bit numbers: use the version in fp16 or fp32.")
        try:
            return np.asarray(self._slice[index if index else ...])
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self._path}: {self._name} cannot be read ({error}): fetch it again.") from None


class _InMemory:
    def __init__(self, array: np.ndarray):
        self._array, self.shape = array, array.shape

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        return self._array[index]


class Tensors(dict[str, Tensor]):
    """{today's PyTorch key: tensor} of one or more files, and how to find out whether they are as they were written."""

    def __init__(self):
        super().__init__()
        self.checks: list[Callable[[], None]] = []

    def verify(self) -> None:
        """Read each file that carries a checksum once, one tensor at a time. Raises InputError if it is damaged."""
        for check in self.checks:
            check()


class _OneKey(nnx.Rngs):
    """The same key for every array: shapes need no randomness, and counting keys under a trace is quadratic."""

    def __init__(self):
        self._key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self._key


def abstract(make: Callable[[nnx.Rngs], M]) -> M:
    """`make(rngs)` with shapes in place of arrays: full-size SDXL in seconds and no memory."""
    return nnx.eval_shape(lambda: make(_OneKey()))


def load_module(
    make: Callable[[nnx.Rngs], M], source: Path, *, dtype: str = "float32", sharding: ShardingRule | None = None
) -> M:
    """Build `make` without memory, then fill it from `source`, a safetensors or msgpack file or a folder of one.

    Raises InputError for a missing or damaged file and for keys that do not fit the module.
    """
    module = abstract(make)
    with ExitStack() as stack:
        tensors = open_tensors(source, stack)
        return fill(module, tensors, name=str(source), dtype=dtype, sharding=sharding)


def fill(
    module: M,
    tensors: Mapping[str, Tensor],
    *,
    name: str,
    dtype: str = "float32",
    sharding: ShardingRule | None = None,
) -> M:
    """Give every leaf of `module` its array from `tensors`; `name` stands for the source in errors."""
    entries = key_map(module)
    check_keys({entry.key: entry.shape for entry in entries.values()}, tensors, name)
    if isinstance(tensors, Tensors):
        tensors.verify()
    place = sharding or (lambda key, shape: SingleDeviceSharding(jax.devices()[0]))
    graph, state = nnx.split(module)
    flat = dict(nnx.to_flat_state(state))
    for path, entry in entries.items():
        shape = tuple(flat[path].shape)
        array = _to_device(tensors[entry.key], entry, shape, place(entry.key, shape), np.dtype(dtype))
        flat[path] = flat[path].replace(array)
    return nnx.merge(graph, nnx.from_flat_state(list(flat.items())))


def described(module: M, *, dtype: str, sharding: ShardingRule) -> M:
    """`abstract`'s module with each array's dtype and place, to count and compile with."""
    graph, state = nnx.split(module)
    flat = dict(nnx.to_flat_state(state))
    for path, entry in key_map(module).items():
        shape = tuple(flat[path].shape)
        where = sharding(entry.key, shape)
        flat[path] = flat[path].replace(jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=where))
    return nnx.merge(graph, nnx.from_flat_state(list(flat.items())))


def check_keys(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], name: str) -> None:
    """Raise one InputError that lists every missing, surplus and mis-shaped key."""
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "surplus": [shown(key, 200) for key in sorted(found.keys() - expected.keys())],
        "of another shape": [
            f"{key} ({_times(found[key].shape)} instead of {_times(shape)})"
            for key, shape in sorted(expected.items())
            if key in found and found[key].shape != shape
        ],
    }
    listed = [
        f"{len(keys)} {what}: {', '.join(keys[:20])}{', ...' if len(keys) > 20 else ''}"
        for what, keys in problems.items()
        if keys
    ]
    if listed:
        kind = looks_like({key: tensor.shape for key, tensor in found.items()})
        raise InputError(
            f"{name} does not fit its model: {'; '.join(listed)}. "
            f"Use weights that belong to this configuration{f': this looks like {kind}' if kind else ''}."
        )


def _to_device(tensor: Tensor, entry: Entry, shape: tuple[int, ...], where: Sharding, dtype: np.dtype) -> jax.Array:
    parts: dict[Any, np.ndarray] = {}

    def part(index):
        seen = tuple((s.start, s.stop) for s in index)
        if seen not in parts:  # replicas ask for the same part
            in_file = tuple(index[axis] for axis in entry.axes)
            array = tensor.read(in_file).transpose(entry.inverse)
            parts[seen] = np.ascontiguousarray(array, dtype=dtype).reshape(array.shape)
        return parts[seen]

    return jax.make_array_from_callback(shape, where, part)


def check_headers(folders: Iterable[Path]) -> None:
    """Open each folder's weights, which reads their headers alone: a missing or cut shard is known before the first is
    loaded. Raises InputError.
    """
    for source in map(find_weights, folders):
        if source.suffix != ".msgpack":  # of which nothing can be read without reading all
            with ExitStack() as stack:
                open_tensors(source, stack)


def open_tensors(source: Path, stack: ExitStack) -> Tensors:
    """{today's PyTorch key: tensor} of a weight file, or of the weights in a folder."""
    source = find_weights(source) if source.is_dir() else source
    if not source.is_file():
        raise InputError(f"{source} is missing: check the path.")
    if source.name.endswith(".msgpack"):
        return _open_msgpack(source)
    tensors = Tensors()
    if source.suffix in PICKLES:
        named = {current_key(name): tensor for name, tensor in open_pickle(source).items()}
        tensors.update({key: tensor for key, tensor in named.items() if key is not None})
        return tensors
    paths = _shards(source) if source.name.endswith(".json") else [source]
    for path in paths:
        file = _open_safetensors(path, stack)
        digest = (file.metadata() or {}).get(checksum.FIELD)
        if digest is not None:
            tensors.checks.append(partial(checksum.verify, path, digest, file.keys(), file.get_tensor))
        for name in file.keys():  # noqa: SIM118  (not a dict)
            key = current_key(name)
            if key is not None:
                tensors[key] = _SafeTensor(file, name, path)
    return tensors


def find_weights(folder: Path) -> Path:
    """The weight file of one model's folder: safetensors before Flax, full precision before the fp16 variant."""
    stems = ("diffusion_pytorch_model", "model")
    for suffix in (".safetensors", ".safetensors.index.json", ".fp16.safetensors", ".safetensors.index.fp16.json"):
        for stem in stems:
            if (folder / (stem + suffix)).exists():
                return folder / (stem + suffix)
    for name in ("diffusion_flax_model.msgpack", "flax_model.msgpack"):
        if (folder / name).exists():
            return folder / name
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise InputError(f"{folder} holds only a pickle ({pickles[0]}), which can run code: convert it to safetensors.")
    raise InputError(
        f"{folder} holds no weights under a name of diffusers or transformers ({stems[0]}.safetensors, "
        f"{stems[1]}.safetensors, sharded ones with their index): download the model again."
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        paths = [index.parent / name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} is damaged ({type(error).__name__}: {error}): fetch it again.") from None
    if elsewhere := [name for name in names if Path(name).name != name]:
        raise InputError(f"{index} names the weights {shown(elsewhere[0])}, outside of its folder: fetch it again.")
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"{index.parent} misses the weight shards {', '.join(missing)}: fetch them again.")
    return paths


def _open_safetensors(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="numpy"))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}): fetch it again.") from None


def _open_msgpack(path: Path) -> Tensors:
    """Flax's format holds one tree, so this one way of loading does take a full copy in host memory."""
    from flax import serialization, traverse_util

    try:
        tree = serialization.msgpack_restore(path.read_bytes())
        flat = traverse_util.flatten_dict(tree, sep="/")
    except Exception as error:  # msgpack raises its own zoo of exceptions on damaged bytes
        raise InputError(f"{path} is not a whole Flax checkpoint ({error}): fetch it again.") from None
    tensors = Tensors()
    for key, array in flat.items():
        name = flax_key(key)
        if name is not None:
            tensors[name] = _InMemory(_from_flax(key, array))
    return tensors


def _from_flax(key: str, array: Any) -> np.ndarray:
    """Flax's layout is ours; give it PyTorch's, which the key map expects."""
    array = np.asarray(array)
    if key.endswith("kernel"):
        return array.transpose((1, 0) if array.ndim == 2 else (3, 2, 0, 1))
    return array


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
