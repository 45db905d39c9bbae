"""Entries of a run in the process group's store: the failure, roll calls and their answers, and ranks that have left.

The keys, all under the namespace of the run:

- ``news``: present once there is anything to look for, so that a look costs one check while all goes well;
- ``failed``: the first failure, and the ranks that were silent; written once, by compare-and-set;
- ``roll``: the number of the last roll; ``here/<rank>``: that rank's answer, with the number that it answers;
- ``left/<rank>``: written by a rank that leaves; it counts as its answer to every later roll.
"""

import json
import time
from typing import Any

from lightning_comm.transport.store_client import StoreClient

CALL_S = 2.0  # seconds that a call to the store may take
LAST_ROLL = 2**62  # the number of a roll that comes after all others


class RollCall:
    """The published entries of all ranks, and the roll: a number in the store that every rank answers.

    Args:
        store: The process group's.
        rank: This rank.
        world_size: The number of ranks.
        namespace: Keeps the keys of one run apart from those of another; the same on all ranks.

    Attributes:
        failure: The failure that was published first, once it is known here.
        failed_s: When it became known here, on the monotonic clock.
        silent: The ranks that did not answer, as published with the failure.
        others: All other ranks.
        answered: The number of the last roll that this rank has answered.

    """

    def __init__(self, store: StoreClient, rank: int, world_size: int, namespace: str) -> None:
        self._store, self._rank, self._namespace = store, rank, namespace
        self.others = [each for each in range(world_size) if each != rank]
        self.failure: str | None = None
        self.failed_s = 0.0
        self.silent: list[int] = []
        self.answered = 0

    def connect(self, within_s: float) -> None:
        """Check that the store answers."""
        self._has("failed", within_s)

    def has_news(self) -> bool:
        """Return whether anybody has failed, has called the roll, or is about to leave."""
        return self._has("news")

    def tell_news(self) -> None:
        """Make all ranks look for failures and rolls."""
        self._store.set(self._key("news"), "", within_s=CALL_S)

    def publish(self, text: str, silent: list[int]) -> str:
        """Publish a failure; return the one that stands, which is the first."""
        stands = self._compare_set("failed", "", json.dumps({"text": text, "silent": silent}))
        self.tell_news()
        return self._keep(stands)

    def look_for_failure(self) -> str | None:
        """Return the failure that was published, if there is one."""
        return self._keep(self._get("failed", "")) if self.failure is None and self._has("failed") else self.failure

    def call(self) -> int:
        """Call the roll; return its number. If another rank calls at the same time, both share one roll."""
        last = self._get("roll", "0")
        # a rank that is too late here gets the number of the other's roll, which also began after this call
        own = str(int(last) + 1)
        now = self._compare_set("roll", "" if last == "0" else last, own)
        self.tell_news()
        return int(now)

    def answers(self, roll: int) -> dict[int, dict[str, Any]]:
        """Return the other ranks' answers to a roll or a later one, or the entries of ranks that have left."""
        answers = {}
        for rank in self.others:
            if left := self._get(f"left/{rank}", ""):
                answers[rank] = json.loads(left)
            elif (here := json.loads(self._get(f"here/{rank}", '{"roll": 0}')))["roll"] >= roll:
                answers[rank] = here
        return answers

    def last_called(self) -> int:
        """Return the number of the last roll."""
        return int(self._get("roll", "0"))

    def answer(self, status: dict[str, Any]) -> None:
        """Answer the roll."""
        self._store.set(self._key(f"here/{self._rank}"), json.dumps(status), within_s=CALL_S)

    def say_left(self, step: int) -> None:
        """Publish that this rank leaves, after so many steps."""
        self._store.set(self._key(f"left/{self._rank}"), json.dumps({"left": True, "step": step}), within_s=1.0)

    def has_left(self, rank: int) -> bool:
        """Return whether a rank has left."""
        return self._has(f"left/{rank}")

    def _keep(self, published: str) -> str:
        content = json.loads(published)
        self.failed_s, self.silent = time.monotonic(), content["silent"]
        self.failure = text = str(content["text"])
        return text

    def _key(self, name: str) -> str:
        return f"{self._namespace}/{name}"

    def _has(self, name: str, within_s: float = CALL_S) -> bool:
        return self._store.check([self._key(name)], within_s=within_s)

    def _get(self, name: str, default: str) -> str:
        return self._store.get(self._key(name), within_s=CALL_S).decode() if self._has(name) else default

    def _compare_set(self, name: str, expected: str, desired: str) -> str:
        return self._store.compare_set(self._key(name), expected, desired, within_s=CALL_S).decode()
