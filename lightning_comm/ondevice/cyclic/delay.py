"""Cyclic Data Parallelism on one device, worker after worker: the sequential reference, and a trial before renting."""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_comm.core.cyclic.schedule import CyclicSchedule, Rule
from lightning_comm.ondevice.cyclic.update import (
    ClipBy,
    Clipping,
    StageClip,
    check_optimizer,
    mean_gradients,
    parameters_by_stage,
    settings_of,
    step_stage,
)

Addition = Literal["ring", "arrival"]


@dataclass(frozen=True)
class DelayedRun:
    """What a run on one device found.

    Args:
        losses: For each optimizer step the losses of the workers, each at the parameters that this worker used.
        flushes: After how many steps all workers had the newest version of everything; the last is the end.
        left_over: How many micro-batches at the end were too few for a step, and not used.

    """

    losses: tuple[tuple[float, ...], ...]
    flushes: tuple[int, ...]
    left_over: int = 0

    @property
    def steps(self) -> int:
        """How many optimizer steps were taken."""
        return len(self.losses)

    @property
    def mean_losses(self) -> list[float]:
        """For each step the mean over the workers."""
        return [sum(step) / len(step) for step in self.losses]


def simulate_delay(  # noqa: PLR0913  (one flat list: the arguments of the strategy, and those of any training loop)
    network: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    workers: int,
    stages: int | Sequence[Sequence[str]],
    rule: Rule = "v2",
    lag: int = 0,
    warmup_sync_steps: int = 0,
    flush_after: Collection[int] = (),
    scheduler: Any = None,
    on_step: Callable[[int], None] | None = None,
    max_steps: int | None = None,
    clip_norm: float | None = None,
    clip_by: ClipBy = "stage",
    clip_value: float | None = None,
    addition: Addition = "ring",
) -> DelayedRun:
    """Train on one device as so many workers would under Cyclic Data Parallelism, and with the same results.

    Workers compute one after the other, each at the version of each stage's parameters that it would have. So a user
    learns whether a model tolerates the delay before renting that many devices. On the CPU the parameters are those of
    the strategy bit for bit, where nothing in the model is random.

    Args:
        network: Trained in place. In the end it holds the newest parameters, and the mean of the workers' buffers.
        batches: Micro-batches. Each optimizer step takes ``workers`` of them, the first for worker 0.
        loss: ``loss(network, micro_batch)``, the mean loss of one micro-batch.
        optimizer: Over parameters of ``network``; it is stepped once for each stage.
        workers: How many workers to stand in for.
        stages: How many stages to cut the parameters into, in their order, by their number of entries; or the
            parameters' names by stage, such as ``CyclicStrategy.stage_names``.
        rule: As in :class:`~lightning_comm.core.cyclic.CyclicSchedule`, and so are ``lag`` and ``warmup_sync_steps``.
            A warm-up as long as the run is plain data parallelism.
        lag: So many workers later the newest parameters count as fresh.
        warmup_sync_steps: So many steps at first all use the newest parameters.
        flush_after: After these numbers of steps all workers use the newest parameters, as the strategy does
            before a validation or a checkpoint. A trajectory depends on them.
        scheduler: A learning-rate scheduler of torch, stepped after each optimizer step.
        on_step: Called after each optimizer step with the number of steps done. The network then holds the newest
            parameters and the mean of the workers' buffers, so that it can be evaluated.
        max_steps: The most steps to take.
        clip_norm: The largest norm of a gradient; ``None`` does not clip.
        clip_by: ``"stage"``: each stage's gradient is clipped by its own norm; ``"previous_norm"``: all by the norm of
            the whole gradient of the step before, and in the first step each by its own.
        clip_value: The largest absolute value of an entry of a gradient; ``None`` does not clip.
        addition: In which order the workers' gradients are added: ``"ring"``, as the strategy does it, or
            ``"arrival"``, worker 0 first, as :class:`CyclicEngine` does it.

    Returns:
        Losses by step and worker, and where the workers flushed.

    Raises:
        ValueError: If an argument is out of range, stages do not name each trained parameter once, or the optimizer
            cannot be stepped by stage.

    Note:
        *Communication.* None.

        *Memory.* Two more copies of the parameters, the workers' gradients of a step, and each worker's buffers.

        *Random numbers.* The workers draw from one generator, one after the other; ranks each have their own.

        *On a CUDA device* the host waits once a step, for the losses.

        *Unused parameters.* A parameter that no worker's loss of a step depends on is left out of that step.

    Example:
        Does a net on four workers tolerate the delay? The second run is plain data parallelism.

        >>> def last_loss(**kwargs):
        ...     generator = torch.Generator().manual_seed(0)
        ...     x = torch.randn(1600, 3, generator=generator)
        ...     batches = list(zip(x.split(8), (x.prod(1, keepdim=True)).split(8)))
        ...     torch.manual_seed(0)
        ...     network = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))
        ...     run = simulate_delay(
        ...         network,
        ...         batches,
        ...         lambda network, batch: nn.functional.mse_loss(network(batch[0]), batch[1]),
        ...         torch.optim.SGD(network.parameters(), lr=0.05),
        ...         workers=4,
        ...         stages=4,
        ...         **kwargs,
        ...     )
        ...     return sum(run.mean_losses[-10:]) / 10
        >>> delayed, plain = last_loss(rule="v2"), last_loss(warmup_sync_steps=10**6)
        >>> 0 < abs(delayed - plain) / plain < 0.01
        True

    References:
        L. Fournier, E. Oyallon. `Cyclic Data Parallelism for Efficient Parallelism of Deep Neural Networks
        <https://arxiv.org/abs/2403.08837>`_. 2024.

    """
    if addition not in ("ring", "arrival"):
        raise ValueError(f"simulate_delay: `addition` must be 'ring' or 'arrival'; got {addition!r}.")
    if not isinstance(flush_after, Collection):
        raise ValueError(f"simulate_delay: `flush_after` must be a list of steps; got {flush_after!r}.")
    if min(flush_after, default=1) < 1:
        raise ValueError(
            f"simulate_delay: `flush_after` counts steps done, so its numbers must be >= 1; got {min(flush_after)!r}."
        )
    for name, value in (("workers", workers), ("max_steps", 1 if max_steps is None else max_steps)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"simulate_delay: `{name}` must be a whole number >= 1; got {value!r}.")
    parameters = parameters_by_stage(network, stages)
    check_optimizer("simulate_delay", optimizer, network.parameters())
    schedule = CyclicSchedule(workers, len(parameters), rule, lag, warmup_sync_steps)
    clip = StageClip(Clipping(clip_norm, clip_by, clip_value), len(parameters))
    simulation = _Simulation(network, parameters, optimizer, schedule, clip)
    simulation.in_ring_order = addition == "ring"
    return simulation.run(batches, loss, scheduler, on_step, max_steps, frozenset(flush_after))


def by_step(batches: Iterable[Any], workers: int, max_steps: int | None) -> Iterator[list[Any]]:
    """Yield the micro-batches of each step, and in the end those too few for one, if there are any."""
    source = iter(batches)
    steps = itertools.count() if max_steps is None else range(max_steps)
    for _ in steps:
        drawn = list(itertools.islice(source, workers))
        if drawn:
            yield drawn
        if len(drawn) < workers:
            return


def on_host(losses: Sequence[Tensor]) -> tuple[float, ...]:
    """Return losses as numbers; the host waits once for all."""
    return tuple(float(each) for each in torch.stack([loss.reshape(()) for loss in losses]).tolist())


class _Simulation:
    """The workers' models: the newest parameters and those of one update before, and each worker's own buffers."""

    in_ring_order = True

    def __init__(
        self,
        network: nn.Module,
        parameters: list[list[nn.Parameter]],
        optimizer: torch.optim.Optimizer,
        schedule: CyclicSchedule,
        clip: StageClip,
    ) -> None:
        self._network = network
        self._parameters = parameters
        self._optimizer = optimizer
        self._schedule = schedule
        self._clip = clip
        self._versions = {0: _copies([each for stage in parameters for each in stage])}
        self._places = list(itertools.accumulate((len(stage) for stage in parameters), initial=0))
        self._live = list(network.buffers())
        self._buffers = [_copies(self._live) for _ in range(schedule.workers)]
        self._flushed_at = 0

    def run(
        self,
        batches: Iterable[Any],
        loss: Callable[[nn.Module, Any], Tensor],
        scheduler: Any,
        on_step: Callable[[int], None] | None,
        max_steps: int | None,
        flush_after: frozenset[int],
    ) -> DelayedRun:
        """Take the steps."""
        losses: list[tuple[float, ...]] = []
        flushes: list[int] = []
        left_over = 0
        for micro_batches in by_step(batches, self._schedule.workers, max_steps):
            if len(micro_batches) < self._schedule.workers:
                left_over = len(micro_batches)
                break
            losses.append(self._step(len(losses), micro_batches, loss))
            if scheduler is not None:
                scheduler.step()
            if len(losses) in flush_after:
                self._flush(len(losses))
                flushes.append(len(losses))
            if on_step is not None:
                _write(self._live, mean_buffers(self._buffers))
                on_step(len(losses))
        if losses and flushes[-1:] != [len(losses)]:
            self._flush(len(losses))
            flushes.append(len(losses))
        return DelayedRun(tuple(losses), tuple(flushes), left_over)

    def _step(self, step: int, micro_batches: list[Any], loss: Callable[[nn.Module, Any], Tensor]) -> tuple[float, ...]:
        self._optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        gradients = []
        for worker, micro_batch in enumerate(micro_batches):
            value, gradient = self._turn(worker, step, micro_batch, loss)
            losses.append(value)
            gradients.append(gradient)
        for stage in range(self._schedule.stages):
            self._use(stage, step)
        settings = settings_of(self._optimizer)
        for stage in self._schedule.order():
            path = self._schedule.path(stage) if self.in_ring_order else range(self._schedule.workers)
            mean = mean_gradients([gradients[worker][stage] for worker in path])
            self._clip.clip_(stage, mean)
            step_stage(self._optimizer, self._parameters[stage], mean, settings)
        self._clip.end_step()
        self._versions = {step: self._versions[step], step + 1: _copies(self._all_parameters())}
        return on_host(losses)

    def _turn(
        self, worker: int, step: int, micro_batch: Any, loss: Callable[[nn.Module, Any], Tensor]
    ) -> tuple[Tensor, list[list[Tensor | None]]]:
        """Compute a worker's gradient, by stage, at the parameters and with the buffers that it has."""
        for stage in range(self._schedule.stages):
            self._use(stage, self._schedule.version(worker, stage, step, self._flushed_at))
        _write(self._live, self._buffers[worker])
        value = loss(self._network, micro_batch)
        value.backward()  # type: ignore[no-untyped-call]
        self._buffers[worker] = _copies(self._live)
        gradients = [[parameter.grad for parameter in stage] for stage in self._parameters]
        for parameter in self._network.parameters():
            parameter.grad = None
        return value.detach(), gradients

    def _use(self, stage: int, version: int) -> None:
        begin, end = self._places[stage : stage + 2]
        _write(self._parameters[stage], self._versions[version][begin:end])

    def _flush(self, steps_done: int) -> None:
        self._flushed_at = steps_done
        mean = mean_buffers(self._buffers)
        _write(self._live, mean)
        self._buffers = [_copies(mean) for _ in self._buffers]

    def _all_parameters(self) -> list[nn.Parameter]:
        return [parameter for stage in self._parameters for parameter in stage]


def mean_buffers(buffers: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the workers' buffers as they are after a flush: floating-point ones averaged, others of worker 0."""
    means = []
    for column in zip(*buffers, strict=True):
        mean = column[0].clone()
        if mean.is_floating_point() or mean.is_complex():
            for other in column[1:]:
                mean += other
            mean /= len(column)
        means.append(mean)
    return means


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def _write(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)
