"""Fits on tensors that say they are on a CUDA device: those of the CPU bit for bit, and no wait within a backward."""

import os
from collections import Counter
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from support.cyclic import adamw, cyclic, deep, momentum
from support.mock_cuda import MockCuda, mock_cuda
from support.processes import start_ranks
from support.training import Regression, loader, trainer

from lightning_comm.strategies.cyclic import strategy as strategy_file
from lightning_comm.transport.cyclic import groups

STEPS, STAGES, VALIDATED_EVERY = 6, 6, 3
ONE_A_HOST = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "here"}


class SeveralStreams(Regression):
    """Weights whose gradients come in another stream than those of biases, as where layers run beside each other."""

    def __init__(self, *args):
        super().__init__(*args)
        for parameter in self.parameters():
            parameter.register_post_accumulate_grad_hook(self.scale)

    def on_fit_start(self):
        self.streams = [torch.cuda.current_stream(), torch.cuda.Stream()] if self.device.type == "cuda" else []

    def scale(self, parameter):
        if self.streams:
            here, there = self.streams
            here.wait_stream(there)
            there.wait_stream(here)  # autograd sees to what a stream needs of others
            torch.cuda.set_stream(there if parameter.ndim > 1 else here)
        parameter.grad.mul_(1.5)

    def on_after_backward(self):
        if self.streams:
            self.streams[0].wait_stream(self.streams[1])
            torch.cuda.set_stream(self.streams[0])


def rate_on_the_device(parameters):
    parameters = list(parameters)
    return torch.optim.SGD(parameters, torch.tensor(0.05, dtype=torch.float64, device=parameters[0].device))


def _fit(rank, optimizer, settings, **options):
    make = SeveralStreams if optimizer is rate_on_the_device else Regression
    module = make(deep(STAGES, norm=True), optimizer)
    strategy = cyclic(stages=STAGES, process_group_backend="gloo", **settings)
    runner = trainer(
        strategy, options.pop("devices"), val_check_interval=VALIDATED_EVERY, limit_val_batches=1, **options
    )
    runner.fit(module, loader(STEPS, rank), loader(1, 90 + rank))
    values = [each.detach().cpu().tolist() for each in module.state_dict().values()]
    return values, {purpose: strategy.ledger.payload_bytes(purpose) for purpose in ("gradients", "parameters")}


def _sends_read(device, stream, kind, read, written):
    """What is sent is read, and may be read by others meanwhile; only what is received is written."""
    sends = kind.startswith("send")
    _work(device, stream, kind, [*read, *written] if sends else read, [] if sends else written)


_work = MockCuda.work


def _both(rank, world_size, optimizer, settings, nccl):
    on_host = _fit(rank, optimizer, settings, accelerator="cpu", devices=world_size)
    environment = {**ONE_A_HOST, **dict.fromkeys(("RANK", "GROUP_RANK", "NODE_RANK"), str(rank))}
    environment["WORLD_SIZE"] = str(world_size)
    with ExitStack() as stack:
        device = stack.enter_context(mock_cuda(p2p=nccl))
        stack.enter_context(mock.patch.object(torch.Tensor, "record_stream"))
        stack.enter_context(mock.patch.object(MockCuda, "work", _sends_read))
        stack.enter_context(mock.patch.dict(os.environ, environment))
        if nccl:  # messages that a stream follows, in order; carried by gloo all the same
            for file in (strategy_file, groups):
                stack.enter_context(mock.patch.object(file, "backend_of", return_value="nccl"))
        there = _fit(rank, optimizer, settings, accelerator="gpu", devices=[0], num_nodes=world_size)
    assert there == on_host
    assert device.hazards == []
    return [each for each in device.waits if each.own]


exhaustive = pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("world_size", "optimizer", "settings", "nccl"),
    [
        pytest.param(
            *(2, rate_on_the_device, {"clip_norm": 0.5, "clip_by": "stage"}, False),
            marks=pytest.mark.skipif(
                tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11),
                reason="torch 2.6 rounds a rate that is a tensor otherwise on a device, by 4e-18",
            ),
        ),
        (2, adamw, {"clip_norm": 0.5, "clip_by": "previous_norm", "rule": "v1"}, True),
        *(
            pytest.param(n, optimizer, {"clip_norm": 0.5, "clip_by": "previous_norm", **rule}, nccl, marks=exhaustive)
            for optimizer, rule, nccl in ((adamw, {}, False), (momentum, {"rule": "v1"}, True))
            for n in (2, 3)
        ),
    ],
)
def test_a_fit_on_a_device_is_that_of_the_host_and_backward_never_waits(world_size, optimizer, settings, nccl):
    for waits in start_ranks(_both, world_size, optimizer, settings, nccl, world_size=world_size, timeout_s=90):
        assert [each for each in waits if each.in_backward] == []
        # of the ring, compute waits for the status: after a step for that of two steps before, and in a flush for two
        ring = Counter(each.where.split(":")[0].split("/")[-1] for each in waits if each.thread == "MainThread")
        assert ring["messages.py"] == (STEPS - 2) + 2 * STEPS // VALIDATED_EVERY
        assert ring["ring.py"] == 1
        lanes = [each for each in waits if each.thread.startswith("lightning_comm")]
        assert (lanes == []) == nccl  # what goes through the host is waited for by lanes, and nothing else is
