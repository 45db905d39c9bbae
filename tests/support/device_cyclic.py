"""Cyclic training on a device: the engine, the ring of two processes, and fits; each function is a call of `Ranks`."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_comm import CyclicStrategy
from lightning_comm.core.cyclic.schedule import CyclicSchedule
from lightning_comm.core.ledger import CommLedger
from lightning_comm.ondevice.cyclic import CyclicEngine, simulate_delay
from lightning_comm.ondevice.cyclic.update import Clipping, clip_
from lightning_comm.transport.cyclic.messages import STATUS_NUMBERS, StageLayout
from lightning_comm.transport.cyclic.ring import CyclicRing
from lightning_comm.transport.recording import Recorder, another_group
from support.cyclic import adamw, deep, reference
from support.device_fits import Where, places, weights
from support.on_device import spin
from support.training import Regression, loader, trainer

STEPS, FEATURES = 8, 16


def model(stages: int, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh()) for _ in range(stages))).to(dtype)


def micro_batches(count: int, device: str, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(8, FEATURES, generator=draw, dtype=torch.float64)
        yield x.to(device, dtype), (x.roll(1, 1) * x).to(device, dtype)


def error(output: Tensor, batch: Any) -> Tensor:
    return nn.functional.mse_loss(output, batch[1])


def engine(
    rank: int, device: str, workers: int, stages: int, dtype: torch.dtype = torch.float64, **settings: Any
) -> dict[str, Any]:
    """Train with the engine; return weights and losses."""
    net = model(stages, dtype).to(device)
    turns = CyclicEngine(net, torch.optim.AdamW(net.parameters(), 0.01), workers=workers, **settings)
    run = turns.run(micro_batches(workers * STEPS, device, dtype), error)
    return {"weights": weights(net), "losses": run.losses}


def sequential(
    rank: int, device: str, workers: int, stages: int, dtype: torch.dtype = torch.float64, **settings: Any
) -> dict[str, Any]:
    """Train with the sequential reference."""
    net = copy.deepcopy(model(stages, dtype)).to(device)
    names = [[name for name, _ in net.named_parameters() if name.startswith(f"{k}.")] for k in range(stages)]
    run = simulate_delay(
        net,
        micro_batches(workers * STEPS, device, dtype),
        lambda network, batch: error(network(batch[0]), batch),
        torch.optim.AdamW(net.parameters(), 0.01),
        workers=workers,
        stages=names,
        addition="arrival",
        **settings,
    )
    return {"weights": weights(net), "losses": run.losses}


def gradient(rank: int, stage: int, step: int) -> Tensor:
    draw = torch.Generator().manual_seed(1000 * rank + 10 * stage + step)
    return torch.randn(5000 * (stage + 1), generator=draw, dtype=torch.float64)


def version(schedule: CyclicSchedule, stage: int, step: int) -> Tensor:
    """The mean of the ranks' gradients, added in the order of the path, plus the step."""
    shares = [gradient(rank, stage, step) / schedule.workers for rank in schedule.path(stage)]
    total = shares[0]
    for share in shares[1:]:
        total = total + share
    return total + step


def ring(rank: int, device: str, world_size: int, stages: int) -> int:
    """Let gradients travel round the ring, each behind a kernel that spins, and overwrite memory as soon as it is free.

    Returns how many versions were not the owner's update of the mean, bit for bit.
    """
    on = torch.device(device, 0) if device != "cpu" else torch.device(device)
    schedule, ledger, wrong = CyclicSchedule(world_size, stages), CommLedger(), 0
    lanes = [Recorder(ledger, another_group(None), hold=True) for _ in range(2)]
    layouts = [StageLayout([gradient(0, stage, 0).to(on)]) for stage in range(stages)]
    # like the order of gloo on the CPU: messages are told apart by their tags
    in_any_order = "in_any_order" in inspect.signature(CyclicRing).parameters

    def update(step: int, stage: int, message: Any) -> None:
        message.parts[0].add_(step)

    made = CyclicRing(schedule, layouts, update, *lanes, on, **({"in_any_order": True} if in_any_order else {}))
    for step in range(STEPS):
        made.begin_step(step)
        for stage in schedule.order():
            status = torch.zeros(STATUS_NUMBERS, dtype=torch.float64, device=on)
            source = gradient(rank, stage, step).to(on)
            own = torch.full_like(source, torch.nan)
            spin(device, 2)
            own.copy_(source)
            made.hand_over(stage, [own], status)
            del own
            torch.full_like(source, torch.nan)  # in the memory of what was handed over, if that is free by mistake
        for stage in range(stages):
            message = made.take(stage, step + 1, lambda: None)
            found = message.parts[0].clone()
            made.release(stage, step + 1)
            torch.full_like(found, torch.nan)
            wrong += not torch.equal(found.cpu(), version(schedule, stage, step))
        made.status(step + 1, range(stages), lambda: None)
    made.close()
    return wrong


def fit(rank: int, device: str, world_size: int, slow: bool = False, **settings: Any) -> dict[str, Any]:
    """Train under `CyclicStrategy`; return the weights, and the names of each stage's parameters."""
    module = Regression(deep(5), adamw)
    strategy = CyclicStrategy(**settings, **places(world_size))
    options = {"accelerator": device, "num_nodes": world_size, "callbacks": [where := Where()]}
    runner = trainer(strategy, 1 if device == "cpu" else [0], **options)
    with slow_hand_overs(device, slow):
        runner.fit(module, loader(STEPS, rank))
    assert where.devices == {device}
    return {"weights": weights(module), "stages": strategy.stage_names}


def sequential_fit(rank: int, world_size: int, names: list[list[str]], **settings: Any) -> list[Any]:
    """Train the same as one process would for all ranks, on the CPU."""
    module = Regression(deep(5), adamw)
    reference(module, world_size, STEPS, names, **settings)
    return weights(module)


@contextmanager
def slow_hand_overs(device: str, slow: bool) -> Iterator[None]:
    """Before a stage's gradients are handed over their stream is busy, and memory that is free again is overwritten."""
    before: Callable[..., Any] = CyclicRing.hand_over

    def hand_over(self: CyclicRing, stage: int, gradients: Any, *args: Any, **kwargs: Any) -> Any:
        like = [torch.empty_like(each, device="meta") for each in gradients if isinstance(each, Tensor)]
        spin(device, 2)
        answer = before(self, stage, gradients, *args, **kwargs)
        for each in like:
            torch.full_like(each, torch.nan, device=device)
        return answer

    try:
        if slow:
            CyclicRing.hand_over = hand_over  # type: ignore[method-assign]
        yield
    finally:
        CyclicRing.hand_over = before  # type: ignore[method-assign]


def clipped_half(rank: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a gradient clipped to a far smaller norm, by a norm on a device and by one of the host."""
    gradient = torch.linspace(-6e4, 6e4, 1000).to(dtype)
    square, clipping = float(gradient.double().square().sum()), Clipping(norm=1e-2)
    there, here = gradient.to(device), gradient.clone()
    clip_(clipping, torch.tensor(square, dtype=torch.float64, device=device), None, [there])
    clip_(clipping, square, None, [here])
    return there.cpu(), here
