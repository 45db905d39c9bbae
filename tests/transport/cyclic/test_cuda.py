"""The ring on a CUDA device with gloo, on tensors that say they are there: values, host waits and the order of streams.

Messages go through pinned memory of the host, since gloo cannot send memory of a device. What only a device can show
(that copies and streams do as their documentation says) is not shown here.
"""

import itertools
import threading
from datetime import timedelta
from unittest import mock

import pytest
import torch
from support.mock_cuda import mock_cuda
from support.processes import start_ranks
from torch import nn

from lightning_comm.core.cyclic.schedule import CyclicSchedule
from lightning_comm.core.ledger import CommLedger
from lightning_comm.ondevice.cyclic import CyclicEngine, simulate_delay
from lightning_comm.ondevice.cyclic.update import Clipping, clip_, squared_norm, whole_norm
from lightning_comm.transport.cyclic.messages import STATUS_NUMBERS, Mark, Numbers, StageLayout, StageMessage
from lightning_comm.transport.cyclic.requests import Requests
from lightning_comm.transport.cyclic.ring import CyclicRing
from lightning_comm.transport.cyclic.untrained import UntrainedParameters
from lightning_comm.transport.recording import Recorder, another_group

STEPS = 4
SAME, DIFFERENT = [torch.float32] * 3, [torch.float64, torch.complex64, torch.bfloat16]
CUDA = torch.device("cuda", 0)


def gradient(rank, stage, step):
    generator = torch.Generator().manual_seed(1000 * rank + 10 * stage + step)
    return torch.randn(stage + 2, generator=generator)


def _ring(rank, world_size, stages, device):
    """Return the versions that this rank has used, its status, and what it has sent."""
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
            status = torch.full((STATUS_NUMBERS,), float(rank + 1), dtype=torch.float64, device=device)
            ring.hand_over(stage, [gradients[step][stage] * 2], status)
        for stage in range(stages):
            message = ring.take(stage, step + 1, lambda: None)
            taken.append(message.parts[0].clone())
            ring.release(stage, step + 1)
        if step >= 2:
            rows.append(ring.status(step - 1, range(stages), lambda: None))
    on_device = ring.status_on_device(STEPS, range(stages), lambda: None)
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
    # gradients and status of each stage and step, for the gradient lane, and the status that is read on the device
    assert len(kept) == 2 * STEPS * stages + stages
    assert device.hazards == []
    by_compute = [each for each in device.waits if each.own and each.thread == threading.main_thread().name]
    return by_compute, {each.thread.split(" of ")[0] for each in device.waits if each.own} - {"MainThread"}


@pytest.mark.parametrize(("world_size", "stages"), [(2, 4), (3, 6)])
def test_a_ring_on_a_device_does_what_it_does_on_the_host_and_only_lanes_wait(world_size, stages):
    for by_compute, lanes in start_ranks(_on_a_device, world_size, stages, world_size=world_size, timeout_s=80):
        # status, two steps late, and the end: nothing of what backward calls
        functions = {(each.kind, each.where.split(":")[0]) for each in by_compute}
        assert functions <= {
            ("Event.synchronize", "lightning_comm/transport/cyclic/messages.py"),
            ("torch.cuda.synchronize", "lightning_comm/transport/cyclic/ring.py"),
        }
        reads = [each for each in by_compute if each.kind == "Event.synchronize"]
        assert len(reads) == (STEPS - 2) * stages
        assert lanes == {"lightning_comm gradients", "lightning_comm parameters"}


def on_the_mock(test):
    """Run a test on the device that is not there; it is given the record of what happens on it."""

    def run():
        with mock_cuda() as device, keeping([]):
            test(device)
            assert device.hazards == []

    run.__name__ = test.__name__
    return run


def message_through_host():
    return StageMessage(StageLayout([torch.zeros(3)]), CUDA, through_host=True)


def is_done(device, stream):
    """Whether the host knows that all of a stream's work is done."""
    return device.host.get(stream.stream_id, 0) >= stream.seen[stream.stream_id]


@on_the_mock
def test_what_is_sent_is_on_the_host_before_anybody_may_send_it(device):
    message, lane = message_through_host(), torch.cuda.Stream()
    with torch.cuda.stream(lane):
        message.memory.fill_(7)
        assert not is_done(device, lane)
        message.to_wire()
    assert is_done(device, lane)
    assert message.wire.is_pinned()
    assert not message.wire.is_cuda
    assert message.wire.unique().tolist() == [7]


@on_the_mock
def test_what_was_received_has_left_the_host_before_the_network_may_write_there_again(device):
    message, lane, compute = message_through_host(), torch.cuda.Stream(), torch.cuda.Stream()
    message.wire.fill_(5)
    with torch.cuda.stream(lane):
        message.from_wire()
        message.read = Mark(CUDA)
        assert not is_done(device, lane)  # nobody has waited so far
    with torch.cuda.stream(compute):
        message.use_again()
        message.memory.zero_()  # no hazard: this stream follows
    assert is_done(device, lane)


@on_the_mock
def test_memory_is_written_again_when_compute_has_read_it_and_the_host_does_not_wait(device):
    message, compute, lane = StageMessage(StageLayout([torch.zeros(3)]), CUDA), torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(compute):
        message.memory.clone()
        message.read = Mark(CUDA)
    with torch.cuda.stream(lane), device.counting() as waits:
        message.use_again()
        message.memory.zero_()  # no hazard: this stream follows
    assert waits == []


@on_the_mock
def test_notes_wait_where_they_are_read_and_are_those_of_when_they_were_taken(device):
    message = StageMessage(StageLayout([torch.zeros(3)]), CUDA)
    message.status.fill_(3)
    with device.counting() as waits:
        numbers = Numbers(message.status)
        message.status.fill_(4)
        there = numbers.on_device()
    assert waits == []
    with device.counting() as waits:
        assert numbers.tolist() == [3] * STATUS_NUMBERS
    assert [each.kind for each in waits] == ["Event.synchronize"]
    assert there.tolist() == [3] * STATUS_NUMBERS


class NoStore:
    def compare_set(self, *args):
        return b""


@on_the_mock
def test_a_ranks_notes_are_made_without_a_wait_and_say_what_they_say_on_the_host(device):
    def status(where, bad):
        requests = Requests(NoStore(), 3, "run")
        requests.ask("terminate", "because")
        return requests.status(4, bad, where, asking=True, batch=5, rate=0.5)

    bad = torch.ones((), dtype=torch.float64, device=CUDA)
    with device.counting() as waits:
        there = status(CUDA, bad)
    assert waits == []
    assert there.tolist() == status(torch.device("cpu"), torch.ones((), dtype=torch.float64)).tolist()


@pytest.mark.parametrize(
    ("clipping", "kinds"),
    [
        *itertools.product((Clipping(0.5), Clipping(50.0), Clipping(0.5, "previous_norm")), (SAME, DIFFERENT)),
        (Clipping(value=1.0), SAME),
    ],
)
def test_gradients_are_clipped_on_a_device_without_a_wait(clipping, kinds):
    def gradients(device):
        generator = torch.Generator().manual_seed(0)
        sizes = ((3, 4), (0,), (7,))
        return [
            torch.randn(size, generator=generator).to(device, kind) for size, kind in zip(sizes, kinds, strict=True)
        ]

    def clipped(device):
        there = [None, *gradients(device)]
        square = squared_norm(there)
        clip_(clipping, square, whole_norm([square, 2.0]), there)
        return there[1:], square

    with mock_cuda() as device:
        there = gradients(CUDA)
        with device.counting() as waits:
            square = squared_norm([None, *there])
            clip_(clipping, square, whole_norm([square, 2.0]), [None, *there])
        assert waits == []
        assert device.hazards == []
        there, square = [each.cpu() for each in there], square.item()
    expected, expected_square = clipped(torch.device("cpu"))
    assert square == pytest.approx(expected_square, rel=1e-15)
    for one, other in zip(there, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6 if one.dtype != torch.bfloat16 else 1e-2, atol=0)


@on_the_mock
def test_a_norm_that_is_not_a_number_leaves_gradients_as_they_are(device):
    gradients = [torch.tensor([float("nan"), 2.0]), torch.tensor([3.0])]
    there = [each.cuda() for each in gradients]
    for parts in (gradients, there):
        clip_(Clipping(1.0), squared_norm(parts), None, parts)
        assert parts[0][1].item() == 2
        assert parts[1].item() == 3


@pytest.mark.parametrize("clip_by", ["stage", "previous_norm"])
def test_a_trial_of_the_delay_and_the_engine_wait_once_a_step(clip_by):
    def run(device, train):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)).to(device)
        batches = [(torch.ones(2, 3) * k).to(device) for k in range(9)]
        found = train(net, batches)
        return found.losses, [each.detach().cpu() for each in net.parameters()]

    def error(output):
        return output.square().mean()

    def delayed(net, batches):
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
        settings = {"workers": 3, "stages": 3, "clip_norm": 0.1, "clip_by": clip_by}
        return simulate_delay(net, batches, lambda net, x: error(net(x)), optimizer, **settings)

    def engine(net, batches):
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
        return CyclicEngine(net, optimizer).run(batches, lambda output, x: error(output))

    for train in (delayed, engine):
        losses, parameters = run("cpu", train)
        with mock_cuda() as device:
            losses_there, there = run("cuda", train)
            waits = [each.kind for each in device.waits if each.own and "optimizer/trial" not in each.where]
        assert waits == ["tolist"] * 3  # of 3 steps
        assert losses_there == losses
        assert all(torch.equal(one, other) for one, other in zip(there, parameters, strict=True))


def _many_untrained(rank):
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(20)))
    with mock_cuda() as device:
        net.to("cuda")
        recorder = Recorder(CommLedger())
        untrained = UntrainedParameters(net, net[0].parameters())
        with torch.no_grad():
            net[5].weight.add_(rank + 1.0)
        with device.counting() as waits:
            untrained.bring_together(recorder)
        by_bytes = [each.kind for each in waits if "cyclic/untrained" in each.where]
        torch.cuda.synchronize()
        return by_bytes, [each.detach().cpu().tolist() for each in net[5].parameters()]


def test_parameters_that_no_stage_has_are_compared_in_one_wait():
    found = start_ranks(_many_untrained, world_size=2)
    assert [waits for waits, _ in found] == [["tolist"]] * 2
    assert found[0][1] == found[1][1]
