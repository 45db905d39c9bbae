"""The ring on a CUDA device with gloo, on tensors that say they are there: values, host waits and the order of streams.

Messages go through pinned memory of the host, since gloo cannot send memory of a device. What only a device can show
(that copies and streams do as their documentation says) is not shown here.
"""

import threading
from datetime import timedelta
from unittest import mock

import pytest
import torch
from support.mock_cuda import mock_cuda
from support.processes import start_ranks

from lightning_comm.core.cyclic import CyclicSchedule
from lightning_comm.core.ledger import CommLedger
from lightning_comm.transport.cyclic import CyclicRing
from lightning_comm.transport.cyclic_messages import NOTES, Message, Numbers, StageLayout
from lightning_comm.transport.recording import Recorder, another_group

STEPS = 4
CUDA = torch.device("cuda", 0)


def gradient(rank, stage, step):
    generator = torch.Generator().manual_seed(1000 * rank + 10 * stage + step)
    return torch.randn(stage + 2, generator=generator)


def _ring(rank, world_size, stages, device):
    """Return the versions that this rank took up, its notes, and what it has sent."""
    schedule, ledger = CyclicSchedule(world_size, stages), CommLedger()

    def update(step, stage, message):
        message.parts[0].mul_(0.5).add_(step)

    lanes = [Recorder(ledger, another_group(timedelta(seconds=20)), hold=True)] * 2
    layouts = [StageLayout([gradient(0, stage, 0)]) for stage in range(stages)]
    ring = CyclicRing(schedule, layouts, update, *lanes, device)
    taken, rows = [], []
    gradients = [[gradient(rank, stage, step).to(device) for stage in range(stages)] for step in range(STEPS)]
    for step in range(STEPS):
        ring.begin_step(step)
        for stage in schedule.order():
            notes = torch.full((NOTES,), float(rank + 1), dtype=torch.float64, device=device)
            ring.hand_over(stage, [gradients[step][stage] * 2], notes)
        for stage in range(stages):
            message = ring.take(stage, step + 1, lambda: None)
            taken.append(message.parts[0].clone())
            ring.release(stage, step + 1)
        if step >= 2:
            rows.append(ring.notes(step - 1, range(stages), lambda: None))
    on_device = ring.notes_on_device(STEPS, range(stages), lambda: None)
    ring.close()
    lanes[0].write_held()
    sent = {purpose: ledger.payload_bytes(purpose) for purpose in ("gradients", "parameters", "control")}
    return [each.cpu().tolist() for each in taken], rows, on_device.cpu().tolist(), sent


def keeping(kept):
    """Note which tensors are kept for another stream, since their memory is not used again before it has read them."""
    return mock.patch.object(torch.Tensor, "record_stream", lambda tensor, stream: kept.append(tensor.data_ptr()))


def _on_a_device(rank, world_size, stages):
    on_host = _ring(rank, world_size, stages, torch.device("cpu"))
    kept = []
    with mock_cuda() as device, keeping(kept):
        there = _ring(rank, world_size, stages, CUDA)
    assert there == on_host  # bit for bit, and the same bytes
    # gradients and notes of each stage and step, for the gradient lane, and the notes that are read on the device
    assert len(kept) == 2 * STEPS * stages + stages
    assert device.hazards == []
    by_compute = [each for each in device.waits if each.own and each.thread == threading.main_thread().name]
    return by_compute, {each.thread.split(" of ")[0] for each in device.waits if each.own} - {"MainThread"}


@pytest.mark.parametrize(("world_size", "stages"), [(2, 4), (3, 6)])
def test_a_ring_on_a_device_does_what_it_does_on_the_host_and_only_lanes_wait(world_size, stages):
    for by_compute, lanes in start_ranks(_on_a_device, world_size, stages, world_size=world_size, timeout_s=80):
        # notes, two steps late, and the end: nothing of what backward calls
        functions = {(each.kind, each.where.split(":")[0]) for each in by_compute}
        assert functions <= {
            ("Event.synchronize", "lightning_comm/transport/cyclic_messages.py"),
            ("torch.cuda.synchronize", "lightning_comm/transport/cyclic.py"),
        }
        reads = [each for each in by_compute if each.kind == "Event.synchronize"]
        assert len(reads) == (STEPS - 2) * stages
        assert lanes == {"lightning_comm gradients", "lightning_comm parameters"}
