"""The numbers that a run leaves: means over steps, read late, in a file that goes on where the run does."""

from pathlib import Path

import jax
import numpy as np
import pytest

from infinite_id_jax.training.metrics import COLUMNS, Logs, MetricsFile, Window
from infinite_id_jax.training.step import BINS, Metrics


def numbers(step: int) -> Metrics:
    errors, rows = np.zeros(BINS, np.float32), np.zeros(BINS, np.float32)
    errors[[0, step % 3 + 1]], rows[[0, step % 3 + 1]] = (6 * step, step), (3, 1)
    return jax.device_put(
        Metrics(np.float32(step), np.float32(10 * step), errors, rows, np.int32(-1 if step < 8 else 7))
    )


def test_rows_are_means_read_late():
    window = Window(every=3, images=8, devices=4, peak=1e12, delay=2)
    rows = {step: window.add(step, numbers(step), waited=0.25, flops=step * 1e9) for step in range(1, 6)}
    assert [step for step, new in rows.items() if new] == [5]  # two steps late
    (row,) = rows[5]
    assert row["step"] == 3
    assert row["loss"] == 2
    assert row["grad_norm"] == 20
    assert row["failed_at"] == -1
    errors = {name: value for name, value in row.items() if name.startswith("loss_t")}
    assert errors == {"loss_t0": 4, "loss_t1": 3, "loss_t2": 1, "loss_t3": 2}  # bins without rows are absent
    assert row["data_wait"] == 1.0  # more waited than the clock shows: never above 1
    assert row["tflops"] * 1e12 * 4 / row["images_per_second"] == pytest.approx((1 + 2 + 3) * 1e9 / (3 * 8))
    assert row["mfu"] == pytest.approx(row["tflops"])

    assert window.add(6, numbers(6), waited=0.0, flops=1.0) == []
    six, seven = window.add(7, numbers(7), waited=0.0, flops=1.0, now=True)  # one as always, one closed by `now`
    assert (six["step"], six["loss"]) == (6, 5)
    assert (seven["step"], seven["loss"], seven["data_wait"]) == (7, 7, 0)
    later = [row for step in range(8, 12) for row in window.add(step, numbers(step), waited=0.0, flops=1.0)]
    assert [(row["step"], row["loss"], row["failed_at"]) for row in later] == [(9, 8.5, 7)]


def test_the_share_of_the_peak_is_left_out_where_it_is_unknown():
    window = Window(every=1, images=1, devices=1, peak=None)
    assert "mfu" not in window.add(1, numbers(1), waited=0.0, flops=1.0, now=True)[0]


def cells(path: Path) -> list[dict[str, str]]:
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS)
    return [dict(zip(COLUMNS, line.split(","), strict=True)) for line in lines[1:]]


def test_a_resumed_run_continues_its_metrics(tmp_path):
    """Rows behind the checkpoint go, and so does a row that a kill cut short; then new ones join."""
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, 0)
    for step in (1, 2, 3):
        file.write({"step": step, "loss": step / 10, "validation_loss": 0.5})
    whole = path.read_bytes()
    MetricsFile(path, 2).write({"step": 3, "loss": 7})
    assert [(row["step"], row["loss"]) for row in cells(path)] == [("1", "0.1"), ("2", "0.2"), ("3", "7")]
    assert cells(path)[1]["validation_loss"] == "0.5"
    assert cells(path)[2]["validation_loss"] == ""
    third = whole.index(b"\n3,") + 1
    for cut in range(third, len(whole)):
        path.write_bytes(whole[:cut])
        MetricsFile(path, 2)
        assert path.read_bytes() == whole[:third]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.csv"]


def test_validation_joins_the_row_of_its_step(tmp_path):
    logs = Logs(tmp_path, 0, 8, Window(every=4, images=8, devices=1, peak=None))
    cost = {"waited": 0.0, "flops": 1.0}
    assert logs.add(1, numbers(1), **cost) is None
    held = {"validation_loss": 0.1, "validation_other_person": 0.2, "validation_no_identity": 0.3}
    assert logs.add(2, numbers(2), **cost, now=True, held_out=held) is None
    assert logs.add(8, numbers(8), **cost, now=True) == 7  # the step that failed
    two, eight = cells(tmp_path / "metrics.csv")
    assert (two["step"], two["loss"], two["validation_other_person"]) == ("2", "1.5", "0.2")
    assert (eight["step"], eight["loss"], eight["validation_loss"], eight["mfu"]) == ("8", "8.0", "", "")
