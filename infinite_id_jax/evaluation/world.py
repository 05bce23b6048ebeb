"""What an evaluation needs of the world it measures in: people, prompts, and judges (a protocol to implement)."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, UInt8

Pictures = UInt8[np.ndarray, "n s s 3"]


class Person(NamedTuple):
    """Somebody to draw: a name, the photo that is given, other photos of them, and what they look like."""

    name: str
    photo: UInt8[np.ndarray, "s s 3"]
    others: Pictures
    look: Mapping[str, str]


class Prompt(NamedTuple):
    """A text, its style ("photo" or another), and the attributes that it asks for."""

    text: str
    style: str
    attributes: Mapping[str, str]


class Seen(NamedTuple):
    """What judges see in n pictures; rows of nan where no face was found."""

    found: Bool[np.ndarray, " n"]
    face: Float[np.ndarray, "n d"]  # unit vectors of the judging recogniser
    clip_face: Float[np.ndarray, "n e"]  # unit vectors of the judging CLIP, of the aligned face
    clip: Float[np.ndarray, "n e"]  # of the whole picture
    attributes: Mapping[str, list[str]]  # of every picture, by name
    features: Float[np.ndarray, "n f"]  # for distances between pictures and between sets of them


@runtime_checkable
class World(Protocol):
    """Who and what there is to draw, and who judges it. A judge never conditions what it judges."""

    @property
    def name(self) -> str:
        """Tells worlds apart whose people, prompts or judges differ."""
        ...

    @property
    def judges(self) -> Mapping[str, str]:
        """In words, which judge m_face, clip_i, clip_t and the attributes come from."""
        ...

    def people(self, count: int) -> list[Person]:
        """The first `count` people that nothing was trained on. Raises InputError where there are fewer."""
        ...

    def prompts(self, count: int) -> list[Prompt]:
        """`count` prompts, photographs and other styles by turns. Raises InputError where there are fewer."""
        ...

    def random_prompts(self, count: int) -> list[Prompt]:
        """Prompts that say everything a prompt can say, for the base alone."""
        ...

    def drawn(self, person: Person, prompt: Prompt) -> UInt8[np.ndarray, "s s 3"]:
        """What a perfect model would draw."""
        ...

    def judge(self, pictures: Pictures) -> Seen:
        """What the judges see."""
        ...

    def judge_texts(self, texts: list[str]) -> Float[np.ndarray, "n e"]:
        """Unit vectors of the judging CLIP."""
        ...

    def asked(self, prompt: Prompt) -> dict[str, str]:
        """What the prompt asks for, of what a right picture shows of anybody."""
        ...

    def expected(self, person: Person, prompt: Prompt) -> tuple[dict[str, str], dict[str, str]]:
        """(what the prompt asks for, what the person looks like), of what a right picture shows."""
        ...

    def chance(self) -> dict[str, float]:
        """The share of the most frequent value of each attribute of a person: what guessing gets right."""
        ...
