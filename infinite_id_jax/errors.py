"""What a user can get wrong: each error is one sentence that names the thing and the cure."""

import math
from typing import Any

FLOAT32_MAX = 3.4e38


class InputError(ValueError):
    """A file, an option or a checkpoint that cannot be used as given. Programs exit with `exit_code`."""

    exit_code = 2


class PhotoError(InputError):
    """A file that is no usable photograph; `reason` is one word for counting, such as `damaged` or `too_small`."""

    def __init__(self, message: str, reason: str):
        # Both are arguments of the exception, so that it survives a pickle between processes.
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.args[0]


class NoFaceError(InputError):
    """A photograph in which no face was found."""

    exit_code = 3


class MissingExtraError(InputError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, what: str, extra: str):
        super().__init__(f"{what} needs the extra `{extra}`: `pip install -e '.[{extra}]'` in a clone.")
        self._given = what, extra

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._given  # it survives a pickle too


class DivergedError(InputError):
    """The loss of a training run was not finite any more."""

    exit_code = 4


class CutPromptWarning(UserWarning):
    """A prompt is longer than the text encoders read: its end, `cut`, changes nothing."""

    def __init__(self, prompt: str, cut: str):
        super().__init__(f'the prompt "{prompt[:40]}..." is too long; these words are cut: {cut}')


def finite(name: str, value: Any) -> float:
    """`value` as a float. Raises InputError, which calls it `name`, for what is no number or not finite in fp32."""
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) < FLOAT32_MAX:
        raise InputError(f"{name} is {value!r}: give a finite number.")
    return number


def shown(text: object, limit: int = 100) -> str:
    """What a file says, fit for a terminal: without control characters, and at most `limit` letters."""
    clean = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text)[: limit + 1])
    return clean if len(clean) <= limit else f"{clean[:limit]}..."
