"""Places at which all ranks must meet, such as the end of an epoch: no rank goes on until all have reached the same.

Ranks may have different numbers of batches. One that ends its epoch goes on to what Lightning does there, and the ranks
that have further batches wait for messages that it never sends. So where the numbers may differ, each rank writes into
the process group's store which batch it begins. A rank that reaches the end of an epoch, or another place where all
ranks meet, as for a checkpoint, writes that as well. It then reads the store, without a collective, until all others
are there or one is found to be elsewhere. In that case it raises an error, which reaches the others like any failure.

Places are numbered in the order in which a rank reaches them: a rank that waits at its third place compares it with the
third place of each other rank.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, NamedTuple, TypeVar

from lightning_comm.transport.failure_messages import LostConnectionError
from lightning_comm.transport.stop_protocol import Agreement
from lightning_comm.transport.store_client import KeyValueStore, StoreLostError

_Error = TypeVar("_Error", bound=Exception)
_LOOK_S, _LONGEST_LOOK_S = 0.001, 0.2  # seconds between looks into the store: at first, and at most
EPOCH_END = "the end of the epoch"


class RankPlace(NamedTuple):
    """A position of a rank: its epoch, the batches of it, optimizer steps in all, and what it is there for, as text."""

    epoch: int
    batches: int
    steps: int
    purpose: str


class EpochEnds:
    """Compares where ranks stand when their epochs end, and at other places to which all of them come.

    Args:
        store: A store that all ranks share.
        rank: This rank.
        world_size: The number of ranks.
        namespace: Keeps the keys of one run apart from those of another; the same on all ranks.
        where: The strategy, for messages.
        agreement: Publishes a failure of this rank, and raises those of others.
        hang_up: Frees ranks that wait in a collective which this rank will never join.
        timeout_s: How long this rank waits for the others.

    Note:
        *Communication.* No collective. For each batch one small write to the store, whose answer is waited for; at each
        of these places one more, and look-ups until all ranks are there. These are not counted in the ledger.

    """

    def __init__(
        self,
        store: KeyValueStore,
        rank: int,
        world_size: int,
        namespace: str,
        where: str,
        agreement: Agreement,
        hang_up: Callable[[], None],
        timeout_s: float,
    ) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._namespace, self._where = f"{namespace}/ends", where
        self._agreement, self._hang_up, self._timeout_s = agreement, hang_up, timeout_s
        self._begun = 0, 0  # the epoch, and the number of the batch in it
        self._reached: RankPlace | None = None  # where this rank is, until the others are there too
        self._last_epoch = -1  # the last epoch that this rank has ended
        self._counts, self._number = 0, 0  # how often the numbering has restarted; the number of the last place
        self.needed = False  # whether ranks may differ in batches or steps; the same on all ranks

    def begin_batch(self, epoch: int, number: int) -> None:
        """Publish that this rank begins a batch, counted from 1 in each epoch; called before any message of it."""
        self._begun = epoch, number
        if self.needed:
            with self._agreement.first_error_shown("a look into the store"):
                self._store.set(f"{self._namespace}/begun/{self._rank}", json.dumps(self._begun))

    def end_epoch(self, epoch: int, steps: int) -> None:
        """Publish that this rank has ended an epoch, unless it has done so already."""
        if self.needed and epoch > self._last_epoch:
            self._last_epoch = epoch
            self._reach(epoch, steps, EPOCH_END)

    def meet(self, purpose: str, steps: int, meanwhile: Callable[[], bool]) -> None:
        """Compare the positions of ranks in the middle of an epoch; all ranks call this equally often.

        Args:
            purpose: What the ranks meet for, such as "a checkpoint"; it must be equal as well.
            steps: Optimizer steps of this rank.
            meanwhile: As in :meth:`wait`.

        Raises:
            ValueError: As in :meth:`wait`.

        """
        if self.needed:
            self._reach(self._begun[0], steps, purpose)
            self.wait(meanwhile)

    def wait(self, meanwhile: Callable[[], bool]) -> None:
        """Wait until all ranks have reached the place that this one has published; does nothing if there is none.

        Args:
            meanwhile: Called again and again; it may raise, and returns whether to wait no longer.

        Raises:
            ValueError: If a rank is elsewhere: at a place after other batches or steps, or with another purpose, or in
                a further batch.
            PeerFailure: If another rank has failed, or does not come in time.

        """
        if self._reached is not None:
            with self._agreement.first_error_shown(f"the others at {self._reached.purpose}"):
                self._wait(self._reached, meanwhile)
            self._reached = None

    def count_anew(self) -> None:
        """Restart the numbering of places, on all ranks alike, after they have agreed to stop at different ones."""
        self._counts, self._number, self._reached = self._counts + 1, 0, None

    def _wait(self, mine: RankPlace, meanwhile: Callable[[], bool]) -> None:
        places, pause_s, until_s = {self._rank: mine}, _LOOK_S, time.monotonic() + self._timeout_s
        while len(places) < self._world_size:
            further = self._look(mine, places)
            if further or any(place != mine for place in places.values()):
                raise self.publish_failure(
                    different_places_error(self._where, mine.epoch, self._world_size, places, further)
                )
            if meanwhile():
                break
            if len(places) < self._world_size:
                if time.monotonic() > until_s:
                    raise LostConnectionError(f"Timed out waiting for {self._world_size - len(places)} other ranks.")
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_LOOK_S)

    def publish_failure(self, error: _Error) -> _Error:
        """Publish an error and free the ranks that wait for this one; return the error, to be raised."""
        with suppress(StoreLostError):  # a store lost with its host fails on all ranks, so all know
            self._agreement.report_failure(f"{type(error).__name__}: {error}")
        self._hang_up()
        return error

    def _reach(self, epoch: int, steps: int, purpose: str) -> None:
        self._number += 1
        self._reached = RankPlace(epoch, self._begun[1] if self._begun[0] == epoch else 0, steps, purpose)
        with self._agreement.first_error_shown("a look into the store"):
            self._store.set(self._key_of(self._rank), json.dumps(self._reached))

    def _look(self, mine: RankPlace, places: dict[int, RankPlace]) -> dict[int, tuple[int, int]]:
        """Add the ranks that are there by now; return the batches of those that have gone on without coming here."""
        further: dict[int, tuple[int, int]] = {}
        for rank in set(range(self._world_size)) - set(places):
            if self._add(rank, places):
                continue
            epoch, number = self._read(f"{self._namespace}/begun/{rank}") or (-1, 0)
            # Between these two reads it may have come, found this rank there, and gone on. It publishes its place
            # before it begins a further batch, so a second read of the place is conclusive.
            if (epoch, number) > (mine.epoch, mine.batches) and not self._add(rank, places):
                further[rank] = epoch, number
        return further

    def _add(self, rank: int, places: dict[int, RankPlace]) -> bool:
        if (place := self._read(self._key_of(rank))) is None:
            return False
        places[rank] = RankPlace(*place)
        return True

    def _key_of(self, rank: int) -> str:
        return f"{self._namespace}/{self._counts}/{self._number}/{rank}"

    def _read(self, key: str) -> list[Any] | None:
        if not self._store.check([key]):
            return None
        found: list[Any] = json.loads(self._store.get(key))
        return found


def same_batches(batches: dict[int, int]) -> str:
    """Return how all ranks get the same number of batches.

    Args:
        batches: By rank, the batches of those whose epoch is over.

    """
    if empty := [rank for rank, count in sorted(batches.items()) if count == 0]:
        ranks = f"rank {empty[0]}" if len(empty) == 1 else f"ranks {empty}"
        return f"The data of {ranks} is empty; give every rank data, and all the same number of batches."
    return (
        "Give all ranks the same number of batches: "
        f"`Trainer(limit_train_batches={min(batches.values())})`, or as many as the shortest epoch of any rank has."
    )


def different_places_error(
    where: str, epoch: int, world_size: int, places: dict[int, RankPlace], further: dict[int, tuple[int, int]]
) -> ValueError:
    """Return the error of ranks that are at different places.

    Args:
        where: The strategy.
        epoch: That of this rank.
        world_size: The number of ranks.
        places: The positions of the ranks that have published one.
        further: By rank, the epoch and the batch that the other ranks have begun meanwhile.

    """
    cause = _cause(places)
    at_one = len({place[:2] for place in places.values()}) == 1 < len(places)
    purpose = cause == "calls" or (cause == "batches" and at_one)
    ranks = "; ".join(_position_text(rank, epoch, places, further, purpose=purpose) for rank in range(world_size))
    if cause == "calls":
        return ValueError(
            f"{where}: {_OTHER_CALLS} in epoch {epoch}: of its batches {ranks}; so some would wait forever for the "
            "others. Let all ranks do the same after the same batches: whether a callback or a hook saves a "
            "checkpoint, validates or updates an average must not depend on the rank, nor on its own data."
        )
    ended = {rank: place.batches for rank, place in places.items() if place.purpose == EPOCH_END}
    way_out = (
        "so a rank has left out optimizer steps that others took. Step on all ranks alike: where `optimizer_step` "
        "or manual optimization skips a step, decide it with `self.trainer.strategy.reduce_boolean_decision(skip, "
        "all=False)`."
        if cause == "steps"
        else f"so some would wait forever for the others. {same_batches(ended)}"
    )
    return ValueError(
        f"{where}: ranks have different numbers of training batches or steps in epoch {epoch}: of its batches "
        f"{ranks}; {way_out}"
    )


def _cause(places: dict[int, RankPlace]) -> Literal["steps", "calls", "batches"]:
    """Return in what the ranks differ, as far as the published positions show."""
    stands = [place[:2] for place in places.values()]
    ends = [place[:2] for place in places.values() if place.purpose == EPOCH_END]
    if len(set(stands)) == 1 < len({place.steps for place in places.values()}):
        return "steps"
    # A rank that stands before the end of another's epoch has not ended its own, and the other has gone past its
    # place: that is another call, such as a checkpoint of one rank alone. Only if the earliest position is an end of an
    # epoch do the numbers of batches differ.
    return "batches" if ends and min(ends) == min(stands) else "calls"


_OTHER_CALLS = "ranks do not come to the same places"


def is_of_other_calls(error: Exception) -> bool:
    """Whether an error, of this rank or of another, is that ranks with equal batches do different things."""
    return _OTHER_CALLS in str(error)


def _position_text(
    rank: int, epoch: int, places: dict[int, RankPlace], further: dict[int, tuple[int, int]], *, purpose: bool
) -> str:
    def of(other: int) -> str:
        return f" of epoch {other}" if other != epoch else ""

    if rank in places:
        place = places[rank]
        stopped = f"rank {rank} stopped after {place.batches}{of(place.epoch)}, at optimizer step {place.steps}"
        return f"{stopped}, for {place.purpose}" if purpose else stopped
    if rank in further:
        return f"rank {rank} has begun number {further[rank][1]}{of(further[rank][0])}"
    return f"rank {rank} has not said"
