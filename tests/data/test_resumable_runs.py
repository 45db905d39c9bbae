"""Runs of a Trainer, resumed from every checkpoint, against the run that was never stopped."""

import functools
import pathlib
import warnings

import pytest
import torch
from lightning.pytorch import Trainer
from support.recorded_runs import Recorder, SaveEverywhere, batches_done, train

from lightning_comm.data.resumable import ResumableLoader

torch.set_num_threads(1)  # a process that has started torch's threads cannot be forked into ranks

pytestmark = pytest.mark.slow
SAMPLES = 11


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
        pytest.param({"max_steps": 15}, marks=pytest.mark.exhaustive),
        {"max_steps": 9, "validate": False},
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


@pytest.mark.parametrize(
    ("rank", "num_replicas", "drop_last"),
    [
        *((0, 1, True), (1, 2, False), (2, 3, True)),
        *(pytest.param(*more, marks=pytest.mark.exhaustive) for more in ((0, 1, False), (1, 2, True), (2, 3, False))),
    ],
)
def test_every_rank_resumes_at_every_step(rank, num_replicas, drop_last, tmp_path):
    new = functools.partial(
        ResumableLoader, range(13), 2, num_replicas=num_replicas, rank=rank, drop_last=drop_last, seed=1
    )
    whole = train(new(), tmp_path, max_epochs=2)
    assert len(whole) == 2 * len(new())
    for checkpoint in tmp_path.glob("*.ckpt"):
        rest = train(new(), ckpt_path=checkpoint, max_epochs=2)
        assert rest == whole[batches_done(checkpoint) :], checkpoint.name


@pytest.mark.parametrize("persistent_workers", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_workers_that_load_ahead_move_no_sample(persistent_workers, tmp_path):
    new = functools.partial(ResumableLoader, range(SAMPLES), 2, seed=3)
    in_process = train(new(), max_epochs=2, limit_train_batches=4)
    with_workers = functools.partial(new, num_workers=2, persistent_workers=persistent_workers)
    assert train(with_workers(), tmp_path, max_epochs=2, limit_train_batches=4) == in_process
    assert len(list(tmp_path.glob("*.ckpt"))) > len(in_process)
    for done in (1, 4, 6):  # in an epoch, between two, and in the last one
        for checkpoint in tmp_path.glob(f"*-{done}.ckpt"):
            rest = train(with_workers(), ckpt_path=checkpoint, max_epochs=2, limit_train_batches=4)
            assert rest == in_process[done:], checkpoint.name


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


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.exhaustive), 3])
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
