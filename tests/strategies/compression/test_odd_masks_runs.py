"""Runs of pruned models with layers that a mask could break, against plain DDP where that is the oracle."""

import math
import warnings
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from support.processes import launch
from support.training import FEATURES, loader, trainer
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from lightning_comm import (
    Averaging,
    CompressedDDPStrategy,
    FixedPeriod,
    GraSPPruning,
    LocalUpdateStrategy,
    MagnitudePruning,
    MaskFunction,
    ModulePruning,
    PruningSchedule,
    SparseMask,
)

WAIT = timedelta(seconds=60)


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.losses = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self(x), y)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


class Odd(Module):
    """A weight-normalised layer with narrow rows, an adapter that starts at zero, and a parameter without entries."""

    def __init__(self):
        super().__init__()
        self.first = weight_norm(nn.Linear(FEATURES, 32))
        self.base = nn.Linear(32, 16)
        self.down, self.up = nn.Parameter(torch.randn(3, 32)), nn.Parameter(torch.zeros(16, 3))
        self.nothing, self.scale = nn.Parameter(torch.empty(0, 4)), nn.Parameter(torch.tensor(1.0))
        self.last = nn.Linear(16, 1)
        self.double()

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        hidden = self.base(hidden) + hidden @ self.down.t() @ self.up.t()
        return self.scale * self.last(torch.tanh(hidden)) + self.nothing.sum()


def flow_loss(module, batch):
    return nn.functional.mse_loss(module(batch[0]), batch[1])


def given(module):
    """Masks of a user's: of the adapter, of the normalised layer, of a number and of what has no entries."""
    normalised = torch.arange(32 * FEATURES).view(32, FEATURES) % 2 == 0
    return {
        "first.parametrizations.weight.original1": normalised,
        "up": torch.eye(16, 3).bool(),
        "scale": torch.tensor(True),
        "nothing": torch.empty(0, 4, dtype=torch.bool),
    }


LATE = PruningSchedule(2, 6, 2)
MASKS = {
    "pactrain": SparseMask(MagnitudePruning(0.9, skip=["last.weight"]), then="bf16"),
    "flow": SparseMask(GraSPPruning(0.9, loss=flow_loss, skip=["last.weight"])),
    "gradual": SparseMask(MagnitudePruning(0.6, skip=["last.weight"]), schedule=LATE),
}


GIVEN = "masks of a user"


def strategies():
    for name, mask in MASKS.items():
        yield name, CompressedDDPStrategy(mask, timeout=WAIT)
    yield GIVEN, CompressedDDPStrategy(SparseMask(MaskFunction(given)), timeout=WAIT)
    yield "local", LocalUpdateStrategy(FixedPeriod(2), averaging=Averaging(compression=MASKS["pactrain"]), timeout=WAIT)


def _odd(rank):
    answers = {}
    for name, strategy in strategies():
        model = Odd()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(strategy, 2).fit(model, loader(8, rank))
        said = [str(each.message) for each in caught if "prune" in str(each.message)]
        zeros = {key: int((value == 0).sum()) for key, value in model.named_parameters() if value.dim() > 1}
        answers[name] = model.losses, zeros, said
    return answers


@pytest.fixture(scope="module")
def odd():
    return launch(_odd, world_size=2)


@pytest.mark.parametrize("name", [*MASKS, "local"])
def test_a_model_with_layers_that_cannot_be_masked_trains_and_the_others_are_pruned(name, odd):
    for losses, zeros, _ in (answers[name] for answers in odd):
        assert len(losses) == 8
        assert all(map(math.isfinite, losses))
        assert zeros["first.parametrizations.weight.original1"] == 0
        assert zeros["base.weight"] > 0
        # a gradual schedule judges the adapter once it has been trained
        assert (zeros["up"] > 0) == (name == "gradual")


@pytest.mark.parametrize("name", [*MASKS, "local"])
def test_what_is_left_whole_is_named_once_and_by_rank_0_alone(name, odd):
    said = odd[0][name][2]
    for parameter in ("'first.parametrizations.weight.original1'", "'up'"):
        if not (name == "gradual" and parameter == "'up'"):  # trained before the first pruning
            assert len([each for each in said if "not pruned" in each and parameter in each]) == 1, said
    assert odd[1][name][2] == []


def test_masks_of_a_user_hold_on_parameters_that_are_left_whole_otherwise(odd):
    for losses, zeros, said in (answers[GIVEN] for answers in odd):
        assert all(map(math.isfinite, losses))
        assert zeros["first.parametrizations.weight.original1"] == 16 * FEATURES
        assert zeros["up"] == 16 * 3 - 3
        assert said == []


class Directions(Module):
    """Normalises the rows of a weight in its forward, which nobody can see before."""

    def __init__(self):
        super().__init__()
        self.rows, self.last = nn.Linear(FEATURES, 32, bias=False), nn.Linear(32, 1)
        self.double()

    def forward(self, x):
        weight = self.rows.weight
        return self.last(torch.tanh(x @ (weight / weight.norm(dim=1, keepdim=True)).t()))


def _directions(rank):
    strategy = CompressedDDPStrategy(SparseMask(MagnitudePruning(0.8)), timeout=WAIT)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(strategy, 2).fit(Directions(), loader(3, rank))
    return [str(each.message) for each in caught if "is not finite" in str(each.message)]


def test_where_gradients_are_not_finite_masks_that_leave_out_whole_rows_are_named():
    (said,), _ = launch(_directions, world_size=2)
    assert "The masks of 'rows.weight' leave out whole rows" in said
    assert "`skip`" in said


class TiedModule(Module):
    """One weight in two modules, of which those named are pruned."""

    def __init__(self, pruned):
        super().__init__()
        self.encode, self.decode = nn.Linear(8, FEATURES, bias=False), nn.Linear(8, FEATURES, bias=False)
        self.into, self.last = nn.Linear(FEATURES, 8), nn.Linear(FEATURES, 1)
        self.decode.weight = self.encode.weight
        prune.l1_unstructured(self.into, "weight", 0.5)
        for name in pruned:
            prune.random_unstructured(getattr(self, name), "weight", 0.5)
        self.double()

    def forward(self, x):
        hidden = torch.tanh(self.into(x))
        return self.last(torch.tanh(self.encode(hidden) + self.decode(hidden.flip(1))))


PRUNED = [("encode",), ("decode",), ("encode", "decode")]


def _tied(rank):
    answers = []
    for pruned in PRUNED:
        losses = []
        for strategy in (DDPStrategy(timeout=WAIT), CompressedDDPStrategy(SparseMask(ModulePruning()), timeout=WAIT)):
            model = TiedModule(pruned)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer(strategy, 2, max_epochs=2).fit(model, loader(6, rank))
            losses.append(model.losses)
        answers.append(losses)
    return answers


def test_a_tied_weight_trains_as_under_ddp_whichever_of_its_modules_are_pruned():
    for answers in launch(_tied, world_size=2):
        assert len(answers) == len(PRUNED)
        for plain, masked in answers:
            assert masked == pytest.approx(plain, rel=1e-9)
            assert masked[-1] < masked[0]
