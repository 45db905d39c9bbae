"""Runs of a Trainer and of real ranks with the partitioned loader, against one rank and the run that never stopped."""

import functools
import os
import random
import warnings

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.utilities import CombinedLoader
from support.recorded_runs import Recorder, SaveEverywhere, batches_done, train
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from lightning_comm.core.adaptive_partition.plan import PartitionPlan
from lightning_comm.data.adaptive_partition.loader import PartitionedLoader
from lightning_comm.strategies.common.training_samples import training_samples

torch.set_num_threads(1)  # a process that has started torch's threads cannot be forked into ranks

pytestmark = pytest.mark.slow
SAMPLES, GLOBAL_BATCH = 23, 4
new = functools.partial(PartitionedLoader, range(SAMPLES), GLOBAL_BATCH, seed=3)


@pytest.mark.parametrize(
    "trainer_args",
    [
        pytest.param({"max_epochs": 3}, marks=pytest.mark.exhaustive),
        pytest.param({"max_epochs": 3, "validate": False}, marks=pytest.mark.exhaustive),
        {"max_epochs": 2, "val_check_interval": 2},
        pytest.param({"max_epochs": 3, "check_val_every_n_epoch": 2}, marks=pytest.mark.exhaustive),
        {"max_epochs": 2, "check_val_every_n_epoch": None, "val_check_interval": 4},
        {"max_epochs": 2, "limit_train_batches": 4},
        {"max_epochs": 2, "accumulate_grad_batches": 2},
        {"max_steps": 9},
    ],
    ids=str,
)
def test_a_run_resumed_from_any_checkpoint_sees_the_samples_of_the_run_that_was_never_stopped(trainer_args, tmp_path):
    whole = train(new(), tmp_path, **trainer_args)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert {batches_done(checkpoint) for checkpoint in checkpoints} == set(range(1, len(whole) + 1))
    for checkpoint in checkpoints:
        if "max_steps" in trainer_args and checkpoint.name.startswith("epoch"):
            continue  # Lightning itself loses count here, see the docstring of ResumableLoader
        rest = train(new(), ckpt_path=checkpoint, **trainer_args)
        assert rest == whole[batches_done(checkpoint) :], checkpoint.name


@pytest.mark.parametrize("persistent_workers", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_workers_that_load_ahead_move_no_sample(persistent_workers, tmp_path):
    in_process = train(new(), max_epochs=2, limit_train_batches=4)
    workers = {"num_workers": 2, "persistent_workers": persistent_workers}
    assert train(new(**workers), tmp_path, max_epochs=2, limit_train_batches=4) == in_process
    for done in (1, 4, 6):  # in an epoch, between two, and in the last one
        for checkpoint in tmp_path.glob(f"*-{done}.ckpt"):
            rest = train(new(**workers), ckpt_path=checkpoint, max_epochs=2, limit_train_batches=4)
            assert rest == in_process[done:], checkpoint.name


class Pairs(Recorder):
    def training_step(self, batch, batch_idx):
        self.seen.append([each.tolist() for each in batch])
        return self.weight.sum()


def train_pairs(folder=None, ckpt_path=None):
    module = Pairs()
    trainer = quiet_trainer(max_epochs=2, callbacks=[SaveEverywhere(folder)] if folder else [])
    loaders = [new(), PartitionedLoader(range(7), 3, seed=1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, CombinedLoader(loaders, "max_size_cycle"), ckpt_path=ckpt_path)
    return module.seen


def quiet_trainer(**kwargs) -> Trainer:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(**{"accelerator": "cpu", "devices": 1, **dict.fromkeys(quiet, False), **kwargs})


def test_a_loader_that_is_cycled_in_a_combined_one_is_shuffled_anew_and_resumes(tmp_path):
    whole = train_pairs(tmp_path)
    assert [batch for batch, _ in whole] == train(new(), max_epochs=2)
    passes = [[sample for _, batch in whole[first : first + 3] for sample in batch] for first in (0, 3, 6, 9)]
    assert [sorted(each) for each in passes] == [list(range(7))] * 4
    assert len(set(map(tuple, passes))) == 4
    for done in range(1, len(whole)):
        (checkpoint,) = tmp_path.glob(f"batch-*-{done}.ckpt")
        assert train_pairs(ckpt_path=checkpoint) == whole[done:]


class RepeatFirstEpoch(Callback):
    def on_train_start(self, trainer, pl_module):
        trainer.train_dataloader.repeat_first_epoch()


def test_overfitting_sees_the_same_samples_in_every_epoch():
    module = Recorder()
    trainer = quiet_trainer(max_epochs=3, overfit_batches=2, callbacks=[RepeatFirstEpoch()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader := new())
    assert trainer.train_dataloader is loader
    assert module.seen == 3 * [[0, 1, 2, 3], [4, 5, 6, 7]]


class Processes(Dataset):
    """Each sample is the process that loaded it, and a number that the seeding of workers decides."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([os.getpid(), random.getrandbits(30)])


def test_lightning_seeds_the_workers_and_stops_persistent_ones_after_the_run(monkeypatch):
    monkeypatch.setenv("PL_SEED_WORKERS", "0")  # which is put back at the end
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    seen = []
    for seed in (1, 1, 2):
        seed_everything(0, workers=True, verbose=False)
        loader = PartitionedLoader(Processes(), 4, seed=seed, num_workers=1, persistent_workers=True)
        seen.append(torch.tensor(train(loader, max_epochs=2)))
        assert loader.worker_init_fn.func.__name__ == "pl_worker_init_function"
        (pid,) = seen[-1][..., 0].unique().tolist()
        assert pid != os.getpid()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert torch.equal(seen[0][..., 1], seen[1][..., 1])
    assert not torch.equal(seen[0][..., 1], seen[2][..., 1])


def test_samples_can_be_taken_from_the_data_while_the_loader_stays_where_it_is():
    class Take(Callback):
        def on_train_batch_start(self, trainer, *_):
            self.taken = [batch.tolist() for batch, _ in training_samples(trainer, 5, "test")]

    expected = train(new(), max_epochs=1)
    module = Recorder()
    trainer = quiet_trainer(max_epochs=1, callbacks=[take := Take()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, new())
    assert module.seen == expected
    assert [len(batch) for batch in take.taken] == [5]


class MoveShares(Callback):
    """Follows a plan and changes it at random every other batch, where no loader has passed yet."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        self.plan, self.draws = PartitionPlan(sizes), random.Random(0)

    def on_train_start(self, trainer, pl_module):
        trainer.train_dataloader.follow(self.plan, trainer.global_rank)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loader = trainer.train_dataloader
        pl_module.seen[-1] = pl_module.seen[-1][: loader.latest.samples]
        if batch_idx % 2 == 1:
            places = [None] * trainer.world_size
            dist.all_gather_object(places, tuple(loader.dispatched))
            spare = sum(self.plan.sizes) - trainer.world_size
            first = self.draws.randint(0, spare)
            self.plan.change_at(max(places), (1 + first, *[1] * (trainer.world_size - 2), 1 + spare - first))


class Ranks(Recorder):
    """Leaves what each rank saw in a file, since a forked rank leaves nothing else behind."""

    def __init__(self, folder, workers) -> None:
        super().__init__()
        self.folder, self.workers = folder, workers

    def train_dataloader(self):
        return new(num_workers=self.workers[self.global_rank])

    def on_train_end(self):
        changes = len(self.trainer.callbacks[0].plan.changes)
        torch.save((self.trainer.world_size, changes, self.seen), self.folder / f"rank-{self.global_rank}.pt")


def fit_ranks(folder, sizes, workers, ckpt_path=None, **trainer_args) -> list[list[int]]:
    """Return the global batches of a run of real ranks, whose shares move."""
    folder.mkdir()
    callbacks = [MoveShares(sizes), *([] if ckpt_path else [SaveEverywhere(folder)])]
    trainer = quiet_trainer(
        strategy="ddp_fork", devices=len(sizes), max_epochs=2, callbacks=callbacks, limit_val_batches=0, **trainer_args
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Ranks(folder, workers), ckpt_path=ckpt_path)
    worlds, changes, seen = zip(*(torch.load(folder / f"rank-{rank}.pt") for rank in range(len(sizes))), strict=True)
    assert worlds == (len(sizes),) * len(sizes)
    assert min(changes) == max(changes) > 1
    assert len({len(batches) for batches in seen}) == 1
    return [[sample for part in parts for sample in part] for parts in zip(*seen, strict=True)]


@pytest.mark.parametrize(
    "resumed",
    [
        [(6, (1, 2, 1), (0, 0, 0)), (7, (3, 1), (0, 1))],  # between two epochs, and in the second
        pytest.param([(1, (2, 2), (2, 0))], marks=pytest.mark.exhaustive),
    ],
    ids=["late", "early"],
)
def test_real_ranks_share_every_step_of_one_rank_while_shares_move_and_any_number_resumes(resumed, tmp_path):
    whole = train(new(), max_epochs=2)
    assert fit_ranks(tmp_path / "injected", (1, 3), (0, 2), use_distributed_sampler=True) == whole
    assert fit_ranks(tmp_path / "alone", (1, 1, 2), (1, 0, 0), use_distributed_sampler=False) == whole
    for done, sizes, workers in resumed:
        (checkpoint,) = (tmp_path / "alone").glob(f"batch-*-{done}.ckpt")
        assert fit_ranks(tmp_path / f"after-{done}", sizes, workers, checkpoint) == whole[done:]


class Points(Dataset):
    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(3, generator=torch.Generator().manual_seed(index), dtype=torch.float64)


def _weighted_gradients(rank, global_batch):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1, dtype=torch.float64)
    parallel, whole = DistributedDataParallel(model), PartitionedLoader(Points(), global_batch)
    whole.follow(PartitionPlan((global_batch,)), 0)
    errors, weights = [], []
    loader = PartitionedLoader(Points(), global_batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a loop that reads `latest` is not warned
        for batch, everything in zip(loader, whole, strict=True):
            expected = torch.autograd.grad(model(everything).square().mean(), model.weight)[0]
            model.zero_grad()
            (parallel(batch).square().mean() * loader.latest.weight).backward()
            errors.append(float((model.weight.grad - expected).norm() / expected.norm()))
            weights.append(loader.latest.weight)
    return errors, weights


@pytest.mark.parametrize("global_batch", [5, 10], ids=["uneven", "dummy-in-the-tail"])
def test_a_plain_loop_that_weights_its_loss_has_the_gradient_of_the_whole_batch(global_batch, run_ranks):
    answers = run_ranks(_weighted_gradients, global_batch, world_size=2)
    for errors, _ in answers:
        assert max(errors) < 1e-12
    weights = list(zip(*(weights for _, weights in answers), strict=True))
    assert all(sum(each) == pytest.approx(2) for each in weights)
    assert min(map(min, weights)) == 0.0  # the tail of one sample


def _warnings_of_a_loop(rank):
    loader = PartitionedLoader(range(6), 4)  # a tail of 2, then one that follows
    with warnings.catch_warnings(record=True) as even:
        warnings.simplefilter("always")
        list(loader)
        list(loader)
    loader = PartitionedLoader(range(9), 3)
    with warnings.catch_warnings(record=True) as uneven:
        warnings.simplefilter("always")
        for batch, _ in enumerate(loader):
            if batch == 0:
                assert loader.latest is not None  # read once, and then forgotten
    return [str(each.message) for each in even], [str(each.message) for each in uneven]


def test_a_plain_loop_that_forgets_the_weights_is_warned_once_if_shares_are_unequal(run_ranks):
    for even, uneven in run_ranks(_warnings_of_a_loop, world_size=2):
        assert even == []
        (message,) = uneven
        for word in ("PartitionedLoader: 2 ranks had (2, 1) samples", "loader.latest.weight", "AdaptivePartition"):
            assert word in message


def _in_a_group(rank):
    messages = []
    for use in (lambda loader: next(iter(loader)), lambda loader: loader.follow(PartitionPlan((1, 1)), 0)):
        try:
            use(PartitionedLoader(range(8), 1 if not messages else 4))
        except ValueError as error:
            messages.append(str(error))
    return messages, PartitionedLoader.from_dataloader(DataLoader(range(12), 3)).global_batch_size


def test_ranks_come_from_the_process_group_and_each_needs_a_sample(run_ranks):
    for (too_small, other_total), size in run_ranks(_in_a_group, world_size=2):
        assert "`global_batch_size` must be >= the number of ranks, 2" in too_small
        assert "got 1. It counts the samples of all ranks together" in too_small
        assert "(1, 1), which sum to 2" in other_total
        assert size == 6
