"""The words, tables and claims of a report in Markdown, for documents; its pictures stay on its page."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from infinite_id_jax.evaluation.metrics import Estimate
from infinite_id_jax.evaluation.report import CLAIMS, Claims, Report, Table, figure_text
from infinite_id_jax.files import replacing

_NONE = (float("nan"),) * 3


def write_markdown(folder: Path, report: Report) -> Path:
    """Write `tables.md` into a folder: the sections that have tables or claims."""
    parts = [f"# {_plain(report.title)}", _plain(report.summary)]
    for section in report.sections:
        told = [block for block in section.blocks if isinstance(block, Table | Claims)]
        parts += [f"## {_plain(section.title)}", _plain(section.text)] if told else []
        for block in told:
            table = _claims(block) if isinstance(block, Claims) else _table(block.header, block.rows)
            parts += [table, _plain(block.note)]
    path = folder / "tables.md"
    with replacing(path) as beside:
        beside.write_text("\n\n".join(filter(None, parts)) + "\n", encoding="utf-8", errors="replace")
    return path


def _claims(block: Claims) -> str:
    rows = [
        (each["claim"], each["verdict"], *(Estimate(*map(float, each.get(name, _NONE))) for name in CLAIMS))
        for each in block.claims
    ]
    return _table(("Claim", "Verdict", *CLAIMS.values()), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str | int | float | Estimate]]) -> str:
    lines = [
        [_plain(name) for name in header],
        ["---"] * len(header),
        *([_cell(value) for value in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: str | int | float | Estimate) -> str:
    text, spread = (value, "") if isinstance(value, str) else figure_text(value)
    return _plain(f"{text} ({spread})" if spread else text)


def _plain(text: str) -> str:
    """On one line, and nothing but itself."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|")
