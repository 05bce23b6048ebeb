"""Photographs for tests, real ones from scikit-image, and files that are no photographs."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

# Of the photos below: (x, y) of left eye, right eye, nose, left and right mouth corner, read off by eye.
ASTRONAUT_KEYPOINTS = np.array([[206, 102], [249, 106], [228, 128], [205, 143], [247, 145]], float)


def astronaut() -> np.ndarray:
    """Eileen Collins, NASA, public domain: one face, 512 x 512."""
    return skimage.data.astronaut()


def photographer() -> np.ndarray:
    """Another person: a man in half profile with a camera, 512 x 512."""
    return np.stack([skimage.data.camera()] * 3, axis=-1)


def without_face() -> np.ndarray:
    """A cup of coffee."""
    return skimage.data.coffee()


def group() -> np.ndarray:
    """Three heads side by side at 60, 160 and 100 percent; the largest stands in the middle."""
    head = Image.fromarray(astronaut()[0:230, 110:340])
    canvas = Image.new("RGB", (900, 400), (150, 150, 150))
    left = 20
    for scale in (0.6, 1.6, 1.0):
        side = round(230 * scale)
        canvas.paste(head.resize((side, side), Image.Resampling.LANCZOS), (left, 10))
        left += side + 40
    return np.asarray(canvas)


def png(path: Path, width: int, height: int) -> Path:
    """A valid black PNG of one bit a pixel, written row by row: 30,000 x 30,000 takes 110 KB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(1), bytes(1 + (width + 7) // 8)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    return path


def bomb(folder: Path) -> Path:
    """A complete PNG of 900 megapixels in a small file."""
    return png(folder / "bomb.png", 30_000, 30_000)


def _missing(folder: Path) -> Path:
    return folder / "missing.jpg"


def _folder(folder: Path) -> Path:
    (folder / "album").mkdir()
    return folder / "album"


def _text(folder: Path) -> Path:
    (folder / "letter.jpg").write_text("Dear photo, you are not here.\n" * 50)
    return folder / "letter.jpg"


def _truncated(folder: Path) -> Path:
    whole = folder / "cut.jpg"
    Image.fromarray(astronaut()).save(whole, quality=90)
    whole.write_bytes(whole.read_bytes()[:20_000])
    return whole


def _four_bytes(folder: Path) -> Path:
    (folder / "stub.png").write_bytes(b"\x89PNG")
    return folder / "stub.png"


def _one_pixel(folder: Path) -> Path:
    return png(folder / "dot.png", 1, 1)


def _over_the_limit(folder: Path) -> Path:
    """More than the limit, less than what Pillow itself refuses."""
    return png(folder / "poster.png", 12_000, 9_000)


# Each entry writes its file into a folder; the text is what the error must say besides the file's name.
BAD_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (_missing, "does not exist"),
    "folder": (_folder, "is a folder"),
    "text": (_text, "is not an image"),
    "truncated": (_truncated, "cut short"),
    "four_bytes": (_four_bytes, "is not an image"),
    "one_pixel": (_one_pixel, "only 1 x 1 pixels"),
    "bomb": (bomb, "megapixels"),
    "over_the_limit": (_over_the_limit, "12000 x 9000"),
}
