"""LoRA files for the base: kohya's names and those of diffusers and PEFT, merged into it or kept beside it."""

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open

from infinite_id_jax.errors import FLOAT32_MAX, InputError, finite, shown
from infinite_id_jax.stable_diffusion.config import BASES, read_json
from infinite_id_jax.stable_diffusion.low_rank import LowRank, innermost, lora_names
from infinite_id_jax.typing import Array, Scalar
from infinite_id_jax.weights.causes import looks_like
from infinite_id_jax.weights.compvis import unet_names
from infinite_id_jax.weights.folder import StableDiffusionXL
from infinite_id_jax.weights.keys import Entry, key_map
from infinite_id_jax.weights.keys import Path as TreePath
from infinite_id_jax.weights.load import Tensor, open_tensors

Layer = nnx.Linear | nnx.Conv | LowRank


class Update(NamedTuple):
    """What a LoRA adds to one kernel: `ratio` * down @ up, in our layout [..., in, rank] and [rank, out]."""

    down: np.ndarray
    up: np.ndarray
    ratio: float  # alpha / rank


class LoRA(NamedTuple):
    """{PyTorch's name of a layer: its Update} for each part of the base."""

    unet: dict[str, Update]
    text_encoder: dict[str, Update]
    text_encoder_2: dict[str, Update]


# How files name the parts and what they hold of a layer

_PARTS = (
    ("lora_unet_", "unet"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("unet.", "unet"),
    ("text_encoder.", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
    ("diffusion_model.", "unet"),  # ComfyUI's and OneTrainer's
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    ("clip_l.", "text_encoder"),
    ("clip_g.", "text_encoder_2"),
    ("", "unet"),  # a U-Net's LoRA saved alone
)

_ROLES = (
    ("down", r"[._](lora_(down|A)|lora(_linear_layer)?\.down)(\.\w+)?\.weight$"),
    ("up", r"[._](lora_(up|B)|lora(_linear_layer)?\.up)(\.\w+)?\.weight$"),
    ("mid", r"\.lora_mid\.weight$"),  # LoCon's core between two 1x1 maps
    ("alpha", r"\.alpha$"),
)

_EMBEDDING = "bundle_emb."  # OneTrainer's: a word's own embedding, which a LoRA's file may bring

_OTHER_KINDS = (
    (r"dora_scale|lora_magnitude_vector", "a DoRA"),
    (r"\.hada_", "a LoHa"),
    (r"\.lokr_", "a LoKr"),
    (r"\.on_input$|\bia3_", "an IA3"),
    (r"\.b?oft_", "an OFT"),
    (r"\.diff(_b)?$|\.[wb]_norm$", "a file of whole differences"),
)

_OTHER_BASES = (
    (r"^lora_te_", "SD 1.5 or SD 2"),
    (r"^lora_te3_|joint_(transformer_)?blocks", "SD 3"),
    (r"double_blocks|single_(transformer_)?blocks", "Flux"),
    (r"^(lora_)?transformer[._]", "a diffusion transformer (SD 3, Flux)"),
)

_WIDTHS = BASES | {1280: "SDXL's refiner"}


Files = str | PathLike[str] | Sequence[str | PathLike[str]] | Mapping[str, float] | Mapping[Path, float]
"""One file, several, or files with their scales."""


def checked_loras(lora: Files | None) -> dict[str, float]:
    """{file: scale}, 1 where none is given.

    Raises InputError for a scale that is no finite number, and for a file that is named twice.
    """
    if isinstance(lora, Mapping):
        scales = [(fspath(file), finite(f"The scale of {file}", scale)) for file, scale in lora.items()]
    else:
        files = [lora] if isinstance(lora, str | PathLike) else lora or []
        scales = [(fspath(file), 1.0) for file in files]
    seen: set[Path] = set()
    for file, _ in scales:
        if (whole := Path(file).resolve()) in seen:
            raise InputError(f"The LoRA {file} is named twice: name it once, with the sum of the scales.")
        seen.add(whole)
    return dict(scales)


def read_lora(path: Path, base: StableDiffusionXL) -> LoRA:
    """The LoRA of a safetensors file or a pickle, scaled as its alphas say, else by 1.

    Raises InputError for a damaged file, for another kind of adaptation (DoRA, LoHa, LoKr, IA3, OFT), for a LoRA of
    another base, and for names or shapes that do not fit, all of them listed.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder: name the LoRA's file in it.")
    with ExitStack() as stack:
        tensors = open_tensors(path, stack)
        tensors.verify()
        _refuse_others(path, tensors, base.unet.config.cross_attention_dim)
        if words := sorted({key.split(".")[1] for key in tensors if key.startswith(_EMBEDDING)}):
            told = f"{path.name} brings embeddings of words of its own, which are left out: {shown(', '.join(words))}."
            warnings.warn(told, UserWarning, stacklevel=2)
        settings = _settings(path)
        layers = {part: _layers(module) for part, module in _modules(base).items()}
        found, problems = _assigned(tensors, _aliases(base, layers))
        lora = LoRA({}, {}, {})
        for (part, name), roles in found.items():
            try:
                down, up = _factors(roles, layers[part][name].entry)
                getattr(lora, part)[name] = Update(down, up, _ratio(roles, settings, part, name, up.shape[0]))
            except InputError:
                raise
            except ValueError as error:
                problems.append(f"{part}.{name} ({error})")
    if problems:
        listed = f"{', '.join(problems[:20])}{', ...' if len(problems) > 20 else ''}"
        raise InputError(f"{path} does not fit this base, in {len(problems)} places: {listed}. Use a LoRA made for it.")
    return lora


def merge_lora(base: StableDiffusionXL, lora: LoRA, scale: float = 1.0, *, donate: bool = False) -> StableDiffusionXL:
    """The base with kernels W + scale alpha/rank up down (LoRA, Sec. 4.1), summed in fp32; the rest is shared.

    donate: each new kernel takes the old one's memory, and `base` cannot be used any more.
    """
    summed_in = _summed_in_place if donate else _summed

    def merged(layer: Layer, update: Update) -> Layer:
        frozen = innermost(layer)
        kernel = frozen.kernel[...]
        down, up = (_beside(x, kernel, "float32") for x in update[:2])
        where = kernel.sharding
        summed = summed_in(kernel, down, up, scale * update.ratio)
        frozen.kernel = nnx.Param(jax.device_put(summed, where))
        return layer

    return _changed(base, lora, merged)


def _sum(kernel: Array, down: Array, up: Array, factor: Scalar) -> Array:
    change = jnp.tensordot(down, up, 1, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + factor * change).astype(kernel.dtype)


_summed, _summed_in_place = jax.jit(_sum), jax.jit(_sum, donate_argnums=0)


def attach_lora(base: StableDiffusionXL, lora: LoRA, name: str, scale: float = 1.0) -> StableDiffusionXL:
    """The base with the LoRA kept beside its layers, so that `set_lora_scale` can change its strength at any time.

    Raises InputError if a LoRA of this name is there already.
    """
    if name in lora_names(list(_modules(base).values())):
        raise InputError(f"There is a LoRA {name!r} in the model already: give each a name of its own.")

    def attached(layer: Layer, update: Update) -> Layer:
        kernel = innermost(layer).kernel[...]
        down, up = (_beside(x, kernel, kernel.dtype) for x in update[:2])
        return LowRank(layer, down, up, update.ratio, name=name, scale=scale)

    return _changed(base, lora, attached)


def _beside(array: np.ndarray, kernel: Array, dtype: Any) -> Array:
    """Where the kernel lives; in full on every device of a mesh, as the factors are small."""
    where = kernel.sharding
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, PartitionSpec())
    return jax.device_put(np.asarray(array, np.dtype(dtype)), where)


def _modules(base: StableDiffusionXL) -> dict[str, nnx.Module]:
    return dict(zip(LoRA._fields, (base.unet, *base.text_encoders), strict=True))


def _changed(base: StableDiffusionXL, lora: LoRA, change: Callable[[Layer, Update], Layer]) -> StableDiffusionXL:
    """A base whose layers are `change`d, in modules of their own that share all other arrays."""
    modules: dict[str, Any] = dict(_modules(base))
    for part, updates in lora._asdict().items():
        if not updates:
            continue
        module = modules[part] = nnx.merge(*nnx.split(modules[part]))
        layers = _layers(module)
        for name, update in updates.items():
            owner: Any = module
            *parents, attribute = layers[name].path
            for step in parents:
                owner = owner[step] if isinstance(step, int) else getattr(owner, step)
            setattr(owner, str(attribute), change(getattr(owner, str(attribute)), update))
    return base._replace(unet=modules["unet"], text_encoders=(modules["text_encoder"], modules["text_encoder_2"]))


# The layers of the base by all names that files give them


class _Place(NamedTuple):
    path: TreePath  # of the layer, or of the LowRank around it
    entry: Entry


def _layers(module: nnx.Module) -> dict[str, _Place]:
    """{PyTorch's name: place} of every Linear and Conv; LoRAs that are there already are looked through."""
    places = {}
    for path, entry in key_map(module).items():
        if path[-1] == "kernel" and "down" not in path:  # a LowRank's own
            name = entry.key.removesuffix(".weight").replace(".base", "")
            places[name] = _Place(tuple(step for step in path[:-1] if step != "base"), entry)
    return places


def _aliases(base: StableDiffusionXL, layers: Mapping[str, Mapping[str, _Place]]) -> dict[tuple[str, str], str]:
    """{(part, a layer's name with "_" for "."): PyTorch's name}: kohya writes all names so, and none collide."""
    aliases = {}
    original = unet_names(base.unet.config)
    for part, places in layers.items():
        for name in places:
            if part == "unet":
                spellings = _unet_spellings(name, original[f"{name}.weight"].removesuffix(".weight"))
            else:
                spellings = _text_spellings(name)
            aliases |= {(part, spelling.replace(".", "_")): name for spelling in spellings}
    return aliases


def _unet_spellings(name: str, original: str) -> Iterator[str]:
    """Diffusers' and the original name; old attention processors have no list around `to_out`."""
    for spelling in (name, original):
        yield from (spelling, spelling.removesuffix(".0")) if spelling.endswith(".to_out.0") else (spelling,)


def _text_spellings(name: str) -> Iterator[str]:
    """With and without the outermost module; old files name the projections as the U-Net does."""
    for spelling in (name, re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1", name)):
        yield from (spelling, f"text_model.{spelling}")


def _assigned(
    tensors: Mapping[str, Tensor], aliases: Mapping[tuple[str, str], str]
) -> tuple[dict[tuple[str, str], dict[str, Tensor]], list[str]]:
    """{(part, layer): {role: tensor}}, and the keys that say nothing of any layer."""
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        if key.startswith(_EMBEDDING):
            continue
        role, place = _parsed(key)
        name = aliases.get(place)
        roles = found.setdefault((place[0], name), {}) if name and role else None
        if roles is None or role in roles:
            unknown.append(shown(key, 200))
        else:
            roles[role] = tensor
    return found, sorted(unknown)


def _parsed(key: str) -> tuple[str, tuple[str, str]]:
    """The role of a tensor ("" if it has none), and its (part, layer's name with "_")."""
    role, match = next(((role, m) for role, sign in _ROLES if (m := re.search(sign, key))), ("", None))
    name = key[: match.start()] if match else key
    name = name.removeprefix("base_model.model.")
    prefix, part = next((prefix, part) for prefix, part in _PARTS if name.startswith(prefix))
    name = name.removeprefix(prefix).removeprefix("base_model.model.")
    return role, (part, name.replace(".processor.", ".").replace(".", "_"))


# What a layer receives


def _factors(roles: Mapping[str, Tensor], entry: Entry) -> tuple[np.ndarray, np.ndarray]:
    """The factors in our layout. Raises ValueError for what is missing or does not fit a weight of `entry.shape`."""
    missing = {"down", "up"} - roles.keys()
    if missing:
        raise ValueError(f"{' and '.join(sorted(missing))} missing")
    down, up = _whole(roles["down"]), _whole(roles["up"])
    if min(down.ndim, up.ndim) < 2 or not down.size:
        raise ValueError(f"{list(down.shape)} and {list(up.shape)} are no factors")
    outputs, inputs = entry.shape[:2]
    size = entry.shape[2:]
    if "mid" in roles:
        down = np.einsum("rshw,si->rihw", _whole(roles["mid"]), down.reshape(down.shape[:2]))
    if math.prod(down.shape[2:]) == 1:  # 1x1 convolutions and linear maps are written for each other
        down = down.reshape(*down.shape[:2], *[1] * len(size))
    if math.prod(up.shape[2:]) == 1:
        up = up.reshape(up.shape[:2])
    rank = down.shape[0]
    if down.shape != (rank, inputs, *size) or up.shape != (outputs, rank):
        raise ValueError(f"{list(down.shape)} and {list(up.shape)} for a weight of {list(entry.shape)}")
    return down.transpose(entry.inverse), up.T


def _whole(tensor: Tensor) -> np.ndarray:
    return tensor.read(tuple(slice(None) for _ in tensor.shape))


def _ratio(roles: Mapping[str, Tensor], settings: Mapping[str, Any], part: str, name: str, rank: int) -> float:
    """alpha / rank, by the file's alphas or PEFT's settings; 1 where neither is there. Raises ValueError for damage."""
    if "alpha" in roles:
        return _number(_whole(roles["alpha"]).reshape(()).item()) / rank
    of_part = {key.removeprefix(f"{part}."): value for key, value in settings.items()}
    patterns: Mapping[str, Any] = of_part.get("alpha_pattern") or {}
    alpha = next((value for key, value in patterns.items() if _is_meant(name, key)), of_part.get("lora_alpha"))
    if alpha is None:
        return 1.0
    return _number(alpha) / (math.sqrt(rank) if of_part.get("use_rslora") else rank)


def _is_meant(name: str, pattern: str) -> bool:
    """Whether PEFT's pattern is of this layer: the end of its name, or after a "^" all of it.

    Raises ValueError for other regular expressions, which no file from elsewhere is to run here.
    """
    key = pattern.removeprefix("^")
    if re.search(r"[\\^$*+?{}\[\]|()]", key):
        raise ValueError(f"its alpha_pattern {shown(pattern)} is more than the name of a layer")
    names = (name, f"text_model.{name}")
    return key in names if pattern != key else any(f".{each}".endswith(f".{key}") for each in names)


def _number(alpha: Any) -> float:
    if not isinstance(alpha, int | float) or not abs(alpha) < FLOAT32_MAX:
        raise ValueError(f"its alpha is {shown(repr(alpha))}")
    return float(alpha)


def files_of(path: Path) -> list[Path]:
    """A LoRA's file, and PEFT's configuration beside one of PEFT's own, which says how strong it is."""
    config = path.with_name("adapter_config.json")
    return [path, config] if path.name.startswith("adapter_model") and config.is_file() else [path]


def _settings(path: Path) -> dict[str, Any]:
    """PEFT's configuration: in the header of a file that diffusers wrote, or in a file beside one of PEFT's own."""
    _, *config = files_of(path)
    if config:
        return read_json(config[0])
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="numpy") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} has a damaged header ({error}): fetch it again.") from None


def _refuse_others(path: Path, tensors: Mapping[str, Tensor], width: int) -> None:
    """Raise InputError for a file that is no plain LoRA, or one for another base."""
    for sign, kind in _OTHER_KINDS:
        if any(re.search(sign, key) for key in tensors):
            raise InputError(f"{path} is {kind} and not a plain LoRA: merge it into a base with the tool that made it.")
    adapter = any(key.startswith(("image_proj.", "ip_adapter.")) for key in tensors)
    if adapter or not any(re.search(sign, key) for _, sign in _ROLES[:2] for key in tensors):
        kind = "an IP-Adapter" if adapter else looks_like({key: tensor.shape for key, tensor in tensors.items()})
        raise InputError(f"{path} holds no LoRA{f' but {kind}' if kind else ''}: name it as what it is.")
    for sign, other in _OTHER_BASES:
        if any(re.search(sign, key) for key in tensors):
            raise InputError(f"{path} is a LoRA for {other}: use one made for SDXL.")
    widths = {
        tensor.shape[1]
        for key, tensor in tensors.items()
        if re.search(r"attn2[._](processor\.)?to_k[._]lora.*(down|A)(\.\w+)?\.weight$", key) and len(tensor.shape) > 1
    }
    if widths and width not in widths:
        found = min(widths)
        raise InputError(
            f"{path} is a LoRA for {_WIDTHS.get(found, 'another base')} (cross-attention of width {found}, and here "
            f"{width}): use one made for this base."
        )
