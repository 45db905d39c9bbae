"""The comparison of a checkpoint's settings with those of the run: made on rank 0, and the same on all ranks.

Settings may hold something of a single rank, such as a path of its own, where rank 0 alone uses it. If each rank
compared its own, some would find a difference and some would not, and only some would then send a message.
"""

from typing import Any, NamedTuple

from lightning.pytorch.strategies import ParallelStrategy

from lightning_comm.core.plain_settings import difference, not_compared
from lightning_comm.strategies.checkpoints.problems import CheckpointError, one_line
from lightning_comm.transport.compression.base import Compression
from lightning_comm.transport.compression.sparse_mask import SparseMask
from lightning_comm.transport.plain_data import broadcast_json
from lightning_comm.transport.recording import Recorder


class Comparison(NamedTuple):
    """The differences that rank 0 has found.

    Args:
        compression: Between the compression saved and that of the run; ``None`` without one, or where none was saved.
        pruning: Between what chose the masks saved and what chooses them now; ``None`` also without masks.
        keeps_masks: Whether the same setting chose the masks that were saved.
        keeps_share: Whether the share above which buckets are sent whole was measured under the same settings.
        not_compared: The part of ``pruning`` of which nobody can tell whether it is the same; ``None`` without
            one.

    """

    compression: str | None = None
    pruning: str | None = None
    keeps_masks: bool = False
    keeps_share: bool = False
    not_compared: str | None = None


NOTHING_SAVED = Comparison()


def compare(
    strategy: ParallelStrategy,
    recorder: Recorder,
    where: str,
    saved: Any,
    masks: dict[str, Any] | None,
    settings: Compression | None,
) -> Comparison:
    """Return rank 0's comparison on all ranks; every rank calls this, before anything depends on a difference.

    Args:
        strategy: The strategy.
        recorder: Sends and records.
        where: Its name, for messages.
        saved: The compression of the run that was saved, as plain fields; ``None`` if it is not known.
        masks: The masks that were saved, with the setting that chose them; ``None`` without any.
        settings: The compression of the run; ``None`` without one.

    Raises:
        CheckpointError: On all ranks, if rank 0 cannot compare them.

    Note:
        *Communication.* Two broadcasts, recorded as ``"checkpoint_files"``: 8 bytes, and the differences as text.

    """
    found, problem = Comparison(), None
    if strategy.is_global_zero:
        try:
            found = _compared(saved, masks, settings)
        except Exception as error:  # whatever a user's object raises: the others wait for the result
            problem = one_line(error)
    # a list, since that is what tuples become on their way
    *parts, problem = broadcast_json([*found, problem], recorder, strategy.root_device, "checkpoint_files")
    if problem is not None:
        raise CheckpointError(
            f"{where}: the settings in the checkpoint cannot be compared with {settings!r} on rank 0: {problem}. Give "
            "settings whose fields can be read, or the path of another checkpoint."
        )
    return Comparison(*parts)


def _compared(saved: Any, masks: dict[str, Any] | None, settings: Compression | None) -> Comparison:
    of_all = difference(saved, settings) if saved is not None and settings is not None else None
    if masks is None or not isinstance(settings, SparseMask):
        return Comparison(of_all)
    pruning = difference(masks["pruning"], settings.pruning)
    if pruning is not None:
        return Comparison(of_all, pruning)
    measured = settings.dense_above == "auto" and _is_reckoned_alike(masks["reckoned"], settings)
    return Comparison(of_all, None, True, measured, not_compared(masks["pruning"], settings.pruning))


def _is_reckoned_alike(saved: list[Any], settings: SparseMask) -> bool:
    dense_above, link, then = saved
    return [dense_above, link] == [settings.dense_above, settings.link] and difference(then, settings.then) is None
