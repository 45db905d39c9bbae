"""A proof, for given numbers of workers and stages, that a cyclic schedule can be carried out in order.

A worker has three threads of control. One computes. One handles the sums of gradients, one the new versions of the
parameters, each a stage after the other in a fixed order; messages between two workers are received in the order in
which they were sent. Every event waits for others, and as long as these waits have no cycle, there is no deadlock.
That is how the ring works on NCCL. :mod:`lightning_comm.core.cyclic.link_proof` is about gloo, where each stage has
threads of its own and what waits for a link is sent in the order of urgency, through a window.

**Send windows.** Here a send waits until its receiver asks for that very message. A channel that takes in ``w``
messages, and lets the next one wait until the receiver has taken one, waits for less: message ``k`` for the taking of
message ``k - w``, and the receiver takes that before it asks for ``k``. So what is proven holds for every ``w >= 1``.
"""

import graphlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_comm.core.cyclic.schedule import TRANSFER_KINDS, CyclicSchedule, Transfer, TransferKind
from lightning_comm.core.cyclic.stagger import token_boundary


class ScheduleError(ValueError):
    """A schedule cannot be carried out: it would lose a message, read a wrong version, or deadlock."""


class Event(NamedTuple):
    """Something that a worker does once; ``worker`` and ``stage`` are -1 at a flush, which all do together."""

    what: str
    worker: int
    stage: int
    step: int

    def __str__(self) -> str:
        if self.what == "flush":
            return f"flush after step {self.step}"
        return f"worker {self.worker}: {self.what}, stage {self.stage} of step {self.step}"


@dataclass(frozen=True, slots=True)
class ScheduleProof:
    """What was checked.

    Args:
        events: How many events were put in order.
        transfers: How many were matched.
        critical_path_slots: The longest chain of stage passes of which each waits for the one before it: how many slots
            the steps take where messages and updates take no time.

    """

    events: int
    transfers: int
    critical_path_slots: int


def check_schedule(
    schedule: CyclicSchedule,
    steps: int = 4,
    flush_after: Collection[int] = (),
    *,
    stagger: bool = False,
    asked_late: bool = False,
    forward_share: float = 1 / 3,
    transfers: Callable[[int], Iterable[Transfer]] | None = None,
    order: Callable[[int], Sequence[int]] | None = None,
) -> ScheduleProof:
    """Prove that the steps of a schedule can be carried out; raise with the cause if they cannot.

    It is carried out in order, as NCCL does it; :func:`~lightning_comm.core.cyclic.link_proof.check_links` is for gloo.
    Checked are: the transfers sent, those received and the table of transfers are the same, in the same order at both
    ends; every version is there before it is read, and none is older than the rule allows; no wait leads back to
    itself, even if a send waits until its receiver asks for it, so whatever the send window; each sum holds every
    worker's gradient once.

    Args:
        schedule: The rules.
        steps: How many steps. The waits of a step reach back by two steps at most, so that 4 show all there are.
        flush_after: After how many steps all workers meet and use the newest version of everything.
        stagger: Whether a worker begins a step only after the one before it has come so far in it as
            :func:`~lightning_comm.core.cyclic.stagger.token_boundary` returns, and the first one after the last.
        asked_late: Whether a worker asks for a message only when its own gradient of the stage is there, or on its way,
            as on NCCL, where a receive occupies the device.
        forward_share: For the stagger, the part of a step's time that its forward takes.
        transfers: The table of a step, if not the schedule's own.
        order: The stages in the order in which a worker handles messages, if not the schedule's own.

    Raises:
        ScheduleError: If the schedule cannot be carried out; it names the message, the version or the cycle.
        ValueError: If an argument is out of range.

    Note:
        *Communication.* None.

    Example:
        >>> check_schedule(CyclicSchedule(workers=3, stages=6), steps=4)
        ScheduleProof(events=600, transfers=96, critical_path_slots=48)

    """
    if steps < 1:
        raise ValueError(f"check_schedule: `steps` must be >= 1; got {steps!r}. 4 show every kind of wait.")
    wrong = [point for point in flush_after if not 1 <= point <= steps]
    if wrong:
        raise ValueError(
            f"check_schedule: `flush_after` must be from 1 to `steps`={steps}; got {wrong[0]!r}. It counts the steps "
            "done; give more `steps`, or leave it out."
        )
    token_after = token_boundary(schedule.workers, schedule.stages, forward_share) if stagger else None
    own_order = schedule.order()
    orders = [tuple(order(worker) if order else own_order) for worker in range(schedule.workers)]
    case = _Case(schedule, steps, frozenset(flush_after), token_after, asked_late, orders)
    count = _match_transfers(case, transfers or schedule.transfers)
    _check_versions(case)
    waits = _Waits(case).of_all()
    slots = put_in_order(waits)
    _check_sums(case)
    return ScheduleProof(len(waits), count, slots)


@dataclass(frozen=True, slots=True)
class _Case:
    schedule: CyclicSchedule
    steps: int
    flush_after: frozenset[int]
    token_after: int | None
    asked_late: bool
    orders: list[tuple[int, ...]]  # by worker

    def version(self, worker: int, stage: int, step: int) -> int:
        return self.schedule.version(worker, stage, step, self.flushed_at(step))

    def flushed_at(self, step: int) -> int:
        return max((point for point in self.flush_after if point <= step), default=0)

    def reads(self) -> Iterator[tuple[int, int, int]]:
        """Yield worker, stage and step of all forwards."""
        for worker in range(self.schedule.workers):
            for stage in range(self.schedule.stages):
                for step in range(self.steps):
                    yield worker, stage, step


# ---- transfers -------------------------------------------------------------------------------------------------------


def _match_transfers(case: _Case, table: Callable[[int], Iterable[Transfer]]) -> int:
    """Check that table, senders and receivers agree; return how many transfers there are."""
    schedule, count = case.schedule, 0
    for worker, order in enumerate(case.orders):
        if sorted(order) != list(range(schedule.stages)):
            raise ScheduleError(f"worker {worker} handles stages {order}; it must be each of {schedule.stages} once.")
    for step in range(case.steps):
        listed = Counter(table(step))
        for kind in TRANSFER_KINDS:
            for source in range(schedule.workers):
                target = schedule.after(source)
                sent = [
                    Transfer(kind, source, target, stage, step)
                    for stage in case.orders[source]
                    if schedule.sends(source, stage, kind)
                ]
                received = [
                    Transfer(kind, source, target, stage, step)
                    for stage in case.orders[target]
                    if schedule.receives(target, stage, kind)
                ]
                _match_channel(sent, received, listed)
                count += len(sent)
        if extra := +listed:
            raise ScheduleError(f"{next(iter(extra))} is in the table, and no worker sends it, or not so often.")
    return count


def _match_channel(sent: list[Transfer], received: list[Transfer], listed: Counter[Transfer]) -> None:
    """Compare both ends of a channel in one step, and take its transfers off the list."""
    if lost := Counter(sent) - Counter(received):
        raise ScheduleError(f"{next(iter(lost))} is sent and never received.")
    if lost := Counter(received) - Counter(sent):
        raise ScheduleError(f"{next(iter(lost))} is waited for and never sent.")
    for first, second in zip(sent, received, strict=True):
        if first != second:
            raise ScheduleError(
                f"{first} is sent where worker {first.target} waits for stage {second.stage}: both ends of a channel "
                "must handle the stages in the same order."
            )
    for transfer in sent:
        if not listed[transfer]:
            raise ScheduleError(f"{transfer} is sent, and is not in the table.")
        listed[transfer] -= 1


# ---- versions --------------------------------------------------------------------------------------------------------


def _check_versions(case: _Case) -> None:
    schedule = case.schedule
    for worker, stage, step in case.reads():
        version = case.version(worker, stage, step)
        fresh = step < schedule.warmup_sync_steps or schedule.is_fresh(worker, stage)
        oldest = step if fresh else max(step - 1, case.flushed_at(step))
        where = f"worker {worker} reads version {version} of stage {stage} in step {step}"
        if version > step:
            raise ScheduleError(f"{where}, and the newest there can be is {step}.")
        if version < oldest:
            raise ScheduleError(f"{where}, and the rule allows none older than {oldest}.")
        arrives = worker == schedule.owner(stage) or schedule.receives(worker, stage, "parameters")
        if version > 0 and not arrives:
            raise ScheduleError(f"{where}, and neither makes nor receives it.")


# ---- waiting ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Waits:
    """For each event, the events it waits for."""

    case: _Case
    waits: dict[Event, list[Event]] = field(default_factory=dict)

    def of_all(self) -> dict[Event, list[Event]]:
        for worker in range(self.case.schedule.workers):
            self._compute(worker)
            for kind in TRANSFER_KINDS:
                self._pass_on(worker, kind)
        everything = list(self.waits)
        for point in self.case.flush_after:
            self.waits[Event("flush", -1, -1, point - 1)] = [each for each in everything if each.step == point - 1]
        return self.waits

    def _compute(self, worker: int) -> None:
        schedule, before = self.case.schedule, None
        for step in range(self.case.steps):
            for number in range(2 * schedule.stages):
                event = stage_pass(schedule, worker, step, number)
                waits = [before] if before else []
                if number == 0:
                    waits += self._begin(worker, step)
                if event.what == "forward":
                    version = self.case.version(worker, event.stage, step)
                    waits += [Event("parameters held", worker, event.stage, version - 1)] if version else []
                self.waits[event] = waits
                before = event

    def _begin(self, worker: int, step: int) -> list[Event]:
        """Return what a worker waits for before a step: a flush, and its turn."""
        schedule, token_after = self.case.schedule, self.case.token_after
        waits = [Event("flush", -1, -1, step - 1)] if step in self.case.flush_after else []
        if token_after is not None and (worker or step):
            giver = (worker - 1) % schedule.workers
            waits.append(stage_pass(schedule, giver, step if worker else step - 1, token_after - 1))
        return waits

    def _pass_on(self, worker: int, kind: TransferKind) -> None:
        """The events of a thread that receives, adds or keeps, and sends on, a stage after the other."""
        schedule = self.case.schedule
        held = "gradient added" if kind == "gradient" else "parameters held"
        before: Event | None = None
        for step in range(self.case.steps):
            for stage in self.case.orders[worker]:
                ready, done, sent = (
                    Event(what, worker, stage, step) for what in (f"{kind} awaited", held, f"{kind} sent")
                )
                self.waits[ready] = [before] if before else []
                if self.case.asked_late and schedule.receives(worker, stage, kind):
                    own = "backward" if kind == "gradient" else "gradient sent"
                    self.waits[ready].append(Event(own, worker, stage, step))
                self.waits[done] = [ready, *self._sources(worker, kind, stage, step)]
                if schedule.receives(worker, stage, kind):
                    self.waits[done].append(done._replace(worker=(worker - 1) % schedule.workers))
                self.waits[sent] = [done]
                if schedule.sends(worker, stage, kind):
                    self.waits[sent].append(ready._replace(worker=schedule.after(worker)))
                before = sent

    def _sources(self, worker: int, kind: TransferKind, stage: int, step: int) -> list[Event]:
        """Return what a worker itself contributes: its gradient, or the new version if it owns the stage."""
        if kind == "gradient":
            return [Event("backward", worker, stage, step)]
        if worker != self.case.schedule.owner(stage):
            return []
        update = Event("update", worker, stage, step)
        self.waits[update] = [Event("gradient added", worker, stage, step)]
        if step:
            self.waits[update].append(update._replace(step=step - 1))
        return [update]


def stage_pass(schedule: CyclicSchedule, worker: int, step: int, number: int) -> Event:
    """Return the event that is a worker's pass of a step with that number, from 0."""
    if number < schedule.stages:
        return Event("forward", worker, number, step)
    return Event("backward", worker, 2 * schedule.stages - 1 - number, step)


def put_in_order(waits: dict[Event, list[Event]]) -> int:
    """Return the length of the longest chain of stage passes; raise if events wait in a circle."""
    ends: dict[Event, int] = {}
    try:
        for event in graphlib.TopologicalSorter(waits).static_order():
            begins = max((ends[each] for each in waits[event]), default=0)
            ends[event] = begins + (event.what in ("forward", "backward"))
    except graphlib.CycleError as error:
        circle = " <- ".join(map(str, error.args[1]))
        raise ScheduleError(f"these wait for each other in a circle: {circle}.") from None
    return max(ends.values())


def _check_sums(case: _Case) -> None:
    """Follow each sum back from its owner, which ends since no wait leads back to itself."""
    schedule = case.schedule
    for stage in range(schedule.stages):
        held = [schedule.owner(stage)]
        while schedule.receives(held[-1], stage, "gradient"):
            held.append((held[-1] - 1) % schedule.workers)
        if missing := set(range(schedule.workers)) - set(held):
            raise ScheduleError(f"the sum of stage {stage} reaches its owner without the gradients of {missing}.")
