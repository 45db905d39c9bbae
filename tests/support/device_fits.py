"""Fits of small models on ranks that share a device, by the name of a case; each function is a call of `Ranks`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from lightning_comm import (
    AdaptivePartition,
    Averaging,
    Cast,
    CompressedDDPStrategy,
    FixedPeriod,
    LocalUpdateStrategy,
    QuadraticPeriod,
    ResumableLoader,
    SparseMask,
    Ternary,
    TopK,
)
from lightning_comm.transport.recording import Recorder
from support.on_device import spin
from support.partition import UNEVEN, Fit, loader_of
from support.training import Regression, Samples, Stop, loader, network, trainer

STEPS, PERIOD = 20, 4
Strategy = Callable[..., Any]


def local_update(period: Any = None, **kwargs: Any) -> Strategy:
    return lambda **places: LocalUpdateStrategy(period or FixedPeriod(PERIOD), **kwargs, **places)


def sent_as(compression: Any, **kwargs: Any) -> Strategy:
    return local_update(averaging=Averaging(0.0003, compression, **kwargs))


def ddp(compression: Any) -> Strategy:
    return lambda **places: CompressedDDPStrategy(compression, bucket_cap_mb=0.0003, **places)


@dataclass(frozen=True)
class Case:
    """A fit.

    Args:
        strategy: Makes it, of where its ranks are.
        tolerance: How far weights may be from those of the CPU in float64, as a share of the largest of the tensor.
        near: The case whose weights they must be near, where numbers are drawn on the device, which are others there.
        dtype: Of the model and its data. In float32 rounding to a narrow type may fall to the other side.
        norm: Whether there is a norm with buffers.
        uneven: Whether a global batch is cut into unequal parts.
        options: The Trainer's.

    """

    strategy: Strategy
    tolerance: float = 1e-9
    dtype: torch.dtype = torch.float64
    norm: bool = False
    uneven: bool = False
    near: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


class Where(Callback):
    """Notes on which kind of device a model trains; after a fit it is on the CPU."""

    def __init__(self) -> None:
        self.devices: set[str] = set()

    def on_train_batch_end(self, runner: Any, module: Any, *_: Any) -> None:
        self.devices |= {parameter.device.type for parameter in module.parameters()}


MASKED = SparseMask(then=Cast("bf16"))
CASES: dict[str, Case] = {
    "local update": Case(local_update()),
    "local update in float32": Case(local_update(), 1e-5, torch.float32),
    "qsr": Case(local_update(QuadraticPeriod())),
    "gradients first": Case(local_update(gradient_steps=8)),
    "gradients first, in float32": Case(local_update(gradient_steps=8), 1e-5, torch.float32),
    "overlap": Case(sent_as(None, overlap_steps=2)),
    "overlap in float32": Case(sent_as(None, overlap_steps=2), 1e-5, torch.float32),
    "overlap, bf16": Case(sent_as("bf16", overlap_steps=2)),
    "momenta": Case(local_update(optimizer_state="average")),
    "buffers": Case(local_update(), norm=True),
    "validation in mid-round": Case(
        local_update(), norm=True, options={"val_check_interval": 6, "limit_val_batches": 1}
    ),
    "averages in bf16": Case(sent_as("bf16")),
    "averages in fp16": Case(sent_as("fp16")),
    "averages of the largest": Case(sent_as(TopK(0.2))),
    "averages of low rank": Case(sent_as("powersgd"), 1e-6),
    "averages of what is not pruned": Case(sent_as(MASKED)),
    "averages in int8": Case(sent_as("int8"), 0.05, near="averages in bf16"),
    "weighted by samples": Case(local_update(), uneven=True),
    "weighted by samples, overlap": Case(sent_as(None, overlap_steps=2), uneven=True),
    "ddp_bf16": Case(ddp("bf16")),
    "ddp_fp16": Case(ddp("fp16")),
    "ddp_topk": Case(ddp(TopK(0.2))),
    "ddp_powersgd": Case(ddp("powersgd"), 1e-6),
    "ddp_sparse_mask": Case(ddp("sparse_mask")),
    "ddp_sparse_mask in float32": Case(ddp("sparse_mask"), 1e-5, torch.float32),
    "pactrain": Case(ddp(MASKED)),
    "ddp_int8": Case(ddp("int8"), 0.05, near="ddp_bf16"),
    "ddp ternary": Case(ddp(Ternary()), 2.0, near="ddp_bf16"),
    "ddp_bf16, unequal batches": Case(ddp("bf16"), uneven=True),
}
RESUMED = (
    "overlap, bf16",
    "averages of low rank",
    "averages in int8",
    "buffers",
    "ddp_powersgd",
    "ddp_int8",
    "pactrain",
)
SLOW = ("local update", "overlap", "overlap, bf16", "averages in bf16", "ddp_bf16", "ddp_powersgd", "pactrain")


@contextmanager
def slow_messages(device: str) -> Iterator[None]:
    """Before each message its stream is busy: whoever does not wait for the stream sends what was there before."""
    kinds = ("all_reduce", "all_to_all", "broadcast", "all_gather")
    before = {kind: getattr(Recorder, kind) for kind in kinds}

    def slowly(kind: str) -> Callable[..., Any]:
        def send(self: Recorder, tensor: Any, *args: Any, **kwargs: Any) -> Any:
            if tensor.device.type == torch.device(device).type:
                spin(device, 2)
            return before[kind](self, tensor, *args, **kwargs)

        return send

    try:
        for kind in kinds:
            setattr(Recorder, kind, slowly(kind))
        yield
    finally:
        for kind in kinds:
            setattr(Recorder, kind, before[kind])


def _momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.02, momentum=0.9)


def places(world_size: int) -> dict[str, Any]:
    """Arguments of a strategy whose ranks share a device: by NCCL that takes one rank."""
    return {"process_group_backend": "gloo" if world_size > 1 else None, "timeout": timedelta(seconds=40)}


def run(
    rank: int, device: str, name: str, world_size: int, *, strategy: Any = None, ckpt_path: Any = None, **options: Any
) -> tuple[Any, Any]:
    """Carry out a case; return the module and the Trainer."""
    case = CASES[name]
    net = network(case.dtype, norm=case.norm)
    module: Regression = (Fit if case.uneven else Regression)(net, _momentum)
    options = {**case.options, **options, "accelerator": device, "num_nodes": world_size}
    where = Where()
    options["callbacks"] = [where, *options.get("callbacks", [])]
    if case.uneven:
        options["callbacks"].append(AdaptivePartition(**UNEVEN))
        data, validation = loader_of(STEPS * 12, case.dtype), None
    else:
        samples = Samples(STEPS * 4, rank, case.dtype)
        data = ResumableLoader(samples, 4, seed=3, num_replicas=1, rank=0)  # goes on in the middle of an epoch
        validation = loader(1, 90 + rank, dtype=case.dtype)
    with TemporaryDirectory() as folder:  # for the journal of a partition
        options["default_root_dir"] = folder
        runner = trainer(strategy or case.strategy(**places(world_size)), 1 if device == "cpu" else [0], **options)
        runner.fit(module, data, validation, ckpt_path=ckpt_path)
    assert runner.world_size == world_size
    assert where.devices == {device}
    return module, runner


def weights(module: nn.Module) -> list[Any]:
    """All parameters and buffers, in float64, where pickles can carry them."""
    return [tensor.detach().cpu().double().numpy() for tensor in module.state_dict().values()]


def fit(rank: int, device: str, name: str, world_size: int, slow: bool = False, **options: Any) -> dict[str, Any]:
    """Carry out a case; return its weights and losses."""
    with slow_messages(device) if slow else _nothing():
        module, runner = run(rank, device, name, world_size, **options)
    return {"weights": weights(module), "losses": module.losses, "step": runner.global_step}


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def resumed(rank: int, device: str, name: str, world_size: int, folder: str, **options: Any) -> dict[str, Any]:
    """Stop a case in mid-round, go on from its checkpoint in a fresh run, and return the weights in the end."""
    path = str(Path(folder) / "stopped.ckpt")
    _, runner = run(rank, device, name, world_size, callbacks=[Stop(6, path)], **options)
    assert runner.global_step == 6
    module, runner = run(rank, device, name, world_size, ckpt_path=path, **options)
    return {"weights": weights(module), "step": runner.global_step}


def difference(found: list[Any], expected: list[Any]) -> float:
    """The largest difference of two models' tensors, as a share of the largest entry of the tensor."""
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        scale = max(1e-30, float(np.abs(other).max()))
        apart = float(np.abs(one - other).max()) / scale
        worst = apart if not apart <= worst else worst  # NaN too
    return worst


# ---- one rank --------------------------------------------------------------------------------------------------------


def alone(rank: int, device: str, name: str, folder: str | None = None, **options: Any) -> dict[str, Any]:
    """Train under a strategy by its registered name, in float32; save at a step and go on from there, if asked."""
    backend = {}

    def train(callbacks: list[Any], ckpt_path: Any = None) -> tuple[Any, Any]:
        module = Regression(network(torch.float32), _momentum)
        places = {"accelerator": device, "enable_checkpointing": False, "callbacks": callbacks}
        runner = trainer(name, 1 if device == "cpu" else [0], **{**options, **places})
        data = ResumableLoader(Samples(STEPS * 4, 0, torch.float32), 4, seed=3, num_replicas=1, rank=0)
        runner.fit(module, data, ckpt_path=ckpt_path)
        backend["name"] = torch.distributed.get_backend()
        return module, runner

    torch.manual_seed(1)  # of what is drawn at random in training
    if folder is None:
        module, runner = train([])
    else:
        path = str(Path(folder) / f"{name}.ckpt")
        train([Stop(6, path)])
        module, runner = train([], path)
    return {"weights": weights(module), "step": runner.global_step, "losses": module.losses, "backend": backend["name"]}


def average_on_the_cpu(rank: int, device: str) -> str:
    """What is said of weight averages that are kept in the host's memory, of which NCCL knows nothing."""
    strategy = LocalUpdateStrategy(FixedPeriod(PERIOD), timeout=timedelta(seconds=40))
    callbacks = [EMAWeightAveraging(device="cpu")]
    runner = trainer(strategy, [0], accelerator=device, callbacks=callbacks)
    try:
        runner.fit(Regression(network(torch.float32)), loader(STEPS, rank, dtype=torch.float32))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
