"""Bytes, times, ratios and shares as people read them."""


def megabytes(count: float, digits: int = 1) -> str:
    """Return a number of bytes in MB, of 10**6 bytes."""
    return f"{count / 1e6:,.{digits}f} MB"


def data_size(count: float) -> str:
    """Return the bytes of a whole run, in units in which they stay short.

    Example:
        >>> [data_size(count) for count in (1_234, 617.6e6, 7112.4e6, 71e9, 2.2e15)]
        ['1.2 kB', '617.6 MB', '7,112.4 MB', '71.0 GB', '2,200.0 TB']

    """
    if count < 1e6:
        return f"{count / 1e3:.1f} kB"
    if count < 1e10:
        return megabytes(count)
    return f"{count / 1e9:,.1f} GB" if count < 1e13 else f"{count / 1e12:,.1f} TB"


def duration(seconds: float) -> str:
    """Return a time as people read it.

    Example:
        >>> [duration(seconds) for seconds in (0.0123, 5.04, 61, 530, 3000, 8000, 200000)]
        ['12.3 ms', '5.0 s', '61 s', '8.8 min', '50 min', '2.2 h', '55.6 h']

    """
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.{1 if seconds < 1200 else 0}f} min"
    return f"{seconds / 3600:.1f} h"


def times_as_fast(ratio: float) -> str:
    """Return how many times as fast something is, always in the same direction: above 1 is faster."""
    return f"{ratio:.2f} times as fast"


def percent(share: float) -> str:
    """Return a share of 1 in percent."""
    return f"{100 * share:.1f} %"
