"""Pictures as files: PNGs that say they are AI-made, an invisible watermark, labelled grids."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from infinite_id_jax.errors import InputError
from infinite_id_jax.files import replacing

# IPTC's term for pictures made by a trained model, which image software shows as "Made with AI".
_XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" Iptc4xmpExt:DigitalSourceType='
    '"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/></rdf:RDF></x:xmpmeta>'
)
# The 48 bits that diffusers writes into SDXL's images, so that existing detectors know ours.
_WATERMARK = [int(bit) for bit in f"{0b101100111110110010010000011110111011000110011110:048b}"]
_WATERMARK_MIN_SIDE = 256  # the method's own limit
GRID_CELL = 256


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write one AI-made image; each item of `metadata` becomes a text chunk (JSON unless it is a string)."""
    info = PngInfo()
    info.add_itxt("AI-generated", "true")
    info.add_itxt("XML:com.adobe.xmp", _XMP)
    for key, value in metadata.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value, sort_keys=True))
    with replacing(path) as beside:
        image.save(beside, format="png", pnginfo=info)


def save_image(image: Image.Image, path: Path | str, **metadata: Any) -> None:
    """Save an image that the pipeline drew as a PNG that says so, with the `watermark` where it can carry one.

    `metadata` becomes text chunks. Raises InputError for another format than PNG, or if the disk refuses.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise InputError(f"{path} is no PNG by its name: give one, whose metadata says that it is AI-made.")
    save_png(watermark(image), path, metadata)


def read_metadata(path: Path) -> dict[str, str]:
    """The text chunks of a PNG of ours, read without decoding it. Raises InputError if it is no picture."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return {str(key): str(value) for key, value in image.info.items()}
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path} is a damaged picture ({error}): delete it.") from None


def is_whole(path: Path) -> bool:
    """Whether a PNG decodes to its end with every checksum right; a crash of the machine can cut it or fill zeros."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()  # the checksums
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def watermark(image: Image.Image) -> Image.Image:
    """The image with diffusers' invisible watermark where the extra `watermark` is installed, else as it is.

    An image with a side under 256 px cannot carry one.
    """
    if min(image.size) < _WATERMARK_MIN_SIDE:
        return image
    try:
        from imwatermark import WatermarkEncoder  # pyright: ignore[reportMissingImports]
    except ImportError:
        return image
    encoder = WatermarkEncoder()
    encoder.set_watermark("bits", _WATERMARK)
    # In bytes, as detectors read it. From floats, as diffusers calls it, red keeps more of its saturation, but of six
    # photos of 512 px detectors then read 16 to 48 of the 48 bits rather than 39 to 48 (chance gives 24).
    bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])
    return Image.fromarray(np.ascontiguousarray(encoder.encode(bgr, "dwtDct")[..., ::-1]))


def shrunk(photo: UInt8[np.ndarray, "H W 3"], by: int) -> UInt8[np.ndarray, "H W 3"]:
    """A photo with the detail of a `by`-th of its sides: as if taken from further away, and enlarged."""
    return softened(photo, max(1, min(photo.shape[:2]) // by))


def softened(image: UInt8[np.ndarray, "H W 3"], side: int) -> UInt8[np.ndarray, "H W 3"]:
    """An image made smaller, its shorter side to `side` pixels, and as large as it was again."""
    height, width = image.shape[:2]
    scale = side / min(height, width)
    small = Image.fromarray(image).resize(
        (max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BOX
    )
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def thumbnail(path: Path, *, size: int = GRID_CELL) -> Image.Image:
    """The picture in a file as a white square of `size` px, as `labelled_grid` takes many of them."""
    with Image.open(path) as image:
        return _fitted(image, size)


def labelled_grid(
    cells: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    heads: Sequence[Image.Image] = (),
    *,
    size: int = GRID_CELL,
) -> Image.Image:
    """Rows of images of `size` px with a label at the left of each row, and `heads` above the columns.

    A label too long for its row is cut in the middle: its last line stays.
    """
    gap, columns = 4, max(map(len, cells))
    top = size // 2 + gap if heads else 0
    sheet = Image.new("RGB", (size + columns * (size + gap), top + len(cells) * (size + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(max(10, size // 16))
    line_height = round(1.3 * font.getbbox("Ag")[3])
    for column, head in enumerate(heads):
        x = size + column * (size + gap) + size // 4
        sheet.paste(head.convert("RGB").resize((size // 2, size // 2), Image.Resampling.LANCZOS), (x, 0))
    for row, (images, text) in enumerate(zip(cells, row_labels, strict=True)):
        y = top + row * (size + gap)
        lines = _shortened(_wrapped(text, font, size - 4 * gap), (size - gap) // line_height)
        for number, line in enumerate(lines):
            draw.text((2 * gap, y + gap + number * line_height), line, fill="black", font=font)
        for column, image in enumerate(images):
            sheet.paste(_fitted(image, size), (size + column * (size + gap), y))
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than `width` px, broken at spaces, or within a word that is wider than a line."""
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}" if line else word
            while font.getlength(line) > width:
                fits = next(n for n in range(1, len(line)) if font.getlength(line[: n + 1]) > width)
                lines.append(line[:fits])
                line = line[fits:]
        lines.append(line)
    return lines


def _shortened(lines: list[str], room: int) -> list[str]:
    return lines if len(lines) <= room else [*lines[: room - 2], "...", lines[-1]]


def _fitted(image: Image.Image, size: int) -> Image.Image:
    scale = size / max(image.size)
    fitted = image.convert("RGB").resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )
    cell = Image.new("RGB", (size, size), "white")
    cell.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
    return cell
