"""Our arrays into safetensors files in PyTorch's layout."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import save_file

from infinite_id_jax.files import replacing
from infinite_id_jax.weights.checksum import FIELD, state_digest
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
    save_tensors(torch_state(module), path)


def save_tensors(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """As `save_weights`, for arrays that are named and laid out as the file is to have them; with their checksum."""
    # safetensors writes an array's memory as it lies, which for a transposed view is another matrix.
    whole = {key: np.ascontiguousarray(array).reshape(array.shape) for key, array in tensors.items()}
    digest = state_digest(whole, whole.__getitem__)
    with replacing(path) as beside:
        beside.touch()
        mode = beside.stat().st_mode  # as others may read it; safetensors would give it to its owner alone
        try:
            save_file(whole, beside, metadata={"format": "pt", FIELD: digest})
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from None
        beside.chmod(mode)
        _settle(beside)


def _settle(path: Path) -> None:
    """Equal tensors give equal files: safetensors writes the metadata in an order of chance."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))
