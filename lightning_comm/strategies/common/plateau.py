"""The value that `ReduceLROnPlateau` watches: made equal on all ranks, whose learning rates would differ otherwise."""

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_comm.lightning_internals import Patches, replace_monitor_value
from lightning_comm.ondevice.uploads import uploaded
from lightning_comm.transport.recording import Recorder
from lightning_comm.transport.stop_protocol import Agreement


class PlateauMonitors:
    """Gives schedulers that watch a value its mean over those ranks that have one.

    Equal values stay as they are, to the bit.

    Args:
        trainer: The Trainer.
        patches: Where what is replaced in Lightning is kept.
        recorder: Sends and records.
        agreement: How ranks learn of failures.
        device: Where the backend wants its messages.
        where: The strategy, for messages.
        before: Called before each message.

    Note:
        *Communication.* An all-gather of 16 bytes a rank whenever such a scheduler is stepped; none without one.

    """

    def __init__(
        self,
        trainer: Trainer,
        patches: Patches,
        recorder: Recorder,
        agreement: Agreement,
        device: torch.device,
        where: str,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self._before = before
        self._recorder, self._agreement, self._device, self._where = recorder, agreement, device, where
        self._warned: set[str] = set()
        plateaus = [config for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
        self._each_step = {str(config.monitor) for config in plateaus if config.interval == "step"}
        if plateaus and recorder.world_size > 1:
            replace_monitor_value(trainer, patches, self._agreed)

    def _agreed(self, name: str, read: Callable[[str], Any]) -> Any:
        own = read(name)
        number = math.nan if own is None else float(own)
        row = uploaded(torch.tensor([own is not None, number], dtype=torch.float64), self._device)
        self._before()
        with self._agreement.first_error_shown("the value that ReduceLROnPlateau watches"):
            rows, pending = self._recorder.all_gather(row, "control")
            pending.wait()
        values = [value for known, value in rows.tolist() if known]
        if not values:
            return None  # which Lightning refuses, or skips, on all ranks alike
        if len(values) == self._recorder.world_size and len({str(value) for value in values}) == 1:
            return own
        self._say(name, rows.tolist())
        mean = sum(values) / len(values)
        return own.new_tensor(mean) if isinstance(own, Tensor) and own.is_floating_point() else torch.tensor(mean)

    def _say(self, name: str, rows: list[list[float]]) -> None:
        if name in self._warned:
            return
        self._warned.add(name)
        said = ", ".join(f"{value:g}" if known else "none" for known, value in rows)
        apart = " At each of its steps ranks wait for each other." if name in self._each_step else ""
        rank_zero_warn(
            f"{self._where}: ReduceLROnPlateau watches `monitor`={name!r}, which differs between ranks ({said}), so it "
            f"is given the mean over the ranks that have one, here and whenever they differ.{apart} To have the mean "
            f"in logs and checkpoints too, log it with `self.log({name!r}, ..., sync_dist=True)`, or as a torchmetrics "
            "object."
        )
