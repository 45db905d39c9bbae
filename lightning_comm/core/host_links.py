"""Faults of the links between hosts: a link that is slower than the others, or asymmetric.

Standard library only.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lightning_comm.core.costs import HostLink
from lightning_comm.core.rates import format_rate

FACTOR = 1.5  # a link is called slow, or asymmetric, from this ratio on; quartiles must not overlap either
_COMPARED_BYTES = 2**20


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a host's link.

    Args:
        host: Its name; of two hosts the one that sends more slowly.
        asymmetric: Whether it sends and receives at different rates.
        slow: Which of ``"sends"`` and ``"receives"`` are slower than those of the other hosts.
        message: The figures, in a sentence.

    """

    host: str
    asymmetric: bool
    slow: tuple[str, ...]
    message: str


def find_faults(links: Sequence[HostLink], factor: float = FACTOR) -> list[Finding]:
    """Return the hosts whose links are asymmetric, or slower than those of the others.

    A host is credited with the best rate that it reached with any other: a slow neighbour does not count against it.
    The others' rate is the median over the hosts. Two rates differ if they do so by more than ``factor`` and their
    quartiles do not overlap. With two hosts alone it is unknown whose link is slow, only that the directions differ.

    Args:
        links: Both directions of each pair.
        factor: How many times slower a link must be to be named; more than 1.

    Raises:
        ValueError: If ``factor`` is not more than 1.

    Note:
        *Communication.* None.

    Example:
        >>> def link(source, target, rate):
        ...     return HostLink(source, target, 2**20, 1e-4, rate, 0.98 * rate, 1.02 * rate)
        >>> rates = {"a": 100e6, "b": 100e6, "c": 10e6}
        >>> links = [link(a, b, min(rates[a], rates[b])) for a in rates for b in rates if a != b]
        >>> [finding] = find_faults(links)
        >>> finding.host, finding.slow, finding.asymmetric
        ('c', ('sends', 'receives'), False)

    """
    if not factor > 1:
        raise ValueError(f"find_faults: `factor` is how many times slower, so it must be > 1; got {factor!r}. Use 1.5.")
    sends = _best(links, lambda link: link.source)
    receives = _best(links, lambda link: link.target)
    both = [host for host in sends if host in receives]  # a link that noise hid is missing
    if len(sends | receives) == 2:
        return _of_two_hosts(links, factor) if len(both) == 2 else []
    findings = []
    for host in both:
        out, into = sends[host], receives[host]
        asymmetric = _slower(out, into, factor) or _slower(into, out, factor)
        slow = tuple(
            word
            for word, best in (("sends", sends), ("receives", receives))
            if _slower(best[host], _typical(best.values()), factor)
        )
        if asymmetric or slow:
            faults = ["asymmetric"] * asymmetric + ["slower than the others'"] * bool(slow)
            usual = _rates(_typical(sends.values()), _typical(receives.values()), "send", "receive")
            findings.append(
                Finding(
                    host,
                    asymmetric,
                    slow,
                    f"{host}'s link is {' and '.join(faults)}: it {_rates(out, into, 'sends', 'receives')}, where "
                    f"hosts usually {usual}.",
                )
            )
    return findings


def slowest(links: Sequence[HostLink]) -> HostLink:
    """Return the link that a ring has to wait for: the one on which 1 MiB takes longest."""
    return max(links, key=lambda link: link.latency_s + _COMPARED_BYTES / link.bytes_per_s)


def _best(links: Iterable[HostLink], end: Callable[[HostLink], str]) -> dict[str, HostLink]:
    best: dict[str, HostLink] = {}
    for link in links:
        host = end(link)
        if host not in best or link.bytes_per_s > best[host].bytes_per_s:
            best[host] = link
    return best


def _typical(links: Iterable[HostLink]) -> HostLink:
    by_rate = sorted(links, key=lambda link: link.bytes_per_s)
    return by_rate[len(by_rate) // 2]  # one that was measured, since its quartiles are needed


def _slower(slow: HostLink, fast: HostLink, factor: float) -> bool:
    return slow.bytes_per_s * factor < fast.bytes_per_s and slow.upper_bytes_per_s < fast.lower_bytes_per_s


def _of_two_hosts(links: Sequence[HostLink], factor: float) -> list[Finding]:
    slow, fast = sorted(links, key=lambda link: link.bytes_per_s)
    if not _slower(slow, fast, factor):
        return []
    message = (
        f"The link between {slow.source} and {slow.target} is asymmetric: {slow.source} "
        f"{_rates(slow, fast, 'sends', 'receives')}. Two hosts cannot tell whether {slow.source}'s way out or "
        f"{slow.target}'s way in is the slow one."
    )
    return [Finding(slow.source, True, (), message)]


def _rates(out: HostLink, into: HostLink, send: str, receive: str) -> str:
    return f"{send} at {format_rate(out.bytes_per_s)} and {receive} at {format_rate(into.bytes_per_s)}"
