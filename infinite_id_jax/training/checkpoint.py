"""Checkpoints: the training state and what it was trained on, whole or not there, written in the background."""

import contextlib
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from infinite_id_jax.errors import InputError
from infinite_id_jax.training.state import TrainState


class Trained(NamedTuple):
    """What a checkpoint holds of an adapter, without the optimiser."""

    adapter: dict[str, np.ndarray]  # {PyTorch key: array in our layout}: the average where one is kept
    step: int
    run: dict[str, Any]  # the `run` of `Checkpoints`
    folder: Path  # of the run: metrics.csv is there


def find_checkpoint(path: Path) -> Path | None:
    """The folder of one checkpoint: `path`, or the newest below a run's output folder; None if there is none."""
    if _is_checkpoint(path):
        return path
    for folder in (path / "checkpoints", path):
        steps = [child for child in folder.glob("*") if child.name.isdigit() and _is_checkpoint(child)]
        if steps:
            return max(steps, key=lambda child: int(child.name))
    return None


def _is_checkpoint(path: Path) -> bool:
    return (path / "state").is_dir() and (path / "run").is_dir()


def read_trained(checkpoint: Path) -> Trained:
    """The adapter of one checkpoint. Raises InputError if it is damaged."""
    _quieten()
    try:
        run = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(checkpoint.absolute() / "run")
        handler = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        state = checkpoint.absolute() / "state"
        known: Any = handler.metadata(state).item_metadata
        arrays = "ema" if known.tree.get("ema") else "adapter"
        wanted = {name: jax.tree.map(lambda _: 0, known.tree[name]) for name in (arrays, "step")}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
        found = handler.restore(state, args=arguments)
    except Exception as error:  # Orbax and its stores raise many kinds
        raise InputError(_damaged(checkpoint, error)) from None
    folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    return Trained(dict(found[arrays]), int(found["step"]), run, folder)


def _quieten() -> None:
    for name in ("absl", "asyncio"):  # by which Orbax logs each step it takes, and again what it raises
        logging.getLogger(name).setLevel(logging.CRITICAL)


class Checkpoints:
    """The newest `keep` checkpoints of one run, by the number of steps taken.

    A checkpoint holds the adapter, its average, the optimiser and the step (from which noise and data follow), and
    `run`: what all of it belongs to. The frozen base is not in it.
    """

    def __init__(self, folder: Path, keep: int, run: Mapping[str, Any]):
        _quieten()
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
            if "RESOURCE_EXHAUSTED" in str(error):
                raise
            if changes:
                raise InputError(
                    f"The state in the checkpoint {path} has another shape ({changes}), or is damaged: of the settings "
                    "that shape it give the old ones, or take another --output-dir to start anew."
                ) from None
            raise InputError(_damaged(path, error)) from None

    def wait(self) -> None:
        """Until everything is on disk. Raises InputError if it could not be written."""
        with _told(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait as well. Raises InputError if something could not be written, unless an error is on its way already."""
        with contextlib.suppress(Exception) if sys.exc_info()[0] else _told(self._folder):
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
    return f"The checkpoint {path} cannot be read ({reason}): move that folder away to go on from the one before it."


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Every way in which Orbax reports what it could not write, as one sentence."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, jax.errors.JaxRuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"Checkpoints cannot be written to {folder} ({reason}): see that there is space and that all processes are "
            "there, then the same command goes on."
        ) from None
