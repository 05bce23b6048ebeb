"""Several processes as one run: how they find each other, and that all of them see the same."""

import contextlib
import json
import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from infinite_id_jax.errors import InputError

_PATIENCE = 30  # seconds until a network file system shows what another host made


def join(*, automatic: bool, coordinator: str | None, count: int | None, number: int | None) -> None:
    """Join the other processes, before any device is touched: `count` that meet at `coordinator`, this one `number` of
    them, or `automatic`ally as SLURM, Kubernetes or the TPU pod says.

    Raises InputError where copies of a program would each train for itself in one folder.
    """
    if coordinator is not None:
        try:
            jax.distributed.initialize(coordinator, count, number, local_devices())
        except (ValueError, IndexError) as error:
            raise InputError(
                f"--coordinator {coordinator} is to be HOST:PORT, with --num-processes N and, in each process another, "
                "--process-id from 0 to N - 1."
            ) from error
    elif automatic:
        jax.distributed.initialize(local_device_ids=local_devices())
    elif count is not None or number is not None:
        raise InputError("--num-processes and --process-id need --coordinator HOST:PORT, where the processes meet.")
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise InputError("srun starts this program several times: add --distributed, or each would train for itself.")


def local_devices() -> list[int] | None:
    """What this process takes of its host's GPUs, for JAX: all of them (an empty list restricts nothing) where SLURM
    runs one task a node, to which JAX by itself would give one; else, None, what JAX does by itself.
    """
    tasks, nodes = (os.environ.get(f"SLURM_{name}") for name in ("NTASKS", "STEP_NUM_NODES"))
    return [] if tasks is not None and tasks == nodes and "JAX_LOCAL_DEVICE_IDS" not in os.environ else None


def check_shared(path: Path) -> None:
    """Wait for each other at a folder that the first process makes. Raises InputError in all if one does not see it."""
    if jax.process_count() == 1:
        return
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):
            path.mkdir(parents=True, exist_ok=True)
    multihost_utils.sync_global_devices("the output folder")
    end = time.monotonic() + _PATIENCE
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.5)
    if unseen := np.flatnonzero(~_of_all(np.bool_(path.exists()))).tolist():
        raise InputError(f"{path} is not there in process {unseen}: name an output folder that all processes share.")


def check_agreement(things: Mapping[str, Any]) -> None:
    """Raises InputError in all processes if something, by its name, is not the same everywhere. The names must be.

    A process that alone went another way would leave the others waiting for it.
    """
    here = [zlib.crc32(json.dumps(thing, sort_keys=True, default=str).encode()) for thing in things.values()]
    everywhere = _of_all(np.array(here, np.uint32))
    differing = [name for name, column in zip(things, everywhere.T, strict=True) if len(set(column.tolist())) > 1]
    if differing:
        raise InputError(
            f"The processes differ in {', '.join(differing)}: give all of them the same command and files, and an "
            "output folder that they share."
        )


def _of_all(value: np.ndarray | np.bool_) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(value)).reshape(jax.process_count(), *np.shape(value))
