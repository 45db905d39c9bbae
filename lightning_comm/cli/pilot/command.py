"""``lightning-comm pilot``: run the user's own config for a few steps under several strategies, and compare them.

The ranks are processes of :mod:`lightning_comm.cli.pilot.rank`, started here or on emulated hosts; under torchrun,
SLURM or the lab, where ranks exist already, each of them is one. What the numbers mean is in
:mod:`lightning_comm.planning.pilot.costs`.
"""

import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning_comm.cli.environment import environment
from lightning_comm.cli.pilot.arguments import Options, Refused, parse
from lightning_comm.cli.pilot.rank import TrialJob, run
from lightning_comm.cli.pilot.report import write_report
from lightning_comm.cli.pilot.results import Results, TrialProgress
from lightning_comm.cli.pilot.user_run import UserRun, read_run
from lightning_comm.cli.pilot.workers import LabHosts, ThisMachine, WorkerFailed, WorkerHosts, run_workers
from lightning_comm.cli.quiet import lightning_is_quiet
from lightning_comm.core.judgement import FEWEST_REPEATS
from lightning_comm.lab.cluster import Lab, LabError
from lightning_comm.planning.pilot.costs import BASELINE, LIMIT, Trial, timed_steps
from lightning_comm.planning.pilot.length import counted
from lightning_comm.transport.group_ends import leave_group_at_exit


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pilot; return 0, 1 if it could not measure, or 2 if the arguments make no sense."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        options, arguments = parse(argv)
        own = read_run(options, arguments)
        if own.started_externally:
            sys.argv = sys.argv[:1]  # Lightning's command line warns of arguments that it is not given
        if own.started_externally and own.rank > 0:
            leave_group_at_exit()
            with lightning_is_quiet():
                run(_job(options, own, arguments), lambda event: None)
            return 0
        results = _open(options, own, argv)
    except Refused as refused:
        print(f"lightning-comm pilot: error: {refused}", file=sys.stderr)
        return 2
    print(
        f"{own.ranks} ranks, {len(options.strategies)} strategies and the limit, "
        f"{options.repeats} repeat{'s' * (options.repeats > 1)} of {options.steps} steps. A rehearsal comes first."
    )
    if options.repeats < FEWEST_REPEATS:
        print(
            f"{options.repeats} repeat(s) show times, but not how sure they are, so nothing will be concluded: "
            f"--repeats {FEWEST_REPEATS} or more do."
        )
    return _carry_out(options, own, arguments, results) or write_report(results.data, results.folder)


def _carry_out(options: Options, own: UserRun, arguments: Sequence[str], results: Results) -> int:
    """Measure; return 0, or another exit code after saying why it ended."""
    try:
        if own.started_externally:
            with lightning_is_quiet():
                _measure_in_this_job(_job(options, own, arguments), results)
        else:
            with _ended_by_sigterm(), _hosts(options, own) as hosts:
                _measure(_job(options, own, arguments), results, hosts, options.timeout_s)
    except Refused as refused:  # by the rehearsal, which has shown how long the run is
        print(f"lightning-comm pilot: error: {refused}", file=sys.stderr)
        return 2
    except (WorkerFailed, LabError) as failed:
        print(f"\nlightning-comm pilot: {failed}", file=sys.stderr)
        return 1
    except OSError as error:  # what was measured before is on the disk
        print(f"\nlightning-comm pilot: a result could not be written: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nStopped. What was measured is in {results.file}.", file=sys.stderr)
        return 130
    return 0


def _job(options: Options, own: UserRun, arguments: Sequence[str]) -> TrialJob:
    return TrialJob(
        args=list(arguments),
        trials=order([*options.strategies, LIMIT], options.repeats),
        steps=options.steps,
        warmup_steps=options.warmup_steps,
        device_s=options.device_s,
        trainer=own.trainer,
        set_by_user=options.set_by_user,
    )


def order(strategies: Sequence[str], repeats: int) -> list[tuple[int, str]]:
    """Return the trials: every repeat has each strategy once, and begins with another one.

    Example:
        >>> order(["ddp", "qsr", "limit"], 2)
        [(0, 'ddp'), (0, 'qsr'), (0, 'limit'), (1, 'qsr'), (1, 'limit'), (1, 'ddp')]

    """
    count = len(strategies)
    return [(repeat, strategies[(repeat + place) % count]) for repeat in range(repeats) for place in range(count)]


def _open(options: Options, own: UserRun, argv: Sequence[str]) -> Results:
    """Make the folder and write the first file into it, so that a bad one is met before anything is measured."""
    folder = Path(options.out) / datetime.now().strftime("%Y-%m-%d_%H%M%S")
    header = {
        "command": shlex.join(["lightning-comm", "pilot", *argv]),
        "settings": {**options.shown(), "ranks": own.ranks, "lab": own.lab},
        "environment": environment(),
    }
    try:
        (folder / "logs").mkdir(parents=True)
        return Results(folder, header)
    except OSError as error:
        raise Refused(
            f"`--out` must be a folder that can be written to; got {options.out!r}: {error.strerror or error}. Give "
            "another one."
        ) from error


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, so that no rank is left behind."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _hosts(options: Options, own: UserRun) -> Iterator[WorkerHosts]:
    """Open the hosts on which ranks are started: this machine, or emulated hosts on it."""
    if options.hosts is None:
        yield ThisMachine(own.ranks)
        return
    with Lab(options.hosts, options.link, devices_per_host=options.devices_per_host) as lab:
        yield LabHosts(lab)


def _measure(job: TrialJob, results: Results, hosts: WorkerHosts, timeout_s: float) -> None:
    """Run all trials; a strategy that fails is left out and the others go on in new processes.

    Raises:
        WorkerFailed: If nothing can be measured at all, or the baseline fails: all is compared with it.
        Refused: If the run is too short for what the user asked.

    """
    progress = TrialProgress(len(job.trials), 1 + max(repeat for repeat, _ in job.trials))
    current: dict[str, Any] = {}
    left = list(job.trials)
    hear = _listener(results, progress, left, current)
    while left:
        try:
            with closing(run_workers(replace(job, trials=left), hosts, results.folder / "logs", timeout_s)) as events:
                for event in events:
                    hear(event)
            return
        except WorkerFailed as failed:
            if not left:
                return  # everything is measured, and how the ranks ended is no matter
            if not current:
                raise WorkerFailed(
                    f"the rehearsal, two steps of your config under `{BASELINE}`, failed: {failed}"
                ) from failed
            strategy, repeat = current["strategy"], current["repeat"]
            results.fail(strategy, repeat, str(failed))
            if strategy == BASELINE:
                raise WorkerFailed(
                    f"`{BASELINE}` failed in repeat {repeat + 1}: {failed}\nEverything is compared with it, so there "
                    f"is no answer without it, and the pilot ends here. What was measured is in {results.file}."
                ) from failed
            dropped = [trial for trial in left if trial[1] == strategy]
            left[:] = [trial for trial in left if trial[1] != strategy]
            progress.drop(len(dropped))
            print(f"`{strategy}` failed in repeat {repeat + 1}: {failed}\nThe others go on without it.", flush=True)
            current.clear()


def _measure_in_this_job(job: TrialJob, results: Results) -> None:
    """Be rank 0 of a job that others have started; a failure ends the job, by its launcher."""
    leave_group_at_exit()
    progress = TrialProgress(len(job.trials), 1 + max(repeat for repeat, _ in job.trials))
    current: dict[str, Any] = {}
    hear = _listener(results, progress, list(job.trials), current)
    try:
        run(job, hear)
    except Refused as refused:
        if not current:
            raise
        raise WorkerFailed(f"`{current['strategy']}` failed in repeat {current['repeat'] + 1}: {refused}") from refused
    except Exception as error:
        where = f"`{current['strategy']}`" if current else f"the rehearsal under `{BASELINE}`"
        raise WorkerFailed(f"{where} failed on rank 0: {type(error).__name__}: {error}") from error


def _listener(
    results: Results, progress: TrialProgress, left: list[tuple[int, str]], current: dict[str, Any]
) -> Callable[[dict[str, Any]], None]:
    """Return the function that handles the events of rank 0."""

    def hear(event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "refused":
            raise Refused(event["error"])
        if kind == "rehearsed":
            if results.rehearsed(event):
                print(
                    f"Your run has {counted(event['total_steps'])}, so trials have {event['steps']}, of which "
                    f"{event['warmup_steps']} warm up.",
                    flush=True,
                )
            if event.get("fault") is not None:
                print(f"The baseline `{BASELINE}`: {event['fault']}", flush=True)
        elif kind == "begin":
            current.update(strategy=event["strategy"], repeat=event["repeat"])
            progress.begin(event["strategy"], event["repeat"])
        elif kind == "trial":
            results.add(event)
            left.remove((event["repeat"], event["strategy"]))
            progress.end(event["strategy"], event["repeat"], _step_s(Trial.read(event)))

    return hear


def _step_s(trial: Trial) -> float:
    """Return the mean of the counted steps on rank 0, synchronisations included."""
    seen = timed_steps(trial)
    counted = [trial.step_s[0][step - 1] for step in (*seen.gradient, *seen.inside, *seen.syncing)]
    return sum(counted) / len(counted)
