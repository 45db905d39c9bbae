"""Modules are traced in the order in which they run, kept whole, and cut where they were told."""

import pytest
import torch
from support.cyclic import deep
from torch import nn

from lightning_comm.ondevice.cyclic.stages import ForwardTrace, cut, cut_at


def traced(net, x=None, parameters=None):
    trace = ForwardTrace(net, net.parameters() if parameters is None else parameters)
    net(torch.zeros(2, 5, dtype=torch.float64) if x is None else x)
    return trace.units()


class Backwards(nn.Module):
    def __init__(self):
        super().__init__()
        self.last, self.first = nn.Linear(5, 5).double(), nn.Linear(5, 5).double()

    def forward(self, x):
        return self.last(self.first(x))


def test_units_come_in_the_order_of_execution():
    assert [unit.module for unit in traced(Backwards())] == ["first", "last"]


def test_each_trained_parameter_is_in_one_unit_and_frozen_ones_are_in_none():
    net = deep(6)
    net[2].requires_grad_(False)
    units = traced(net, parameters=[each for each in net.parameters() if each.requires_grad])
    names = [name for unit in units for name in unit.parameters]
    assert sorted(names) == sorted(name for name, each in net.named_parameters() if each.requires_grad)


def test_a_tied_weight_belongs_to_its_first_use():
    net = deep(6)
    net[8].weight = net[4].weight
    units = {unit.module: unit.parameters for unit in traced(net)}
    assert units["4"] == ("4.weight", "4.bias")
    assert units["8"] == ("8.bias",)


def test_parameters_of_modules_that_are_not_called_belong_to_the_nearest_that_is():
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    net = nn.ModuleDict({"attend": attention})
    trace = ForwardTrace(net, net.parameters())
    tokens = torch.zeros(1, 3, 4)
    attention(tokens, tokens, tokens)
    (unit,) = trace.units()
    assert unit.module == "attend"
    assert "attend.out_proj.weight" in unit.parameters


def test_a_cut_keeps_the_order_and_loses_nothing():
    units = traced(deep(8))
    for count in (1, 2, 4, 8):
        stages = cut(units, count)
        assert len(stages) == count
        assert [each for stage in stages for each in stage.modules] == [unit.module for unit in units]
        assert [each for stage in stages for each in stage.parameters] == [n for u in units for n in u.parameters]


def test_a_cut_by_names_begins_where_they_say():
    stages = cut_at(traced(deep(6)), ["2", "8"], "Test")
    assert [stage.modules for stage in stages] == [("0", "2", "4", "6"), ("8", "10")]


@pytest.mark.parametrize(("names", "words"), [(["0", "3"], "'3'"), (["4", "2"], "order")])
def test_names_that_cannot_be_cut_at_are_refused_with_those_that_can(names, words):
    with pytest.raises(ValueError, match=words) as caught:
        cut_at(traced(deep(6)), names, "Test")
    assert str(caught.value).startswith("Test: `stages`")
    assert "0, 2, 4, 6, 8, 10" in str(caught.value)
