"""Messages about ranks that failed, do not answer, or have not come."""

import re
from collections.abc import Mapping
from typing import Any


class PeerFailure(RuntimeError):
    """Another rank failed; the message names it and the cause."""


class LostConnectionError(RuntimeError):
    """Nothing comes from another rank: its connection is lost, or it is late. The cause is not known yet."""


def verdict(asked_by: int, silent: list[int], statuses: Mapping[int, Mapping[str, Any]], reason: str) -> str:
    """Return a message that names the ranks for which the others wait.

    Args:
        asked_by: The rank that has lost a connection, or whose wait has timed out.
        silent: Ranks that did not answer.
        statuses: What the others answered: ``step``, and ``waits``, where the rank waits for others; or ``left``.
        reason: The text of that rank's error.

    """
    if silent:
        alone = not set(statuses) - {asked_by}
        does, were = ("does", "It was") if len(silent) == 1 else ("do", "They were")
        return (
            f"{_ranks(silent).capitalize()} {does} not answer. {were} killed, or stopped, or cut off from the network: "
            "look for the first error in the output there; without one, for what ended or stopped the process "
            "(memory, a signal)."
            + (f" Or rank {asked_by}, which says this, is cut off itself: no other rank answers it." if alone else "")
        )
    left = [rank for rank, each in statuses.items() if each.get("left")]
    if left:
        has = "has" if len(left) == 1 else "have"
        return (
            f"{_ranks(left).capitalize()} {has} left the run already, at {_steps(left, statuses)}, and other ranks "
            "wait for what will not come. All ranks must take the same steps: look at why it ended there."
        )
    late = [rank for rank, each in statuses.items() if not each.get("waits")]
    if late and re.search("timed out|timeout", reason, re.IGNORECASE):
        does = "does" if len(late) == 1 else "do"
        return (
            f"Rank {asked_by} has waited for the strategy's `timeout`, and {_ranks(late)}, at "
            f"{_steps(late, statuses)}, {does} not come, although the process answers: it computes, waits for "
            "something else, or hangs. Look at what it does there; where it only needs long, give a longer `timeout`."
        )
    where = ", ".join(f"rank {rank} in {each['waits'] or 'its work'}" for rank, each in sorted(statuses.items()))
    return (
        f"Rank {asked_by} has lost its connection to another rank, although all ranks run ({where}). The network "
        f"between them was interrupted, or they wait for different things. ({reason})"
    )


def store_text(rank: int, *, ended: bool, on_rank_0: bool) -> str:
    """Return a message on why the process group's store does not answer.

    Args:
        rank: That finds it so.
        ended: Whether its connection was closed, not only silent.
        on_rank_0: Whether rank 0 hosts it, and not the agent that launched the ranks.

    """
    store = "The store of the process group does not answer"
    if not on_rank_0:
        return (
            f"{store}. The agent that launched the first node hosts it: it has ended, is stopped, or cannot be reached "
            f"from rank {rank}. Look for the first error in the output of that node."
        )
    if ended:
        return f"{store}, so rank 0, which hosts it, has ended. Look for the first error in its output."
    return (
        f"{store}, so rank 0, which hosts it, is stopped or hangs, or the network between it and rank {rank} is cut. "
        "Look for the first error in the output of rank 0."
    )


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks}"


def _steps(ranks: list[int], statuses: Mapping[int, Mapping[str, Any]]) -> str:
    return " and ".join(f"step {statuses[rank].get('step', 'unknown')}" for rank in ranks)
