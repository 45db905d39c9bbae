"""The settings of an emulated device, and their checks."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

# Set by the lab; the two variables that are read outside of the command line.
SPEED_VARIABLE = "LIGHTNING_COMM_SPEED"
SPEED_TAKEN_VARIABLE = "LIGHTNING_COMM_SPEED_TAKEN"  # a file that is made once a process has read its speed


def emulated_speed() -> float:
    """Return this host's emulated speed: the variable ``LIGHTNING_COMM_SPEED``, or 1.0 where it is not set.

    Raises:
        ValueError: If the variable is not a positive number.

    """
    text = os.environ.get(SPEED_VARIABLE)
    if text is None:
        return 1.0
    try:
        speed = float(text)
    except ValueError:
        speed = math.nan
    if not (math.isfinite(speed) and speed > 0):
        raise ValueError(
            f"emulated_speed: the environment variable {SPEED_VARIABLE} must be a number > 0; got {text!r}. 0.5 is "
            "half as fast as 1; unset it for 1."
        )
    if (taken := os.environ.get(SPEED_TAKEN_VARIABLE)) is not None:
        with suppress(OSError):  # only a remark of the lab depends on it
            Path(taken).touch()
    return speed


def device_problems(*, step_s: float, batch_size: int, forward_share: float, speed: float | None) -> Iterator[str]:
    """Yield what is out of range in arguments that should describe a device."""
    if not (_is_number(step_s) and step_s > 0):
        yield (
            f"`step_s` is the time of a batch in seconds, so it must be a finite number > 0; got {step_s!r}. 0.25 is a "
            "quarter of a second."
        )
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        yield (
            f"`batch_size` counts the samples that take `step_s`, so it must be a whole number >= 1; got "
            f"{batch_size!r}. It is the batch size of one device."
        )
    if not (_is_number(forward_share) and 0 < forward_share < 1):
        yield (
            f"`forward_share` is the forward pass's share of the time, so it must be > 0 and < 1; got "
            f"{forward_share!r}. A third is usual, since backward computes about twice as much."
        )
    if speed is not None and not (_is_number(speed) and speed > 0):
        yield (
            f"`speed` divides the time, so it must be a finite number > 0; got {speed!r}. 0.5 is half as fast as 1; "
            f"None takes it from {SPEED_VARIABLE}."
        )


def check_device(where: str, *, step_s: float, batch_size: int, forward_share: float, speed: float | None) -> None:
    """Refuse arguments that describe no device.

    Raises:
        ValueError: If one is out of range; the message begins with ``where``.

    """
    problems = device_problems(step_s=step_s, batch_size=batch_size, forward_share=forward_share, speed=speed)
    for problem in problems:
        raise ValueError(f"{where}: {problem}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
