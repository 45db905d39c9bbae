"""Agreement of all ranks to stop, or to save, in the middle of a round without a collective.

Within a round ranks run apart, so nobody may start a collective that others do not expect. A request goes through
the process group's store: the rank that has it posts it there, and every rank looks for requests now and then. A rank
that sees one publishes its position (its step) and waits a moment. When all positions are there, all ranks meet at the
largest step.

While a rank waits, another may be waiting for it, inside a collective of the user's that it cannot leave. So nobody
waits long: after ``patience_s`` a rank retracts its position and trains on, and pauses again at a step number at which
all ranks pause.

The keys of a request, all under ``namespace/generation``; the generation counts the decisions that were carried out:

- ``state``: ``open|version|kind|reason``, then ``decided|step|kind|reason``;
- ``position/<rank>``: the position as JSON, or ``moving`` once it was retracted.

Both a decision and a retraction are a compare-and-set of ``state``: a retraction counts its version up. So if a rank
retracts while another decides with its position, one of the two fails: either the decision, which is then tried again
with new positions, or the retraction, and the rank obeys the decision. No rank can pass a step that was decided on.
"""

import json
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Literal, TypeVar

import torch.distributed as dist

from lightning_comm.transport.failure_messages import PeerFailure as PeerFailure
from lightning_comm.transport.failures import Peers
from lightning_comm.transport.store_client import KeyValueStore as KeyValueStore
from lightning_comm.transport.store_client import StoreLostError
from lightning_comm.transport.store_client import default_store as default_store
from lightning_comm.transport.store_failures import Failures, StoreFailures

_T = TypeVar("_T")
Kind = Literal["stop", "terminate", "requeue", "checkpoint", "validate"]
AFTER_A_BATCH: tuple[Kind, ...] = ("checkpoint", "validate")  # done right after a batch, and nowhere else

_MOVING = "moving"  # in place of a position: that rank trains on
_SHARE, _LONGEST_S = 0.01, 4.0  # share of the time that looks into the store may take; longest pause between looks


@dataclass(frozen=True)
class Decision:
    """What the ranks agreed on.

    Args:
        kind: What is to be done.
        reason: Why, for the user; names the rank that asked.
        at_step: The optimizer step at which all ranks do it, or ``None``: each where it stands, because the slowest
            would need too long to catch up.

    """

    kind: Kind
    reason: str
    at_step: int | None


@dataclass(frozen=True)
class RankPosition:
    """Where a rank is.

    Args:
        step: Optimizer steps done.
        epoch: The epoch it is in.
        step_time_s: What a step takes it, in seconds.

    """

    step: int
    epoch: int
    step_time_s: float


class Agreement:
    """Requests of single ranks, agreed on by all of them through the process group's store.

    Args:
        store: A store that all ranks share (``get``, ``set``, ``check``, ``compare_set``).
        rank: This rank.
        world_size: The number of ranks.
        namespace: Keeps the keys of one run apart from those of another; the same on all ranks.
        poll_interval_s: Seconds between looks into the store while there is nothing to agree on.
        patience_s: How long a rank waits for the positions of the others before it trains on.
        catch_up_limit_s: If the slowest rank would need longer than this to reach the step furthest ahead, ranks stop
            where they stand.
        peers: Learn of failures of other ranks and publish those of this one; ``None``: failures are only left in the
            store.

    Note:
        *Communication.* No collective. One small look-up in the store for each ``poll_interval_s``, and more once
        somebody has asked for something; these are not counted in the ledger. On a link where a look-up waits behind
        other messages there are fewer, so that they take a hundredth of the time, but one every four seconds.

    """

    def __init__(
        self,
        store: KeyValueStore,
        rank: int,
        world_size: int,
        namespace: str,
        *,
        poll_interval_s: float = 0.2,
        patience_s: float = 2.0,
        catch_up_limit_s: float = 7.0,
        peers: Peers | None = None,
    ) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._namespace = namespace
        self._poll_interval_s = poll_interval_s
        self._patience_s = patience_s
        self._catch_up_limit_s = catch_up_limit_s
        self._peers = peers
        self._failures: Failures = StoreFailures(store, rank, namespace) if peers is None else peers
        # With peers a thread of theirs looks for failures, and this only reads what it found; without, this looks.
        self._raise_known = self._failures.raise_failure if peers is None else peers.raise_known_failure
        self._generation = 0  # decisions carried out; part of the keys, so that no rank reads an older request
        self._wanted: list[tuple[Kind, str]] = []  # requests of this rank that are not granted yet
        self._published = False  # whether this rank's position stands in the store
        self._stride = 1  # this rank pauses at multiples of it
        self._pause_at = 0  # the step of its next pause; 0 while it knows of no request
        self._next_poll_s = 0.0
        self.decision: Decision | None = None

    @property
    def urgent(self) -> bool:
        """Whether this rank knows of a request that is not settled yet."""
        return bool(self._wanted) or self._published or self._pause_at > 0

    def request(self, kind: Kind, reason: str) -> None:
        """Ask for something. It is posted at the next :meth:`poll`, and granted once all ranks agree on a step."""
        if all(kind != wanted for wanted, _ in self._wanted):
            self._wanted.append((kind, f"rank {self._rank}: {reason}"))

    def post(self) -> None:
        """Post a pending request now, so that ranks find it when they meet next."""
        if self._wanted and self.decision is None:
            self._guarded(self._open_state)

    def poll(self, position: RankPosition, *, force: bool = False) -> Decision | None:
        """Look for requests, at the end of an optimizer step; return what was decided, once it is.

        Args:
            position: Where this rank is.
            force: Look and negotiate now, even if the store was looked at a moment ago.

        Raises:
            PeerFailure: If another rank reported a failure, or the store is gone together with the rank that hosts it.

        """
        if self.decision is not None:
            return self.decision
        if self._peers is not None:
            self._peers.raise_known_failure()
        now = time.monotonic()
        if not (force or self.urgent) and now < self._next_poll_s:
            return None
        state = self._guarded(self._open_state)
        took_s = time.monotonic() - now  # long where the look waits behind other messages on the link
        self._next_poll_s = now + max(self._poll_interval_s, min(took_s / _SHARE, _LONGEST_S))
        if state is None:
            return None
        if not self._pause_at:  # this rank sees the request for the first time
            self._stride = _stride(position.step_time_s, 2 * self._poll_interval_s)
            self._pause_at = position.step if self._stride == 1 else _next_pause(position.step, self._stride)
        if force or position.step >= self._pause_at:
            self._guarded(lambda: self._negotiate(position, state))
        return self.decision

    def poll_while_blocked(self, position: RankPosition, *, cannot: Collection[Kind] = ()) -> Decision | None:
        """Like :meth:`poll`, for a rank that waits for the others in a synchronisation and so cannot move anyway.

        Args:
            position: Where this rank is.
            cannot: What it could not do there, and so does not agree to.

        """
        if self.decision is not None:
            return self.decision
        if self._peers is not None:
            self._peers.raise_known_failure()
        now = time.monotonic()
        if now < self._next_poll_s:
            return None
        self._next_poll_s = now + self._poll_interval_s / 4
        state = self._guarded(self._open_state)
        # no patience is needed here: this rank stands still, so its position holds
        if state is not None and _kind_of(state) not in cannot:
            self._guarded(lambda: self._publish(position))
            self._guarded(lambda: self._try_to_decide(state))
        return self.decision

    def poll_failures(self) -> None:
        """Raise if a rank has failed, for a rank that waits where it can carry out no decision, not yet or no more."""
        if self._peers is not None:
            self._peers.raise_known_failure()
            return
        now = time.monotonic()
        if now >= self._next_poll_s:
            self._next_poll_s = now + self._poll_interval_s
            self.raise_peer_failure()

    def move_on(self) -> None:
        """Retract this rank's position, before it takes another step. Does nothing if none was published."""
        if self._published and self.decision is None:
            self._guarded(self._retract)

    def settled(self) -> None:
        """Forget the decision, because it has been carried out. Every rank calls this once for each decision."""
        if self.decision is not None:
            self._wanted = [(kind, why) for kind, why in self._wanted if kind != self.decision.kind]
        self.decision = None
        self._published = False
        self._pause_at = 0
        self._generation += 1

    def report_failure(self, message: str) -> None:
        """Tell the other ranks that this one failed. The first report stays."""
        self._failures.report(message)

    def raise_peer_failure(self) -> None:
        """Raise :class:`PeerFailure` if another rank reported one."""
        self._failures.raise_failure()

    def first_error_shown(
        self, where: str = "a synchronisation", *, waits: bool = True
    ) -> AbstractContextManager[None]:
        """Turn the loss of a connection into the error of the rank that failed, as far as that is known.

        Args:
            where: What this rank waits for, for the message.
            waits: Whether the block does nothing but wait for other ranks.

        """
        return self._failures.first_error_shown(where, waits=waits)

    def _open_state(self) -> str | None:
        """Return the state of the current request, or post this rank's own if there is none."""
        news = self._key("news", shared=True)  # one key for requests and failures: an idle look costs a single check
        if not self._wanted and not self._store.check([news]):
            return None  # nobody has asked for anything yet, or failed
        self._raise_known()
        key = self._key("state")
        if self._wanted:
            kind, reason = self._wanted[0]
            # if another rank was faster, this is its request; this rank's own is posted after that
            state = _compare_set(self._store, key, "", f"open|0|{kind}|{reason}")
            self._store.set(news, "")
            return state
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _negotiate(self, position: RankPosition, state: str) -> None:
        self._publish(position)
        deadline = time.monotonic() + self._patience_s
        while not self._try_to_decide(state):
            self._raise_known()
            if time.monotonic() > deadline:
                self._retract()
                self._pause_at = _next_pause(position.step, self._stride)
                return
            time.sleep(0.002)
            state = self._store.get(self._key("state")).decode()

    def _publish(self, position: RankPosition) -> None:
        if not self._published:
            self._store.set(self._key(f"position/{self._rank}"), json.dumps(asdict(position)))
            self._published = True

    def _retract(self) -> None:
        """Retract the position, unless a decision has been made with it."""
        key = self._key("state")
        # First the position, then the version: a rank that reads the new version can no longer read the old
        # position, and one that has read that fails to decide, since the version has changed.
        self._store.set(self._key(f"position/{self._rank}"), _MOVING)
        state = self._store.get(key).decode()
        while not self._read_decision(state):
            status, version, rest = state.split("|", 2)
            new = f"{status}|{int(version) + 1}|{rest}"
            state = _compare_set(self._store, key, state, new)
            if state == new:
                self._published = False
                return

    def _try_to_decide(self, state: str) -> bool:
        if self._read_decision(state):
            return True
        # The state was read before these positions: if one of them is retracted meanwhile, the compare-and-set below
        # finds another version and fails.
        positions = []
        for rank in range(self._world_size):
            key = self._key(f"position/{rank}")
            text = self._store.get(key).decode() if self._store.check([key]) else _MOVING
            if text == _MOVING:
                return False
            positions.append(RankPosition(**json.loads(text)))
        _, _, kind, reason = state.split("|", 3)
        step = meeting_step(positions, self._catch_up_limit_s, may_stand=kind in ("stop", "terminate"))
        decided = f"decided|{'here' if step is None else step}|{kind}|{reason}"
        return self._read_decision(_compare_set(self._store, self._key("state"), state, decided))

    def _read_decision(self, state: str) -> bool:
        status, step, kind, reason = state.split("|", 3)
        if status != "decided":
            return False
        self.decision = Decision(kind, reason, None if step == "here" else int(step))  # type: ignore[arg-type]
        return True

    def _key(self, name: str, *, shared: bool = False) -> str:
        return f"{self._namespace}/{name}" if shared else f"{self._namespace}/{self._generation}/{name}"

    def _guarded(self, call: Callable[[], _T]) -> _T:
        try:
            return call()
        except (dist.DistNetworkError, dist.DistStoreError, StoreLostError) as error:
            if self._peers is not None:
                self._peers.raise_failure()
            raise PeerFailure(self._failures.who_failed(error)) from error


def _kind_of(state: str) -> str:
    return state.split("|", 3)[2]


def _stride(step_time_s: float, within_s: float) -> int:
    """Return the largest power of two of steps that fit into a time; at least 1."""
    stride = 1
    while 2 * stride * step_time_s <= within_s and stride < 2**20:
        stride *= 2
    return stride


def _next_pause(step: int, stride: int) -> int:
    """Return the next step at which other ranks pause too: a multiple of a power of two, about half a second away.

    Ranks that a collective of the user's keeps in step see a request at different steps. If each paused where it sees
    the request, it would hold up others that have not seen it. Powers of two, so that ranks of different strides still
    have common multiples. The stride is fixed when a rank first sees the request: pauses make later steps look slow.
    """
    return (step // stride + 1) * stride


def meeting_step(positions: list[RankPosition], catch_up_limit_s: float, *, may_stand: bool) -> int | None:
    """Return the step at which ranks at these positions meet, or ``None`` if each stops where it stands.

    Example:
        >>> meeting_step([RankPosition(10, 0, 0.1), RankPosition(7, 0, 0.1)], 5.0, may_stand=True)
        10
        >>> meeting_step([RankPosition(90, 0, 0.1), RankPosition(7, 0, 0.1)], 5.0, may_stand=True) is None
        True

    """
    furthest = max(position.step for position in positions)
    catch_up_s = max((furthest - position.step) * position.step_time_s for position in positions)
    within_two_steps = all(furthest - position.step <= 2 for position in positions)
    # Ranks in different epochs would leave different loops, so there they always catch up.
    same_epoch = len({position.epoch for position in positions}) == 1
    if may_stand and same_epoch and catch_up_s > catch_up_limit_s and not within_two_steps:
        return None
    return furthest


def _compare_set(store: KeyValueStore, key: str, expected: str, desired: str) -> str:
    return bytes(store.compare_set(key, expected, desired)).decode()
