"""A compression by its name, as configs and registered strategies give it."""

from collections.abc import Callable
from difflib import get_close_matches

from lightning_comm.transport.compression.base import Compression
from lightning_comm.transport.compression.cast import Cast
from lightning_comm.transport.compression.int8 import Int8
from lightning_comm.transport.compression.no_sync import NoSync
from lightning_comm.transport.compression.power_sgd import PowerSGD
from lightning_comm.transport.compression.ternary import Ternary
from lightning_comm.transport.compression.top_k import TopK

WORDS: dict[str, Callable[[], Compression]] = {
    "bf16": lambda: Cast("bf16"),
    "fp16": lambda: Cast("fp16"),
    "int8": Int8,
    "powersgd": PowerSGD,
    "topk": TopK,
    "ternary": Ternary,
    "no_sync": NoSync,
}


def compression_of(given: Compression | str, where: str) -> Compression:
    """Return the compression that a user gave, as an object or as a word.

    Args:
        given: What the user gave.
        where: Whose argument it is, for the message.

    Raises:
        ValueError: If it is neither; the message says what is near.

    Example:
        >>> compression_of("bf16", "here")
        Cast(dtype='bf16')

    """
    if isinstance(given, Compression):
        return given
    if isinstance(given, str) and given in WORDS:
        return WORDS[given]()
    near = get_close_matches(given, WORDS, n=1) if isinstance(given, str) else []
    raise ValueError(
        f"{where}: `compression` must be a compression or one of {', '.join(map(repr, WORDS))}; got {given!r}."
        + (f" Did you mean {near[0]!r}?" if near else " Give an object such as Cast('bf16').")
    )
