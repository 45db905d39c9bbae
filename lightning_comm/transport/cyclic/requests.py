"""Requests of ranks for a stop, or a save, under Cyclic Data Parallelism: they are sent with the gradients."""

from typing import get_args

import torch
from torch import Tensor

from lightning_comm.transport.cyclic.messages import STATUS_NUMBERS
from lightning_comm.transport.stop_protocol import Decision, KeyValueStore, Kind

_KINDS: tuple[Kind, ...] = get_args(Kind)
# How many ranks ask for each kind: three counts in one number, the first in its lowest digits. The sums over the ranks
# stay whole numbers below 2**53.
_IN_A_NUMBER, _BASE = 3, 2**17
RATE = 3  # the sum of the learning rates of the step
NON_FINITE, NON_FINITE_RANKS = 4, 5  # how many losses were not finite; the sum of their ranks
BATCH = 6  # the sum of the numbers of the batches in which ranks take the step


class Requests:
    """Requests of this rank, and those that all ranks know of.

    A rank counts its request into its status of one step. That is added up along the ring with the gradients, and the
    sum comes back with the new version. Two steps later every rank has it, and all act at the end of the same step. The
    reason, for people, is left in the process group's store.

    Args:
        store: A store that all ranks share.
        rank: This rank.
        namespace: Keeps the keys of one run apart from those of another; the same on all ranks.

    Note:
        *Communication.* None of its own; for each request one small write to the store, and one read on each rank.

    """

    def __init__(self, store: KeyValueStore, rank: int, namespace: str) -> None:
        self._store, self._rank, self._namespace = store, rank, namespace
        self._wanted: dict[Kind, str] = {}
        self._acted_at: dict[Kind, int] = {}

    def ask(self, kind: Kind, reason: str) -> None:
        """Ask for something; the request is sent with the next gradient. A signal handler may call this."""
        self._wanted.setdefault(kind, f"rank {self._rank}: {reason}")

    def status(
        self,
        step: int,
        non_finite: Tensor | None,
        device: torch.device,
        *,
        asking: bool,
        batch: int = 0,
        rate: float | Tensor = 0.0,
    ) -> Tensor:
        """Return this rank's status of a step and stage, made on the device: the host neither copies nor waits.

        Args:
            step: Which.
            non_finite: Whether a loss of this rank was not finite, as a tensor on the device; ``None`` for no.
            device: Where gradients are.
            asking: Whether this is the stage whose status all ranks read: what was asked for since its last one is
                counted into these, and into those of no other stage.
            batch: In which batch of the fit this rank takes the step.
            rate: The sum of its learning rates there, over the groups; a tensor where one of them is on the device.

        """
        counts: dict[int, float] = {BATCH: float(batch)}
        for kind in tuple(self._wanted) if asking else ():
            self._store.compare_set(self._key(kind, step), "", self._wanted.pop(kind))
            number, digit = divmod(_KINDS.index(kind), _IN_A_NUMBER)
            counts[number] = counts.get(number, 0.0) + _BASE**digit
        status = torch.zeros(STATUS_NUMBERS, dtype=torch.float64, device=device)
        for number, count in counts.items():
            status[number].fill_(count)  # an argument of the launch, where a row from the host would have to be copied
        if isinstance(rate, Tensor):
            status[RATE].copy_(rate)
        else:
            status[RATE].fill_(rate)
        if non_finite is not None:
            status[NON_FINITE].copy_(non_finite)
            status[NON_FINITE_RANKS].copy_(non_finite * self._rank)
        return status

    def decided(self, step: int, status: list[float], at_step: int) -> list[Decision]:
        """Return what all ranks do now, from the summed status of a step.

        A request that was repeated before it was carried out, by this rank or another one, is settled with it.

        Args:
            step: The step of the status.
            status: The sum over the ranks.
            at_step: Optimizer steps done now.

        """
        kinds = [
            kind
            for place, kind in enumerate(_KINDS)
            if int(status[place // _IN_A_NUMBER]) // _BASE ** (place % _IN_A_NUMBER) % _BASE
            and step >= self._acted_at.get(kind, 0)
        ]
        for kind in kinds:
            self._acted_at[kind] = at_step
            self._wanted.pop(kind, None)
        return [Decision(kind, self._store.get(self._key(kind, step)).decode(), at_step) for kind in kinds]

    def _key(self, kind: Kind, step: int) -> str:
        return f"{self._namespace}/request/{step}/{kind}"


def check_finite(step: int, status: list[float], where: str) -> None:
    """Refuse to go on after a loss that was not finite, from the summed status of a step.

    Raises:
        RuntimeError: On every rank alike.

    """
    count = int(status[NON_FINITE])
    if count:
        which = f"of rank {int(status[NON_FINITE_RANKS])}" if count == 1 else f"of {count} ranks"
        raise RuntimeError(
            f"{where}: the loss {which} was not finite (NaN or infinity) at optimizer step {step}, and its gradient "
            "has reached the parameters of all ranks by now. Go on from the last checkpoint, with a lower learning "
            "rate, `clip_norm`, or more `warmup_sync_steps`: delayed gradients want smaller steps."
        )
