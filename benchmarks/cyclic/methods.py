"""The methods that `steps` times on emulated hosts, and what their traffic looks like on the link."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.cyclic.steps_report import (
    ALONE,
    BEST,
    BUCKETS,
    DEFAULT,
    DELAYED,
    LIGHTNING,
    V1,
    V2,
    V2_DEFAULT,
    V2_FINE,
    peaks_of,
)
from benchmarks.kit.host import gathered, together
from benchmarks.kit.step_times import LIMIT
from benchmarks.kit.trainer import lightning
from benchmarks.kit.training import TIMEOUT, Job, Meter, Segment, Timed, ddp, interface_sent_bytes, no_communication
from benchmarks.kit.training import optimizer_of as sgd
from lightning_comm import CyclicStrategy

SAMPLE_S = 0.02
WARMUP, COOLDOWN = 4, 2  # steps before and after those that are timed, of what overlaps with the next step


class LinkSampler:
    """Reads what this host's interface has sent, again and again, in a thread."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, int]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        at = time.perf_counter()
        while not self._ended.is_set():
            before_s = time.perf_counter()
            sent = interface_sent_bytes()
            after_s = time.perf_counter()
            if after_s - before_s < SAMPLE_S / 10:  # otherwise the time at which it was so is not known
                self._samples.append(((before_s + after_s) / 2, sent))
            at = max(at + SAMPLE_S, time.perf_counter())
            time.sleep(max(0.0, at - time.perf_counter()))

    def within(self, began_s: float, seconds: float) -> list[tuple[float, int]]:
        """Return the samples of a time, and forget all that are older."""
        samples = [each for each in self._samples if began_s <= each[0] <= began_s + seconds]
        del self._samples[: len(self._samples) - 1]
        return samples

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()


class DelayedAllReduce:
    """Sums gradients in buckets beside compute, and applies those of a step at the end of the next one.

    Args:
        network: The model.
        bucket_cap_mb: How large a bucket is to become, in MiB.

    """

    def __init__(self, network: nn.Module, bucket_cap_mb: float) -> None:
        self._optimizer = sgd(network)
        self._buckets = [_Bucket(each) for each in _cut(network, bucket_cap_mb)]
        self._works: list[list[dist.Work]] = [[], []]  # of even and of odd steps
        self._step = 0
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._hook_of(bucket))

    def _hook_of(self, bucket: "_Bucket") -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            bucket.missing -= 1
            if bucket.missing == 0:
                bucket.missing = len(bucket.parameters)
                work = dist.all_reduce(bucket.fill(self._step % 2), async_op=True)
                self._works[self._step % 2].append(work)

        return hook

    def end_step(self) -> None:
        """Wait for the gradients of the step before this one and apply them."""
        self._step += 1
        self._apply(self._step % 2)

    def drain(self) -> None:
        """Apply what is under way."""
        self._apply(1 - self._step % 2)
        self._step = 0

    def _apply(self, parity: int) -> None:
        works, self._works[parity] = self._works[parity], []
        for work in works:
            work.wait()
        if works:
            for bucket in self._buckets:
                bucket.give_back(parity)
            self._optimizer.step()
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.grad = None


class _Bucket:
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.missing = len(parameters)
        sizes = [each.numel() for each in parameters]
        self._flat = [torch.zeros(sum(sizes)) for _ in range(2)]
        self._parts = [
            [part.view_as(own) for part, own in zip(flat.split(sizes), parameters, strict=True)] for flat in self._flat
        ]

    def fill(self, parity: int) -> Tensor:
        with torch.no_grad():
            for part, parameter in zip(self._parts[parity], self.parameters, strict=True):
                part.copy_(parameter.grad)
                parameter.grad = None
        return self._flat[parity]

    def give_back(self, parity: int) -> None:
        self._flat[parity].div_(dist.get_world_size())
        for part, parameter in zip(self._parts[parity], self.parameters, strict=True):
            parameter.grad = part


def _cut(network: nn.Module, bucket_cap_mb: float) -> Iterator[list[nn.Parameter]]:
    """Yield parameters in the order in which backward comes to them, so many at a time as a bucket holds."""
    bucket: list[nn.Parameter] = []
    for parameter in reversed(list(network.parameters())):
        bucket.append(parameter)
        if 4 * sum(each.numel() for each in bucket) >= bucket_cap_mb * 2**20:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def delayed(job: Job, bucket_cap_mb: float) -> Segment:
    """Train with one-step-delayed all-reduces, which nobody waits for at the end of their own step."""
    network = job.network()
    gradients = DelayedAllReduce(network, bucket_cap_mb)
    pacer = job.pacer(network)
    images, labels = job.samples(1)

    def step() -> None:
        pacer.begin_step(job.batch)
        cross_entropy(network(images), labels).backward()
        gradients.end_step()

    def segment(steps: int) -> Timed:
        for _ in range(WARMUP):
            step()
        before = pacer.overruns
        meter = Meter(together=False)  # a barrier would wait for what is under way
        for _ in range(steps):
            step()
        timed = meter.read(pacer.overruns - before, pacer.real_share)
        for _ in range(COOLDOWN):
            step()
        pacer.end_step()
        gradients.drain()
        return timed

    return segment


def alone(job: Job, bucket_cap_mb: float = math.inf) -> Segment:
    """Sum a tensor of the size of the model, in buckets that are all started at once, and do nothing else."""
    flats = [torch.zeros(sum(each.numel() for each in cut)) for cut in _cut(job.network(), bucket_cap_mb)]

    def segment(steps: int) -> Timed:
        meter = Meter()
        for _ in range(steps):
            for work in [dist.all_reduce(flat, async_op=True) for flat in flats]:
                work.wait()
        return meter.read()

    return segment


class Inspection(pl.Callback):
    """Notes what share of the optimizer's state is on this rank, where momentum is all of it."""

    def __init__(self) -> None:
        self.state_share = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        whole_bytes = sum(each.numel() * each.element_size() for each in pl_module.parameters())
        self.state_share = trainer.strategy.optimizer_state_bytes / whole_bytes


def stages_of(count: int, blocks: int = 12) -> list[str]:
    """Return the first modules of so many stages of about as many blocks each; what is not a block goes along."""
    firsts = [blocks * stage // count for stage in range(count)]
    return ["network.patch_embed", *(f"network.blocks.{first}" for first in firsts[1:])]


def cyclic(job: Job, inspection: Inspection, **settings: Any) -> Segment:
    """Train under the strategy, with Lightning."""
    made: list[CyclicStrategy] = []

    def strategy() -> CyclicStrategy:
        made[:] = [CyclicStrategy(timeout=TIMEOUT, **settings)]
        return made[0]

    # started without a barrier, which would wait for what is under way
    run = lightning(job, strategy, WARMUP, cooldown=COOLDOWN, together=False, callbacks=[inspection])

    def segment(steps: int) -> Timed:
        timed = run(steps)
        sent = made[0].ledger.payload_bytes("gradients", "parameters")  # of the whole run, with nothing under way
        return replace(timed, payload_bytes=sent * steps / (WARMUP + steps + COOLDOWN))

    return segment


def limit_in_lightning(job: Job) -> Segment:
    """Train each host for itself, under Lightning."""
    return lightning(job, lambda: SingleDeviceStrategy(torch.device("cpu")), 2, num_nodes=1)


def segments_of(names: Sequence[str], job: Job, best_mb: float) -> tuple[dict[str, Segment], dict[str, Inspection]]:
    """Make the methods, in this order, and what looks at optimizers."""
    inspections = {name: Inspection() for name in (V1, V2, V2_DEFAULT, V2_FINE)}
    stages = stages_of(3 * dist.get_world_size())
    make: dict[str, Callable[[], Segment]] = {
        LIMIT: lambda: no_communication(job),
        LIGHTNING: lambda: limit_in_lightning(job),
        ALONE: lambda: alone(job),
        BUCKETS: lambda: alone(job, best_mb),
        DEFAULT: lambda: ddp(job),
        BEST: lambda: ddp(job, best_mb),
        DELAYED: lambda: delayed(job, best_mb),
        V2: lambda: cyclic(job, inspections[V2], rule="v2", stages=stages),
        V1: lambda: cyclic(job, inspections[V1], rule="v1", stages=stages),
        V2_DEFAULT: lambda: cyclic(job, inspections[V2_DEFAULT], rule="v2"),
        V2_FINE: lambda: cyclic(job, inspections[V2_FINE], rule="v2", stages=2 * len(stages)),
    }
    return {name: make[name]() for name in names}, inspections


def measured(segment: Segment, steps: int, step_s: float, sampler: LinkSampler) -> dict[str, Any]:
    """Time a segment on all hosts, with the peaks on their links."""
    own = segment(steps)
    peaks = peaks_of(sampler.within(own.began_s, own.seconds), step_s / 4, shortest_s=SAMPLE_S / 2)
    return {**together(own, steps), "peaks": [each for each in gathered(peaks) if each]}


@contextmanager
def sampling() -> Iterator[LinkSampler]:
    """Sample the link in here."""
    sampler = LinkSampler()
    try:
        yield sampler
    finally:
        sampler.close()
