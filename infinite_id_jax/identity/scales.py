"""One weight of the identity for each cross-attention."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from infinite_id_jax.errors import InputError, finite
from infinite_id_jax.typing import Float

_LEVELS = {"down": "down_blocks", "mid": "mid_block", "up": "up_blocks"}


def layer_scales(names: Sequence[str], scale: float | Mapping[str, Any]) -> Float[np.ndarray, " layers"]:
    """`scale` for each block of `inject.block_names`: a number, or diffusers' form for single blocks.

    {"down": {"block_2": [0.0, 1.0]}, "mid": 1.0, "up": {"block_0": [0.0, 1.0, 0.0]}} gives one number for each
    transformer of a block, or one for the block or the level; what is not named gets 0 (`set_ip_adapter_scale`).
    Raises InputError for a block that the model does not have, another count of numbers, or what is no finite number.
    """
    if not isinstance(scale, Mapping):
        return np.full(len(names), finite("id_scale", scale), np.float32)
    scales = np.zeros(len(names), np.float32)
    for prefix, value in _flat(names, scale):
        covered = [i for i, name in enumerate(names) if f"{name}.".startswith(f"{prefix}.")]
        if not covered:
            raise InputError(f"id_scale names {prefix}, which has no cross-attention: the model has {_blocks(names)}.")
        scales[covered] = finite(f"id_scale of {prefix}", value)
    return scales


def _flat(names: Sequence[str], scale: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(module name, number) pairs of the nested form."""
    flat: list[tuple[str, Any]] = []
    for level, blocks in scale.items():
        if level not in _LEVELS:
            raise InputError(f"id_scale names {level!r}: choose from {', '.join(_LEVELS)}.")
        prefix = _LEVELS[level]
        if not isinstance(blocks, Mapping):
            flat += _transformers(names, prefix, blocks)
            continue
        for block, value in blocks.items():
            number = str(block).removeprefix("block_")
            if level == "mid" or not number.isdigit():
                raise InputError(f"id_scale names {level}.{block}: write block_0, block_1, ... of down or up.")
            flat += _transformers(names, f"{prefix}.{number}", value)
    return flat


def _transformers(names: Sequence[str], prefix: str, value: Any) -> list[tuple[str, Any]]:
    """A number for all below `prefix`, or one for each of its transformers."""
    if not isinstance(value, list | tuple):
        return [(prefix, value)]
    count = len({name.split(".transformer_blocks")[0] for name in names if name.startswith(f"{prefix}.attentions")})
    if len(value) != count:
        raise InputError(f"id_scale has {len(value)} numbers for {prefix}, which has {count} transformers.")
    return [(f"{prefix}.attentions.{i}", number) for i, number in enumerate(value)]


def _blocks(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(name.split(".attentions")[0] for name in names))
