"""The trainings as curves, and what each cost: python -m miniature.curves FOLDER PICTURE TABLE."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from configs.miniature import config
from infinite_id_jax.files import replacing

_BATCH = config.data.batch_size  # of the adapters


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """{part: lines} of all parts that were trained here, and of the adapters, whose metrics.csv train.py writes."""
    parts = {
        path.parent.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("*/curve.jsonl"))
    }
    for path in sorted(folder.glob("*/metrics.csv")):
        with path.open(newline="") as file:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
        parts[path.parent.name] = [row for row in rows if "loss" in row]
    return parts


def minutes(lines: list[dict[str, Any]], batch_size: int) -> float:
    """What a training took: of each run, which began at some step, the longest time; or by images a second."""
    rates = [line for line in lines if "images_per_second" in line]  # a first step, with its compilation, has none
    if rates:
        steps = np.diff([0, *(line["step"] for line in rates)])
        return float(sum(n * batch_size / line["images_per_second"] for n, line in zip(steps, rates, strict=True))) / 60
    runs: dict[int, float] = {}
    for line in lines:
        began = line.get("began", 0)
        runs[began] = max(runs.get(began, 0.0), line["seconds"])
    return sum(runs.values()) / 60


def main(folder: Path, picture: Path, table: Path) -> int:
    from matplotlib.figure import Figure

    parts = read(folder)
    figure = Figure((10, 2.2 * -(-len(parts) // 3)), layout="constrained")
    axes = figure.subplots(-(-len(parts) // 3), 3, squeeze=False).ravel()
    for axis, (name, lines) in zip(axes, parts.items(), strict=False):
        axis.plot([line["step"] for line in lines], [line["loss"] for line in lines], color="#0072B2", linewidth=1)
        axis.set(title=name, xlabel="step", ylabel="loss")
    for axis in axes[len(parts) :]:
        axis.set_axis_off()
    with replacing(picture) as beside:
        figure.savefig(beside, format="png", dpi=100)
    with replacing(table) as beside, beside.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["part", "steps", "minutes", "loss at the end"])
        for name, lines in parts.items():
            writer.writerow(
                [name, int(lines[-1]["step"]), round(minutes(lines, _BATCH), 1), f"{lines[-1]['loss']:.4g}"]
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
