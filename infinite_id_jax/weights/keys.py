"""The key map: walk one of our module trees, name every leaf as PyTorch does.

One leaf rule per module type and a short ordered list of renames give {our path: Entry(torch key, axes)}.
Export reads the map forward (`array.transpose(axes)` under `key`), import reads it backward.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from infinite_id_jax.stable_diffusion.kernels import GroupNorm

Path = tuple[str | int, ...]


class Entry(NamedTuple):
    """`key` in a PyTorch file; the file's array is ours with its axes in the order `axes`."""

    key: str
    axes: tuple[int, ...]
    shape: tuple[int, ...]  # in the file

    @property
    def inverse(self) -> tuple[int, ...]:
        """The order of the file's axes that gives our array."""
        return tuple(int(i) for i in np.argsort(self.axes))


_LEAF_RULES: dict[tuple[type, str], tuple[str, tuple[int, ...] | None]] = {
    (nnx.Linear, "kernel"): ("weight", (1, 0)),
    (nnx.Conv, "kernel"): ("weight", (3, 2, 0, 1)),
    (nnx.Embed, "embedding"): ("weight", None),
    (nnx.LayerNorm, "scale"): ("weight", None),
    (GroupNorm, "scale"): ("weight", None),
}

_RENAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"\.to_out\.", ".to_out.0."),  # PyTorch keeps it in a ModuleList beside a dropout
    (r"\.ff\.proj\.", ".ff.net.0.proj."),
    (r"\.ff\.out\.", ".ff.net.2."),
    (r"\.attentions\.0\.attention\.to_", ".attentions.0.to_"),  # the VAE's PixelAttention
    # Adapters. Ours name their two mappers; the published ones have one module, named by its place in a Sequential.
    (r"^identity_encoder\.(?=(clip|face)_mapper\.)", ""),
    (r"^identity_encoder\.((mapper|resampler)\.)?", "image_proj."),
    (r"^(image_proj|clip_mapper)\.perceiver\.", r"\1."),
    (r"^(image_proj|\w+_mapper)\.fc_in\.", r"\1.proj.0."),
    (r"^(image_proj|\w+_mapper)\.fc_out\.", r"\1.proj.2."),
    (r"^image_proj\.last_norm\.", "image_proj.proj.3."),
    (r"\.layers\.(\d+)\.attention\.out\.", r".layers.\1.0.to_out."),
    (r"\.layers\.(\d+)\.attention\.", r".layers.\1.0."),
    (r"\.layers\.(\d+)\.mlp\.norm\.", r".layers.\1.1.0."),
    (r"\.layers\.(\d+)\.mlp\.fc_in\.", r".layers.\1.1.1."),
    (r"\.layers\.(\d+)\.mlp\.fc_out\.", r".layers.\1.1.3."),
    # Their files count attention processors, attn1 and attn2 in turn; identities live in every attn2.
    (r"^ip_adapter\.(\d+)\.", lambda match: f"ip_adapter.{2 * int(match[1]) + 1}."),
    (r"^lora\.", "ip_adapter."),
)


def key_map(module: nnx.Module) -> dict[Path, Entry]:
    """{path of each leaf in our tree: its Entry}, for a module with arrays or with abstract shapes."""
    entries: dict[Path, Entry] = {}
    for path, owner, name, variable in _leaves(module):
        leaf, axes = name, None
        for (kind, attribute), rule in _LEAF_RULES.items():
            if name == attribute and isinstance(owner, kind):
                leaf, axes = rule
        shape = variable.shape
        axes = tuple(range(len(shape))) if axes is None else axes
        key = ".".join([*map(str, path[:-1]), leaf])
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        entries[path] = Entry(key, axes, tuple(shape[i] for i in axes))
    return entries


def _leaves(module: nnx.Module) -> Iterator[tuple[Path, Any, str, nnx.Variable]]:
    flat: Any = nnx.to_flat_state(nnx.state(module))  # the parts of its paths are typed as any comparable
    for path, variable in flat:
        owner: Any = module
        for part in path[:-1]:
            owner = owner[part] if isinstance(part, int) else getattr(owner, part)
        yield path, owner, str(path[-1]), variable


_LEGACY: tuple[tuple[str, str], ...] = (
    (r"^(text_model|vision_model)\.", ""),  # newer files leave the prefix out
    (r"\.attentions\.0\.query\.", ".attentions.0.to_q."),  # VAE files from before diffusers 0.12
    (r"\.attentions\.0\.key\.", ".attentions.0.to_k."),
    (r"\.attentions\.0\.value\.", ".attentions.0.to_v."),
    (r"\.attentions\.0\.proj_attn\.", ".attentions.0.to_out.0."),
)


def current_key(key: str) -> str | None:
    """Today's name of a key in a PyTorch file, None for buffers that older files carry along."""
    if key.endswith("embeddings.position_ids"):
        return None
    for pattern, replacement in _LEGACY:
        key = re.sub(pattern, replacement, key)
    return key


_FLAX_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def flax_key(key: str) -> str | None:
    """`current_key` of a key in a Flax checkpoint ("down_blocks_0/resnets_1/conv1/kernel")."""
    *modules, leaf = key.split("/")
    # Flax joins a list's name and its index with "_"; linear_1 and linear_2 are names of their own.
    modules = [re.sub(r"(?<!linear)_(\d+)$", r".\1", module) for module in modules]
    return current_key(".".join([*modules, _FLAX_LEAVES.get(leaf, leaf)]))
