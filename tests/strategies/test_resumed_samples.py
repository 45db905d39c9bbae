"""Resumed runs of every family of strategies, on a schedule that asks Lightning for the length of the run.

That builds the loaders before Lightning has read where they stood. The oracle is the run that was never stopped: which
records each rank was given.
"""

import warnings
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from support.processes import launch
from support.training import trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_comm import (
    CompressedDDPStrategy,
    CyclicStrategy,
    FixedPeriod,
    LocalUpdateStrategy,
    PartitionedLoader,
    SparseMask,
)
from lightning_comm.data.resumable import ResumableLoader

WAIT = {"timeout": timedelta(seconds=60)}
OURS = {
    "ddp_bf16": lambda: CompressedDDPStrategy("bf16", **WAIT),
    "ddp_powersgd": lambda: CompressedDDPStrategy("powersgd", **WAIT),
    "pactrain": lambda: CompressedDDPStrategy(SparseMask(then="bf16"), **WAIT),
    "local_sgd": lambda: LocalUpdateStrategy(FixedPeriod(4), **WAIT),
    "post_local_sgd": lambda: LocalUpdateStrategy(FixedPeriod(4), gradient_steps=0.5, **WAIT),
    "cyclic": lambda: CyclicStrategy(**WAIT),
}
THOROUGHLY = ("local_sgd", "cyclic")  # one that is flushed for a save, and one that is not
ALSO = ("ddp_bf16", "ddp_powersgd", "post_local_sgd")  # whose family has one already
BY_STEPS = "local_sgd"  # which also goes on from the end of an epoch in a run that `max_steps` ends
RECORDS, BATCH, RANKS = 24, 4, 2
EPOCH = RECORDS // BATCH // RANKS  # batches


class Recorded(LightningModule):
    """Writes down which records it is given; its schedule is as long as the run."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        parts = batch if isinstance(batch[0], (list, tuple)) else [batch]
        self.seen.append([record for records, _ in parts for record in records.tolist()])
        return sum(self.net(x).square().mean() for _, x in parts)

    def validation_step(self, batch, batch_idx):
        pass

    def val_dataloader(self):
        return DataLoader(records(4), BATCH)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        total = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.1, 1 - step / total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def records(count=RECORDS):
    return TensorDataset(torch.arange(count), torch.randn(count, 4, generator=torch.Generator().manual_seed(1)))


def resumable(rank, **options):
    return ResumableLoader(records(), BATCH, seed=3, num_replicas=RANKS, rank=rank, **options)


def partitioned(rank):
    return PartitionedLoader(records(), BATCH * RANKS, seed=3)


def several(rank):
    short = ResumableLoader(records(16), BATCH, seed=4, num_replicas=RANKS, rank=rank)
    return CombinedLoader([resumable(rank), short], "max_size_cycle")


class Rewound(DataLoader):
    """A stateful loader of somebody else, which restores its state as a pass begins and not with its first batch."""

    def __init__(self, rank):
        super().__init__(records(), BATCH)
        self.done = self.start = 0

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.start = state["done"]

    def __iter__(self):
        start, self.start, batches = self.start, 0, list(super().__iter__())
        return self._from(start if start < len(batches) else 0, batches)

    def _from(self, start, batches):
        for self.done in range(start, len(batches)):
            self.done += 1
            yield batches[self.done - 1]


class Save(Callback):
    """Saves at these places: a hook, and how many batches the run has been given."""

    def __init__(self, folder, places):
        self.folder, self.places = folder, places

    def _save(self, hook, runner, module):
        if (hook, len(module.seen)) in self.places:
            runner.save_checkpoint(self.folder / f"{hook}-{len(module.seen)}.ckpt")

    def on_train_batch_end(self, runner, module, *_):
        self._save("batch", runner, module)

    def on_validation_end(self, runner, module):
        self._save("validation", runner, module)

    def on_train_epoch_end(self, runner, module):
        self._save("epoch", runner, module)


class At(Callback):
    """Calls a function in a hook of training."""

    def __init__(self, hook, call):
        setattr(self, hook, lambda *_: call())


def fit(strategy, loader, saves=None, ckpt_path=None, **trainer_args):
    """Return the records of each batch, and the warnings of the loader."""
    module = Recorded()
    arguments = {"max_epochs": 3, "callbacks": [Save(*saves)] if saves else [], **trainer_args}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(strategy, RANKS, **arguments).fit(module, loader, ckpt_path=ckpt_path)
    return module.seen, [str(each.message) for each in caught if "Loader:" in str(each.message)]


def ours(rank, folder, names):
    """Whole runs of each strategy, and resumed ones: in an epoch, with its last batch, at its end, and again."""
    answers = {}
    places = [("batch", EPOCH + 2), ("batch", EPOCH), ("epoch", EPOCH)]
    for name in names:
        strategy = OURS[name]
        where = folder / name
        whole, _ = fit(strategy(), resumable(rank), (where, places))
        answers[name, "whole"] = whole
        if name not in THOROUGHLY:
            rest, said = fit(strategy(), resumable(rank), ckpt_path=where / f"batch-{EPOCH + 2}.ckpt")
            answers[name, "middle"] = rest, whole[EPOCH + 2 :], said
            continue
        again = {"saves": (where / "again", [("batch", 2)])}
        for hook, done in places:
            rest, said = fit(strategy(), resumable(rank), ckpt_path=where / f"{hook}-{done}.ckpt", **again)
            answers[name, f"{hook} {done}"] = rest, whole[done:], said
            if (hook, done) == ("batch", EPOCH):  # and stopped once more in the epoch after it
                rest, said = fit(strategy(), resumable(rank), ckpt_path=where / "again" / "batch-2.ckpt")
                answers[name, "second resume"] = rest, whole[EPOCH + 2 :], said
        if name != BY_STEPS:
            continue
        steps = {"max_epochs": -1, "max_steps": EPOCH + 2}
        fit(strategy(), resumable(rank), (where / "steps", [("epoch", EPOCH)]), **steps)
        rest, said = fit(strategy(), resumable(rank), ckpt_path=where / "steps" / f"epoch-{EPOCH}.ckpt", **steps)
        answers[name, "end of an epoch of max_steps"] = rest, whole[EPOCH : EPOCH + 2], said
    return answers


@pytest.fixture(scope="module")
def resumed(request, tmp_path_factory):
    names = [each for each in OURS if each not in ALSO or request.config.getoption("exhaustive")]
    return launch(ours, tmp_path_factory.mktemp("ours"), names, world_size=RANKS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] if name in ALSO else []) for name in OURS]
)
def test_a_resumed_run_is_given_the_records_of_the_run_that_was_never_stopped(name, resumed):
    for answers in resumed:
        assert len(answers[name, "whole"]) == 3 * EPOCH
        cases = {case: value for (strategy, case), value in answers.items() if strategy == name and case != "whole"}
        assert len(cases) == (1 + (3 + (name == BY_STEPS) if name in THOROUGHLY else 0))
        for case, (rest, expected, said) in cases.items():
            assert rest == expected, case
            assert said == [], case
    first = [record for answers in resumed for batch in answers[name, "whole"][:EPOCH] for record in batch]
    assert sorted(first) == list(range(RECORDS))


def other_loaders(rank, folder):
    answers = {}
    for name, new in {"several": several, "partitioned": partitioned, "rewound": Rewound}.items():
        strategy = OURS["ddp_bf16"]
        whole, _ = fit(strategy(), new(rank), (folder / name, [("batch", 2), ("batch", 3)]))
        for done in (2,) if name == "several" else (2, 3):  # as the loaders that it is of: at the end of an epoch
            rest, said = fit(strategy(), new(rank), ckpt_path=folder / name / f"batch-{done}.ckpt")
            answers[name, done] = rest, whole[done:], said
    return answers


def test_so_is_it_with_several_loaders_with_shares_and_with_a_stateful_loader_of_somebody_else(tmp_path):
    for answers in launch(other_loaders, tmp_path, world_size=RANKS):
        assert len(answers) == 5
        for case, (rest, expected, said) in answers.items():
            assert rest == expected, case
            assert len(rest) > 4
            assert said == []


IN_AN_EPOCH = {"limit_val_batches": 1, "val_check_interval": 2, "num_sanity_val_steps": 0}
PLAIN = {  # a loader, the hook in which a run is saved in the middle of an epoch, and arguments of the Trainer
    "ResumableLoader": (resumable, "batch", {}),
    "workers": (lambda rank: resumable(rank, num_workers=1, persistent_workers=True), "batch", {}),
    "validation": (resumable, "validation", IN_AN_EPOCH),
    "PartitionedLoader": (partitioned, "batch", {}),
    "several": (several, "batch", {}),
}


SAVED_AT_THE_END = ("ResumableLoader", "PartitionedLoader")  # of an epoch too: each kind of loader


def plain(rank, folder):
    answers = {}
    for name, (new, saved_in, options) in PLAIN.items():
        places = [(saved_in, 2), *([("epoch", EPOCH)] if name in SAVED_AT_THE_END else [])]
        whole, said = fit(DDPStrategy(**WAIT), new(rank), (folder / name, places), **options)
        answers[name, "fresh"] = whole, whole, said
        for hook, done in places:
            saved = folder / name / f"{hook}-{done}.ckpt"
            rest, said = fit(DDPStrategy(**WAIT), new(rank), ckpt_path=saved, **options)
            answers[name, "end" if hook == "epoch" else "middle"] = rest, whole[done:], said
    # another loader, that a hook iterates for itself
    aside = At("on_train_batch_start", lambda: next(iter(resumable(rank))))
    saved = folder / "ResumableLoader" / "batch-2.ckpt"
    _, said = fit(DDPStrategy(**WAIT), DataLoader(records(), BATCH), ckpt_path=saved, callbacks=[aside])
    assert not any("batches come twice" in each for each in said), said
    # a run that was begun with a loader of torch's, whose place is in no checkpoint
    torchs = DataLoader(records(), BATCH)
    fit(DDPStrategy(**WAIT), torchs, (folder / "torch", [("batch", 2)]))
    answers["torch", "other"] = fit(DDPStrategy(**WAIT), resumable(rank), ckpt_path=folder / "torch" / "batch-2.ckpt")
    return answers


def test_under_ddp_the_loader_warns_where_batches_come_twice_and_only_there(tmp_path):
    for rank, cases in enumerate(launch(plain, tmp_path, world_size=RANKS)):
        _, said = cases.pop(("torch", "other"))
        assert [("after 2 batches of epoch 0" in each, "another kind of loader" in each) for each in said] == (
            [(True, True)] if rank == 0 else []
        )
        assert len(cases) == 2 * len(PLAIN) + len(SAVED_AT_THE_END)
        for (name, case), (rest, expected, said) in cases.items():
            assert (rest != expected) == (case == "middle"), (name, case)
            number = 0 if rank or case != "middle" else 2 if name == "several" else 1
            assert len(said) == number, (name, case, said)
            for message in said:
                assert "after 2 batches of epoch 0" in message
                assert "batches come twice" in message
                assert "estimated_stepping_batches" in message
                assert "lightning_comm" in message
