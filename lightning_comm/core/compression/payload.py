"""Bytes that each compression sends, as formulas, and the links on which it pays; for the docs and for planning.

Numbers only. ``lightning_comm.transport.compression`` sends what is computed here; a test compares its ledger with
these formulas.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from lightning_comm.core.ledger import wire_bytes

_SCALE_BYTES = 4


class Part(NamedTuple):
    """One message of a rank: the kind of collective, and the bytes that the rank passes to it."""

    kind: str
    payload_bytes: int


def parts(
    method: str, shapes: Sequence[tuple[int, ...]], world_size: int, *, ratio: float = 0.01, rank: int = 2
) -> list[Part]:
    """Return the messages by which one bucket is synchronised.

    Args:
        method: ``"full"``, ``"bf16"``, ``"fp16"``, ``"int8"``, ``"ternary"``, ``"topk"``, ``"powersgd"`` or
            ``"no_sync"``.
        shapes: Those of the parameters in the bucket, in fp32. Under a mask the kept entries, as vectors.
        world_size: The number of ranks.
        ratio: Share of the entries that ``"topk"`` sends.
        rank: Columns of the matrices that ``"powersgd"`` sends.

    Raises:
        ValueError: If the method is unknown.

    Example:
        >>> parts("bf16", [(100, 100), (100,)], world_size=4)
        [Part(kind='all_reduce', payload_bytes=20200)]
        >>> sum(part.payload_bytes for part in parts("powersgd", [(100, 100), (100,)], world_size=4, rank=2))
        2000

    """
    if method not in _METHODS:
        raise ValueError(f"parts: `method` must be one of {', '.join(map(repr, _METHODS))}; got {method!r}.")
    return _METHODS[method](shapes, world_size, ratio, rank)


def sent_bytes(
    method: str, shapes: Sequence[tuple[int, ...]], world_size: int, *, ratio: float = 0.01, rank: int = 2
) -> int:
    """Return the bytes that one rank sends for a bucket, over all messages; arguments as in :func:`parts`.

    Example:
        >>> [sent_bytes(method, [(1000, 1000)], world_size=4) for method in ("full", "bf16", "int8", "topk")]
        [6000000, 3000000, 1500012, 240000]

    """
    made = parts(method, shapes, world_size, ratio=ratio, rank=rank)
    return sum(wire_bytes(part.kind, part.payload_bytes, world_size) for part in made)


def break_even_bytes_per_s(more_bytes: float, fewer_bytes: float, extra_s: float) -> float:
    """Return the bandwidth below which sending fewer bytes pays for the time that it takes to make them fewer.

    Args:
        more_bytes: What one rank sends without the method.
        fewer_bytes: What it sends with it.
        extra_s: Seconds of the method's own arithmetic, as far as nothing hides them.

    Returns:
        Bytes per second; 0.0 where the method does not send less, infinity where its arithmetic costs nothing.

    Raises:
        ValueError: If a number is negative.

    Example:
        >>> break_even_bytes_per_s(150e6, 75e6, extra_s=0.03) * 8 / 1e9  # in Gbit/s
        20.0

    """
    if min(more_bytes, fewer_bytes, extra_s) < 0:
        raise ValueError(
            "break_even_bytes_per_s: bytes and seconds must be >= 0; got "
            f"`more_bytes`={more_bytes!r}, `fewer_bytes`={fewer_bytes!r}, `extra_s`={extra_s!r}."
        )
    if fewer_bytes >= more_bytes:
        return 0.0
    return (more_bytes - fewer_bytes) / extra_s if extra_s > 0 else math.inf


_Formula = Callable[[Sequence[tuple[int, ...]], int, float, int], list[Part]]


def _all_reduce(itemsize: int) -> _Formula:
    return lambda shapes, *_: [Part("all_reduce", itemsize * sum(map(math.prod, shapes)))]


def _int8(shapes: Sequence[tuple[int, ...]], world_size: int, *_: float) -> list[Part]:
    share = -(-sum(map(math.prod, shapes)) // world_size)
    return [
        Part("all_to_all", world_size * (share + _SCALE_BYTES * len(shapes))),
        Part("all_gather", share),
    ]


def _ternary(shapes: Sequence[tuple[int, ...]], *_: float) -> list[Part]:
    return [Part("all_reduce", _SCALE_BYTES * len(shapes)), Part("all_reduce", sum(map(math.prod, shapes)))]


def _top_k(shapes: Sequence[tuple[int, ...]], world_size: int, ratio: float, rank: int) -> list[Part]:
    sizes = map(math.prod, shapes)
    return [Part("all_gather", sum(8 * min(size, max(1, math.ceil(ratio * size))) for size in sizes))]


def _power_sgd(shapes: Sequence[tuple[int, ...]], world_size: int, ratio: float, rank: int) -> list[Part]:
    first = second = 0
    for shape in shapes:
        size = math.prod(shape)
        rows = shape[0] if len(shape) > 1 and size else 1
        columns = size // rows
        kept = min(rank, rows, columns)
        if (rows + columns) * kept < size:
            first, second = first + 4 * rows * kept, second + 4 * columns * kept
        else:
            first += 4 * size
    return [Part("all_reduce", first), Part("all_reduce", second)]


_METHODS: dict[str, _Formula] = {
    "full": _all_reduce(4),
    "bf16": _all_reduce(2),
    "fp16": _all_reduce(2),
    "int8": _int8,
    "ternary": _ternary,
    "topk": _top_k,
    "powersgd": _power_sgd,
    "no_sync": lambda *_: [],
}
