"""Avatars as SVG: parts of python_avatars put together, what it lacks drawn here, and the scenes behind them."""

import copy
import functools
import io
import re
from importlib import resources
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from infinite_id_jax.errors import MissingExtraError

VIEW_BOX = (22, 44, 222, 222)  # of the library's 264 x 280: head and shoulders
_PIVOT = (133, 266)  # the middle of the lower edge, so that shoulders reach it at every scale
_FACE = np.array([[106.0, 112.0], [158.0, 112.0], [132.0, 134.0], [110.0, 153.0], [154.0, 153.0]])  # eyes, nose, mouth

_Number = int | float  # the check of types at run time takes no int for a float

_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_COLOURS = ("Skin-Color", "Hair-Color", "Facial-Hair-Color", "Fabric-Color")
_SLOTS = ("Clothing", "Mouth", "Nose", "Eyes", "Eyebrow", "Top")

# Drawn here, in the coordinates of the library's slots, whose own are too small or too alike at 64 pixels.
_MOUSTACHE = (
    '<path d="M84,63 C70,53 50,60 44,80 C58,85 76,82 84,75 C92,82 110,85 124,80 C118,60 98,53 84,63 Z" '
    'fill="@Facial-Hair-Color@"/>'
)
_GOATEE = '<path d="M59,96 Q84,87 109,96 Q113,124 84,132 Q55,124 59,96 Z" fill="@Facial-Hair-Color@"/>'
_LONG_NOSE = (
    '<path d="M32,-12 Q20,5 17,13 Q21,20 34,17" fill="none" stroke="#000" stroke-opacity="0.42" '
    'stroke-width="5.5" stroke-linecap="round"/>'
)
_WIDE_NOSE = '<path d="M6,4 Q8,19 28,19 Q48,19 50,4 Q42,11 28,11 Q14,11 6,4 Z" fill="#000" fill-opacity="0.42"/>'
_SMALL_NOSE = '<ellipse cx="28" cy="9" rx="6" ry="5" fill="#000" fill-opacity="0.36"/>'


def _stroke(path: str, width: int) -> str:
    """A dark line with a light rim, which shows on dark skin."""
    line = f'<path d="{path}" fill="none" stroke-linecap="round"'
    return (
        f'{line} stroke="#FFF" stroke-opacity="0.4" stroke-width="{width + 4}"/>'
        f'{line} stroke="#1A1012" stroke-width="{width}"/>'
    )


_ARCHED_BROWS = _stroke("M11,10 Q24,-10 42,6 M70,6 Q88,-10 101,10", 5)
_THICK_BROWS = _stroke("M15,8 L41,6 M71,6 L97,8", 11)
_JOINED_BROWS = _stroke("M12,8 Q34,0 56,9 Q78,0 100,8", 7)
_COLLAR = (
    '<path d="M88,6 Q110,34 132,40 Q154,34 176,6 L192,30 L150,66 L132,44 L114,66 L72,30 Z" fill="#FFF" '
    'stroke="#8A8F98" stroke-width="2.5" stroke-linejoin="round"/>'
)
_STRAIGHT_MOUTH = _stroke("M39,19 H69", 6)
_SMIRK = _stroke("M37,9 Q41,24 54,24 Q67,24 72,6", 5)
_HEADPHONES = (
    '<g fill="none" stroke="#20242C"><path d="M64,112 C56,20 208,20 200,112" stroke-width="9"/></g>'
    '<g fill="#E8403A" stroke="#20242C" stroke-width="3"><rect x="50" y="94" width="24" height="44" rx="11"/>'
    '<rect x="190" y="94" width="24" height="44" rx="11"/></g>'
)
_STRIPES = "".join(f'<rect x="0" y="{y}" width="264" height="9" fill="@Stripe@"/>' for y in range(6, 110, 20))
_DRAWN = {
    "facial_hair/moustache": _MOUSTACHE,
    "facial_hair/goatee": _GOATEE,
    "eyebrows/arched": _ARCHED_BROWS,
    "eyebrows/thick": _THICK_BROWS,
    "eyebrows/joined": _JOINED_BROWS,
    "mouth/straight": _STRAIGHT_MOUTH,
    "mouth/smirk": _SMIRK,
    "nose/long": _LONG_NOSE,
    "nose/wide": _WIDE_NOSE,
    "nose/small": _SMALL_NOSE,
}


class Pose(NamedTuple):
    """How a person stands in the picture: turned clockwise, and shifted by hundredths of a side."""

    scale: float
    degrees: float
    right: float
    down: float


@functools.cache
def _part(name: str) -> str:
    """A part as SVG text in which @Skin-Color@ and the like stand for colours, and @Top@ and the like for parts."""
    if name in _DRAWN:
        return _DRAWN[name]
    if name == "clothes/striped":
        stripes = f'<g mask="url(#clothes-shirt_crew_neck-mask-2)">{_STRIPES}</g>'
        shirt = _part("clothes/shirt_crew_neck")
        return re.sub(r'(fill="@Fabric-Color@">.*?</g>)', rf"\1{stripes}", shirt, flags=re.DOTALL)
    if name == "clothes/collared":
        return _part("clothes/shirt_crew_neck") + _COLLAR
    try:
        folder = resources.files("python_avatars") / "avatar_parts"
    except ModuleNotFoundError:
        raise MissingExtraError("Drawing avatars", "miniature") from None
    root = ElementTree.fromstring((folder / f"{name}.svg").read_bytes())
    _unmask(root)
    prefix = name.replace("/", "-") + "-"  # the parts name their elements alike
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        id_ = element.get("id")
        if id_ in _COLOURS:
            element.set("fill", f"@{id_}@")
        if id_ in _SLOTS and element.tag == "g":
            element.text = f"@{id_}@"
        if id_:
            element.set("id", prefix + id_)
        for attribute in ("mask", "filter"):
            if attribute in element.attrib:
                element.set(attribute, element.attrib[attribute].replace("url(#", f"url(#{prefix}"))
        if _LINK in element.attrib:
            element.set("xlink:href", f"#{prefix}{element.attrib.pop(_LINK)[1:]}")
    return "".join(ElementTree.tostring(child, encoding="unicode") for child in root)


def _unmask(root: ElementTree.Element) -> None:
    """Draw coloured rectangles behind masks as the masks' shapes: half of the time of drawing went into masks."""
    shapes = {mask.get("id"): mask.find(f"{_SVG}use") for mask in root.iter(f"{_SVG}mask")}
    for element in list(root.iter()):
        if element.get("id") in _COLOURS and "mask" in element.attrib:
            shape = shapes[element.attrib.pop("mask")[5:-1]]
            assert shape is not None
            element[:] = [copy.deepcopy(shape)]


def _fill(text: str, **slots: str) -> str:
    """`slots`: what stands for @Top@ and the like, with an underscore for a hyphen."""
    for name, content in slots.items():
        text = text.replace(f"@{name.replace('_', '-')}@", content)
    return text


def figure(
    parts: dict[str, str | None],
    colours: dict[str, str],
    *,
    headphones: bool,
    pose: Pose,
) -> str:
    """The SVG of a person on nothing.

    `parts`: paths in the library, without `.svg`, for `top`, `facial_hair`, `accessory`, `brows`, `eyes`, `nose`,
    `mouth`, `clothes`; None for nothing. `colours`: hexadecimal ones for `skin`, `hair`, `fabric`, `stripe`, `hat`.
    """
    inside = {name: _part(path) if path else "" for name, path in parts.items()}
    top = (  # hair hangs over a beard, and glasses sit on hair: the library's order differs from one hair to another
        _at(49, 72, inside["facial_hair"])
        + _fill(inside["top"], Fabric_Color=colours["hat"])
        + _at(62, 85, inside["accessory"])
        + (_HEADPHONES if headphones else "")
    )
    body = _fill(
        _part("styles/transparent"),
        Clothing=_fill(inside["clothes"], Fabric_Color=colours["fabric"], Stripe=colours["stripe"]),
        Mouth=f'<g transform="translate(-15 -5) scale(1.28)">{inside["mouth"]}</g>',
        Nose=inside["nose"],
        Eyes=inside["eyes"],
        Eyebrow=inside["brows"],
        Top=top,
    )
    body = _fill(body, Skin_Color=colours["skin"], Hair_Color=colours["hair"], Facial_Hair_Color=colours["hair"])
    left, upper, width, _ = VIEW_BOX
    x, y = _moved(pose)
    move = (
        f"translate({x:.3f} {y:.3f}) rotate({pose.degrees:.3f}) scale({pose.scale:.4f}) "
        f"translate({-_PIVOT[0]} {-_PIVOT[1]})"
    )
    box = f"{left} {upper} {width} {width}"
    return f'<svg {_NAMESPACES} viewBox="{box}" width="{width}" height="{width}"><g transform="{move}">{body}</g></svg>'


def keypoints(pose: Pose, size: int) -> Float[np.ndarray, "5 2"]:
    """(x, y) of eyes, nose and corners of the mouth in the picture that `figure` gives, pixel centres at integers."""
    left, upper, width, _ = VIEW_BOX
    turn = pose.scale * np.exp(1j * np.radians(pose.degrees))
    z = complex(*_moved(pose)) + turn * ((_FACE - _PIVOT) @ [1, 1j])
    return (np.stack([z.real - left, z.imag - upper], axis=-1) * (size / width) - 0.5).astype(np.float32)


def _moved(pose: Pose) -> tuple[float, float]:
    """Where the pivot comes to lie."""
    width = VIEW_BOX[2]
    return _PIVOT[0] + pose.right * width / 100, _PIVOT[1] + pose.down * width / 100


def _at(x: int, y: int, part: str) -> str:
    return f'<g transform="translate({x} {y})">{part}</g>' if part else ""


def rasterise(svg: str, size: int) -> UInt8[np.ndarray, "{size} {size} 4"]:
    """RGBA, not premultiplied. Raises MissingExtraError without the extra `miniature`."""
    try:
        import resvg_py
    except ModuleNotFoundError:
        raise MissingExtraError("Drawing avatars", "miniature") from None
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGBA"))


# ---------------------------------------------------------------------------------------------------------------------
# What is behind people. Sides are 100; the middle is hidden, so what tells a scene stands at the left and the right.


_ARRANGEMENTS = 4


def backdrop(name: str, rng: np.random.Generator) -> str:
    """The SVG of a background of BACKDROPS, in one of a few arrangements of its things, which `rng` chooses."""
    arrangement = np.random.Generator(np.random.Philox(key=int(rng.integers(_ARRANGEMENTS))))
    return f'<svg {_NAMESPACES} viewBox="0 0 100 100" width="100" height="100">{BACKDROPS[name](arrangement)}</svg>'


def _rect(x: _Number, y: _Number, width: _Number, height: _Number, fill: str) -> str:
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="{fill}"/>'


def _circle(x: _Number, y: _Number, radius: _Number, fill: str) -> str:
    return f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{radius:.2f}" fill="{fill}"/>'


def _polygon(points: list[tuple[_Number, _Number]], fill: str) -> str:
    return f'<polygon points="{" ".join(f"{x:.2f},{y:.2f}" for x, y in points)}" fill="{fill}"/>'


def _beach(rng: np.random.Generator) -> str:
    horizon, palm, lean = rng.uniform(44, 54), rng.choice([12.0, 88.0]) + rng.uniform(-3, 3), rng.uniform(-6, 6)
    crown = palm + lean
    leaves = "".join(
        f'<path d="M{crown:.1f},24 Q{crown + dx * 0.6:.1f},{24 + dy - 8:.1f} {crown + dx:.1f},{24 + dy:.1f}" '
        'stroke="#2E8B3A" stroke-width="4.5" fill="none" stroke-linecap="round"/>'
        for dx, dy in ((-19, 8), (-14, -6), (0, 14), (14, -6), (19, 8), (-9, 15), (10, 15))
    )
    trunk = (
        f'<path d="M{palm:.1f},82 Q{palm - lean:.1f},50 {crown:.1f},24" stroke="#8A5A2B" stroke-width="4" fill="none"/>'
    )
    return (
        _rect(0, 0, 100, horizon, "#8FD6F6")
        + _circle(100 - palm, 14, 8, "#FFE36B")
        + _rect(0, horizon, 100, 20, "#2E9FD0")
        + _rect(0, horizon + 18, 100, 60, "#F2DDA0")
        + trunk
        + leaves
    )


def _forest(rng: np.random.Generator) -> str:
    drawn = [_rect(0, 0, 100, 100, "#BFE3C0"), _rect(0, 78, 100, 22, "#4D7A3A")]
    for x in np.concatenate([np.linspace(4, 96, 6), np.linspace(-4, 104, 6)]) + rng.uniform(-4, 4, 12):
        top, half = rng.uniform(2, 26), rng.uniform(9, 13)
        green = str(rng.choice(["#1F5A2C", "#2F7A3D", "#276B34"]))
        drawn.append(_rect(x - 1.5, 70, 3, 16, "#5B3A1E"))
        for level in range(3):
            y = top + level * 17
            drawn.append(_polygon([(x, y), (x - half - 2 * level, y + 30), (x + half + 2 * level, y + 30)], green))
    return "".join(drawn)


def _city(rng: np.random.Generator) -> str:
    drawn = [_rect(0, 0, 100, 100, "#141B3C"), _circle(rng.choice([14.0, 86.0]), 12, 6, "#F4F1D0")]
    x = rng.uniform(-8, 0)
    while x < 100:
        width, top = rng.uniform(12, 17), rng.uniform(16, 48)
        drawn.append(_rect(x, top, width, 100, str(rng.choice(["#2A3157", "#343C66", "#232A4C"]))))
        for column in np.arange(x + 2, x + width - 2.5, 4):
            for row in np.arange(top + 3, 84, 6):
                if rng.random() < 0.6:
                    drawn.append(_rect(column, row, 2.2, 3.2, "#FFD35A"))
        x += width
    return "".join(drawn)


def _snow(rng: np.random.Generator) -> str:
    drawn = [_rect(0, 0, 100, 100, "#B9D3E8")]
    for x, top, half in ((12, rng.uniform(8, 20), 34), (90, rng.uniform(8, 20), 36), (48, rng.uniform(2, 12), 30)):
        drawn.append(_polygon([(x, top), (x - half, 74), (x + half, 74)], "#7389A6"))
        cut, reach = 22.0, 22.0 * half / (74 - top)
        drawn.append(
            _polygon([(x, top), (x - reach, top + cut), (x, top + cut * 0.7), (x + reach, top + cut)], "#FFFFFF")
        )
    drawn.append(_rect(0, 70, 100, 30, "#F7FBFF"))
    drawn += [_circle(x, y, 1.2, "#FFFFFF") for x, y in rng.uniform(0, 100, (36, 2))]
    return "".join(drawn)


def _desert(rng: np.random.Generator) -> str:
    x, sun = rng.choice([10.0, 90.0]) + rng.uniform(-2, 2), rng.uniform(12, 20)
    arm = 'fill="none" stroke="#3F8F4B" stroke-linecap="round" stroke-linejoin="round"'
    cactus = (
        f'<path d="M{x:.1f},84 V26" {arm} stroke-width="8"/><path d="M{x:.1f},58 H{x - 10:.1f} V42" {arm} '
        f'stroke-width="5"/><path d="M{x:.1f},50 H{x + 10:.1f} V34" {arm} stroke-width="5"/>'
    )
    dune = f'<path d="M0,{rng.uniform(60, 66):.1f} Q25,50 52,64 T100,60 V100 H0 Z" fill="#D98E3F"/>'
    return _rect(0, 0, 100, 100, "#FFC88A") + _circle(100 - x, sun, 9, "#FFF2C0") + dune + cactus


def _library(rng: np.random.Generator) -> str:
    drawn = [_rect(0, 0, 100, 100, "#6B4023")]
    for shelf in range(5):
        drawn.append(_rect(0, shelf * 21 + 2, 100, 18, "#3D2412"))
        x = 0.0
        while x < 100:
            width, height = rng.uniform(3.5, 6.5), rng.uniform(12, 17)
            colour = str(rng.choice(["#B8342B", "#2F6A9A", "#D9B24A", "#3D7F52", "#E8E0CC", "#7A4A8C"]))
            drawn.append(_rect(x, shelf * 21 + 20 - height, width - 0.6, height, colour))
            x += width
    return "".join(drawn)


def _space(rng: np.random.Generator) -> str:
    x, y = rng.choice([16.0, 84.0]), rng.uniform(20, 36)
    ring = f'<ellipse cx="{x:.1f}" cy="{y:.1f}" rx="21" ry="5" fill="none" stroke="#F3DDAE" stroke-width="2.4"'
    return (
        _rect(0, 0, 100, 100, "#0A0820")
        + "".join(
            _circle(x, y, radius, "#FFFFFF") for x, y, radius in rng.uniform((0, 0, 0.4), (100, 100, 1.1), (70, 3))
        )
        + _circle(x, y, 12, "#D9774A")
        + f'{ring} transform="rotate(-18 {x:.1f} {y:.1f})"/>'
        + _circle(100 - x, rng.uniform(54, 66), 5, "#8FB3D9")
    )


def _sea_floor(rng: np.random.Generator) -> str:
    drawn = [_rect(0, 0, 100, 100, "#1C86B8"), _rect(0, 0, 100, 26, "#35A5CF"), _rect(0, 82, 100, 18, "#D8C48A")]
    for x in (3, 11, 19, 81, 89, 97):
        x, top = x + rng.uniform(-2, 2), rng.uniform(38, 58)
        path = f"M{x:.1f},92 q-7,-9 0,-18 t0,-16 V{top:.1f}"
        drawn.append(f'<path d="{path}" stroke="#1F7A4C" stroke-width="3.4" fill="none" stroke-linecap="round"/>')
    for x in (12, 88):
        x, y, side = x + rng.uniform(-4, 4), rng.uniform(12, 40), rng.choice([-1.0, 1.0])
        tail = _polygon([(x - 5 * side, y), (x - 11 * side, y - 5), (x - 11 * side, y + 5)], "#FF9A2E")
        drawn.append(tail + f'<ellipse cx="{x:.1f}" cy="{y:.1f}" rx="7.5" ry="4.6" fill="#FF9A2E"/>')
        drawn.append(_circle(x + 4 * side, y - 1, 0.9, "#10202C"))
    drawn += [_circle(x, y, 1.5, "#BEE9F7") for x, y in rng.uniform(0, 80, (14, 2))]
    return "".join(drawn)


BACKDROPS = {
    "grey": lambda rng: _rect(0, 0, 100, 100, "#A7ABB0"),
    "turquoise": lambda rng: _rect(0, 0, 100, 100, "#4FC3B8"),
    "yellow": lambda rng: _rect(0, 0, 100, 100, "#F6D365"),
    "beach": _beach,
    "forest": _forest,
    "city": _city,
    "snow": _snow,
    "desert": _desert,
    "library": _library,
    "space": _space,
    "sea floor": _sea_floor,
}
