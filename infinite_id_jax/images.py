"""Pictures as files: PNGs that say they are AI-made, an invisible watermark, labelled grids."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write one AI-made image; each item of `metadata` becomes a text chunk (JSON unless it is a string)."""
    info = PngInfo()
    info.add_itxt("AI-generated", "true")
    info.add_itxt("XML:com.adobe.xmp", _XMP)
    for key, value in metadata.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value, sort_keys=True))
    with replacing(path) as beside:
        image.save(beside, format="png", pnginfo=info)


def read_metadata(path: Path) -> dict[str, str]:
    """The text chunks of a PNG. Raises InputError if the file is damaged."""
    try:
        with Image.open(path) as image:
            image.load()
            return {key: str(value) for key, value in image.info.items()}
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path} is a damaged picture ({error}): delete it.") from None


def watermark(image: Image.Image) -> Image.Image:
    """The image with diffusers' invisible watermark where the extra `watermark` is installed, else as it is."""
    if min(image.size) < _WATERMARK_MIN_SIDE:
        return image
    try:
        from imwatermark import WatermarkEncoder
    except ImportError:
        return image
    encoder = WatermarkEncoder()
    encoder.set_watermark("bits", _WATERMARK)
    bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[..., ::-1])
    return Image.fromarray(np.ascontiguousarray(encoder.encode(bgr, "dwtDct")[..., ::-1]))


def labelled_grid(
    cells: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    heads: Sequence[Image.Image] = (),
    *,
    size: int = 256,
) -> Image.Image:
    """Rows of images of `size` px with a label at the left of each row, and `heads` above the columns."""
    label, gap, columns = size, 4, max(map(len, cells))
    top = size // 2 + gap if heads else 0
    sheet = Image.new("RGB", (label + columns * (size + gap), top + len(cells) * (size + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(max(10, size // 18))
    for column, head in enumerate(heads):
        thumbnail = head.resize((size // 2, size // 2), Image.Resampling.LANCZOS)
        sheet.paste(thumbnail, (label + column * (size + gap) + size // 4, 0))
    for row, (images, text) in enumerate(zip(cells, row_labels, strict=True)):
        y = top + row * (size + gap)
        draw.multiline_text((gap, y + gap), textwrap.fill(text, 26), fill="black", font=font)
        for column, image in enumerate(images):
            sheet.paste(_fitted(image, size), (label + column * (size + gap), y))
    return sheet


def _fitted(image: Image.Image, size: int) -> Image.Image:
    scale = size / max(image.size)
    fitted = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (size, size), "white")
    cell.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
    return cell
