"""The numbers of a run: gathered without waiting for the device, written as CSV and, where asked, to TensorBoard."""

import csv
import datetime
import importlib.util
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from infinite_id_jax.errors import InputError, MissingExtraError
from infinite_id_jax.files import replacing
from infinite_id_jax.training.step import BINS, Metrics

COLUMNS = (
    "step", "loss", "grad_norm", *(f"loss_t{i}" for i in range(BINS)),
    "images_per_second", "tflops", "mfu", "data_wait",
    "validation_loss", "validation_other_person", "validation_no_identity",
)  # fmt: skip
"""Of metrics.csv. loss: mean over the steps since the row before; loss_t0..t9: its error by tenth of the timesteps,
the least noisy first; tflops: 10^12 floating-point operations a second on one device; mfu: their share of its peak;
data_wait: share of the time that the first process waited for data; validation: with the right identity, another's, and
none. Time is that of steps (see `Window`): a row of steps that were not timed leaves its columns empty."""


class MetricsFile:
    """`metrics.csv`: a row as soon as it is known; a run that is resumed drops the rows after its checkpoint."""

    def __init__(self, path: Path, step: int):
        self._path = path
        kept = [row for row in _rows(path) if int(row["step"]) <= step]
        with replacing(path) as beside, beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(kept)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; columns it lacks stay empty."""
        try:
            with self._path.open("a", newline="") as file:
                csv.DictWriter(file, COLUMNS).writerow(row)
        except OSError as error:
            raise InputError(f"{self._path} cannot be written ({error.strerror}): free some space there.") from None


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        # A kill can leave the last row cut short; an older version may have had fewer columns.
        whole = [row for row in csv.DictReader(file) if None not in row and None not in row.values() and "step" in row]
        return [{name: row.get(name, "") for name in COLUMNS} for row in whole]


def check_extras(*, tensorboard: bool, wandb: str | None) -> None:
    """Raises MissingExtraError where what these writers need is not installed, before anything is loaded."""
    if tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise MissingExtraError("TensorBoard (run.tensorboard)", "tensorboard")
    if wandb is not None and importlib.util.find_spec("wandb") is None:
        raise MissingExtraError("Weights & Biases (run.wandb)", "wandb")


class TensorBoard:
    """The same rows as event files."""

    def __init__(self, folder: Path, step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in row.items():
            if name != "step" and np.isfinite(value):
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()


class WeightsAndBiases:
    """The same rows to a wandb project, which the user must have asked for: it calls the network."""

    def __init__(self, project: str, folder: Path, step: int):
        import wandb  # pyright: ignore[reportMissingImports]

        kept = folder / "wandb_run"  # by which a resumed run finds its own; wandb drops steps that it has seen
        if step == 0 or not kept.is_file():
            with replacing(kept) as beside:
                beside.write_text(secrets.token_hex(8))
        self._run = wandb.init(
            project=project, name=folder.name, id=kept.read_text(), dir=str(folder.absolute()), resume="allow"
        )

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])


class Terminal:
    """A line for each row, with the time that is left at this pace."""

    def __init__(self, step: int, steps: int):
        self._first, self._steps, self._start = step, steps, time.perf_counter()

    def write(self, row: Mapping[str, Any]) -> None:
        taken = row["step"] - self._first
        left = (time.perf_counter() - self._start) / taken * (self._steps - row["step"])
        parts = [f"loss {row['loss']:.4f}"]
        if "images_per_second" in row:
            parts += [f"{row['images_per_second']:.1f} images/s", f"data {row['data_wait']:.0%}"]
        parts += [f"held out {row['validation_loss']:.4f}"] if "validation_loss" in row else []
        parts += [f"{datetime.timedelta(seconds=round(left))} left"]
        print(f"step {row['step']}/{self._steps}: {', '.join(parts)}", file=sys.stderr, flush=True)


class _Step(NamedTuple):
    step: int
    metrics: Metrics
    waited: float
    flops: float
    seconds: float = 0.0  # those that became known together took as long each; 0: not timed


class Window:
    """Gathers steps into rows without holding up the device: it is read `delay` steps late.

    Its clock starts when the first step is known, which leaves out what is compiled for it, and anew at `resume`.
    images: of one step. devices: that share it. peak: floating-point operations of one of them a second, None where
    unknown.
    """

    def __init__(self, *, every: int, images: int, devices: int, peak: float | None, delay: int = 2):
        self._every, self._images, self._devices, self._peak, self._delay = every, images, devices, peak, delay
        self._pending: deque[_Step] = deque()
        self._open: list[_Step] = []  # known, of the next row
        self._read: float | None = None  # when the last ones became known, or the clock was started anew

    def add(
        self, step: int, metrics: Metrics, *, waited: float, flops: float, now: bool = False
    ) -> list[dict[str, Any]]:
        """Take the step that made `step` steps, which waited so many seconds for its data and took so many operations
        on all devices; returns the rows complete so far. `now` waits for the device and closes a row here.
        """
        self._pending.append(_Step(step, metrics, waited, flops))
        due = len(self._pending) if now else max(0, len(self._pending) - self._delay)
        known = [self._pending.popleft() for _ in range(due)]
        # Waiting here also keeps the host from queueing batches without end.
        known = [one._replace(metrics=jax.device_get(one.metrics)) for one in known]
        end, begin = time.perf_counter(), self._read
        rows = []
        for one in known:
            self._open.append(one if begin is None else one._replace(seconds=(end - begin) / len(known)))
            if one.step % self._every == 0 or (now and one.step == step):
                rows.append(self._row(self._open))
                self._open = []
        self._read = end if known else self._read
        return rows

    def resume(self) -> None:
        """Start the clock anew, after an `add` with `now` and what is no part of a step, such as validation."""
        self._read = time.perf_counter()

    def _row(self, steps: list[_Step]) -> dict[str, Any]:
        values = [one.metrics for one in steps]
        errors: Any = np.sum([value.error_by_bin for value in values], axis=0, dtype=np.float64)
        counts: Any = np.sum([value.rows_by_bin for value in values], axis=0, dtype=np.float64)
        row = {
            "step": steps[-1].step,
            "loss": float(np.mean([value.loss for value in values], dtype=np.float64)),
            "grad_norm": float(np.mean([value.grad_norm for value in values], dtype=np.float64)),
            "failed_at": int(values[-1].failed_at),
        }
        row |= {f"loss_t{i}": errors[i] / counts[i] for i in range(BINS) if counts[i] > 0}
        return row | self._rates([one for one in steps if one.seconds > 0])

    def _rates(self, timed: list[_Step]) -> dict[str, float]:
        """Of the steps that were timed; nothing where none was."""
        if not timed:
            return {}
        seconds = sum(one.seconds for one in timed)
        flops = sum(one.flops for one in timed) / seconds / self._devices
        rates = {
            "images_per_second": self._images * len(timed) / seconds,
            "tflops": flops / 1e12,
            "data_wait": min(1.0, sum(one.waited for one in timed) / seconds),
        }
        return rates if self._peak is None else rates | {"mfu": flops / self._peak}


class Logs:
    """Where the rows of a run go: metrics.csv always, TensorBoard and wandb where asked, a line to the terminal."""

    def __init__(
        self,
        folder: Path,
        step: int,
        steps: int,
        window: Window,
        *,
        tensorboard: bool = False,
        wandb: str | None = None,
    ):
        """`step`: steps taken before, of `steps`. Only the first of several processes writes."""
        self._window = window
        self._writers: list[Any] = []
        if jax.process_index() > 0:
            return
        self._writers += [MetricsFile(folder / "metrics.csv", step), Terminal(step, steps)]
        if tensorboard:
            self._writers.append(TensorBoard(folder / "tensorboard", step))
        if wandb is not None:
            self._writers.append(WeightsAndBiases(wandb, folder, step))

    def add(
        self,
        step: int,
        metrics: Metrics,
        *,
        waited: float,
        flops: float,
        now: bool = False,
        held_out: Callable[[], Mapping[str, float]] | None = None,
    ) -> int | None:
        """Take a step (see `Window.add`) and write what is known. With `now`, what `held_out` gives once the steps are
        timed joins the row of this step; it is not asked after a loss that was not finite.

        Returns the step at which the loss failed to be finite, None while there is none.
        """
        rows = self._window.add(step, metrics, waited=waited, flops=flops, now=now)
        failed = [at for row in rows if (at := row.pop("failed_at")) >= 0]
        if held_out and not failed:
            rows[-1] |= held_out()
        for row in rows:
            for writer in self._writers:
                writer.write(row)
        return failed[-1] if failed else None
