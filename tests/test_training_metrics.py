"""The numbers that a run leaves: means over steps, read late, in a file that goes on where the run does."""

from pathlib import Path

import jax
import numpy as np
import pytest

from infinite_id_jax.training import metrics
from infinite_id_jax.training.metrics import COLUMNS, Logs, MetricsFile, Window
from infinite_id_jax.training.step import BINS, Metrics


def numbers(step: int) -> Metrics:
    errors, rows = np.zeros(BINS, np.float32), np.zeros(BINS, np.float32)
    errors[[0, step % 3 + 1]], rows[[0, step % 3 + 1]] = (6 * step, step), (3, 1)
    return jax.device_put(
        Metrics(np.float32(step), np.float32(10 * step), errors, rows, np.int32(-1 if step < 8 else 7))
    )


class Clock:
    """Stands for the module `time`: seconds pass where a test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def test_rows_are_means_read_late(clock):
    window = Window(every=3, images=8, devices=4, peak=1e12, delay=2)
    rows = {}
    for step in range(1, 6):
        clock.seconds += 100 if step == 1 else 2  # the first compiles
        rows[step] = window.add(step, numbers(step), waited=0.25, flops=step * 1e9)
    assert [step for step, new in rows.items() if new] == [5]  # two steps late
    (row,) = rows[5]
    assert row["step"] == 3
    assert row["loss"] == 2
    assert row["grad_norm"] == 20
    assert row["failed_at"] == -1
    errors = {name: value for name, value in row.items() if name.startswith("loss_t")}
    assert errors == {"loss_t0": 4, "loss_t1": 3, "loss_t2": 1, "loss_t3": 2}  # bins without rows are absent
    assert row["images_per_second"] == 8 / 2  # of the second and third step: the first starts the clock
    assert row["data_wait"] == 0.25 / 2
    assert row["tflops"] == pytest.approx((2 + 3) * 1e9 / (2 * 2) / 4 / 1e12)
    assert row["mfu"] == pytest.approx(row["tflops"])

    assert window.add(6, numbers(6), waited=0.0, flops=1.0) == []
    clock.seconds += 1
    six, seven = window.add(7, numbers(7), waited=0.0, flops=1.0, now=True)  # one as always, one closed by `now`
    assert (six["step"], six["loss"]) == (6, 5)
    assert (seven["step"], seven["loss"], seven["data_wait"]) == (7, 7, 0)
    later = [row for step in range(8, 12) for row in window.add(step, numbers(step), waited=0.0, flops=1.0)]
    assert [(row["step"], row["loss"], row["failed_at"]) for row in later] == [(9, 8.5, 7)]


def test_what_is_no_step_is_not_timed(clock):
    """Validation, checkpoints and samples after every second step, in a row that is longer."""
    window, found = Window(every=4, images=8, devices=1, peak=None, delay=1), {}
    for step in range(1, 9):
        clock.seconds += 2
        for row in window.add(step, numbers(step), waited=0.5, flops=1.0, now=step % 2 == 0):
            found[row["step"]] = row.get("images_per_second"), row.get("data_wait")
        if step % 2 == 0:
            clock.seconds += 1000
            window.resume()
    # Steps 1 and 2 are known at once, when the clock starts.
    assert found == {2: (None, None), 4: (4.0, 0.25), 6: (4.0, 0.25), 8: (4.0, 0.25)}


def test_a_row_without_timed_steps_has_no_rates(clock, tmp_path, capsys):
    clock.seconds = 5.0
    logs = Logs(tmp_path, 0, 8, Window(every=1, images=8, devices=1, peak=1e12))
    for step in (1, 2):
        clock.seconds += 2
        logs.add(step, numbers(step), waited=9.0, flops=1.0, now=True)
    one, two = cells(tmp_path / "metrics.csv")
    assert (one["loss"], one["images_per_second"], one["tflops"], one["mfu"], one["data_wait"]) == ("1.0", *[""] * 4)
    assert (two["images_per_second"], two["data_wait"]) == ("4.0", "1.0")  # more waited than the clock shows: at most 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "step 1/8: loss 1.0000, 0:00:14 left"
    assert "loss 2.0000, 4.0 images/s, data 100%" in second


def test_the_share_of_the_peak_is_left_out_where_it_is_unknown(clock):
    window = Window(every=1, images=1, devices=1, peak=None)
    window.resume()
    clock.seconds += 1
    row = window.add(1, numbers(1), waited=0.0, flops=1.0, now=True)[0]
    assert row["images_per_second"] == 1
    assert "mfu" not in row


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


def test_metrics_of_fewer_columns_are_gone_on_with(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n1,0.5\n2,0.25\n")
    MetricsFile(path, 2).write({"step": 3, "loss": 0.125})
    assert [(row["step"], row["loss"]) for row in cells(path)] == [("1", "0.5"), ("2", "0.25"), ("3", "0.125")]


def test_validation_joins_the_row_of_its_step(clock, tmp_path):
    logs = Logs(tmp_path, 0, 8, Window(every=4, images=8, devices=1, peak=None, delay=0))
    cost, asked = {"waited": 0.0, "flops": 1.0}, []

    def held_out() -> dict[str, float]:
        asked.append(clock.seconds)
        clock.seconds += 1000
        return {"validation_loss": 0.1, "validation_other_person": 0.2, "validation_no_identity": 0.3}

    assert logs.add(1, numbers(1), **cost) is None
    clock.seconds += 2
    assert logs.add(2, numbers(2), **cost, now=True, held_out=held_out) is None
    assert logs.add(8, numbers(8), **cost, now=True, held_out=held_out) == 7  # the step that failed
    assert asked == [2.0]  # after a failure no more
    two, eight = cells(tmp_path / "metrics.csv")
    assert (two["step"], two["loss"], two["validation_other_person"]) == ("2", "1.5", "0.2")
    assert two["images_per_second"] == "4.0"  # timed before it validates
    assert (eight["step"], eight["loss"], eight["validation_loss"], eight["mfu"]) == ("8", "8.0", "", "")
