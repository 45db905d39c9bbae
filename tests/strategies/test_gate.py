"""The list that every registered strategy passes, with plain DDP as control; what one refuses is declared here.

The names come from Lightning's registry and the settings are those that are registered, so a new strategy enters by
itself. All cases of a strategy share their ranks but for those that end them.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import StrategyRegistry
from support.shared_ranks import SharedRanks
from support.training import FEATURES, Regression, Samples, loader, sample, trainer, weights
from torch import nn

import lightning_comm.transport.failures as peers
from lightning_comm.data.resumable import ResumableLoader
from lightning_comm.errors import RefusedSetUp

STEPS, EPOCHS = 5, 2  # steps of an epoch
BATCH = 4
RATE = 0.02
LIMIT = 1e-3  # of gradients, which are larger
SAVED_AT = (1, 4, 5, 8)  # the first step, within an epoch and a round, an epoch's end, a round's end
SAVED_IN_STEP_AT = (4, 5)  # where each step ends what a round would: within an epoch, and its end
LEAVES_S = 0.3  # how long a rank that failed waits for others that are in a collective, and so cannot leave


def _registered() -> list[str]:
    """Each of our strategies once, whatever the ways of starting processes."""
    return [
        name
        for name, entry in StrategyRegistry.items()
        if entry["strategy"].__module__.startswith("lightning_comm.")
        and entry["init_params"]["start_method"] == "popen"
    ]


NAMES = ["ddp", *_registered()]


def short(name):
    """Settings of a fit that shows what it shows in one epoch, or in a whole round where a strategy has such."""
    return {"max_epochs": 1} if name in IN_STEP | IN_RINGS else {}


def saved_at(name):
    return SAVED_IN_STEP_AT if name in IN_STEP else SAVED_AT


def strategy(name):
    entry = StrategyRegistry[name]
    return entry["strategy"](**entry["init_params"], timeout=timedelta(seconds=40))


# ---- what each rank does -----------------------------------------------------------------------------------------


def network(norm=False):
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1)]
    if norm:
        layers.insert(1, nn.BatchNorm1d(12))
    return nn.Sequential(*layers)


def sgd(parameters):
    return torch.optim.SGD([each for each in parameters if each.requires_grad], RATE)


def adamw(parameters):
    return torch.optim.AdamW([each for each in parameters if each.requires_grad], RATE)


class Model(Regression):
    def __init__(self, optimizer=adamw, norm=False):
        super().__init__(network(norm), optimizer, lambda step: 0.95**step)


class Began(Callback):
    """Keeps the weights before the first step: a mask may have set some to zero by then."""

    weights = None

    def on_train_batch_start(self, runner, module, *_):
        self.weights = self.weights or weights(module)


class Ended(NamedTuple):
    """A rank at the end of a fit; the lists are parameters or buffers."""

    steps: int
    before: list
    after: list
    buffers: list


def fit(rank, name, module, *callbacks, ckpt_path=None, **options):
    began = Began()
    settings = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0, **options}
    runner = trainer(strategy(name), 2, callbacks=[began, *callbacks], **settings)
    data = ResumableLoader(Samples(STEPS * BATCH, rank, torch.float32), BATCH, seed=3, num_replicas=1, rank=0)
    runner.fit(module, data, loader(2, rank, dtype=torch.float32), ckpt_path=ckpt_path)
    assert torch.distributed.get_world_size() == 2
    buffers = [buffer.clone().numpy() for buffer in module.buffers()]
    return Ended(runner.global_step, began.weights, weights(module), buffers)


def plain(rank, name, folder):
    return fit(rank, name, Model())


class SaveAt(Callback):
    def __init__(self, folder, steps):
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, runner, *_):
        if runner.global_step in self.steps:
            runner.save_checkpoint(f"{self.folder}/{runner.global_step}.ckpt")


def resumed(rank, name, folder):
    """The whole run saves at several steps, and so do those that go on: a save may end a round or flush a pipeline."""
    steps = saved_at(name)
    whole = fit(rank, name, Model(), SaveAt(folder, steps))
    again = SaveAt(f"{folder}/again", steps)
    return whole, {step: fit(rank, name, Model(), again, ckpt_path=f"{folder}/{step}.ckpt") for step in steps}


def accumulated(rank, name, folder):
    return fit(rank, name, Model(), accumulate_grad_batches=3)


def clipped(rank, name, algorithm):
    limits = {"gradient_clip_val": LIMIT, "gradient_clip_algorithm": algorithm}
    return fit(rank, name, Model(sgd), **limits, **short(name))


def clipped_by_norm(rank, name, folder):
    return clipped(rank, name, "norm")


def clipped_by_value(rank, name, folder):
    """The run without a limit, which no strategy refuses, is that of the other case too."""
    return clipped(rank, name, "value"), fit(rank, name, Model(sgd), **short(name))


class Autocast(Model):
    dtypes: set

    def loss(self, batch):
        out = self.net(batch[0])
        self.dtypes = {out.dtype} | {parameter.dtype for parameter in self.parameters()}
        return nn.functional.mse_loss(out.float(), batch[1])


def in_bf16(rank, name, folder):
    module = Autocast()
    return fit(rank, name, module, precision="bf16-mixed", **short(name)), module.dtypes


class ByHand(LightningModule):
    """Two optimizers under manual optimization; the second one steps every other batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = network(), network()

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        loss = nn.functional.mse_loss(self.one(batch[0]) + self.two(batch[0]), batch[1])
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        first.step()
        if batch_idx % 2 == 0:
            second.step()

    def configure_optimizers(self):
        return adamw(self.one.parameters()), sgd(self.two.parameters())


def two_optimizers(rank, name, folder):
    return fit(rank, name, ByHand(), **short(name))


def frozen(rank, name, folder):
    module = Model()
    module.net[2].requires_grad_(False)
    return fit(rank, name, module, **short(name))


class Tied(Model):
    def __init__(self):
        super().__init__()
        self.net[2] = nn.Linear(12, 12)
        self.net.insert(2, nn.Linear(12, 12))
        self.net[3].weight = self.net[2].weight


def tied(rank, name, folder):
    module = Tied()
    ended = fit(rank, name, module, **short(name))
    return ended, module.net[3].weight is module.net[2].weight


class Unused(Model):
    """A branch that only one rank uses, and one that none uses."""

    def __init__(self):
        super().__init__()
        self.branch, self.nobody = nn.Linear(FEATURES, 1), nn.Linear(FEATURES, 1)

    def loss(self, batch):
        loss = super().loss(batch)
        return loss + self.branch(batch[0]).square().mean() if self.global_rank == 1 else loss


def unused(rank, name, folder):
    return fit(rank, name, Unused(), **short(name))


def batch_norm(rank, name, folder):
    return fit(rank, name, Model(norm=True), **short(name))


class InValidation(Callback):
    def __init__(self):
        self.seen = []

    def on_validation_batch_start(self, runner, module, *_):
        self.seen.append((runner.global_step, weights(module)))


def validated(rank, name, folder):
    watch = InValidation()
    return fit(rank, name, Model(), watch, limit_val_batches=1, val_check_interval=3), watch.seen


class Fails(Model):
    def training_step(self, batch, batch_idx):
        if self.global_rank == 1 and self.global_step == 3:
            raise ValueError("boom")
        return super().training_step(batch, batch_idx)


def failing(rank, name, folder):
    return fit(rank, name, Fails())


# ---- what must hold ----------------------------------------------------------------------------------------------


def _equal(one, other):
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def epochs(name):
    return short(name).get("max_epochs", EPOCHS)


def _alike(one, other, steps=EPOCHS * STEPS):
    """Ranks ended with equal weights, after these steps, and somewhere else than they began."""
    assert one.steps == other.steps == steps
    _equal(one.before, other.before)
    _equal(one.after, other.after)
    assert _moved(one) > 0


def _moved(ended):
    return max(float(np.abs(after - before).max()) for before, after in zip(ended.before, ended.after, strict=True))


def _loss(values):
    """Of these weights on the samples of all ranks."""
    net = network()
    for parameter, value in zip(net.parameters(), values, strict=True):
        parameter.data = torch.from_numpy(value)
    samples = [sample(rank, index, torch.float32) for rank in range(2) for index in range(STEPS * BATCH)]
    x, y = (torch.stack(each) for each in zip(*samples, strict=True))
    return float(nn.functional.mse_loss(net(x), y).detach())


def ends_equal_and_has_learnt(name, one, other, of):
    _alike(one, other)
    assert _loss(one.after) < _loss(one.before)


def goes_on_as_the_run_that_was_not_stopped(name, one, other, of):
    for whole, parts in (one, other):
        assert tuple(parts) == saved_at(name)
        for step, part in parts.items():
            assert part.steps == whole.steps == EPOCHS * STEPS, step
            _equal(part.after, whole.after)
    _alike(one[0], other[0])


def takes_a_step_in_three_batches_and_one_for_the_rest(name, one, other, of):
    _alike(one, other, EPOCHS * 2)
    assert any((a != b).any() for a, b in zip(one.after, of("equal weights")[0].after, strict=True))


def _stays_near(name, limited, theirs, free, distance):
    _alike(limited, theirs, epochs(name) * STEPS)
    most = epochs(name) * STEPS * RATE * LIMIT
    assert 0 < distance(limited) <= 1.001 * most < distance(free)


def is_clipped_by_norm(name, one, other, of):
    def distance(ended):
        return sum(float(((a - b) ** 2).sum()) for a, b in zip(ended.after, ended.before, strict=True)) ** 0.5

    _, free = of("clipping by value")[0]
    _stays_near(name, one, other, free, distance)


def is_clipped_by_value(name, one, other, of):
    (limited, free), (theirs, _) = one, other
    _stays_near(name, limited, theirs, free, _moved)


def computes_in_bf16_and_keeps_float32(name, one, other, of):
    _alike(one[0], other[0], epochs(name) * STEPS)
    assert one[1] == other[1] == {torch.bfloat16, torch.float32}


def trains_both_networks(name, one, other, of):
    _alike(one, other, epochs(name) * (STEPS + 3))  # the second steps in three of five batches
    half = len(one.after) // 2
    for part in (slice(half), slice(half, None)):
        assert any((a != b).any() for a, b in zip(one.after[part], one.before[part], strict=True))


def leaves_the_frozen_layer_alone(name, one, other, of):
    _alike(one, other, epochs(name) * STEPS)
    changed = [bool((a != b).any()) for a, b in zip(one.after, one.before, strict=True)]
    assert changed == [True, True, False, False, True, True]


def keeps_the_tie(name, one, other, of):
    _alike(one[0], other[0], epochs(name) * STEPS)
    assert one[1]
    assert other[1]


def ends_equal(name, one, other, of):
    _alike(one, other, epochs(name) * STEPS)


def ends_equal_in_statistics_too(name, one, other, of):
    _alike(one, other, epochs(name) * STEPS)
    same = all((a == b).all() for a, b in zip(one.buffers, other.buffers, strict=True))
    assert same == (name not in BUFFERS_OF_RANK_0)


def validates_equal_weights_and_is_not_changed_by_it(name, one, other, of):
    (ended, seen), (theirs, also) = one, other
    _alike(ended, theirs)
    assert [step for step, _ in seen] == [step for step, _ in also] == [3, 8]
    for (_, mine), (_, others) in zip(seen, also, strict=True):
        _equal(mine, others)
    unvalidated = of("equal weights")[0].after
    same = all((a == b).all() for a, b in zip(ended.after, unvalidated, strict=True))
    assert same == (name not in FLUSHED_BY_VALIDATION)


class Case(NamedTuple):
    run: Callable
    holds: Callable


CASES = {
    "equal weights": Case(plain, ends_equal_and_has_learnt),
    "resume at any step": Case(resumed, goes_on_as_the_run_that_was_not_stopped),
    "accumulation": Case(accumulated, takes_a_step_in_three_batches_and_one_for_the_rest),
    "clipping by norm": Case(clipped_by_norm, is_clipped_by_norm),
    "clipping by value": Case(clipped_by_value, is_clipped_by_value),
    "bf16": Case(in_bf16, computes_in_bf16_and_keeps_float32),
    "two optimizers": Case(two_optimizers, trains_both_networks),
    "frozen parameters": Case(frozen, leaves_the_frozen_layer_alone),
    "tied parameters": Case(tied, keeps_the_tie),
    "BatchNorm": Case(batch_norm, ends_equal_in_statistics_too),
    "validation in the middle": Case(validated, validates_equal_weights_and_is_not_changed_by_it),
    "unused parameters": Case(unused, ends_equal),
}
LAST = "an exception on one rank"

# ---- what a strategy refuses, or does otherwise ------------------------------------------------------------------

AS_DDP = {"unused parameters": "find_unused_parameters=True"}
IN_A_RING = {
    "clipping by norm": "clip_by='previous_norm'",
    "two optimizers": "must return one optimizer",
    "unused parameters": "requires_grad_(False)",
}
IN_RINGS = {"cyclic", "cyclic_v1"}
IN_STEP = {"ddp", "ddp_bf16", "ddp_fp16", "ddp_int8", "ddp_powersgd", "ddp_topk", "ddp_sparse_mask", "pactrain"}
REFUSED: dict[str, dict[str, str]] = {
    **dict.fromkeys(IN_STEP, AS_DDP),
    "post_local_sgd": {**AS_DDP, "two optimizers": "under manual optimization"},
    **dict.fromkeys(IN_RINGS, IN_A_RING),
}
BUFFERS_OF_RANK_0 = IN_STEP  # at the beginning of each forward, after which each rank has its own
FLUSHED_BY_VALIDATION = IN_RINGS


def _run(rank, name, case, folder):
    """What a case gives, or the text in which it was refused: ranks go on after that."""
    peers._LEAVE_S = LEAVES_S  # of this process alone
    try:
        return (failing if case == LAST else CASES[case].run)(rank, name, folder)
    except RefusedSetUp as error:
        return str(error)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gate")
    return {
        name: SharedRanks({case: (_run, name, case, f"{folder}/{name}") for case in [*CASES, LAST]}, world_size=2)
        for name in NAMES
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_passes_each_case_or_refuses_it_as_declared(runs, name, case):
    refusal = REFUSED.get(name, {}).get(case)
    if refusal is None:
        answers = runs[name][case]
        assert [each for each in answers if isinstance(each, str)] == []
        CASES[case].holds(name, *answers, of=lambda other: runs[name][other])
    else:
        for answer, error in runs[name].outcomes(case):
            assert refusal in (error or answer)


@pytest.mark.parametrize("name", NAMES)
def test_an_exception_on_one_rank_ends_all_and_ours_name_it_everywhere(runs, name):
    (_, of_0), (_, of_1) = runs[name].outcomes(LAST)
    assert "ValueError: boom" in of_1
    assert of_0 is not None
    assert "no answer within" not in of_0
    assert ("rank 1 failed: ValueError: boom" in of_0) == (name != "ddp")


def test_what_is_declared_is_of_strategies_and_cases_that_there_are():
    assert {*REFUSED, *BUFFERS_OF_RANK_0, *FLUSHED_BY_VALIDATION} <= set(NAMES)
    assert {case for cases in REFUSED.values() for case in cases} <= set(CASES)
    assert len(NAMES) > 10
