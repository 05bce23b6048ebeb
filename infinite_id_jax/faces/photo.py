"""Photographs from anywhere to upright 8-bit RGB, with one clear sentence for each file that is none."""

import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from infinite_id_jax.errors import PhotoError
from infinite_id_jax.faces.protocol import Photo

MIN_SIDE = 32
MAX_PIXELS = 100_000_000  # 300 MB of RGB; the largest camera sensors have about as many

# Only formats that hold photographs: Pillow also opens documents (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF")


def open_photo(source: str | os.PathLike | bytes | Image.Image | np.ndarray) -> Photo:
    """Reads a photograph as uint8 sRGB [H, W, 3], turned upright as its EXIF says and laid over white.

    `source` is a path, a file's bytes, a PIL image, or a uint8 array [H, W], [H, W, 3] or [H, W, 4]. Gray,
    palette, CMYK and 16-bit gray images are converted, and colours of another space (phones write Display P3) by the
    profile in the file; of an animation the first frame is taken. Raises
    PhotoError, which names the file but not its folder, for whatever is no photograph of 32 px a side to
    100 megapixels; a larger one is refused before it is decoded.
    """
    if isinstance(source, np.ndarray):
        source = _from_array(source)
    if isinstance(source, Image.Image):
        return _decode(source, "The image")
    if isinstance(source, bytes):
        file, name = io.BytesIO(source), "The image"
    else:
        file = Path(source)
        name = f"`{file.name}`"
        check_file(file)
    try:
        # Pillow warns of sizes, which are checked below, and of odd metadata, which is no concern of ours.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise PhotoError(_too_large(name), "too_large") from error
    except PermissionError as error:
        raise PhotoError(f"{name} may not be read: allow it with chmod u+r.", "unreadable") from error
    except Exception as error:  # a damaged header can fail in any way inside a decoder
        raise PhotoError(
            f"{name} is not an image that can be read (text, empty, damaged or an unknown format): "
            "export the photo again as JPEG or PNG.",
            "not_an_image",
        ) from error
    with image:
        return _decode(image, name)


def check_file(path: Path) -> None:
    """Raises PhotoError unless `path` leads to a regular file: opening a pipe, for one, would wait for ever."""
    name = f"`{path.name}`"
    try:
        mode = path.stat().st_mode
    except PermissionError as error:
        raise PhotoError(f"{name} lies in a folder that may not be read: allow it with chmod.", "unreadable") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise PhotoError(f"{name} does not exist: check the path of the photo.", "missing") from error
    if stat.S_ISDIR(mode):
        raise PhotoError(f"{name} is a folder: give one photo in it.", "not_a_file")
    if not stat.S_ISREG(mode):
        raise PhotoError(f"{name} is not a regular file: give a JPEG or PNG file.", "not_a_file")


def _from_array(array: np.ndarray) -> Image.Image:
    channels = array.shape[2:] if array.ndim == 3 else ()
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in ((), (3,), (4,)):
        shape = f"{array.dtype} {list(array.shape)}"
        raise PhotoError(f"The image array is {shape}: give uint8 [height, width, 3] RGB.", "unsupported")
    if array.size == 0:
        raise PhotoError(_too_small("The image", array.shape[1], array.shape[0]), "too_small")
    return Image.fromarray(array)


def _decode(image: Image.Image, name: str) -> Photo:
    """Checks the size that the header states, then decodes, turns upright and converts to RGB."""
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise PhotoError(_too_small(name, width, height), "too_small")
    if width * height > MAX_PIXELS:
        raise PhotoError(_too_large(name, f" ({width} x {height})"), "too_large")
    if image.mode == "F":
        raise PhotoError(f"{name} holds floating-point pixels: export the photo as 8-bit JPEG or PNG.", "unsupported")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            return np.array(_to_rgb(_in_srgb(_upright(image))))
    except Exception as error:  # as above: a damaged stream can fail in any way
        raise PhotoError(
            f"{name} is damaged or cut short: copy or export the photo again as JPEG or PNG.", "damaged"
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF says nothing about the rotation; the picture itself is fine
        return image


def _in_srgb(image: Image.Image) -> Image.Image:
    """The same colours as sRGB's numbers, where the image holds a profile of its own that can be read."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(own):  # it would only be rounded once more
            return image
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        return ImageCms.profileToProfile(image, own, ImageCms.createProfile("sRGB"), outputMode=mode) or image
    except (ImageCms.PyCMSError, OSError):  # as of EXIF: the picture itself is fine
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of gray, which convert() would clip to 255
        high_byte = np.asarray(image).astype(np.int64).clip(0, 65535) // 257
        image = Image.fromarray(high_byte.astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _too_large(name: str, size: str = "") -> str:
    return f"{name} is an image{size} of more than {MAX_PIXELS // 10**6} megapixels: make it smaller."


def _too_small(name: str, width: int, height: int) -> str:
    return f"{name} is only {width} x {height} pixels: give a photo of at least {MIN_SIDE} px a side."
