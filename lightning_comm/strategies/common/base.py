"""What our strategies share: Lightning's collectives, and how the failure of a rank is told."""

import itertools
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from typing_extensions import override

from lightning_comm.core.ledger import CommLedger
from lightning_comm.errors import Refusals, RefusedSetUp
from lightning_comm.lightning_internals import Patches, close_finished_epoch, is_without_optimizer, only_note_sigterm
from lightning_comm.strategies.checkpoints import removal
from lightning_comm.strategies.checkpoints.whole_files import with_default
from lightning_comm.strategies.common import earlier_failures
from lightning_comm.strategies.common.interruptions import Interruptions
from lightning_comm.strategies.common.model_checks import lazy_names
from lightning_comm.transport.epoch_ends import EpochEnds
from lightning_comm.transport.failures import Peers, is_lost_connection
from lightning_comm.transport.plain_data import broadcast_json
from lightning_comm.transport.recording import (
    Recorder,
    hang_up,
    has_unfinished_messages,
    leave_group_at_exit,
    note_exit_status,
)
from lightning_comm.transport.start import all_ranks_started
from lightning_comm.transport.stop_protocol import Agreement, KeyValueStore, PeerFailure, default_store
from lightning_comm.transport.store_client import StoreLostError

_T = TypeVar("_T")
_runs = itertools.count()  # tells the keys of one run in the store from those of the next; equal on all ranks


class Run(Protocol):
    """One ``fit``, as far as checkpoints need to know."""

    @property
    def module(self) -> LightningModule:
        """The model that it trains, or has trained."""
        ...


class PeerAwareStrategy(DDPStrategy):
    """Between Lightning's strategy and ours: every collective of Lightning's goes through :meth:`_together`.

    The one class of ours that others derive from, since Lightning wants these methods on the strategy itself.
    """

    _interruptions: Interruptions | None = None
    _trainer: Trainer | None = None
    _peers: Peers | None = None  # from the set-up of a run, be it a `fit` or another, to its teardown
    _refused = False  # whether all ranks have found alike that they cannot go on
    _run_failed = False  # whether that run has ended by an exception on this rank
    _refused_by_callbacks: list[tuple[str, str]] = []  # noqa: RUF012  (never changed in place)
    _evaluation: Patches | None = None  # what is replaced while a `validate`, `test` or `predict` runs

    @property
    @abstractmethod
    def ledger(self) -> CommLedger:
        """What this rank has sent in the last or current ``fit``."""

    @property
    @abstractmethod
    def _agreement(self) -> Agreement | None:
        """How ranks of the current ``fit`` tell each other of failures; ``None`` without one."""

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        leave_group_at_exit()
        self._end_peers(failed=True)  # of a run that was left without its teardown
        self._run_failed = self._refused = False
        number = next(_runs)
        if self.world_size > 1:
            self._peers = Peers(
                default_store(),
                self.global_rank,
                self.world_size,
                f"lightning_comm/peers/{number}",
                self._timeout_s,
                store_on_rank_0=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",  # as torch itself looks
                steps_done=lambda: 0 if self._trainer is None else self._trainer.global_step,
            )
            self._peers.begin("`prepare_data`, or what comes before the set-up")
            earlier_failures.refuse_broken_group(self._peers.store, type(self).__name__)

    @override
    def setup_distributed(self) -> None:
        self.set_world_ranks()
        environment = self.cluster_environment
        if environment is None or self.world_size == 1 or dist.is_initialized():
            super().setup_distributed()
            return
        with all_ranks_started(
            type(self).__name__,
            environment.main_address,
            environment.main_port,
            self.global_rank,
            self.world_size,
            timeout_s=self._timeout_s,
        ):
            super().setup_distributed()

    @override
    def setup(self, trainer: Trainer) -> None:
        if self._peers is not None:
            self._peers.end_start()
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            self._evaluation = Patches()
            only_note_sigterm(trainer, self._evaluation)

    def refuse_in_set_up(self, where: str, problems: Iterable[str]) -> None:
        """Note what a callback refuses, to raise it with what the strategy refuses (:class:`TakesRefusals`)."""
        self._refused_by_callbacks = [*self._refused_by_callbacks, *((where, problem) for problem in problems)]

    def _refusals(self, where: str) -> Refusals:
        """Return what raises all refusals of a set-up at once, with those of callbacks."""
        found, self._refused_by_callbacks = self._refused_by_callbacks, []
        return Refusals(where, found)

    def _set_up(self, trainer: Trainer, refusals: Refusals) -> None:
        """Set up as Lightning does. Where that fails behind a refusal, make the optimizers, to be looked at as well."""
        try:
            PeerAwareStrategy.setup(self, trainer)
        except RefusedSetUp:
            raise
        except Exception:
            if not refusals.found:
                raise
            self.setup_optimizers(trainer)

    @override
    def teardown(self) -> None:
        self._refused_by_callbacks = []
        if self._evaluation is not None:
            self._evaluation.undo()
            self._evaluation = None
        try:
            super().teardown()
        except BaseException:
            self._run_failed = True
            raise
        finally:
            self._end_peers(failed=self._run_failed)

    def _end_peers(self, *, failed: bool) -> None:
        peers, self._peers = self._peers, None
        if peers is not None:
            peers.close(failed=failed)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_peers": None, "_evaluation": None}

    @override
    def configure_ddp(self) -> None:
        if lazy_names(self.lightning_module):
            return  # refused when the set-up ends, with what else there is
        with self._first_error_shown("the set-up of DDP"):
            super().configure_ddp()

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        try:
            super().setup_optimizers(trainer)
        except KeyError as error:
            if not is_without_optimizer(error):
                raise
            problem = (
                "`configure_optimizers` returned a dictionary without an optimizer. Return it with the schedule: "
                '{"optimizer": optimizer, "lr_scheduler": scheduler}.'
            )
            raise RefusedSetUp([(type(self).__name__, problem)]) from error

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        self._checkpoint_io = with_default(self._checkpoint_io)
        return self._checkpoint_io

    @checkpoint_io.setter
    @override
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        if self._trainer is not None and self._trainer.interrupted:
            return  # what was to take its place is not complete
        removal.remove(self, filepath, partial(super().remove_checkpoint, filepath))

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        trainer = self.lightning_module.trainer if self.lightning_module is not None else None
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING and self._agreement is None:
            # not for a tuner within `fit`, which puts back what it has changed; also where another strategy wrote it
            close_finished_epoch(checkpoint.get("loops"))
        return checkpoint

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        self._compare_places("a barrier")
        self._together(lambda: DDPStrategy.barrier(self, *args, **kwargs), None, "a barrier")

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        self._compare_places("a broadcast")
        return self._together(lambda: DDPStrategy.broadcast(self, obj, src), obj, "a broadcast")

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        self._compare_places("a common decision, as before a checkpoint")
        return super().reduce_boolean_decision(decision, all)

    @override
    def reduce(self, tensor: Tensor, group: Any | None = None, reduce_op: Any = "mean") -> Tensor:
        self._compare_places("a reduction, as of what is logged")
        return self._together(lambda: DDPStrategy.reduce(self, tensor, group, reduce_op), tensor, "a reduction")

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        return self._together(lambda: DDPStrategy.all_gather(self, tensor, group, sync_grads), tensor, "a gathering")

    def _meet_before_groups(self) -> None:
        """Wait for all ranks before process groups are made: there a failure of another would not be heard."""

        def meet() -> None:
            self._own_recorder().sent_by_others("barrier", "set_up", 0, lambda: DDPStrategy.barrier(self))

        self._together(meet, None, "the set-up")

    def _any_rank(self, vote: bool) -> bool:
        """Whether any rank says yes: one all-reduce of 8 bytes, where all ranks have just met in another message."""
        self._compare_places("a common decision, as before a checkpoint")
        votes = torch.tensor(int(vote), device=self.root_device)

        def any_vote() -> bool:
            self._own_recorder().all_reduce(votes, "stops").wait()
            return bool(votes)

        return self._together(any_vote, vote, "a common decision")

    def _from_rank_0(self, value: Any) -> Any:
        """Return what rank 0 has on all ranks, in plain types, for a save: two broadcasts."""
        self._compare_places("a broadcast")

        def send() -> Any:
            return broadcast_json(value, self._own_recorder(), self.root_device, "checkpoint_files")

        return self._together(send, value, "a broadcast")

    def _own_recorder(self) -> Recorder:
        """Return what sends and records the few messages that are no step's."""
        recorder = Recorder(self.ledger)
        recorder.step = 0 if self._trainer is None else self._trainer.global_step
        return recorder

    def _first_error_shown(self, where: str, *, waits: bool = True) -> AbstractContextManager[None]:
        """Turn the loss of a connection into an error that names the rank that failed, in a wait."""
        return nullcontext() if self._peers is None else self._peers.first_error_shown(where, waits=waits)

    def end_batch(self) -> None:
        """Called by the companion after every training batch and its schedulers, before any other callback."""

    def end_epoch(self) -> None:
        """Called by the companion at the end of a training epoch."""

    def begin_evaluation(self) -> None:
        """Called by the companion when validation starts."""

    def finish(self) -> None:
        """Called by the companion when training ends, before any other callback."""

    def _compare_places(self, purpose: str) -> None:
        """Refuse ranks that have come apart, where that can be, before Lightning's own messages for a checkpoint."""

    def _together(self, collective: Callable[[], _T], alone: _T, where: str) -> _T:
        """Note that all ranks meet; once a rank has failed, when no collective would end, do without."""
        if self._interruptions is not None:
            self._interruptions.met = True
        if self._trainer is not None and self._trainer.interrupted:
            return alone
        with self._first_error_shown(where):
            return collective()

    def _epoch_ends(self, agreement: Agreement, store: KeyValueStore, namespace: str, where: str) -> EpochEnds:
        """Return what compares where ranks end their epochs."""
        return EpochEnds(
            store,
            self.global_rank,
            self.world_size,
            namespace,
            where,
            agreement,
            self._close_group,
            self._timeout_s,
        )

    def _close_group(self) -> None:
        if self._peers is not None:
            earlier_failures.tell(self._peers.store)
        if dist.is_initialized():
            hang_up(None)

    @property
    def _timeout_s(self) -> float:
        return (self._timeout or timedelta(minutes=30)).total_seconds()

    def _has_fitted(self, run: Run | None) -> bool:
        """Whether a run of this very model is under way, or is over, and its ranks are still joined."""
        return run is not None and run.module is self.lightning_module and dist.is_initialized()

    def _refuse_together(self) -> None:
        """Note that all ranks raise the same error now: none of them failed, and nobody waits for another."""
        self._refused = True

    def report_failure(self, exception: BaseException) -> None:
        """Called by the companion when this rank ends by an exception: tell the others, without a collective.

        A rank that has lost a connection did not fail: its error is made to say who did. Then this rank waits a few
        seconds for the others to hear of it and to leave as well. Some may be in a collective that it would take part
        in, and it may live on, as in a notebook: so those that stay are hung up on.
        """
        peers = self._peers
        if peers is None:
            return
        if isinstance(exception, SIGTERMException):
            if self._trainer is None or self._trainer.state.fn == TrainerFn.FITTING:
                peers.part()  # all ranks have agreed to end; rank 0 may host the store
                return
            # an evaluation ends on each rank by itself, since ranks may have different numbers of batches
            exception = InterruptedError("it was ended by SIGTERM")
        self._run_failed = True
        note_exit_status()
        if self._refused:
            peers.part()
            return
        broken = has_unfinished_messages() or any(
            error is not None and is_lost_connection(error) for error in (exception, exception.__cause__)
        )
        if is_lost_connection(exception):
            exception.args = (f"{peers.who_failed(exception)} ({exception})",)
        elif not isinstance(exception, PeerFailure):
            with suppress(StoreLostError):  # the store is gone with rank 0, and then everybody knows
                peers.report(f"{type(exception).__name__}: {exception}")
        earlier_failures.note(peers.failure or f"{type(exception).__name__}: {exception}")
        if broken:
            earlier_failures.tell(peers.store)  # before the others can see that this rank has left
        if not peers.part():
            self._close_group()
