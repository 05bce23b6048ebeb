"""A trace of some steps, for TensorBoard's profiler or Perfetto."""

from pathlib import Path
from typing import Any

import jax


class Profile:
    """Traces the steps `first` to before `end`; None traces nothing."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self._folder, self._steps, self._tracing = folder, steps, False

    def before(self, step: int, state: Any) -> None:
        """To be called before each step with the state it starts from, which the end of the trace waits for."""
        if self._steps is None:
            return
        first, end = self._steps
        if first <= step < end and not self._tracing:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        elif step >= end and self._tracing:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """End the trace, where one runs."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
