"""Checks of arguments that are numbers of steps, samples or batches."""

from typing import TypeGuard


def require_steps(where: str, name: str, value: object, meaning: str) -> None:
    """Raise unless ``value`` is a whole number of at least 1.

    Args:
        where: Whose argument it is, for the message.
        name: Its name.
        value: What was given.
        meaning: The way out, a sentence at the end of the message.

    Raises:
        ValueError: If it is none.

    """
    if not is_whole(value) or value < 1:
        raise ValueError(
            f"{where}: `{name}` counts optimizer steps, so it must be a whole number >= 1; got {value!r}. {meaning}"
        )


def is_number(value: object) -> TypeGuard[float]:
    """Whether this is a number, which a bool is not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether this is a whole number, which a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool)
