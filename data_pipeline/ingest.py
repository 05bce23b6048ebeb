"""The first stage: can each photo be read and decoded, what is its hash, and is it an earlier one's copy?"""

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt64
from PIL import Image

from data_pipeline.prepared import read_prepared
from data_pipeline.provenance import Row, load_rows, save_rows
from data_pipeline.sources import Source
from infinite_id_jax.errors import InputError, PhotoError
from infinite_id_jax.faces.photo import check_file, open_photo
from infinite_id_jax.faces.protocol import Photo

MAX_BYTES = 2**29  # larger than any photograph of 100 megapixels
BLOCK = 512  # photos of one file of rows: what a kill can lose

logger = logging.getLogger(__name__)


def read_bytes(source: Source) -> bytes:
    """The photo's encoded bytes. Raises PhotoError, with its reason, if they are not to be had."""
    if source.location.startswith("tfds:"):
        return read_prepared(source.location, source.offset)
    path = Path(source.location)
    check_file(path)
    name = f"`{path.name}`"
    try:
        if (source.offset < 0 and path.stat().st_size > MAX_BYTES) or source.size > MAX_BYTES:
            raise PhotoError(f"{name} is larger than {MAX_BYTES // 2**20} MiB: make it smaller.", "too_large")
        with path.open("rb") as file:
            if source.offset < 0:
                return file.read()
            file.seek(source.offset)
            return file.read(source.size)
    except PermissionError as error:
        raise PhotoError(f"{name} may not be read: allow it with chmod u+r.", "unreadable") from error
    except OSError as error:
        raise PhotoError(f"{name} cannot be read ({error.strerror}): copy it anew.", "unreadable") from error


def reopen(source: Source) -> Photo:
    """A photo that has passed `examine`. Raises InputError if it is no longer what it was."""
    try:
        content = read_bytes(source)
    except PhotoError as error:
        raise InputError(f"{source.row.path} was readable before ({error}): run the command again.") from None
    if hashlib.sha256(content).hexdigest() != source.row.sha256:
        raise InputError(f"{source.row.path} has changed since it was hashed: choose another --output.")
    return open_photo(content)


def examine(source: Source) -> Row:
    """The row of a photo with its hashes and size, or the reason why it is of no use."""
    row = source.row
    if row.reason:
        return row
    try:
        content = read_bytes(source)
        row = dataclasses.replace(row, sha256=hashlib.sha256(content).hexdigest())
        photo = open_photo(content)
    except PhotoError as error:
        return row.rejected(error.reason, str(error))
    height, width = photo.shape[:2]
    return dataclasses.replace(row, phash=f"{difference_hash(photo):016x}", height=height, width=width)


def difference_hash(photo: Photo) -> int:
    """64 bits, one for each of 8 x 8 places: is it darker than the next one to its right (dHash)?

    Copies of other size, sharpness or compression differ in few bits.
    """
    gray = Image.fromarray(photo).convert("L").resize((9, 8), Image.Resampling.LANCZOS, reducing_gap=3.0)
    values = np.asarray(gray).astype(np.int16)
    return int.from_bytes(np.packbits(values[:, :-1] < values[:, 1:]).tobytes(), "big")


def differing_bits(phash: int, others: UInt64[np.ndarray, " n"]) -> np.ndarray:
    """Hamming distances [n] of a hash to others."""
    return np.bitwise_count(np.uint64(phash) ^ others)


def blocks(sources: Sequence[Source]) -> list[Sequence[Source]]:
    """The sources in pieces that are examined together."""
    return [sources[start : start + BLOCK] for start in range(0, len(sources), BLOCK)]


def block_path(folder: Path, block: int) -> Path:
    """Where the rows of a block are kept."""
    return folder / "work" / f"ingest-{block:06}.jsonl"


def ingest_block(folder: Path, block: int, sources: Sequence[Source]) -> None:
    """Examine a block's photos and save their rows. Raises InputError for what the disk refuses."""
    save_rows(map(examine, sources), block_path(folder, block))
    logger.info("%d photos read, from %s on", len(sources), sources[0].row.path)


def collect(folder: Path, sources: Sequence[Source]) -> list[Source]:
    """The sources with the rows that all blocks found, copies of earlier photos rejected.

    Raises InputError if a file of rows is not whole.
    """
    first: dict[str, str] = {}
    examined = []
    for block, group in enumerate(blocks(sources)):
        for source, row in zip(group, load_rows(block_path(folder, block), len(group)), strict=True):
            if row.sha256 is not None and not row.reason:
                if row.sha256 in first:
                    row = row.rejected("duplicate", first[row.sha256])
                else:
                    first[row.sha256] = row.path
            examined.append(dataclasses.replace(source, row=row))
    return examined
