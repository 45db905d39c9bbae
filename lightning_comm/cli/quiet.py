"""A block in which Lightning prints no greetings, tips, seeds or devices."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = ("lightning.pytorch", "lightning.fabric")


@contextmanager
def lightning_is_quiet() -> Iterator[None]:
    """Let Lightning's loggers pass warnings only; what they passed before is passed again afterwards.

    Example:
        >>> logger = logging.getLogger("lightning.pytorch")
        >>> with lightning_is_quiet():
        ...     logging.getLevelName(logger.level)
        'WARNING'

    """
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in levels:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
