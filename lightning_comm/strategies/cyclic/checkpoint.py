"""Checkpoints of Cyclic Data Parallelism: ordinary ones, with additional state for an exact continuation.

Weights are of one version, since ranks flush first, and the optimizer's state is gathered into its ordinary form, so
any strategy can resume from the file. The entry ``lightning_comm.cyclic`` has the stages and, for each rank, its random
state, its place in the data and its schedulers.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_comm.lightning_internals import close_finished_epoch
from lightning_comm.ondevice.cyclic.stages import Stage
from lightning_comm.ondevice.random_state import random_state
from lightning_comm.strategies.checkpoints import sets
from lightning_comm.strategies.checkpoints.entry import Save
from lightning_comm.strategies.checkpoints.strategy_entry import StrategyEntry
from lightning_comm.strategies.common.checks import leave_out_other_model
from lightning_comm.strategies.common.support import RunSupport
from lightning_comm.strategies.cyclic.run import CyclicRun
from lightning_comm.strategies.cyclic.settings import WHERE
from lightning_comm.transport.plain_data import NotPlainError, gather_states, pack

ENTRY = StrategyEntry("lightning_comm.cyclic", version=1)
_RANK_KEYS = ("lr_schedulers", "loops")  # entries that Lightning restores and that may differ between ranks


@dataclass(frozen=True)
class CyclicResume:
    """The state from a checkpoint that a run resumes from.

    Args:
        stages: Where the model was cut; empty where it must be cut anew.
        previous_norm: The gradient norm of the last step, if it is known.
        ledger: The sums of the ledger of this rank.
        random: This rank's random state, or ``None``.
        epoch_is_over: Whether it was saved at the end of an epoch.
        run_began_at: The optimizer step at which the run that wrote it began, for steps that count from there.
        steps_done: The optimizer steps that it had done, which the Trainer does not know where a module skips some;
            ``None`` where the file does not have it.

    """

    stages: Sequence[Stage] = ()
    previous_norm: float | None = None
    ledger: dict[str, Any] | None = None
    random: dict[str, Any] | None = None
    epoch_is_over: bool = False
    run_began_at: int = 0
    steps_done: int | None = None


def gathered_state(run: CyclicRun, optimizer: Optimizer) -> dict[str, Any]:
    """Return the optimizer's ``state_dict`` with the state of all ranks on rank 0; every rank calls this.

    Note:
        *Communication.* The state of every rank is sent to rank 0.

    """
    state = optimizer.state_dict()
    if run.optimizer is None:
        return state
    own = run.optimizer.own_state()
    state["state"].update(own)
    where = f"{WHERE}: the state of {type(optimizer).__name__}"
    with run.agreement.first_error_shown():
        for _, part in gather_states(own, run.recorder, run.module.device, "checkpoint", where):
            state["state"].update(part)
    state["state"] = dict(sorted(state["state"].items()))
    return state


def write(run: CyclicRun, checkpoint: dict[str, Any]) -> None:
    """Put the state for an exact continuation into a checkpoint; every rank calls this."""
    own: dict[str, Any] = {
        "random": run.random_state or random_state(),
        "epoch_is_over": run.trainer.is_last_batch,
        "ledger": run.recorder.ledger.state_dict(),
        "checkpoint": {key: checkpoint[key] for key in _RANK_KEYS if key in checkpoint},
    }
    _leave_out_objects(own["checkpoint"], run.recorder.rank)
    ranks: list[Any] = [None] * run.recorder.world_size  # filled on rank 0, which writes the file
    with run.agreement.first_error_shown():
        for rank, state in gather_states(
            own, run.recorder, run.module.device, "checkpoint", f"{WHERE}: what a rank adds to a checkpoint"
        ):
            ranks[rank] = state
    ENTRY.put(
        checkpoint,
        world_size=run.recorder.world_size,
        stages=[[list(stage.modules), list(stage.parameters)] for stage in run.stages],
        previous_norm=run.previous_norm(),
        steps_done=run.steps_done,
        run_began_at=run.run_began_at,
        ranks=ranks,
    )


def _leave_out_objects(state: dict[str, Any], rank: int) -> None:
    """Leave out schedulers that hold objects of the user's own: a rank that resumes without them has rank 0's."""
    if rank == 0 or "lr_schedulers" not in state:
        return
    try:
        pack(state["lr_schedulers"], f"{WHERE}: the state of the learning-rate schedulers")
    except NotPlainError as error:
        warnings.warn(f"{error} A resumed run gives rank {rank} the schedulers of rank 0.", stacklevel=2)
        del state["lr_schedulers"]


def write_together(
    strategy: ParallelStrategy,
    run: CyclicRun,
    checkpoint: dict[str, Any],
    filepath: _PATH,
    by_lightning: Callable[[dict[str, Any], _PATH], None],
) -> None:
    """Write a checkpoint with the state for an exact continuation; every rank calls this, after a flush.

    Args:
        strategy: The strategy.
        run: The run.
        checkpoint: What Lightning has collected.
        filepath: Of the file.
        by_lightning: Lightning's way to write it.

    """
    if "optimizer_states" in checkpoint:  # not with `save_weights_only`
        write(run, checkpoint)
    save = Save(str(filepath))
    save.write(checkpoint)
    with run.agreement.first_error_shown("a checkpoint", waits=False):  # rank 0 writes in there
        sets.write_main(strategy, run.recorder, WHERE, save, partial(by_lightning, checkpoint, filepath))


def write_alone(
    strategy: ParallelStrategy,
    support: RunSupport,
    run: CyclicRun | None,
    checkpoint: dict[str, Any],
    filepath: _PATH,
    by_lightning: Callable[[dict[str, Any], _PATH], None],
) -> None:
    """Write what rank 0 has, where ranks cannot meet: after a failure, or of another model.

    Args:
        strategy: The strategy.
        support: Whether a rank has failed.
        run: That of the last ``fit``, if there was one.
        checkpoint: What Lightning has collected.
        filepath: Of the file.
        by_lightning: Lightning's way to write it.

    """
    if support.interrupted or (run is not None and run.failed):
        filepath = sets.incomplete_path(strategy, WHERE, filepath)
        if run is not None and support.has_fitted(run) and run.stages:
            mark_incomplete(checkpoint, filepath)
    elif run is not None and run.module is not strategy.lightning_module:
        leave_out_other_model(WHERE, checkpoint, filepath)
    by_lightning(checkpoint, filepath)


def mark_incomplete(checkpoint: dict[str, Any], filepath: object) -> None:
    """Mark a checkpoint as written when ranks could not meet any more, and warn of it."""
    ENTRY.put(checkpoint, incomplete=True)
    Save(str(filepath)).write(checkpoint, incomplete=True)
    rank_zero_warn(
        f"{WHERE}: {str(filepath)!r} is written after an error, when ranks cannot meet any more: its weights are those "
        "that rank 0 computed with, of two versions, and it has no optimizer state. Go on from an earlier checkpoint "
        "if there is one."
    )


def load_own(checkpoint: dict[str, Any], filepath: object, rank: int, world_size: int) -> CyclicResume:
    """Put this rank's own state into a checkpoint that was read; return the state that the run resumes from."""
    saved = ENTRY.of(checkpoint) or {}
    if saved.get("incomplete"):
        rank_zero_warn(
            f"{WHERE}: `ckpt_path`={str(filepath)!r} was written after an error, when ranks could not meet any more. "
            "Its weights are those that rank 0 computed with, of two versions, and it has no optimizer state, so "
            "momenta start anew. Give an earlier checkpoint if there is one."
        )
        return CyclicResume()
    reason = ENTRY.unusable(saved or None, world_size)
    if reason is not None:
        optimizer = "its optimizer state" if checkpoint.get("optimizer_states") else "no optimizer state, having none,"
        rank_zero_warn(
            f"{WHERE}: `ckpt_path`={str(filepath)!r} is restored with its weights, {optimizer} and its place "
            f"in the schedule, but the run will not repeat the one that wrote it bit for bit: {reason}. The model "
            "is cut into stages anew."
        )
        norm = saved["previous_norm"] if saved.get("version") == ENTRY.version else None
        return CyclicResume(
            previous_norm=norm, run_began_at=saved.get("run_began_at", 0), steps_done=saved.get("steps_done")
        )
    own = saved["ranks"][rank]
    checkpoint.update(own["checkpoint"])
    close_finished_epoch(checkpoint["loops"])
    return CyclicResume(
        [Stage(tuple(modules), tuple(parameters)) for modules, parameters in saved["stages"]],
        saved["previous_norm"],
        own["ledger"],
        own["random"],
        own["epoch_is_over"],
        saved.get("run_began_at", 0),  # not in older files, whose runs began at 0
        saved.get("steps_done"),  # nor this
    )
