"""What an evaluation asks for: adapters, ways of sampling, claims, and the world they are measured in."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from infinite_id_jax.evaluation.world import World
from infinite_id_jax.faces.protocol import FaceBackend

# What is scored beside the methods: the bounds, which every study has, and pictures of nobody and of two people.
TEXT_ONLY, REFERENCE, DRAWN = "text_only", "reference_copy", "drawn"
BASE, INTERPOLATION, MIXING = "base", "interpolation", "mixing"


@dataclasses.dataclass(frozen=True)
class Method:
    """A way of making pictures: an adapter and the pipeline's arguments, by kind of prompt."""

    name: str
    title: str
    adapter: str
    photo: Mapping[str, Any] | None = dataclasses.field(default_factory=dict)  # None: not run on photographs
    style: Mapping[str, Any] | None = dataclasses.field(default_factory=dict)  # None: not run on other styles
    shrink: int = 1  # the given photo has the detail of a photo smaller by this
    quantization: str = "none"  # of the U-Net's products: none, int8 or float8


@dataclasses.dataclass(frozen=True)
class Claim:
    """metric(first) - metric(second), over the prompts of a kind that both have, is greater than `bound`."""

    text: str
    metric: str
    first: str
    second: str
    bound: float = 0.0
    prompts: str = "all"  # all, photo or style


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """One study. Its first method is the one that bars are held against."""

    model: str
    adapters: Mapping[str, str]  # name to folder
    world: Callable[[], World]
    methods: tuple[Method, ...]
    claims: tuple[Claim, ...]
    sampling: Mapping[str, Any]  # arguments of the pipeline that all methods share
    faces: str | FaceBackend = "auto"  # the backend that the identities are encoded by
    identities: int = 100
    prompts: int = 20
    group: int = 4  # identities that one text row serves; they share its noise, so intervals draw whole groups
    interpolation_weights: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)  # (): nobody in between, and no mixtures
    base_pictures: int = 400  # of random prompts, for the base alone
    base_bars: tuple[float, float] = (0.97, 0.9)  # of prompted attributes by the base alone: their mean, each
    half_way: tuple[str, ...] = ()  # attributes of the identity to keep half-way between guessing and the judge
