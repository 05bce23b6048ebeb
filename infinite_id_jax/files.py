"""Files that are whole or not there: written beside, then renamed; and their fingerprints."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infinite_id_jax.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, renamed onto it at the end; removed if anything fails.

    Raises InputError for what the disk refuses: no space, no permission.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        os.replace(beside, path)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path} cannot be written ({reason}): free some space or choose another place.") from None
    finally:
        beside.unlink(missing_ok=True)


def save_json(content: dict[str, Any], path: Path) -> None:
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def sha256(path: Path) -> str:
    """Digest of a whole file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(folder: Path) -> str:
    """Tells models apart without reading all of them: 16 hex digits over names, sizes and 16 MiB of each file.

    The parts are spread evenly; files of 16 MiB or less count whole.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".safetensors", ".msgpack", ".json", ".txt") or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}:{size};".encode())
        with path.open("rb") as file:
            for part in range(16):
                file.seek(part * size // 16)
                digest.update(file.read(2**20))
    return digest.hexdigest()[:16]
