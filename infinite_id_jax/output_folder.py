"""The folder of one sampling run: what is in it already, what is missing, and what it says of itself."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from infinite_id_jax.errors import InputError
from infinite_id_jax.files import save_json
from infinite_id_jax.images import labelled_grid, read_metadata, save_png, watermark

_ROWS_PER_GRID = 40


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

    def check_writable(self) -> None:
        """Make the folder. Raises InputError if nothing can be written there."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"The output folder {self.path} cannot be written ({error.strerror}): choose another with --output-dir."
            ) from None

    def is_done(self, row: Row, *, overwrite: bool) -> bool:
        """Whether all images of a row are there and whole.

        Raises InputError for an image of another request, unless it may be overwritten.
        """
        done = True
        for column in range(self.columns):
            path = self.path / row.file(column)
            if not path.exists():
                done = False
                continue
            try:
                request = read_metadata(path).get("request")
            except InputError:  # cut off by a crash of the machine: draw it again
                done = False
                continue
            if request != self._request(row, column):
                if not overwrite:
                    raise InputError(
                        f"{path} is of another run (other settings, model or photo): choose another --output-dir, "
                        "or replace its images with --overwrite."
                    )
                done = False
        return done

    def save(self, row: Row, images: Sequence[Image.Image]) -> None:
        for column, image in enumerate(images):
            metadata = {
                "prompt": row.prompt,
                "seed": str(row.seed),
                "settings": self.settings,
                "request": self._request(row, column),
                "Software": "infinite_id_jax",
            }
            save_png(watermark(image), self.path / row.file(column), metadata)

    def finish(self, rows: Sequence[Row], heads: Sequence[Image.Image]) -> list[Path]:
        """Write the labelled grids and then manifest.json, which only a finished run has. Returns the grids."""
        grids = []
        for start in range(0, len(rows), _ROWS_PER_GRID):
            part = rows[start : start + _ROWS_PER_GRID]
            cells = [[Image.open(self.path / row.file(column)) for column in range(self.columns)] for row in part]
            labels = [f"{row.prompt}\nseed {row.seed}" for row in part]
            grids.append(self.path / ("grid.png" if start == 0 else f"grid-{start // _ROWS_PER_GRID + 1}.png"))
            save_png(labelled_grid(cells, labels, heads), grids[-1], {"Software": "infinite_id_jax"})
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
        save_json(manifest, self.path / "manifest.json")
        return grids

    def _request(self, row: Row, column: int) -> str:
        content = json.dumps([self.settings, row.prompt, row.seed, column], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]
