"""Deadlines of layers against hand arithmetic, on modules whose multiply-adds are easily counted."""

import pytest
import torch
from torch import nn

from lightning_comm.lab.device.layer_times import Call, Pass, Weights, plan_step
from lightning_comm.lab.device.layers import PassRecorder, first_tensor, weights_of


def plan(module, *inputs):
    """Run a module once and plan the pass, with gradients for all parameters that require them."""
    recorder = PassRecorder()
    for name, layer in module.named_modules():
        if any(True for _ in layer.parameters(recurse=False)):
            layer.register_forward_pre_hook(lambda layer, inputs, name=name: recorder.begin(name))
            layer.register_forward_hook(
                lambda layer, inputs, output, name=name: recorder.end(name, layer, first_tensor(output)) and None
            )
    module(*inputs)
    recorder.seen.gradients.update(name for name, each in module.named_parameters() if each.requires_grad)
    (planned,) = plan_step([recorder.seen], weights_of(module))
    return planned


def test_a_layer_takes_time_by_its_multiply_adds_and_one_for_each_output():
    module = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 7))
    works = [4 * 5 * (3 + 1), 4 * 7 * (5 + 1)]
    planned = plan(module, torch.ones(4, 3))
    assert planned.forward == {("0", 0): works[0] / sum(works), ("2", 0): 1.0}
    assert planned.backward["2.weight"] == planned.backward["2.bias"] == pytest.approx(works[1] / sum(works))
    assert planned.backward["0.weight"] == 1.0


def test_a_convolution_counts_every_position_and_only_its_own_group():
    module = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6 * 2 * 2, 1))
    convolution = 2 * (2 * 2) * 6 * (2 * 3 * 3 + 1)  # samples, places, channels out, weights each sees and the output
    linear = 2 * (24 + 1)
    assert plan(module, torch.ones(2, 4, 4, 4)).forward["0", 0] == pytest.approx(convolution / (convolution + linear))


def test_a_lookup_costs_its_output_and_not_its_table():
    module = nn.Sequential(nn.Embedding(1000, 2), nn.Linear(2, 2))
    assert plan(module, torch.zeros(1, 3, dtype=torch.long)).forward["0", 0] == pytest.approx(6 / (6 + 18))


def test_attention_has_the_work_of_its_output_layer_which_it_never_calls():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    module = nn.Module()
    module.attention, module.last = attention, nn.Linear(8, 8)
    module.forward = lambda x: module.last(module.attention(x, x, x)[0])
    planned = plan(module, torch.ones(1, 5, 8))
    works = [5 * (4 * 8 * 8) + 40, 5 * 8 * 8 + 40]
    assert planned.forward["attention", 0] == pytest.approx(works[0] / sum(works))
    assert planned.backward["attention.out_proj.weight"] == 1.0


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.ones(1, 2))
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.second(self.first(x + self.offset))


def test_a_parameter_of_the_whole_gets_its_gradient_last_and_takes_no_time():
    planned = plan(Positions(), torch.ones(1, 2))
    assert planned.forward == {("first", 0): 0.5, ("second", 0): 1.0, ("", 0): 1.0}
    assert planned.backward["offset"] == 1.0
    assert planned.backward["second.weight"] == 0.5


def test_a_tied_weight_is_ready_when_its_first_use_is_done_backwards():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    module[3].weight = module[1].weight
    planned = plan(module, torch.ones(1, 2))
    assert planned.backward["1.weight"] == 0.75
    assert planned.backward["3.bias"] == 0.25


def test_a_layer_used_twice_has_two_deadlines_and_one_gradient():
    module = nn.Module()
    module.layer = nn.Linear(2, 2)
    module.forward = lambda x: module.layer(module.layer(x))
    planned = plan(module, torch.ones(1, 2))
    assert planned.forward == {("layer", 0): 0.5, ("layer", 1): 1.0}
    assert planned.backward == {"layer.weight": 1.0, "layer.bias": 1.0}


def test_backward_has_its_whole_time_where_the_first_layers_are_frozen():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    module[1].requires_grad_(False)
    planned = plan(module, torch.ones(1, 2))
    assert planned.backward == {"2.weight": 1.0, "2.bias": 1.0, "3.weight": 0.5, "3.bias": 0.5}
    assert planned.forward["1", 0] == 0.5


def test_passes_of_a_step_share_its_time_by_their_work():
    parameters = {"a.weight": Weights(("a",), 10), "b.weight": Weights(("b",), 30)}
    seen = [Pass([Call(layer, 0, 0, 1)], {f"{layer}.weight"}) for layer in "ab"]
    assert [each.share for each in plan_step(seen, parameters)] == [0.25, 0.75]


def test_a_pass_without_work_is_planned_all_the_same():
    (planned,) = plan_step([Pass([Call("a", 0, 0, 0)], {"a.weight"})], {"a.weight": Weights(("a",), 4)})
    assert (planned.share, planned.forward, planned.backward) == (1.0, {("a", 0): 1.0}, {"a.weight": 1.0})
