"""The plan of a probe: sizes, repeats and a budget of time, and when it has to stop. Standard library only."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, isfinite

MIN_BYTES = 4  # one float32, which messages are made of
MAX_BYTES = 64 * 2**20
STEP = 4  # the ratio of a size to the one before

# The share of the budget that is used up when each part has to be done. What one leaves over is the next one's.
_DONE_BY = {"all_reduce": 0.5, "all_gather": 0.62, "links": 0.9, "send": 1.0}

_SAMPLE_S = 0.005  # a sample repeats its message until it lasts about so long, since clocks and ranks are not exact
_MOST_CALLS = 20  # in one sample


@dataclass(frozen=True)
class ProbePlan:
    """Sizes to measure, samples of each, and the seconds that all of it may take.

    Args:
        sizes: Payload bytes by rising size, each a multiple of 4 (a float32).
        repeats: Samples of each size; at least 1. Quartiles need 5 or more.
        seconds: The budget. A size whose samples would not fit is left out, and the greater ones with it.

    Raises:
        ValueError: If an argument is out of range.

    Note:
        *Communication.* None: decisions are made from numbers that the ranks have agreed on.

    Example:
        >>> plan = ProbePlan(sizes=sizes_between(4, 64), repeats=5, seconds=10.0)
        >>> plan.sizes
        (4, 16, 64)
        >>> plan.affords("all_reduce", elapsed_s=1.0, calls=5, call_s=0.5)  # 1.0 + 5 * 0.5 is within half of 10 s
        True
        >>> plan.affords("all_reduce", elapsed_s=1.0, calls=5, call_s=0.9)
        False

    """

    sizes: tuple[int, ...]
    repeats: int = 5
    seconds: float = 12.0

    def __post_init__(self) -> None:
        if not self.sizes or list(self.sizes) != sorted(set(self.sizes)):
            raise ValueError(f"probe: `sizes` must be at least one, rising; got {self.sizes!r}. Write 4,1KiB,1MiB.")
        for size in self.sizes:
            check_size("sizes", size)
        if self.repeats < 1:
            raise ValueError(
                f"probe: `repeats` counts samples of each size, so it must be >= 1; got {self.repeats!r}. 5 gives "
                "quartiles."
            )
        if not (isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"probe: `seconds` is a budget of time, so it must be > 0; got {self.seconds!r}. Try 12.")

    def affords(self, part: str, *, elapsed_s: float, calls: int, call_s: float) -> bool:
        """Whether so many calls of so many seconds can be made before this part has to be done.

        Args:
            part: ``"all_reduce"``, ``"all_gather"``, ``"links"`` or ``"send"``, in this order.
            elapsed_s: Since the probe began, on the slowest rank.
            calls: How many are to be made.
            call_s: How long one takes on the slowest rank.

        """
        return calls * call_s <= self.left_s(part, elapsed_s)

    def left_s(self, part: str, elapsed_s: float) -> float:
        """Return the seconds that are left for a part of the probe, so long after the beginning."""
        return _DONE_BY[part] * self.seconds - elapsed_s

    @staticmethod
    def calls_in_a_sample(call_s: float) -> int:
        """Return how often a message that takes so long is sent in one sample."""
        return max(1, min(_MOST_CALLS, ceil(_SAMPLE_S / call_s))) if call_s > 0 else _MOST_CALLS


def check_size(where: str, size: int) -> None:
    """Raise a ValueError if a message cannot have this size."""
    if size < MIN_BYTES or size % MIN_BYTES:
        raise ValueError(
            f"probe: `{where}` must be multiples of 4 bytes, which is one float32, and at least that; got {size!r}. "
            f"The next one is {max(MIN_BYTES, -(-size // MIN_BYTES) * MIN_BYTES)}."
        )


def sizes_between(min_bytes: int, max_bytes: int) -> tuple[int, ...]:
    """Return sizes from ``min_bytes`` in factors of 4, and ``max_bytes`` as the last.

    Raises:
        ValueError: If a size is no multiple of 4 or the bounds are the wrong way round.

    Example:
        >>> sizes_between(4, 100)
        (4, 16, 64, 100)

    """
    check_size("min_bytes", min_bytes)
    check_size("max_bytes", max_bytes)
    if min_bytes > max_bytes:
        raise ValueError(
            f"probe: `min_bytes` must not be above `max_bytes`; got {min_bytes!r} and {max_bytes!r}. Swap them."
        )
    sizes = []
    size = min_bytes
    while size < max_bytes:
        sizes.append(size)
        size *= STEP
    return (*sizes, max_bytes)


def pairs(members: int) -> list[tuple[int, int]]:
    """Return which members exchange messages: each with the two before and the two after it in a ring, both ways.

    Up to five members, that is everyone with everyone. Two neighbours on each side instead of one, so that a host
    between two slow ones is not taken for slow.

    Example:
        >>> pairs(3)
        [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
        >>> len(pairs(100))
        400

    """
    near = {(a, (a + by) % members) for a in range(members) for by in (1, 2)}
    return sorted({pair for a, b in near if a != b for pair in ((a, b), (b, a))})


def growth(took_s: Sequence[float], share_s: float) -> list[int]:
    """Return how many times larger the next message on each link may be: 16, 4, or 0 for a link that is done.

    A link is done when four times as large a message could last longer than ``share_s``. Links that are only somewhat
    slower than one that goes on go on with it: equal links are to be compared by messages of equal size.

    Example:
        >>> growth([0.001, 0.02, 0.03, 0.9], share_s=0.1)
        [16, 4, 4, 0]

    """
    goes_on = any(seconds * STEP <= share_s for seconds in took_s)
    limits = ((STEP**2, share_s), (STEP, 2 * share_s if goes_on else share_s))
    return [next((factor for factor, limit in limits if s * factor <= limit), 0) for s in took_s]
