"""Losses that have no second derivative: refused with the operation and a way out, also where torch says nothing.

The oracle of what has one is torch's own `gradgradcheck`, or the same model made of torch's own operations.
"""

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from lightning_comm import GraSPPruning
from lightning_comm.ondevice.pruning import PruningContext

torch.set_num_threads(1)


class Followed(torch.autograd.Function):
    """A sine whose backward autograd follows."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class Once(Followed):
    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class ByNumpy(Followed):
    @staticmethod
    def backward(ctx, gradient):
        return torch.from_numpy(gradient.detach().numpy() * ctx.saved_tensors[0].detach().cos().numpy())


class ByNumpyAlone(Followed):
    @staticmethod
    def backward(ctx, gradient):
        return torch.from_numpy(gradient.numpy() * ctx.saved_tensors[0].cos().numpy())


class StraightThrough(Followed):
    """Keeps nothing, so that it is linear in what comes in."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient * 2


class Positive(Followed):
    """A rectifier, whose backward keeps its input and yet is linear where autograd follows it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (ctx.saved_tensors[0] > 0)


class OnceByAttribute(Once):
    """Keeps its input where autograd does not see it."""

    @staticmethod
    def forward(ctx, x):
        ctx.kept = x.detach()
        return x.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient * ctx.kept.cos()


class HalfFollowed(torch.autograd.Function):
    """A product of which one derivative is followed and the other is not."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        return gradient * y, (gradient * x).detach()


class Steps(torch.autograd.Function):
    """A product with steps, whose derivative by the steps is zero: a constant, and right."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(y)
        return x * y.round()

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * y.round(), torch.zeros_like(y)


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Attends(nn.Module):
    def __init__(self, own_choice):
        super().__init__()
        self.before, self.after, self.own_choice = nn.Linear(6, 12), nn.Linear(4, 4), own_choice

    def forward(self, x):
        rows = self.before(x).view(len(x), 1, 3, 4)
        if self.own_choice:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                found = F.scaled_dot_product_attention(rows, rows, rows)
        else:
            found = F.scaled_dot_product_attention(rows, rows, rows)
        return self.after(found[:, 0, 0])


def net(function=torch.sin):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), Layer(function), nn.Linear(8, 4))


def masks(module, loss=None):
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(12, 6, generator=generator), torch.randint(4, (12,), generator=generator)
    return GraSPPruning(0.5, loss=loss).masks(module, PruningContext(samples=lambda count: [(batch, 12)]))


def speech(module, batch):
    lines = module(batch[0])[None].expand(8, -1, -1).log_softmax(-1)
    ones = torch.ones(12, dtype=torch.long)
    return F.ctc_loss(lines, batch[1][:, None].clamp(1, 3), 8 * ones, ones)


def margins(module, batch):
    return F.multi_margin_loss(module(batch[0]), batch[1])


def ends_in(function, *, mean_first=False):
    """The loss whose last operation is a function, or has its mean behind that: what comes in there is a constant."""

    def loss(module, batch):
        outputs = module(batch[0])
        return function(outputs.square().mean()) if mean_first else function(outputs).mean()

    return loss


def reentrant(x):
    return checkpoint(torch.sin, x, use_reentrant=True)


@pytest.mark.parametrize(
    ("module", "loss", "parts"),
    [
        (net(Once.apply), None, ["because of Once.", "let its `backward`, if it is your own"]),
        (net(ByNumpy.apply), None, ["because of ByNumpy.", "operations that autograd follows"]),
        (net(ByNumpyAlone.apply), None, ["because of ByNumpyAlone.", "Can't call numpy()"]),
        (net(lambda x: HalfFollowed.apply(x, x)), None, ["because of HalfFollowed."]),
        (net(reentrant), None, ["because of CheckpointFunction.", "use_reentrant=False"]),
        (net(), speech, ["because of ctc_loss.", "a loss without that operation"]),
        (net(), margins, ["because of multi_margin_loss."]),
        (net(), lambda module, batch: module(batch[0]).sum().detach(), ["does not require grad"]),
        (net(), ends_in(Once.apply), ["because of Once."]),
        (net(), ends_in(Once.apply, mean_first=True), ["because of Once."]),
        (net(), ends_in(ByNumpy.apply), ["because of ByNumpy."]),
        (net(), ends_in(ByNumpyAlone.apply), ["because of ByNumpyAlone."]),
        (net(), ends_in(OnceByAttribute.apply), ["because of OnceByAttribute."]),
        (net(), ends_in(lambda x: StraightThrough.apply(Once.apply(x))), ["because of Once."]),
        (Attends(True), None, ["because of scaled_dot_product_flash_attention", "`sdpa_kernel(SDPBackend.MATH)`"]),
    ],
    ids=[
        "once",
        "detached",
        "numpy",
        "half",
        "reentrant",
        "ctc",
        "margins",
        "constant",
        *(f"end {k}" for k in range(6)),
        "flash",
    ],
)
def test_a_loss_without_a_second_derivative_is_refused_with_the_operation_and_a_way_out(module, loss, parts):
    with pytest.raises(ValueError, match=r"^GraSPPruning: the scores need second derivatives") as caught:
        masks(module, loss)
    assert [
        part for part in [*parts, "`GraSPPruning(loss=...)`", "MagnitudePruning"] if part not in str(caught.value)
    ] == []


def test_a_function_whose_backward_autograd_follows_gives_the_masks_of_torchs_own():
    own, torchs = masks(net(Followed.apply)), masks(net())
    assert all(torch.equal(own[name], torchs[name]) for name in torchs)


@pytest.mark.parametrize(
    ("function", "torchs"),
    [
        (Followed.apply, torch.sin),
        (Positive.apply, torch.relu),
        (StraightThrough.apply, lambda x: 2 * x),
        (lambda x: StraightThrough.apply(StraightThrough.apply(x)), lambda x: 4 * x),
    ],
    ids=["followed", "rectifier", "straight through", "twice"],
)
def test_a_function_at_the_end_of_a_loss_that_is_right_by_its_first_derivative_gives_the_masks_of_torchs_own(
    function, torchs
):
    own, expected = masks(net(), ends_in(function)), masks(net(), ends_in(torchs))
    assert all(torch.equal(own[name], expected[name]) for name in expected)
    assert any(not bool(mask.all()) for mask in own.values())


def test_a_derivative_that_is_zero_everywhere_is_no_reason_to_refuse():
    double = torch.randn(3, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(Steps.apply, double)
    assert set(masks(net(lambda x: Steps.apply(x, x + 2)))) == {"0.weight", "2.weight"}


@pytest.mark.parametrize("module", [Attends(False), nn.Sequential(nn.Embedding(9, 6, sparse=True), nn.Linear(6, 4))])
def test_torchs_attention_and_sparse_embeddings_are_scored(module):
    def loss(model, batch):
        inputs = batch[0] if isinstance(model, Attends) else batch[1]
        return F.cross_entropy(model(inputs), batch[1])

    assert any(not bool(mask.all()) for mask in masks(module, loss).values())
