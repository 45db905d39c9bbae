"""The time of a message: formulas over a latency in seconds and a bandwidth in bytes per second.

Standard library only. A message takes its latency, and its bytes divided by the bandwidth; a collective is several of
them, one after the other.

References:
    R. Thakur, R. Rabenseifner, W. Gropp. `Optimization of Collective Communication Operations in MPICH
    <https://doi.org/10.1177/1094342005051521>`_. IJHPCA 19(1), 2005: latency and bandwidth as a model of a message, the
    ring all-gather, the binomial broadcast, and their costs.

    P. Patarasuk, X. Yuan. Bandwidth optimal all-reduce algorithms for clusters of workstations. JPDC 69(2), 2009: no
    all-reduce can send less than ``2(n-1)/n`` of its payload from every rank, and a ring sends just that.

    NVIDIA, `nccl-tests <https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md>`_: bus bandwidth.

"""

from typing import NamedTuple

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "send")


class Schedule(NamedTuple):
    """The steps of a collective: its messages, one after the other, and their bytes as a multiple of the payload."""

    messages: int
    wire_share: float


def schedule(kind: str, world_size: int) -> Schedule:
    """Return what a ring (a binomial tree for a broadcast) sends one after the other.

    Args:
        kind: One of ``"all_reduce"``, ``"reduce_scatter"``, ``"all_gather"``, ``"broadcast"``, ``"send"``.
        world_size: The number of ranks; at least 1.

    Raises:
        ValueError: If the kind is unknown or there is no rank.

    Note:
        *Payload* is what one rank passes to the call: for an all-gather its own part, elsewhere the whole tensor.

        *Communication.* None.

    Example:
        >>> schedule("all_reduce", world_size=4)
        Schedule(messages=6, wire_share=1.5)

    """
    if world_size < 1:
        raise ValueError(f"costs: `world_size` counts ranks, so it must be >= 1; got {world_size!r}.")
    others = world_size - 1
    rounds = others.bit_length()  # of a binomial tree: the logarithm to base 2, rounded up
    schedules = {
        "all_reduce": Schedule(2 * others, 2 * others / world_size),
        "reduce_scatter": Schedule(others, others / world_size),
        "all_gather": Schedule(others, float(others)),
        "broadcast": Schedule(rounds, float(rounds)),
        "send": Schedule(1, 1.0),
    }
    if kind not in schedules:
        raise ValueError(f"costs: `kind` must be one of {', '.join(KINDS)}; got {kind!r}.")
    return schedules[kind]


def send_s(payload_bytes: float, latency_s: float, bytes_per_s: float) -> float:
    """Return the seconds of one message of ``payload_bytes`` from one rank to another.

    Example:
        >>> send_s(1_000_000, latency_s=0.001, bytes_per_s=1e6)
        1.001

    """
    return collective_s("send", payload_bytes, 2, latency_s, bytes_per_s)


def ring_all_reduce_s(payload_bytes: float, world_size: int, latency_s: float, bytes_per_s: float) -> float:
    """Return the seconds of a ring all-reduce: ``2(n-1)`` messages of an n-th of the payload.

    Args:
        payload_bytes: Size of the tensor that is summed.
        world_size: The number of ranks, n.
        latency_s: Of one message.
        bytes_per_s: That one rank sends, and receives at the same time.

    Note:
        *Communication.* None.

    Example:
        >>> ring_all_reduce_s(4_000_000, world_size=4, latency_s=0.5, bytes_per_s=1e6)
        9.0

    """
    return collective_s("all_reduce", payload_bytes, world_size, latency_s, bytes_per_s)


def ring_reduce_scatter_s(payload_bytes: float, world_size: int, latency_s: float, bytes_per_s: float) -> float:
    """Return the seconds of a ring reduce-scatter: the first half of an all-reduce.

    Example:
        >>> ring_reduce_scatter_s(4_000_000, world_size=4, latency_s=0.5, bytes_per_s=1e6)
        4.5

    """
    return collective_s("reduce_scatter", payload_bytes, world_size, latency_s, bytes_per_s)


def ring_all_gather_s(payload_bytes: float, world_size: int, latency_s: float, bytes_per_s: float) -> float:
    """Return the seconds of a ring all-gather, in which every rank hands over ``payload_bytes``.

    Example:
        >>> ring_all_gather_s(1_000_000, world_size=4, latency_s=0.5, bytes_per_s=1e6)
        4.5

    """
    return collective_s("all_gather", payload_bytes, world_size, latency_s, bytes_per_s)


def tree_broadcast_s(payload_bytes: float, world_size: int, latency_s: float, bytes_per_s: float) -> float:
    """Return the seconds of a broadcast in a binomial tree: the payload is sent ``log2(n)`` times, rounded up.

    Example:
        >>> tree_broadcast_s(1_000_000, world_size=5, latency_s=0.5, bytes_per_s=1e6)
        4.5

    """
    return collective_s("broadcast", payload_bytes, world_size, latency_s, bytes_per_s)


def collective_s(kind: str, payload_bytes: float, world_size: int, latency_s: float, bytes_per_s: float) -> float:
    """Return the seconds of any kind of message, from its :func:`schedule`.

    Raises:
        ValueError: If the kind is unknown, the size negative, or there is no rank.

    Example:
        >>> collective_s("all_reduce", 4_000_000, 4, 0.5, 1e6) == ring_all_reduce_s(4_000_000, 4, 0.5, 1e6)
        True

    """
    if payload_bytes < 0:
        raise ValueError(f"costs: `payload_bytes` is a size, so it must be >= 0; got {payload_bytes!r}.")
    messages, wire_share = schedule(kind, world_size)
    return messages * latency_s + wire_share * payload_bytes / bytes_per_s
