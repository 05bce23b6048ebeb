"""Seconds and peak memory of the phases of a process, and processes of one's own to measure in (Linux)."""

import dataclasses
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

PROCESS_STATUS = Path("/proc/self/status")


@dataclasses.dataclass
class Phase:
    """Seconds of each run, and the peaks of memory in bytes over all of them."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    resident: int = 0
    anonymous: int = 0  # without the pages of mapped files
    anonymous_before: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Meter:
    """Times phases of this process, and samples its memory every 5 ms in a thread."""

    def __init__(self) -> None:
        self.phases: dict[str, Phase] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase that is entered again counts as one more run of it."""
        first = name not in self.phases
        phase = self.phases.setdefault(name, Phase())
        if first:
            phase.anonymous_before = process_memory()[1]
        done = threading.Event()
        sampler = threading.Thread(target=_sample, args=(phase, done))
        sampler.start()
        start = time.perf_counter()
        try:
            yield
            phase.seconds.append(time.perf_counter() - start)
        finally:
            done.set()
            sampler.join()


def _sample(phase: Phase, done: threading.Event) -> None:
    last = False
    while not last:
        last = done.wait(0.005)
        resident, anonymous = process_memory()
        phase.resident = max(phase.resident, resident)
        phase.anonymous = max(phase.anonymous, anonymous)


def process_memory() -> tuple[int, int]:
    """Bytes of this process in memory: all of them, and those behind which there is no file."""
    fields = dict(line.split(":", 1) for line in PROCESS_STATUS.read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["RssAnon"].split()[0]) * 1024


def in_fresh_process(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)` in a new process, whose memory is its own and goes back when it ends."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()
