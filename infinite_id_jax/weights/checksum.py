"""One checksum in each safetensors file that we write: a bit that flips on a disk or on the way is found."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from infinite_id_jax.errors import InputError

FIELD = "infinite_id.sha256"  # of the file's metadata

# safetensors' names of the types that weights have.
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def state_digest(keys: Iterable[str], read: Callable[[str], np.ndarray]) -> str:
    """SHA-256 in hex over name, type, shape and bytes of each tensor, by sorted name; one is in memory at a time."""
    digest = hashlib.sha256()
    for key in sorted(keys):
        array = read(key)
        dtype = _NAMES.get(array.dtype.name, array.dtype.name)
        digest.update(f"{key}:{dtype}:{'x'.join(map(str, array.shape))};".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def verify(path: Path, expected: str, keys: Iterable[str], read: Callable[[str], np.ndarray]) -> None:
    """Raises InputError unless the tensors are those the checksum was made of."""
    if state_digest(keys, read) != expected:
        raise InputError(f"{path} is damaged (its checksum does not fit its contents): fetch or export it again.")
