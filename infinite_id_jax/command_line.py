"""How the programs begin and end: compiled programs kept; an exit code, and one sentence for what a user can mend."""

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from infinite_id_jax.errors import InputError

INTERRUPTED = 130


def keep_compiled(folder: Path | None = None) -> None:
    """Let JAX keep what it compiles, so that the same run starts sooner the next time.

    In `folder`, or where caches of a user belong ($XDG_CACHE_HOME, ~/.cache). What the user told JAX about it stands
    (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE); a folder that cannot be written is left alone. JAX keeps
    no program that calls back, such as one that reports its steps.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "infinite_id_jax" / "compiled"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))


def exit_code(run: Callable[[], int], *, debug: bool, interrupted: str, smaller: str) -> int:
    """`run()`, or what its error stands for; `debug` shows tracebacks. Warnings are lines of text meanwhile.

    `interrupted` is said after Ctrl-C, `smaller` is the cure for a full memory.
    """
    try:
        with _messages_as_lines():
            return run()
    except KeyboardInterrupt:
        print(f"\nInterrupted: {interrupted}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, InputError):
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            print(f"error: The memory is full: {smaller}", file=sys.stderr)
            return InputError.exit_code
        print(f"error: {type(error).__name__}: {error} (this is a defect; --debug shows where)", file=sys.stderr)
        return 1


@contextlib.contextmanager
def _messages_as_lines() -> Iterator[None]:
    """Warnings and log messages as one line each, for a person to read."""
    logging.basicConfig(format="note: %(message)s", level=logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        yield
