"""A resumed run against the run that was never stopped, and the order against torch's own."""

import functools
import pathlib
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_comm.data.resumable import ResumableLoader

torch.set_num_threads(1)  # a process that has started torch's threads cannot be forked into ranks

SAMPLES = 11


class Recorder(LightningModule):
    """Writes down which samples it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.tolist())
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEverywhere(Callback):
    """Saves in every hook in which checkpoints are saved; the name tells how many batches were seen."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def _save(self, hook: str, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{hook}-{trainer.current_epoch}-{len(module.seen)}.ckpt")

    def on_train_batch_end(self, trainer, pl_module, *_):
        self._save("batch", trainer, pl_module)

    def on_validation_end(self, trainer, pl_module):
        self._save("validation", trainer, pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self._save("epoch", trainer, pl_module)


def train(loader, folder=None, ckpt_path=None, validate=True, **trainer_args) -> list[list[int]]:
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SaveEverywhere(folder)] if folder else [],
        **trainer_args,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning advises on workers and logging
        trainer.fit(module, loader, DataLoader(range(4)) if validate else None, ckpt_path=ckpt_path)
    return module.seen


def batches_done(checkpoint: pathlib.Path) -> int:
    return int(checkpoint.stem.split("-")[-1])


@pytest.mark.parametrize(
    "trainer_args",
    [
        {"max_epochs": 3},
        {"max_epochs": 3, "validate": False},
        {"max_epochs": 3, "val_check_interval": 2},
        {"max_epochs": 3, "check_val_every_n_epoch": 2},
        {"max_epochs": 3, "check_val_every_n_epoch": None, "val_check_interval": 4},
        {"max_epochs": 3, "limit_train_batches": 4},
        {"max_epochs": 3, "accumulate_grad_batches": 2},
        {"max_steps": 15},
        {"max_steps": 15, "validate": False},
    ],
    ids=str,
)
def test_a_run_resumed_from_any_checkpoint_sees_the_samples_of_the_run_that_was_never_stopped(trainer_args, tmp_path):
    new = functools.partial(ResumableLoader, range(SAMPLES), batch_size=2, seed=3)
    whole = train(new(), tmp_path, **trainer_args)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert {batches_done(checkpoint) for checkpoint in checkpoints} == set(range(1, len(whole) + 1))
    for checkpoint in checkpoints:
        if "max_steps" in trainer_args and checkpoint.name.startswith("epoch"):
            continue  # Lightning itself loses count here, see the docstring of the loader
        rest = train(new(), ckpt_path=checkpoint, **trainer_args)
        assert rest == whole[batches_done(checkpoint) :], checkpoint.name


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("rank", "num_replicas"), [(0, 1), (0, 2), (1, 2), (2, 3)])
def test_every_rank_resumes_at_every_step(rank, num_replicas, drop_last, tmp_path):
    new = functools.partial(
        ResumableLoader, range(17), 2, num_replicas=num_replicas, rank=rank, drop_last=drop_last, seed=1
    )
    whole = train(new(), tmp_path, max_epochs=3)
    assert len(whole) == 3 * len(new())
    for checkpoint in tmp_path.glob("*.ckpt"):
        rest = train(new(), ckpt_path=checkpoint, max_epochs=3)
        assert rest == whole[batches_done(checkpoint) :], checkpoint.name


@pytest.mark.parametrize("persistent_workers", [False, True])
def test_workers_that_load_ahead_move_no_sample(persistent_workers, tmp_path):
    new = functools.partial(ResumableLoader, range(SAMPLES), 2, seed=3)
    in_process = train(new(), max_epochs=3, limit_train_batches=4)
    with_workers = functools.partial(new, num_workers=2, persistent_workers=persistent_workers)
    assert train(with_workers(), tmp_path, max_epochs=3, limit_train_batches=4) == in_process
    checkpoints = list(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) > len(in_process)
    for checkpoint in checkpoints:
        rest = train(with_workers(), ckpt_path=checkpoint, max_epochs=3, limit_train_batches=4)
        assert rest == in_process[batches_done(checkpoint) :], checkpoint.name


def test_a_run_that_is_stopped_again_and_again_sees_what_one_run_sees(tmp_path):
    new = functools.partial(ResumableLoader, range(SAMPLES), 2)
    whole = train(new(), max_epochs=3)
    # Stops of 5 batches, so that none is at the end of an epoch: a run resumed from a checkpoint of the last batch, and
    # stopped again in the next epoch, is one of the two cases in which Lightning itself loses count.
    start, checkpoint = 0, None
    while start < len(whole):
        stage = tmp_path / f"from-{start}"
        stage.mkdir()
        assert train(new(), stage, checkpoint, max_epochs=3) == whole[start:]
        done = min(5, len(whole) - start)
        (checkpoint,) = stage.glob(f"batch-*-{done}.ckpt")
        start += done
    assert start > 12  # the stops were in three epochs


class Ranks(Recorder):
    """Leaves what each rank saw in a file, since a forked rank leaves nothing else behind."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__()
        self.folder = folder

    def train_dataloader(self):
        return ResumableLoader(range(SAMPLES), 2, seed=5)

    def on_train_end(self):
        torch.save((self.trainer.world_size, self.seen), self.folder / f"rank-{self.global_rank}.pt")


@pytest.mark.parametrize("ranks", [2, 3])
def test_real_ranks_share_each_epoch_and_resume_together(ranks, tmp_path):
    def fit(name, ckpt_path=None):
        folder = tmp_path / name
        folder.mkdir()
        trainer = Trainer(
            accelerator="cpu",
            strategy="ddp_fork",
            devices=ranks,
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[] if ckpt_path else [SaveEverywhere(tmp_path)],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(Ranks(folder), ckpt_path=ckpt_path)
        world_sizes, seen = zip(*(torch.load(folder / f"rank-{rank}.pt") for rank in range(ranks)), strict=True)
        assert world_sizes == (ranks,) * ranks
        return seen

    whole = fit("whole")
    epoch_batches = len(whole[0]) // 2
    first_epoch = [sample for seen in whole for batch in seen[:epoch_batches] for sample in batch]
    assert set(first_epoch) == set(range(SAMPLES))
    assert len(first_epoch) == SAMPLES + -SAMPLES % ranks  # padded, so that all ranks have as many
    for done in (1, epoch_batches, epoch_batches + 1):
        (checkpoint,) = tmp_path.glob(f"batch-*-{done}.ckpt")
        assert fit(f"after-{done}", checkpoint) == tuple(seen[done:] for seen in whole)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_order_and_number_of_batches_are_those_of_distributed_sampler(shuffle, drop_last):
    for ranks in (1, 2, 3):
        for rank in range(ranks):
            order = {"num_replicas": ranks, "rank": rank, "shuffle": shuffle, "seed": 7, "drop_last": drop_last}
            ours = ResumableLoader(range(20), 3, **order)
            theirs = DataLoader(
                range(20), 3, sampler=(sampler := DistributedSampler(range(20), **order)), drop_last=drop_last
            )
            for epoch in range(3):
                ours.sampler.set_epoch(epoch)
                sampler.set_epoch(epoch)
                assert [batch.tolist() for batch in ours] == [batch.tolist() for batch in theirs]
            assert len(ours) == len(theirs)


def test_the_global_random_state_neither_decides_the_order_nor_moves():
    orders = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        orders.append([batch.tolist() for batch in ResumableLoader(range(20), 3)])
        assert torch.equal(torch.get_rng_state(), before)
    assert orders[0] == orders[1]


class Watched(Dataset):
    def __init__(self) -> None:
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        self.loaded.append(index)
        return index


def test_a_resumed_loader_keeps_its_length_and_loads_nothing_of_what_it_skips():
    first = ResumableLoader(Watched(), 2)
    batches = iter(first)
    seen = [next(batches).tolist() for _ in range(3)]
    resumed = ResumableLoader(dataset := Watched(), 2)
    resumed.load_state_dict(first.state_dict())
    assert len(resumed) == 5
    rest = [batch.tolist() for batch in resumed]
    assert dataset.loaded == [sample for batch in rest for sample in batch]
    assert sorted(dataset.loaded + [sample for batch in seen for sample in batch]) == list(range(10))


def test_the_state_is_plain_numbers_and_survives_being_loaded_and_saved_again():
    loader = ResumableLoader(range(10), 2, seed=4, shuffle=True)
    loader.sampler.set_epoch(6)
    next(iter(loader))
    state = loader.state_dict()
    assert {type(value) for value in state.values()} == {int}
    assert (state["epoch"], state["batches_done"]) == (6, 1)
    resumed = ResumableLoader(range(10), 2, seed=4, shuffle=True)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state


@pytest.mark.parametrize(
    ("change", "must_say"),
    [
        ({"batch_size": 3}, "batch_size was 2 and is 3"),
        ({"num_replicas": 2, "rank": 1}, "num_replicas was 1 and is 2"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"shuffle": False}, "shuffle was 1 and is 0"),
        ({"drop_last": True}, "drop_last was 0 and is 1"),
        ({"dataset": range(12)}, "samples was 10 and is 12"),
    ],
)
def test_a_plan_that_changed_in_mid_epoch_is_refused_and_at_the_end_of_an_epoch_it_is_not(change, must_say):
    def new(**arguments):
        return ResumableLoader(**{"dataset": range(10), "batch_size": 2, **arguments})

    loader = new()
    next(iter(loader))
    changed = new(**change)
    changed.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match=f"1 batches of epoch 0 .*{must_say}.*resume from a checkpoint of the end"):
        next(iter(changed))

    changed = new(**change)
    changed.load_state_dict(loader.state_dict())
    changed.sampler.set_epoch(1)
    assert len(list(changed)) == len(changed)


@pytest.mark.parametrize(
    ("kwargs", "error", "must_say"),
    [
        ({"batch_size": 0}, ValueError, ["batch_size", "got 0", "on one rank"]),
        ({"seed": -1}, ValueError, ["seed", "got -1"]),
        ({"num_replicas": 0}, ValueError, ["num_replicas", "got 0"]),
        ({"num_replicas": 2, "rank": 2}, ValueError, ["rank", "got 2", "process group"]),
        (
            {"batch_size": 8, "drop_last": True},
            ValueError,
            ["dataset", "5 samples", "batch_size`=8", "drop_last=False"],
        ),
        ({"dataset": range(0)}, ValueError, ["dataset", "0 samples"]),
        ({"dataset": iter([1])}, TypeError, ["dataset", "length", "list_iterator", "StatefulDataLoader"]),
        ({"sampler": [3]}, TypeError, ["sampler", "got [3]", "shuffle", "limit_train_batches"]),
        ({"generator": None}, TypeError, ["generator", "seed"]),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_a_way_out(kwargs, error, must_say):
    with pytest.raises(error) as caught:
        ResumableLoader(**{"dataset": range(5), "batch_size": 2, **kwargs})
    assert [word for word in ["ResumableLoader", *must_say] if word not in str(caught.value)] == []
