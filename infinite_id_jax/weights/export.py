"""Our arrays into safetensors files in PyTorch's layout, written beside and renamed."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from infinite_id_jax.errors import InputError
from infinite_id_jax.weights.keys import key_map


def torch_state(module: nnx.Module) -> dict[str, np.ndarray]:
    """{PyTorch key: array in PyTorch's layout} of all of a module's arrays."""
    flat = dict(nnx.to_flat_state(nnx.state(module)))
    return {
        entry.key: np.ascontiguousarray(np.asarray(flat[path][...]).transpose(entry.axes))
        for path, entry in key_map(module).items()
    }


def save_weights(module: nnx.Module, path: Path) -> None:
    """Write one safetensors file; a half-written one never has the final name. Raises InputError on a full disk."""
    from safetensors.numpy import save_file

    with replacing(path) as beside:
        save_file(torch_state(module), beside, metadata={"format": "pt"})


def save_json(content: dict[str, Any], path: Path) -> None:
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, renamed onto it at the end; removed if anything fails."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}): free space or choose another."
        ) from None
    finally:
        beside.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
