"""`val_check_interval` as a time: rank 0's clock says when, and all ranks validate after the same batch."""

import time
from datetime import timedelta

import numpy as np
from support.cyclic import cyclic, deep
from support.processes import launch
from support.training import Regression, loader, local_update, sample, trainer, weights
from torch.utils.data import DataLoader, IterableDataset

from lightning_comm import Averaging, CompressedDDPStrategy, FixedPeriod

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

    def training_step(self, batch, batch_idx):
        time.sleep(0.002 + 0.004 * self.rank)
        if self.rank:
            self.trainer._last_val_time = float("-inf" if self.early else "inf")
        return super().training_step(batch, batch_idx)

    def on_validation_start(self):
        if not self.trainer.sanity_checking:
            self.validated.append((self.trainer.global_step, time.monotonic()))


def _timed(rank, world_size):
    answers = {}
    for name, strategy in STRATEGIES.items():
        for kind, options in {
            "endless": {"max_steps": 90, "max_epochs": -1, "val_check_interval": timedelta(seconds=0.15)},
            "epochs": {"max_epochs": 3, "val_check_interval": {"seconds": 0.15}, "accumulate_grad_batches": 2},
        }.items():
            module = Paced(rank, early=kind == "endless")
            runner = trainer(strategy(), world_size, limit_val_batches=1, num_sanity_val_steps=0, **options)
            data = DataLoader(Endless(rank), 4) if kind == "endless" else loader(41, rank)
            began = time.monotonic()
            runner.fit(module, data, loader(1, 90 + rank))
            steps = [step for step, _ in module.validated]
            answers[name, kind] = steps, [at - began for _, at in module.validated], weights(module)
    return answers


def test_all_ranks_validate_after_the_same_batch_whatever_their_clocks_say():
    one, other = launch(_timed, 2, world_size=2, timeout_s=120)
    for name, (steps, times, final) in one.items():
        assert 1 <= len(steps) <= 1 + (times[-1]) / 0.15, (name, steps)
        assert steps == other[name][0], name
        assert (np.diff([0.0, *times]) >= 0.15).all(), (name, times)
        for mine, others in zip(final, other[name][2], strict=True):
            assert np.array_equal(mine, others), name
    print({k: (v[0]) for k, v in one.items()})
