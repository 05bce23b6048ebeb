"""From scored pictures to tables: a figure for each method and metric, and the files that hold them."""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infinite_id_jax.evaluation.metrics import Estimate, Scores, identity_fidelity, interval
from infinite_id_jax.files import replacing

Row = Mapping[str, Any]
"""A picture's scores: method, identity and group, prompt, style, file, and a number for each metric that it has."""

NAMES = ("method", "identity", "group", "prompt", "style", "text", "file")
FIDELITY = ("m_face", "clip_i")
STYLE = "prompted_style"  # a column of its own beside the mean of what else a prompt says


def as_scores(rows: Sequence[Row]) -> Scores:
    """The rows as columns, people clustered by the noise they share; nan where a row lacks a metric."""
    metrics = list(dict.fromkeys(name for row in rows for name in row if name not in NAMES))
    return Scores(
        method=np.array([row["method"] for row in rows]),
        identity=np.array([row["identity"] for row in rows]),
        cluster=np.array([row["group"] for row in rows]),
        values={
            name: np.array([np.nan if row.get(name) is None else row[name] for row in rows], np.float64)
            for name in metrics
        },
    )


def methods_table(rows: Sequence[Row]) -> dict[str, dict[str, Estimate]]:
    """{method: {metric: estimate}} over all prompts of each method; metrics nobody scored are left out."""
    scores, table = as_scores(rows), {}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = scores.of(method)
        estimates = {name: interval(column, own.cluster) for name, column in own.values.items()}
        table[method] = {name: each for name, each in estimates.items() if not np.isnan(each.value)}
    return table


def of_kind(rows: Iterable[Row], prompts: str) -> list[Row]:
    """The rows of a kind of prompt: all, photo or style (which is any other)."""
    return [row for row in rows if prompts == "all" or (row["style"] == "photo") == (prompts == "photo")]


def with_zero_for_no_face(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Adds the similarities that count 0 where no face was found."""
    return [
        {**row} | {no_face_zero(name): 0.0 if row[name] is None else row[name] for name in FIDELITY if name in row}
        for row in rows
    ]


def no_face_zero(metric: str) -> str:
    """The name of a similarity that counts 0 where no face was found."""
    return f"{metric}_no_face_zero"


def fidelity_and_semantics(rows: Sequence[Row], methods: Sequence[str]) -> dict[str, tuple[Estimate, Estimate]]:
    """Fig. 9: {method: (CLIP-T, mean z-score of M_Face and CLIP-I)}."""
    scores = as_scores([row for row in rows if row["method"] in methods])
    axis = identity_fidelity(scores, FIDELITY)
    return {name: (interval(scores.of(name).values["clip_t"], scores.of(name).cluster), axis[name]) for name in methods}


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """A line for each picture; empty where it was not scored."""
    metrics = list(dict.fromkeys(name for row in rows for name in row if name not in NAMES))
    with replacing(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*NAMES, *metrics], restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in row.items()})


def _cell(value: Any) -> Any:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def write_metrics(content: Mapping[str, Any], path: Path) -> None:
    """metrics.json; nan, which JSON has no word for, becomes null."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(_plain(content), indent=1) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float | np.floating):
        return None if np.isnan(value) else round(float(value), 6)
    return value
