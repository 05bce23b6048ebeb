"""The folder of one sampling run: what is in it already, what is missing, and what it says of itself."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from infinite_id_jax.errors import InputError
from infinite_id_jax.files import save_json
from infinite_id_jax.images import is_whole, labelled_grid, read_metadata, save_image, save_png, thumbnail

_ROWS_PER_GRID = 40
_IMAGES, _GRID, _MANIFEST = "prompt*-seed*-id*.png", re.compile(r"grid(-\d+)?\.png"), "manifest.json"
_ALIGNED = re.compile(r"aligned\d+-(clip|recogniser)\.png")  # of --save-aligned
SOFTWARE = "infinite_id_jax"


@dataclass(frozen=True)
class Row:
    """One prompt with one seed: as many images as there are identities."""

    prompt: str
    prompt_index: int
    seed: int

    def file(self, column: int) -> str:
        return f"prompt{self.prompt_index:03d}-seed{self.seed}-id{column}.png"


class OutputFolder:
    """Images of one request. Each carries the request's digest, so that a run can go on and never mixes with another.

    `settings` is everything that decides the pixels but the prompt and the seed.
    """

    def __init__(self, path: Path, settings: dict[str, Any], columns: int):
        self.path, self.settings, self.columns = path, settings, columns

    def missing(self, rows: Sequence[Row], *, overwrite: bool) -> list[Row]:
        """The rows of which an image is absent, or damaged by a crash; changes nothing.

        Raises InputError for a folder that cannot be written, and for images of another run unless they may be
        overwritten.
        """
        self._check_place()
        if not overwrite and (foreign := self._foreign()):
            raise InputError(
                f"{foreign[0]} was not written by this program: choose another --output-dir, or replace it with "
                "--overwrite."
            )
        others = self._of_other_runs(rows)
        if others and not overwrite:
            raise InputError(
                f"{others[0]} is of another run (other prompt, settings, model or photo): choose another --output-dir, "
                "or replace its images with --overwrite."
            )
        return [row for row in rows if not all(self._is_done(row, column) for column in range(self.columns))]

    def prepare(self, rows: Sequence[Row]) -> None:
        """Make the folder, and take out what is not of these rows' run and what stands for a finished one.

        Raises InputError if nothing can be written there.
        """
        names = {row.file(column) for row in rows for column in range(self.columns)} | {_MANIFEST}
        self.probe()
        try:
            for stale in [*self._of_other_runs(rows), *self._ends()]:
                stale.unlink(missing_ok=True)
            for left in self.path.glob(".*.partial"):  # by a run that was killed
                name = left.name[1:].rsplit(".", 2)[0]
                if name in names or _GRID.fullmatch(name) or _ALIGNED.fullmatch(name):
                    left.unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(self.path, error.strerror) from None

    def probe(self) -> None:
        """Make the folder. Raises InputError if nothing can be written there."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".writable-{os.getpid()}"
            try:
                probe.write_bytes(bytes(2**16))  # an empty file would fit on a full disk
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(self.path, error.strerror) from None

    def save(self, row: Row, images: Sequence[Image.Image]) -> None:
        """Write a row's images, one for each column. Raises InputError if the disk refuses."""
        for column, image in enumerate(images):
            metadata = {
                "prompt": row.prompt,
                "seed": str(row.seed),
                "settings": _canonical(self.settings),
                "request": self._request(row, column),
                "Software": SOFTWARE,
            }
            save_image(image, self.path / row.file(column), **metadata)

    def finish(self, rows: Sequence[Row], heads: Sequence[Image.Image]) -> list[Path]:
        """Write the labelled grids and then manifest.json, which only a finished run has. Returns the grids."""
        grids = []
        for start in range(0, len(rows), _ROWS_PER_GRID):
            part = rows[start : start + _ROWS_PER_GRID]
            cells = [[thumbnail(self.path / row.file(column)) for column in range(self.columns)] for row in part]
            labels = [f"{row.prompt}\nseed {row.seed}" for row in part]
            grids.append(self.path / ("grid.png" if start == 0 else f"grid-{start // _ROWS_PER_GRID + 1}.png"))
            save_png(labelled_grid(cells, labels, heads), grids[-1], {"Software": SOFTWARE})
        images = [
            {"file": row.file(column), "prompt": row.prompt, "seed": row.seed, "identity": column}
            for row in rows
            for column in range(self.columns)
        ]
        manifest = {
            "ai_generated": True,
            "settings": self.settings,
            "images": images,
            "grids": [grid.name for grid in grids],
        }
        save_json(manifest, self.path / _MANIFEST)
        return grids

    def _check_place(self) -> None:
        """As far as it can be told without writing."""
        nearest = next(place for place in (self.path, *self.path.absolute().parents) if os.path.exists(place))
        if not nearest.is_dir():
            raise _unwritable(self.path, f"{nearest} is a file")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise _unwritable(self.path, f"{nearest} is read-only")
        try:
            self.path.stat()
        except FileNotFoundError:
            pass
        except OSError as error:  # a name that is too long, a loop of links
            raise _unwritable(self.path, error.strerror) from None

    def _ends(self) -> list[Path]:
        """The grids and the manifest that stand for a finished run, whoever wrote them."""
        grids = [path for path in self.path.glob("grid*.png") if _GRID.fullmatch(path.name)]
        return [path for path in (*sorted(grids), self.path / _MANIFEST) if path.exists()]

    def _foreign(self) -> list[Path]:
        """Those of them that no run of this program wrote."""
        return [path for path in self._ends() if not (_is_manifest if path.suffix == ".json" else _is_own)(path)]

    def _is_done(self, row: Row, column: int) -> bool:
        path = self.path / row.file(column)
        found = _read(path)
        return found is not None and found.get("request") == self._request(row, column) and is_whole(path)

    def _of_other_runs(self, rows: Sequence[Row]) -> list[Path]:
        """Images in the folder that this run would replace or stand beside, and that are not of its request."""
        requests = {row.file(column): self._request(row, column) for row in rows for column in range(self.columns)}
        settings = _canonical(self.settings)
        others = []
        for path in sorted(self.path.glob(_IMAGES)):
            found = _read(path)
            if found is None:
                continue
            request = found.get("request")
            if found.get("settings") != settings or requests.get(path.name, request) != request:
                others.append(path)
        return others

    def _request(self, row: Row, column: int) -> str:
        content = _canonical([self.settings, row.prompt, row.seed, column])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True)


def _read(path: Path) -> dict[str, str] | None:
    """A picture's metadata; None if the picture is absent or damaged."""
    try:
        return read_metadata(path)
    except InputError:
        return None


def _is_own(picture: Path) -> bool:
    return (_read(picture) or {}).get("Software") == SOFTWARE


def _is_manifest(path: Path) -> bool:
    try:
        return "ai_generated" in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _unwritable(path: Path, reason: str | None) -> InputError:
    return InputError(f"The output folder {path} cannot be written ({reason}): choose another with --output-dir.")
