"""What one rank does on a device, part by part, for tests that compare devices: each function is a call of `Ranks`.

What is returned is a number, or tensors in the memory of the host.
"""

import io
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lightning_comm import Cast, Int8, PowerSGD, SparseMask, Ternary, TopK
from lightning_comm.core.ledger import CommLedger
from lightning_comm.ondevice.random_state import random_state, set_random_state
from lightning_comm.ondevice.share import Share
from lightning_comm.strategies.common.loss_scale import loss_scale, take_smallest_scale
from lightning_comm.transport.averaging import FullAverage, broadcast_
from lightning_comm.transport.background_thread import BackgroundThread
from lightning_comm.transport.compression.base import Codec, Compression, Context, Layout, Slot, run_alone
from lightning_comm.transport.compression.full import Full
from lightning_comm.transport.compression.sparse_mask_codec import SparseMaskCodec
from lightning_comm.transport.recording import Recorder, another_group
from support.model_averages import Background
from support.on_device import spin

SHAPES = {"a.weight": (70, 50), "a.bias": (70,), "b.weight": (40, 3, 3, 3), "one": (1,), "c.weight": (13, 110)}
LAYOUT = Layout(tuple(Slot(name, torch.Size(shape).numel(), shape) for name, shape in SHAPES.items()))
EXACT: list[Compression] = [Full(), Cast("bf16"), Cast("fp16"), TopK(0.1), SparseMask(), SparseMask(then=Cast("bf16"))]
RANDOM: list[Compression] = [Int8(), Ternary()]
ALL: list[Compression] = [*EXACT, *RANDOM, PowerSGD(2), SparseMask(then=Int8())]
PURPOSE = "gradients"


def name_of(compression: Compression) -> str:
    """A short name."""
    parts = [compression, compression.then] if isinstance(compression, SparseMask) else [compression]
    return "+".join(type(part).__name__ + getattr(part, "dtype", "") for part in parts if part is not None)


def entries(rank: int, step: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A bucket of gradients, drawn on the CPU."""
    return torch.randn(LAYOUT.numel, generator=torch.Generator().manual_seed(100 * rank + step)).to(dtype)


def codec_of(compression: Compression, device: Any, *, feedback: bool = False) -> Codec:
    """A codec; a mask keeps a fifth of the weights."""
    codec = compression.codec(Context(Recorder(CommLedger()), PURPOSE, feedback=feedback))
    if isinstance(codec, SparseMaskCodec):
        draw = torch.Generator().manual_seed(1)
        masks = {slot.name: (torch.rand(slot.shape, generator=draw) < 0.2).to(device) for slot in LAYOUT.slots[:3]}
        codec.install(masks, parameters_on(device))
    return codec


def parameters_on(device: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters whose gradients lie in the bucket."""
    return [(slot.name, torch.nn.Parameter(torch.empty(slot.shape, device=device))) for slot in LAYOUT.slots]


def take_step(codec: Codec, rank: int, step: int, device: Any, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Synchronise the gradients of a step; return the mean and what was sent, which must be on the device."""
    values = entries(rank, step, dtype).to(device)
    sent = torch.full_like(values, torch.nan)
    codec.begin_step()
    run_alone(codec.mean(values, LAYOUT, sent))
    codec.end_step()
    assert values.device == sent.device == torch.device(device, 0 if device != "cpu" else None)
    return [values.cpu(), sent.cpu()]


def means(
    rank: int, device: str, compression: Compression, feedback: bool, steps: int = 2, dtype: torch.dtype = torch.float32
) -> list[list[Tensor]]:
    """The means of some steps and what was sent."""
    codec = codec_of(compression, device, feedback=feedback)
    return [take_step(codec, rank, step, device, dtype) for step in range(steps)]


def resumed(rank: int, device: str, compression: Compression) -> tuple[float, int]:
    """Save after two steps, take it up as a checkpoint is read, on the CPU, and go on beside one that never stopped.

    Returns the largest difference of the next steps, and how many tensors of the state are not on the device then.
    """
    codec, worst = codec_of(compression, device, feedback=True), 0.0
    for step in range(2):
        take_step(codec, rank, step, device)
    file = io.BytesIO()
    torch.save(codec.state_dict(), file)
    file.seek(0)
    again = codec_of(compression, device, feedback=True)
    again.load_state_dict(torch.load(file, map_location="cpu"))
    if isinstance(again, SparseMaskCodec):
        again.install(again.masks, parameters_on(device))  # as the strategy does
    for step in range(2, 4):
        pairs = zip(take_step(codec, rank, step, device), take_step(again, rank, step, device), strict=True)
        worst = max(worst, *(float((a - b).abs().max()) for a, b in pairs))
    state = {name: value for name, value in again.state_dict().items() if name != "masks"}  # bits, for the file alone
    return worst, sum(each.device.type != torch.device(device).type for each in tensors_in(state))


def tensors_in(state: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    if isinstance(state, Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [tensor for value in values for tensor in tensors_in(value)]


def feedback_identity(rank: int, device: str, compression: Compression) -> float:
    """The worst of ``gradient + residual before - sent - residual after`` over some steps."""
    codec, worst, before = codec_of(compression, device, feedback=True), 0.0, torch.zeros(LAYOUT.numel)
    for step in range(4):
        _, sent = take_step(codec, rank, step, device)
        residuals = codec.state_dict()["residuals"]
        after = torch.cat([residuals[slot.name].cpu() for slot in LAYOUT.slots])
        worst = max(worst, float((entries(rank, step) + before - sent - after).abs().max()))
        before = after
    return worst


def drawn(rank: int, device: str) -> list[Tensor]:
    """Four draws of a context's generators: twice the same, then for another step and another name."""
    context = Context(Recorder(CommLedger()), PURPOSE)
    wanted = [("a", 0), ("a", 0), ("a", 1), ("b", 0)]
    generators = [context.generator(name, step, torch.device(device)) for name, step in wanted]
    return [torch.rand(1000, generator=each, device=device).cpu() for each in generators]


# ---- averages --------------------------------------------------------------------------------------------------------


def odd_tensors(rank: int, device: str) -> dict[str, Tensor]:
    """Tensors of every type and layout that an average takes, drawn on the CPU."""
    draw = torch.Generator().manual_seed(rank)

    def new(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=dtype).to(device)

    found = {str(dtype): new(33, 7).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    found |= {"torch.float64": new(33, 7), "complex64": new(9, 5, dtype=torch.complex128).to(torch.complex64)}
    found |= {"channels_last": new(4, 3, 5, 5).float().to(memory_format=torch.channels_last)}
    found |= {"0-dim": new().float(), "transposed": new(6, 9).float().t(), "expanded": new(3, 1).float().expand(3, 5)}
    found |= {"strided": new(10, 10).float()[::2, 1::3], "empty": new(0, 3).float()}
    return found


def averaged(
    rank: int, device: str, world_size: int, weighted: bool, slow: bool = False, large: bool = False
) -> dict[str, Tensor]:
    """Average them in buckets smaller than most of them; with a stream that is behind, if asked."""
    tensors = odd_tensors(rank, device)
    if large:
        tensors["torch.float32"][0] = 3e38  # the sum of two of them is infinite
        tensors["torch.float32"][1] = float("inf") if rank == 0 else 1.0
    weight = Share.of(range(1, world_size + 1), rank) if weighted else None
    averager = FullAverage(Recorder(CommLedger()), 256)
    for _ in range(2 if slow else 1):
        if slow:
            # what is averaged is written behind a kernel that spins, and was something else before
            kept = odd_tensors(rank, device)
            for tensor in tensors.values():
                _fill(tensor, float("nan"))
            spin(device)
            for name, tensor in tensors.items():
                _distinct(tensor).copy_(_distinct(kept[name]))
        averager.average_(tensors, weight, purpose=PURPOSE)
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _distinct(tensor: Tensor) -> Tensor:
    return tensor[:, :1] if tensor.dim() > 1 and tensor.stride(1) == 0 else tensor


def _fill(tensor: Tensor, value: float) -> None:
    _distinct(tensor).fill_(value)


def broadcast(rank: int, device: str) -> list[Tensor]:
    """Take what rank 0 has, of types that have no mean too."""
    tensors = [torch.arange(50, device=device) + rank, torch.full((3, 3), rank > 0, device=device)]
    tensors += [torch.full((7,), float(rank), device=device, dtype=torch.bfloat16)]
    broadcast_(tensors, Recorder(CommLedger()), PURPOSE, 64)
    return [tensor.cpu() for tensor in tensors]


def in_flight(
    rank: int, device: str, compression: Compression, dtype: torch.dtype = torch.float64, poison: bool = True
) -> list[dict[str, Tensor]]:
    """Let an average fly while the weights are overwritten; return the weights after it, and the references.

    Everything is behind a kernel that spins: what departs, each message, and what is written during the flight. Whoever
    does not wait for the right stream meets NaN, or weights of another time.
    """
    recorder = _SlowRecorder(device) if poison else Recorder(CommLedger(), another_group(None), hold=True)
    averager = Background(recorder, compression, 4096)
    weights = {slot.name: row.clone().view(slot.shape).to(device, dtype) for slot, row in _split(entries(9))}
    averager.references.restart(weights)
    for step in range(2):
        moved = {slot.name: row.view(slot.shape).to(device, dtype) for slot, row in _split(entries(rank, step))}
        if poison:
            spin(device)
        for name, tensor in weights.items():
            tensor.add_(moved[name], alpha=0.1)
        averager.depart(weights)
        if poison:
            noted = {name: tensor.clone() for name, tensor in weights.items()}
            for tensor in weights.values():
                tensor.fill_(float("nan"))
            spin(device)
            for name, tensor in weights.items():
                tensor.copy_(noted[name])
        averager.land_(weights)
    reference = averager.state_dict()["reference"]
    return [{name: tensor.cpu() for name, tensor in each.items()} for each in (weights, reference)]


def _split(flat: Tensor) -> list[tuple[Slot, Tensor]]:
    return list(zip(LAYOUT.slots, LAYOUT.split(flat), strict=True))


class _SlowRecorder(Recorder):
    """Before each message its stream is busy for a while."""

    def __init__(self, device: str) -> None:
        super().__init__(CommLedger(), another_group(None), hold=True)
        self._slow_device = device

    def _issue(self, *args: Any, **kwargs: Any) -> Any:
        spin(self._slow_device, 5)
        return super()._issue(*args, **kwargs)


def failing_thread(rank: int, device: str) -> str:
    """What is raised where somebody waits for work that fails."""

    def work() -> None:
        torch.ones(3, device=device).view(2)

    thread = BackgroundThread(work, torch.device(device, 0 if device != "cpu" else None))
    try:
        thread.join()
    except RuntimeError as error:
        return str(error)
    return ""


# ---- generators and scales -------------------------------------------------------------------------------------------


def random_numbers_again(rank: int, device: str) -> bool:
    """Whether the device's numbers come again after its state has been through a file."""
    torch.manual_seed(3)
    torch.rand(5, device=device)
    file = io.BytesIO()
    torch.save(random_state(), file)
    first = torch.rand(100, device=device)
    file.seek(0)
    set_random_state(torch.load(file, map_location="cpu", weights_only=False))
    return torch.equal(first.cpu(), torch.rand(100, device=device).cpu())


def unused_scaler(rank: int, device: str) -> tuple[float | None, float, float]:
    """Take the smallest scale with a scaler that has scaled nothing yet; the scale, what it scales, and what a step is.

    As in a run with fp16 that is resumed at the end of a round.
    """
    plugin = SimpleNamespace(scaler=torch.amp.GradScaler(device, init_scale=2.0**16))
    take_smallest_scale(plugin, [2.0**16, 2.0**10], 2.0**16)
    weight = torch.nn.Parameter(torch.ones(1, device=device))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaled = plugin.scaler.scale(weight.sum())
    scaled.backward()
    plugin.scaler.step(optimizer)
    plugin.scaler.update()
    return loss_scale(plugin), float(scaled.detach()), float(weight.detach())
