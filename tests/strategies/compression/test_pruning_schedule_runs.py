"""Pruning in the middle of training: dense until then, ever sparser, the same on all ranks, and resumed at any step."""

import warnings
from contextlib import nullcontext
from datetime import timedelta
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from strategies.compression.test_sparse_mask_runs import Stepwise, data, weights, zeros
from support.processes import launch
from support.shared_ranks import SharedRanks
from support.training import trainer

from lightning_comm import CompressedDDPStrategy, Int8, MagnitudePruning, MaskFunction, PruningSchedule, SparseMask

TOTAL = 216  # weights
GRADUAL = PruningSchedule(start_step=1, end_step=8, every_steps=3)  # before steps 4, 7 and 8


def scheduled(schedule, then=None, pruning=None):
    compression = SparseMask(pruning or MagnitudePruning(0.6), then, schedule=schedule)
    return CompressedDDPStrategy(compression, timeout=timedelta(seconds=40), bucket_cap_mb=0.0003)


class Watch(Callback):
    """Notes the weights, and where they are zero, after every optimizer step."""

    def __init__(self):
        self.seen, self.zeros = [], []

    def on_train_batch_end(self, runner, module, *args):
        self.seen.append(weights(module))
        self.zeros.append([each == 0 for each in weights(module)])


def counts(zeros):
    return [sum(int(each.sum()) for each in step) for step in zeros]


def _watched(rank, strategy, kwargs):
    watch = Watch()
    strategy = scheduled(strategy) if isinstance(strategy, PruningSchedule) else strategy
    trainer(strategy, 2, callbacks=[watch], **kwargs).fit(Stepwise(), data(12, rank))
    ledger = getattr(strategy, "ledger", None)
    sent = [(each.step, each.purpose) for each in ledger.records] if ledger is not None else []
    return watch.seen, watch.zeros, sorted({step for step, purpose in sent if purpose == "masks"})


def pruned(sparsity):
    return TOTAL - round((1 - sparsity) * TOTAL)


ACCUMULATED = [PruningSchedule(2), PruningSchedule(0, 3, 1)]
OF_TWO = [PruningSchedule(5), PruningSchedule(1, 14, 4)]
LATE = [
    (PruningSchedule(6), "before optimizer step 6, and training ends after 6, so nothing is ever pruned"),
    (PruningSchedule(0, 6, 3), "before optimizer step 6, and training ends after 6, so fewer weights"),
]


@pytest.fixture(scope="module")
def runs():
    return SharedRanks(
        {
            "plain": (_watched, "ddp", {}),
            **{repr(schedule): (_watched, schedule, {}) for schedule in (PruningSchedule(5), GRADUAL)},
            **{("accumulated", repr(each)): (_watched, each, {"accumulate_grad_batches": 3}) for each in ACCUMULATED},
            **{("two optimizers", repr(each)): (_two_optimizers, each) for each in OF_TWO},
            "averaged": (_averaged,),
            **{("late", said): (_late, schedule, said) for schedule, said in LATE},
        },
        world_size=2,
    )


@pytest.mark.parametrize("schedule", [PruningSchedule(5), GRADUAL], ids=["at once", "gradual"])
def test_before_the_first_pruning_training_is_plain_ddp_bit_for_bit_and_not_after(runs, schedule):
    first = schedule.first_step
    for (expected, *_), (seen, *_) in zip(runs["plain"], runs[repr(schedule)], strict=True):
        for step in range(12):
            same = all((a == b).all() for a, b in zip(expected[step], seen[step], strict=True))
            assert same == (step < first)


def test_weights_are_pruned_as_the_schedule_says_and_never_come_back(runs):
    shares = [GRADUAL.sparsity_at(step, 0.6) for step in range(12)]
    answers = runs[repr(GRADUAL)]
    for _, zero, asked in answers:
        assert counts(zero) == [pruned(share) for share in shares]
        assert asked == [4, 7, 8]
        for before, after in pairwise(zero):
            assert all(bool(a[b].all()) for a, b in zip(after, before, strict=True))
    assert all((a == b).all() for a, b in zip(answers[0][0][-1], answers[1][0][-1], strict=True))


@pytest.mark.parametrize("schedule", ACCUMULATED, ids=["at once", "gradual"])
def test_with_accumulation_weights_are_pruned_between_windows(runs, schedule):
    for _, zero, asked in runs["accumulated", repr(schedule)]:
        assert asked == [step for step in range(4) if schedule.due(step)]
        # a batch is seen before the next one prunes; three batches make a step
        assert counts(zero) == [pruned(schedule.sparsity_at(batch // 3, 0.6)) for batch in range(12)]


class SaveAlways(Callback):
    """Saves a checkpoint after every step, which must change nothing."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, runner, *args):
        runner.save_checkpoint(f"{self.folder}/at{runner.global_step}.ckpt")


def _resumed(rank, schedule, then, places, folder):
    whole = Stepwise()
    trainer(scheduled(schedule, then), 2, callbacks=[SaveAlways(folder)]).fit(whole, data(10, rank))
    same = []
    for step in places:
        path = f"{folder}/at{step}.ckpt"
        model = Stepwise()
        trainer(scheduled(schedule, then), 2).fit(model, data(10, rank), ckpt_path=path)
        same.append(all((a == b).all() for a, b in zip(weights(whole), weights(model), strict=True)))
    return same, zeros(whole)


EVERY = range(1, 10)
ALSO = pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("schedule", "then", "places"),
    [
        pytest.param(GRADUAL, Int8(), (3, 4, 8), id="gradual-Int8(), before a pruning, at it and at the last"),
        pytest.param(GRADUAL, Int8(), EVERY, id="gradual-Int8()", marks=ALSO),
        pytest.param(PruningSchedule(5), None, (5,), id="at once-None, at the pruning"),
        pytest.param(PruningSchedule(5), None, EVERY, id="at once-None", marks=ALSO),
        pytest.param(PruningSchedule(5), Int8(), EVERY, id="at once-Int8()", marks=ALSO),
        pytest.param(GRADUAL, None, EVERY, id="gradual-None", marks=ALSO),
    ],
)
def test_a_run_stopped_at_any_step_goes_on_bit_for_bit(tmp_path, schedule, then, places):
    for same, count in launch(_resumed, schedule, then, places, str(tmp_path), world_size=2):
        assert same == [True] * len(places)
        assert count == pruned(0.6)


class TwoOptimizers(Stepwise):
    """Steps two optimizers on each batch, so that steps of the Trainer go by twos."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [
            torch.optim.AdamW(self.net[0].parameters(), lr=0.01),
            torch.optim.SGD([*self.net[2].parameters(), *self.net[4].parameters()], lr=0.05, momentum=0.9),
        ]


def _two_optimizers(rank, schedule):
    watch = Watch()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*`schedule`")
        trainer(scheduled(schedule), 2, callbacks=[watch]).fit(TwoOptimizers(), data(8, rank))
    return counts(watch.zeros)


@pytest.mark.parametrize("schedule", OF_TWO, ids=["at once", "gradual"])
def test_steps_of_several_optimizers_all_count_and_none_is_missed(runs, schedule):
    expected = [pruned(schedule.sparsity_at(2 * batch, 0.6)) for batch in range(8)]
    assert len(set(expected)) > 1
    assert runs["two optimizers", repr(schedule)] == [expected] * 2


def _averaged(rank):
    average, model, seen = EMAWeightAveraging(decay=0.9), Stepwise(), []

    class Look(Callback):
        def on_train_end(self, runner, module):
            state = [each["exp_avg"] for each in runner.optimizers[0].state.values()]
            seen.extend([zeros(average._average_model), sum(int((each == 0).sum()) for each in state)])

    trainer(scheduled(GRADUAL), 2, callbacks=[Look(), average]).fit(model, data(12, rank))
    return seen


def test_averages_and_the_state_of_the_optimizer_are_pruned_along(runs):
    assert runs["averaged"] == [[pruned(0.6)] * 2] * 2


def _late(rank, schedule, said):
    with pytest.warns(UserWarning, match=said) if rank == 0 else nullcontext():
        trainer(scheduled(schedule), 2).fit(Stepwise(), data(6, rank))
    return True


@pytest.mark.parametrize("said", [said for _, said in LATE])
def test_a_schedule_that_goes_beyond_the_end_is_said_at_the_start(runs, said):
    assert runs["late", said] == [True, True]


def _wordless(module):
    raise ArithmeticError


def _fails_later(rank):
    runner = trainer(scheduled(PruningSchedule(3), pruning=MaskFunction(_wordless)), 2)
    with pytest.raises(ValueError, match="ArithmeticError"):
        runner.fit(Stepwise(), data(6, rank))
    return runner.global_step


def test_masks_that_cannot_be_had_in_the_middle_are_an_error_on_all_ranks():
    assert launch(_fails_later, world_size=2) == [3, 3]
