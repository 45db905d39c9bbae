"""Busy time is a rank's own: a slow rank, whose all-reduce the others wait for, leaves theirs as it was."""

import itertools
import time

import pytest
import torch
from support.device_time import DeviceTime
from support.grids import few_of
from support.processes import start_ranks
from torch.nn.parallel import DistributedDataParallel

from lightning_comm.instruments.busy_time import BusyTimer
from lightning_comm.ondevice import device_clock

PAUSE_S = 0.2


class Net(torch.nn.Module):
    """Sleeps in the forward, and in the backward before its first layer's gradient."""

    def __init__(self, forward_s: float, backward_s: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(50, 50), torch.nn.Linear(50, 50)
        self.forward_s, self.backward_s = forward_s, backward_s

    def forward(self, x):
        time.sleep(self.forward_s)
        hidden = self.first(x)
        hidden.register_hook(lambda gradient: time.sleep(self.backward_s))
        return self.second(hidden)


def _train(rank, slow, settings):
    net = Net(PAUSE_S / 2 if rank == slow else 0.0, PAUSE_S / 2 if rank == slow else 0.0)
    ddp = DistributedDataParallel(net, bucket_cap_mb=0.001, **settings)
    timer, returned_s, ready_s = BusyTimer(torch.device("cpu")), [], []
    last = [0.0]
    for parameter in net.parameters():
        parameter.register_hook(lambda gradient: last.__setitem__(0, time.monotonic()))
    for step in range(4):
        started = time.monotonic()
        timer.begin(step, started, 0.0)
        loss = ddp(torch.ones(3, 50)).sum()
        timer.before_backward(loss)
        loss.backward()
        timer.after_backward()
        timer.end()
        returned_s.append(time.monotonic() - started)
        ready_s.append(last[0] - started)
    return [busy.seconds for busy in timer.take()], returned_s, ready_s


@pytest.mark.parametrize(
    ("slow", "settings"),
    few_of(itertools.product([0, 1], [{}, {"find_unused_parameters": True}, {"static_graph": True}]), 0, 4, 5),
    ids=str,
)
def test_the_wait_for_a_slow_rank_is_no_busy_time(slow, settings):
    answers = start_ranks(_train, slow, settings, world_size=2)
    for rank, (busy, returned, ready) in enumerate(answers):
        assert len(busy) == 4
        assert all(seconds > PAUSE_S for seconds in returned[1:])  # on both ranks, so `backward` tells them not apart
        for measured, last_gradient in zip(busy, ready, strict=True):
            assert abs(measured - last_gradient) < 0.02
        assert all((seconds > PAUSE_S) == (rank == slow) for seconds in busy[1:])


def test_what_happens_between_two_backwards_counts_and_what_follows_the_last_does_not():
    timer, weight = BusyTimer(torch.device("cpu")), torch.ones(2, requires_grad=True)
    timer.begin("several", time.monotonic(), 0.0)
    for _ in range(2):
        time.sleep(0.05)
        loss = weight.sum()
        timer.before_backward(loss)
        loss.backward()
        time.sleep(0.2)  # a wait for others, before `backward` returns
        timer.after_backward()
    time.sleep(0.2)
    timer.end()
    [busy] = timer.take()
    assert 0.1 <= busy.seconds < 0.19
    assert timer.take() == []


def test_the_time_before_the_data_arrived_counts_and_is_told():
    timer, weight = BusyTimer(torch.device("cpu")), torch.ones(2, requires_grad=True)
    timer.begin("fetched", time.monotonic() - 3.0, 3.0)
    timer.before_backward(loss := weight.sum())
    loss.backward()
    timer.after_backward()
    timer.end()
    [busy] = timer.take()
    assert busy.key == "fetched"
    assert busy.fetch_s == 3.0
    assert 3.0 <= busy.seconds < 3.1


def test_somebody_who_hears_of_the_last_gradient_earlier_is_believed():
    timer, weight = BusyTimer(torch.device("cpu")), torch.ones(2, requires_grad=True)

    def hook(gradient):
        timer.gradients_ready()
        time.sleep(0.2)  # such as a hook of DDP's that waits for the messages in its body

    weight.register_hook(hook)
    timer.begin("early", time.monotonic(), 0.0)
    timer.before_backward(loss := weight.sum())
    loss.backward()
    timer.after_backward()
    timer.end()
    assert timer.take()[0].seconds < 0.1


def test_a_batch_without_a_backward_or_with_a_loss_of_no_gradient_is_not_measured():
    timer = BusyTimer(torch.device("cpu"))
    timer.begin(0, time.monotonic(), 0.0)
    timer.before_backward(torch.ones(1))
    timer.end()
    assert timer.take() == []


def _batches_on_a_gpu(monkeypatch, fetch_s, compute_s, enqueue_s, batches=5):
    """A loop whose host fetches, and queues forward, backward and optimizer; the loss is a plain tensor."""
    device = DeviceTime(monkeypatch, device_clock)
    timer, weight = BusyTimer(torch.device("cuda")), torch.ones(2, requires_grad=True)
    weight.register_hook(lambda gradient: device.queue(compute_s / 2))
    taken = []
    for batch in range(batches):
        started = device.now_s
        device.host(fetch_s)
        timer.begin(batch, started, fetch_s)
        device.host(enqueue_s)
        device.queue(compute_s / 2)
        timer.before_backward(loss := weight.sum())
        loss.backward()
        device.queue(0.3)  # DDP lets the stream wait for the messages
        timer.after_backward()
        device.queue(0.1)  # the optimizer
        timer.end()
        taken += timer.take()
    waits = device.waits
    device.host(1000.0)
    return taken, taken + timer.take(), waits


def test_on_a_gpu_the_busy_time_is_the_devices_and_messages_and_optimizer_are_no_part_of_it(monkeypatch):
    early, taken, waits = _batches_on_a_gpu(monkeypatch, fetch_s=0.0, compute_s=2.0, enqueue_s=0.01)
    assert early == [], "the host is far ahead"
    assert [busy.key for busy in taken] == list(range(5))
    # the first has nothing before it, so there the device waits for what is queued
    assert [busy.seconds for busy in taken] == pytest.approx([2.01, 2.0, 2.0, 2.0, 2.0])
    assert waits == 0


def test_on_a_gpu_data_that_come_while_the_device_computes_cost_nothing(monkeypatch):
    _, taken, waits = _batches_on_a_gpu(monkeypatch, fetch_s=1.0, compute_s=2.0, enqueue_s=0.01)
    assert [round(busy.fetch_s, 6) for busy in taken] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert [round(busy.seconds, 2) for busy in taken[1:]] == [2.0] * 4
    assert waits == 0


def test_on_a_gpu_data_that_come_late_cost_what_the_device_stood_still(monkeypatch):
    _, taken, _ = _batches_on_a_gpu(monkeypatch, fetch_s=3.0, compute_s=2.0, enqueue_s=0.01)
    # done with a batch 2.4 s after it was queued, so that 0.6 s of the next 3.0 are waited for, less the queueing
    assert [round(busy.fetch_s, 2) for busy in taken[1:]] == [0.6] * 4
    assert [round(busy.seconds, 2) for busy in taken[1:]] == [2.61] * 4


def test_on_a_gpu_what_the_host_spent_on_messages_is_not_taken_off_the_devices_time(monkeypatch):
    device = DeviceTime(monkeypatch, device_clock)
    timer, weight = BusyTimer(torch.device("cuda")), torch.ones(2, requires_grad=True)
    weight.register_hook(lambda gradient: timer.gradients_ready(0.75))
    timer.begin(0, 0.0, 0.0)
    device.queue(2.0)
    timer.before_backward(loss := weight.sum())
    loss.backward()
    device.host(5.0)
    assert [busy.seconds for busy in timer.take()] == []
    timer.end()
    assert [busy.seconds for busy in timer.take()] == [2.0]
