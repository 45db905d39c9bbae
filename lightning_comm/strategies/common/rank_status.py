"""The rank status: the few numbers that ranks exchange when they meet, and what follows from them."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_comm.ondevice.uploads import uploaded
from lightning_comm.transport.epoch_ends import same_batches
from lightning_comm.transport.recording import Pending, Recorder

UNDECIDED, FAILED = 0, -1  # in place of a number of steps

# what a rank knows of its tensors, each a power of two in `seen`; also the purposes of averages
SEEN = ("moved", "parameters", "buffers", "weight_averages", "optimizer_state")
# from a rank that has not looked, since no average follows: any entry may be large
NOT_LOOKED: dict[str, bool | Tensor] = dict.fromkeys(SEEN[1:], True)


class RankStatus(NamedTuple):
    """The status of one rank, sent as a row of float64, which holds counts and 48-bit fingerprints exactly.

    Args:
        next_steps: Length of the next round, of which rank 0's is used; or `UNDECIDED`, or `FAILED`.
        lr: Learning rate of the first step of that round.
        steps_done: Optimizer steps done.
        layout: Fingerprint of the tensors that this rank would average.
        loss_scale: That of a gradient scaler; 0 without one.
        urgent: Whether this rank knows of a request that is still open; in the row at the start, whether its batches or
            steps may differ from what it has announced.
        stops_apart: Whether ranks stop at different steps, each where it is, so that nothing is averaged now.
        batches: Training batches in an epoch; -1 where that is not known.
        samples: Samples that this rank has trained on since the last synchronisation; ``None``, on all ranks, where
            averages are not weighted by them, and then they are not sent.
        seen: What :meth:`ModelTensors.look` has found on that rank, as a sum of powers of two, by place in `SEEN`.

    """

    next_steps: float = UNDECIDED
    lr: float = 0.0
    steps_done: float = 0
    layout: float = 0
    loss_scale: float = 0.0
    urgent: float = False
    stops_apart: float = False
    batches: float = -1
    samples: float | None = None
    seen: int = 0


def exchange(
    row: RankStatus,
    recorder: Recorder,
    device: torch.device,
    wait: Callable[[Pending], None],
    *,
    loss_scale: Tensor | None = None,
    found: Mapping[str, bool | Tensor] | None = None,
) -> list[RankStatus]:
    """Send this rank's status and return that of all ranks, in order of rank.

    Args:
        row: The status of this rank.
        recorder: Sends and records.
        device: Where the backend wants its messages.
        wait: Waits for the rows of the others.
        loss_scale: That of the row, where it lies on a device and the host has not read it.
        found: What :meth:`ModelTensors.look` has found, for the ``seen`` of the row, likewise.

    Note:
        *Communication.* One all-gather of 64 bytes a rank, 72 with a number of samples, recorded as ``"control"``.

        *Host.* On CUDA it waits for the device once, to read the rows.

    """
    sent = row._replace(urgent=float(bool(row.urgent)))._asdict()
    del sent["seen"]  # sent in the same number as `urgent`
    numbers = [number for number in sent.values() if number is not None]
    own = uploaded(torch.tensor(numbers, dtype=torch.float64), device)
    fields = list(sent)
    for k, name in enumerate(SEEN):
        flag = (found or {}).get(name, False)
        if flag is not False:
            own[fields.index("urgent")] += 2.0 ** (k + 1) * flag
    if loss_scale is not None:
        own[fields.index("loss_scale")] += loss_scale
    rows, pending = recorder.all_gather(own, "control")
    wait(pending)
    return [_received(dict(zip(fields, values, strict=False))) for values in rows.tolist()]


def _received(numbers: dict[str, float]) -> RankStatus:
    flags = int(numbers.pop("urgent"))
    return RankStatus(**numbers, urgent=flags & 1, seen=flags >> 1)


def seen(rows: list[RankStatus]) -> set[str]:
    """Return what at least one rank has seen.

    Example:
        >>> sorted(seen([RankStatus(seen=1), RankStatus(seen=4)]))
        ['buffers', 'moved']

    """
    return {name for k, name in enumerate(SEEN) if any(int(row.seen) >> k & 1 for row in rows)}


def moderate(rows: list[RankStatus]) -> set[str]:
    """Return the purposes of averages for which no rank has seen an entry that may be large.

    It is not known of parameters where a frozen one has changed, which then is averaged too.
    """
    found = seen(rows)
    return set(SEEN[1:]) - found - ({"parameters"} if "moved" in found else set())


def check_same_work(rows: list[RankStatus]) -> None:
    """Refuse ranks that meet after different steps, or that would average different tensors.

    Raises:
        RuntimeError: On every rank alike.

    """
    steps = [int(row.steps_done) for row in rows]
    if len(set(steps)) > 1:
        raise RuntimeError(
            f"LocalUpdateStrategy: ranks meet after different numbers of optimizer steps, {steps} by rank. Every rank "
            "must take the same steps: give all the same number of batches (`limit_train_batches`, `drop_last`), and "
            "under manual optimization step the counted optimizer on every rank alike."
        )
    if len({row.layout for row in rows}) > 1:
        raise RuntimeError(
            f"LocalUpdateStrategy: ranks would average different tensors at step {steps[0]}: names, shapes, memory "
            "formats, types or `requires_grad` differ, or with `optimizer_state='average'` the optimizer state, "
            "because a parameter was not used on every rank. Build the model, and freeze or unfreeze its parts, alike "
            "on all ranks; keep optimizer state 'local'."
        )


def check_same_model(rows: list[RankStatus], where: str) -> None:
    """Refuse ranks that have built different models.

    Raises:
        ValueError: On every rank alike.

    """
    different = [rank for rank, row in enumerate(rows) if row.layout != rows[0].layout]
    if different:
        raise ValueError(
            f"{where}: the model on ranks {different} differs from that of rank 0 in names, shapes, memory "
            "formats or types of parameters or buffers. Build it alike on all ranks."
        )


def check_same_batches(rows: list[RankStatus], where: str) -> None:
    """Refuse ranks with different numbers of training batches.

    Raises:
        ValueError: On every rank alike.

    """
    batches = [int(row.batches) for row in rows]
    if len(set(batches)) > 1:
        known = {rank: count for rank, count in enumerate(batches) if count >= 0}
        raise ValueError(
            f"{where}: ranks have different numbers of training batches, {batches} by rank, so one would "
            f"wait forever for the others. {same_batches(known)} `drop_last=True`, or a "
            "DistributedSampler, which pads, also make them alike."
        )
