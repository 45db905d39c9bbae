"""The measurements of a pilot: costs of a step, the whole run, ratios in pairs, and their intervals.

Numbers in, numbers out. Trials come as the worker of ``lightning-comm pilot`` wrote them, one for each strategy and
repeat; the sentences made of these numbers are in :mod:`lightning_comm.planning.pilot.advice`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from lightning_comm.core.judgement import Ratio, Spread, doubt
from lightning_comm.planning.projection import RunPlan, StepCosts, project

BASELINE = "ddp"
LIMIT = "limit"  # the same job with communication removed


@dataclass(frozen=True)
class Trial:
    """A few steps under one strategy. Steps are counted from 1.

    Args:
        strategy: Its name.
        repeat: Which repeat it belongs to; trials of one repeat are compared with each other.
        warmup_steps: Steps at the beginning that are not counted.
        gradient_steps: Steps at the beginning that sent gradients: all of them under DDP.
        sync_steps: The steps at whose end parameters were averaged.
        step_s: Seconds of every step, one row a rank.
        samples: Samples of every step, over all ranks; ``None`` if they could not be counted.
        sent_bytes: What a rank sent in every step, mean of the ranks; ``None`` if it could not be measured.
        exposed_s: Seconds of every step that a rank stood still for communication, mean of the ranks; ``None`` if not
            measured.
        loss: Mean of the last losses.

    """

    strategy: str
    repeat: int
    warmup_steps: int
    gradient_steps: int
    sync_steps: tuple[int, ...]
    step_s: tuple[tuple[float, ...], ...]
    samples: tuple[float, ...] | None = None
    sent_bytes: tuple[float, ...] | None = None
    exposed_s: tuple[float, ...] | None = None
    loss: float | None = None

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "Trial":
        """Return a trial from its record in the results file, which may hold more."""

        def row(name: str) -> tuple[float, ...] | None:
            return None if record.get(name) is None else tuple(record[name])

        return cls(
            strategy=record["strategy"],
            repeat=record["repeat"],
            warmup_steps=record["warmup_steps"],
            gradient_steps=record["gradient_steps"],
            sync_steps=tuple(record["sync_steps"]),
            step_s=tuple(tuple(rank) for rank in record["step_s"]),
            samples=row("samples"),
            sent_bytes=row("sent_bytes"),
            exposed_s=row("exposed_s"),
            loss=record.get("loss"),
        )

    @property
    def steps(self) -> int:
        """How many steps it took."""
        return len(self.step_s[0])


@dataclass(frozen=True)
class TimedSteps:
    """The steps of a trial that are counted, by what happens in them: whole rounds, and what is after the warm-up."""

    gradient: tuple[int, ...]
    inside: tuple[int, ...]
    syncing: tuple[int, ...]

    @property
    def plan(self) -> RunPlan:
        """The counted steps as if they were a run."""
        apart = len(self.inside) + len(self.syncing)
        ends = tuple(range(len(self.gradient) + 1, len(self.gradient) + len(self.syncing) + 1))
        return RunPlan(len(self.gradient) + apart, len(self.gradient), ends)


def timed_steps(trial: Trial) -> TimedSteps:
    """Return which steps of a trial are counted.

    Under local updates these are whole rounds: from the first end of a round after the warm-up (or from where ranks
    began to train apart) to the last one.

    Raises:
        ValueError: If there is none.

    Example:
        >>> timed_steps(Trial("local_sgd", 0, 3, 0, (4, 8, 12), step_s=((0.1,) * 14,)))
        TimedSteps(gradient=(), inside=(5, 6, 7, 9, 10, 11), syncing=(8, 12))

    """
    if trial.steps <= trial.warmup_steps:
        raise ValueError(
            f"pilot: `--steps` must be more than the {trial.warmup_steps} steps of warm-up; got {trial.steps} under "
            f"`{trial.strategy}`. Give more, or fewer --warmup-steps."
        )
    gradient = tuple(range(trial.warmup_steps + 1, min(trial.gradient_steps, trial.steps) + 1))
    if trial.strategy == LIMIT:
        return TimedSteps((), tuple(range(trial.warmup_steps + 1, trial.steps + 1)), ())
    first = max(trial.warmup_steps, trial.gradient_steps)
    if trial.gradient_steps >= trial.steps:
        return TimedSteps(gradient, (), ())
    ends = [step for step in (trial.gradient_steps, *trial.sync_steps) if first <= step <= trial.steps]
    if len(ends) < 2:
        raise ValueError(
            f"pilot: `--steps` must hold a whole round after the {trial.warmup_steps} steps of warm-up; got "
            f"{trial.steps}, in which `{trial.strategy}` synchronised after steps {list(trial.sync_steps)}. Give more."
        )
    syncing = tuple(ends[1:])
    inside = tuple(step for step in range(ends[0] + 1, ends[-1] + 1) if step not in syncing)
    return TimedSteps(gradient, inside, syncing)


def first_whole_round(period_steps: int, gradient_steps: int, warmup_steps: int) -> int:
    """Return the step at which the first round ends that begins neither in the gradient phase nor in the warm-up.

    Example:
        >>> first_whole_round(8, gradient_steps=0, warmup_steps=10), first_whole_round(8, 30, 10)
        (24, 38)

    """
    rounds_in_warmup = -(-max(0, warmup_steps - gradient_steps) // period_steps)
    return gradient_steps + (rounds_in_warmup + 1) * period_steps


def costs(trial: Trial) -> StepCosts:
    """Return what a step and a synchronisation cost in a trial, on the rank whose own steps are slowest.

    A synchronisation costs what a step that ends with one takes longer than the others, so steps and synchronisations
    add up to the measured time. With a period of 1 there are no others, and the step holds both.
    """
    seen = timed_steps(trial)
    own = seen.inside or seen.syncing or seen.gradient
    slowest = max(trial.step_s, key=lambda rank: _mean(rank, own))
    in_s = _parts(slowest, seen)
    in_bytes = _parts(trial.sent_bytes, seen) if trial.sent_bytes is not None else (0.0, 0.0, 0.0)
    return StepCosts(*in_s, *in_bytes)


def exposed_costs(trial: Trial) -> StepCosts | None:
    """Return the seconds of a step and of a synchronisation in which ranks stood still for communication."""
    return None if trial.exposed_s is None else StepCosts(*_parts(trial.exposed_s, timed_steps(trial)))


def _parts(row: Sequence[float], seen: TimedSteps) -> tuple[float, float, float]:
    """Return the means of a step within a round, of what a synchronisation adds, and of a step with gradients."""
    inside = _mean(row, seen.inside or seen.syncing)
    syncing = max(0.0, _mean(row, seen.syncing) - inside)
    return inside, syncing, _mean(row, seen.gradient)


def _mean(row: Sequence[float], steps: Sequence[int]) -> float:
    return mean(row[step - 1] for step in steps) if steps else 0.0


@dataclass(frozen=True)
class Summary:
    """One strategy over all repeats. A step's share of the synchronisations is that of the whole run where it is known.

    Args:
        strategy: Its name.
        plan: What the user's whole run does under it; ``None`` if that is not known.
        repeats: The repeats it was measured in, in the order of the figures below.
        step_s: Seconds of a step within a round; under DDP of every step.
        sync_s: What a synchronisation adds, in seconds; ``None`` where none was seen.
        run_step_s: Seconds of a step with its share of the synchronisations.
        samples_per_s: Over all ranks, synchronisations included.
        step_bytes: What a rank sends in a step, on average.
        exposed: The share of the time that ranks stand still for communication, as the profiler measured it.
        speedup: How many times as fast as DDP it is over the run, paired by repeat.
        of_limit: How many times as fast as the limit, in the same way: at most 1, but for noise. ``None`` also where
            the limit spreads so much that this would mean nothing.
        run_s: Seconds of the whole run.
        run_bytes: What a rank sends in the whole run.
        loss: The loss at the end of the trials: a sanity check only.

    """

    strategy: str
    plan: RunPlan | None
    repeats: tuple[int, ...]
    step_s: Spread
    sync_s: Spread | None
    run_step_s: Spread
    samples_per_s: Spread | None
    step_bytes: Spread | None
    exposed: Spread | None
    speedup: Ratio | None
    of_limit: Ratio | None
    run_s: Spread | None
    run_bytes: Spread | None
    loss: Spread | None

    @property
    def run_step_by_repeat(self) -> dict[int, float]:
        """``run_step_s`` by repeat."""
        return dict(zip(self.repeats, self.run_step_s.values, strict=True))


def summarise(trials: Sequence[Trial], plans: Mapping[str, RunPlan]) -> dict[str, Summary]:
    """Return one summary a strategy, in the order of their first trials.

    Args:
        trials: All of them; those of one strategy with different repeats.
        plans: What the whole run does, for the strategies of which that is known.

    """
    grouped: dict[str, dict[int, Trial]] = {}
    for trial in trials:
        grouped.setdefault(trial.strategy, {})[trial.repeat] = trial
    run_steps = {
        name: {repeat: _run_step_s(trial, plans.get(name)) for repeat, trial in repeats.items()}
        for name, repeats in grouped.items()
    }
    return {name: _summary(list(repeats.values()), plans.get(name), run_steps) for name, repeats in grouped.items()}


def _run_step_s(trial: Trial, plan: RunPlan | None) -> float:
    plan = plan or timed_steps(trial).plan
    return project(plan, costs(trial)).seconds / plan.total_steps


def _summary(trials: Sequence[Trial], plan: RunPlan | None, run_steps: Mapping[str, Mapping[int, float]]) -> Summary:
    name = trials[0].strategy
    own, limit = run_steps[name], run_steps.get(LIMIT, {})
    measured = [costs(trial) for trial in trials]
    plans = [plan or timed_steps(trial).plan for trial in trials]
    projected = [project(of, cost) for of, cost in zip(plans, measured, strict=True)]
    has_bytes = all(trial.sent_bytes is not None for trial in trials)
    return Summary(
        strategy=name,
        plan=plan,
        repeats=tuple(trial.repeat for trial in trials),
        step_s=Spread(tuple(cost.step_s or cost.gradient_step_s for cost in measured)),
        sync_s=Spread(tuple(cost.sync_s for cost in measured)) if timed_steps(trials[0]).syncing else None,
        run_step_s=Spread(tuple(own[trial.repeat] for trial in trials)),
        samples_per_s=_spread(trials, lambda trial: _samples_per_s(trial, own[trial.repeat])),
        step_bytes=Spread(tuple(p.wire_bytes / of.total_steps for p, of in zip(projected, plans, strict=True)))
        if has_bytes
        else None,
        exposed=_spread(trials, lambda trial: _exposed_share(trial, plan, own[trial.repeat])),
        speedup=Ratio.of(run_steps.get(BASELINE, {}), own),
        of_limit=None if doubt(list(limit.values())) else Ratio.of(limit, own),
        run_s=Spread(tuple(p.seconds for p in projected)) if plan else None,
        run_bytes=Spread(tuple(p.wire_bytes for p in projected)) if plan and has_bytes else None,
        loss=_spread(trials, lambda trial: trial.loss),
    )


def _spread(trials: Sequence[Trial], figure: Callable[[Trial], float | None]) -> Spread | None:
    values = [figure(trial) for trial in trials]
    known = tuple(value for value in values if value is not None)
    return Spread(known) if len(known) == len(values) else None


def _samples_per_s(trial: Trial, run_step_s: float) -> float | None:
    if trial.samples is None:
        return None
    seen = timed_steps(trial)
    return _mean(trial.samples, (*seen.gradient, *seen.inside, *seen.syncing)) / run_step_s


def _exposed_share(trial: Trial, plan: RunPlan | None, run_step_s: float) -> float | None:
    exposed = exposed_costs(trial)
    plan = plan or timed_steps(trial).plan
    return None if exposed is None else project(plan, exposed).seconds / plan.total_steps / run_step_s
