"""Buffers become equal on all ranks: the mean in the order of ranks, or rank 0's."""

import torch
from support.processes import start_ranks
from torch import nn

from lightning_comm.core.ledger import CommLedger
from lightning_comm.transport.cyclic.buffers import average_buffers
from lightning_comm.transport.recording import Recorder


def _average(rank):
    module = nn.Module()
    module.register_buffer("apart", torch.tensor([[0.1, 0.7]], dtype=torch.float64) * (rank + 1))
    module.register_buffer("equal", torch.tensor(0.1, dtype=torch.float64))
    module.register_buffer("single", torch.tensor([0.3 * rank]))
    module.register_buffer("count", torch.tensor(5 + rank))
    module.register_buffer("empty", torch.empty(0))
    ledger = CommLedger()
    average_buffers(module, Recorder(ledger))
    return [each.tolist() for each in module.buffers()], ledger.payload_bytes("buffers")


def test_floating_point_buffers_are_averaged_and_others_are_those_of_rank_0():
    answers = start_ranks(_average, world_size=3)
    parts = [torch.tensor([[0.1, 0.7]], dtype=torch.float64) * (rank + 1) for rank in range(3)]
    mean = ((parts[0] + parts[1]) + parts[2]) / 3
    single = ((torch.tensor([0.0]) + torch.tensor([0.3])) + torch.tensor([0.6])) / 3
    assert all(buffers == [mean.tolist(), 0.1, single.tolist(), 5, []] for buffers, _ in answers)
    assert all(sent > 0 for _, sent in answers)


def test_a_module_without_buffers_sends_nothing():
    def alone(rank):
        ledger = CommLedger()
        average_buffers(nn.Linear(2, 2), Recorder(ledger))
        return len(ledger.records)

    assert start_ranks(alone, world_size=2) == [0, 0]
