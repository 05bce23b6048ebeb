"""Generated people for the miniature: who a person is, what a prompt may say of a picture, and the picture.

*Identity* (Person) stays with a person. *Semantics* (Scene, avatar_captions.py) is what a prompt may say. *Style* is
how it is drawn (avatar_styles.py); "photo" is this world's photograph. Parts are python_avatars' (MIT), rasterised by
resvg.
Everything is a pure function of its arguments.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from data_pipeline import avatar_svg
from data_pipeline.avatar_captions import SHIRT_BELOW, WORDS, Scene, caption, check_choice, generator, scene_of
from data_pipeline.avatar_styles import STYLES
from infinite_id_jax.errors import InputError

# Identity: values that a viewer tells apart at 128 pixels, with their colours or the library's names.
SKIN = {"pale": "#F8D3B6", "light": "#E0A26C", "tan": "#BB7840", "brown": "#8C4F28", "dark": "#4E3123"}
HAIR = {
    "bald": "no_hair",
    "short": "short_flat",
    "flat top": "frizzle",
    "mohawk": "mohawk",
    "spiked": "evil_spike",
    "afro": "fro",
    "bob": "bob",
    "dreadlocks": "dreads",
    "wild": "einstein_hair",
    "half shaved": "half_shaved",
    "shaggy": "mowgli",
    "swept": "shaggy",
    "mullet": "shaggy_mullet",
    "frizzy": "short_dreads_2",
    "long straight": "straight_1",
    "long braids": "twist_long_hair",
    "long wavy": "curvy",
    "tied locks": "dreadlocks",
}
HAIR_COLOUR = {
    "black": "#231F20",
    "brown": "#6B3F2A",
    "ginger": "#C9521C",
    "blond": "#E2BC5E",
    "grey": "#9C9CA4",
    "white": "#F3F0EA",
    "pink": "#F07FB0",
    "blue": "#3E63CF",
}
FACIAL_HAIR = {
    "none": None,
    "moustache": "moustache",
    "goatee": "goatee",
    "short beard": "beard_medium",
    "long beard": "beard_magestic",
}
BROWS = {"none": None, "arched": "arched", "thick": "thick", "joined": "joined"}
NOSE = {"small": "small", "wide": "wide", "long": "long"}
GLASSES = {"none": None, "round": "round", "square": "prescription_02", "white": "prescription_01"}

# Semantics.
CLOTHING = {
    "hoodie": "hoodie",
    "t-shirt": "shirt_crew_neck",
    "striped shirt": "striped",
    "collared sweater": "collared",
    "blazer": "blazer_shirt",
    "overalls": "overall",
    "tuxedo": "bond_suit",
    "spacesuit": "astronaut_suit",
}
CLOTHING_COLOUR = {
    "red": "#D8342C",
    "orange": "#F08A24",
    "yellow": "#F6D63E",
    "green": "#3C9A4A",
    "blue": "#2F6FD6",
    "purple": "#8A44B8",
    "white": "#F4F4F4",
    "black": "#26262C",
}
EXPRESSION = {  # mouth and eyes; the mouths all differ, for dark glasses hide the eyes
    "happy": ("big_smile", "happy"),
    "serious": ("straight", "default"),
    "sad": ("sad", "cry"),
    "surprised": ("scream_open", "surprised"),
    "gritting teeth": ("grimace", "squint"),
    "winking": ("smirk", "wink"),
    "tongue out": ("tongue", "wink_wacky"),
    "in love": ("smile", "heart"),
}
ACCESSORY = {
    "none": None,
    "sunglasses": "wayfarers",
    "cat-eye glasses": "kurt",
    "eyepatch": "eyepatch",
    "headphones": None,
}
HAT = {
    "none": ("", ""),
    "wide hat": ("hat", "#3A2E28"),
    "bobble hat": ("winter_hat_3", "#C8342E"),
    "earflap hat": ("winter_hat_2", "#2C7A4B"),
    "helmet": ("gladiator_helmet", "#B8862E"),
}
BACKGROUND = avatar_svg.BACKDROPS
VIEW = {"close-up": (1.14, 13.0), "portrait": (0.97, 2.0), "wide shot": (0.82, 0.0)}  # scale; down, in hundredths


@dataclasses.dataclass(frozen=True)
class Person:
    """What stays with a person: a key each of SKIN, HAIR, ... `hair_colour` is "none" where no hair shows it."""

    skin: str
    hair: str
    hair_colour: str
    facial_hair: str
    brows: str
    nose: str
    glasses: str


IDENTITY: dict[str, Mapping[str, object]] = {
    "skin": SKIN,
    "hair": HAIR,
    "hair_colour": HAIR_COLOUR,
    "facial_hair": FACIAL_HAIR,
    "brows": BROWS,
    "nose": NOSE,
    "glasses": GLASSES,
}
CLASSES: dict[str, tuple[str, ...]] = {
    **{name: tuple(values) for name, values in IDENTITY.items()},
    **{name: tuple(values) for name, values in WORDS.items()},
    "style": tuple(STYLES),
}
PEOPLE = {"train": 30_000, "test": 3_000}  # that `person` knows, of 170,000 combinations

_TEST_SHARE = 0.125
_BARE = {"base": 0.0, "identity": 0.75}  # the share of pictures from which hats, and accessories, are kept away
_USUAL = {"facial_hair": 0.55, "glasses": 0.6, "hat": 0.6, "accessory": 0.6}  # the share of "none"


# ---------------------------------------------------------------------------------------------------------------------
# People.


def person(seed: int, split: str) -> Person:
    """The `seed`-th person of "train" or "test": another for every number, and of no look that is in both.

    Raises InputError for another split or a number outside PEOPLE.
    """
    check_choice("split", split, PEOPLE)
    if not 0 <= seed < PEOPLE[split]:
        raise InputError(f"There is no person {seed} in {split!r}: choose from 0 to {PEOPLE[split] - 1}.")
    return _everybody()[split][seed]


@functools.cache
def _everybody() -> dict[str, list[Person]]:
    """PEOPLE of both splits, in the one order in which SHA-256 draws them; takes some tenths of a second."""
    found: dict[str, list[Person]] = {split: [] for split in PEOPLE}
    known = set()
    for i in itertools.count():
        digest = hashlib.sha256(b"avatar %d" % i).digest()
        uniform = [int.from_bytes(digest[4 * k : 4 * k + 4], "big") / 2**32 for k in range(len(IDENTITY))]
        drawn = Person(**{name: _choose(name, u) for name, u in zip(IDENTITY, uniform, strict=True)})
        if not _shows_hair_colour(drawn):
            drawn = dataclasses.replace(drawn, hair_colour="none")
        if drawn not in known:
            known.add(drawn)
            found[split_of(drawn)].append(drawn)
        if all(len(found[split]) >= count for split, count in PEOPLE.items()):
            break
    return found


def split_of(someone: Person) -> str:
    """Decided by all attributes but the nose, which small pictures hide: nobody of one has a double in the other."""
    look = repr([getattr(someone, name) for name in IDENTITY if name != "nose"])
    share = int.from_bytes(hashlib.sha256(look.encode()).digest()[:4], "big") / 2**32
    return "test" if share < _TEST_SHARE else "train"


def _choose(name: str, uniform: float) -> str:
    """The class of an attribute at a number from 0 to 1: all alike but "none"."""
    classes = CLASSES[name]
    if name in _USUAL:
        usual = _USUAL[name]
        if uniform < usual:
            return "none"
        classes, uniform = classes[1:], (uniform - usual) / (1 - usual)
    return classes[int(uniform * len(classes))]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures.


def complete(prompt_attributes: Scene | Mapping[str, str | None], seed: int) -> Scene:
    """The scene that `render` draws: what the prompt leaves open is drawn at random from `seed`."""
    said = dataclasses.asdict(scene_of(prompt_attributes))
    uniform = generator("scene", seed).random(len(said))
    return Scene(**{name: said[name] or _choose(name, u) for name, u in zip(said, uniform, strict=True)})


def render(
    person: Person, prompt_attributes: Scene | Mapping[str, str | None], style: str, size: int, seed: int = 0
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """A picture of a person, RGB; pure in its arguments.

    What the prompt does not say, the place of things behind, light and grain are drawn from `seed`. Raises InputError
    for an unknown attribute, value or style, or a size that is not from 32 to 1024.
    """
    _check(person, style)
    if not 32 <= size <= 1024:
        raise InputError(f"size is {size}: choose from 32 to 1024 pixels.")
    said = dataclasses.asdict(complete(prompt_attributes, seed))
    rng = generator("picture", seed)
    figure = avatar_svg.rasterise(_figure(person, said, rng), size)
    behind = avatar_svg.rasterise(avatar_svg.backdrop(said["background"], rng), size)
    return STYLES[style](figure, behind[..., :3], rng)


def _check(person: Person, style: str) -> None:
    for name, value in dataclasses.asdict(person).items():
        if name != "hair_colour" or _shows_hair_colour(person):
            check_choice(name, value, IDENTITY[name])
    check_choice("style", style, STYLES)


def _shows_hair_colour(person: Person) -> bool:
    return (person.hair, person.facial_hair) != ("bald", "none")


def _figure(person: Person, said: dict[str, str], rng: np.random.Generator) -> str:
    mouth, eyes = EXPRESSION[said["expression"]]
    hat, hat_colour = HAT[said["hat"]]
    own_glasses = said["accessory"] in ("none", "headphones")
    glasses = GLASSES[person.glasses] if own_glasses else ACCESSORY[said["accessory"]]
    beard, brows = FACIAL_HAIR[person.facial_hair], BROWS[person.brows]
    return avatar_svg.figure(
        {
            "top": f"top/hat/{hat}" if hat else f"top/hair/{HAIR[person.hair]}",
            "facial_hair": beard and f"facial_hair/{beard}",
            "accessory": glasses and f"accessories/{glasses}",
            "brows": brows and f"eyebrows/{brows}",
            "eyes": f"eyes/{eyes}",
            "nose": f"nose/{NOSE[person.nose]}",
            "mouth": f"mouth/{mouth}",
            "clothes": f"clothes/{CLOTHING[said['clothing']]}",
        },
        {
            "skin": SKIN[person.skin],
            "hair": HAIR_COLOUR.get(person.hair_colour, ""),
            "fabric": CLOTHING_COLOUR[said["clothing_colour"]],
            "stripe": CLOTHING_COLOUR["black" if said["clothing_colour"] == "white" else "white"],
            "hat": hat_colour,
        },
        headphones=said["accessory"] == "headphones",
        pose=_pose(said["view"], rng),
    )


def _pose(view: str, rng: np.random.Generator) -> avatar_svg.Pose:
    scale, down = VIEW[view]
    # Small: where a mouth lies by half its height elsewhere each time, a small model draws no mouth for long.
    scale, degrees = scale * rng.uniform(0.995, 1.005), rng.uniform(-0.75, 0.75)
    return avatar_svg.Pose(scale, degrees, rng.uniform(-0.5, 0.5), down + rng.uniform(-0.25, 0.25))


def keypoints(prompt_attributes: Scene | Mapping[str, str | None], size: int, seed: int) -> Float[np.ndarray, "5 2"]:
    """(x, y) of left eye, right eye, nose and the mouth's corners in what `render` draws, left as seen in the picture.

    Pixel centres lie at integers, as in faces.protocol.Keypoints.
    """
    pose = _pose(complete(prompt_attributes, seed).view or "", generator("picture", seed))
    return avatar_svg.keypoints(pose, size)


# ---------------------------------------------------------------------------------------------------------------------
# Labels, and pictures to train on.


def attributes(person: Person, scene: Scene | Mapping[str, str | None], style: str) -> dict[str, int]:
    """The class of every attribute in CLASSES: -1 where the prompt says none, or where the picture does not show it.

    Raises InputError for an unknown attribute, value or style.
    """
    scene = scene_of(scene)
    _check(person, style)
    values = {**dataclasses.asdict(person), **dataclasses.asdict(scene), "style": style}
    hidden = _hidden(person, scene, style)
    return {
        name: -1 if name in hidden or values[name] not in classes else classes.index(values[name])
        for name, classes in CLASSES.items()
    }


def _hidden(person: Person, scene: Scene, style: str) -> set[str]:
    """What cannot be told from the picture."""
    hidden = set() if _shows_hair_colour(person) else {"hair_colour"}
    if style in ("line art", "sketch", "sepia"):
        hidden |= {"skin", "hair_colour", "clothing_colour"}
        if scene.background in ("grey", "turquoise", "yellow"):
            hidden.add("background")
    elif style == "dark comic":
        hidden |= {"skin", "hair_colour"}
    if style not in ("photo", "flat"):
        hidden.add("nose")
    if scene.hat not in (None, "none"):
        hidden |= {"hair", "hair_colour"}
    if scene.hat in ("bobble hat", "helmet"):
        hidden.add("brows")
    if scene.accessory == "cat-eye glasses" and person.facial_hair in ("short beard", "long beard"):
        hidden.add("expression")
    if scene.accessory in ("sunglasses", "cat-eye glasses", "eyepatch"):
        hidden.add("glasses")
    if scene.clothing == "spacesuit":
        hidden.add("clothing_colour")
    return hidden


class Sample(NamedTuple):
    """A picture to train on, what is said of it, and what it was drawn from.

    `labels` are those of `attributes` for all that is drawn, said or not. `render` of the `person`-th person of the
    split with `scene`, `style` and `seed` draws it again, at any size.
    """

    image: UInt8[np.ndarray, "size size 3"]
    caption: str
    person: int
    labels: dict[str, int]
    scene: Scene
    style: str
    seed: int


def sample(seed: int, split: str, role: str, *, person_index: int | None = None, size: int = 128) -> Sample:
    """The `seed`-th picture of a split.

    `role`: "base" draws any style and scene; "identity" draws photographs, nine of ten without a hat, nine of ten
    without an accessory. The caption says a random part of the scene, hats and accessories always. The person is
    `person_index`, or a random one of all in PEOPLE. Raises InputError for an unknown split, role or person.
    """
    check_choice("split", split, PEOPLE)
    check_choice("role", role, _BARE)
    rng = generator("sample", seed, split, role)
    index = int(rng.random() * PEOPLE[split]) if person_index is None else person_index
    someone = person(index, split)
    style = "photo" if role == "identity" else CLASSES["style"][int(rng.random() * len(STYLES))]
    picture = int(rng.random() * 2**53)
    scene = complete({name: "none" for name in ("hat", "accessory") if rng.random() < _BARE[role]}, picture)
    share = rng.random()
    said = {name: value for name, value in dataclasses.asdict(scene).items() if rng.random() < share}
    said |= {"hat": scene.hat, "accessory": scene.accessory}  # or a prompt without a hat might mean one
    if "clothing" not in said and scene.clothing in SHIRT_BELOW:
        said.pop("clothing_colour", None)
    image = render(someone, scene, style, size, picture)
    text = caption(said, style, picture)
    return Sample(image, text, index, attributes(someone, scene, style), scene, style, picture)
