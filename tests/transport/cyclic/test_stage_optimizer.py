"""A rank's part of an optimizer updates its stages as the whole optimizer would, with the settings of their step."""

import copy

import pytest
import torch
from torch import nn

from lightning_comm.ondevice.cyclic.update import Clipping
from lightning_comm.transport.cyclic.messages import StageLayout, StageMessage
from lightning_comm.transport.cyclic.stage_optimizer import SQUARED_NORM, StageOptimizer


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 1)).double()


def grouped(net):
    groups = [{"params": list(net[0].parameters()), "lr": 0.1}, {"params": list(net[1:].parameters())}]
    return torch.optim.AdamW(groups, 0.01)


def message_of(module, step):
    parameters = list(module.parameters())
    message = StageMessage(StageLayout(parameters), torch.device("cpu"))
    generator = torch.Generator().manual_seed(step)
    for part in message.parts:
        part.copy_(torch.randn(part.shape, generator=generator, dtype=part.dtype))
    return message


def stage_optimizer(net, optimizer, owned, previous_norm=lambda step: None):
    return StageOptimizer(optimizer, {stage: list(net[stage].parameters()) for stage in owned}, previous_norm)


@torch.no_grad()
def test_owned_stages_become_what_the_whole_optimizer_makes_of_them_and_compute_sees_nothing():
    net, whole = network(), network()
    optimizer, expected = grouped(net), grouped(whole)
    before = [each.clone() for each in net.parameters()]
    part = stage_optimizer(net, optimizer, (0, 2))
    for step in range(3):
        for each in (optimizer, expected):
            for group in each.param_groups:
                group["lr"] *= 0.5
        part.note_settings(step, Clipping())
        for stage in (2, 0):
            message = message_of(net[stage], step)
            for parameter, gradient in zip(whole[stage].parameters(), message.parts, strict=True):
                parameter.grad = gradient.clone()
            part.update(step, stage, message)
            updated = message.parts
            if stage == 0:
                expected.step()
                pairs = zip(updated, whole[0].parameters(), strict=True)
                assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))
    assert not optimizer.state
    ours, theirs = part.own_state(), expected.state_dict()["state"]
    assert sorted(ours) == [0, 1, 4, 5]
    assert all(torch.equal(ours[k][key], theirs[k][key]) for k in ours for key in theirs[k])
    assert part.state_bytes() == 2 * 8 * (12 + 4 + 2 + 1) + 4 * 4


def test_the_settings_of_a_gradients_step_count_though_a_scheduler_went_on():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    part = stage_optimizer(net, optimizer, (1,))
    part.note_settings(0, Clipping())
    optimizer.param_groups[0]["lr"] = 0.0
    part.note_settings(1, Clipping())
    message = message_of(net[1], 0)
    expected = [p.detach() - g for p, g in zip(net[1].parameters(), message.parts, strict=True)]
    with torch.no_grad():
        part.update(0, 1, message)
    assert all(torch.equal(a, b) for a, b in zip(message.parts, expected, strict=True))


@torch.no_grad()
def test_restored_state_is_shared_out_and_goes_on():
    net = network()
    optimizer = grouped(net)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict()["state"])
    part = stage_optimizer(net, optimizer, (1,))
    assert sorted(part.own_state()) == [2, 3]
    assert all(torch.equal(part.own_state()[k][key], saved[k][key]) for k in (2, 3) for key in saved[k])
    assert not optimizer.state


@pytest.mark.parametrize(
    ("clipping", "previous", "expected"),
    [
        (Clipping(1.0, "stage"), 9.0, [0.6, 0.8]),
        (Clipping(1.0, "previous_norm"), 4.0, [0.75, 1.0]),
        (Clipping(value=3.5), 9.0, [3.0, 3.5]),
    ],
)
def test_clipping_scales_by_the_norm_that_was_named_and_bounds_entries(clipping, previous, expected):
    net = network()
    part = stage_optimizer(net, torch.optim.SGD(net.parameters(), 1.0), (2,), lambda step: previous)
    message = StageMessage(StageLayout(list(net[2].parameters())), torch.device("cpu"))
    message.parts[0].copy_(torch.tensor([[3.0, 4.0]]))
    message.parts[1].zero_()
    part.note_settings(0, clipping)
    with torch.no_grad():
        part.update(0, 2, message)
    assert message.status[SQUARED_NORM] == 25  # before clipping
    moved = net[2].weight.detach() - message.parts[0]
    torch.testing.assert_close(moved, torch.tensor([expected], dtype=torch.float64))
