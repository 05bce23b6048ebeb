"""Files that are whole or not there: written beside, then renamed; and the fingerprints of folders."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from infinite_id_jax.errors import InputError

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(@[\w.-]+)?")
MINIATURE = Path(__file__).parent / "miniature"


def miniature() -> Path:
    """The folder of the model called "miniature". Raises InputError where its weights are not."""
    if not (MINIATURE / "model_index.json").is_file():
        raise InputError(
            "The miniature's weights are not in this installation: train them in a clone of the repository "
            "(`python -m miniature FOLDER`), or name another model."
        )
    return MINIATURE


def is_hub_id(name: str) -> bool:
    """Whether this reads like owner/name or owner/name@revision."""
    return _HUB_ID.fullmatch(name) is not None


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
        # Where the folder itself is unusable there is nothing to remove, and the error above says so.
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a folder beside, renamed onto `folder` at the end; does nothing where that is there already.

    What an earlier process left half-written is overwritten. Raises InputError for what the disk refuses.
    """
    if folder.is_dir():
        return
    beside = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        write(beside)
        beside.rename(folder)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{folder} cannot be written ({reason}): free some space or choose another place.") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def save_json(content: dict[str, Any], path: Path) -> None:
    """Write readable JSON in UTF-8."""
    with replacing(path) as beside:
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
        beside.write_text(text + "\n", encoding="utf-8")


_OF_MODELS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".json", ".txt")


def fingerprint(model: Path) -> str:
    """Tells models apart without reading all of them: 16 hex digits over names, sizes and 16 MiB of each file.

    The parts are spread evenly; files of 16 MiB or less count whole. Of a folder, the weights and settings in it and
    in its subfolders, which may be links. Raises InputError for a file that may not be read.
    """
    digest = hashlib.sha256()
    for path in [model] if model.is_file() else sorted([*model.glob("*"), *model.glob("*/*")]):
        if (path != model and path.suffix not in _OF_MODELS) or not path.is_file():
            continue
        try:
            size = path.stat().st_size
            digest.update(f"{path.relative_to(model) if path != model else path.name}:{size};".encode())
            with path.open("rb") as file:
                for part in range(16):
                    file.seek(part * size // 16)
                    digest.update(file.read(2**20))
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): allow it, or fetch the file again.") from None
    return digest.hexdigest()[:16]
