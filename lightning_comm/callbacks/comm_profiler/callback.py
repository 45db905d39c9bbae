"""The callback that measures the key figures of a run: it passes Lightning's hooks to a session."""

import functools
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_comm.callbacks.comm_profiler.log_interval import LogInterval
from lightning_comm.callbacks.comm_profiler.session import Session
from lightning_comm.callbacks.comm_profiler.start import (
    has_several_ranks,
    header_of,
    next_run_number,
    probed_bytes_per_s,
)
from lightning_comm.contract import GradientsCompressed, SynchronisesInRounds, refuse_with_strategy
from lightning_comm.core.arguments import is_whole
from lightning_comm.core.key_figures import RunFigures, StepFigures
from lightning_comm.core.ledger import CommLedger, wire_bytes
from lightning_comm.core.rank_profile import RankProfile, combine, inferred_waits, with_waits
from lightning_comm.errors import refuse
from lightning_comm.formats.profile import Profile, RankFile, run_folder
from lightning_comm.instruments.clocks import (
    compare_clocks,
    gather_json,
    group_on_the_host,
    number_from_rank_0,
)
from lightning_comm.lightning_internals import averages_without_a_hook, logged_step, timeout_of
from lightning_comm.ondevice.device_clock import DeviceClock
from lightning_comm.ondevice.sparse_gradients import fault_of_ddp
from lightning_comm.reports.profile.page import profile_page
from lightning_comm.reports.profile.text import summary

_log = logging.getLogger(__name__)
_Hook = TypeVar("_Hook", bound=Callable[..., None])
_STEPS_OF_ALL_RANKS = 64_000  # are gathered at most; with 64 ranks or fewer, 1,000 of each
_DEFAULT_FOLDER = "comm_profile"


def _never_ends_training(hook: _Hook) -> _Hook:
    """Let no exception of a hook's body reach the Trainer."""

    @functools.wraps(hook)
    def guarded(self: "CommProfiler", *args: Any, **kwargs: Any) -> None:
        self._safely(lambda: hook(self, *args, **kwargs))

    return cast(_Hook, guarded)


class CommProfiler(Callback):
    """Measure what a run sends, how long that takes, and how long training waits for it.

    Works with plain ``ddp``, with every strategy of this package, and with one process, on CPU and CUDA. Nothing about
    the run changes. After ``fit``, :attr:`figures` has the key figures of the run, and :attr:`steps` the steps of this
    rank. Rank 0 prints a summary and writes ``profile.html``; every rank writes
    ``rank_<r>.jsonl``, which :func:`load_profile` reads, also of a run that was killed. While the run goes on, the
    Trainer's loggers get means under ``comm/``.

    How to read the figures, and how each is measured: ``docs/how-to/measure.md``.

    Args:
        folder: Where files go: each ``fit`` makes ``run_<n>`` in it. ``None``: ``comm_profile`` in the Trainer's
            ``default_root_dir``.
        probe: A file that ``lightning-comm probe`` saved; the bandwidth that the run achieves is then compared with it.
            Only rank 0 reads it, so it need not be on the other hosts.
        timeline_steps: How many steps the page draws, by rank; at least 0. They are taken early in the run, around a
            step that communicates.
        warmup_steps: How many training batches at the start are left out of times and shares; at least 0. Their bytes
            are counted.
        page: Whether to write the HTML page.

    Raises:
        ValueError: If an argument is out of range; when ``fit`` begins, on all ranks alike, if rank 0 cannot read
            ``probe``.

    Note:
        *Communication.* None within training. Before it, 16 round trips of 8 bytes between each rank and rank 0, and 8
        bytes from rank 0; after it, the same again and at most 1,000 steps from each rank, some 400 KB. :attr:`ledger`
        has all of it, as ``"instruments"``; it is in none of the figures.

        *Cost.* Below 1 % of a step of 50 ms. *Memory.* About 1 MB.

        *Faults.* Where the profiler fails (a full disk, a private name of torch that was removed), it warns once and
        stops measuring on that rank; training goes on.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_comm import CommProfiler
        >>> profiler = CommProfiler(warmup_steps=10)
        >>> trainer = Trainer(callbacks=[profiler], accelerator="cpu", devices=2, strategy="ddp", logger=False)

    """

    def __init__(
        self,
        folder: str | None = None,
        probe: str | None = None,
        timeline_steps: int = 5,
        warmup_steps: int = 3,
        page: bool = True,
    ) -> None:
        refuse(
            "CommProfiler",
            [
                f"`{name}` counts training batches, so it must be a whole number >= 0; got {value!r}. Leave it out for "
                "a good one."
                for name, value in (("timeline_steps", timeline_steps), ("warmup_steps", warmup_steps))
                if not is_whole(value) or value < 0
            ],
        )
        self.folder = folder
        self.probe = probe
        self.timeline_steps = timeline_steps
        self.warmup_steps = warmup_steps
        self.page = page
        self._ledger = CommLedger()
        self.figures: RunFigures | None = None
        self.steps: list[StepFigures] = []
        self.run_folder: Path | None = None
        self._session: Session | None = None
        self._header: dict[str, Any] = {}
        self._link_bytes_per_s: float | None = None
        self._interval = LogInterval()
        self._stopped: str | None = None
        self._all_met = False
        self._group: dist.ProcessGroup | None = None  # in which ranks meet; the default group if that is one of the CPU
        self._is_the_first = True

    @property
    def ledger(self) -> CommLedger:
        """Every message of the profiler itself on this rank, around training, in the last or current ``fit``."""
        return self._ledger

    # ---- the one place where failures end ------------------------------------------------------------------------

    def _safely(self, body: Callable[[], None]) -> None:
        try:
            body()
        except Exception as error:  # any error: training matters more than its profile
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        if self._stopped is not None:
            return
        self._stopped = f"{type(error).__name__}: {error}"
        session, self._session = self._session, None
        if session is not None:
            session.end_measuring()
            session.abandon_file()
        _log.warning(
            "CommProfiler on rank %s stops measuring, and training goes on. The cause: %s",
            self._header.get("rank", "?"),
            self._stopped,
            exc_info=_log.isEnabledFor(logging.DEBUG),
        )

    # ---- the start -----------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._ledger = CommLedger()
        self.figures, self.steps, self.run_folder = None, [], None
        self._session, self._header, self._stopped, self._all_met = None, {}, None, False
        self._interval, self._group = LogInterval(), None
        profilers = [each for each in getattr(trainer, "callbacks", []) if isinstance(each, CommProfiler)]
        self._is_the_first = profilers[:1] in ([self], [])
        if not self._is_the_first:
            rank_zero_warn(
                "CommProfiler: only one can measure a `fit`, so the first one of the Trainer's `callbacks` does, and "
                "this one measures nothing. Remove one of the two, from the config or the command line."
            )
            return
        if self.probe is not None:
            self._link_bytes_per_s, problem = probed_bytes_per_s(self.probe, trainer, self._ledger)
            refuse_with_strategy(trainer, "CommProfiler", [problem] if problem else [])

    @override
    @_never_ends_training
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_the_first:
            return
        folder = Path(self.folder or Path(trainer.default_root_dir) / _DEFAULT_FOLDER)
        clock, number = [], next_run_number(folder)
        if has_several_ranks():
            # every rank comes here, also one without a disk: what can fail on one alone comes afterwards
            self._group = group_on_the_host(timeout_of(trainer.strategy))
            clock = [compare_clocks(self._ledger, self._group)]
            number = number_from_rank_0(number, self._ledger, self._group)
            self._all_met = True
        self._header = header_of(trainer, self.warmup_steps, self._link_bytes_per_s)
        self.run_folder = run_folder(folder, number)
        file = RankFile(self.run_folder / f"rank_{trainer.global_rank}.jsonl", self._header)
        for point in clock:
            file.clock(point)
        keep = max(50, min(1000, _STEPS_OF_ALL_RANKS // trainer.world_size))
        profile = RankProfile(self._header, keep=keep, clock=clock)
        of_device = DeviceClock(trainer.strategy.root_device)
        self._session = Session(
            profile, file, self.timeline_steps, lambda: trainer.global_step, self._safely, of_device
        )
        self._session.begin_measuring()
        has_said_so = isinstance(trainer.strategy, (SynchronisesInRounds, GradientsCompressed))  # itself, at set-up
        if not has_said_so and averages_without_a_hook(trainer.strategy.model):
            fault = fault_of_ddp(pl_module, trainer.world_size)
            if fault is not None:
                rank_zero_warn(f"CommProfiler: {fault}")
        if trainer.world_size == 1:
            rank_zero_info("CommProfiler: one process, so nothing is sent; it measures the time of steps.")

    # ---- training ------------------------------------------------------------------------------------------------

    @override
    @_never_ends_training
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._session is not None:  # here, since parameters may be frozen and unfrozen between epochs
            trained = (each for each in pl_module.parameters() if each.requires_grad and not is_lazy(each))
            dense = 4 * sum(each.numel() for each in trained)  # lazy ones have no size before the first forward
            self._session.dense_bytes = wire_bytes("all_reduce", dense, trainer.world_size)
            self._session.automatic = pl_module.automatic_optimization

    @override
    @_never_ends_training
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._session is not None:
            self._session.begin_step(trainer.strategy.model)
            for step in self._session.take_new():
                self._interval.add(step)

    @override
    @_never_ends_training
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        if self._session is not None:
            self._session.begin_backward()

    @override
    @_never_ends_training
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._session is not None:
            self._session.end_backward()

    @override
    @_never_ends_training
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._session is not None:
            self._session.end_batch()
            self._log(trainer)

    @override
    @_never_ends_training
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._session is not None:
            self._session.leave_training()

    @override
    @_never_ends_training
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._session is not None:
            self._session.leave_training()

    def _log(self, trainer: Trainer) -> None:
        """Log the means of the steps since the last time, when Lightning logs the metrics of a batch."""
        step = logged_step(trainer) if trainer.is_global_zero else None
        metrics = {} if step is None else self._interval.take()
        for logger in trainer.loggers if metrics else []:
            logger.log_metrics(metrics, step=step)

    # ---- the end -------------------------------------------------------------------------------------------------

    @override
    @_never_ends_training
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._is_the_first:
            return
        rows = [self._own_row()]
        if self._all_met:
            # every rank comes here, also one whose profiler has stopped
            clock = compare_clocks(self._ledger, self._group)
            if rows[0] is not None:
                rows[0]["clock"].append(clock)
            rows = gather_json(rows[0], torch.device("cpu"), self._ledger, group=self._group)
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None
        self._safely(lambda: self._conclude(trainer, [RankProfile.from_dict(row) for row in rows if row is not None]))

    def _own_row(self) -> dict[str, Any] | None:
        """Return this rank's row, in plain types: its figures, or that there are none, or nothing."""
        if self._session is not None:
            self._safely(self._session.finish)
        if self._session is not None:
            return self._session.profile.to_dict()
        return RankProfile(self._header, stopped=self._stopped).to_dict() if self._header else None

    def _conclude(self, trainer: Trainer, ranks: list[RankProfile]) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close_file()
        self.figures = combine(ranks)
        own = next((rank for rank in ranks if rank.rank == trainer.global_rank), None)
        if own is not None:
            self.steps = with_waits(own.kept, inferred_waits(ranks).get(own.rank, {}))
        if trainer.is_global_zero:
            rank_zero_info(summary(self.figures))
            if self.page and self.run_folder is not None:
                _write_page(self.run_folder / "profile.html", Profile(ranks))

    @override
    @_never_ends_training
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end_session()

    @override
    @_never_ends_training
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end_session()

    def _end_session(self) -> None:
        """End measuring without a message to other ranks, which may have ended. What was written to the file stays."""
        session, self._session = self._session, None
        if session is not None:
            session.end_measuring()
            session.abandon_file()


def _write_page(path: Path, profile: Profile) -> None:
    page = profile_page(profile)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)  # an incomplete page shows nothing
        _log.warning(
            f"CommProfiler: the page {path} cannot be written: {error}. Where there is room, "
            f"`lightning_comm.reports.profile.page.profile_page(load_profile({str(path.parent)!r}))` returns it, from "
            "what the ranks' files hold."
        )
        return
    rank_zero_info(f"The page: {path}")
