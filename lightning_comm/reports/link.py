"""The text of a link profile: tables by size, latency and bandwidth in a sentence, and faults of links."""

from collections import Counter
from math import isfinite

from lightning_comm.core.costs import Curve, LinkProfile
from lightning_comm.core.host_links import FACTOR, find_faults, slowest
from lightning_comm.core.quantities import megabytes, percent
from lightning_comm.core.rates import format_rate
from lightning_comm.reports.pieces import text_table

_EXAMPLE_BYTES = 22_000_000  # 5.5 million parameters in float32: a small vision transformer
_UNSTEADY = 1.5  # upper by lower quartile of a large message
_TITLES = {
    "all_reduce": "All-reduce (a tensor is summed over all ranks)",
    "all_gather": "All-gather (every rank hands over so much)",
    "send": "Single message (on the slowest link, in its slower direction)",
}
_HEADER = ("size", "median", "lower quartile", "upper quartile", "bus bandwidth")


def describe_link(profile: LinkProfile) -> str:
    """Return the report that ``lightning-comm probe`` prints.

    Note:
        *Communication.* None.

    """
    tables = [_table(profile.curve(kind), title) for kind, title in _TITLES.items()]
    return "\n\n".join([_heading(profile), *tables, _summary(profile), *_warnings(profile)])


def seconds(value: float) -> str:
    """Return a time as people read it.

    Example:
        >>> seconds(0.0000042), seconds(0.0031), seconds(0.514), seconds(2.096), seconds(75)
        ('4.20 µs', '3.10 ms', '514 ms', '2.10 s', '75.0 s')

    """
    for limit, scale, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if value < limit:
            return f"{_three_digits(value * scale)} {unit}"
    return f"{_three_digits(value)} s"


def size_name(payload_bytes: int) -> str:
    """Return a size in powers of 1024 where it is a whole number of them.

    Example:
        >>> size_name(4), size_name(4096), size_name(64 * 2**20), size_name(1_000_000)
        ('4 B', '4 KiB', '64 MiB', '1,000,000 B')

    """
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if payload_bytes >= scale and payload_bytes % scale == 0:
            return f"{payload_bytes // scale} {unit}"
    return f"{payload_bytes:,} B"


def _three_digits(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _heading(profile: LinkProfile) -> str:
    hosts = Counter(profile.hosts)
    where = ", ".join(host if count == 1 else f"{host} ({count} ranks)" for host, count in hosts.items())
    by = f"{profile.backend}, {profile.transport}" if profile.transport else profile.backend
    return f"{profile.world_size} ranks on {len(hosts)} host{'s' * (len(hosts) != 1)}: {where}\n{by}"


def _table(curve: Curve | None, title: str) -> str:
    if curve is None:
        return f"{title}: not measured, for want of time or room."
    rows = [
        (
            size_name(point.payload_bytes),
            seconds(point.median_s),
            seconds(point.lower_s),
            seconds(point.upper_s),
            format_rate(curve.bus_bytes_per_s(point)),
        )
        for point in curve.points
    ]
    text = f"{title}, {curve.points[0].repeats} samples\n{text_table(_HEADER, rows)}"
    if curve.not_measured:
        text += f"\nnot measured, for want of time or room: {', '.join(map(size_name, curve.not_measured))}"
    return text


def _summary(profile: LinkProfile) -> str:
    fit = profile.fit("all_reduce")
    whole_s = profile.time_s("all_reduce", _EXAMPLE_BYTES)
    rate = format_rate(fit.bytes_per_s) if isfinite(fit.bytes_per_s) else "a bandwidth that such sizes do not show"
    beyond = (
        ", going by the fit beyond the measured sizes" if profile.extrapolates("all_reduce", _EXAMPLE_BYTES) else ""
    )
    lines = [
        f"Latency {seconds(fit.latency_s)} a message, {rate} (the largest all-reduce reached "
        f"{format_rate(profile.bytes_per_s)}): the all-reduce of a model of {megabytes(_EXAMPLE_BYTES)} on "
        f"{profile.world_size} ranks takes about {seconds(whole_s)}{beyond}."
    ]
    curve = profile.curve("all_reduce")
    if curve and (error := curve.error):
        lines.append(
            f"Left out and predicted from the other sizes, an all-reduce is {percent(error.curve)} off by the curve "
            f"and {percent(error.fit)} by these two numbers (mean over sizes)."
        )
    return "\n".join(lines)


def _warnings(profile: LinkProfile) -> list[str]:
    found = [f"Warning: {fault.message}" for fault in find_faults(profile.links)] if profile.links else []
    if found:
        worst = slowest(profile.links)
        found.append(
            f"A ring passes through every host, so all wait for the slowest link, from {worst.source} to "
            f"{worst.target}: {format_rate(worst.bytes_per_s)}. (Named are links that differ by a factor of more than "
            f"{FACTOR}, with quartiles apart.)"
        )
    if not profile.links:
        found.append("Not measured, for want of time or sizes: the links between single hosts. Raise --seconds.")
    for curve in profile.curves:
        last = curve.points[-1]
        if last.upper_s > _UNSTEADY * last.lower_s:
            found.append(
                f"Warning: times are unsteady ({curve.kind} of {size_name(last.payload_bytes)}: quartiles "
                f"{seconds(last.lower_s)} and {seconds(last.upper_s)}). Something else uses the link or the "
                "processors; measure again when it is quiet."
            )
    return found
