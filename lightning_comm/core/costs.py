"""The profile of a link: the measurements of a probe, the cost of any message by them, and their file.

Standard library only. The probe writes a :class:`LinkProfile`; its report, the profiler and ``SparseMask`` read it. The
formulas behind it, with their sources, are in :mod:`lightning_comm.core.collectives`, and can be imported from here as
well.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from lightning_comm.core.collectives import (
    KINDS,
    Schedule,
    collective_s,
    ring_all_gather_s,
    ring_all_reduce_s,
    ring_reduce_scatter_s,
    schedule,
    send_s,
    tree_broadcast_s,
)
from lightning_comm.core.link_curve import Curve, FitErrors, LinkFit, Timing, fit_link
from lightning_comm.core.whole_files import write_text

__all__ = [
    "KINDS",
    "Curve",
    "FitErrors",
    "HostLink",
    "LinkFit",
    "LinkProfile",
    "Schedule",
    "Timing",
    "collective_s",
    "fit_link",
    "ring_all_gather_s",
    "ring_all_reduce_s",
    "ring_reduce_scatter_s",
    "schedule",
    "send_s",
    "tree_broadcast_s",
]

FORMAT = "lightning_comm link profile"
SCHEMA = 1  # of the file; raised when an older reader would misread it


@dataclass(frozen=True)
class HostLink:
    """One direction of the way between two hosts (or two ranks, where all are on one host), with nothing else on it.

    Args:
        source: Who sends.
        target: Who receives.
        payload_bytes: The size that the rate was measured with.
        latency_s: Half of the round trip of a message of 4 bytes, in seconds; the median.
        bytes_per_s: Rate of a large message, latency taken off; the median.
        lower_bytes_per_s: Lower quartile of the rate.
        upper_bytes_per_s: Upper quartile of the rate.

    """

    source: str
    target: str
    payload_bytes: int
    latency_s: float
    bytes_per_s: float
    lower_bytes_per_s: float
    upper_bytes_per_s: float


@dataclass(frozen=True)
class LinkProfile:
    """Measurements of the link between the ranks of a job, made by a probe.

    Args:
        world_size: The number of ranks.
        backend: Of the process group: ``"gloo"``, ``"nccl"``.
        curves: One for each kind of message; an all-reduce must be among them.
        transport: What carried the messages, as far as it could be seen.
        hosts: The host of each rank.
        links: Both directions between pairs of hosts; empty if time did not suffice.
        environment: Where the figures come from: versions, command, date and the like.

    Raises:
        ValueError: If there is no all-reduce.

    Note:
        *Other numbers of ranks.* ``time_s(..., world_size=n)`` multiplies the measured time by the ratio of the ring
        model (:func:`schedule`, with the fitted latency and bandwidth) at n and at the measured number. It assumes that
        every further rank has a link like these and that the switch between them is not the narrow place.

        *Communication.* None.

    Example:
        >>> points = [Timing(size, 5, *[ring_all_reduce_s(size, 2, 1e-3, 1e6)] * 3) for size in (4, 4_000, 4_000_000)]
        >>> profile = LinkProfile(2, "gloo", (Curve("all_reduce", 2, tuple(points)),))
        >>> round(profile.time_s("all_reduce", 4_000_000), 3), round(profile.bytes_per_s)
        (4.002, 999500)
        >>> round(profile.time_s("all_reduce", 4_000_000, world_size=4), 3)
        6.006

    """

    world_size: int
    backend: str
    curves: tuple[Curve, ...]
    transport: str = ""
    hosts: tuple[str, ...] = ()
    links: tuple[HostLink, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.curve("all_reduce") is None:
            kinds = [curve.kind for curve in self.curves]
            raise ValueError(
                f"LinkProfile: `curves` must hold an all_reduce; got {kinds!r}. A probe measures it first."
            )

    def curve(self, kind: str) -> Curve | None:
        """Return the measured curve of a kind, or ``None``."""
        return next((curve for curve in self.curves if curve.kind == kind), None)

    def fit(self, kind: str) -> LinkFit:
        """Return latency and bandwidth of a kind, or of the all-reduce if the kind was not measured."""
        return self._nearest(kind).fit

    @property
    def bytes_per_s(self) -> float:
        """Wire bytes per second of the largest all-reduce that was measured."""
        return self._nearest("all_reduce").bytes_per_s

    def extrapolates(self, kind: str, payload_bytes: float, world_size: int | None = None) -> bool:
        """Whether :meth:`time_s` goes beyond what was measured: in kind, size or number of ranks."""
        curve = self.curve(kind)
        return curve is None or curve.extrapolates(payload_bytes) or world_size not in (None, self.world_size)

    def time_s(self, kind: str, payload_bytes: float, world_size: int | None = None) -> float:
        """Return the seconds that a message takes.

        Args:
            kind: One of :data:`KINDS`. One that was not measured is taken from the all-reduce's latency and bandwidth.
            payload_bytes: The bytes that one rank passes to the call.
            world_size: The number of ranks, if it is not the measured one.

        Raises:
            ValueError: If the kind is unknown, the size negative, or there is no rank.

        """
        ranks = self.world_size if world_size is None else world_size
        fit = self.fit(kind)
        wanted = fit.time_s(kind, payload_bytes, ranks)
        curve = self.curve(kind)
        if curve is None or wanted == 0:
            return wanted
        return curve.time_s(payload_bytes) * wanted / fit.time_s(kind, payload_bytes, self.world_size)

    def _nearest(self, kind: str) -> Curve:
        curve = self.curve(kind) or self.curve("all_reduce")
        assert curve is not None  # seen to at construction
        return curve

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON, with fits and errors added for those who read it without this package.

        A file that is there already stays as it is until the new one is whole.

        Raises:
            OSError: If the file cannot be written.

        """
        write_text(path, self._text())

    def _text(self) -> str:
        return json.dumps(self._as_json(), indent=1) + "\n"

    def _as_json(self) -> dict[str, Any]:
        data = {"format": FORMAT, "schema": SCHEMA, **asdict(self), "environment": dict(self.environment)}
        for curve, entry in zip(self.curves, data["curves"], strict=True):
            fit, error = curve.fit, curve.error
            entry["fit"] = {
                "latency_s": fit.latency_s,
                "bytes_per_s": fit.bytes_per_s if isfinite(fit.bytes_per_s) else None,
            }
            entry["leave_one_out_error"] = error and error._asdict()
        return data

    @classmethod
    def load(cls, path: str | Path) -> "LinkProfile":
        """Read a profile that :meth:`save` wrote.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it is not a link profile, or one of another schema.

        """
        where = f"LinkProfile: `path` must be a file that `lightning-comm probe` wrote; {str(path)!r}"
        way_out = "Measure anew with `lightning-comm probe --out FILE`."
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{where} is no JSON ({error}). {way_out}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{where} is some other JSON. {way_out}")
        if data.get("schema") != SCHEMA:
            raise ValueError(f"{where} has schema {data.get('schema')!r}, and this version reads {SCHEMA}. {way_out}")
        try:
            return cls(
                world_size=data["world_size"],
                backend=data["backend"],
                curves=tuple(_curve(entry) for entry in data["curves"]),
                transport=data["transport"],
                hosts=tuple(data["hosts"]),
                links=tuple(HostLink(**entry) for entry in data["links"]),
                environment=data["environment"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where} is damaged ({error!r}). {way_out}") from error


def _curve(entry: Mapping[str, Any]) -> Curve:
    points = tuple(Timing(**point) for point in entry["points"])
    return Curve(entry["kind"], entry["world_size"], points, tuple(entry["not_measured"]))
