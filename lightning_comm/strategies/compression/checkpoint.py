"""Checkpoints of compressed gradients: shared state in the main file, each rank's own in a file beside it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_comm.core.ledger import CommLedger
from lightning_comm.core.plain_settings import plain, shown
from lightning_comm.strategies.checkpoints import removal, sets
from lightning_comm.strategies.checkpoints.comparison import compare
from lightning_comm.strategies.checkpoints.entry import WRITTEN_ALONE, Save, says_incomplete
from lightning_comm.strategies.checkpoints.strategy_entry import StrategyEntry
from lightning_comm.strategies.common.checks import leave_out_other_model
from lightning_comm.strategies.common.support import RunSupport
from lightning_comm.strategies.compression.checks import WHERE
from lightning_comm.strategies.sparse_mask import checkpoint as mask_checkpoint
from lightning_comm.transport.compression.base import Compression, Context
from lightning_comm.transport.ddp_hook import GradientSync
from lightning_comm.transport.recording import Recorder

ENTRY = StrategyEntry("lightning_comm.compression", version=1)


class Saved(NamedTuple):
    """The parts of a run that a checkpoint keeps.

    Args:
        sync: Has the state; ``None`` before a ``fit``.
        compression: Its settings.
        fitted: The model of the last ``fit``.

    """

    sync: GradientSync | None
    compression: Compression
    fitted: LightningModule | None


class CompressionResume(NamedTuple):
    """The state from a checkpoint that this rank resumes from.

    Args:
        sync: What the method had kept; ``None``, on all ranks alike, if it starts anew.
        ledger: The sums of the ledger; ``None`` where the file does not have them.

    """

    sync: dict[str, Any] | None
    ledger: dict[str, Any] | None


def save(
    strategy: ParallelStrategy,
    support: RunSupport,
    state: Saved,
    checkpoint: dict[str, Any],
    filepath: _PATH,
    by_lightning: Callable[[dict[str, Any], _PATH], None],
) -> None:
    """Save the model with the residuals of each rank, or after a failure what this rank has.

    Args:
        strategy: The strategy.
        support: Whether ranks can meet.
        state: The parts to keep.
        checkpoint: What Lightning has collected.
        filepath: Of the main file.
        by_lightning: Lightning's way to write it.

    """
    fitted = state.fitted is not None and state.fitted is strategy.lightning_module  # now, or before an evaluation
    saved, shown = Save(str(filepath)), support.failures.first_error_shown
    if state.sync is not None and fitted and "optimizer_states" in checkpoint:
        with shown("a checkpoint", waits=False):
            saved = write(
                strategy,
                state.sync,
                state.compression,
                checkpoint,
                filepath,
                support.own_recorder(),
                support.from_rank_0,
                interrupted=support.interrupted,
            )
    elif support.interrupted:
        saved = Save(sets.incomplete_path(strategy, WHERE, filepath))
    elif state.fitted is not None and not fitted:
        leave_out_other_model(WHERE, checkpoint, filepath)
    if state.sync is None or not fitted or support.interrupted:
        by_lightning(checkpoint, saved.path)
    else:
        with shown("a checkpoint", waits=False):
            write_whole = partial(by_lightning, checkpoint, saved.path)
            sets.write_main(strategy, support.own_recorder(), WHERE, saved, write_whole)


def write(
    strategy: ParallelStrategy,
    sync: GradientSync,
    compression: Compression,
    checkpoint: dict[str, Any],
    filepath: _PATH,
    recorder: Recorder,
    from_rank_0: Callable[[Any], Any],
    *,
    interrupted: bool,
) -> Save:
    """Write this rank's file, if it has state of its own, and the strategy's entry into the checkpoint.

    Args:
        strategy: The strategy; every rank calls this.
        sync: Has the state.
        compression: Its settings.
        checkpoint: Takes the entry.
        filepath: Of the main file.
        recorder: Sends and records.
        from_rank_0: Gives all ranks rank 0's value.
        interrupted: Whether a rank failed; then no rank files are written.

    Returns:
        The save, whose main file is still to be written.

    """
    sums = recorder.ledger.state_dict()
    token, incomplete = "", sync.codec.is_local and interrupted
    if incomplete:
        save = Save(sets.incomplete_path(strategy, WHERE, filepath))
    elif sync.codec.is_local:
        save = sets.begin(strategy, filepath, from_rank_0)
        token = save.id
        sets.write_own(strategy, recorder, WHERE, save, {"sync": sync.state_dict(), "ledger": sums})
    else:
        save = Save(str(filepath))
    ENTRY.put(
        checkpoint,
        token=token,
        world_size=strategy.world_size,
        compression=plain(compression),
        sync=None if sync.codec.is_local else sync.state_dict(),
        masks=mask_checkpoint.mask_state(sync.codec, compression),
        ledger=sums,
    )
    save.write(checkpoint, incomplete=incomplete)
    return save


def load_own(
    strategy: ParallelStrategy,
    compression: Compression,
    checkpoint: dict[str, Any],
    filepath: _PATH,
    ledger: CommLedger,
) -> CompressionResume:
    """Return the state that this rank resumes from.

    Without usable rank files, masks are restored from the main file.

    Args:
        strategy: The strategy; every rank calls this.
        compression: Its settings.
        checkpoint: What was read from the main file.
        filepath: Of the main file.
        ledger: Where messages are recorded.

    """
    shared, saved = ENTRY.of(checkpoint), mask_checkpoint.masks_in(checkpoint)
    sums = None if shared is None else shared.get("ledger")
    recorder, written_under = Recorder(ledger), None if shared is None else shared.get("compression")
    found = compare(strategy, recorder, WHERE, written_under, saved, compression)
    mask_checkpoint.warn_of_uncompared(WHERE, filepath, found)
    if shared is not None and found.compression is None and shared["sync"] is not None:
        return CompressionResume(dict(shared["sync"]), sums)
    mask_checkpoint.warn_of_dense(WHERE, filepath, saved, compression)
    if not compression.keeps_state:
        return CompressionResume(None, sums)
    fresh = GradientSync(compression.codec(Context(Recorder(CommLedger()), "gradients")), Recorder(CommLedger()), ())
    masks_kept = mask_checkpoint.restore_masks(fresh.codec, saved, found)
    if masks_kept and not fresh.codec.is_local:
        return CompressionResume(fresh.state_dict(), sums)  # there is no state but the masks

    def why_not(entry: dict[str, Any]) -> str | None:
        if found.compression is not None:
            return f"it was written under {shown(entry['compression'])}: {found.compression}"
        return WRITTEN_ALONE if says_incomplete(checkpoint) else None

    own, reason = ENTRY.read_own(strategy, recorder, checkpoint, filepath, why_not)
    if own is not None:
        return CompressionResume(dict(own["sync"]), own.get("ledger", sums))
    if masks_kept:
        left = "weights, optimizer state and masks in the file, with nothing else kept"
    elif saved is not None:
        left = "weights and optimizer state in the file, with nothing kept: its masks are not restored"
    else:
        left = "weights and optimizer state in the file, with nothing kept"
    rank_zero_warn(
        f"{WHERE}: `ckpt_path`={str(filepath)!r} cannot bring back what {compression!r} had kept on each rank: "
        f"{reason}. Training goes on from the {left}. For an exact continuation resume with the same compression and "
        f"number of ranks, and keep the folder {removal.folder(filepath)!r} with the file."
    )
    return CompressionResume(fresh.state_dict() if masks_kept else None, sums)
