"""The end of an epoch whose length could not be compared before: no rank goes on until all have ended theirs alike.

A rank that ends an epoch goes on to what Lightning does at its end, and ranks that have further batches wait for it in
messages that it never sends. So where lengths are not sure, each rank writes down in the process group's store which
batch it begins. Whoever ends an epoch writes that down as well, and looks, without a collective, until all others have
ended theirs, or one has begun a further batch. In that case it says so, and the others hear of it as of any failure.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, TypeVar

from lightning_comm.transport.agreement import Agreement
from lightning_comm.transport.peer_texts import LostConnectionError
from lightning_comm.transport.store_client import KeyValueStore, StoreLostError

_Error = TypeVar("_Error", bound=Exception)
_LOOK_S, _LONGEST_LOOK_S = 0.001, 0.2  # how often the store is looked at: first, and later


class Place(NamedTuple):
    """Where a rank stands: batches of its epoch, optimizer steps in all."""

    batches: int
    steps: int


class EpochEnds:
    """Compares where ranks stand when their epochs end, and at other places to which all of them come.

    Args:
        store: A store that all ranks share.
        rank: This rank.
        world_size: The number of ranks.
        namespace: Keeps the keys of one run apart from those of another; the same on all ranks.
        where: The strategy, for messages.
        agreement: Tells the other ranks of a failure of this one, and shows theirs.
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
        self._reached: tuple[str, int, Place] | None = None  # where, and in which epoch, until the others are there too
        self._last_epoch = -1  # that all ranks have ended
        self._meetings = 0
        self.needed = False  # whether ranks may come apart by batches or steps; the same on all ranks

    def begin_batch(self, epoch: int, number: int) -> None:
        """Write down that this rank begins a batch, counted from 1 in each epoch; called before any message of it."""
        self._begun = epoch, number
        if self.needed:
            with self._agreement.first_error_shown("a look into the store"):
                self._store.set(f"{self._namespace}/begun/{self._rank}", f"{epoch} {number}")

    def end_epoch(self, epoch: int, steps: int) -> None:
        """Write down that this rank has ended an epoch, unless that is written down already."""
        if self.needed and epoch > self._last_epoch:
            self._last_epoch = epoch
            self._reach(f"epoch {epoch}", epoch, steps)

    def meet(self, steps: int, meanwhile: Callable[[], bool]) -> None:
        """Compare where ranks stand, in the middle of an epoch; all ranks come here, as often as each other.

        Raises:
            ValueError: As in :meth:`wait`.

        """
        if self.needed:
            self._meetings += 1
            self._reach(f"meeting {self._meetings}", self._begun[0], steps)
            self.wait(meanwhile)

    def wait(self, meanwhile: Callable[[], bool]) -> None:
        """Wait until all ranks are where this one has said to be; does nothing if it has not.

        Args:
            meanwhile: Called again and again; it may raise, and returns whether to wait no longer.

        Raises:
            ValueError: If a rank is there after other batches or steps, or goes on with a further batch.
            PeerFailure: If another rank has failed, or does not come in time.

        """
        if self._reached is not None:
            with self._agreement.first_error_shown("the others at the end of an epoch, or before a checkpoint"):
                self._wait(*self._reached, meanwhile)
            self._reached = None

    def _wait(self, key: str, epoch: int, mine: Place, meanwhile: Callable[[], bool]) -> None:
        places, pause_s, until_s = {self._rank: mine}, _LOOK_S, time.monotonic() + self._timeout_s
        while len(places) < self._world_size:
            further = self._look(key, epoch, mine, places)
            if further or any(place != mine for place in places.values()):
                raise self.told(unequal_epochs(self._where, epoch, self._world_size, places, further))
            if meanwhile():
                break
            if len(places) < self._world_size:
                if time.monotonic() > until_s:
                    raise LostConnectionError(f"Timed out waiting for {self._world_size - len(places)} other ranks.")
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_LOOK_S)

    def told(self, error: _Error) -> _Error:
        """Return an error, when the other ranks can hear of it and are free to."""
        with suppress(StoreLostError):  # the store is gone with its host, and then everybody knows
            self._agreement.report_failure(f"{type(error).__name__}: {error}")
        self._hang_up()
        return error

    def _reach(self, key: str, epoch: int, steps: int) -> None:
        place = Place(self._begun[1] if self._begun[0] == epoch else 0, steps)
        self._reached = key, epoch, place
        with self._agreement.first_error_shown("a look into the store"):
            self._store.set(f"{self._namespace}/{key}/{self._rank}", f"{place.batches} {place.steps}")

    def _look(self, key: str, epoch: int, mine: Place, places: dict[int, Place]) -> dict[int, int]:
        """Add who else is there by now; return the batches of those that go on in the same epoch."""
        further: dict[int, int] = {}
        for rank in set(range(self._world_size)) - set(places):
            if (place := self._numbers(f"{self._namespace}/{key}/{rank}")) is not None:
                places[rank] = Place(*place)
                continue
            begun, number = self._numbers(f"{self._namespace}/begun/{rank}") or (-1, 0)
            if begun == epoch and number > mine.batches:
                further[rank] = number
        return further

    def _numbers(self, key: str) -> tuple[int, int] | None:
        if not self._store.check([key]):
            return None
        first, second = self._store.get(key).decode().split()
        return int(first), int(second)


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


def unequal_epochs(
    where: str, epoch: int, world_size: int, places: dict[int, Place], further: dict[int, int]
) -> ValueError:
    """Return the error of ranks that come apart.

    Args:
        where: The strategy.
        epoch: That of this rank.
        world_size: The number of ranks.
        places: Where those ranks stand that have said so, which are done with their batches for now.
        further: By rank, the batch that others have begun meanwhile.

    """
    said = [
        f"rank {rank} stopped after {places[rank].batches}, at optimizer step {places[rank].steps}"
        if rank in places
        else f"rank {rank} has begun number {further[rank]}"
        if rank in further
        else f"rank {rank} has not said"
        for rank in range(world_size)
    ]
    if further or len({place.batches for place in places.values()}) > 1:
        counted = {rank: place.batches for rank, place in places.items()}
        way_out = f"so some would wait for ever for the others. {same_batches(counted)}"
    else:
        way_out = (
            "so a rank has left out optimizer steps that others took. Step on all ranks alike: where `optimizer_step` "
            "or manual optimization skips a step, decide it with `self.trainer.strategy.reduce_boolean_decision(skip, "
            "all=False)`."
        )
    return ValueError(
        f"{where}: ranks have different numbers of training batches or steps in epoch {epoch}: of its batches "
        f"{'; '.join(said)}; {way_out}"
    )
