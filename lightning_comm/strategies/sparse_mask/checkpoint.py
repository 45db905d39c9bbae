"""Masks in checkpoints: equal on every rank, so they are saved in the file that all ranks read, by parameter name.

So they can be restored with another number of ranks, without rank files, and under another compression of kept weights.
"""

from typing import Any

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_comm.core.plain_settings import plain, shown
from lightning_comm.strategies.checkpoints.comparison import Comparison
from lightning_comm.transport.compression.base import Codec, Compression
from lightning_comm.transport.compression.sparse_mask import SparseMask
from lightning_comm.transport.compression.sparse_mask_codec import SparseMaskCodec


def mask_state(codec: Codec | None, settings: Compression | None) -> dict[str, Any] | None:
    """Return the masks of a run for the main file, with the setting that chose them; ``None`` without any."""
    if not isinstance(codec, SparseMaskCodec) or not isinstance(settings, SparseMask) or not codec.masks:
        return None
    return {**codec.mask_state(), "pruning": plain(settings.pruning), "reckoned": _reckoned(settings)}


def masks_in(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """Return what :func:`mask_state` put into a checkpoint, whichever of our strategies wrote it."""
    for key, entry in checkpoint.items():
        if str(key).startswith("lightning_comm.") and isinstance(entry, dict) and entry.get("masks"):
            return dict(entry["masks"])
    return None


def restore_masks(codec: Codec | None, saved: dict[str, Any] | None, found: Comparison) -> bool:
    """Restore the masks of a checkpoint if the same setting chose them; return whether it did."""
    if saved is None or not isinstance(codec, SparseMaskCodec) or not found.keeps_masks:
        return False
    codec.load_mask_state(saved if found.keeps_share else {**saved, "dense_above": codec.dense_above})
    return True


def warn_of_dense(where: str, filepath: _PATH | None, saved: dict[str, Any] | None, settings: object) -> None:
    """Warn that a pruned model goes on dense, where the new settings have no masks."""
    if saved is None or isinstance(settings, SparseMask):
        return
    rank_zero_warn(
        f"{where}: {_named(filepath)} was written with the masks of {shown(saved['pruning'])}, and there are none with "
        f"{settings!r}, so weights that were pruned are trained again and the model becomes dense. Give "
        "`compression=[SparseMask(…), …]` with the same `pruning` to keep them at zero."
    )


def warn_of_other_masks(where: str, filepath: _PATH | None, saved: dict[str, Any] | None, found: Comparison) -> None:
    """Warn that masks are chosen anew, where another setting chooses them now."""
    if saved is not None and found.pruning is not None:
        rank_zero_warn(
            f"{where}: {_named(filepath)} has the masks of {shown(saved['pruning'])}, and `pruning` is another one "
            f"now: {found.pruning}. So masks are chosen anew and pruned weights may come back. Resume with the same "
            "`pruning` to keep them."
        )


def warn_of_uncompared(where: str, filepath: _PATH | None, found: Comparison) -> None:
    """Warn that masks are kept although it cannot be compared whether the same setting chooses them now."""
    if found.keeps_masks and found.not_compared is not None:
        rank_zero_warn(
            f"{where}: {_named(filepath)} has masks, which are kept, and whether the same `pruning` would choose them "
            f"now cannot be told: {found.not_compared}. To have them chosen anew, resume with another setting."
        )


def _named(filepath: _PATH | None) -> str:
    return "the checkpoint" if filepath is None else f"`ckpt_path`={str(filepath)!r}"


def _reckoned(settings: SparseMask) -> list[Any]:
    return [settings.dense_above, settings.link, plain(settings.then)]
