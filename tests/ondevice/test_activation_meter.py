"""The meter against what autograd is known to save, and the counter that several processes share."""

import gc
import multiprocessing
import pickle

import pytest
import torch
from torch import nn

from lightning_comm.ondevice.activation_meter import ActivationMeter, SharedCounter

ROWS, WIDTH = 6, 10
UNIT = 4 * ROWS * WIDTH  # bytes of one activation in fp32


class Shift(nn.Module):
    """Saves one activation, its output, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.bias).tanh()


def inputs(rows: int = ROWS) -> torch.Tensor:
    return torch.ones(rows, WIDTH)


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_each_saved_activation_counts_from_forward_to_its_own_backward(depth):
    network = nn.Sequential(*(Shift() for _ in range(depth)))
    with ActivationMeter(network, timeline=True) as meter:
        for _ in range(2):
            network(inputs()).sum().backward()
            assert meter.live_bytes == 0
    assert meter.peak_bytes == depth * UNIT
    climb = [*range(1, depth + 1), *range(depth - 1, -1, -1)]
    assert [size for _, size in meter.timeline] == [UNIT * each for each in 2 * climb]
    assert sorted(at for at, _ in meter.timeline) == [at for at, _ in meter.timeline]


def test_a_storage_that_several_functions_save_counts_once_and_until_the_last_lets_go():
    x = torch.ones(ROWS, WIDTH, requires_grad=True)
    with ActivationMeter() as meter:
        y = x.tanh()
        parts = [y[:2].exp().sum(), (y * y).sum(), y.view(-1).sin().sum()]  # of these only exp saves its own output
        assert meter.live_bytes == UNIT + 2 * UNIT // ROWS
        while parts:
            parts.pop()
            gc.collect()
        assert meter.live_bytes == UNIT  # tanh saved it as well
        del y
        gc.collect()
    assert meter.live_bytes == 0


def test_parameters_and_buffers_do_not_count_even_when_saved_as_views():
    network = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    with ActivationMeter(network) as meter:
        loss = network(inputs().requires_grad_()).sum()
        inside = meter.live_bytes
    with ActivationMeter() as naive:
        network(inputs().requires_grad_()).sum()
    assert inside == 2 * UNIT + 2 * 4 * WIDTH  # the inputs of both layers; mean and deviation of the batch
    assert naive.peak_bytes > inside
    loss.backward()


def test_a_parameter_that_moves_to_another_storage_goes_on_being_left_out():
    network = nn.Linear(WIDTH, WIDTH)
    with ActivationMeter(network) as meter:
        for _ in range(5):
            network.weight.data = network.weight.data.clone()
            network(inputs().requires_grad_()).sum().backward()
    assert meter.peak_bytes == UNIT


def test_tensors_that_a_function_names_do_not_count():
    extra = [torch.ones(ROWS, WIDTH)]
    x = inputs().requires_grad_()
    with ActivationMeter(lambda: extra) as meter:
        y = (x * extra[0]).sum()
        assert meter.live_bytes == 0
        z = (x * torch.ones(ROWS, WIDTH)).sum()
        assert meter.live_bytes == UNIT
        del y, z


def test_the_graph_gives_the_gradients_that_it_gives_without_a_meter():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    x = torch.randn(4, 1, 6, 6)
    network(x).square().mean().backward()
    expected = [parameter.grad for parameter in network.parameters()]
    network.zero_grad()
    with ActivationMeter(network):
        network(x).square().mean().backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(expected, network.parameters(), strict=True))


def test_a_peak_can_be_looked_for_anew():
    network = Shift()
    with ActivationMeter(network, timeline=True) as meter:
        network(inputs(5 * ROWS)).sum().backward()
        meter.reset_peak()
        network(inputs()).sum().backward()
    assert meter.peak_bytes == UNIT
    assert [size for _, size in meter.timeline] == [0, UNIT, 0]


def test_a_graph_that_outlives_the_context_is_still_taken_off():
    with ActivationMeter() as meter:
        loss = Shift()(inputs()).sum()
    assert meter.live_bytes == UNIT
    del loss
    gc.collect()
    assert meter.live_bytes == 0


# ---- several processes ---------------------------------------------------------------------------------------------


def _adds(counter, times):
    for _ in range(times):
        counter.add(3)
        counter.add(-2)


def _measures(counter, ready, may_end):
    network = nn.Sequential(Shift(), Shift())
    with ActivationMeter(network, shared=counter):
        loss = network(inputs()).sum()
        ready.wait(30)  # here every process holds two activations
        loss.backward()
    may_end.wait(30)


def started(target, args_of, count):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=args_of(context)) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_no_addition_of_any_process_is_lost(tmp_path):
    counter = SharedCounter(tmp_path / "bytes")
    again = pickle.dumps(counter)
    assert started(_adds, lambda context: (counter, 2000), 3) == [0, 0, 0]
    assert counter.value == 6000
    assert 6000 <= counter.peak <= 6000 + 3 * 2
    assert pickle.loads(again).add(-1000) == 5000
    counter.reset_peak()
    assert (counter.value, counter.peak) == (5000, 5000)


def test_the_peak_of_several_processes_is_that_of_their_sum(tmp_path):
    counter = SharedCounter(tmp_path / "bytes")
    context = multiprocessing.get_context("fork")
    barriers = (context.Barrier(3), context.Barrier(3))
    assert started(_measures, lambda _: (counter, *barriers), 3) == [0, 0, 0]
    assert (counter.peak, counter.value) == (3 * 2 * UNIT, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_activations_on_a_gpu_count_alike():
    network = nn.Sequential(*(Shift() for _ in range(4))).cuda()
    with ActivationMeter(network) as meter:
        network(inputs().cuda()).sum().backward()
        assert meter.live_bytes == 0
    assert meter.peak_bytes == 4 * UNIT
