"""What may vary: the variants of the method while sampling, and the shape of an adapter."""

import dataclasses
import operator
from typing import Any

from infinite_id_jax.errors import InputError
from infinite_id_jax.identity.adain import STYLE_MERGES
from infinite_id_jax.identity.features import CLIP_LAYERS, Needs
from infinite_id_jax.stable_diffusion.config import BASES
from infinite_id_jax.typing import Array, Bool, Int

CHOICES: dict[str, tuple[str, ...]] = {
    "streams": ("two", "one"),
    "attention": ("mixed", "mutual", "off"),
    "style_merge": tuple(STYLE_MERGES),
    "text_stream": ("own", "shared"),
    "pooled_text": ("prompt", "zeros"),
}
RECOGNISERS = ("insightface", "offline", "miniature")  # a backend of another name may be any of them
CLIP_MAPPERS = ("mlp", "resampler", "none")


@dataclasses.dataclass(frozen=True)
class Switches:
    """The variants of the method; each is part of the compiled program.

    streams: two: an identity stream beside a text stream (Infinite-ID); one: every row attends to its text and its
        identity and to nobody else, as adapters are published (IP-Adapter); what concerns a text stream is then
        refused.
    attention: the identity stream's self-attention: mixed (Eq. 5), mutual (MasaCtrl, ablation of Table 1) or off.
    style_merge: what K_id, V_id and K'_id, V'_id take over from the text's: nothing, the mean (Eq. 7, 8), or mean
        and standard deviation (ablation of Fig. 7).
    cross_merge: the text term of Eq. 6; without it no text enters the identity stream's cross-attention (Table 2).
    text_stream: own: it denoises its own latents; shared: it looks at the identity stream's.
    pooled_text: SDXL's pooled text vector in the identity stream.
    step_range, layer_range: (first, end) of the sampler's steps and of the self-attention layers, in order of
        execution, in which `attention` departs from plain self-attention; an end of None is the last.
    """

    streams: str = "two"
    attention: str = "mixed"
    style_merge: str = "none"
    cross_merge: bool = True
    text_stream: str = "own"
    pooled_text: str = "prompt"
    step_range: tuple[int, int | None] = (0, None)
    layer_range: tuple[int, int | None] = (0, None)

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"Unknown {name} {getattr(self, name)!r}: choose from {', '.join(allowed)}.")
        for name in ("step_range", "layer_range"):
            object.__setattr__(self, name, checked_range(name, getattr(self, name)))  # a list could not be compiled in
        if self.streams == "one":
            self._check_one_stream()

    def _check_one_stream(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ("attention", "text_stream", "step_range", "layer_range"):
            # Plain self-attention is what one stream has: "off" says so, and the default asks for nothing.
            if getattr(self, name) not in (defaults[name], "off"):
                raise InputError(f"{name} concerns the text stream, which streams='one' does not have: leave it out.")

    def active(self, step: Int[Array, ""]) -> Bool[Array, ""] | None:
        """Whether `attention` applies at this traced step; None if it applies at all of them."""
        return within(self.step_range, step)

    def covers(self, layer: int) -> bool:
        """Whether `attention` applies in this self-attention layer."""
        first, end = self.layer_range
        return first <= layer and (end is None or layer < end)


def within(steps: tuple[int, int | None], step: Int[Array, ""]) -> Bool[Array, ""] | None:
    """Whether a traced step lies in a range (first, end); None if every step does."""
    first, end = steps
    if first == 0 and end is None:
        return None
    return step >= first if end is None else (step >= first) & (step < end)


def checked_range(name: str, value: Any) -> tuple[int, int | None]:
    """(first, end) as integers, an end of None being the last. Raises InputError, naming it, for anything else."""
    try:
        first, end = value
        first, end = operator.index(first), None if end is None else operator.index(end)
    except (TypeError, ValueError):
        first, end = -1, None
    if first < 0 or (end is not None and end < first):
        raise InputError(f"{name} {value} is no range: give (first, end) with 0 <= first <= end.")
    return first, end


def check_reach(steps: int, layers: int, **ranges: tuple[int, int | None]) -> None:
    """Raises InputError for a range of steps (or of layers, by its name) that begins behind the last one.

    One that is empty on purpose, such as (0, 0), stands. So it does for no steps at all.
    """
    if steps < 1:
        raise InputError(f"{steps} steps draw nothing: give 1 or more.")
    for name, (first, end) in ranges.items():
        count, what = (layers, "layers") if name == "layer_range" else (steps, "steps")
        if first >= count and first != end:
            raise InputError(f"{name} begins at {first} and there are {count} {what}: begin before, or give (0, 0).")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """What is said of every adapter, whoever trained it."""

    cross_attention_dim: int = 2048

    @property
    def needs(self) -> Needs:
        """What the adapter takes of a face."""
        raise NotImplementedError

    @property
    def trained_recogniser(self) -> str | None:
        """The face backend whose embeddings it was trained on, where that is known."""
        return None

    def describe(self) -> str:
        """The family, what it sees, where it comes from: for a reader."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The entries of `adapter_config.json`."""
        raise NotImplementedError

    def check_fits(self, cross_attention_dim: int) -> None:
        """Raise InputError unless a model of this cross-attention width takes the adapter."""
        if self.cross_attention_dim != cross_attention_dim:
            known = BASES.get(self.cross_attention_dim)
            raise InputError(
                f"The adapter has cross-attention width {self.cross_attention_dim}, the model {cross_attention_dim}: "
                f"{f'it looks like one for {known}; ' if known else ''}use an adapter trained for this model "
                f"({', '.join(f'{width} is {base}' for width, base in BASES.items())})."
            )

    def check_recogniser(self, name: str, embedding_dim: int) -> None:
        """Raise InputError unless the adapter takes this face backend's embeddings."""
        if self.needs.face_dim not in (0, embedding_dim):
            raise InputError(
                f"The adapter was trained on face embeddings of {self.needs.face_dim} numbers and the face backend "
                f"{name} gives {embedding_dim}: choose the backend it was trained with (insightface gives 512, "
                "offline 128)."
            )
        known = self.trained_recogniser
        if self.needs.face_dim and known is not None and name != known and name.partition("/")[0] in RECOGNISERS:
            raise InputError(
                f"The adapter was trained on face embeddings of {known}, which those of {name} cannot be compared "
                f"with: choose the face backend {known}."
            )


@dataclasses.dataclass(frozen=True)
class AdapterConfig(EncoderConfig):
    """`adapter_config.json`: the shape of an adapter trained here (decisions 1 to 4).

    `clip_hidden` and `face_hidden` are the mappers' inner widths; None stands for clip_dim and 2 face_dim.
    clip_mapper: one of CLIP_MAPPERS; a resampler reads CLIP's tokens into `resampler_queries`; without a mapper, or
    with face_tokens 0, the adapter does not look at that encoder. Raises InputError for what is not built.
    """

    clip_dim: int = 1664
    face_dim: int = 512
    face_tokens: int = 1
    clip_mapper: str = "mlp"
    clip_layer: str = "last"  # which hidden states of the CLIP image encoder, one of CLIP_LAYERS
    recogniser: str | None = None  # the face backend of the records that it was trained on
    clip_hidden: int | None = None
    face_hidden: int | None = None
    resampler_queries: int = 16
    resampler_dim: int = 1280
    resampler_depth: int = 4
    resampler_heads: int = 20

    def __post_init__(self) -> None:
        for name, allowed in (("clip_mapper", CLIP_MAPPERS), ("clip_layer", CLIP_LAYERS)):
            if getattr(self, name) not in allowed:
                raise InputError(f"The adapter's {name} {getattr(self, name)!r} is not of {', '.join(allowed)}.")
        if self.clip_mapper == "none" and not self.face_tokens:
            raise InputError("The adapter has neither a clip_mapper nor face_tokens: give it one of them.")

    @property
    def trained_recogniser(self) -> str | None:
        return self.recogniser

    @property
    def needs(self) -> Needs:
        return Needs(
            clip_dim=0 if self.clip_mapper == "none" else self.clip_dim,
            clip_layer=self.clip_layer,
            face_dim=self.face_dim if self.face_tokens else 0,
        )

    def describe(self) -> str:
        seen = []
        if self.needs.clip_dim:
            seen.append(
                f"CLIP's {self.clip_layer} hidden states of width {self.clip_dim} through its {self.clip_mapper}"
            )
        if self.needs.face_dim:
            seen.append(f"a face embedding of {self.face_dim} numbers as {self.face_tokens} token(s)")
        return f"Infinite-ID ({' and '.join(seen)})"

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
        numbers = {field.name: field.default for field in dataclasses.fields(cls) if "int" in str(field.type)}
        for name in sorted(values.keys() & numbers.keys()):
            if values[name] is None and numbers[name] is None:
                continue
            least, most = 0 if name == "face_tokens" else 1, 100 if name == "resampler_depth" else 2**20
            if type(values[name]) is not int or not least <= values[name] <= most:
                raise InputError(
                    f"adapter_config.json: {name} must be a whole number from {least}, not {values[name]!r}."
                )
        return cls(**{key: value for key, value in values.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """The entries of the JSON file; a resampler's only where there is one."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        if self.clip_mapper != "resampler":
            values = {key: value for key, value in values.items() if not key.startswith("resampler_")}
        return {"format": "infinite_id", **values}
