"""The trainings as curves, and what each cost: python -m miniature.curves FOLDER PICTURE TABLE."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

from infinite_id_jax.files import replacing


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """{part: lines of its curve.jsonl} of all parts that were trained."""
    return {
        path.parent.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("*/curve.jsonl"))
    }


def seconds(lines: list[dict[str, Any]]) -> float:
    """The time that a training took; each going on began to count anew."""
    total, before = 0.0, 0.0
    for line in lines:
        total += line["seconds"] - before if line["seconds"] >= before else line["seconds"]
        before = line["seconds"]
    return total


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
        writer.writerow(["part", "steps", "minutes", "last figures"])
        for name, lines in parts.items():
            last = {key: value for key, value in lines[-1].items() if key not in ("step", "seconds", "gradient")}
            said = ", ".join(f"{key} {value:.3g}" for key, value in last.items())
            writer.writerow([name, lines[-1]["step"], round(seconds(lines) / 60, 1), said])
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
