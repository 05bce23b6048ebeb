"""How a generated picture is drawn: each style turns a figure and what is behind it into other statistics.

A style takes the figure (RGBA), the backdrop (RGB) and random numbers, and returns RGB. Lengths are in parts of the
picture, so that a style looks alike at 64 and at 256 pixels; only outlines are a pixel thin. NumPy and Pillow alone.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageFilter

Figure = UInt8[np.ndarray, "size size 4"]
Picture = UInt8[np.ndarray, "size size 3"]
_Plane = Float32[np.ndarray, "size size"]
_Colours = Float32[np.ndarray, "size size 3"]  # 0 to 1

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_BAYER = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]], np.float32) / 16
_SEPIA = np.array([[43, 26, 14], [116, 70, 34], [196, 148, 86], [244, 228, 190]], np.float32) / 255


def photo(figure: Figure, backdrop: Picture, rng: np.random.Generator) -> Picture:
    """A lit figure before a background out of focus, with its shadow, a colour cast, a vignette and grain."""
    size = len(figure)
    angle, strength = rng.uniform(np.pi * 0.1, np.pi * 0.9), rng.uniform(0.7, 1.1)  # from above
    light = np.array([np.cos(angle), -np.sin(angle)], np.float32)
    behind = _blur(_floats(backdrop), rng.uniform(0.012, 0.022))
    alpha = _floats(figure[..., 3])
    offset = np.rint(-light * 0.05 * size).astype(int)
    shadow = _blur(np.roll(alpha, (offset[1], offset[0]), (0, 1)), 0.05)
    behind = behind * (1 - 0.38 * shadow[..., None])

    colours = 0.9 * _floats(figure[..., :3])
    # Round towards the outline, and a little at every edge inside.
    height = 5.0 * _blur(alpha, 0.07) + 0.35 * _blur(colours @ _LUMA, 0.012)
    down, right = np.gradient(height * size / 128)
    shade = 1 - 2.4 * strength * (right * light[0] + down * light[1])
    x, y = _grid(size)
    shade *= 0.97 + 0.12 * strength * (x * light[0] + y * light[1])
    colours = colours * np.clip(shade, 0.45, 1.3)[..., None]

    image = _over(alpha, colours, behind)
    image *= rng.uniform(0.94, 1.06) * (1 + rng.uniform(-0.05, 0.05) * np.array([1, 0, -1], np.float32))
    image *= (1 - rng.uniform(0.08, 0.22) * (x * x + y * y))[..., None]
    image = _blur(image, 0.003)
    image += rng.normal(0, 0.012, image.shape).astype(np.float32)
    return _bytes(0.03 + 0.94 * image)


def flat(figure: Figure, backdrop: Picture, rng: np.random.Generator) -> Picture:
    """Plain areas of colour: what was rasterised, unchanged."""
    return _bytes(_composite(figure, backdrop))


def line_art(figure: Figure, backdrop: Picture, rng: np.random.Generator) -> Picture:
    """Black outlines on white; what is behind in thin grey."""
    alpha = _floats(figure[..., 3])
    inside = _edges(np.sqrt(_over(alpha, _floats(figure[..., :3]), np.ones_like(figure[..., :3], np.float32))))
    outside = _edges(_floats(backdrop)) * (1 - alpha)
    ink = np.clip(2.8 * np.maximum(inside, _outline(alpha)) + 0.9 * outside, 0, 0.95)
    return _bytes(np.repeat(1 - ink[..., None], 3, -1))


def pixel_art(figure: Figure, backdrop: Picture, rng: np.random.Generator) -> Picture:
    """Squares of a thirty-second of a side, each of one of few colours."""
    size = len(figure)
    small = Image.fromarray(flat(figure, backdrop, rng)).resize((32, 32), Image.Resampling.BOX)
    contrast = np.clip(0.5 + 1.15 * (_floats(np.asarray(small)) - 0.5), 0, 1)
    colours = np.rint(contrast**0.7 * 5) / 5
    return np.asarray(Image.fromarray(_bytes(colours)).resize((size, size), Image.Resampling.NEAREST))


def sketch(figure: Figure, backdrop: Picture, rng: np.random.Generator) -> Picture:
    """Pencil on paper: soft outlines and hatching that grows with darkness."""
    size = len(figure)
    grey = _composite(figure, backdrop) @ _LUMA
    outline = np.clip(grey / np.maximum(_blur(grey, 0.02), 0.04), 0, 1) ** 2.2
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    strokes, crossed = (0.5 + 0.5 * np.sin(2 * np.pi * 32 * way) for way in (x + y, x - y))
    dark = np.clip(0.75 - grey, 0, 1)
    hatching = dark * (0.35 + 0.65 * strokes) + np.clip(0.4 - grey, 0, 1) * crossed
    tooth = rng.normal(0, 0.05, grey.shape).astype(np.float32)
    paper = 0.95 * outline - 0.7 * hatching + tooth * (0.35 + dark)
    return _bytes(np.clip(paper, 0.1, 1)[..., None] * np.array([1.0, 0.99, 0.965], np.float32))


def sepia(figure: Figure, backdrop: Picture, rng: np.random.Generator) -> Picture:
    """An old poster: four browns with soft steps, outlined and speckled."""
    image = _composite(figure, backdrop)
    alpha = _floats(figure[..., 3])
    level = np.clip(((image @ _LUMA) ** 0.7 - 0.12) / 0.82, 0, 1) * 3
    tone = np.floor(level) + np.clip((level % 1 - 0.5) * 5 + 0.5, 0, 1)
    tone -= 2.2 * _blur(np.clip(1.6 * np.maximum(_outline(alpha), _edges(image) * alpha), 0, 1), 0.004)
    tone += 0.16 * _clouds(rng, len(figure), 12) + rng.normal(0, 0.1, tone.shape)
    return _bytes(np.stack([np.interp(tone, np.arange(4), shade) for shade in _SEPIA.T], -1))


def dark_comic(figure: Figure, backdrop: Picture, rng: np.random.Generator) -> Picture:
    """Night inks: thick outlines, one side in shadow, few deep colours, dots where it is dark."""
    size = len(figure)
    image = _composite(figure, backdrop)
    alpha = _floats(figure[..., 3])
    lean = rng.choice([-1.0, 1.0]) * np.gradient(_blur(alpha, 0.05), axis=1) * size / 12
    shade = np.where((lean > 0.35) & (alpha > 0.5), 0.6, 1.0)
    deep = np.clip(1.05 * image**0.85 - 0.05, 0, 1) * np.array([0.82, 0.74, 1.0], np.float32) + [0.03, 0.02, 0.10]
    steps = np.rint(deep * 4) / 4 * shade[..., None]
    dots = np.tile(_BAYER, (size // 4 + 1, size // 4 + 1))[:size, :size]
    speckled = (dots > 0.8) & (steps @ _LUMA < 0.4)
    ink = np.clip(3.6 * _blur(_edges(np.sqrt(image)), 0.007), 0, 1) * (0.4 + 0.6 * alpha)
    return _bytes(steps * np.where(speckled, 0.5, 1.0)[..., None] * (1 - ink[..., None]))


STYLES: dict[str, Callable[[Figure, Picture, np.random.Generator], Picture]] = {
    "photo": photo,
    "flat": flat,
    "line art": line_art,
    "pixel art": pixel_art,
    "sketch": sketch,
    "sepia": sepia,
    "dark comic": dark_comic,
}


def _floats(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float32) / 255


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _over(alpha: _Plane, above: _Colours, below: _Colours) -> _Colours:
    return below + alpha[..., None] * (above - below)


def _composite(figure: Figure, backdrop: Picture) -> _Colours:
    return _over(_floats(figure[..., 3]), _floats(figure[..., :3]), _floats(backdrop))


def _grid(size: int) -> tuple[_Plane, _Plane]:
    """x and y from -1 to 1."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)
    return x, y


def _blur(image: np.ndarray, radius: float) -> np.ndarray:
    """A Gaussian blur of a plane or of colours, in steps of 1/255; `radius` in parts of a side."""
    return _floats(np.asarray(Image.fromarray(_bytes(image)).filter(ImageFilter.GaussianBlur(radius * len(image)))))


def _edges(image: Float32[np.ndarray, "size size C"]) -> _Plane:
    """The greatest step to the right or downward in any colour."""
    down = abs(np.diff(image, axis=0, append=image[-1:]))
    right = abs(np.diff(image, axis=1, append=image[:, -1:]))
    return np.maximum(down, right).max(-1)


def _outline(alpha: _Plane) -> _Plane:
    return _edges(alpha[..., None])


def _clouds(rng: np.random.Generator, size: int, cells: int) -> _Plane:
    """Smooth noise of about unit variance, `cells` bumps a side."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
