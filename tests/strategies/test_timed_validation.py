"""`val_check_interval` as a time: rank 0's clock says when, and all ranks validate after the same batch."""

import time
from datetime import timedelta
from unittest.mock import patch

import numpy as np
import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from support.cyclic import cyclic, deep
from support.processes import launch
from support.training import Regression, loader, local_update, sample, trainer, weights
from torch.utils.data import DataLoader, IterableDataset

from lightning_comm import Averaging, CompressedDDPStrategy, FixedPeriod
from lightning_comm.transport import stop_protocol

INTERVAL_S = 0.06  # between validations, or checkpoints
STRATEGIES = {
    "cyclic": cyclic,
    "rounds": lambda: local_update(FixedPeriod(5)),
    "overlap": lambda: local_update(FixedPeriod(8), averaging=Averaging(overlap_steps=2)),
    "gradients": lambda: local_update(FixedPeriod(4), gradient_steps=1000),
    "compressed": lambda: CompressedDDPStrategy("bf16", timeout=timedelta(seconds=40)),
}


class Endless(IterableDataset):
    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        index = 0
        while True:
            yield sample(self.rank, index)
            index += 1


class Paced(Regression):
    """Rank 1 takes three times as long as rank 0, and its own clock is always late, or always early."""

    def __init__(self, rank, early):
        super().__init__(deep(6))
        self.rank, self.early, self.validated = rank, early, []

    def on_train_start(self):
        if agreement := getattr(self.trainer.strategy._run, "agreement", None):
            agreement._poll_interval_s = INTERVAL_S / 2  # looks for requests as often in a run that is so short

    def training_step(self, batch, batch_idx):
        time.sleep(0.002 + 0.004 * self.rank)
        if self.rank:
            self.trainer._last_val_time = float("-inf" if self.early else "inf")
        return super().training_step(batch, batch_idx)

    def on_validation_start(self):
        if not self.trainer.sanity_checking:
            self.validated.append((self.trainer.global_step, time.monotonic()))


RUNS = {
    "endless": {"max_steps": 24, "max_epochs": -1, "val_check_interval": timedelta(seconds=INTERVAL_S)},
    "epochs": {"max_epochs": 2, "val_check_interval": {"seconds": INTERVAL_S}, "accumulate_grad_batches": 2},
}


ALL = [*((name, "endless") for name in STRATEGIES), *((name, "epochs") for name in ("cyclic", "rounds"))]
ALSO = {("rounds", "endless"), ("overlap", "endless")}  # the strategy with epochs, and others without, are below


def _timed(rank, world_size, cases):
    answers = {}
    for name, kind in cases:
        module = Paced(rank, early=kind == "endless")
        runner = trainer(STRATEGIES[name](), world_size, limit_val_batches=1, num_sanity_val_steps=0, **RUNS[kind])
        data = DataLoader(Endless(rank), 4) if kind == "endless" else loader(17, rank)
        began = time.monotonic()
        runner.fit(module, data, loader(1, 90 + rank))
        steps = [step for step, _ in module.validated]
        answers[name, kind] = steps, [at - began for _, at in module.validated], weights(module)
    return answers


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param([case for case in ALL if case not in ALSO], id="most"),
        pytest.param(ALL, id="all", marks=pytest.mark.exhaustive),
    ],
)
def test_all_ranks_validate_after_the_same_batch_whatever_their_clocks_say(cases):
    one, other = launch(_timed, 2, cases, world_size=2, timeout_s=120)
    assert list(one) == cases
    for name, (steps, times, final) in one.items():
        assert len(steps) >= 1, name
        assert (np.diff([0.0, *times]) >= INTERVAL_S).all(), (name, times)  # on the clock of rank 0
        assert steps == other[name][0], name
        for mine, others in zip(final, other[name][2], strict=True):
            assert np.array_equal(mine, others), name


class Saves(Callback):
    """When, and after which step, something is saved."""

    def __init__(self):
        self.at = []

    def on_save_checkpoint(self, runner, module, checkpoint):
        self.at.append((runner.global_step, time.monotonic()))


def _saved(rank, world_size, folder):
    save = ModelCheckpoint(folder, train_time_interval=timedelta(seconds=INTERVAL_S), save_top_k=-1)
    saves = Saves()
    runner = trainer(cyclic(), world_size, callbacks=[save, saves], enable_checkpointing=True)
    runner.fit(Paced(rank, early=True), loader(25, rank))
    return [step for step, _ in saves.at], [at for _, at in saves.at]


def test_a_checkpoint_by_the_clock_is_saved_once_though_both_ranks_ask_for_it(tmp_path):
    (steps, times), (others, _) = launch(_saved, 2, str(tmp_path), world_size=2)
    assert steps == others
    assert len(steps) >= 2
    assert (np.diff(times) >= INTERVAL_S).all()


# ---- at the last step ------------------------------------------------------------------------------------------------

LAST = 3  # steps; rank 0 asks after the one before
ENDINGS = {
    "validation, max_steps": {"max_steps": LAST, "max_epochs": -1},
    "checkpoint, max_steps": {"max_steps": LAST, "max_epochs": -1},
    "validation, the module's own": {"max_epochs": 1},
}
AN_HOUR = timedelta(hours=1)
# ranks in step, which agree by their messages: steps, and in which batch rank 0 finds the time up, for the last of them
IN_STEP = {"cyclic": (5, 1), "compressed": (LAST, LAST - 1)}


class AsksLate(Regression):
    """Rank 0 finds the time up after the last step but one; rank 1 looks for that after the last, and waits for rank 0.

    Rank 0 takes its steps for fast ones and would pause for the others much later, rank 1 its own for slow ones.
    """

    def __init__(self, rank, save=None, stops=False, asks_in=LAST - 2, waits=True):
        super().__init__(deep(6))
        self.rank, self.save, self.stops, self.asks_in, self.validated = rank, save, stops, asks_in, []
        self.waits = waits

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if self.stops and batch_idx == LAST else None

    def training_step(self, batch, batch_idx):
        if self.rank == 0 and batch_idx == self.asks_in:
            if self.save is None:
                self.trainer._last_val_time = float("-inf")
            else:
                self.save._last_time_checked = float("-inf")
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):  # behind the messages of this step
        if not self.waits:
            return
        agreement = self.trainer.strategy._run.agreement
        agreement._poll_interval_s, agreement._patience_s = 0.01, 0.3
        if self.rank == 1 and self.trainer.global_step == LAST - 1:
            while not agreement._store.check([agreement._key("news", shared=True)]):
                time.sleep(0.001)
            agreement._next_poll_s = 0.0

    def on_validation_start(self):
        self.validated.append(self.trainer.global_step)


def _asked_before_the_last(rank, world_size, folder):
    with patch.object(stop_protocol, "_stride", lambda step_time_s, within_s: 1024 if rank == 0 else 1):
        return _asked(rank, world_size, folder)


def _asked(rank, world_size, folder):
    answers = {}
    for name, options in ENDINGS.items():
        kind, _, ending = name.partition(", ")
        save = None
        if kind == "checkpoint":
            save = ModelCheckpoint(folder, train_time_interval=AN_HOUR, save_top_k=-1)
        saves = Saves()
        runner = trainer(
            local_update(FixedPeriod(4), gradient_steps=1000),
            world_size,
            limit_val_batches=1,
            num_sanity_val_steps=0,
            val_check_interval=AN_HOUR,
            callbacks=[saves, *([save] if save else [])],
            enable_checkpointing=save is not None,
            **options,
        )
        module = AsksLate(rank, save, ending != "max_steps")
        runner.fit(module, DataLoader(Endless(rank), 4), loader(1, 90 + rank))
        answers[name] = runner.global_step, module.validated, [step for step, _ in saves.at]
    for name, (steps, asks_in) in IN_STEP.items():
        module = AsksLate(rank, asks_in=asks_in, waits=False)
        options = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 1, "num_sanity_val_steps": 0}
        runner = trainer(STRATEGIES[name](), world_size, val_check_interval=AN_HOUR, **options)
        runner.fit(module, DataLoader(Endless(rank), 4), loader(1, 90 + rank))
        answers[name] = runner.global_step, module.validated, []
    return answers


def test_what_is_asked_for_before_the_last_step_is_done_there_on_all_ranks_or_on_none(tmp_path):
    for answers in launch(_asked_before_the_last, 2, str(tmp_path), world_size=2):
        assert answers == {
            "validation, max_steps": (LAST, [LAST], []),
            "checkpoint, max_steps": (LAST, [], [LAST]),
            "validation, the module's own": (LAST, [], []),
            "cyclic": (5, [5], []),
            "compressed": (LAST, [LAST], []),
        }
