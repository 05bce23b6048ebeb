"""Our arrays into safetensors files in PyTorch's layout."""

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
        try:
            save_file(whole, beside, metadata={"format": "pt", FIELD: digest})
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from None
