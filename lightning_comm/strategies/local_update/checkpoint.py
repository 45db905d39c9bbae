"""Checkpoints in two parts: one file for all ranks, and beside it a folder with each rank's own state.

The main file is an ordinary Lightning checkpoint with averaged weights. The state of a single rank (its own weights in
the middle of a round, its optimizer, its place in the data, its random state) is in a file of its own. Both have the id
of the save (:mod:`lightning_comm.strategies.checkpoints.sets`), so a rank file of another save is never used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_comm.lightning_internals import close_finished_epoch
from lightning_comm.ondevice.random_state import random_state
from lightning_comm.strategies.checkpoints import removal, sets
from lightning_comm.strategies.checkpoints.comparison import NOTHING_SAVED, Comparison, compare
from lightning_comm.strategies.checkpoints.entry import WRITTEN_ALONE, Save, says_incomplete
from lightning_comm.strategies.checkpoints.strategy_entry import StrategyEntry
from lightning_comm.strategies.checkpoints.whole_files import is_plain
from lightning_comm.strategies.common.checks import leave_out_other_model
from lightning_comm.strategies.common.support import RunSupport
from lightning_comm.strategies.local_update.run import LocalUpdateRun
from lightning_comm.strategies.local_update.run_state import state_of
from lightning_comm.strategies.sparse_mask import checkpoint as mask_checkpoint
from lightning_comm.transport.compression.base import Compression
from lightning_comm.transport.recording import Recorder
from lightning_comm.transport.temporary_average import TemporaryAverage

ENTRY = StrategyEntry("lightning_comm.local_update", version=1)
WHERE = "LocalUpdateStrategy"

# Entries that Lightning restores and that differ between ranks. The state of the precision plugin is added by the name
# of its class.
RANK_KEYS = ("optimizer_states", "lr_schedulers", "loops")


@dataclass(frozen=True)
class Resume:
    """The state from a checkpoint that a run resumes from.

    Args:
        shared: The strategy's entry of the main file, or ``None`` if another strategy wrote it.
        own: This rank's file, or ``None`` if it cannot be used; the same on all ranks.
        masks: The masks in the main file, whichever of our strategies wrote it, or ``None`` without any.
        found: The differences between the settings that were saved and those of the run, the same on all ranks.

    """

    shared: dict[str, Any] | None
    own: dict[str, Any] | None
    masks: dict[str, Any] | None = None
    found: Comparison = NOTHING_SAVED


def put_shared_state(
    run: LocalUpdateRun, checkpoint: dict[str, Any], token: str, *, complete: bool, averaged: bool
) -> None:
    """Put the strategy's entry into the main file.

    Args:
        run: The run.
        checkpoint: Takes the entry.
        token: That of the rank files of the same save; empty without them.
        complete: Whether there are rank files.
        averaged: Whether the file's weights are the average over the ranks.

    """
    ENTRY.put(
        checkpoint,
        token=token,
        world_size=run.recorder.members.size,
        complete=complete,
        averaged=averaged,
        masks=mask_checkpoint.mask_state(run.model.codec, run.settings.averaging.method),
        run=state_of(run),
    )


def own_state(run: LocalUpdateRun, lightning_state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of this rank alone: the content of its file."""
    weights = run.mid_round.weights
    return {
        "apart": run.rounds.apart,
        "epoch_is_over": run.trainer.is_last_batch,
        "weights": weights.own_state() if run.rounds.apart else weights.own_buffers(),
        "compression": run.model.compression_state(run.overlapped.departed_state()),
        "samples": run.samples.state_dict(),
        "run": state_of(run),
        "random": run.random_state or random_state(),
        "checkpoint": lightning_state,
    }


def write(
    strategy: ParallelStrategy,
    run: LocalUpdateRun,
    checkpoint: dict[str, Any],
    filepath: _PATH,
    from_rank_0: Callable[[Any], Any],
) -> Save:
    """Write this rank's file, and the strategy's entry into the checkpoint; every rank calls this.

    Args:
        strategy: The strategy.
        run: The run.
        checkpoint: Takes the entry.
        filepath: Of the main file.
        from_rank_0: Gives all ranks rank 0's value.

    Returns:
        The save, whose main file is still to be written.

    """
    save = sets.begin(strategy, filepath, from_rank_0)
    complete = "optimizer_states" in checkpoint  # not with `save_weights_only`
    if complete:
        keys = (*RANK_KEYS, type(strategy.precision_plugin).__qualname__)
        own = own_state(run, {key: checkpoint[key] for key in keys if key in checkpoint})
        sets.write_own(strategy, run.recorder, WHERE, save, own)
        checkpoint["optimizer_states"] = run.mid_round.average_optimizer_states(checkpoint["optimizer_states"])
    put_shared_state(run, checkpoint, save.id, complete=complete, averaged=True)
    save.write(checkpoint)
    return save


def saves_rounds(support: RunSupport, run: LocalUpdateRun | None) -> bool:
    """Whether ranks train in the strategy's rounds, or did in the last ``fit``; not in a tuner's trial run."""
    return support.has_fitted(run) and run is not None and run.active


def can_meet(support: RunSupport, run: LocalUpdateRun | None) -> bool:
    """Whether the ranks of such a run can meet: none has failed."""
    return saves_rounds(support, run) and not (support.interrupted or (run is not None and run.failed))


def save(
    strategy: ParallelStrategy,
    support: RunSupport,
    run: LocalUpdateRun | None,
    checkpoint: dict[str, Any],
    filepath: _PATH,
    by_lightning: Callable[[dict[str, Any], _PATH], None],
) -> None:
    """Save averaged weights with the files of all ranks, or after a failure what this rank has.

    Args:
        strategy: The strategy.
        support: Whether ranks can meet.
        run: That of the last ``fit``, if there was one.
        checkpoint: What Lightning has collected.
        filepath: Of the main file.
        by_lightning: Lightning's way to write it.

    """
    if run is not None and can_meet(support, run):
        write_together(strategy, run, checkpoint, filepath, support.from_rank_0, by_lightning)
        return
    if support.interrupted or (run is not None and run.failed):
        filepath = sets.incomplete_path(strategy, WHERE, filepath)
        if run is not None and saves_rounds(support, run):
            mark_incomplete(run, checkpoint, filepath)
    if run is not None and run.module is not strategy.lightning_module:
        leave_out_other_model(WHERE, checkpoint, filepath)
    by_lightning(checkpoint, filepath)


def write_together(
    strategy: ParallelStrategy,
    run: LocalUpdateRun,
    checkpoint: dict[str, Any],
    filepath: _PATH,
    from_rank_0: Callable[[Any], Any],
    by_lightning: Callable[[dict[str, Any], _PATH], None],
) -> None:
    """Write a checkpoint with the files of all ranks; every rank calls this.

    Args:
        strategy: The strategy.
        run: The run.
        checkpoint: What Lightning has collected, with averaged weights.
        filepath: Of the main file.
        from_rank_0: Gives all ranks rank 0's value.
        by_lightning: Lightning's way to write it.

    """
    try:
        with run.agreement.first_error_shown("a checkpoint", waits=False):  # rank 0 writes in there
            save = write(strategy, run, checkpoint, filepath, from_rank_0)
            if strategy.is_global_zero:
                checkpoint = kept_from_change(checkpoint, run.mid_round.weights, strategy.checkpoint_io)
            sets.write_main(strategy, run.recorder, WHERE, save, partial(by_lightning, checkpoint, save.path))
    finally:
        run.mid_round.leave_checkpoint()


def mark_incomplete(run: LocalUpdateRun, checkpoint: dict[str, Any], filepath: _PATH) -> None:
    """Mark a checkpoint as written when ranks could not meet any more, and warn of it."""
    put_shared_state(run, checkpoint, "", complete=False, averaged=not run.rounds.apart)
    Save(str(filepath)).write(checkpoint, incomplete=True)
    weights = "those of rank 0 alone, in the middle of a round" if run.rounds.apart else "averaged, as ranks last met"
    rank_zero_warn(
        f"{WHERE}: {str(filepath)!r} is written after an error, when ranks cannot meet any more: its weights are "
        f"{weights}, and there is nothing in it of what each rank keeps. Go on from an earlier checkpoint if there is "
        "one."
    )


def kept_from_change(checkpoint: dict[str, Any], weights: TemporaryAverage, io: CheckpointIO) -> dict[str, Any]:
    """Return a checkpoint that does not change when each rank's own weights are restored.

    Note:
        *Memory.* None where the file is written before that, as by Lightning's own ``CheckpointIO``. With another,
        which may write later, a copy of the averaged tensors that are saved. Tensors that share memory (tied weights)
        share it in the copy.

    """
    changing = weights.storages
    if is_plain(io) or not changing:
        return checkpoint
    storages: dict[int, torch.UntypedStorage] = {}

    def copied(tensor: Tensor) -> Tensor:
        if tensor.layout != torch.strided or tensor.untyped_storage().data_ptr() not in changing:
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = storage.clone()  # type: ignore[no-untyped-call]
        copy = storages[storage.data_ptr()]
        return tensor.detach().new_empty(0).set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride())

    state = checkpoint["state_dict"]
    checkpoint = {key: apply_to_collection(value, Tensor, copied) for key, value in checkpoint.items()}
    if hasattr(state, "_metadata"):  # versions of modules, which a copied dictionary does not take along
        checkpoint["state_dict"]._metadata = state._metadata
    return checkpoint


def load_own(
    strategy: ParallelStrategy,
    recorder: Recorder,
    checkpoint: dict[str, Any],
    filepath: _PATH,
    method: Compression | None = None,
) -> Resume:
    """Put this rank's own state into a checkpoint that was read, if all ranks have theirs; every rank calls this.

    Args:
        strategy: The strategy.
        recorder: Sends and records.
        checkpoint: What was read from the main file.
        filepath: Of the main file.
        method: The compression of the run.

    """
    shared, masks = ENTRY.of(checkpoint), mask_checkpoint.masks_in(checkpoint)

    def why_not(entry: dict[str, Any]) -> str | None:
        if entry["complete"]:
            return None
        alone = says_incomplete(checkpoint) or not entry["averaged"]
        return WRITTEN_ALONE if alone else "it was saved with `save_weights_only=True`"

    own, reason = ENTRY.read_own(strategy, recorder, checkpoint, filepath, why_not)
    sent = None if own is None else own.get("compression")  # `None` if it was sent in full
    found = compare(strategy, recorder, WHERE, None if sent is None else sent["compression"], masks, method)
    if own is None:
        _warn_new_round(
            filepath,
            reason or "",
            averaged=shared is None or shared["averaged"],
            masks=found.keeps_masks,
            optimizer=bool(checkpoint.get("optimizer_states")),
        )
        return Resume(shared, None, masks, found)
    checkpoint.update(own["checkpoint"])
    close_finished_epoch(checkpoint["loops"])
    return Resume(shared, own, masks, found)


def saved_alpha(resume: Resume | None) -> float | None:
    """Return the resolved coefficient of the run that is resumed, if there is one."""
    shared = resume.shared if resume is not None else None
    alpha = shared["run"]["period"]["alpha"] if shared is not None else None
    return alpha if isinstance(alpha, float) else None


def _warn_new_round(filepath: _PATH, reason: str, averaged: bool, masks: bool, optimizer: bool) -> None:
    """Warn that a run goes on from the averaged state, not from the state of each rank."""
    weights = "the averaged weights" if averaged else "the weights of the rank that wrote it"
    weights += ", the masks" if masks else ""
    weights += " and the optimizer state in the file" if optimizer else " in the file, which has no optimizer state"
    rank_zero_warn(
        f"{WHERE}: `ckpt_path`={str(filepath)!r} cannot bring every rank back to where it was: {reason}. "
        f"Training goes on with a new round from {weights}. For an exact continuation resume with the same number of "
        f"ranks and keep the folder {removal.folder(filepath)!r} with the file."
    )
