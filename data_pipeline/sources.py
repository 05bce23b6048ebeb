"""What the input is: folders of people, a manifest, WebDataset archives or a prepared dataset, as one list of photos.

The list is sorted by bytes and depends on the input alone; nothing in it is opened but archives and manifests.
"""

import csv
import dataclasses
import glob
import hashlib
import json
import os
import re
import stat
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.prepared import list_prepared
from data_pipeline.provenance import Row, shown
from infinite_id_jax.errors import InputError, MissingExtraError

# In a folder, whatever bears such a name counts as a photo of the input, even a folder.
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".avif")
# What an owner may write for "no"; anything else in a column `opt_out` is respected.
NOT_OPTED_OUT = ("", "0", "false", "no", "none", "nan")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the bytes of one photo are, and its row, which has a reason already if they are not to be read."""

    row: Row
    location: str  # a file, an archive, or "tfds:FOLDER/SPLIT"
    offset: int = -1  # in the archive, or the dataset's split
    size: int = -1  # bytes, where known


def list_sources(inputs: Iterable[str]) -> list[Source]:
    """All photos of the inputs, in order. Raises InputError for an input that is none, or empty."""
    sources = [source for one in inputs for source in _list_one(one)]
    if not sources:
        raise InputError(f"--input {' '.join(map(shown, inputs))} holds no photo: give folders of people, for one.")
    return [
        dataclasses.replace(source, row=dataclasses.replace(source.row, index=index))
        for index, source in enumerate(sources)
    ]


def digest(sources: Iterable[Source]) -> str:
    """16 hex digits over what is listed: names, sizes and what is said of each photo, not the photos themselves."""
    found = hashlib.sha256()
    for source in sources:
        found.update(f"{source.row.to_json()} {source.offset} {source.size}\n".encode())
    return found.hexdigest()[:16]


def _list_one(source: str) -> Iterator[Source]:
    if source.startswith("tfds:"):
        for place, offset, described in list_prepared(source.removeprefix("tfds:")):
            yield Source(_row(f"{source}/{described.pop('path')}", described), place, offset)
        return
    path = Path(source).expanduser()
    if path.is_dir():
        try:
            yield from _list_folder(path)
        except PermissionError:  # of the folder itself; one within it is a row of its own
            raise InputError(f"--input {shown(source)} may not be read: allow it with chmod u+rx.") from None
    elif source.endswith(".tar"):
        for archive in _expand(str(path)):
            yield from _list_archive(Path(archive))
    elif path.suffix.lower() in (".csv", ".parquet"):
        yield from _list_manifest(path)
    elif path.exists():
        raise InputError(f"--input {shown(source)} is no folder, .csv, .parquet or .tar: give one of these.")
    else:
        raise InputError(f"--input {shown(source)} does not exist: check the path.")


def _row(path: str, described: Mapping[str, Any], reason: str = "") -> Row:
    """A row of what somebody says of a photo, in any spelling of its licence; without a person it is rejected."""
    opt_out = _text(described.get("opt_out")).lower() not in NOT_OPTED_OUT
    row = Row(
        index=0,
        path=shown(path),
        person=_text(described.get("person")),
        caption=_text(described.get("caption")),
        source=_text(described.get("source")),
        licence=_text(described.get("licence", described.get("license"))),
        opt_out=opt_out,
    )
    reason = reason or ("opt_out" if opt_out else "" if row.person else "no_person")
    return row.rejected(reason) if reason else row


def _text(value: Any) -> str:
    return "" if value is None else shown(str(value)).strip()


# Folders: PHOTOS/anna/1.jpg, PHOTOS/anna/holiday/2.jpg


def _list_folder(root: Path) -> Iterator[Source]:
    seen: set[tuple[int, int]] = set()
    for path, reason in _walk(str(root), seen):
        inside = os.path.relpath(path, root)
        person = inside.split(os.sep)[0] if os.sep in inside else ""
        yield Source(_row(inside, {"person": person}, reason), path, size=_size(path))


def _walk(folder: str, seen: set[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """(path, reason) of all that is no folder and not hidden; links are followed, each folder is read once."""
    status = os.stat(folder)
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        names = sorted((entry.name for entry in entries if not entry.name.startswith(".")), key=os.fsencode)
    for name in names:
        path = os.path.join(folder, name)
        try:
            status = os.stat(path)
        except OSError:  # a broken link, say: reading it will give the reason
            yield path, ""
            continue
        if not stat.S_ISDIR(status.st_mode):
            yield path, ""
        elif (status.st_dev, status.st_ino) in seen:
            yield path, "link_loop"
        elif name.lower().endswith(PHOTO_SUFFIXES):
            yield path, "not_a_file"
        else:
            try:
                yield from _walk(path, seen)
            except PermissionError:
                yield path, "unreadable"


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


# Manifests: a table with columns path and person


def _list_manifest(path: Path) -> Iterator[Source]:
    for described in _read_table(path):
        name = _text(described.get("path"))
        location = os.path.join(path.parent, str(described.get("path") or ""))
        yield Source(_row(name, described, "" if name else "missing"), location, size=_size(location))


def _read_table(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix.lower() == ".parquet":
            rows, columns = _read_parquet(path)
        else:
            # Paths may hold bytes that are no UTF-8: they stay as the system gives them.
            with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                reader = csv.DictReader(file)
                rows, columns = list(reader), reader.fieldnames or []
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"--input {path} cannot be read ({error}): save it again.") from None
    missing = {"path", "person"} - set(columns)
    if missing:
        raise InputError(
            f"--input {path} has no column {' and no '.join(sorted(missing))}: name them in its first row."
        )
    return rows


def _read_parquet(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("A Parquet manifest", "data") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(str(error).splitlines()[0]) from None
    return table.to_pylist(), table.column_names


# WebDataset: archives in which anna/0001.jpg, anna/0001.json and anna/0001.txt stand side by side


def _expand(pattern: str) -> list[str]:
    """The files of x-{0000..0009}.tar or x-*.tar. Raises InputError if one is missing."""
    braces = _BRACES.search(pattern)
    if braces:
        first, last = braces.groups()
        numbers = (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
        files = (pattern[: braces.start()] + number + pattern[braces.end() :] for number in numbers)
        return [path for file in files for path in _expand(file)]
    found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern), key=os.fsencode)
    if not found:
        raise InputError(f"--input {shown(pattern)} does not exist: check the path.")
    return found


def _list_archive(path: Path) -> Iterator[Source]:
    """Photos with what stands beside them; where the archive breaks, one row says so."""
    key, group = "", []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                before, key = key, f"{folder}/{name.partition('.')[0]}"
                if group and key != before:
                    yield from _list_group(path, archive, group)
                    group = []
                group.append(member)
            yield from _list_group(path, archive, group)
    except (tarfile.TarError, OSError) as error:
        yield Source(_row(path.name, {}, "damaged_archive"), str(path), size=_size(str(path)))
        if isinstance(error, PermissionError):
            raise InputError(f"--input {path} may not be read: allow it with chmod u+r.") from None


def _list_group(path: Path, archive: tarfile.TarFile, members: list[tarfile.TarInfo]) -> Iterator[Source]:
    described, reason = {}, ""
    for member in members:
        suffix = os.path.splitext(member.name)[1].lower()
        if suffix in (".json", ".cls", ".txt") and member.isfile():
            try:
                described |= _read_beside(archive, member, suffix)
            except ValueError:
                reason = "bad_metadata"
    for member in members:
        if member.name.lower().endswith(PHOTO_SUFFIXES):
            kind = reason if member.isfile() and not member.issparse() else "not_a_file"
            row = _row(f"{path.name}/{member.name}", described, kind)
            yield Source(row, str(path), member.offset_data, member.size)


def _read_beside(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> dict[str, Any]:
    """What a .json, .cls (the person) or .txt (the caption) says. Raises ValueError if it cannot be read."""
    file = archive.extractfile(member)
    if file is None or member.size > 2**20:
        raise ValueError(member.name)
    text = file.read().decode()
    if suffix != ".json":
        return {"person" if suffix == ".cls" else "caption": text}
    said = json.loads(text)
    if not isinstance(said, dict):
        raise ValueError(member.name)
    return said
