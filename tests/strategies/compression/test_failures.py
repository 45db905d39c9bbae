"""Compressed DDP with a rank that fails and lives on: the others end soon, and say which one it was and why."""

import os
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from support.processes import launch, outcomes
from support.training import Regression, loader, trainer

import lightning_comm.transport.failures as peers_module
from lightning_comm import CompressedDDPStrategy, CyclicStrategy, FixedPeriod, Int8, LocalUpdateStrategy

TIMEOUT_S = 60.0  # of the messages; whoever waits for it has not been told


class Failing(Callback):
    def __init__(self, hook, step, error=None):
        self.step, self.error = step, error
        setattr(self, hook, self._fail)

    def _fail(self, runner, *args, **kwargs):
        if runner.global_step >= self.step:
            raise self.error or ValueError(f"boom at step {runner.global_step}")


def _wait_for_all(folder, rank, world_size):
    """Let this rank live until all have ended their fit: nobody is freed because a process has gone."""
    Path(folder, f"ended-{rank}").touch()
    deadline = time.monotonic() + TIMEOUT_S / 2
    while len(list(Path(folder).glob("ended-*"))) < world_size:
        assert time.monotonic() < deadline, "some rank still waits for the one that has failed"
        time.sleep(0.01)
    dist.destroy_process_group()  # there is nothing left of it


def _fails(rank, world_size, folder, hook, who, step):
    peers_module._LEAVE_S = 0.1  # of this process alone
    strategy = CompressedDDPStrategy(Int8(), timeout=timedelta(seconds=TIMEOUT_S))
    saves = [ModelCheckpoint(folder, save_on_exception=True, every_n_train_steps=4), OnExceptionCheckpoint(folder)]
    callbacks = [*saves, *([Failing(hook, step)] if rank == who else [])]
    settings = {"limit_val_batches": 1, "val_check_interval": 5, "num_sanity_val_steps": 0}
    runner = trainer(strategy, world_size, callbacks=callbacks, enable_checkpointing=True, **settings)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        runner.fit(Regression(), loader(12, rank), loader(1, rank))
    _wait_for_all(folder, rank, world_size)
    return type(caught.value).__name__, str(caught.value)


@pytest.mark.parametrize(
    ("hook", "who", "step", "world_size"),
    [
        ("setup", 1, 0, 2),
        pytest.param("on_train_start", 0, 0, 2, marks=pytest.mark.exhaustive),
        pytest.param("on_train_batch_start", 1, 3, 2, marks=pytest.mark.exhaustive),
        pytest.param("on_before_zero_grad", 0, 3, 2, marks=pytest.mark.exhaustive),
        ("on_after_backward", 2, 3, 3),
        pytest.param("on_before_optimizer_step", 1, 3, 2, marks=pytest.mark.exhaustive),
        pytest.param("on_train_batch_end", 0, 3, 2, marks=pytest.mark.exhaustive),
        ("on_validation_batch_start", 1, 3, 2),
        ("on_save_checkpoint", 1, 3, 2),
        ("on_train_epoch_end", 0, 3, 2),
    ],
)
def test_a_rank_that_fails_and_lives_on_is_named_on_all_others(tmp_path, hook, who, step, world_size):
    answers = launch(_fails, world_size, str(tmp_path), hook, who, step, world_size=world_size)
    kind, text = answers.pop(who)
    assert kind == "ValueError"
    for other, said in answers:
        assert other == "PeerFailure"
        assert said.startswith(f"rank {who} failed: ValueError: {text}")


def _all_fail(rank):
    for _ in range(2):
        strategy = CompressedDDPStrategy(Int8(), timeout=timedelta(seconds=TIMEOUT_S))
        with pytest.raises(ValueError, match="boom at step 2"):
            trainer(strategy, 2, callbacks=[Failing("on_train_batch_end", 2)]).fit(Regression(), loader(4, rank))
    strategy = CompressedDDPStrategy(Int8(), timeout=timedelta(seconds=TIMEOUT_S))
    runner = trainer(strategy, 2)
    runner.fit(Regression(), loader(4, rank))
    return runner.global_step


def test_where_all_ranks_fail_alike_a_later_fit_still_works():
    assert launch(_all_fail, world_size=2) == [4, 4]


def _one_fails(rank, folder, name):
    peers_module._LEAVE_S = 0.5  # of this process alone
    strategy = partial(STRATEGIES[name], timeout=timedelta(seconds=TIMEOUT_S))
    text = "database connection closed"  # of the user's own; no rank has lost one
    callbacks = [Failing("on_before_optimizer_step", 6, RuntimeError(text))] if rank == 1 else []
    with pytest.raises(RuntimeError, match=text) as first:
        trainer(strategy(), 2, callbacks=callbacks).fit(Regression(), loader(12, rank))
    with pytest.raises(RuntimeError) as second:
        trainer(strategy(), 2).fit(Regression(), loader(12, rank))
    _wait_for_all(folder, rank, 2)
    return str(first.value), str(second.value)


@pytest.mark.parametrize("name", ["compressed", pytest.param("local", marks=pytest.mark.exhaustive)])
def test_after_a_failure_of_one_rank_a_later_run_in_the_same_processes_is_refused(tmp_path, name):
    for first, second in launch(_one_fails, str(tmp_path), name, world_size=2):
        assert first.endswith("database connection closed")
        assert "does not answer" not in first
        assert (
            "an earlier run in this process failed (rank 1 failed: RuntimeError: database connection closed)" in second
        )
        assert "Restart the processes of all ranks" in second


STRATEGIES = {
    "compressed": partial(CompressedDDPStrategy, Int8()),
    "local": partial(LocalUpdateStrategy, FixedPeriod(4)),
    "cyclic": CyclicStrategy,
}


def _sigterm_in_validate(rank, folder, name):
    class Ask(Callback):
        def on_validation_batch_end(self, *args):
            os.kill(os.getpid(), signal.SIGTERM)

    peers_module._LEAVE_S = 0.1  # of this process alone
    strategy = STRATEGIES[name](timeout=timedelta(seconds=TIMEOUT_S))
    runner = trainer(strategy, 2, limit_val_batches=3, callbacks=[Ask()] if rank == 1 else [])
    try:
        runner.validate(Regression(), loader(3, rank))
    except BaseException as error:  # that of a signal too
        _wait_for_all(folder, rank, 2)
        return type(error).__name__, str(error)
    return "ended", ""


@pytest.mark.parametrize("name", ["compressed", "cyclic", pytest.param("local", marks=pytest.mark.exhaustive)])
def test_sigterm_to_one_rank_ends_a_validation_on_all(tmp_path, name):
    one, other = outcomes(_sigterm_in_validate, str(tmp_path), name, world_size=2)
    assert other[0][0] == "SIGTERMException"
    assert one[0][0] == "PeerFailure"
    assert "rank 1 failed" in one[0][1]
    assert "SIGTERM" in one[0][1]
