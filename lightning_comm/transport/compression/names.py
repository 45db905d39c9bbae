"""A compression by its name, as configs and registered strategies give it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches

from lightning_comm.transport.compression.base import Compression
from lightning_comm.transport.compression.cast import Cast
from lightning_comm.transport.compression.int8 import Int8
from lightning_comm.transport.compression.no_sync import NoSync
from lightning_comm.transport.compression.power_sgd import PowerSGD
from lightning_comm.transport.compression.sparse_mask import SparseMask
from lightning_comm.transport.compression.ternary import Ternary
from lightning_comm.transport.compression.top_k import TopK

BY_NAME: dict[str, Callable[[], Compression]] = {
    "bf16": lambda: Cast("bf16"),
    "fp16": lambda: Cast("fp16"),
    "int8": Int8,
    "powersgd": PowerSGD,
    "topk": TopK,
    "ternary": Ternary,
    "sparse_mask": SparseMask,
    "no_sync": NoSync,
}


def compression_of(
    value: Compression | str | Sequence[Compression | str], where: str, argument: str = "compression"
) -> Compression:
    """Return the compression that a user gave: an object, a name, or a mask followed by one of them.

    Args:
        value: What the user gave.
        where: Whose argument it is, for the message.
        argument: Its name there.

    Raises:
        ValueError: If it is none of these; the message names a similar one.

    Example:
        >>> compression_of("bf16", "here")
        Cast(dtype='bf16')
        >>> compression_of(["sparse_mask", "bf16"], "here").then
        Cast(dtype='bf16')

    """
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _chain([compression_of(each, where) for each in value], where)
    if isinstance(value, Compression):
        return value
    if isinstance(value, str) and value in BY_NAME:
        return BY_NAME[value]()
    near = get_close_matches(value, BY_NAME, n=1) if isinstance(value, str) else []
    words = ", ".join(map(repr, BY_NAME))
    raise ValueError(
        f"{where}: `{argument}` must be a compression, a list of a mask and one more, or one of {words}; got "
        f"{value!r}." + (f" Did you mean {near[0]!r}?" if near else " Give an object such as Cast('bf16').")
    )


def _chain(parts: list[Compression], where: str) -> Compression:
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2 and isinstance(parts[0], SparseMask) and parts[0].then is None:
        return replace(parts[0], then=parts[1])
    raise ValueError(
        f"{where}: `compression`, as a list, is a SparseMask and what is done with the entries that it keeps, such as "
        f"[SparseMask(), Cast('bf16')]; got {parts!r}. Other methods need the whole gradient, so they cannot follow "
        "each other."
    )
