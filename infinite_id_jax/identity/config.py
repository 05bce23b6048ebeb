"""What may vary: the variants of the method while sampling, and the shape of an adapter."""

import dataclasses
from typing import Any

from infinite_id_jax.errors import InputError
from infinite_id_jax.identity.adain import STYLE_MERGES
from infinite_id_jax.typing import Array, Bool, Int

CHOICES: dict[str, tuple[str, ...]] = {
    "attention": ("mixed", "mutual", "off"),
    "style_merge": tuple(STYLE_MERGES),
    "text_stream": ("own", "shared"),
    "pooled_text": ("prompt", "zeros"),
}


@dataclasses.dataclass(frozen=True)
class Switches:
    """The variants of the method; each is part of the compiled program.

    attention: self-attention of the identity stream: mixed (Eq. 5), mutual (MasaCtrl, the ablation of Table 1) or off.
    style_merge: what K_id, V_id and K'_id, V'_id take over from the text's: nothing, the mean (Eq. 7, 8), or mean
        and standard deviation (the ablation of Fig. 7).
    cross_merge: the text term of Eq. 6; without it no text enters the identity stream's cross-attention (Table 2).
    text_stream: own: it denoises its own latents; shared: it looks at the identity stream's.
    pooled_text: SDXL's pooled text vector in the identity stream.
    first_step, last_step (exclusive), first_layer, last_layer (exclusive): the sampler's steps and the self-attention
        layers, in order of execution, in which `attention` departs from plain self-attention.
    """

    attention: str = "mixed"
    style_merge: str = "none"
    cross_merge: bool = True
    text_stream: str = "own"
    pooled_text: str = "prompt"
    first_step: int = 0
    last_step: int | None = None
    first_layer: int = 0
    last_layer: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"Unknown {name} {getattr(self, name)!r}: choose from {', '.join(allowed)}.")
        for unit in ("step", "layer"):
            first, last = getattr(self, f"first_{unit}"), getattr(self, f"last_{unit}")
            if first < 0 or (last is not None and last < first):
                raise InputError(f"The {unit}s {first}:{last} are no range: give 0 <= first_{unit} <= last_{unit}.")

    def active(self, step: Int[Array, ""]) -> Bool[Array, ""] | None:
        """Whether `attention` applies at this traced step; None if it applies at all of them."""
        if self.first_step == 0 and self.last_step is None:
            return None
        started = step >= self.first_step
        return started if self.last_step is None else started & (step < self.last_step)

    def covers(self, layer: int) -> bool:
        """Whether `attention` applies in this self-attention layer."""
        return self.first_layer <= layer and (self.last_layer is None or layer < self.last_layer)


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """`adapter_config.json`: the widths of an adapter (METHOD rows 1 to 4).

    `clip_hidden` and `face_hidden` are the mappers' inner widths; None stands for clip_dim and 2 face_dim.
    """

    clip_dim: int = 1664
    face_dim: int = 512
    face_tokens: int = 1
    cross_attention_dim: int = 2048
    clip_mapper: str = "mlp"
    clip_layer: str = "last"  # or "penultimate": which hidden states of the CLIP image encoder
    clip_hidden: int | None = None
    face_hidden: int | None = None

    def __post_init__(self) -> None:
        for name in ("clip_dim", "face_dim", "face_tokens", "cross_attention_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"adapter_config.json: {name} must be a positive integer, not {value!r}.")
        if self.clip_mapper != "mlp":
            raise InputError(f"adapter_config.json: clip_mapper {self.clip_mapper!r} is not supported, only 'mlp'.")
        if self.clip_layer not in ("last", "penultimate"):
            raise InputError(f"adapter_config.json: clip_layer {self.clip_layer!r} is neither last nor penultimate.")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "AdapterConfig":
        """Raises InputError if this is no Infinite-ID adapter or a width is missing."""
        if values.get("format") != "infinite_id":
            raise InputError(f"adapter_config.json: format {values.get('format')!r} is not 'infinite_id'.")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - known - {"format"})
        if unknown:
            raise InputError(f"adapter_config.json: unknown keys {', '.join(unknown)}: a newer version's adapter?")
        required = {"clip_dim", "face_dim", "face_tokens", "cross_attention_dim"}
        missing = sorted(required - values.keys())
        if missing:
            raise InputError(f"adapter_config.json: {', '.join(missing)} missing: write the file again.")
        return cls(**{key: value for key, value in values.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        values = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        return {"format": "infinite_id", **values}
