"""Drawn people: an identity (skin, hair, eyes, beard, glasses) in a photo (background, shirt, expression, place).

For learning checks and the debug configuration, where no photograph is needed. The same seeds draw the same pixels.
"""

import dataclasses

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

SKIN = ((255, 224, 196), (241, 194, 155), (224, 172, 125), (198, 134, 86), (141, 85, 54), (92, 56, 38))
HAIR = ((24, 20, 20), (74, 44, 26), (150, 90, 40), (222, 180, 92), (176, 56, 28), (150, 150, 156), (240, 236, 226))
EYES = ((60, 36, 20), (40, 90, 160), (50, 120, 70), (110, 110, 120))
HAIR_SHAPES = ("bald", "short", "fringe", "long", "curly", "bun", "mohawk")
BEARDS = ("none", "full", "goatee", "moustache")
GLASSES = ("none", "round", "square")
COLOURS = {
    "red": (204, 51, 51),
    "green": (56, 142, 60),
    "blue": (48, 99, 190),
    "yellow": (240, 200, 60),
    "purple": (126, 64, 160),
    "grey": (150, 150, 150),
    "white": (244, 244, 240),
    "pink": (236, 150, 180),
}
EXPRESSIONS = ("smiling", "serious", "surprised", "sad")
RADIUS = (0.19, 0.24)  # of the head in parts of the picture: head and shoulders

_FINE = 4  # drawn so many times larger, then averaged: Pillow's shapes have hard edges


@dataclasses.dataclass(frozen=True)
class Identity:
    """What stays the same in all photos of a person; lengths in head heights."""

    skin: Colour
    hair: Colour
    eyes: Colour
    hair_shape: str
    beard: str
    glasses: str
    width: float  # of the head
    eye_distance: float
    brow: float  # thickness

    @classmethod
    def from_seed(cls, seed: int) -> "Identity":
        rng = np.random.default_rng((1, seed))
        return cls(
            skin=_near(SKIN[rng.integers(len(SKIN))], rng),
            hair=_near(HAIR[rng.integers(len(HAIR))], rng),
            eyes=EYES[rng.integers(len(EYES))],
            hair_shape=HAIR_SHAPES[rng.integers(len(HAIR_SHAPES))],
            beard=BEARDS[rng.integers(len(BEARDS))],
            glasses=GLASSES[rng.integers(len(GLASSES))],
            width=rng.uniform(0.74, 0.96),
            eye_distance=rng.uniform(0.32, 0.44),
            brow=rng.uniform(0.04, 0.14),
        )


@dataclasses.dataclass(frozen=True)
class Scene:
    """What differs from photo to photo; place and radius of the head in parts of the picture."""

    background: str
    shirt: str
    expression: str
    x: float
    y: float
    radius: float

    @classmethod
    def from_seed(cls, seed: int, radius: tuple[float, float] = RADIUS) -> "Scene":
        """`radius`: least and greatest."""
        rng = np.random.default_rng((2, seed))
        background, shirt = rng.choice(list(COLOURS), 2, replace=False)
        return cls(
            background=str(background),
            shirt=str(shirt),
            expression=EXPRESSIONS[rng.integers(len(EXPRESSIONS))],
            x=rng.uniform(0.44, 0.56),
            y=rng.uniform(0.44, 0.50),
            radius=rng.uniform(*radius),
        )

    @property
    def caption(self) -> str:
        return f"a person with a {self.shirt} shirt, {self.expression}, {self.background} background"

    def head_box(self, size: int, margin: float) -> tuple[float, float, float, float]:
        """The square of `margin` radii around the head, or what the picture of `size` holds of it: left, top, right,
        bottom.
        """
        half = min(self.radius * margin, self.x, 1 - self.x, self.y, 1 - self.y)
        left, top, right, bottom = self.x - half, self.y - half, self.x + half, self.y + half
        return max(left, 0.0) * size, max(top, 0.0) * size, min(right, 1.0) * size, min(bottom, 1.0) * size


def draw(person_seed: int, photo_seed: int, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """One photo of a person, RGB; pure in its arguments."""
    return np.asarray(picture(Identity.from_seed(person_seed), Scene.from_seed(photo_seed), size))


def picture(person: Identity, scene: Scene, size: int) -> Image.Image:
    """The person in the scene, RGB, `size` pixels a side."""
    image = Image.new("RGB", (size * _FINE, size * _FINE), COLOURS[scene.background])
    pen = _Pen(ImageDraw.Draw(image), scene, size * _FINE)
    _draw_behind(pen, person)
    pen.ellipse(0.0, 3.2, 1.9, 1.7, COLOURS[scene.shirt])
    pen.box(-0.33, 0.7, 0.33, 1.75, _shade(person.skin, 0.85))
    _draw_head(pen, person)
    _draw_beard(pen, person)
    _draw_mouth(pen, scene.expression)
    _draw_eyes(pen, person, scene.expression)
    _draw_hair(pen, person)
    return image.reduce(_FINE)


class _Pen:
    """Draws in head coordinates: the centre of the head is (0, 0), its radius 1, y goes down."""

    def __init__(self, canvas: ImageDraw.ImageDraw, scene: Scene, size: int):
        self._canvas, self._scene, self._size = canvas, scene, size

    def _at(self, x: float, y: float) -> tuple[float, float]:
        scene = self._scene
        return (scene.x + x * scene.radius) * self._size, (scene.y + y * scene.radius) * self._size

    def _around(self, x: float, y: float, rx: float, ry: float) -> tuple[float, float, float, float]:
        return (*self._at(x - rx, y - ry), *self._at(x + rx, y + ry))

    def _width(self, width: float) -> int:
        return max(1, round(width * self._scene.radius * self._size))

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        self._canvas.ellipse(self._around(x, y, rx, ry), fill=colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        self._canvas.rectangle((*self._at(left, top), *self._at(right, bottom)), fill=colour)

    def chord(self, x: float, y: float, rx: float, ry: float, start: float, end: float, colour: Colour) -> None:
        """The part of an ellipse that a straight line cuts off; degrees, clockwise from three o'clock."""
        self._canvas.chord(self._around(x, y, rx, ry), start, end, fill=colour)

    def arc(self, x: float, y: float, rx: float, ry: float, start: float, end: float, colour: Colour) -> None:
        self._canvas.arc(self._around(x, y, rx, ry), start, end, fill=colour, width=self._width(0.11))

    def line(self, ends: tuple[float, float, float, float], width: float, colour: Colour) -> None:
        self._canvas.line((*self._at(*ends[:2]), *self._at(*ends[2:])), fill=colour, width=self._width(width))

    def frame(self, x: float, y: float, rx: float, ry: float, *, round_: bool) -> None:
        outline = self._canvas.ellipse if round_ else self._canvas.rectangle
        outline(self._around(x, y, rx, ry), outline=(20, 20, 24), width=self._width(0.09))


def _draw_behind(pen: _Pen, person: Identity) -> None:
    if person.hair_shape == "long":
        pen.ellipse(0.0, 0.35, person.width + 0.32, 1.6, person.hair)
    elif person.hair_shape == "curly":
        pen.ellipse(0.0, -0.35, person.width + 0.45, 1.25, person.hair)
    elif person.hair_shape == "bun":
        pen.ellipse(0.0, -1.3, 0.42, 0.42, person.hair)


def _draw_head(pen: _Pen, person: Identity) -> None:
    for side in (-1, 1):
        pen.ellipse(side * person.width, 0.08, 0.16, 0.24, _shade(person.skin, 0.9))
    pen.ellipse(0.0, 0.0, person.width, 1.0, person.skin)
    pen.line((0.0, 0.1, 0.06, 0.32), 0.09, _shade(person.skin, 0.75))


def _draw_beard(pen: _Pen, person: Identity) -> None:
    if person.beard == "full":
        pen.chord(0.0, 0.0, person.width + 0.03, 1.08, 15.0, 165.0, person.hair)
    elif person.beard == "goatee":
        pen.ellipse(0.0, 0.8, 0.32, 0.32, person.hair)
    if person.beard in ("full", "moustache"):
        pen.ellipse(0.0, 0.44, 0.4, 0.13, person.hair)


def _draw_mouth(pen: _Pen, expression: str) -> None:
    lips = (150, 40, 46)
    if expression == "smiling":
        pen.chord(0.0, 0.46, 0.36, 0.26, 0.0, 180.0, (250, 248, 244))
        pen.arc(0.0, 0.46, 0.36, 0.26, 0.0, 180.0, lips)
    elif expression == "surprised":
        pen.ellipse(0.0, 0.62, 0.17, 0.22, (96, 20, 28))
    elif expression == "sad":
        pen.arc(0.0, 0.74, 0.3, 0.2, 180.0, 360.0, lips)
    else:
        pen.line((-0.28, 0.58, 0.28, 0.58), 0.11, lips)


def _draw_eyes(pen: _Pen, person: Identity, expression: str) -> None:
    open_ = {"surprised": 0.2, "smiling": 0.11}.get(expression, 0.14)
    lift, slope = {"surprised": (0.14, 0.0), "sad": (0.0, -0.14)}.get(expression, (0.0, 0.03))
    for side in (-1, 1):
        x = side * person.eye_distance
        pen.ellipse(x, -0.1, 0.2, open_, (250, 250, 250))
        pen.ellipse(x, -0.1, 0.11, min(0.12, open_), person.eyes)
        pen.ellipse(x, -0.1, 0.05, 0.05, (10, 10, 10))
        inner, outer = x - side * 0.2, x + side * 0.2
        pen.line((inner, -0.36 - lift + slope, outer, -0.36 - lift - slope), person.brow, _shade(person.hair, 0.8))
        if person.glasses != "none":
            pen.frame(x, -0.08, 0.29, 0.26, round_=person.glasses == "round")
    if person.glasses != "none":
        pen.line((-0.12, -0.1, 0.12, -0.1), 0.08, (20, 20, 24))


def _draw_hair(pen: _Pen, person: Identity) -> None:
    width = person.width + 0.06
    if person.hair_shape == "mohawk":
        pen.ellipse(0.0, -1.0, 0.24, 0.45, person.hair)
    elif person.hair_shape == "fringe":
        pen.chord(0.0, 0.0, width, 1.12, 200.0, 340.0, person.hair)
    elif person.hair_shape != "bald":
        pen.chord(0.0, 0.0, width, 1.12, 214.0, 326.0, person.hair)


def _near(colour: Colour, rng: np.random.Generator) -> Colour:
    """A little aside, so that no two people are quite alike."""
    red, green, blue = (int(value) for value in np.clip(np.array(colour) + rng.integers(-10, 11, 3), 0, 255))
    return red, green, blue


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (round(value * factor) for value in colour)
    return red, green, blue
