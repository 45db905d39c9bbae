"""Optimizers that need more than the gradient of each parameter are found before they have taken a step."""

import copy
import math

import pytest
import torch
from support.processes import start_ranks
from support.training import collectives_so_far
from torch import distributed as dist
from torch import nn

from lightning_comm.ondevice.cyclic import CyclicEngine, simulate_delay
from lightning_comm.ondevice.optimizer.step_messages import FirstSteps, SendsInStepError
from lightning_comm.ondevice.optimizer.trial import why_not_by_parameter


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 70), nn.LayerNorm(70), nn.Linear(70, 1))


class Plain(torch.optim.Optimizer):
    """Gradient descent; what derives from it keeps, or asks for, more."""

    def __init__(self, params, **kept):
        super().__init__(params, {"lr": 0.01, **kept})
        self.prepare()

    def prepare(self):
        pass

    def rate(self, group, gradients):
        return group["lr"]

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            with_gradient = [each for each in group["params"] if each.grad is not None]
            rate = self.rate(group, [each.grad for each in with_gradient])
            for parameter in with_gradient:
                parameter.add_(parameter.grad, alpha=-rate)
        return loss


class Counts(Plain):
    """Plain counting: a step, a product of decays, a flag, and a counter on the optimizer itself."""

    def __init__(self, params):
        super().__init__(params, step=0, product=1.0, begun=False)

    def prepare(self):
        self.calls, self.decay = 0, torch.ones(())

    def rate(self, group, gradients):
        group["step"] += 1
        group["product"] *= 0.9
        group["begun"] = True
        self.calls += 1
        self.decay = self.decay * 0.5
        return group["lr"] / group["step"]


class Estimates(Plain):
    """An estimate of the step size in its groups, as D-Adaptation and Prodigy keep it."""

    def __init__(self, params):
        super().__init__(params, d=1e-6)

    def rate(self, group, gradients):
        if gradients:
            group["d"] = max(group["d"], 1e-3 * math.sqrt(sum(float(each.pow(2).sum()) for each in gradients)))
        return group["d"]


class EstimatesLater(Estimates):
    """The same from its second step on."""

    def prepare(self):
        self.seen = False

    def rate(self, group, gradients):
        if gradients and not self.seen:
            self.seen = True
            return group["d"]
        return super().rate(group, gradients)


class InATensor(Plain):
    def __init__(self, params):
        super().__init__(params, scale=torch.zeros(()))

    def rate(self, group, gradients):
        for each in gradients:
            group["scale"].add_(each.abs().mean())
        return group["lr"]


class OnItself(Plain):
    def prepare(self):
        self.largest = 0.0

    def rate(self, group, gradients):
        self.largest = max([self.largest, *(float(each.abs().max()) for each in gradients)])
        return group["lr"] / (1 + self.largest)


class InADictionary(Plain):
    def prepare(self):
        self.statistics = {"norms": []}

    def rate(self, group, gradients):
        self.statistics["norms"] += [float(each.norm()) for each in gradients]
        return group["lr"]


class InTheState(Plain):
    def rate(self, group, gradients):
        for each in gradients:
            self.state["all"]["sum"] = self.state["all"].get("sum", 0.0) + float(each.sum())
        return group["lr"]


class ByTheWholeNorm(Plain):
    """Nothing is kept; the norm of all gradients decides."""

    def rate(self, group, gradients):
        norm = math.sqrt(sum(float(each.pow(2).sum()) for each in gradients))
        return group["lr"] / (norm + 1e-6)


class Noisy(Plain):
    """Draws a number for each parameter."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(torch.randn(parameter.shape), alpha=0.01)


class Shows(Plain):
    """Notes the norm of the last gradient on itself, for people to read."""

    def prepare(self):
        self.last_norm = 0.0

    def rate(self, group, gradients):
        self.last_norm = math.sqrt(sum(float(each.pow(2).sum()) for each in gradients))
        return group["lr"]


class InAList(torch.optim.Optimizer):
    """Keeps velocities by the parameters' numbers, beside its state."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.01})
        self.velocity = [torch.zeros_like(each) for each in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        for velocity, parameter in zip(self.velocity, self.param_groups[0]["params"], strict=False):
            if parameter.grad is not None:
                parameter.sub_(velocity.mul_(0.9).add_(parameter.grad), alpha=0.01)


def fused(params):
    return torch.optim.SGD(params, 0.01, momentum=0.9, fused=True)


TORCH = [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam]
TORCH += [torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Adamax, torch.optim.ASGD, torch.optim.Rprop]
TORCH += [torch.optim.RMSprop, torch.optim.Adafactor]


@pytest.mark.parametrize("make", [*TORCH, Plain, Counts, Noisy, Shows, fused])
def test_what_treats_each_parameter_by_itself_passes_and_is_left_as_it_was(make):
    net = network()
    optimizer = make([{"params": list(net[0].parameters())}, {"params": list(net[1:].parameters()), "lr": 0.02}])
    before, drawn = copy.deepcopy((optimizer.state_dict(), net.state_dict())), torch.random.get_rng_state()
    numbers = {key: copy.deepcopy(value) for key, value in vars(optimizer).items() if isinstance(value, (int, float))}
    assert why_not_by_parameter("Here", optimizer) is None
    assert str((optimizer.state_dict(), net.state_dict())) == str(before)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert {key: vars(optimizer)[key] for key in numbers} == numbers


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (Estimates, "param_groups[0]['d']"),
        (EstimatesLater, "param_groups[0]['d']"),
        (InATensor, "param_groups[0]['scale']"),
        (OnItself, "self.largest"),
        (InADictionary, "self.statistics"),
        (InTheState, "state['all']"),
        (InAList, "self.velocity"),
        (ByTheWholeNorm, "by the gradients of others too"),
    ],
)
def test_what_needs_more_is_refused_by_its_name_and_that_of_the_number(make, named):
    net = network()
    reason = why_not_by_parameter("Here", make(net.parameters()))
    assert reason is not None
    assert make.__name__ in reason
    assert named in reason
    assert "SGD or AdamW" in reason or "or use DDPStrategy" in reason
    stages = [nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 1))]
    both = [parameter for stage in stages for parameter in stage.parameters()]
    with pytest.raises(ValueError, match="simulate_delay: `optimizer`.*" + make.__name__):
        simulate_delay(net, [], lambda *_: torch.zeros(()), make(net.parameters()), workers=2, stages=2)
    with pytest.raises(ValueError, match="CyclicEngine: `optimizer`.*" + make.__name__):
        CyclicEngine(stages, make(both))


class HasModes(Plain):
    def train(self):
        pass

    def eval(self):
        pass


def test_optimizers_with_modes_are_refused_on_one_device_too():
    net = network()
    with pytest.raises(ValueError, match="HasModes has modes"):
        simulate_delay(net, [], lambda *_: torch.zeros(()), HasModes(net.parameters()), workers=2, stages=2)


class Talks(Plain):
    """Sends a message in its step; the closure may send what it likes."""

    def __init__(self, params, message):
        self.message = message
        super().__init__(params)

    def rate(self, group, gradients):
        self.message()
        return group["lr"]


def _messages(group):
    from torch.distributed import all_reduce as under_another_name

    row, rows = torch.ones(2), torch.empty(4)
    other = 1 - dist.get_rank()
    return {
        "all_reduce": lambda: under_another_name(row),
        "async": lambda: dist.all_reduce(row, async_op=True),
        "another group": lambda: dist.all_reduce(row, group=group),
        "all_gather": lambda: dist.all_gather([torch.empty(2), torch.empty(2)], row),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(rows, row),
        "broadcast": lambda: dist.broadcast(row, 0),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(row, rows),
        "send": lambda: dist.send(row, other),
        "recv": lambda: dist.recv(row, other),
        "isend": lambda: dist.isend(row, other),
        "batched": lambda: dist.batch_isend_irecv([dist.P2POp(dist.isend, row, other)]),
        "barrier": lambda: dist.barrier(),
        "objects": lambda: dist.all_gather_object([None, None], 1),
        "group's own": lambda: dist.group.WORLD.allreduce([row]),
        "functional": lambda: dist._functional_collectives.all_reduce(row, "sum", dist.group.WORLD),
    }


def _found_before_sent(rank):
    group = dist.new_group()
    sent = {}
    for name, message in _messages(group).items():
        net = network()
        optimizer = Talks(net.parameters(), message)
        before = collectives_so_far()
        with pytest.raises(SendsInStepError, match="Here: the optimizer Talks communicates in its `step`"):
            why_not_by_parameter("Here", optimizer)
        with pytest.raises(SendsInStepError), FirstSteps("Here").watch(optimizer):
            optimizer.step()
        assert "step" not in vars(optimizer)
        sent[name] = collectives_so_far() - before
    steps = FirstSteps("Here")
    net = network()
    plain, closures = Plain(net.parameters()), []

    def closure():
        dist.all_reduce(torch.ones(1))
        closures.append(torch.ones(1) + 1)
        return torch.zeros(())

    for _ in range(2):
        with steps.watch(plain):
            plain.step(closure)
            plain.step(closure=closure)
    return sent, len(closures)


def test_every_kind_of_message_in_a_step_is_found_before_it_is_sent_and_the_closure_may_send():
    for sent, closures in start_ranks(_found_before_sent, world_size=2):
        assert set(sent.values()) == {0}
        assert closures == 4
