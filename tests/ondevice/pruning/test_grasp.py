"""GraSP's scores against an explicit Hessian, and a model that is left exactly as it was."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from lightning_comm import GraSPPruning
from lightning_comm.ondevice.pruning import PruningContext, prunable
from lightning_comm.ondevice.pruning.grasp import gradient_flow_scores


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batches(sizes, features=3):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            (
                torch.randn(size, features, generator=generator, dtype=torch.float64),
                torch.randint(3, (size,), generator=generator),
            ),
            size,
        )
        for size in sizes
    ]


def explicit(net, sample):
    """Weight times Hessian times gradient with the Hessian as a matrix, over all samples at once."""
    names = ["0.weight", "2.weight"]
    parameters = dict(net.named_parameters())
    flat = torch.cat([parameters[name].detach().view(-1) for name in names])
    sizes = [parameters[name].numel() for name in names]
    inputs, targets = (torch.cat(parts) for parts in zip(*[batch for batch, _ in sample], strict=True))

    def loss(row):
        parts = {
            name: part.view_as(parameters[name]) for name, part in zip(names, torch.split(row, sizes), strict=True)
        }
        return nn.functional.cross_entropy(functional_call(net, parts, inputs) / 5.0, targets)

    row = flat.clone().requires_grad_(True)
    gradient = torch.autograd.grad(loss(row), row)[0]
    return dict(zip(names, torch.split(flat * (hessian(loss, flat) @ gradient), sizes), strict=True))


@pytest.mark.parametrize("sizes", [(12,), (5, 5, 2)], ids=["one batch", "uneven batches"])
def test_scores_are_weight_times_hessian_times_gradient_of_the_whole_sample(sizes):
    net, sample = tiny(), batches((5, 5, 2))
    cut = sample if len(sizes) > 1 else [(tuple(map(torch.cat, zip(*[b for b, _ in sample], strict=True))), 12)]
    pruning = GraSPPruning(temperature=5.0)
    scores = gradient_flow_scores(net, prunable(net, (), "here"), cut, pruning._loss)
    for name, expected in explicit(net, sample).items():
        assert float(expected.abs().max()) > 0
        torch.testing.assert_close(scores[name].view(-1), expected, rtol=1e-10, atol=0)


def flow(net, sample):
    loss = nn.functional.cross_entropy(net(sample[0][0][0]), sample[0][0][1])
    return float(sum(g.square().sum() for g in torch.autograd.grad(loss, [net[0].weight, net[2].weight])))


def test_the_weights_kept_are_those_without_which_gradients_would_flow_least():
    net, sample = tiny(), batches((12,))
    masks = GraSPPruning(sparsity=0.5, temperature=1.0).masks(net, PruningContext(samples=lambda count: sample))
    whole, changes = flow(net, sample), {True: [], False: []}
    for index in (0, 2):
        for place, kept in enumerate(masks[f"{index}.weight"].view(-1).tolist()):
            weight = net[index].weight.data.view(-1)
            before = float(weight[place])
            weight[place] *= 1 - 1e-4  # a step towards its removal, for the score is of first order
            changes[kept].append(flow(net, sample) - whole)
            weight[place] = before
    assert len(changes[True]) == len(changes[False]) == 12
    assert max(changes[True]) <= min(changes[False])


class Busy(nn.Module):
    """Everything that a forward may leave behind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.frozen = nn.BatchNorm1d(3).eval()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1 + random.random() + np.random.rand()
        return self.body(self.frozen(x))


def draw():
    return torch.rand(2).tolist(), random.random(), float(np.random.rand())


def test_state_modes_gradients_and_random_numbers_of_the_model_are_left_as_they_were():
    net = Busy().double()
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [each.training for each in net.modules()]
    pruning, context = GraSPPruning(sparsity=0.5), PruningContext(samples=lambda count: batches((6, 6)))
    seeds = [lambda: torch.manual_seed(3), lambda: random.seed(3), lambda: np.random.seed(3)]
    [seed() for seed in seeds]
    expected = draw()
    [seed() for seed in seeds]
    masks = pruning.masks(net, context)
    assert draw() == expected
    assert net.calls.item() == 0
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(p.grad, before) for p, before in zip(net.parameters(), gradients, strict=True))
    assert [each.training for each in net.modules()] == modes
    assert all(parameter.requires_grad for parameter in net.parameters())
    again = pruning.masks(net, context)  # dropout is drawn alike
    assert all(torch.equal(mask, again[name]) for name, mask in masks.items())


def test_scores_that_are_zero_since_the_loss_is_linear_are_said_to_be_so_and_not_only_for_lack_of_training():
    pruning = GraSPPruning(loss=lambda module, batch: (module(batch[0]).squeeze(1) - 9).abs().mean())
    linear = nn.Sequential(nn.Linear(3, 1)).double()
    with pytest.raises(
        ValueError, match="second derivative of the loss by the weights is 0, as where it is linear"
    ) as e:
        pruning.masks(linear, PruningContext(samples=lambda count: batches((12,))))
    assert all(
        words in str(e.value) for words in ("'0.weight'", "another `loss`, or use MagnitudePruning", "start_step")
    )


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class NoForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (NoForward(), "`module(inputs)`, and NoForward cannot do that: Module [NoForward]"),
        (Pair(3, 3), "got tuple from Pair"),
    ],
)
def test_a_module_that_the_default_loss_cannot_call_is_told_to_give_a_loss(module, words):
    with pytest.raises(ValueError, match=r"^GraSPPruning: `loss` must be given") as caught:
        GraSPPruning().masks(module.double(), PruningContext(samples=lambda count: batches((12,))))
    assert words in str(caught.value)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_exactly_the_asked_share_is_kept_also_where_scores_are_equal_and_masks_shrink(scope):
    net = tiny()
    with torch.no_grad():
        net[0].weight[1:].zero_()  # their scores are 0
    context = PruningContext(samples=lambda count: batches((12,)))
    masks = GraSPPruning(sparsity=0.5, scope=scope).masks(net, context)
    assert sum(int(mask.sum()) for mask in masks.values()) == 12
    fewer = GraSPPruning(sparsity=0.75, scope=scope).masks(net, PruningContext(masks, context.samples))
    assert sum(int(mask.sum()) for mask in fewer.values()) == 6
    assert not any(bool((fewer[name] & ~mask).any()) for name, mask in masks.items())


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 12)
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.mix(x).view(-1, 1, 3, 4).unbind(2)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])


def test_fused_attention_is_derived_twice():
    net = Attends().double()
    masks = GraSPPruning(sparsity=0.5).masks(net, PruningContext(samples=lambda count: batches((6,))))
    assert sum(int(mask.sum()) for mask in masks.values()) == 24


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: GraSPPruning(80), ("GraSPPruning", "`sparsity`", "got 80", "write 0.8")),
        (lambda: GraSPPruning(samples=0), ("`samples`", ">= 1", "got 0")),
        (lambda: GraSPPruning(temperature=0), ("`temperature`", "> 0", "got 0", "1.0 leaves")),
        (lambda: GraSPPruning(loss=0.5), ("`loss`", "got 0.5", "cross entropy")),
        (lambda: GraSPPruning(scope="erk"), ("`scope`", "'erk'", "'layer'")),
        (lambda: GraSPPruning().masks(tiny()), ("samples of the training data", "MagnitudePruning")),
        (
            lambda: GraSPPruning().masks(tiny(), PruningContext(samples=lambda count: [({"x": 1}, 1)])),
            ("`loss`", "(inputs, targets)", "got dict of 1"),
        ),
        (
            lambda: GraSPPruning(loss=lambda module, batch: module(batch[0])).masks(
                tiny(), PruningContext(samples=lambda count: batches((4,)))
            ),
            ("`loss` must return one number",),
        ),
        (
            lambda: GraSPPruning(loss=lambda module, batch: module(batch[0]).sum() * torch.nan).masks(
                tiny(), PruningContext(samples=lambda count: batches((4,)))
            ),
            ("finite", "'0.weight'", "MagnitudePruning"),
        ),
    ],
)
def test_bad_arguments_and_batches_are_named_with_a_way_out(make, parts):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the line below reads all of it)
        make()
    assert [part for part in parts if part not in str(caught.value)] == []
