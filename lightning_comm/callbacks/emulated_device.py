"""An emulated device for a rank, which trains as fast as a device of a stated speed, whatever it runs on."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_comm.contract import refuse_with_strategy
from lightning_comm.core.ledger import CommRecord
from lightning_comm.errors import refuse
from lightning_comm.lab.device.pacer import DevicePacer
from lightning_comm.lab.device.settings import device_problems
from lightning_comm.transport.recording import observe

_log = logging.getLogger(__name__)


class EmulatedDevice(Callback):
    """Make forward and backward of every training batch take as long as on a device of a stated speed.

    For the lab, in which several hosts share one machine: each gets a device of its own, so that overlap, slow ranks
    and more ranks than cores can be studied. Layers take their share of the time and gradients are ready when they
    would be; weights and losses are those of a run without it. Every batch takes time in proportion to its samples,
    also under gradient accumulation; validation is not slowed down. See
    :class:`lightning_comm.lab.device.pacer.DevicePacer` for how, and for what is not emulated.

    A run says at its end that its device was emulated, and every rank says if its real compute was too slow for that.
    :meth:`summary` has the same text, for reports.

    Args:
        step_s: Seconds that a batch of ``batch_size`` samples takes on a device of speed 1; more than 0.
        batch_size: Samples of a batch on one device, at least 1.
        forward_share: The forward pass's share of that time; more than 0, less than 1.
        speed: Divides the time, one number for all ranks or one for each, so ``[1, 3]`` is a slow and a fast device;
            ``None`` takes the environment variable ``LIGHTNING_COMM_SPEED``, which ``lightning-comm lab --speed`` sets
            for each host, or 1.0 without it.

    Raises:
        ValueError: If an argument is out of range; at set-up, if the model is compiled or a list of speeds has not one
            for each rank; when training starts, if the model is not on the CPU.
        MisconfigurationException: In training, if the number of samples of a batch cannot be found.

    Note:
        *Communication.* None.

    Example:
        >>> EmulatedDevice(step_s=0.25, batch_size=32, speed=0.5).summary()
        'Emulated device: 32 samples take 0.5 s (step_s=0.25, speed=0.5); not run yet.'

    """

    def __init__(
        self,
        step_s: float,
        batch_size: int,
        forward_share: float = 1 / 3,
        speed: float | Sequence[float] | None = None,
    ) -> None:
        self.speed: float | tuple[float, ...] | None = (
            speed if speed is None or isinstance(speed, (int, float)) else tuple(speed)
        )
        refuse(
            "EmulatedDevice",
            (
                problem
                for each in _each(self.speed) or (None,)
                for problem in device_problems(
                    step_s=step_s, batch_size=batch_size, forward_share=forward_share, speed=each
                )
            ),
        )
        self.step_s = step_s
        self.batch_size = batch_size
        self.forward_share = forward_share
        self.pacer: DevicePacer | None = None  # of the last or current fit
        self._end_watch: Callable[[], None] = _nothing

    def summary(self) -> str:
        """Return a text: that the device is emulated, how fast it is, and whether the last run kept its pace."""
        if self.pacer is not None:
            return self.pacer.summary()
        speeds = [1.0 if speed is None else speed for speed in _each(self.speed)]
        times = _shown([self.step_s / speed for speed in speeds])
        return (
            f"Emulated device: {self.batch_size} samples take {times} s (step_s={self.step_s:g}, "
            f"speed={_shown(speeds)}); not run yet."
        )

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_with_strategy(trainer, "EmulatedDevice", self._problems(pl_module, trainer.world_size))

    def _problems(self, module: LightningModule, ranks: int) -> Iterator[str]:
        if isinstance(self.speed, tuple) and len(self.speed) != ranks:
            yield (
                f"`speed` must be one number or one for each of {ranks} ranks; got {list(self.speed)}, which has "
                f"{len(self.speed)}. Ranks are numbered over all hosts: devices x num_nodes."
            )
        if getattr(module, "_compiler_ctx", None) is not None:
            yield (
                "the model must not be compiled, since it then runs as one piece; got one from torch.compile. Leave "
                "torch.compile out where devices are emulated."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pacer = DevicePacer(
            pl_module,
            step_s=self.step_s,
            batch_size=self.batch_size,
            forward_share=self.forward_share,
            speed=self.speed[trainer.global_rank] if isinstance(self.speed, tuple) else self.speed,
        )
        self.pacer.attach()
        self._end_watch()
        self._end_watch = observe(self._on_message)

    def _on_message(self, record: CommRecord) -> None:
        if record.kind == "receive" and self.pacer is not None:  # compute has waited for it, in the middle of a pass
            self.pacer.idle(record.duration_s)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.pacer is not None:
            self.pacer.begin_step(_samples(batch))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.pacer is not None:
            self.pacer.end_step()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.pacer is None:
            return
        self._stop()
        if self.pacer.overruns or self.pacer.unpaced_batches:
            _log.warning("Rank %d: %s", trainer.global_rank, self.pacer.summary())
        elif isinstance(self.speed, tuple):
            rank_zero_info(f"Ranks have emulated devices of the speeds {_shown(self.speed)}. {self.pacer.summary()}")
        else:
            rank_zero_info(self.pacer.summary())

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        self._end_watch()
        self._end_watch = _nothing
        if self.pacer is not None:
            self.pacer.detach()


def _nothing() -> None:
    """Do nothing: there is no watch to end."""


def _each(speed: float | tuple[float, ...] | None) -> tuple[float | None, ...]:
    return speed if isinstance(speed, tuple) else (speed,)


def _shown(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


def _samples(batch: Any) -> int:
    try:
        return extract_batch_size(batch)
    except MisconfigurationException as error:
        raise MisconfigurationException(
            f"EmulatedDevice: the batch must hold a tensor whose first dimension counts the samples; got "
            f"{type(batch).__name__} without one. Let the loader return tensors, or lists, tuples or dicts of them."
        ) from error
