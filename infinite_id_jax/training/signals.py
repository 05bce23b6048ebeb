"""Stopping between two steps, so that the last one is saved."""

import signal
import sys
from types import FrameType

import jax


class StopSignals:
    """Hears SIGTERM (preemption) and Ctrl-C once; a second Ctrl-C stops at once, as Python does by itself.

    In a run of several processes it leaves signals alone: there the service of jax.distributed hears SIGTERM, to
    whichever process it was sent, and names one step to all.
    """

    def __enter__(self) -> "StopSignals":
        self._heard: int | None = None
        heard_here = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._before = {number: signal.signal(number, self._hear) for number in heard_here}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._heard is not None:
            raise KeyboardInterrupt
        self._heard = number
        print("Stopping after this step ...", file=sys.stderr, flush=True)

    def exit_code(self, step: int) -> int | None:
        """None to go on after `step` steps, or 128 + the signal; the same in all processes."""
        if jax.process_count() == 1:
            return None if self._heard is None else 128 + self._heard
        from jax.experimental import multihost_utils

        return 128 + signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
