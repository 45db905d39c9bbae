"""Cyclic Data Parallelism within one device: micro-batches take turns at the stages of a model that is cut for it."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_comm.core.cyclic.schedule import CyclicSchedule, Rule, Turn
from lightning_comm.ondevice.cyclic.delay import DelayedRun, by_step, on_host
from lightning_comm.ondevice.cyclic.update import check_optimizer, mean_gradients, settings_of, step_stage

Order = Literal["backward_first", "forward_first"]
Loss = Callable[[Any, Any], Tensor]
Value = Tensor | tuple[Tensor, ...]


@dataclass
class _Passed:
    """What a micro-batch left at a stage for its backward pass."""

    into: tuple[Tensor, ...]
    out: tuple[Tensor, ...]
    leaves: dict[str, Tensor]


@dataclass
class _InFlight:
    """A worker's micro-batch between its first forward and its last backward."""

    micro_batch: Any = None
    loss: Loss | None = None
    value: Value = ()
    passed: dict[int, _Passed] = field(default_factory=dict)
    gradients: tuple[Tensor | None, ...] = ()


class CyclicEngine:
    """Trains a model that is cut into stages on one device, with several micro-batches at different stages at a time.

    The N micro-batches of a step start one after the other, so that their activations never peak together. With N
    equal stages the sum over them is N (N + 1) / 2 activations of a stage at any time, N^2 / 2 with backwards first and
    N even, where one batch of their size has N^2 at its peak. Plain accumulation of gradients needs less, N: its
    micro-batches are never on their way at the same time.

    Args:
        model: The stages in order: an ``nn.Sequential`` or a list of modules, each a stage. Group layers with
            ``nn.Sequential``; equal stages give the figures above. A stage takes and returns a tensor, or a tuple of
            them as one argument; what a later stage needs has to travel through those between.
        optimizer: Over the model's parameters; it is stepped once for each stage.
        workers: N, how many micro-batches a step takes; the number of stages is a multiple of it, and that number is
            the default. Several stages for each spare memory where a model keeps most of its activations in a few
            layers.
        rule: As in :class:`~lightning_comm.core.cyclic.CyclicSchedule`, and so are ``lag`` and ``warmup_sync_steps``.
        lag: So many workers later the newest parameters count as fresh.
        warmup_sync_steps: So many steps at first all use the newest parameters; each of them ends with a drain.
        order: What comes first within a slot, where one device does the one after the other: ``"backward_first"``
            needs less memory.
        scheduler: A learning-rate scheduler of torch, stepped after each optimizer step.

    Raises:
        ValueError: If an argument is out of range, a parameter lies in two stages, or the optimizer cannot be stepped
            by stage.

    Note:
        *Communication.* None.

        *Memory.* Two versions of the parameters, and the micro-batches' gradients of a stage until the last one's.

        *Buffers* are the model's own: there is one set, and micro-batches update it in the order in which they come to
        a stage. Ranks, and :func:`simulate_delay`, have a set each. Parameters do not depend on it while batch norms
        use the statistics of the micro-batch.

        *Random numbers.* Micro-batches draw from one generator in the order of their turns.

        *On a CUDA device* all work is on the stream of the caller, and the host waits once a step, for the losses.

        *Autocast* belongs into the stages, or around :meth:`run` or :meth:`step`. Around them, backward and updates run
        in it as well, and what it keeps of cast parameters is dropped at each update, so that older versions do not
        stay in memory.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Sequential(nn.Tanh(), nn.Linear(8, 1)))
        >>> engine = CyclicEngine(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> batches = [(torch.ones(4, 3), torch.ones(4, 1))] * 20
        >>> run = engine.run(batches, lambda output, batch: nn.functional.mse_loss(output, batch[1]))
        >>> run.steps, run.losses[-1][0] < 0.1 * run.losses[0][0]
        (10, True)

    References:
        L. Fournier, E. Oyallon. `Cyclic Data Parallelism for Efficient Parallelism of Deep Neural Networks
        <https://arxiv.org/abs/2403.08837>`_. 2024.

    """

    def __init__(
        self,
        model: nn.Sequential | Sequence[nn.Module],
        optimizer: torch.optim.Optimizer,
        *,
        workers: int | None = None,
        rule: Rule = "v2",
        lag: int = 0,
        warmup_sync_steps: int = 0,
        order: Order = "backward_first",
        scheduler: Any = None,
    ) -> None:
        self._stages = list(model)
        self._named = [
            {name: each for name, each in stage.named_parameters() if each.requires_grad} for stage in self._stages
        ]
        _check(self._named, order)
        check_optimizer("CyclicEngine", optimizer, [each for stage in self._stages for each in stage.parameters()])
        count = len(self._stages)
        if workers is not None and not 2 <= workers <= count:
            raise ValueError(
                f"CyclicEngine: `workers` must be from 2 to the number of stages, {count}; got {workers!r}. Cut the "
                "model into a multiple of it."
            )
        self.schedule = CyclicSchedule(workers or count, count, rule, lag, warmup_sync_steps)
        self._places = [_places(stage, named) for stage, named in zip(self._stages, self._named, strict=True)]
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._order = order
        # the newest version shares its memory with the parameters; an update moves these to a copy first
        self._versions: list[dict[int, dict[str, Tensor]]] = [{0: _leaves(named)} for named in self._named]
        self._in_flight = [_InFlight() for _ in range(self.workers)]
        self._arrived: list[list[list[Tensor | None]]] = [[] for _ in self._stages]
        self._losses: dict[int, list[Tensor]] = {}
        self._settings: list[dict[str, Any]] = []  # of the optimizer's groups, for the step whose update has begun
        self._slot = 0
        self._filled_at = 0
        self._begun = 0
        self._flushed_at = 0
        optimizer.zero_grad(set_to_none=True)

    @property
    def workers(self) -> int:
        """N: how many micro-batches a step takes."""
        return self.schedule.workers

    def tensors(self) -> Iterator[Tensor]:
        """Yield what the engine keeps whatever is on its way: both versions of the parameters, and buffers."""
        for stage, versions in zip(self._stages, self._versions, strict=True):
            yield from stage.parameters()
            yield from stage.buffers()
            for leaves in versions.values():
                yield from leaves.values()

    def run(
        self, batches: Iterable[Any], loss: Loss, *, max_steps: int | None = None, flush_after: Collection[int] = ()
    ) -> DelayedRun:
        """Train on micro-batches, N of them a step, and flush in the end.

        Args:
            batches: Micro-batches: tensors, or tuples that begin with the model's input.
            loss: ``loss(output, micro_batch)``, the mean loss of one micro-batch.
            max_steps: The most steps to take.
            flush_after: After these numbers of steps, counted from the beginning of this call, flush as well.

        """
        first, losses, flushes, left_over = self._begun, list[tuple[float, ...]](), list[int](), 0
        for micro_batches in by_step(batches, self.workers, max_steps):
            if len(micro_batches) < self.workers:
                left_over = len(micro_batches)
                break
            losses += self.step(micro_batches, loss)
            if self._begun - first in flush_after:
                losses += self.flush()
                flushes.append(self._begun - first)
        losses += self.flush()
        if self._begun - first not in (0, *flushes):
            flushes.append(self._begun - first)
        return DelayedRun(tuple(losses), tuple(flushes), left_over)

    def step(self, micro_batches: Sequence[Any], loss: Loss) -> list[tuple[float, ...]]:
        """Begin a step: its first micro-batch starts at once, the others follow, and the last ones end later.

        Args:
            micro_batches: N of them.
            loss: ``loss(output, micro_batch)``.

        Returns:
            For each step that ended meanwhile, as a rule the one before, the losses of its micro-batches.

        """
        if len(micro_batches) != self.workers:
            raise ValueError(
                f"CyclicEngine: `micro_batches` must be `workers` of them, {self.workers}; got {len(micro_batches)}. "
                "Leave out what does not fill a step."
            )
        waiting = {worker: (micro_batch, loss) for worker, micro_batch in enumerate(micro_batches)}
        self._begun += 1
        ended = self._take_slots(2 * len(self._stages), waiting)
        if self._begun <= self.schedule.warmup_sync_steps:
            ended += self._drain()  # the next step needs the newest version of everything
        return ended

    def flush(self) -> list[tuple[float, ...]]:
        """Finish all that is on its way; the modules then hold the newest parameters, and so does the next step.

        Returns:
            As :meth:`step` does.

        """
        ended = self._drain()
        self._flushed_at = self._begun
        return ended

    # ---- slots -------------------------------------------------------------------------------------------------------

    def _drain(self) -> list[tuple[float, ...]]:
        on_its_way = self._begun > self._filled_at
        ended = self._take_slots(self.schedule.delay_slots * (self.workers - 1), {}) if on_its_way else []
        self._slot, self._filled_at = 0, self._begun
        return ended

    def _take_slots(self, count: int, waiting: dict[int, tuple[Any, Loss]]) -> list[tuple[float, ...]]:
        ended: list[tuple[float, ...]] = []
        for slot in range(self._slot, self._slot + count):
            turns = [self.schedule.turn(worker, slot) for worker in range(self.workers)]
            for forward in (True, False) if self._order == "forward_first" else (False, True):
                for worker, turn in enumerate(turns):
                    if turn is None or turn.forward != forward or self._filled_at + turn.step >= self._begun:
                        continue
                    if not forward:
                        ended += self._backward(worker, turn)
                        continue
                    if turn.stage == 0:
                        micro_batch, loss = waiting.pop(worker)
                        self._in_flight[worker] = _InFlight(micro_batch, loss, _first(micro_batch))
                    self._forward(worker, turn)
        self._slot += count
        return ended

    def _forward(self, worker: int, turn: Turn) -> None:
        in_flight, stage = self._in_flight[worker], turn.stage
        step = self._filled_at + turn.step
        version = self.schedule.version(worker, stage, step, self._flushed_at)
        assert version in self._versions[stage], (
            f"worker {worker} needs version {version} of stage {stage}; there are {sorted(self._versions[stage])}"
        )
        leaves = self._versions[stage][version]
        into = _cut(in_flight.value, needs_gradient=stage > 0)
        argument = into if isinstance(in_flight.value, tuple) else into[0]
        swapped = {place: leaves[name] for place, name in self._places[stage].items()}
        value = torch.func.functional_call(self._stages[stage], swapped, (argument,), tie_weights=False)
        if stage == len(self._stages) - 1:
            assert in_flight.loss is not None
            value = in_flight.loss(value, in_flight.micro_batch)
            in_flight.gradients = (torch.ones_like(value),)
            self._losses.setdefault(step, []).append(value.detach())
        in_flight.value = value
        in_flight.passed[stage] = _Passed(into, value if isinstance(value, tuple) else (value,), leaves)
        if stage == len(self._stages) - 1:
            in_flight.value = ()

    def _backward(self, worker: int, turn: Turn) -> list[tuple[float, ...]]:
        in_flight, stage = self._in_flight[worker], turn.stage
        passed = in_flight.passed.pop(stage)
        inputs = [each for each in passed.into if each.requires_grad]
        roots = [
            (out, gradient)
            for out, gradient in zip(passed.out, in_flight.gradients, strict=True)
            if out.requires_grad and gradient is not None
        ]
        wanted = [*inputs, *passed.leaves.values()]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if roots and wanted:
            outs, gradients = zip(*roots, strict=True)
            found = torch.autograd.grad(outs, wanted, gradients, allow_unused=True)
        below = iter(found[: len(inputs)])
        in_flight.gradients = tuple(next(below) if each.requires_grad else None for each in passed.into)
        self._arrived[stage].append(list(found[len(inputs) :]))
        if worker < self.workers - 1:
            return []
        self._update(stage, self._filled_at + turn.step)
        return [on_host(self._losses.pop(self._filled_at + turn.step))] if stage == 0 else []

    def _update(self, stage: int, step: int) -> None:
        """Make the next version of a stage: the last micro-batch of a step has passed it."""
        mean = mean_gradients(self._arrived[stage])
        self._arrived[stage] = []
        for parameter in self._named[stage].values():
            parameter.data = parameter.data.clone()
        if stage == len(self._named) - 1:  # the first of a step
            self._settings = settings_of(self._optimizer)
        step_stage(self._optimizer, list(self._named[stage].values()), mean, self._settings)
        newest = self._versions[stage][step]
        self._versions[stage] = {step: newest, step + 1: _leaves(self._named[stage])}
        torch.clear_autocast_cache()  # within autocast it would hold what was cast of older versions, and these
        if stage == 0 and self._scheduler is not None:
            self._scheduler.step()


def _check(named: list[dict[str, nn.Parameter]], order: str) -> None:
    if len(named) < 2:
        raise ValueError(
            f"CyclicEngine: `model` must be 2 stages or more, each a module of an `nn.Sequential` or of a list; got "
            f"{len(named)}. Cut the model, and group the parts with `nn.Sequential`."
        )
    if order not in ("backward_first", "forward_first"):
        raise ValueError(f"CyclicEngine: `order` must be 'backward_first' or 'forward_first'; got {order!r}.")
    parameters = [each for stage in named for each in stage.values()]
    if len({id(each) for each in parameters}) < len(parameters):
        names = [f"{stage}.{name}" for stage, own in enumerate(named) for name, each in own.items()
                 if sum(each is other for other in parameters) > 1]  # fmt: skip
        raise ValueError(
            f"CyclicEngine: `model` must have each parameter in one stage; {names} are shared between stages. Cut "
            "it so that shared parameters lie in the same stage."
        )


def _places(stage: nn.Module, named: dict[str, nn.Parameter]) -> dict[str, str]:
    """Return where each parameter stands, tied ones in several places, by a name for each place.

    ``functional_call`` finds tied ones itself, but leaves a module that is registered twice with the wrong ones.
    """
    names = {id(parameter): name for name, parameter in named.items()}
    return {
        f"{prefix}.{own}" if prefix else own: names[id(parameter)]
        for prefix, module in stage.named_modules()
        for own, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(parameter) in names
    }


def _first(micro_batch: Any) -> Value:
    value: Value = micro_batch[0] if isinstance(micro_batch, (tuple, list)) else micro_batch
    return value


def _cut(value: Value, needs_gradient: bool) -> tuple[Tensor, ...]:
    """Return what a stage gets from the one before it, as tensors at which backward stops."""
    tensors = value if isinstance(value, tuple) else (value,)
    return tuple(
        each.detach().requires_grad_(needs_gradient and each.requires_grad and each.is_floating_point())
        for each in tensors
    )


def _leaves(named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    # `detach` would share the count of changes in place with the parameter, and autograd would take updates for faults
    return {name: parameter.data.requires_grad_() for name, parameter in named.items()}
