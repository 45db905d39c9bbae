"""The models and the methods that `cyclic_memory.py` measures, and how much memory a run of one needs at its peak."""

import gc
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.cyclic.memory_report import ARMS
from lightning_comm.ondevice.activation_meter import ActivationMeter
from lightning_comm.ondevice.cyclic import CyclicEngine

Batch = tuple[Tensor, Tensor]


class Embedding(nn.Module):
    """What a vision transformer of timm does before its blocks."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.patch_embed, self.cls_token, self.pos_embed = model.patch_embed, model.cls_token, model.pos_embed

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed


class FirstToken(nn.Module):
    """Takes the class token."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class InBfloat16(nn.Module):
    """A layer that computes in bfloat16 where autocast does so; its backward runs outside of autocast, as it should."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            out: Tensor = self.layer(x)
        return out


def layers_of(name: str, size: int, device: str = "cpu", precision: str = "fp32") -> list[nn.Module]:
    """Return a model as layers that run one after the other.

    Args:
        name: Of the model, as timm has it.
        size: Pixels a side.
        device: Where to put them.
        precision: `"fp32"`, or `"bf16"` for autocast.

    """
    torch.manual_seed(0)
    if name.startswith("resnet"):
        model: Any = timm.create_model(name)
        stem = nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool)
        blocks = [block for layer in (model.layer1, model.layer2, model.layer3, model.layer4) for block in layer]
        layers = [stem, *blocks, nn.Sequential(model.global_pool, model.fc)]
    else:
        model = timm.create_model(name, img_size=size)
        layers = [Embedding(model), *model.blocks, nn.Sequential(model.norm, FirstToken(), model.head)]
    with torch.no_grad():
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(nn.Sequential(*layers).eval()(x), model.eval()(x))
    trained = [layer.train().to(device) for layer in layers]
    return in_bfloat16(trained) if precision == "bf16" else trained


def in_bfloat16(layers: list[nn.Module]) -> list[nn.Module]:
    """Return the same layers, with the same parameters, under autocast."""
    return [InBfloat16(layer) for layer in layers]


def settle(device: torch.device) -> None:
    """Wait until a device has done what it was given, so that a clock that is read next tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def error(output: Tensor, batch: Batch) -> Tensor:
    """Return the mean loss of a micro-batch."""
    return cross_entropy(output.float(), batch[1])


def one_batch(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: list[list[Batch]], _: Any) -> None:
    """Train on all micro-batches of a step at once."""
    for batches in steps:
        images, labels = (torch.cat(each) for each in zip(*batches, strict=True))
        error(model(images), (images, labels)).backward()
        optimizer.step()
        optimizer.zero_grad()


def accumulation(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: list[list[Batch]], _: Any) -> None:
    """Train on the micro-batches of a step one after the other."""
    for batches in steps:
        for batch in batches:
            (error(model(batch[0]), batch) / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()


def engine(order: Any) -> Callable[..., None]:
    """Return what trains with micro-batches that take turns."""

    def train(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: list[list[Batch]], sources: Any) -> None:
        turns = CyclicEngine(model, optimizer, workers=len(steps[0]), order=order)
        if sources is not None:
            sources.append(turns.tensors)
        turns.run([batch for batches in steps for batch in batches], error)

    return train


METHODS: dict[str, Callable[..., None]] = {
    "one batch": one_batch,
    "accumulation": accumulation,
    "forward_first": engine("forward_first"),
    "backward_first": engine("backward_first"),
    "fine_forward_first": engine("forward_first"),
    "fine_backward_first": engine("backward_first"),
}
assert list(METHODS) == list(ARMS)


def peak_bytes(train: Callable[..., None], model: nn.Sequential, steps: list[list[Batch]]) -> int:
    """Return the most activations that are kept at once."""
    sources: list[Any] = []
    meter = ActivationMeter(model, lambda: [tensor for source in sources for tensor in source()])
    with meter:
        train(model, optimizer_of(model), steps, sources)
    return meter.peak_bytes


def allocator_bytes(train: Callable[..., None], model: nn.Sequential, steps: list[list[Batch]]) -> dict[str, Any]:
    """Return what a CUDA device's allocator says of a run: `persistent`, `peak_above`, `reserved`, in bytes, `step_s`.

    Args:
        train: One of `METHODS`.
        model: In its stages, on the device, and `steps` as well.
        steps: The first is trained on once before, so that what comes with it is there: momenta, the algorithms of
            convolutions, the workspaces of matrix products.

    Returns:
        `persistent`: allocated between two runs, which is the model, its momenta and the batches; `peak_above`: by how
        much more there was at the peak; `reserved`: the most that was taken from the device; `step_s`: seconds of a
        step by the device's clock, in which memory is taken from the device anew.

    """
    device = next(model.parameters()).device
    optimizer = optimizer_of(model)
    train(model, optimizer, steps[:1], None)
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    settle(device)
    torch.cuda.empty_cache()  # reserved by an arm before, or by the first step
    torch.cuda.reset_peak_memory_stats(device)
    persistent = torch.cuda.memory_allocated(device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    train(model, optimizer, steps, None)
    end.record()
    settle(device)
    return {
        "persistent": persistent,
        "peak_above": torch.cuda.max_memory_allocated(device) - persistent,
        "reserved": torch.cuda.max_memory_reserved(device),
        "step_s": begin.elapsed_time(end) / 1e3 / len(steps),
    }


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of every method."""
    return torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
