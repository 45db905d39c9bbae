"""The settings of a partitioned run, as the user chose them, with the shares and bounds that follow from them."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from numbers import Number
from types import NoneType
from typing import Any, Literal

from lightning_comm.core.adaptive_partition.shares import UNBOUNDED, proportional_sizes
from lightning_comm.core.arguments import is_number, is_whole
from lightning_comm.errors import refuse

_WHERE = "AdaptivePartition"


@dataclass(frozen=True)
class PartitionSettings:
    """The arguments of :class:`AdaptivePartition`, which explains them."""

    mode: Literal["balance", "observe", "fixed"]
    shares: tuple[float, ...] | None
    batch_sizes: tuple[int, ...] | None
    min_per_rank: int | tuple[int, ...] | None
    max_per_rank: int | tuple[int, ...] | None
    window_steps: int
    min_gain: float
    warmup_steps: int
    loss_reduction: Literal["mean", "sum"]
    replay: str | None
    folder: str | None

    def __post_init__(self) -> None:
        refuse(_WHERE, self._problems())

    def _problems(self) -> Iterator[str]:
        for name in ("folder", "replay"):
            if not isinstance(getattr(self, name), (str, NoneType)):
                yield f"`{name}` must be a path as text; got {getattr(self, name)!r}."
        for name, choices in (("mode", ("balance", "observe", "fixed")), ("loss_reduction", ("mean", "sum"))):
            if getattr(self, name) not in choices:
                yield f"`{name}` must be one of {', '.join(map(repr, choices))}; got {getattr(self, name)!r}."
        yield from self._split_problems()
        for name in ("min_per_rank", "max_per_rank"):
            value = getattr(self, name)
            each = value if isinstance(value, tuple) else (value,)
            if value is not None and not (each and all(is_whole(n) and n >= 1 for n in each)):
                yield (
                    f"`{name}` counts samples of a rank, so it must be a whole number >= 1, or one for each rank; got "
                    f"{value!r}. Leave it out for no bound."
                )
        for name, least in (("window_steps", 1), ("warmup_steps", 0)):
            value = getattr(self, name)
            if not is_whole(value) or value < least:
                yield (
                    f"`{name}` counts training batches, so it must be a whole number >= {least}; got {value!r}. Leave "
                    "it out for a good one."
                )
        if not (isinstance(self.min_gain, (int, float)) and 0 <= self.min_gain < 1):
            yield (
                f"`min_gain` is relative to the time of a step, so it must be >= 0 and < 1; got {self.min_gain!r}. "
                "0.05 moves shares where a step lasts more than 1.05 times the best one."
            )

    def shared(self) -> dict[str, Any]:
        """Return the settings that must be the same on all ranks, in types of JSON; files concern rank 0 alone."""
        plain: dict[str, Any] = json.loads(
            json.dumps({**asdict(self), "folder": None, "replay": self.replay is not None})
        )
        return plain

    def _split_problems(self) -> Iterator[str]:
        for name in ("shares", "batch_sizes"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, NoneType)):
                yield f"`{name}` must be a list of one number for each rank; got {value!r}."
            elif self.replay is not None and value is not None:
                yield (
                    f"`replay` takes the shares of an earlier run, so `{name}` cannot be given; got {list(value)}. "
                    "Leave out one of the two."
                )
        if self.shares is not None and self.batch_sizes is not None:
            yield (
                f"`shares` and `batch_sizes` say the same thing, so only one can be given; got {_shown(self.shares)} "
                f"and {_shown(self.batch_sizes)}. Leave out one."
            )
        if self.mode == "fixed" and self.shares is None and self.batch_sizes is None and self.replay is None:
            yield (
                "`mode`='fixed' needs `shares`, such as [1, 3], or `batch_sizes`, such as [16, 48], by rank; got "
                "neither. 'balance' finds shares by itself."
            )
        if isinstance(self.shares, tuple):
            fine = all(is_number(share) and math.isfinite(share) and share >= 0 for share in self.shares)
            if not fine or sum(self.shares) <= 0:
                yield (
                    "`shares` are ratios by rank, so they must be finite, >= 0 and not all 0; got "
                    f"{list(self.shares)}. [1, 3] gives the second rank three times as much."
                )
        if isinstance(self.batch_sizes, tuple) and not all(is_whole(size) and size >= 1 for size in self.batch_sizes):
            yield (
                f"`batch_sizes` count samples by rank, so they must be whole numbers >= 1; got "
                f"{list(self.batch_sizes)}. A rank that should do nothing is better left out of `devices`."
            )

    def rank_problems(self, ranks: int) -> Iterator[str]:
        """Yield lists that are not one entry for each rank."""
        for name in ("shares", "batch_sizes", "min_per_rank", "max_per_rank"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != ranks:
                yield (
                    f"`{name}` must have one entry for each of {ranks} ranks; got {list(value)}, which has "
                    f"{len(value)}. Ranks are numbered over all hosts: devices x num_nodes."
                )

    def bounds(self, ranks: int, total: int, has_batch_norm: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the least and the most that each rank takes of ``total`` samples.

        Raises:
            ValueError: If they cannot be met.

        """
        default = 2 if has_batch_norm and total >= 2 * ranks else 1
        lo = _for_each(default if self.min_per_rank is None else self.min_per_rank, ranks)
        hi = _for_each(UNBOUNDED if self.max_per_rank is None else self.max_per_rank, ranks)
        if any(least > most for least, most in zip(lo, hi, strict=True)) or not sum(lo) <= total <= sum(hi):
            at_most = "any number of" if self.max_per_rank is None else sum(hi)
            raise ValueError(
                f"{_WHERE}: {ranks} ranks must share a global batch of {total} samples within their bounds; got "
                f"`min_per_rank`={self.min_per_rank!r} and `max_per_rank`={self.max_per_rank!r}, which allow "
                f"{sum(lo)} to {at_most} samples. Change `global_batch_size` or the bounds."
            )
        return lo, hi

    def first_sizes(self, ranks: int, total: int, lo: tuple[int, ...], hi: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shares that a run starts from.

        Raises:
            ValueError: If ``batch_sizes`` do not sum to the global batch, or are out of bounds.

        """
        if self.batch_sizes is None:
            return proportional_sizes(total, self.shares or [1.0] * ranks, lo, hi)
        if sum(self.batch_sizes) != total:
            raise ValueError(
                f"{_WHERE}: `batch_sizes` must sum to the global batch of {total} samples; got "
                f"{list(self.batch_sizes)}, which sum to {sum(self.batch_sizes)}. Give the loader `global_batch_size="
                f"{sum(self.batch_sizes)}`, or ratios by `shares`."
            )
        if any(not least <= size <= most for least, size, most in zip(lo, self.batch_sizes, hi, strict=True)):
            raise ValueError(
                f"{_WHERE}: `batch_sizes` must lie within `min_per_rank` and `max_per_rank`; got "
                f"{list(self.batch_sizes)}, at least {list(lo)} and at most {list(hi)}. Change one of them."
            )
        return self.batch_sizes


def plain(value: Any) -> Any:
    """Return numbers and sequences of them, also numpy's, as numbers and tuples of Python; other values unchanged."""
    if isinstance(value, Number) and hasattr(value, "item"):
        return value.item()
    if isinstance(value, (str, dict, set)) or not isinstance(value, Iterable):
        return value
    return tuple(map(plain, value.tolist() if hasattr(value, "tolist") else value))


def _shown(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _for_each(value: int | tuple[int, ...], ranks: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * ranks
