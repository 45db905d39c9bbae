"""The sequential reference against delayed gradients, plain data parallelism, and hand arithmetic."""

import copy
import itertools
import math
from functools import cache

import pytest
import torch
from support.delayed_gradients import Emulation
from support.grids import few_of
from torch import nn

from lightning_comm.ondevice.cyclic import simulate_delay
from lightning_comm.ondevice.cyclic.update import equal_stages

STEPS, FEATURES = 7, 5


def deep(norm: bool = False) -> nn.Sequential:
    """Twenty-six parameter tensors, so that every number of stages here can be had."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(13):
        layers += [nn.Linear(FEATURES, FEATURES), *([nn.BatchNorm1d(FEATURES)] if norm else []), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def micro_batches(count: int, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(4, FEATURES, generator=generator, dtype=torch.float64)
        yield x, x.roll(1, 1) * x


def error(network, batch):
    return nn.functional.mse_loss(network(batch[0]), batch[1])


def momentum(parameters):
    return torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=1e-2)


def adamw(parameters):
    return torch.optim.AdamW(parameters, 0.01, weight_decay=0.1)


def simulated(workers, stages, make=momentum, network=None, factor=None, **kwargs):
    network = deep() if network is None else network
    optimizer = make(network.parameters())
    if factor is not None:
        kwargs["scheduler"] = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    run = simulate_delay(
        network, micro_batches(workers * STEPS), error, optimizer, workers=workers, stages=stages, **kwargs
    )
    return network, run


def emulated(workers, stages, make=momentum, network=None, flush_after=(), **kwargs):
    network = deep() if network is None else network
    emulation = Emulation(network, equal_stages(network, stages), make, workers, **kwargs)
    batches, losses = list(micro_batches(workers * STEPS)), []
    for step in range(STEPS):
        losses.append(emulation.take_step(batches[workers * step : workers * (step + 1)], error))
        if step + 1 in flush_after:
            emulation.flush()
    emulation.flush()
    return emulation.models, tuple(losses)


@cache
def plain(workers, make=momentum):
    """Data parallelism: one step on the mean loss of the micro-batches."""
    network = deep()
    optimizer = make(network.parameters())
    batches = list(micro_batches(workers * STEPS))
    for step in range(STEPS):
        optimizer.zero_grad()
        (sum(error(network, each) for each in batches[workers * step : workers * (step + 1)]) / workers).backward()
        optimizer.step()
    return network


def state(network):
    return list(network.state_dict().values())


def equal(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(state(a), state(b), strict=True))


def farthest(a, b) -> float:
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


GRID = [(n, per_worker * n, {"rule": rule}) for rule in ("v1", "v2") for n in (2, 3, 4) for per_worker in (1, 2, 3)]
GRID += [(n, n, {"lag": 1}) for n in (2, 3, 4)] + [(4, 2, {"rule": "v2"}), (4, 4, {"lag": 3})]
# What an optimizer does to a stage depends on neither the number of stages nor that of workers, so AdamW is tried with
# three. Six workers do what four do, and the case with the most stages is tried.
RUNS = [(*each, momentum) for each in [*GRID, (6, 18, {"rule": "v2"})]]
RUNS += [(*each, adamw) for each in GRID if each[0] == 3]


@pytest.mark.parametrize(
    ("workers", "stages", "kwargs", "make"),
    # each rule and lag with each number of workers and of stages at least once, AdamW under both rules
    few_of(RUNS, 1, 3, 8, 9, 13, 16, 19, 21, 22, 24, 28),
)
def test_delayed_gradients_give_the_same_parameters_and_losses_bit_for_bit(workers, stages, kwargs, make):
    network, run = simulated(workers, stages, make, **kwargs)
    models, losses = emulated(workers, stages, make, **kwargs)
    assert all(equal(network, model) for model in models)
    assert run.losses == losses
    assert farthest(network, plain(workers, make)) > 1e-6  # a delay, or the lines above prove nothing


@pytest.mark.parametrize("rule", ["v1", "v2"])
@pytest.mark.parametrize(
    "kwargs",
    [{"flush_after": (2, 3, 5)}, {"factor": lambda step: 0.5**step}, {"flush_after": (4,), "network": True}],
    ids=["flushes", "schedule", "batch norm"],
)
def test_flushes_schedules_and_buffers_agree_with_delayed_gradients(rule, kwargs):
    if "network" in kwargs:
        kwargs = {**kwargs, "network": deep(norm=True)}
    models, losses = emulated(3, 6, rule=rule, **kwargs)
    network, run = simulated(3, 6, rule=rule, **kwargs)
    assert all(equal(network, model) for model in models)
    assert run.losses == losses
    assert run.flushes == (*kwargs.get("flush_after", ()), STEPS)


@pytest.mark.parametrize("warmup", [1, 3])
def test_a_warm_up_ends_as_the_delayed_gradients_say(warmup):
    models, _ = emulated(4, 4, warmup=warmup)
    network, _ = simulated(4, 4, warmup_sync_steps=warmup)
    assert all(equal(network, model) for model in models)


def test_a_flush_changes_the_trajectory():
    assert farthest(simulated(4, 4)[0], simulated(4, 4, flush_after=(3,))[0]) > 1e-6


@pytest.mark.parametrize("make", [momentum, adamw])
def test_an_endless_warm_up_is_plain_data_parallelism(make):
    network, _ = simulated(4, 4, make, warmup_sync_steps=10**6)
    assert farthest(network, plain(4, make)) < 1e-12


def test_one_worker_is_plain_training_bit_for_bit():
    network, _ = simulated(1, 3)
    assert equal(network, plain(1))


def test_v1_is_further_from_plain_data_parallelism_than_v2_in_the_first_delayed_step():
    start, parts = deep(), []
    for kwargs in ({"rule": "v1"}, {"rule": "v2"}):
        network, _ = simulated(4, 4, network=copy.deepcopy(start), max_steps=2, **kwargs)
        parts.append(farthest(network, simulated(4, 4, warmup_sync_steps=9, max_steps=2)[0]))
    assert parts[0] != parts[1]
    assert min(parts) > 0


def test_arrival_adds_in_another_order_than_the_ring():
    ring, arrival = simulated(3, 3)[0], simulated(3, 3, addition="arrival")[0]
    assert not equal(ring, arrival)
    assert farthest(ring, arrival) < 1e-12


# ---- clipping ------------------------------------------------------------------------------------------------------


class Line(nn.Module):
    """The loss of a micro-batch is its product with the parameters, so that this is the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(2, dtype=torch.float64))


def slope(network, batch):
    return (network.a * batch[:2]).sum() + (network.b * batch[2:]).sum()


def moved(gradients, **kwargs):
    """How far each step moved each stage, with a learning rate of 1."""
    network = Line()
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    seen = [torch.zeros(4, dtype=torch.float64)]

    def note(step):
        seen.append(torch.cat([network.a.detach(), network.b.detach()]))

    batches = [torch.tensor(each, dtype=torch.float64) for each in gradients for _ in range(2)]
    simulate_delay(network, batches, slope, optimizer, workers=2, stages=2, on_step=note, **kwargs)
    return [(before - after).tolist() for before, after in itertools.pairwise(seen)]


GRADIENTS = [[3.0, 4.0, 0.3, 0.4], [6.0, 8.0, 0.0, 0.0], [0.6, 0.8, 5.0, 12.0]]


def test_clipping_by_stage_scales_each_stage_by_its_own_norm():
    first, second, third = moved(GRADIENTS, clip_norm=2.0)
    assert first == pytest.approx([1.2, 1.6, 0.3, 0.4])
    assert second == pytest.approx([1.2, 1.6, 0.0, 0.0])
    assert third == pytest.approx([0.6, 0.8, 10 / 13, 24 / 13])


def test_clipping_by_the_previous_norm_scales_all_by_the_norm_of_the_step_before():
    first, second, third = moved(GRADIENTS, clip_norm=2.0, clip_by="previous_norm")
    assert first == pytest.approx([1.2, 1.6, 0.3, 0.4])  # the first step by stage
    assert second == pytest.approx([2 / math.sqrt(25.25) * each for each in GRADIENTS[1]])  # the norm before clipping
    assert third == pytest.approx([0.2 * each for each in GRADIENTS[2]])


def test_a_parameter_that_no_worker_uses_is_left_alone_and_one_that_some_use_is_not():
    network = Line()
    optimizer = torch.optim.SGD(network.parameters(), 1.0)

    def only_a(network, batch):
        return network.a.sum() if batch else network.a.sum() * 0 + network.b.sum()

    simulate_delay(network, [1, 1], only_a, optimizer, workers=2, stages=2)
    assert network.b.tolist() == [0, 0]
    simulate_delay(network, [1, 0], only_a, optimizer, workers=2, stages=2)
    assert network.b.tolist() == [-0.5, -0.5]


# ---- arguments -----------------------------------------------------------------------------------------------------


def test_micro_batches_too_few_for_a_step_are_counted_and_not_used():
    network = deep()
    run = simulate_delay(network, micro_batches(11), error, momentum(network.parameters()), workers=4, stages=4)
    assert (run.steps, run.left_over, len(run.mean_losses)) == (2, 3, 2)


def test_the_network_can_be_evaluated_after_each_step():
    network, seen = deep(norm=True), []

    def look(steps_done):
        seen.append((steps_done, [each.clone() for each in state(network)]))

    simulated(3, 3, network=network, on_step=look)
    assert [steps_done for steps_done, _ in seen] == list(range(1, STEPS + 1))
    assert all(torch.equal(a, b) for a, b in zip(seen[-1][1], state(network), strict=True))
    alone = deep(norm=True)
    simulated(3, 3, network=alone)
    assert equal(network, alone)  # looking changes nothing


@pytest.mark.parametrize(
    ("kwargs", "must_say"),
    [
        ({"stages": [["0.weight"], ["0.bias", "none"]]}, ["stages", "unknown: ['none']", "missing: ['2.weight'"]),
        ({"stages": [["0.weight"], ["0.weight"]]}, ["stages", "two places: ['0.weight']"]),
        ({"stages": 27}, ["stages", "27", "26", "fewer"]),
        ({"workers": 0}, ["workers", "0"]),
        ({"workers": 2.0}, ["`workers`", "2.0", "whole number"]),
        ({"max_steps": -1}, ["`max_steps`", "-1"]),
        ({"stages": None}, ["`stages`", "None", "a list of parameters' names"]),
        ({"stages": ["0.weight", "0.bias"]}, ["`stages`", "['0.weight', '0.bias']"]),
        ({"flush_after": 3}, ["`flush_after`", "3", "list of steps"]),
        ({"clip_norm": 0.0}, ["clip_norm", "0.0", "None"]),
        ({"clip_value": -1.0}, ["clip_value", "-1.0", "entry"]),
        ({"clip_value": 1.0, "clip_norm": 2.0}, ["`clip_norm`=2.0", "`clip_value`=1.0", "Give one"]),
        ({"clip_by": "norm"}, ["clip_by", "norm", "previous_norm"]),
        ({"addition": "any"}, ["addition", "any", "ring"]),
        ({"flush_after": (0,)}, ["flush_after", "0", ">= 1"]),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_way_out(kwargs, must_say):
    network = deep()
    with pytest.raises(ValueError, match=r"^(simulate_delay|CyclicSchedule): ") as caught:
        simulate_delay(network, [], error, momentum(network.parameters()), **{"workers": 2, "stages": 2, **kwargs})
    assert [word for word in must_say if word not in str(caught.value)] == []


class Around(torch.optim.Optimizer):
    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner


@pytest.mark.parametrize(
    ("make", "must_say"),
    [
        (lambda network: torch.optim.LBFGS(network.parameters()), ["LBFGS", "AdamW"]),
        (lambda network: Around(momentum(network.parameters())), ["Around", "wrapped around another"]),
        (lambda network: momentum(deep().parameters()), ["optimizer", "26 of its tensors"]),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused(make, must_say):
    network = deep()
    with pytest.raises(ValueError, match="simulate_delay") as caught:
        simulate_delay(network, [], error, make(network), workers=2, stages=2)
    assert [word for word in must_say if word not in str(caught.value)] == []


def test_clipping_by_value_bounds_each_entry_of_the_mean_gradient():
    first, second, third = moved(GRADIENTS, clip_value=2.0)
    assert first == pytest.approx([2.0, 2.0, 0.3, 0.4])
    assert second == pytest.approx([2.0, 2.0, 0.0, 0.0])
    assert third == pytest.approx([0.6, 0.8, 2.0, 2.0])
