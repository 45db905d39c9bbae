"""Rates of links, as people and ``tc`` write them; bytes per second inside."""

import math
import re

_BITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_RATE = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]+?)(?:/s|ps)?\s*", re.IGNORECASE)


def parse_rate(text: str) -> float:
    """Return a rate in bytes per second.

    Args:
        text: A number and a unit: ``bit``, ``kbit``, ``mbit`` or ``gbit``, decimal, in upper or lower case, with or
            without ``/s`` behind it.

    Raises:
        ValueError: If the text is not of that form, or the rate is not more than 0.

    Example:
        >>> parse_rate("100mbit"), parse_rate("1 Gbit/s")
        (12500000.0, 125000000.0)

    """
    match = _RATE.fullmatch(text) if isinstance(text, str) else None
    unit = match.group(2).lower() if match else ""
    if match is None or unit not in _BITS:
        raise ValueError(
            f"parse_rate: a rate must be a number with one of the units {', '.join(_BITS)}; got {text!r}. Write "
            "100mbit or 1gbit."
        )
    rate = float(match.group(1)) * _BITS[unit] / 8
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"parse_rate: a rate must be finite and > 0; got {text!r}. Write 100mbit or 1gbit.")
    return rate


def format_rate(bytes_per_s: float) -> str:
    """Return a rate in the largest unit in which it is at least 1.

    Example:
        >>> format_rate(12.5e6), format_rate(1.25e8)
        ('100 Mbit/s', '1 Gbit/s')

    """
    bits = 8 * bytes_per_s
    for unit, size in (("Gbit/s", 1e9), ("Mbit/s", 1e6), ("kbit/s", 1e3)):
        if bits >= size:
            return f"{bits / size:.4g} {unit}"
    return f"{bits:.4g} bit/s"
