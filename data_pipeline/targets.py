"""The picture that a photo is for the denoiser: a square of a bucket's size, and what SDXL is told of its making."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image

from infinite_id_jax.faces.protocol import Photo


class Target(NamedTuple):
    """A training picture cut from a photo, and SDXL's size and crop conditioning for it."""

    picture: UInt8[np.ndarray, "side side 3"]
    time_ids: Int32[np.ndarray, "6"]  # original height, width; crop's top, left; target height, width


def target_size(height: int, width: int, resolutions: Sequence[int]) -> int:
    """The largest resolution that the photo fills, else the smallest one, to which it is enlarged.

    A small photo need not be thrown away: its original size is part of the conditioning (SDXL, section 2.2).
    """
    return max([size for size in resolutions if size <= min(height, width)], default=min(resolutions))


# Around the face's box, as a share of its height, so that hair and chin are in the picture too.
MARGIN = 0.5


def cut_target(photo: Photo, box: tuple[float, float, float, float], size: int) -> Target:
    """Resize the shorter side to `size` pixels and cut the central square, moved as little as keeps the head in it."""
    height, width = photo.shape[:2]
    scale = size / min(height, width)
    x0, y0, x1, y1 = box
    margin = MARGIN * (y1 - y0)
    left = _corner((x0 - margin) * scale, (x1 + margin) * scale, max(size, round(width * scale)), size)
    top = _corner((y0 - margin) * scale, (y1 + margin) * scale, max(size, round(height * scale)), size)
    # Of the photo only what is wanted is resized, with the filter's surroundings.
    region = (left / scale, top / scale, min((left + size) / scale, width), min((top + size) / scale, height))
    image = Image.fromarray(photo).resize((size, size), Image.Resampling.LANCZOS, box=region, reducing_gap=3.0)
    return Target(np.asarray(image), np.asarray([height, width, top, left, size, size], np.int32))


def _corner(first: float, last: float, length: int, size: int) -> int:
    """Where a window of `size` pixels begins: in the middle of `length`, or as near to it as holds [first, last]."""
    low = max(0, math.ceil(min(last, length)) - size)
    high = min(length - size, math.floor(max(first, 0)))
    if low > high:  # more than the window holds: its middle
        return min(max(0, round((first + last - size) / 2)), length - size)
    return min(max((length - size) // 2, low), high)
