"""One rank of a pilot, which runs trial after trial in one process.

Its input is a :class:`TrialJob` as JSON. It reports events as lines of JSON on the standard output, marked by
``EVENT``; all else that is printed there is the user's. Starting a process takes longer than a trial, so all trials of
a rank share one process and one process group; each has a model, data and a Trainer of its own, built from the config
as ``fit`` would.
"""

import gc
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    EarlyStopping,
    LearningRateFinder,
    ModelSummary,
    ProgressBar,
    Timer,
)
from lightning.pytorch.loggers.logger import DummyLogger
from typing_extensions import override

from lightning_comm.callbacks import CommProfiler, EmulatedDevice
from lightning_comm.cli.fit.command import CommandLine
from lightning_comm.cli.pilot.arguments import OWN, Refused, without_start_method
from lightning_comm.cli.pilot.trial_callbacks import Rehearsal, Watch
from lightning_comm.core.ledger import CommLedger
from lightning_comm.core.local_update.periods import FixedPeriod
from lightning_comm.instruments.clocks import device_of_group, gather_json
from lightning_comm.planning.pilot.costs import BASELINE, LIMIT
from lightning_comm.planning.pilot.length import ended_early, fit_to_run
from lightning_comm.planning.projection import round_ends
from lightning_comm.strategies import LocalUpdateStrategy
from lightning_comm.transport.failure_messages import PeerFailure
from lightning_comm.transport.group_ends import leave_group_at_exit

EVENT = "@pilot "
_LEFT_OUT = (
    Checkpoint,
    EarlyStopping,
    ProgressBar,
    ModelSummary,
    Timer,
    LearningRateFinder,
    BatchSizeFinder,
    CommProfiler,
)
_NOT_IN_A_PILOT = {
    "logger": False,
    "fast_dev_run": False,
    "profiler": None,
    "max_time": None,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
}
_LONGER_THAN_ANY_RUN = 10**9  # steps
_SAME_RATE = 1e-6  # relative


@dataclass(frozen=True)
class TrialJob:
    """The job of a rank.

    Args:
        args: The user's arguments for ``lightning-comm fit``.
        trials: Repeat and strategy of each trial, in order.
        steps: Optimizer steps of a trial.
        warmup_steps: How many of them are not counted.
        device_s: Seconds that a batch takes on the emulated device; ``None`` for the real one.
        trainer: Arguments of the Trainer that the place of the run decides on: the number of devices and hosts.
        set_by_user: Which of ``steps`` and ``warmup_steps`` the user gave; the other is fitted to a shorter run.

    """

    args: Sequence[str]
    trials: Sequence[tuple[int, str]]
    steps: int
    warmup_steps: int
    device_s: float | None
    trainer: dict[str, Any]
    set_by_user: Sequence[str] = ("steps", "warmup_steps")


class TrialLine(CommandLine):
    """``lightning-comm fit`` for one trial: the user's model, data and Trainer, without what only a real run needs."""

    def __init__(self, job: TrialJob, strategy: str, callbacks: list[Callback]) -> None:
        self._job, self._strategy, self._own_callbacks = job, strategy, callbacks
        super().__init__(args=["fit", *job.args], seed_everything_default=0, save_config_callback=None)

    @override
    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        config = self.config.fit
        config.ckpt_path = None
        for name, value in {**_NOT_IN_A_PILOT, **self._job.trainer}.items():
            config.trainer[name] = value
        own = config.trainer.strategy
        if self._strategy != OWN:
            config.trainer.strategy = "auto" if self._strategy == LIMIT else without_start_method(self._strategy)
        elif isinstance(own, str):
            config.trainer.strategy = without_start_method(own)
        elif isinstance(own, Namespace) and "start_method" in own.get("init_args", {}):
            own.init_args.start_method = "popen"

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self._strategy == LIMIT:
            kwargs["strategy"] = LocalUpdateStrategy(FixedPeriod(_LONGER_THAN_ANY_RUN))
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Called by Lightning before ``fit``: takes out the callbacks of a real run, also those of the model."""
        callbacks: list[Callback] = getattr(self.trainer, "callbacks", [])  # a list that Lightning does not declare
        callbacks[:] = [*_kept(callbacks), *self._own_callbacks]
        self.trainer.loggers = [DummyLogger()]  # for code that calls its logger
        model, configure_callbacks = self.model, self.model.configure_callbacks

        def configure() -> list[Callback]:
            own = configure_callbacks()
            return _kept(own if isinstance(own, Sequence) else [own])

        model.configure_callbacks = configure


def _kept(callbacks: Sequence[Callback]) -> list[Callback]:
    return [callback for callback in callbacks if not isinstance(callback, _LEFT_OUT)]


def run(job: TrialJob, emit: Callable[[dict[str, Any]], None]) -> None:
    """Run all trials on this rank; rank 0 reports each.

    The limit, "the same job with communication removed", is a local update whose only round is longer than the run:
    forward, backward, optimizer, data and callbacks are the user's, on as many ranks, and within a round nothing is
    sent. What DDP does to have gradients averaged (buckets, hooks) goes with the communication, since it exists for it.

    Args:
        job: What to do.
        emit: Takes events on rank 0. The last of them is ``refused`` where the run is too short for what was asked.

    Raises:
        Refused: If a trial ends early; on all ranks.

    """
    rehearsal, ledger = Rehearsal(), CommLedger()
    line = TrialLine(job, BASELINE, [rehearsal])
    ranks = line.trainer.world_size
    batch_size = max(_gather(rehearsal.batch_size or 0, line.trainer, ledger))
    if job.device_s is not None and batch_size == 0:
        raise ValueError("pilot: `--device-ms` paces batches by their samples, and this one has none that can be seen.")
    is_first = line.trainer.is_global_zero
    totals = _gather(rehearsal.total_steps, line.trainer, ledger)
    try:
        steps, warmup_steps = fit_to_run(job.steps, job.warmup_steps, _shortest(totals), job.set_by_user)
    except ValueError as error:
        if is_first:
            emit({"event": "refused", "error": str(error)})
        return
    job = replace(job, steps=steps, warmup_steps=warmup_steps)
    if is_first:
        emit(
            {
                "event": "rehearsed",
                "steps": steps,
                "warmup_steps": warmup_steps,
                "world_size": ranks,
                "batch_size": batch_size or None,
                "parameters": rehearsal.parameters,
                "device": str(line.trainer.strategy.root_device),
                "total_steps": rehearsal.total_steps,
                "problem": rehearsal.problem,
                "fault": rehearsal.fault,
            }
        )
    del line
    for repeat, strategy in job.trials:
        gc.collect()
        emit({"event": "begin", "repeat": repeat, "strategy": strategy})
        record = _trial(job, strategy, batch_size, rehearsal)
        if record is not None:
            emit({"event": "trial", "repeat": repeat, **record})


def _shortest(totals: Sequence[int | None]) -> int | None:
    return min((total for total in totals if total is not None), default=None)


def _trial(job: TrialJob, strategy: str, batch_size: int, rehearsal: Rehearsal) -> dict[str, Any] | None:
    """Train a few steps; return what was measured on rank 0, and ``None`` on the others.

    Raises:
        Refused: If the trial ended before the steps were taken; on all ranks, whichever it was.

    """
    watch = Watch(job.steps, job.warmup_steps, is_limit=strategy == LIMIT)
    device = [EmulatedDevice(job.device_s, batch_size)] if job.device_s is not None else []
    with TemporaryDirectory() as folder:  # its figures are kept, not its files
        profiler = CommProfiler(folder, timeline_steps=0, page=False)
        line = TrialLine(job, strategy, [*device, profiler, watch])
    sent, exposed = _per_step(profiler, job)
    callbacks: list[Callback] = getattr(line.trainer, "callbacks", [])  # a list that Lightning does not declare
    own = {
        "step_s": watch.step_s,
        "samples": watch.samples,
        "sent_bytes": sent,
        "exposed_s": exposed,
        "loss": mean(watch.losses) if watch.losses else None,
        "devices": [_paced(each) for each in callbacks if isinstance(each, EmulatedDevice)],
    }
    ranks = _gather(own, line.trainer, profiler.ledger)
    if (taken := min(len(rank["step_s"]) for rank in ranks)) < job.steps:
        raise Refused(ended_early(taken, job.steps, job.warmup_steps))
    if not line.trainer.is_global_zero:
        return None
    return {
        "strategy": strategy,
        "warmup_steps": job.warmup_steps,
        "gradient_steps": watch.gradient_steps,
        "sync_steps": watch.sync_steps,
        "step_s": [[round(seconds, 6) for seconds in rank["step_s"]] for rank in ranks],
        "samples": _over_ranks([rank["samples"] for rank in ranks], sum),
        "sent_bytes": _over_ranks([rank["sent_bytes"] for rank in ranks], mean),
        "exposed_s": _over_ranks([rank["exposed_s"] for rank in ranks], mean),
        "loss": mean(rank["loss"] for rank in ranks) if all(rank["loss"] is not None for rank in ranks) else None,
        "devices": [device for rank in ranks for device in rank["devices"]],
        **_plan(strategy, watch, rehearsal),
    }


def _paced(device: EmulatedDevice) -> dict[str, float]:
    """Return the figures of an emulated device, the user's or the pilot's, for the report."""
    pacer = device.pacer
    assert pacer is not None  # it has trained
    step_s = pacer.step_s / pacer.speed
    return {"step_s": step_s, "batch_size": pacer.batch_size, "steps": pacer.steps, "overruns": pacer.overruns}


def _plan(strategy: str, watch: Watch, rehearsal: Rehearsal) -> dict[str, Any]:
    """Return what the whole run will do under the strategy, or the reason why that is not known."""
    total, rates, in_rounds = rehearsal.total_steps, rehearsal.rates, watch.strategy
    if total is None:
        return {"problem": rehearsal.problem}
    if strategy == LIMIT or in_rounds is None:
        return {"plan": {"total_steps": total, "gradient_steps": 0 if strategy == LIMIT else total, "round_ends": []}}
    period, warmup_steps = in_rounds.round_rule
    if isinstance(period, FixedPeriod):
        rates = [0.0] * total  # a period that does not depend on them
    elif rates is None:
        return {"problem": rehearsal.problem}
    elif any(abs(seen - known) > _SAME_RATE * abs(known) for seen, known in zip(watch.rates, rates, strict=False)):
        return {"problem": "the rates of the first steps were not those of the schedule, so something else sets them"}
    gradient_steps = min(total, watch.planned_gradient_steps or 0)
    ends = round_ends(period, rates, gradient_steps=gradient_steps, warmup_steps=warmup_steps)
    return {"plan": {"total_steps": total, "gradient_steps": gradient_steps, "round_ends": list(ends)}}


def _per_step(profiler: CommProfiler, job: TrialJob) -> tuple[list[float] | None, list[float] | None]:
    """Return bytes sent and exposed seconds of every optimizer step on this rank, as far as the profiler knows them."""
    sent, exposed, timed = [0.0], [0.0], True
    for step in profiler.steps:
        sent[-1] += step.sent_bytes
        exposed[-1] += step.exposed_s
        timed = timed and (step.timed or len(sent) <= job.warmup_steps)
        if step.optimizer_steps:
            sent.append(0.0)
            exposed.append(0.0)
    if len(sent) <= job.steps:
        return None, None  # the profiler stopped
    return sent[: job.steps], exposed[: job.steps] if timed else None


def _over_ranks(rows: list[Any], combine: Callable[[list[float]], float]) -> list[float] | None:
    if any(row is None or None in row for row in rows):
        return None
    return [combine(list(values)) for values in zip(*rows, strict=True)]


def _gather(own: Any, trainer: Trainer, ledger: CommLedger) -> list[Any]:
    """Return what each rank has, on all of them."""
    if not dist.is_initialized():
        return [own]
    return gather_json(own, device_of_group(trainer.strategy.root_device), ledger)


def main(job: TrialJob) -> int:
    """Run a rank and report its events on the standard output."""

    def emit(event: dict[str, Any]) -> None:
        # in one piece: `print` may write the end of the line separately, and other ranks write to the same pipe
        sys.stdout.write(f"\n{EVENT}{json.dumps(event)}\n")
        sys.stdout.flush()

    leave_group_at_exit()
    try:
        run(job, emit)
    except BaseException as error:
        text = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}".removesuffix(": ")
        traceback.print_exc()
        emit({"event": "failed", "error": text, "of_another": isinstance(error, PeerFailure)})
        return 1
    emit({"event": "done"})
    return 0


def start() -> None:
    """Run the rank that the arguments of this process describe."""
    job = TrialJob(**json.loads(sys.argv[1]))
    del sys.argv[1:]  # Lightning's command line warns of arguments that it is not given
    sys.exit(main(job))
