"""Stops and failures of one rank end all, at one step and without a hang; slow ranks only slow the others."""

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
from datetime import timedelta

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from support.cyclic import adamw, cyclic, deep, fit, momentum, state
from support.processes import free_port, launch, outcomes
from support.training import Regression, loader, trainer


class Paced(Regression):
    """Every step takes this rank its own time."""

    def __init__(self, step_time_s):
        super().__init__(deep(6), momentum)
        self.step_time_s = step_time_s

    def training_step(self, batch, batch_idx):
        time.sleep(self.step_time_s)
        return super().training_step(batch, batch_idx)


class At(Callback):
    """Does something on this rank at one step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, runner, *args):
        if runner.global_step == self.step:
            self.action(runner)


def set_should_stop(runner):
    runner.should_stop = True


def fail(runner):
    raise ValueError("boom at step " + str(runner.global_step))


def terminate(runner):
    os.kill(os.getpid(), signal.SIGTERM)


def run(rank, world_size, step_times, at, action=set_should_stop, who=1, steps=300, settings=None, **options):
    module = Paced(step_times[rank])
    callbacks = [At(at, action), *options.pop("callbacks", [])] if rank == who else options.pop("callbacks", [])
    runner = trainer(cyclic(**settings or {}), world_size, callbacks=callbacks, **options)
    runner.fit(module, loader(steps, rank), loader(1, rank))
    return runner.global_step, state(module)


def assert_ended_together(answers):
    for steps, final in answers:
        assert steps == answers[0][0]
        for mine, first in zip(final, answers[0][1], strict=True):
            np.testing.assert_array_equal(mine, first)


TIMES = [(2, (0.001, 0.02)), (2, (0.02, 0.0)), (3, (0.0, 0.01, 0.003))]
OFTEN = [("none", *TIMES[1]), ("step", *TIMES[2])]  # who asks is the quick one, or neither the first nor the last


@pytest.mark.parametrize(
    ("stagger", "world_size", "times"),
    [
        pytest.param(*each, marks=() if each in OFTEN else pytest.mark.exhaustive)
        for each in ((stagger, *times) for stagger in ("none", "step") for times in TIMES)
    ],
)
def test_should_stop_on_one_rank_stops_all_at_one_step(stagger, world_size, times):
    answers = launch(lambda rank: run(rank, world_size, times, 8, settings={"stagger": stagger}), world_size=world_size)
    assert_ended_together(answers)
    assert 8 <= answers[0][0] <= 12, answers[0][0]


def test_a_time_limit_stops_all_ranks_of_a_run_without_end():
    limits = {"max_time": timedelta(seconds=0.7), "max_epochs": -1, "steps": 8}
    answers = launch(lambda rank: run(rank, 2, (0.001, 0.02), -1, **limits), world_size=2)
    assert_ended_together(answers)
    assert answers[0][0] > 8, "more than an epoch"


def _early(rank, world_size):
    stopping = EarlyStopping("val_loss", patience=0, min_delta=1e9)
    return run(rank, world_size, (0, 0), -1, steps=5, callbacks=[stopping], limit_val_batches=1, max_epochs=9)


def test_early_stopping_ends_all_after_the_same_validation():
    answers = launch(_early, 2, world_size=2)
    assert_ended_together(answers)
    assert answers[0][0] == 10


def _sigterm(rank, world_size, folder, who):
    save = ModelCheckpoint(folder)
    try:
        run(rank, world_size, (0.002, 0.004), 10, terminate, who, callbacks=[save], enable_checkpointing=True)
    except BaseException as error:
        return type(error).__name__
    return "ended"


# rank 0 ends so below, too
@pytest.mark.parametrize("who", [pytest.param(0, marks=pytest.mark.exhaustive), 1])
def test_sigterm_to_one_rank_saves_and_ends_all(tmp_path, who):
    assert launch(_sigterm, 2, str(tmp_path), who, world_size=2) == ["SIGTERMException"] * 2
    (path,) = tmp_path.glob("last-terminated-step=*.ckpt")
    assert f"step={torch.load(path, weights_only=True)['global_step']}.ckpt" in path.name


def _failing(rank, world_size, who):
    started = time.monotonic()
    try:
        run(rank, world_size, (0.001,) * world_size, 10, fail, who)
    except BaseException as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "ended", "", 0.0


@pytest.mark.parametrize(("world_size", "who"), [(2, 0), pytest.param(2, 1, marks=pytest.mark.exhaustive), (3, 1)])
def test_an_exception_on_one_rank_ends_all_with_the_first_error_shown(world_size, who):
    for rank, (answer, _) in enumerate(outcomes(_failing, world_size, who, world_size=world_size, timeout_s=30)):
        kind, text, seconds = answer
        assert kind == ("ValueError" if rank == who else "PeerFailure")
        assert "boom at step 10" in text
        assert rank == who or f"rank {who} failed" in text
        assert seconds < 15


EARLY = {  # what happens on which rank, and the status of rank 0
    "an error on rank 0": ("error", 0, 1),
    "SIGTERM": ("SIGTERM", 0, 0),
    "SIGINT": ("SIGINT", 0, 1),
    "an error on rank 1": ("error", 1, 1),
}
EARLY_OFTEN = ["an error on rank 0", "SIGTERM"]  # one that ends the store, too, and one that all agree on


class EndsEarly(Regression):
    """Fails, or sends itself a signal, on one rank."""

    def __init__(self, what, who):
        super().__init__(deep(6), momentum)
        self.what, self.who = what, who

    def training_step(self, batch, batch_idx):
        if batch_idx == 20 and self.global_rank == self.who:
            if self.what == "error":
                raise ValueError("boom")
            os.kill(os.getpid(), getattr(signal, self.what))
        return super().training_step(batch, batch_idx)


def _to_its_end(rank, port, path, what, who):
    """Be a rank that ends as Python ends when its script is over: with its threads, and with what C++ does at exit."""
    gc.freeze()  # what was there before the fork is no garbage of this process
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background begins without it
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    status = 0
    try:
        trainer(cyclic(), 2).fit(EndsEarly(what, who), loader(400, 0))
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
        status = 1
    ctypes.pythonapi.Py_Exit(status)


@pytest.fixture(scope="module")
def early(request, tmp_path_factory):
    """The status of each rank of each case by its name, and what it wrote."""
    folder, context = tmp_path_factory.mktemp("early"), multiprocessing.get_context("fork")
    processes = {}
    for name in EARLY if request.config.getoption("exhaustive") else EARLY_OFTEN:
        what, who, _ = EARLY[name]
        port = free_port()
        for rank in range(2):
            path = folder / f"{name} {rank}"
            processes[path] = context.Process(target=_to_its_end, args=(rank, port, path, what, who))
            processes[path].start()
    for process in processes.values():
        process.join(100)
        process.kill()  # one that hangs
        process.join()
    return {path.name: (process.exitcode, path.read_text()) for path, process in processes.items()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EARLY_OFTEN else pytest.mark.exhaustive) for name in EARLY]
)
def test_a_process_that_ends_early_does_so_in_order(early, name):
    """A thread that waits for a message while Python shuts down would abort the process."""
    what, _, expected = EARLY[name]
    for rank in range(2):
        status, said = early[f"{name} {rank}"]
        assert status in (0, 1) if rank else status == expected, said
        assert "terminate called" not in said
        assert "boom" in said or what != "error"


class Nan(Regression):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_rank == 1 and batch_idx == 3 else loss


def _nan(rank, world_size, steps):
    with pytest.raises(RuntimeError, match="not finite") as caught:
        fit(rank, world_size, Nan(deep(6), momentum), steps)
    return str(caught.value)


@pytest.mark.parametrize("steps", [4, pytest.param(5, marks=pytest.mark.exhaustive), 9])  # the last, and one of many
def test_a_loss_that_is_not_finite_is_one_error_on_all_ranks(steps):
    answers = launch(_nan, 3, steps, world_size=3)
    assert len(set(answers)) == 1
    assert "the loss of rank 1 was not finite (NaN or infinity) at optimizer step 3" in answers[0]


def _unequal(rank, world_size):
    trainer(cyclic(), world_size).fit(Regression(deep(6), momentum), loader(5 + rank, rank))


def test_unequal_numbers_of_batches_are_refused():
    for _, text in outcomes(_unequal, 2, world_size=2, timeout_s=30):
        assert "CyclicStrategy" in text
        assert "batches" in text
        assert "5" in text
        assert "6" in text


def test_a_slow_rank_slows_and_never_deadlocks():
    answers = launch(lambda rank: run(rank, 3, (0.0, 0.1, 0.0), -1, steps=5), world_size=3)
    assert_ended_together(answers)
    assert answers[0][0] == 5


def _staggered(rank, world_size, options):
    ended = []
    for stagger in ("none", "step"):
        module = Regression(deep(2 * world_size), adamw)
        names = [f"net.{2 * k}" for k in range(2 * world_size)]  # the same cut in both
        fit(rank, world_size, module, 6, {"stagger": stagger, "stages": names}, **options)
        ended.append(state(module))
    return ended


MORE = {"accumulate_grad_batches": 2, "limit_val_batches": 1, "val_check_interval": 4}


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (3, MORE),
        *(
            pytest.param(n, options, marks=pytest.mark.exhaustive)
            for n, options in ((2, {}), (2, MORE), (3, {}), (4, {}), (4, MORE))
        ),
    ],
)
def test_turns_in_time_change_nothing_and_end(world_size, options):
    for plain, staggered in launch(_staggered, world_size, options, world_size=world_size, timeout_s=60):
        for one, other in zip(plain, staggered, strict=True):
            np.testing.assert_array_equal(one, other)


class Meets(Regression):
    """Logs the mean of the loss over the ranks in each training step, which is a collective."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.means.append(float(self.trainer.strategy.reduce(loss.detach().clone())))
        return loss


def _meeting(rank, world_size):
    module = Meets(deep(2 * world_size), adamw)
    module.means = []
    names = [f"net.{2 * k}" for k in range(2 * world_size)]
    fit(rank, world_size, module, 6, {"stagger": "step", "stages": names})
    return module.means


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.exhaustive), 3])
def test_a_collective_within_a_training_step_ends_though_ranks_take_turns_in_time(world_size):
    answers = launch(_meeting, world_size, world_size=world_size, timeout_s=25)
    assert len(answers[0]) == 6
    assert all(answer == answers[0] for answer in answers)
