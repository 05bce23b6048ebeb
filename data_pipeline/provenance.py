"""One row for every photo of the input: kept, or rejected for a reason that can be counted."""

import collections
import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from infinite_id_jax.errors import InputError
from infinite_id_jax.files import replacing

# Every reason there is, in the order in which the stages give them.
REASONS = {
    "opt_out": "its owner has opted out; it was not opened",
    "no_person": "nothing says who is in it",
    "bad_metadata": "what the archive says of it cannot be read",
    "damaged_archive": "the archive ends or breaks here",
    "link_loop": "a link to a folder that is read already",
    "missing": "there is no such file",
    "unreadable": "it may not be read, or the disk fails",
    "not_a_file": "a folder, a pipe or a device",
    "not_an_image": "text, empty, or an unknown format",
    "unsupported": "floating-point pixels",
    "too_small": "less than 32 px a side",
    "too_large": "more than 100 megapixels or 512 MiB",
    "damaged": "cut short, or its data are broken",
    "duplicate": "the very bytes of an earlier photo",
    "no_face": "no face was found, or none is well enough seen",
    "many_faces": "several faces, none much larger than the others",
    "small_face": "the face has too few pixels",
    "other_person": "the face is not that of most of the person's photos",
    "near_duplicate": "nearly another photo of the person, of which the larger stays",
    "too_few_photos": "too few photos of the person are left",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of one photo of the input; None where it was rejected before that was found out."""

    index: int  # its place in the input
    path: str  # as the input names it; bytes that are no UTF-8 as \xff
    person: str
    reason: str = ""  # "" is kept
    detail: str = ""
    split: str | None = None
    sha256: str | None = None
    phash: str | None = None  # 16 hex digits
    width: int | None = None  # upright
    height: int | None = None
    faces: int | None = None
    face_size: int | None = None  # the shorter side of the face's box, in pixels
    score: float | None = None  # the detector's
    similarity: float | None = None  # cosine to the mean of the person's face
    caption: str = ""
    source: str = ""
    licence: str = ""
    opt_out: bool = False

    def to_json(self) -> str:
        """One line of JSON, with `status`."""
        fields = {"status": "rejected" if self.reason else "kept"} | dataclasses.asdict(self)
        return json.dumps(fields, ensure_ascii=False)

    def rejected(self, reason: str, detail: str = "") -> "Row":
        """The row with its reason, one of REASONS."""
        assert reason in REASONS, reason
        return dataclasses.replace(self, reason=reason, detail=shown(detail))


def shown(text: str) -> str:
    """A path or what a file says as valid Unicode: bytes that are no UTF-8 become \\xff, lone surrogates \\ud800."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()


def save_rows(rows: Iterable[Row], path: Path) -> None:
    """Write JSON lines, whole or not at all. Raises InputError for what the disk refuses."""
    with replacing(path) as beside, beside.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(row.to_json() + "\n")


def load_rows(path: Path, count: int) -> list[Row]:
    """The `count` rows of a file of `save_rows`. Raises InputError if it is not whole."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        found = [json.loads(line) for line in lines]
        for fields in found:
            del fields["status"]
        rows = [Row(**fields) for fields in found]
        if len(rows) != count:
            raise ValueError(len(rows))
        return rows
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}): delete it and run the command again.") from None


def summarise(rows: Sequence[Row], configuration: str) -> dict[str, Any]:
    """Counts by reason; kept and rejected photos add up to the input's."""
    reasons = collections.Counter(row.reason for row in rows)
    kept = reasons.pop("", 0)
    return {
        "input": len(rows),
        "kept": kept,
        "rejected": reasons.total(),
        "reasons": {reason: reasons[reason] for reason in REASONS if reason in reasons},
        "people": len({row.person for row in rows if not row.reason}),
        "splits": dict(sorted(collections.Counter(str(row.split) for row in rows if not row.reason).items())),
        "configuration": configuration,
    }


def histogram(summary: dict[str, Any], width: int = 40) -> str:
    """The summary as text, a bar for each reason, the commonest first."""
    counts = {"kept": summary["kept"]} | dict(sorted(summary["reasons"].items(), key=lambda item: -item[1]))
    unit = max(1, *counts.values()) / width
    lines = [
        f"{reason:>16} {count:>9}  {'#' * round(count / unit):<{width}}  {REASONS.get(reason, '')}".rstrip()
        for reason, count in counts.items()
    ]
    total = f"{summary['input']} photos: {summary['kept']} of {summary['people']} people kept"
    return "\n".join([*lines, f"{total}, {summary['rejected']} rejected."])
