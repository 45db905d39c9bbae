"""The probe of the link between the ranks of a job: times of messages by size, and the links between its hosts.

Messages whose time is taken go to torch.distributed directly, so that nothing else is in that time, and are written to
the ledger behind it. Every number that a decision rests on is the maximum over the ranks, so all ranks decide alike and
make the same calls.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_comm.core.costs import Curve, HostLink, LinkProfile, Timing
from lightning_comm.core.host_links import slowest
from lightning_comm.core.ledger import CommLedger
from lightning_comm.core.link_curve import quartiles
from lightning_comm.core.probe_plan import MAX_BYTES, MIN_BYTES, STEP, ProbePlan, growth, pairs, sizes_between
from lightning_comm.instruments.clocks import gather_json
from lightning_comm.transport.recording import Recorder

_WARM_UP_BYTES = 64 * 2**10
_WARM_UP_CALLS = 3
_MOST_ON_A_LINK = 16 * 2**20  # bytes: 37 µs at 450 GB/s, which still is more than latency

Sample = Callable[[int, int], list[float]]  # payload bytes, calls -> own seconds of a call, for one or more ways


def probe_link(
    plan: ProbePlan,
    *,
    host: str,
    node: int = 0,
    device: torch.device | None = None,
    transport: str = "",
    environment: Mapping[str, str] | None = None,
    ledger: CommLedger | None = None,
) -> LinkProfile:
    """Measure the link between all ranks of the default process group.

    All ranks call it together, with the same plan; all get the same curves and links.

    Args:
        plan: Sizes, repeats and the budget of time.
        host: The name of the host that this rank is on.
        node: The number of that host in the job, which distinguishes hosts of the same name.
        device: Where the messages are; the CPU by default.
        transport: The transport of the messages, for the profile.
        environment: Where the figures come from, for the profile.
        ledger: Where messages are written down, as ``"probe"`` and ``"instruments"``.

    Returns:
        All-reduces, all-gathers and single messages by size. A collective's time is that of the slowest rank, from its
        call to its end, after all ranks have met. A single message's is half of a round trip with an answer of 4 bytes
        that is taken off, on the slowest link and in its slower direction. Links are measured one at a time, both ways,
        between the first ranks of the hosts (between all ranks, where there is only one host).

    Raises:
        ValueError: On all ranks, if the budget does not suffice for the smallest size.

    Note:
        *Communication.* As many bytes as the plan's budget lets through; nothing else should use the link meanwhile.

        *Memory.* The largest size, 64 MiB or more, and a part of it.

    """
    device = device or torch.device("cpu")
    recorder = Recorder(CommLedger() if ledger is None else ledger)
    hosts = host_names([(name, number) for name, number in gather_json((host, node), device, recorder.ledger)])
    bench = _Bench(plan, device, recorder)
    bench.warm_up()
    reduces = bench.all_reduces()
    if reduces is None:
        raise ValueError(
            f"probe: `seconds` must leave time for an all-reduce of {plan.sizes[0]} bytes, {plan.repeats + 1} times; "
            f"got {plan.seconds!r}. Raise it, or ask for smaller sizes."
        )
    gathers = bench.all_gathers()
    ends = link_ends(hosts)
    links = bench.links(ends)
    worst = slowest(links) if links else None
    way = (ends[worst.source], ends[worst.target]) if worst else tuple(ends.values())[:2]
    sends = bench.sends(*way)
    return LinkProfile(
        world_size=len(hosts),
        backend=str(dist.get_backend()),
        curves=tuple(curve for curve in (reduces, gathers, sends) if curve),
        transport=transport,
        hosts=tuple(hosts),
        links=tuple(links),
        environment={
            **(environment or {}),
            "seconds": f"{bench.elapsed_s:.1f}",
            "sent_bytes": str(recorder.ledger.wire_bytes()),
        },
    )


def device_of_messages(preferred: torch.device) -> torch.device:
    """Return where the messages to measure are: on the device, unless its backend is gloo.

    Gloo carries a GPU's tensors through the host's memory, and sends none of them from rank to rank.
    """
    backends = dict(part.split(":") for part in str(dist.get_backend_config()).split(","))
    return torch.device("cpu") if backends.get(preferred.type) == "gloo" else preferred


def link_ends(hosts: Sequence[str]) -> dict[str, int]:
    """Return the rank at each end of a link: the first one of a host, or each rank where there is one host.

    Example:
        >>> link_ends(["a", "a", "b"]), link_ends(["a", "a"])
        ({'a': 0, 'b': 2}, {'rank 0': 0, 'rank 1': 1})

    """
    ends = {name: hosts.index(name) for name in dict.fromkeys(hosts)}
    return ends if len(ends) > 1 else {f"rank {rank}": rank for rank in range(len(hosts))}


def host_names(places: Sequence[tuple[str, int]]) -> list[str]:
    """Return a name for the host of each rank: its own, with its number where several hosts have the same.

    Example:
        >>> host_names([("a", 0), ("a", 0), ("b", 1)]), host_names([("box", 0), ("box", 1)])
        (['a', 'a', 'b'], ['box/0', 'box/1'])

    """
    nodes = {name: {node for other, node in places if other == name} for name, _ in places}
    return [name if len(nodes[name]) == 1 else f"{name}/{node}" for name, node in places]


class _Bench:
    """Takes samples, and stops before the plan's budget is used up."""

    def __init__(self, plan: ProbePlan, device: torch.device, recorder: Recorder) -> None:
        self.elapsed_s = 0.0  # on the slowest rank, when the ranks last agreed on something
        self._plan = plan
        self._device = device
        self._recorder = recorder
        self._rank, self._ranks = recorder.rank, recorder.world_size
        self._largest = max(plan.sizes[-1], MAX_BYTES)
        # Written to, since memory that was only allocated is not there yet.
        self._buffer = torch.empty(self._largest // MIN_BYTES, device=device).zero_()
        self._part = torch.empty(self._largest // MIN_BYTES // self._ranks, device=device).zero_()
        self._token = torch.zeros(1, device=device)
        self._began_s = time.monotonic()

    def warm_up(self) -> None:
        """Open connections and fill caches; the budget begins afterwards."""
        for _ in range(_WARM_UP_CALLS):
            self._all_reduce(_WARM_UP_BYTES, 1)
            self._all_gather(MIN_BYTES, 1)
        self._began_s = time.monotonic()

    def all_reduces(self) -> Curve | None:
        return self._curve("all_reduce", self._plan.sizes, self._all_reduce)

    def all_gathers(self) -> Curve | None:
        # What is gathered has to fit into the buffer.
        return self._curve(
            "all_gather", [size for size in self._plan.sizes if size * self._ranks <= self._largest], self._all_gather
        )

    def sends(self, source: int, target: int) -> Curve | None:
        def both_ways(size: int, calls: int) -> list[float]:
            return [self._round_trip(*way, size, calls) for way in ((source, target), (target, source))]

        self._agree(both_ways(MIN_BYTES, _WARM_UP_CALLS))
        calls = self._plan.calls_in_a_sample(max(self._agree(both_ways(MIN_BYTES, 1))))
        answers = [max(trips) for trips in self._samples(both_ways, MIN_BYTES, calls)]
        return self._curve("send", self._plan.sizes, both_ways, answer_s=quartiles(answers)[1] / 2)

    def links(self, ends: Mapping[str, int]) -> list[HostLink]:
        """Measure both directions of each pair, one at a time, each with the size that its share of time allows."""
        names, ranks = list(ends), list(ends.values())
        ways = pairs(len(ends))

        def one_by_one(sizes: Sequence[int]) -> list[float]:
            """Return own seconds of a round trip on each way; a size of 0 leaves a way out."""
            trips = zip(ways, sizes, strict=True)
            return [self._round_trip(ranks[a], ranks[b], size, 1) if size else 0.0 for (a, b), size in trips]

        def samples(sizes: Sequence[int]) -> list[list[float]]:
            return self._samples(lambda *_: one_by_one(sizes), 0, 1)

        smallest = [MIN_BYTES] * len(ways)
        self._agree(one_by_one(smallest))  # opens connections
        began_s = self.elapsed_s
        empty_s = self._agree(one_by_one(smallest))
        meeting_s = self.elapsed_s - began_s  # of all ranks, once for each direction: it takes time as well
        rounds = self._plan.repeats * (1 + 1 / STEP) + 2
        share_s = (self._plan.left_s("links", self.elapsed_s) / rounds - 3 * meeting_s) / len(ways)
        if share_s <= 0:
            return []
        sizes = self._grow(one_by_one, smallest, empty_s, share_s)
        parts = [max(MIN_BYTES, size // STEP) for size in sizes]
        trips = [list(zip(*samples(each), strict=True)) for each in (smallest, parts, sizes)]  # by size, way and sample
        links = [
            _link(names[a], names[b], sizes[way], *(of_size[way] for of_size in trips))
            for way, (a, b) in enumerate(ways)
        ]
        return [link for link in links if link is not None]

    def _grow(
        self, one_by_one: Callable[[Sequence[int]], list[float]], sizes: list[int], took_s: list[float], share_s: float
    ) -> list[int]:
        """Return for each way about the largest size whose round trip lasts no longer than ``share_s``."""
        while True:
            by = growth(took_s, share_s)
            larger = [
                min(size * f, _MOST_ON_A_LINK) * (size < _MOST_ON_A_LINK) for size, f in zip(sizes, by, strict=True)
            ]
            if not any(larger):
                # A message that outgrew what a shaper lets pass at once may have taken far longer than was foreseen.
                return [size // STEP if s > 2 * share_s else size for s, size in zip(took_s, sizes, strict=True)]
            tries = [self._agree(one_by_one(larger)) for _ in range(2)]  # noise only adds
            sizes = [new or old for new, old in zip(larger, sizes, strict=True)]
            took_s = [min(both) or took for both, took in zip(zip(*tries, strict=True), took_s, strict=True)]

    def _curve(self, kind: str, sizes: Sequence[int], sample: Sample, answer_s: float = 0.0) -> Curve | None:
        points: list[Timing] = []
        reached, call_s = MIN_BYTES, sum(self._agree(sample(MIN_BYTES, 1)))
        for size in sizes:
            first_s = self._climb(kind, sample, reached, call_s, size)
            if first_s is None:
                break
            rows = self._samples(sample, size, self._plan.calls_in_a_sample(first_s))
            reached, call_s = size, quartiles([sum(row) for row in rows])[1]
            points.append(Timing.of(size, [max(max(row) - answer_s, max(row) / 2) for row in rows]))
        measured = {point.payload_bytes for point in points}
        left_out = tuple(size for size in self._plan.sizes if size not in measured)
        return Curve(kind, self._ranks, tuple(points), left_out) if points else None

    def _climb(self, part: str, sample: Sample, reached: int, call_s: float, size: int) -> float | None:
        """Return the seconds of a first call of a size, or ``None`` where there is no time for its samples.

        A message that is four times as large takes at most four times as long. So a size is approached in such steps,
        and none is sent that might take longer than there is time for.
        """
        for larger in sizes_between(reached, size)[1:] or (size,):
            if not self._affords(part, self._plan.repeats + 1, call_s * larger / reached):
                return None
            reached, call_s = larger, sum(self._agree(sample(larger, 1)))
        return call_s if self._affords(part, self._plan.repeats, call_s) else None

    def _affords(self, part: str, calls: int, call_s: float) -> bool:
        return self._plan.affords(part, elapsed_s=self.elapsed_s, calls=calls, call_s=call_s)

    def _samples(self, sample: Sample, size: int, calls: int) -> list[list[float]]:
        rows = [sample(size, calls) for _ in range(self._plan.repeats)]
        flat = self._agree([seconds for row in rows for seconds in row])
        width = len(rows[0])
        return [flat[start : start + width] for start in range(0, len(flat), width)]

    def _agree(self, own: Sequence[float]) -> list[float]:
        """Return the maxima over the ranks, and note how much time the slowest has used."""
        values = torch.tensor([*own, time.monotonic() - self._began_s], dtype=torch.float64, device=self._device)
        self._recorder.all_reduce(values, "probe", dist.ReduceOp.MAX).wait()
        *agreed, self.elapsed_s = values.tolist()
        return agreed

    def _all_reduce(self, size: int, calls: int) -> list[float]:
        message = self._buffer[: size // MIN_BYTES]
        return [self._timed("all_reduce", message, lambda: dist.all_reduce(message), calls)]

    def _all_gather(self, size: int, calls: int) -> list[float]:
        part = self._part[: size // MIN_BYTES]
        whole = self._buffer[: part.numel() * self._ranks]
        return [self._timed("all_gather", part, lambda: dist.all_gather_into_tensor(whole, part), calls)]

    def _timed(self, kind: str, message: Tensor, call: Callable[[], object], calls: int) -> float:
        self._meet()
        began = time.perf_counter()
        for _ in range(calls):
            call()
            self._finish()
        took_s = (time.perf_counter() - began) / calls
        self._note(kind, message, calls)
        return took_s

    def _note(self, kind: str, message: Tensor, calls: int) -> None:
        """Write down messages whose time has been taken."""
        for _ in range(calls):
            self._recorder.note(kind, "probe", message.nbytes)

    def _round_trip(self, source: int, target: int, size: int, calls: int) -> float:
        """Return the seconds from a message's start to the answer that it has arrived; 0.0 on all but the source."""
        self._meet()  # so that no other pair is still at it
        message = self._buffer[: size // MIN_BYTES]
        if self._rank == target:
            dist.send(self._token, source)  # the source waits for this, so that it does not time the target's coming
            for _ in range(calls):
                dist.recv(message, source)
                dist.send(self._token, source)
            self._finish()
            self._note("send", self._token, 1 + calls)
        if self._rank != source:
            return 0.0
        dist.recv(self._token, target)
        self._finish()
        began = time.perf_counter()
        for _ in range(calls):
            dist.send(message, target)
            dist.recv(self._token, target)
            self._finish()
        took_s = (time.perf_counter() - began) / calls
        self._note("send", message, calls)
        return took_s

    def _meet(self) -> None:
        self._recorder.all_reduce(self._token, "probe").wait()
        self._finish()

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _link(
    source: str, target: str, size: int, empty: Sequence[float], part: Sequence[float], full: Sequence[float]
) -> HostLink | None:
    """Make a link of round trips with 4 bytes, with a quarter of a size, and with all of it.

    The rate is that of the last three quarters, since shapers and buffers let the beginning of a message pass at once.
    ``None``: the payload does not show in the time.
    """
    begun_s = quartiles(part)[1]
    if quartiles(full)[1] < 2 * begun_s:
        return None
    rest = size - size // STEP
    # of a single sample, noise must not make the rate infinite
    lower, median, upper = quartiles([rest / max(seconds - begun_s, seconds / 2) for seconds in full])
    return HostLink(source, target, size, quartiles(empty)[1] / 2, median, lower, upper)
