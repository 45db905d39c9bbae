"""The set-up of a run: ranks join, problems are refused, and the model is made equal on all ranks."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_comm.errors import Refusals, RefusedSetUp
from lightning_comm.lightning_internals import Patches, is_without_optimizer, only_note_sigterm
from lightning_comm.ondevice.model_tensors import fingerprint
from lightning_comm.strategies.common import rank_status
from lightning_comm.strategies.common.failures import RunFailures
from lightning_comm.strategies.common.model_checks import lazy_names
from lightning_comm.transport.averaging import broadcast_
from lightning_comm.transport.recording import Pending, Recorder
from lightning_comm.transport.start import all_ranks_started


class RunSetUp:
    """The wrapper of a strategy around Lightning's set-up.

    Args:
        strategy: The strategy.
        where: Its name, for messages.
        failures: Names the rank that fails while others wait.

    """

    def __init__(self, strategy: DDPStrategy | ModelParallelStrategy, where: str, failures: RunFailures) -> None:
        self._strategy = strategy
        self._where = where
        self._failures = failures
        self._refused_by_callbacks: list[tuple[str, str]] = []
        self._evaluation: Patches | None = None  # what is replaced while a `validate`, `test` or `predict` runs

    def join_ranks(self, by_lightning: Callable[[], None]) -> None:
        """Wait until all ranks have started, and let Lightning make their process group."""
        strategy = self._strategy
        strategy.set_world_ranks()
        environment = strategy.cluster_environment
        if environment is None or strategy.world_size == 1 or dist.is_initialized():
            by_lightning()
            return
        with all_ranks_started(
            self._where,
            environment.main_address,
            environment.main_port,
            strategy.global_rank,
            strategy.world_size,
            timeout_s=self._failures.timeout_s,
        ):
            by_lightning()

    def refuse_in_set_up(self, where: str, problems: Iterable[str]) -> None:
        """Note what a callback refuses, to raise it with what the strategy refuses (:class:`TakesRefusals`)."""
        self._refused_by_callbacks = [*self._refused_by_callbacks, *((where, problem) for problem in problems)]

    def refusals(self) -> Refusals:
        """Return the context that raises all refusals of a set-up at once, with those of callbacks."""
        found, self._refused_by_callbacks = self._refused_by_callbacks, []
        return Refusals(self._where, found)

    def evaluation(self, trainer: Trainer, by_lightning: Callable[[Trainer], None]) -> None:
        """Let Lightning set up a run that is no ``fit``; in it SIGTERM ends each rank separately."""
        self._failures.end_start()
        by_lightning(trainer)
        self._evaluation = Patches()
        only_note_sigterm(trainer, self._evaluation)

    def fit(self, trainer: Trainer, refusals: Refusals, by_lightning: Callable[[Trainer], None]) -> None:
        """Let Lightning set up a ``fit``.

        If that fails after a refusal, optimizers are made nevertheless, to check them too.
        """
        self._failures.end_start()
        try:
            by_lightning(trainer)
        except RefusedSetUp:
            raise
        except Exception:
            if not refusals.found:
                raise
            self._strategy.setup_optimizers(trainer)

    def optimizers(self, by_lightning: Callable[[], None]) -> None:
        """Let Lightning make the optimizers.

        Raises:
            RefusedSetUp: If there is none where one is announced.

        """
        try:
            by_lightning()
        except KeyError as error:
            if not is_without_optimizer(error):
                raise
            problem = (
                "`configure_optimizers` returned a dictionary without an optimizer. Return it with the schedule: "
                '{"optimizer": optimizer, "lr_scheduler": scheduler}.'
            )
            raise RefusedSetUp([(self._where, problem)]) from error

    def wrap_in_ddp(self, by_lightning: Callable[[], None]) -> None:
        """Let DDP wrap the model, compare the models, and give all ranks the weights of rank 0."""
        if lazy_names(self._strategy.lightning_module):
            return  # refused when the set-up ends, with what else there is
        with self._failures.first_error_shown("the set-up of DDP"):
            by_lightning()

    def share_model(self, recorder: Recorder, bucket_bytes: int) -> None:
        """Compare the models of all ranks, and give them the weights of rank 0, where no DDP does.

        Raises:
            ValueError: On all ranks, if the models differ.

        """
        model = self._strategy.model
        if model is None or lazy_names(self._strategy.lightning_module):
            return  # refused when the set-up ends, with what else there is
        named = [*model.named_parameters(), *model.named_buffers()]
        row = rank_status.RankStatus(layout=fingerprint(named))
        with self._failures.first_error_shown("the set-up"):
            rows = rank_status.exchange(row, recorder, self._strategy.root_device, Pending.wait)
        rank_status.check_same_model(rows, self._where)
        with self._failures.first_error_shown("the set-up"), torch.no_grad():
            broadcast_([tensor for _, tensor in named], recorder, "start", bucket_bytes)

    def undo(self) -> None:
        """Leave Lightning's objects as they were, and forget what callbacks have refused."""
        self._refused_by_callbacks = []
        if self._evaluation is not None:
            self._evaluation.undo()
            self._evaluation = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_evaluation": None}
