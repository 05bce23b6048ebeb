"""Checkpoints: the training state and what it was trained on, whole or not there, written in the background."""

import contextlib
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from infinite_id_jax.errors import InputError
from infinite_id_jax.training.state import TrainState


class Checkpoints:
    """The newest `keep` checkpoints of one run, by the number of steps taken.

    A checkpoint holds the adapter, its average, the optimiser and the step (from which noise and data follow), and
    `run`: what all of it belongs to. The frozen base is not in it.
    """

    def __init__(self, folder: Path, keep: int, run: Mapping[str, Any]):
        for name in ("absl", "asyncio"):  # by which Orbax logs each step it takes, and again what it raises
            logging.getLogger(name).setLevel(logging.CRITICAL)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        with _told(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        self._folder = folder
        self._run = dict(run)

    def latest(self) -> int | None:
        """Steps taken at the newest whole checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int) -> None:
        """Begin to write; returns as soon as the arrays are copied. Does nothing if this step is there already.

        Raises InputError if this or an earlier one could not be written.
        """
        if step in self._manager.all_steps():
            return
        # Before, because what Orbax has begun to write fails in many threads, which all print.
        needed, free = sum(x.nbytes for x in jax.tree.leaves(state)), shutil.disk_usage(self._folder).free
        if free < needed:
            raise InputError(
                f"A checkpoint of {needed / 2**20:,.0f} MiB does not fit into {self._folder}, where "
                f"{free / 2**20:,.0f} MiB are free: free some space there, then the same command goes on."
            )
        with _told(self._folder):
            content = {"state": ocp.args.StandardSave(state), "run": ocp.args.JsonSave(self._run)}
            self._manager.save(step, args=ocp.args.Composite(**content))

    def restore(self, abstract: TrainState, *, allow_change: bool = False) -> TrainState:
        """The newest checkpoint in the shapes, dtypes and places of `abstract`, whatever devices wrote it.

        Raises InputError if it is damaged or belongs to another run; with `allow_change` the latter is a UserWarning.
        """
        step = self._manager.latest_step()
        path = self._folder / str(step)
        try:
            run = self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        except Exception as error:  # Orbax and its stores raise many kinds
            raise InputError(_damaged(path, error)) from None
        changes = differences(run, self._run)
        if changes and not allow_change:
            raise InputError(
                f"The checkpoint {path} is of another run: {changes}. Give the old settings, another --output-dir to "
                "start anew, or --allow-change to go on with the new ones."
            )
        if changes:
            warnings.warn(f"The run goes on although {changes}.", UserWarning, stacklevel=2)
        try:
            content = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            return self._manager.restore(step, args=content)["state"]
        except Exception as error:
            raise InputError(_damaged(path, error)) from None

    def wait(self) -> None:
        """Until everything is on disk. Raises InputError if it could not be written."""
        with _told(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        with _told(self._folder):
            self._manager.close()


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two descriptions of a run, "" if nothing."""
    saved, now = dict(_flat(saved)), dict(_flat(now))
    return "; ".join(
        f"{key} was {saved.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    )


def put_aside(folder: Path) -> None:
    """Give the checkpoints and metrics of an earlier run in `folder` other names, so that nothing is lost."""
    number = 1
    while any((folder / f"{name}.{number}").exists() for name in ("checkpoints", "metrics.csv")):
        number += 1
    for name in ("checkpoints", "metrics.csv"):
        with contextlib.suppress(FileNotFoundError):
            (folder / name).rename(folder / f"{name}.{number}")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def _damaged(path: Path, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"The checkpoint {path} cannot be read ({reason}): remove that folder to go on from the one before it."


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Every way in which Orbax reports a disk that does not take a file, as one sentence."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, jax.errors.JaxRuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"Checkpoints cannot be written to {folder} ({reason}): free space there, and the same command goes on."
        ) from None
