"""Snapshots of parameters: any change where the mean was largest is noticed, in place or not; no change never."""

import pytest
import torch
from torch import nn

from lightning_comm.ondevice.parameter_snapshots import ParameterSnapshots, in_memory, places_of_largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_largest_magnitude_is_among_the_places(dtype):
    for count in (1, 7, 1024, 1025, 5000):
        row = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)
        for one in (row, -row.abs(), row.abs()):
            assert one[places_of_largest(one)].abs().max() == one.abs().max()
    assert places_of_largest(torch.zeros(0)).tolist() == []


CHANGES = {
    "in place": lambda p, step: p.sub_(step),
    "through data": lambda p, step: p.data.sub_(step),
    "new data": lambda p, step: setattr(p, "data", p.data - step),
    "in place, by nothing": lambda p, step: p.mul_(1),  # torch counts it, and in doubt it was a step
}


@pytest.mark.parametrize("layout", ["own", "transposed", "channels_last", "gaps"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_step_in_one_entry_is_noticed_however_the_parameter_lies_in_memory(layout, change):
    value = {
        "own": torch.ones(6, 4, 5, 20),
        "transposed": torch.ones(20, 5, 4, 6).permute(3, 2, 1, 0),
        "channels_last": torch.ones(6, 4, 5, 20).to(memory_format=torch.channels_last),
        "gaps": torch.ones(6, 4, 5, 40)[..., ::2],
    }[layout]
    parameter = nn.Parameter(value)
    step = torch.zeros_like(parameter)
    step[3, 2, 1, 7] = -0.5
    snapshots = ParameterSnapshots({"p": parameter})
    snapshots.take("p", in_memory(step))
    assert not snapshots.changed(["p"])
    with torch.no_grad():
        CHANGES[change](parameter, step)
    assert snapshots.changed(["p"])
    snapshots.renew()
    assert not snapshots.changed(["p"])


def test_the_first_mean_since_a_step_is_noted_beside_the_last_one():
    parameter = nn.Parameter(torch.zeros(3))
    snapshots = ParameterSnapshots({"p": parameter})
    for place in (0, 1, 2):
        snapshots.take("p", torch.eye(3)[place])
    for place, changed in ((0, True), (1, False), (2, True)):
        parameter.data[place] += 1
        assert bool(snapshots.changed(["p"])) == changed
        parameter.data[place] -= 1
    snapshots.keep(())
    parameter.data[0] += 1
    assert not snapshots.changed(["p"])
