"""Files that no photo pipeline should fall over: each with the reasons for which it may be rejected."""

import io
import itertools
import os
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from tests import photos

UNDECODABLE = frozenset({"not_an_image", "damaged", "too_small", "too_large"})
PEOPLE = 16
# Parts of names; the undecodable one is what a file from an old disk may be called.
NAMES = ("plain", "two words", "emoji 🙂", "línea", "new\nline", "-dash", "'quote\"", "*?", "\udcff\udcfe", "l" * 200)


def write_hostile(folder: Path, count: int, seed: int = 0) -> dict[str, frozenset[str]]:
    """Write `count` inputs below folders of people; returns {path inside `folder`: the reasons that are right}."""
    rng = random.Random(seed)
    pictures = _pictures(rng)
    expected = {}
    for i, kind in zip(range(count), itertools.cycle(_KINDS)):
        person = folder / f"person {i % PEOPLE}"
        person.mkdir(parents=True, exist_ok=True)
        path = person / f"{i:05} {NAMES[(i // len(_KINDS)) % len(NAMES)]}.jpg"
        expected[os.path.relpath(path, folder)] = _KINDS[kind](path, rng, pictures)
    return expected


def _pictures(rng: random.Random) -> dict[str, bytes]:
    """Small pictures without a face, one encoded in each format."""
    noise = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (48, 64, 3), np.uint8)
    image = Image.fromarray(noise).resize((96, 72), Image.Resampling.BICUBIC)
    frames = [image.rotate(angle) for angle in (90, 180)]
    gray16 = Image.fromarray(np.linspace(0, 65535, 72 * 96).astype(np.uint16).reshape(72, 96))
    return {
        "JPEG": _encoded(image, "JPEG"),
        "PNG": _encoded(image, "PNG"),
        "WEBP": _encoded(image, "WEBP"),
        "TIFF": _encoded(image, "TIFF"),
        "BMP": _encoded(image, "BMP"),
        "GIF": _encoded(image, "GIF"),
        "cmyk": _encoded(image.convert("CMYK"), "JPEG"),
        "16 bit": _encoded(gray16, "PNG"),
        "float": _encoded(image.convert("F"), "TIFF"),
        "bilevel": _encoded(image.convert("1"), "PNG"),
        "palette": _encoded(image.convert("P"), "PNG", transparency=3),
        "gray alpha": _encoded(image.convert("LA"), "PNG"),
        "animated gif": _encoded(image, "GIF", save_all=True, append_images=frames),
        "animated webp": _encoded(image, "WEBP", save_all=True, append_images=frames),
        "animated png": _encoded(image, "PNG", save_all=True, append_images=frames),
    }


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


Writer = Callable[[Path, random.Random, dict[str, bytes]], frozenset[str]]
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
_DECODABLE = ("cmyk", "16 bit", "bilevel", "palette", "gray alpha", "animated gif", "animated webp", "animated png")


def _truncated(path: Path, rng: random.Random, pictures: dict[str, bytes]) -> frozenset[str]:
    whole = pictures[rng.choice(_FORMATS)]
    path.write_bytes(whole[: rng.randrange(1, len(whole) * 9 // 10)])
    return UNDECODABLE


def _flipped(path: Path, rng: random.Random, pictures: dict[str, bytes]) -> frozenset[str]:
    content = bytearray(pictures[rng.choice(_FORMATS)])
    for _ in range(20):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return UNDECODABLE | {"no_face", "near_duplicate", "too_few_photos"}  # some decoders show what there is


def _wrong_type(path: Path, rng: random.Random, pictures: dict[str, bytes]) -> frozenset[str]:
    heads = (b"%PDF-1.7\n", b"PK\x03\x04", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<html>", b"%!PS-Adobe-3.0\n")
    path.write_bytes(rng.choice((*heads, b"\x7fELF", b"\x00\x00\x00\x18ftypmp42", b"{}")) + rng.randbytes(64))
    return frozenset({"not_an_image"})


def _magic_only(path: Path, rng: random.Random, pictures: dict[str, bytes]) -> frozenset[str]:
    path.write_bytes(rng.choice(list(pictures.values()))[:12] + rng.randbytes(500))
    return UNDECODABLE


def _empty(path: Path, rng: random.Random, pictures: dict[str, bytes]) -> frozenset[str]:
    path.touch()
    return frozenset({"not_an_image"})


def _four_bytes(path: Path, rng: random.Random, pictures: dict[str, bytes]) -> frozenset[str]:
    path.write_bytes(rng.choice(list(pictures.values()))[:4])
    return frozenset({"not_an_image"})


def _huge(path: Path, rng: random.Random, pictures: dict[str, bytes]) -> frozenset[str]:
    """A PNG of a hundred bytes that says it has gigapixels."""
    header = b"IHDR" + struct.pack(
        ">IIBBBBB", rng.randrange(20_000, 2**31), rng.randrange(20_000, 2**31), 8, 2, 0, 0, 0
    )
    body = b"IDAT" + zlib.compress(bytes(99))
    chunks = (struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data)) for data in (header, body))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return frozenset({"too_large"})


def _tiny(path: Path, rng: random.Random, pictures: dict[str, bytes]) -> frozenset[str]:
    photos.png(path, rng.randrange(1, 32), rng.randrange(1, 200))
    return frozenset({"too_small"})


def _float(path: Path, rng: random.Random, pictures: dict[str, bytes]) -> frozenset[str]:
    path.write_bytes(pictures["float"])
    return frozenset({"unsupported"})


def _without_face(path: Path, rng: random.Random, pictures: dict[str, bytes]) -> frozenset[str]:
    path.write_bytes(pictures[rng.choice(_DECODABLE)] + rng.randbytes(8))  # what follows a picture does not matter
    return frozenset({"no_face"})


def _many_faces(path: Path, rng: random.Random, pictures: dict[str, bytes]) -> frozenset[str]:
    head = Image.fromarray(photos.astronaut()[0:230, 110:340]).resize((120, 120))
    canvas = Image.new("RGB", (260, 130), (rng.randrange(256), 150, 150))
    canvas.paste(head, (5, 5))
    canvas.paste(head, (135, 5))
    path.write_bytes(_encoded(canvas, "JPEG") + rng.randbytes(8))
    return frozenset({"many_faces"})


def _duplicate(path: Path, rng: random.Random, pictures: dict[str, bytes]) -> frozenset[str]:
    """The first of these is a picture without a face, the rest are copies."""
    path.write_bytes(pictures["PNG"])
    return frozenset({"no_face", "duplicate"})


def _link_to_itself(path: Path, rng: random.Random, pictures: dict[str, bytes]) -> frozenset[str]:
    path.symlink_to(path.name)
    return frozenset({"missing"})


def _link_to_nothing(path: Path, rng: random.Random, pictures: dict[str, bytes]) -> frozenset[str]:
    path.symlink_to("nowhere.jpg")
    return frozenset({"missing"})


def _link_upwards(path: Path, rng: random.Random, pictures: dict[str, bytes]) -> frozenset[str]:
    path.symlink_to("..")
    return frozenset({"link_loop"})


def _pipe(path: Path, rng: random.Random, pictures: dict[str, bytes]) -> frozenset[str]:
    os.mkfifo(path)
    return frozenset({"not_a_file"})


def _socket(path: Path, rng: random.Random, pictures: dict[str, bytes]) -> frozenset[str]:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's address is at most 108 bytes long
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind("s")
        os.rename("s", path.name)
    finally:
        os.chdir(here)
    return frozenset({"not_a_file"})


def _folder(path: Path, rng: random.Random, pictures: dict[str, bytes]) -> frozenset[str]:
    path.mkdir()
    (path / "inside.jpg").write_bytes(pictures["JPEG"])
    return frozenset({"not_a_file"})


_KINDS: dict[str, Writer] = {
    **{f"truncated {i}": _truncated for i in range(8)},
    **{f"wrong type {i}": _wrong_type for i in range(3)},
    **{f"magic only {i}": _magic_only for i in range(3)},
    "bits flipped": _flipped,
    "empty": _empty,
    "four bytes": _four_bytes,
    "huge": _huge,
    "tiny": _tiny,
    "float": _float,
    "without face": _without_face,
    "many faces": _many_faces,
    "duplicate": _duplicate,
    "duplicate again": _duplicate,
    "link to itself": _link_to_itself,
    "link to nothing": _link_to_nothing,
    "link upwards": _link_upwards,
    "pipe": _pipe,
    "socket": _socket,
    "folder": _folder,
}


def unexpected(expected: dict[str, frozenset[str]], rows: Iterable[dict]) -> dict[str, str]:
    """{path: what became of it} of the rows that are not as `write_hostile` says."""
    shown = {os.fsencode(path).decode("utf-8", "backslashreplace"): reasons for path, reasons in expected.items()}
    found = {row["path"]: row["reason"] for row in rows}
    assert found.keys() >= shown.keys(), sorted(shown.keys() - found.keys())
    return {path: found[path] for path, reasons in shown.items() if found[path] not in reasons}
