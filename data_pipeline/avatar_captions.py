"""What a prompt may say of a generated picture (Scene), the words it says it in, and the prompts of the evaluation."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping

import numpy as np

from infinite_id_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a prompt says of a picture: a key each of WORDS; None where it says nothing."""

    clothing: str | None = None
    clothing_colour: str | None = None
    expression: str | None = None
    accessory: str | None = None
    hat: str | None = None
    background: str | None = None
    view: str | None = None


# Every value with its synonyms. "none" has no words: who is said to wear nothing is not described.
WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "clothing": {  # {} is the colour with its article, or the article alone; an uncoloured shirt below is not said
        "hoodie": ("{} hoodie", "{} hooded sweatshirt"),
        "t-shirt": ("{} t-shirt", "{} tee", "{} tee shirt"),
        "striped shirt": ("{} striped shirt", "{} shirt with stripes", "{} stripy shirt"),
        "collared sweater": ("{} sweater with a collar", "{} collared sweater"),
        "blazer": ("a blazer over {} shirt", "a jacket over {} shirt"),
        "overalls": ("{} pair of overalls", "{} pair of dungarees"),
        "tuxedo": ("a tuxedo with {} shirt", "a bow tie and {} shirt"),
        "spacesuit": ("a spacesuit", "an astronaut suit", "a space suit"),
    },
    "clothing_colour": {
        "red": ("red", "crimson"),
        "orange": ("orange", "tangerine"),
        "yellow": ("yellow", "lemon yellow"),
        "green": ("green", "leaf green"),
        "blue": ("blue", "royal blue"),
        "purple": ("purple", "violet"),
        "white": ("white", "snow white"),
        "black": ("black", "jet black"),
    },
    "expression": {
        "happy": ("smiling", "with a big smile", "laughing", "looking happy"),
        "serious": ("looking serious", "with a serious face", "with a straight face"),
        "sad": ("looking sad", "crying", "with a tear"),
        "surprised": ("looking surprised", "shocked", "with a surprised face"),
        "gritting teeth": ("gritting their teeth", "baring their teeth", "with clenched teeth"),
        "winking": ("winking", "with a wink", "giving a wink"),
        "tongue out": ("sticking their tongue out", "with their tongue out", "making a silly face"),
        "in love": ("in love", "with heart eyes", "with hearts for eyes"),
    },
    "accessory": {
        "none": (),
        "sunglasses": ("wearing sunglasses", "with dark sunglasses", "in dark shades"),
        "cat-eye glasses": ("wearing cat-eye glasses", "with cat-eye sunglasses", "in film star glasses"),
        "eyepatch": ("wearing an eyepatch", "with an eye patch", "with a pirate patch"),
        "headphones": ("wearing headphones", "with headphones on", "listening to music"),
    },
    "hat": {
        "none": (),
        "wide hat": ("with a wide-brimmed hat", "wearing a wide hat", "under a broad hat"),
        "bobble hat": ("with a bobble hat", "wearing a santa hat", "with a pompom hat"),
        "earflap hat": ("with an earflap hat", "wearing a knitted hat", "in a hat with ear flaps"),
        "helmet": ("with a helmet", "wearing a gladiator helmet", "in a helmet"),
    },
    "background": {
        "grey": ("in front of a grey wall", "on a grey background", "before plain grey"),
        "turquoise": ("in front of a turquoise wall", "on a turquoise background", "before plain turquoise"),
        "yellow": ("in front of a yellow wall", "on a yellow background", "before plain yellow"),
        "beach": ("on a beach", "at the seaside", "under palm trees by the sea"),
        "forest": ("in a forest", "in the woods", "among fir trees"),
        "city": ("in a city at night", "before a skyline at night", "in front of lit skyscrapers"),
        "snow": ("in the snow", "before snowy mountains", "in a winter landscape"),
        "desert": ("in a desert", "among cacti", "in the dunes"),
        "library": ("in a library", "in front of bookshelves", "among books"),
        "space": ("in outer space", "among the stars", "before a planet with a ring"),
        "sea floor": ("under water", "at the bottom of the sea", "among fish and seaweed"),
    },
    "view": {  # before the medium
        "close-up": ("close-up", "tight close-up"),
        "portrait": ("head-and-shoulders", "half-length"),
        "wide shot": ("wide", "far-off"),
    },
}
# What stands before the person, by style; {} is the view or nothing.
MEDIA: dict[str, tuple[str, ...]] = {
    "photo": ("a {} photo of", "a {} photograph of", "a {} snapshot of"),
    "flat": ("a {} flat illustration of", "a {} vector drawing of", "a {} flat cartoon of"),
    "line art": ("a {} line drawing of", "{} line art of", "a {} ink outline of"),
    "pixel art": ("{} pixel art of", "a {} pixel drawing of", "an 8-bit {} picture of"),
    "sketch": ("a {} pencil sketch of", "a {} pencil drawing of", "a {} graphite sketch of"),
    "sepia": ("a {} sepia poster of", "an old {} sepia print of", "a {} brown vintage poster of"),
    "dark comic": ("a {} dark comic of", "a {} comic book panel of", "a {} graphic novel drawing of"),
}
# What a caption may say of who is in the picture; {} is the hair's colour, or nothing.
LOOKS: dict[str, dict[str, tuple[str, ...]]] = {
    "hair": {
        "bald": ("no hair", "a bald head"),
        "short": ("short {} hair", "cropped {} hair"),
        "flat top": ("a {} flat top", "a {} box cut"),
        "mohawk": ("a {} mohawk",),
        "spiked": ("spiked {} hair", "{} spikes"),
        "afro": ("a {} afro",),
        "bob": ("a {} bob", "a {} bob cut"),
        "dreadlocks": ("{} dreadlocks",),
        "wild": ("wild {} hair", "tousled {} hair"),
        "half shaved": ("half shaved {} hair",),
        "shaggy": ("shaggy {} hair",),
        "swept": ("swept {} hair", "{} hair combed aside"),
        "mullet": ("a {} mullet",),
        "frizzy": ("frizzy {} hair",),
        "long straight": ("long straight {} hair",),
        "long braids": ("long {} braids",),
        "long wavy": ("long wavy {} hair",),
        "tied locks": ("tied {} locks", "a bun of {} locks"),
    },
    "facial_hair": {
        "none": (),
        "moustache": ("a moustache",),
        "goatee": ("a goatee",),
        "short beard": ("a short beard", "a trimmed beard"),
        "long beard": ("a long beard", "a full beard"),
    },
    "skin": {
        "pale": ("pale skin", "fair skin"),
        "light": ("light skin", "sand skin"),
        "tan": ("tan skin", "tanned skin"),
        "brown": ("brown skin",),
        "dark": ("dark skin", "very dark skin"),
    },
    "brows": {
        "none": (),
        "arched": ("arched brows", "thin brows"),
        "thick": ("thick brows", "bushy brows"),
        "joined": ("joined brows", "a monobrow"),
    },
    "glasses": {
        "none": (),
        "round": ("round glasses",),
        "square": ("square glasses",),
        "white": ("white glasses",),
    },
}
SHIRT_BELOW = ("blazer", "tuxedo", "spacesuit")  # which are not "clothes" of the colour that is seen below them
_SUBJECTS = ("a person", "someone", "a character")
_WEARING = ("in", "wearing", "dressed in")


def scene_of(prompt_attributes: Scene | Mapping[str, str | None]) -> Scene:
    """A checked Scene of one, or of a mapping of its fields. Raises InputError naming the choices."""
    said = dataclasses.asdict(prompt_attributes) if isinstance(prompt_attributes, Scene) else dict(prompt_attributes)
    for name, value in said.items():
        if name not in WORDS:
            raise InputError(f"A prompt has no attribute {name!r}: choose from {', '.join(WORDS)}.")
        check_choice(name, value, WORDS[name], optional=True)
    return Scene(**said)


def check_choice(name: str, value: object, choices: Mapping[str, object], *, optional: bool = False) -> None:
    """Raises InputError naming the choices unless `value` is one of them, or None where that is `optional`."""
    if not (value in choices if isinstance(value, str) else optional and value is None):
        raise InputError(f"{name} is {value!r}: choose from {', '.join(choices)}.")


def generator(*key: object) -> np.random.Generator:
    """Random numbers that belong to `key` alone, whatever else was drawn."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))


def caption(prompt_attributes: Scene | Mapping[str, str | None], style: str, seed: int) -> str:
    """A sentence that says these attributes and the style, and nothing else; `seed` chooses words and their order.

    A colour of clothes without their kind is said of "clothes"; a spacesuit has no colour. Raises InputError for an
    unknown attribute, value or style.
    """
    scene = scene_of(prompt_attributes)
    check_choice("style", style, MEDIA)
    rng = generator("caption", seed)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(rng.random() * len(words))]

    phrases = []
    if scene.clothing or scene.clothing_colour:
        phrases.append(f"{pick(_WEARING)} {_clothes(scene, pick)}")
    for name in ("expression", "accessory", "hat"):
        if words := WORDS[name].get(getattr(scene, name), ()):
            phrases.append(pick(words))
    if rng.random() < 0.5:
        phrases = [phrases[i] for i in np.argsort(rng.random(len(phrases)))]
    if scene.background:
        place = pick(WORDS["background"][scene.background])
        phrases.insert(len(phrases) if rng.random() < 0.75 else 0, place)
    view = pick(WORDS["view"][scene.view]) if scene.view else ""
    words = f"{pick(MEDIA[style]).replace('{}', view)} {pick(_SUBJECTS)} {', '.join(phrases)}"
    return " ".join(words.split())


def with_looks(text: str, person: Mapping[str, str], seed: int) -> str:
    """A caption that says more: after who is in it, how that person looks, such as "a pink mohawk", or a part of that.

    `person` has what shows of the keys of LOOKS and of hair_colour.
    """
    rng = generator("looks", seed)
    share, phrases = min(1.0, 2 * rng.random()), []
    for name, words in LOOKS.items():
        choices = words[person[name]] if name in person else ()
        place, said = rng.random(2)
        if choices and said < share:
            colour = person.get("hair_colour", "")
            phrase = " ".join(choices[int(place * len(choices))].replace("{}", colour).split())
            phrases.append(re.sub(r"^a (?=[aeiou])", "an ", phrase))
    subject = re.search("|".join(_SUBJECTS), text)
    if not phrases or subject is None:
        return text
    listed = " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))
    return f"{text[: subject.end()]} with {listed}{text[subject.end() :]}"


def _clothes(scene: Scene, pick: Callable[[tuple[str, ...]], str]) -> str:
    if scene.clothing is None:
        return f"{pick(WORDS['clothing_colour'][scene.clothing_colour or ''])} clothes"
    kind = pick(WORDS["clothing"][scene.clothing])
    if scene.clothing_colour is None:
        return re.sub(r" (with|over|and) {} shirt", "", kind).replace("{}", "a")
    colour = pick(WORDS["clothing_colour"][scene.clothing_colour])
    return kind.replace("{}", f"{'an' if colour.startswith('o') else 'a'} {colour}")


def _prompt(style: str, text: str, **attributes: str) -> tuple[dict[str, str], str, str]:
    return attributes, style, text


# The prompts of the evaluation, as attributes, style and text: ten photographs, then ten of the other styles.
PROMPTS: tuple[tuple[dict[str, str], str, str], ...] = (
    _prompt(
        "photo",
        "a photo of a person in a red hoodie, smiling, on a beach",
        clothing="hoodie",
        clothing_colour="red",
        expression="happy",
        background="beach",
    ),
    _prompt(
        "photo",
        "a photo of a person in a spacesuit, looking surprised, in outer space",
        clothing="spacesuit",
        expression="surprised",
        background="space",
    ),
    _prompt(
        "photo",
        "a photo of a person in a green t-shirt, with a serious face, in a forest",
        clothing="t-shirt",
        clothing_colour="green",
        expression="serious",
        background="forest",
    ),
    _prompt(
        "photo",
        "a photo of a person in a tuxedo with a white shirt, winking, in a city at night",
        clothing="tuxedo",
        clothing_colour="white",
        expression="winking",
        background="city",
    ),
    _prompt(
        "photo",
        "a photo of a person in a blue striped shirt, sticking their tongue out, under water",
        clothing="striped shirt",
        clothing_colour="blue",
        expression="tongue out",
        background="sea floor",
    ),
    _prompt(
        "photo",
        "a photo of a person in a purple collared sweater, crying, in a library",
        clothing="collared sweater",
        clothing_colour="purple",
        expression="sad",
        background="library",
    ),
    _prompt(
        "photo",
        "a photo of a person in a yellow pair of overalls, wearing headphones, in a desert",
        clothing="overalls",
        clothing_colour="yellow",
        accessory="headphones",
        background="desert",
    ),
    _prompt(
        "photo",
        "a photo of a person in an orange hoodie, gritting their teeth, with a bobble hat, in the snow",
        clothing="hoodie",
        clothing_colour="orange",
        expression="gritting teeth",
        hat="bobble hat",
        background="snow",
    ),
    _prompt(
        "photo",
        "a photo of a person in a blazer over a red shirt, in love, in front of a yellow wall",
        clothing="blazer",
        clothing_colour="red",
        expression="in love",
        background="yellow",
    ),
    _prompt(
        "photo",
        "a wide photo of a person in a black t-shirt, wearing sunglasses, on a beach",
        clothing="t-shirt",
        clothing_colour="black",
        accessory="sunglasses",
        background="beach",
        view="wide shot",
    ),
    _prompt("flat", "a flat illustration of a person smiling, in a forest", expression="happy", background="forest"),
    _prompt("line art", "a line drawing of a person in a hoodie, smiling", clothing="hoodie", expression="happy"),
    _prompt(
        "pixel art",
        "pixel art of a person in a blue t-shirt, on a beach",
        clothing="t-shirt",
        clothing_colour="blue",
        background="beach",
    ),
    _prompt(
        "sketch",
        "a pencil sketch of a person in a tuxedo, looking serious",
        clothing="tuxedo",
        expression="serious",
    ),
    _prompt(
        "sepia",
        "a sepia poster of a person looking surprised, in a desert",
        expression="surprised",
        background="desert",
    ),
    _prompt(
        "dark comic",
        "a dark comic of a person in a red hoodie, with a helmet, in a city at night",
        clothing="hoodie",
        clothing_colour="red",
        hat="helmet",
        background="city",
    ),
    _prompt(
        "flat",
        "a vector drawing of a person in a purple striped shirt, in the snow",
        clothing="striped shirt",
        clothing_colour="purple",
        background="snow",
    ),
    _prompt(
        "sepia", "an old sepia print of a person winking, in a city at night", expression="winking", background="city"
    ),
    _prompt(
        "flat",
        "a flat cartoon of a person crying, under water",
        expression="sad",
        background="sea floor",
    ),
    _prompt(
        "sketch",
        "a close-up pencil drawing of a person in love, in a library",
        expression="in love",
        background="library",
        view="close-up",
    ),
)
