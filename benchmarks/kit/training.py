"""Optimizer steps that are timed on emulated hosts: the job, a plain loop, and DDP in it.

A method is made on all hosts at once and gives a `Segment`, a function that takes so many optimizer steps and says how
long they took. All methods of a comparison use the process group of the host's process.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from lightning_comm.core.ledger import CommLedger
from lightning_comm.lab.device.pacer import DevicePacer

TIMEOUT = timedelta(minutes=3)
CLASSES = 100


@dataclass(frozen=True)
class Timed:
    """A segment on this host.

    Args:
        seconds: How long it took.
        sent_bytes: What this host's interface sent.
        overruns: Steps in which the emulated device could not keep its pace.
        real_share: The share of forward and backward that was real compute so far.
        payload_bytes: What the method's ledger wrote down; None where it has none.
        began_s: When it began, on this process's clock.

    """

    seconds: float
    sent_bytes: int
    overruns: int
    real_share: float
    payload_bytes: float | None = None
    began_s: float = 0.0


Segment = Callable[[int], Timed]


@dataclass
class Job:
    """What all methods do alike.

    Args:
        model: A name that timm knows.
        image: Height and width of the images.
        batch: Samples of a step on each host.
        step_s: Seconds of forward and backward of a batch on the emulated device.
        period: Steps between synchronisations of the methods that do not synchronise in every step.
        model_args: What timm is to be told of the model.

    """

    model: str
    image: int
    batch: int
    step_s: float
    period: int
    model_args: dict[str, Any] = field(default_factory=dict)
    closing: list[Callable[[], Any]] = field(default_factory=list)

    def network(self) -> nn.Module:
        """Make the model, from the same weights every time."""
        torch.manual_seed(0)
        return timm.create_model(self.model, num_classes=CLASSES, **self.model_args)

    @property
    def parameters(self) -> int:
        """How many parameters the model has."""
        return sum(each.numel() for each in self.network().parameters())

    def samples(self, steps: int) -> tuple[Tensor, Tensor]:
        """Make images and labels for so many steps, different on each host."""
        generator = torch.Generator().manual_seed(1 + dist.get_rank())
        count = self.batch * steps
        images = torch.randn(count, 3, self.image, self.image, generator=generator)
        return images, torch.randint(0, CLASSES, (count,), generator=generator)

    def pacer(self, network: nn.Module) -> DevicePacer:
        """Make the emulated device of this host."""
        pacer = DevicePacer(network, step_s=self.step_s, batch_size=self.batch)
        pacer.attach()
        return pacer


class Meter:
    """Seconds, sent bytes and payload of this host since it was made.

    Args:
        ledger: Returns where the payload is written down; ``None`` if it is nowhere.
        together: Whether hosts start together, from a barrier. That waits for what is under way.

    """

    def __init__(self, ledger: Callable[[], CommLedger] | None = None, *, together: bool = True) -> None:
        self._ledger = ledger
        if together:
            dist.barrier()
        self._began = self._figures()

    def _figures(self) -> tuple[float, int, int]:
        payload = 0 if self._ledger is None else self._ledger().payload_bytes()
        return time.perf_counter(), interface_sent_bytes(), payload

    def read(self, overruns: int = 0, real_share: float = 0.0) -> Timed:
        """Return what has been since."""
        seconds, sent, payload = (now - then for now, then in zip(self._figures(), self._began, strict=True))
        payload_bytes = None if self._ledger is None else int(payload)
        return Timed(seconds, int(sent), overruns, real_share, payload_bytes, self._began[0])


def interface_sent_bytes() -> int:
    """Return what this host's interface has sent so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface():
            return int(counters.split()[8])
    raise RuntimeError(f"/proc/net/dev lists no interface {interface()!r}")


def interface() -> str:
    """Return the name of this host's interface in the lab."""
    return os.environ.get("GLOO_SOCKET_IFNAME", "lo")


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer that all tools use."""
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)


def loop(
    job: Job,
    network: nn.Module,
    model: nn.Module | None = None,
    optimizer: Any = None,
    after_step: Callable[[], Any] = lambda: None,
    ledger: CommLedger | None = None,
) -> Segment:
    """Train ``network``, wrapped as ``model``, in a plain loop."""
    model = network if model is None else model
    optimizer = optimizer_of(network) if optimizer is None else optimizer
    pacer = job.pacer(network)
    images, labels = job.samples(1)

    def segment(steps: int) -> Timed:
        before = pacer.overruns
        meter = Meter(None if ledger is None else lambda: ledger)
        for _ in range(steps):
            pacer.begin_step(job.batch)
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            after_step()
        pacer.end_step()
        return meter.read(pacer.overruns - before, pacer.real_share)

    return segment


def no_communication(job: Job) -> Segment:
    """Every host trains for itself."""
    return loop(job, job.network())


def wrapped(network: nn.Module, bucket_cap_mb: float | None = None) -> DistributedDataParallel:
    """Wrap a network in DDP; hosts have made it from the same weights, so they need not be sent at the start."""
    return DistributedDataParallel(network, bucket_cap_mb=bucket_cap_mb, init_sync=False)


def ddp(job: Job, bucket_cap_mb: float | None = None, hook: Any = None, state: Any = None) -> Segment:
    """Train under torch's DistributedDataParallel."""
    network = job.network()
    model = wrapped(network, bucket_cap_mb)
    if hook is not None:
        model.register_comm_hook(state, hook)
    return loop(job, network, model)


def accelerate_local_sgd(job: Job) -> Segment:
    """Average with LocalSGD of Hugging Face's accelerate."""
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD

    accelerator = Accelerator(cpu=True)
    network = job.network()
    model, optimizer = accelerator.prepare(network, optimizer_of(network))
    local = LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=job.period)
    if not local.enabled:
        raise RuntimeError(f"accelerate sees no other process: {accelerator.state!r}")
    local.__enter__()  # for the whole run; leaving it would only average once more
    return loop(job, network, model, optimizer, local.step)
