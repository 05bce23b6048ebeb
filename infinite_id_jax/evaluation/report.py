"""A study as one page: tables, pictures, diagrams and claims in a file that needs nothing beside it."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from infinite_id_jax.errors import InputError
from infinite_id_jax.evaluation.metrics import Estimate
from infinite_id_jax.files import replacing

_EXACT_SIDE = 64  # pictures up to this many pixels stay as they are (PNG); larger ones become JPEG
_MAX_SIDE = 512
_JPEG_QUALITY = 85


@dataclass(frozen=True)
class Table:
    """Rows of text and figures under a header; the first cell of each row names it. An Estimate shows its interval."""

    header: Sequence[str]
    rows: Sequence[Sequence[str | int | float | Estimate]]
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """A picture, or the file of one, with lines below it such as its scores; None where there is none."""

    image: Path | Image.Image | None
    caption: Sequence[str] = ()


@dataclass(frozen=True)
class ImageGrid:
    """Named rows of pictures under named columns."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A diagram as SVG or PNG; `alt` says in words what it shows."""

    alt: str
    content: bytes
    note: str = ""


@dataclass(frozen=True)
class Claims:
    """What was expected and what was measured.

    Each claim has the keys `claim` (a sentence), `difference` (value and ends of its interval), `verdict`
    (confirmed, not confirmed or contradicted), where that is not 0, `bound`, and of similarities of faces
    `no_face_zero`, the difference where a picture without a face counts as 0.
    """

    claims: Sequence[Mapping[str, Any]]
    note: str = ""


CLAIMS = {"difference": "Difference and 95% interval", "no_face_zero": "With 0 where no face is found"}
"""The figures of a claim that are shown, and their titles."""

Block = Table | ImageGrid | Figure | Claims


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph and what it speaks of."""

    title: str
    text: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Report:
    """The whole page: `summary` says in one paragraph what was found, `settings` how it was made."""

    title: str
    summary: str
    sections: Sequence[Section]
    settings: Mapping[str, object] = field(default_factory=dict)


def write_report(folder: Path, report: Report) -> Path:
    """Write `report.html` into a folder; equal reports give equal bytes.

    Raises InputError for a picture that cannot be read, and then writes nothing.
    """
    body = [f"<h1>{escape(report.title)}</h1>", _paragraph(report.summary, "summary"), _contents(report)]
    body += [_section(f"section-{number}", section) for number, section in enumerate(report.sections, 1)]
    if report.settings:
        rows = [[name, str(value)] for name, value in report.settings.items()]
        body.append(_section("settings", Section("Settings", "", [Table(["Setting", "Value"], rows)])))
    path = folder / "report.html"
    with replacing(path) as beside:
        text = _PAGE.format(title=escape(report.title), style=_STYLE, body="\n".join(body))
        beside.write_text(text, encoding="utf-8", errors="replace")
    return path


def _contents(report: Report) -> str:
    links = [(f"section-{number}", section.title) for number, section in enumerate(report.sections, 1)]
    links += [("settings", "Settings")] if report.settings else []
    items = "".join(f'<li><a href="#{name}">{escape(title)}</a></li>' for name, title in links)
    return f'<nav aria-label="Sections"><ul>{items}</ul></nav>' if links else ""


def _section(name: str, section: Section) -> str:
    parts = [f'<section id="{name}">', f"<h2>{escape(section.title)}</h2>", _paragraph(section.text)]
    return "\n".join([*parts, *(_block(block, section.title) for block in section.blocks), "</section>"])


def _block(block: Block, title: str) -> str:
    if isinstance(block, Table):
        content = _table(block)
    elif isinstance(block, ImageGrid):
        content = _grid(block)
    elif isinstance(block, Figure):
        content = _figure(block)
    else:
        content = _claims(block)
    # What is wider than the screen scrolls by itself, by keyboard too.
    scrolling = f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(title)}">{content}</div>'
    return scrolling + _paragraph(block.note, "note")


def _paragraph(text: str, kind: str = "text") -> str:
    return f'<p class="{kind}">{escape(text)}</p>' if text else ""


def _table(table: Table) -> str:
    def cell(value: str | int | float | Estimate, first: bool) -> str:
        if isinstance(value, str):
            return f'<th scope="row">{escape(value)}</th>' if first else f"<td>{escape(value)}</td>"
        return f'<td class="number">{_figures(value)}</td>'

    numeric = [any(not isinstance(row[i], str) for row in table.rows) for i in range(len(table.header))]
    head = "".join(
        f'<th scope="col"{" class=number" if right else ""}>{escape(name)}</th>'
        for name, right in zip(table.header, numeric, strict=True)
    )
    rows = ["".join(cell(value, i == 0) for i, value in enumerate(row)) for row in table.rows]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{_rows(rows)}</tbody></table>"


def _rows(rows: Sequence[str]) -> str:
    return "\n".join(f"<tr>{row}</tr>" for row in rows)


def _figures(value: int | float | Estimate) -> str:
    text, spread = figure_text(value)
    return text + (f' <span class="interval">{spread}</span>' if spread else "")


def figure_text(value: int | float | Estimate) -> tuple[str, str]:
    """A figure, and the ends of its interval where it has one."""
    if isinstance(value, Estimate):
        spread = "" if math.isnan(value.low) else f"{_number(value.low)} to {_number(value.high)}"
        return _number(value.value), spread
    return str(value) if isinstance(value, int) else _number(value), ""


def _number(value: float) -> str:
    """Three decimals, fewer for large figures; a dash where nothing was measured."""
    if math.isnan(value):
        return "\N{EN DASH}"
    digits = 3 if abs(value) < 10 else 1
    rounded = f"{abs(value) if value == 0 else value:.{digits}f}"
    text = f"{value:.1e}" if value and not float(rounded) else rounded  # a small figure must not look like none
    return text.replace("-", "\N{MINUS SIGN}")


def _grid(grid: ImageGrid) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in grid.columns)
    rows = []
    for label, cells in grid.rows:
        pictures = [_cell(cell, f"{label}, {name}") for name, cell in zip(grid.columns, cells, strict=True)]
        rows.append(f'<th scope="row">{escape(label)}</th>{"".join(pictures)}')
    return f'<table class="grid"><thead><tr><td></td>{head}</tr></thead><tbody>{_rows(rows)}</tbody></table>'


def _cell(cell: Cell, place: str) -> str:
    lines = "".join(f"<div>{escape(line)}</div>" for line in cell.caption)
    if cell.image is None:
        return f"<td>{lines}</td>"
    image = _opened(cell.image)
    alt = escape(". ".join([place, *cell.caption]))
    size = f'width="{image.width}" height="{image.height}"'
    return f'<td><img src="{_data_uri(image)}" alt="{alt}" {size}>{lines}</td>'


def _opened(image: Path | Image.Image) -> Image.Image:
    """An RGB picture of at most 512 px."""
    if isinstance(image, Path):
        try:
            with Image.open(image) as file:
                image_ = file.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is damaged or no picture"
            raise InputError(f"{image} cannot be shown ({reason}): make it again, or leave it out.") from None
    else:
        image_ = image.convert("RGB")
    image_.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
    return image_


def _data_uri(image: Image.Image) -> str:
    content = io.BytesIO()
    if max(image.size) <= _EXACT_SIDE:
        image.save(content, "png")
        return _base64("image/png", content.getvalue())
    image.save(content, "jpeg", quality=_JPEG_QUALITY, subsampling=0)
    return _base64("image/jpeg", content.getvalue())


def _base64(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _figure(figure: Figure) -> str:
    kind = "image/png" if figure.content.startswith(b"\x89PNG") else "image/svg+xml"
    return f'<img class="diagram" src="{_base64(kind, figure.content)}" alt="{escape(figure.alt)}">'


_SIGNS = {"confirmed": "\N{CHECK MARK}", "not confirmed": "?", "contradicted": "\N{MULTIPLICATION X}"}


def _claims(claims: Claims) -> str:
    difference, no_face = CLAIMS.values()
    names = ("Claim", "Verdict", difference, "", no_face)
    head = "".join(f'<th scope="col">{name}</th>' if name else "<td></td>" for name in names)
    rows = []
    for claim in claims.claims:
        estimate, bound = Estimate(*map(float, claim["difference"])), float(claim.get("bound", 0))
        kind, zero = claim["verdict"].replace(" ", "-"), claim.get("no_face_zero")
        rows.append(
            f'<th scope="row">{escape(claim["claim"])}</th><td class="verdict {kind}">'
            f'<span aria-hidden="true">{_SIGNS[claim["verdict"]]}</span> {claim["verdict"]}</td>'
            f'<td class="number">{_figures(estimate)}</td><td class="{kind}">{_bar(estimate, bound)}</td>'
            f'<td class="number">{_figures(Estimate(*map(float, zero))) if zero else ""}</td>'
        )
    return f'<table class="claims"><thead><tr>{head}</tr></thead><tbody>{_rows(rows)}</tbody></table>'


def _bar(estimate: Estimate, bound: float) -> str:
    """An interval beside the claim's bound, which stands in the middle; each bar has its own scale."""
    if any(map(math.isnan, estimate)):
        return ""
    reach = 1.1 * max(abs(end - bound) for end in estimate) or 1.0
    value, low, high = (f"{70 + 70 * (end - bound) / reach:.1f}" for end in estimate)
    return (
        '<svg class="bar" viewBox="0 0 140 20" width="140" height="20" aria-hidden="true">'
        '<line class="bound" x1="70" x2="70" y1="1" y2="19"/>'
        f'<line class="reach" x1="{low}" x2="{high}" y1="10" y2="10"/><circle cx="{value}" cy="10" r="4"/></svg>'
    )


# Nothing may be fetched and no script may run, whatever a text says.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1d1d1f; --soft: #5f6368; --line: #dcdfe3; --shade: #f6f7f9; --link: #0b57a4;
  --confirmed: #00694b; --open: #75580a; --contradicted: #b3401a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181b; --ink: #e8e8ea; --soft: #a3a8ae; --line: #363a40; --shade: #1f2226; --link: #86bdf4;
    --confirmed: #4cc9a0; --open: #dcb64c; --contradicted: #f59a72;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; }
h1 { font-size: clamp(1.5rem, 4vw, 2.2rem); line-height: 1.2; margin: 1rem 0; }
h2 { font-size: 1.3rem; margin: 3rem 0 0.5rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
p { max-width: 44rem; margin: 0.5rem 0 1rem; }
.summary { font-size: 1.1rem; }
.note { color: var(--soft); font-size: 0.85rem; margin-top: 0.4rem; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; padding: 0; list-style: none; }
.scroll { overflow-x: auto; margin: 1rem 0 0; }
.scroll:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { padding: 0.4rem 0.8rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
thead th { color: var(--soft); vertical-align: bottom; }
tbody tr:hover { background: var(--shade); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.interval { display: block; color: var(--soft); font-size: 0.78rem; }
tbody th { min-width: 7rem; }
.claims th[scope="row"] { font-weight: 400; min-width: 12rem; max-width: 34rem; }
.verdict { font-weight: 600; white-space: nowrap; }
.confirmed { color: var(--confirmed); }
.not-confirmed { color: var(--open); }
.contradicted { color: var(--contradicted); }
.bar { display: block; }
.bar .bound { stroke: var(--soft); stroke-dasharray: 2 2; }
.bar .reach { stroke: currentColor; stroke-width: 2.5; stroke-linecap: round; }
.bar circle { fill: currentColor; }
.grid th, .grid td { border: 0; padding: 0.3rem; font-size: 0.78rem; line-height: 1.35; }
.grid th[scope="row"] { position: sticky; left: 0; background: var(--paper); max-width: 9rem; min-width: 6rem; }
.grid td { color: var(--soft); font-variant-numeric: tabular-nums; }
.grid img { display: block; width: 8rem; height: auto; border-radius: 4px; margin-bottom: 0.2rem; }
.diagram { display: block; width: 44rem; max-width: max(100%, 28rem); background: #fff; border-radius: 6px; }
@media (max-width: 40rem) {
  .grid img { width: 6rem; }
  th, td { padding: 0.35rem 0.5rem; }
}"""
