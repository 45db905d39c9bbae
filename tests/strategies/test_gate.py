"""The list that every registered strategy passes, with plain DDP as control; what one refuses is declared here.

The names come from Lightning's registry and the settings are those that are registered, so a new strategy enters by
itself. A fit costs more than its steps, so that cases share one where it can show what each of them says.
"""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
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

STEPS, EPOCHS = 5, 2  # steps of an epoch
BATCH = 4
RATE = 0.02
LIMIT = 1e-2  # of gradients, which are larger
VALIDATED_AFTER = 4  # batches: within an epoch and a round
SAVED_AT = (5, 8)  # an epoch's end within a round, a round's end within an epoch
SAVED_IN_STEP_AT = (3, 5)  # where each step ends what a round would: within an epoch, and its end
KEEPS_MOST = {"ddp_powersgd", "ddp_topk"}  # of one class: what is not sent yet, and a basis
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


def resumed_at(name):
    """Steps from which runs go on; most of those that share a class do so within an epoch alone."""
    return saved_at(name)[: 1 if name in IN_STEP - KEEPS_MOST else 2]


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


class SaveAt(Callback):
    def __init__(self, folder, steps):
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, runner, *_):
        if runner.global_step in self.steps:
            runner.save_checkpoint(f"{self.folder}/{runner.global_step}.ckpt")


class InValidation(Callback):
    def __init__(self):
        self.seen = []

    def on_validation_batch_start(self, runner, module, *_):
        self.seen.append((runner.global_step, weights(module)))


class Resumed(NamedTuple):
    """A run that validates and saves, and those that go on from its checkpoints."""

    whole: Ended
    validated: list  # the step and the weights of each validation
    parts: dict  # by the steps from which they went on
    undisturbed: Ended  # by a validation, or by a save behind that from which it may have gone on


def resumed(rank, name, folder):
    """Those that go on do the same where that changes training, as where it flushes a pipeline; or else just train."""
    watch, flushed = InValidation(), name in FLUSHED_BY_VALIDATION
    validates = {"limit_val_batches": 1, "val_check_interval": VALIDATED_AFTER}
    whole = fit(rank, name, Model(), SaveAt(folder, saved_at(name)), watch, **validates)

    def go_on(step):
        callbacks, options = ([SaveAt(f"{folder}/again", saved_at(name))], validates) if flushed else ([], {})
        return fit(rank, name, Model(), *callbacks, ckpt_path=f"{folder}/{step}.ckpt", **options)

    parts = {step: go_on(step) for step in resumed_at(name)}
    # the first one goes on before a save and a validation of the whole run, which would show if they changed anything
    undisturbed = fit(rank, name, Model()) if flushed else parts[saved_at(name)[0]]
    undisturbed = undisturbed._replace(before=whole.before)
    return Resumed(whole, watch.seen, parts, undisturbed)


def accumulated(rank, name, folder):
    return fit(rank, name, Model(), accumulate_grad_batches=3, **short(name))


class Unclipped(Callback):
    """Keeps the gradients of the first step as the backward gives them, wherever a strategy puts them."""

    def __init__(self):
        self.gradients = {}

    def on_train_start(self, runner, module):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(partial(self._note, name))

    def _note(self, name, gradient):
        self.gradients.setdefault(name, gradient.numpy().copy())


def clipped(rank, name, module, algorithm, **options):
    """Return what the fit ended with, and the first gradients as they were before."""
    limits = {"gradient_clip_val": LIMIT, "gradient_clip_algorithm": algorithm}
    watch = Unclipped()
    return fit(rank, name, module, watch, **limits, **options, **short(name)), watch.gradients


def clipped_by_norm(rank, name, folder):
    return clipped(rank, name, Model(sgd), "norm")


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


class Special(Model):
    """A normalised layer, a frozen one, and two that share their weight, all of which compute in bfloat16."""

    def __init__(self):
        super().__init__(sgd, norm=True)
        self.net[3] = nn.Linear(12, 12).requires_grad_(False)
        self.net.insert(5, nn.Linear(12, 12))
        self.net.insert(6, nn.Linear(12, 12))
        self.net[6].weight = self.net[5].weight

    def loss(self, batch):
        out = self.net(batch[0])
        self.dtypes = {out.dtype} | {parameter.dtype for parameter in self.parameters()}
        return nn.functional.mse_loss(out.float(), batch[1])


class SpecialEnded(NamedTuple):
    ended: Ended
    gradients: dict  # of the first step, before they were clipped
    changed: dict  # by the names of parameters
    dtypes: set
    tied: bool


def special(rank, name, folder):
    """What no strategy refuses, clipping by value too: one that did would need a run of its own for it."""
    module = Special()
    ended, gradients = clipped(rank, name, module, "value", precision="bf16-mixed")
    names = [each for each, _ in module.named_parameters()]
    changed = {each: bool((a != b).any()) for each, a, b in zip(names, ended.before, ended.after, strict=True)}
    return SpecialEnded(ended, gradients, changed, module.dtypes, module.net[6].weight is module.net[5].weight)


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


class Fails(Model):
    def training_step(self, batch, batch_idx):
        if self.global_rank == 1 and self.global_step == 3:
            raise ValueError("boom")
        return super().training_step(batch, batch_idx)


def failing(rank, name, folder):
    peers._LEAVE_S = LEAVES_S  # of this process alone, which the failure ends
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
    return _largest(after - before for before, after in zip(ended.before, ended.after, strict=True))


def _largest(arrays):
    return max(float(np.abs(each).max()) for each in arrays)


def _loss(values):
    """Of these weights on the samples of all ranks."""
    net = network()
    for parameter, value in zip(net.parameters(), values, strict=True):
        parameter.data = torch.from_numpy(value)
    samples = [sample(rank, index, torch.float32) for rank in range(2) for index in range(STEPS * BATCH)]
    x, y = (torch.stack(each) for each in zip(*samples, strict=True))
    return float(nn.functional.mse_loss(net(x), y).detach())


def ends_equal_and_has_learnt(name, one, other, of):
    _alike(one.undisturbed, other.undisturbed)
    assert _loss(one.undisturbed.after) < _loss(one.undisturbed.before)


def goes_on_as_the_run_that_was_not_stopped(name, one, other, of):
    for answer in (one, other):
        assert tuple(answer.parts) == resumed_at(name)
        for step, part in answer.parts.items():
            assert part.steps == answer.whole.steps == EPOCHS * STEPS, step
            _equal(part.after, answer.whole.after)
    _alike(one.whole, other.whole)


def validates_equal_weights_and_is_not_changed_by_it(name, one, other, of):
    _alike(one.whole, other.whole)
    validated_at = [VALIDATED_AFTER, STEPS + VALIDATED_AFTER]
    assert [step for step, _ in one.validated] == [step for step, _ in other.validated] == validated_at
    for (_, mine), (_, others) in zip(one.validated, other.validated, strict=True):
        _equal(mine, others)
    same = all((a == b).all() for a, b in zip(one.whole.after, one.undisturbed.after, strict=True))
    assert same == (name not in FLUSHED_BY_VALIDATION)


def takes_a_step_in_three_batches_and_one_for_the_rest(name, one, other, of):
    _alike(one, other, epochs(name) * 2)
    assert any((a != b).any() for a, b in zip(one.after, of("equal weights")[0].undisturbed.after, strict=True))


def _is_clipped(name, one, other, size):
    """All steps go no further than their limits allow, and the first one alone would have without."""
    (limited, gradients), (theirs, others) = one, other
    steps = epochs(name) * STEPS
    _alike(limited, theirs, steps)
    moved = [after - before for after, before in zip(limited.after, limited.before, strict=True)]
    unlimited = [RATE * (gradient + others[name]) / 2 for name, gradient in gradients.items()]
    assert 0 < size(moved) <= 1.001 * steps * RATE * LIMIT < size(unlimited)


def _norm(arrays):
    return sum(float((each**2).sum()) for each in arrays) ** 0.5


def is_clipped_by_norm(name, one, other, of):
    _is_clipped(name, one, other, _norm)


def is_clipped_by_value(name, one, other, of):
    _is_clipped(name, (one.ended, one.gradients), (other.ended, other.gradients), _largest)


def trains_both_networks(name, one, other, of):
    _alike(one, other, epochs(name) * (STEPS + 3))  # the second steps in three of five batches
    half = len(one.after) // 2
    for part in (slice(half), slice(half, None)):
        assert any((a != b).any() for a, b in zip(one.after[part], one.before[part], strict=True))


def computes_in_bf16_and_keeps_float32(name, one, other, of):
    _alike(one.ended, other.ended, epochs(name) * STEPS)
    assert one.dtypes == other.dtypes == {torch.bfloat16, torch.float32}


def leaves_the_frozen_layer_alone(name, one, other, of):
    _alike(one.ended, other.ended, epochs(name) * STEPS)
    assert one.changed == {each: not each.startswith("net.3.") for each in one.changed}
    assert len([each for each in one.changed if each.startswith("net.3.")]) == 2


def keeps_the_tie(name, one, other, of):
    _alike(one.ended, other.ended, epochs(name) * STEPS)
    assert one.tied
    assert other.tied


def ends_equal_in_statistics_too(name, one, other, of):
    _alike(one.ended, other.ended, epochs(name) * STEPS)
    same = all((a == b).all() for a, b in zip(one.ended.buffers, other.ended.buffers, strict=True))
    assert same == (name not in BUFFERS_OF_RANK_0)


def ends_equal(name, one, other, of):
    _alike(one, other, epochs(name) * STEPS)


class Case(NamedTuple):
    run: Callable
    holds: Callable


CASES = {
    "equal weights": Case(resumed, ends_equal_and_has_learnt),
    "resume at any step": Case(resumed, goes_on_as_the_run_that_was_not_stopped),
    "accumulation": Case(accumulated, takes_a_step_in_three_batches_and_one_for_the_rest),
    "clipping by norm": Case(clipped_by_norm, is_clipped_by_norm),
    "clipping by value": Case(special, is_clipped_by_value),
    "bf16": Case(special, computes_in_bf16_and_keeps_float32),
    "two optimizers": Case(two_optimizers, trains_both_networks),
    "frozen parameters": Case(special, leaves_the_frozen_layer_alone),
    "tied parameters": Case(special, keeps_the_tie),
    "BatchNorm": Case(special, ends_equal_in_statistics_too),
    "validation in the middle": Case(resumed, validates_equal_weights_and_is_not_changed_by_it),
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
    """What a run gives, or the text in which it was refused as declared, after which ranks go on."""
    try:
        return (failing if case == LAST else CASES[case].run)(rank, name, folder)
    except Exception as error:
        if case in REFUSED.get(name, {}) and REFUSED[name][case] in str(error):
            return str(error)
        raise


class Runs:
    """The runs of a strategy, by the cases that read them."""

    def __init__(self, name, folder):
        first = {case.run: which for which, case in reversed(CASES.items())}  # of the cases that share a run
        self._run_of = {which: first[case.run] for which, case in CASES.items()} | {LAST: LAST}
        self._ranks = SharedRanks(
            {each: (_run, name, each, f"{folder}/{name}") for each in dict.fromkeys(self._run_of.values())},
            world_size=2,
        )

    def __getitem__(self, case):
        return self._ranks[self._run_of[case]]

    def outcomes(self, case):
        return self._ranks.outcomes(self._run_of[case])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gate")
    return {name: Runs(name, folder) for name in NAMES}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_passes_each_case_or_refuses_it_as_declared(runs, name, case):
    refusal = REFUSED.get(name, {}).get(case)
    if refusal is None:
        answers = runs[name][case]
        CASES[case].holds(name, *answers, of=lambda other: runs[name][other])
    else:
        for answer in runs[name][case]:
            assert isinstance(answer, str)
            assert refusal in answer


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
