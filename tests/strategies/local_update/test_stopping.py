"""Stops that one rank asks for end all ranks: at one step, soon, synchronised, and without a hang."""

import functools
import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from support.forked_python import forked
from support.processes import free_port, launch, outcomes
from support.shared_ranks import SharedRanks
from support.training import Regression, Samples, loader, local_update, own_file, trainer, weights

from lightning_comm import FixedPeriod
from lightning_comm.data.resumable import ResumableLoader
from lightning_comm.strategies.common import failures


class Paced(Regression):
    """Every step takes this rank its own time.

    Ranks agree within half a second or so, however many steps that is, so slow steps are cheaper.
    """

    def __init__(self, step_time_s: float) -> None:
        super().__init__()
        self.step_time_s = step_time_s

    def training_step(self, batch, batch_idx):
        time.sleep(self.step_time_s)
        return super().training_step(batch, batch_idx)


class At(Callback):
    """Does something on this rank at one step."""

    def __init__(self, step, action):
        self.step, self.action, self.acted_at = step, action, None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            self.acted_at = time.monotonic()
            self.action(trainer)


def set_should_stop(trainer):
    trainer.should_stop = True


def fail(trainer):
    raise ValueError("boom at step " + str(trainer.global_step))


def terminate(trainer):
    os.kill(os.getpid(), signal.SIGTERM)


def nothing(trainer):
    pass


def run(rank, world_size, step_times, at, *, action=set_should_stop, who=1, steps=3000, period=100_000, **kwargs):
    module = Paced(step_times[rank])
    callback = At(at, action if rank == who else nothing)
    strategy = local_update(FixedPeriod(period))
    runner = trainer(strategy, world_size, callbacks=[callback, *kwargs.pop("callbacks", [])], **kwargs)
    started = time.monotonic()
    runner.fit(module, loader(steps, rank), loader(2, rank))
    seconds = time.monotonic() - (callback.acted_at or started)
    return runner.global_step, seconds, weights(module), [done.step for done in strategy.history]


def assert_ended_together(answers, within_s=10.0):
    for steps, seconds, final, ends in answers:
        assert steps == answers[0][0], f"steps by rank: {[answer[0] for answer in answers]}"
        assert seconds < within_s
        assert ends == [steps], "the round was not ended early, or more than once"
        for mine, first in zip(final, answers[0][2], strict=True):
            np.testing.assert_array_equal(mine, first)


STEP_TIMES = [(0.01, 0.03), (0.03, 0.01), (0.3, 0.2)]
MORE_STEP_TIMES = [(0.0, 0.0)]  # at full speed in a gradient phase as well, at equal ones before `min_steps`


@pytest.mark.parametrize(
    "step_times", [*STEP_TIMES, *(pytest.param(each, marks=pytest.mark.exhaustive) for each in MORE_STEP_TIMES)]
)
def test_should_stop_on_one_rank_stops_all_at_one_step(step_times):
    answers = answers_of("should stop", step_times)
    assert_ended_together(answers)
    assert 8 <= answers[0][0] < 3000
    if step_times[0] > 0.1:
        assert answers[0][0] <= 10


def _lockstep(rank, world_size, step_time_s, phase):
    class Reducing(Paced):
        """A collective of the user's own in every step, of which the strategy knows nothing."""

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if phase == "own collective":
                torch.distributed.all_reduce(loss.detach().clone())
            return loss

    callback = At(10, set_should_stop if rank == 1 else nothing)
    strategy = local_update(FixedPeriod(100_000), gradient_steps=100_000 if phase == "gradient phase" else 0)
    runner = trainer(strategy, world_size, callbacks=[callback])
    runner.fit(Reducing(step_time_s), loader(3000, rank))
    return runner.global_step, time.monotonic() - callback.acted_at


PACES_S, PHASES = (0.0, 0.02, 0.05), ("gradient phase", "own collective")


# each phase, and a pace at which a request is seen after a few steps, and after more
IN_STEP = [("gradient phase", 0.05), ("own collective", 0.02)]
MORE_IN_STEP = [(phase, pace_s) for phase in PHASES for pace_s in PACES_S if (phase, pace_s) not in IN_STEP]


@pytest.mark.parametrize(
    ("phase", "step_time_s"), [*IN_STEP, *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in MORE_IN_STEP)]
)
def test_ranks_kept_in_step_stop_within_ten_seconds(step_time_s, phase):
    one, two = answers_of(phase, step_time_s)
    assert one[0] == two[0] < 3000
    assert max(one[1], two[1]) < 10


def test_should_stop_on_one_of_three_ranks_stops_all():
    assert_ended_together(answers_of("three ranks"))


def test_a_time_limit_stops_all_ranks_of_a_run_without_end():
    answers = answers_of("without a time limit")  # the same without a limit does end by itself
    assert answers[0][0] == 10
    answers = answers_of("time limit")
    assert_ended_together(answers)
    assert answers[0][0] > 10


def _min_steps(rank, world_size):
    # three seconds, so that all have agreed by then: ranks look for requests less often where a look takes long
    return run(rank, world_size, (0.05, 0.05), 5, min_steps=60, min_epochs=0, steps=120)


def test_a_stop_before_min_steps_waits_for_them_on_all_ranks():
    for steps, _, final, _ in (answers := answers_of("min_steps")):
        assert steps == 60
        for mine, first in zip(final, answers[0][2], strict=True):
            np.testing.assert_array_equal(mine, first)


class StopInHook(Callback):
    def __init__(self, hook):
        setattr(self, hook, self._stop)

    def _stop(self, trainer, pl_module):
        if not trainer.sanity_checking and trainer.global_rank == 1:
            trainer.should_stop = True


HOOKS = ["on_validation_end", "on_train_epoch_end", "on_train_start"]  # between steps, and in front of the first
MORE_HOOKS = ["on_train_epoch_start"]


def _in_hook(rank, hook):
    settings = {"limit_val_batches": 2, "val_check_interval": 7, "max_epochs": 30, "steps": 20}
    return run(rank, 2, (0.02, 0.01), -1, callbacks=[StopInHook(hook)], **settings)


@pytest.mark.parametrize("hook", [*HOOKS, *(pytest.param(each, marks=pytest.mark.exhaustive) for each in MORE_HOOKS)])
def test_should_stop_on_one_rank_in_any_hook_stops_all(hook):
    answers = answers_of("in", hook)
    for steps, _, final, _ in answers:
        assert steps == answers[0][0]
        assert steps < 600
        for mine, first in zip(final, answers[0][2], strict=True):
            np.testing.assert_array_equal(mine, first)


def _early_stopping(rank, world_size, folder):
    stopping = EarlyStopping("val_loss", patience=0, min_delta=1e9)
    save = ModelCheckpoint(folder, filename="end")
    strategy = local_update(FixedPeriod(50))
    module = Paced(0.0)
    runner = trainer(
        strategy, world_size, callbacks=[stopping, save], enable_checkpointing=True, limit_val_batches=2, max_epochs=50
    )
    runner.fit(module, loader(9, rank), loader(2, rank))
    return runner.global_step, weights(module)


def test_early_stopping_ends_averaged_in_memory_and_in_the_file(tmp_path):
    answers = launch(_early_stopping, 2, str(tmp_path), world_size=2)
    assert [steps for steps, _ in answers] == [18, 18]
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    for name, mine, theirs in zip(saved, answers[0][1], answers[1][1], strict=True):
        np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(mine, saved[name].numpy())


def _sigterm(rank, world_size, folder, who):
    save = ModelCheckpoint(folder)
    try:
        run(rank, world_size, (0.01, 0.02), 10, action=terminate, who=who, callbacks=[save], enable_checkpointing=True)
    except BaseException as error:
        return type(error).__name__, time.monotonic()
    return "ended", 0.0


@pytest.mark.parametrize("who", [0, 1])
def test_sigterm_to_one_rank_saves_and_ends_all(tmp_path, who):
    started = time.monotonic()
    answers = launch(_sigterm, 2, str(tmp_path), who, world_size=2)
    assert [name for name, _ in answers] == ["SIGTERMException"] * 2
    assert time.monotonic() - started < 15
    (path,) = tmp_path.glob("last-terminated-step=*.ckpt")
    content = torch.load(path, weights_only=True)
    step = content["global_step"]
    assert path.name == f"last-terminated-step={step}.ckpt"
    for rank in range(2):
        own = torch.load(own_file(path, rank), weights_only=True)
        assert own["run"]["clock"]["steps_done"] == step
        assert not own["apart"]
    resumed = launch(_resume, 2, str(path), world_size=2)
    assert [steps for steps, _ in resumed] == [step + 20] * 2


def _resume(rank, world_size, path):
    module = Paced(0.0)
    step = torch.load(path, weights_only=True)["global_step"]
    runner = trainer(local_update(FixedPeriod(100_000)), world_size, max_steps=step + 20)
    runner.fit(module, loader(3000, rank), ckpt_path=path)
    return runner.global_step, weights(module)


def _timed_checkpoints(rank, world_size, folder):
    save = ModelCheckpoint(folder, filename="{step}", train_time_interval=timedelta(seconds=0.3), save_top_k=-1)
    return run(
        rank, world_size, (0.01, 0.03), -1, callbacks=[save], enable_checkpointing=True, max_steps=80, period=10_000
    )


def test_checkpoints_by_the_clock_are_agreed_on_without_ending_the_round(tmp_path):
    answers = launch(_timed_checkpoints, 2, str(tmp_path), world_size=2)
    assert_ended_together(answers, within_s=60)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) >= 2
    for path in files:
        step = torch.load(path, weights_only=True)["global_step"]
        for rank in range(2):
            own = torch.load(own_file(path, rank), weights_only=True)
            assert own["run"]["clock"]["steps_done"] == step
            assert own["apart"] == (step < 80)


class Trace(Callback):
    def __init__(self):
        self.states = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.states[trainer.global_step] = weights(pl_module)


def _stand(rank, world_size, folder, mode):
    # how fast ranks are matters where they stop alone
    module, trace = Paced((0.001, 0.1)[rank] if mode == "stopped" else 0.0), Trace()
    stop = At(50 if mode == "stopped" else -1, terminate if rank == 0 else nothing)
    save = ModelCheckpoint(folder, filename=mode)
    runner = trainer(
        local_update(FixedPeriod(60)),
        world_size,
        callbacks=[trace, stop, save],
        enable_checkpointing=True,
        max_steps=75,
    )
    data = ResumableLoader(Samples(75 * 4, rank), 4, num_replicas=1, rank=0)
    path = next(Path(folder).glob("last-terminated*.ckpt")) if mode == "resumed" else None
    soon_too_far = functools.partial(failures.Agreement, catch_up_limit_s=0.3)
    with mock.patch.object(failures, "Agreement", soon_too_far), suppress(SIGTERMException):
        runner.fit(module, data, ckpt_path=path)
    return trace.states, weights(module), runner.global_step


def test_ranks_too_far_apart_stop_where_they_stand_and_resume_from_there(tmp_path):
    whole = launch(_stand, 2, str(tmp_path), "whole", world_size=2)
    started = time.monotonic()
    stopped = launch(_stand, 2, str(tmp_path), "stopped", world_size=2)
    assert time.monotonic() - started < 20
    assert stopped[0][2] >= 50
    assert stopped[1][2] < stopped[0][2] - 30
    saved = torch.load(next(tmp_path.glob("last-terminated*.ckpt")), weights_only=True)["state_dict"]
    for name, mine, theirs in zip(saved, stopped[0][1], stopped[1][1], strict=True):
        np.testing.assert_allclose(saved[name].numpy(), (mine + theirs) / 2, rtol=0, atol=1e-15)
    resumed = launch(_stand, 2, str(tmp_path), "resumed", world_size=2)
    for rank in range(2):
        assert resumed[rank][2] == 75
        assert min(resumed[rank][0]) == stopped[rank][2] + 1
        for step, state in resumed[rank][0].items():
            for mine, expected in zip(state, whole[rank][0][step], strict=True):
                np.testing.assert_array_equal(mine, expected, err_msg=f"rank {rank}, step {step}")


def _failing(rank, world_size, who, period, folder):
    callbacks = [ModelCheckpoint(folder, save_on_exception=True)] if folder else []
    started = time.monotonic()
    try:
        run(
            rank, world_size, (0.01, 0.01), 20, action=fail, who=who, period=period, callbacks=callbacks,
            enable_checkpointing=bool(folder),
        )  # fmt: skip
    except BaseException as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "ended", "", 0.0


MID_ROUND, BEFORE_SYNCHRONISING, OTHERS_WAIT = 100_000, 20, 21


# each place, on either rank and with a save on either; all others of them are exhaustive
FAILING = [(1, MID_ROUND, False), (0, MID_ROUND, True), (1, BEFORE_SYNCHRONISING, True), (0, OTHERS_WAIT, False)]
MORE_FAILING = [(0, BEFORE_SYNCHRONISING, False), (1, OTHERS_WAIT, True), (0, MID_ROUND, False)]
MORE_FAILING += [(1, BEFORE_SYNCHRONISING, False), (1, OTHERS_WAIT, False)]


@pytest.mark.parametrize(
    ("who", "period", "save"),
    [*FAILING, *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in MORE_FAILING)],
)
def test_an_exception_on_one_rank_ends_all_with_the_first_error_shown(tmp_path, who, period, save):
    folder = str(tmp_path) if save else ""
    answers = outcomes(_failing, 2, who, period, folder, world_size=2, timeout_s=30, ends_within_s=0.2)
    kind, text, seconds = answers[who][0]
    assert (kind, text) == ("ValueError", "boom at step 20")
    kind, text, seconds = answers[1 - who][0]
    assert kind == "PeerFailure"
    assert f"rank {who} failed: ValueError: boom at step 20" in text
    assert seconds < 15


def _failing_in_gradient_phase(rank, world_size, who):
    class Failing(Regression):
        def training_step(self, batch, batch_idx):
            if rank == who and batch_idx == 20:
                raise ValueError("boom in step 20")
            return super().training_step(batch, batch_idx)

    trainer(local_update(FixedPeriod(8), gradient_steps=1.0), world_size).fit(Failing(), loader(100, rank))


@pytest.mark.parametrize("who", [0, 1])
def test_an_exception_in_the_gradient_phase_names_the_rank_on_the_others(who):
    answers = outcomes_of("failing in the gradient phase", who)
    assert "ValueError: boom in step 20" in answers[who][1]
    # Others wait in DDP's backward until the connection is lost, and then rank 0 may have taken the store with it.
    expected = f"rank {who} failed: ValueError: boom in step 20"
    gone = "rank 0, which hosts it, has ended"
    assert expected in answers[1 - who][1] or (who == 0 and gone in answers[1 - who][1])


def _nan_rank(rank, world_size):
    class Nan(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if rank == 1 and self.trainer.global_step == 3 else loss

    module = Nan()
    strategy = local_update(FixedPeriod(4))
    trainer(strategy, world_size).fit(module, loader(12, rank))
    return weights(module), [done.drift for done in strategy.history]


def test_not_a_number_on_one_rank_reaches_all_and_hangs_none():
    for final, drifts in launch(_nan_rank, 2, world_size=2):
        assert all(np.isnan(each).all() for each in final)
        assert len(drifts) == 3


def _requeue(rank, world_size):
    from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

    calls = []

    def handle(self, signum, frame):
        calls.append((signum, self.trainer.global_step, weights(self.trainer.lightning_module)))

    def usr1(trainer):
        trainer._signal_connector._slurm_sigusr_handler_fn(signal.SIGUSR1, None)

    with mock.patch.object(_SignalConnector, "_slurm_sigusr_handler_fn", handle):
        steps, *_ = run(rank, world_size, (0.03, 0.04), 8, action=usr1, max_steps=70)
    return calls, steps


def test_a_requeue_signal_is_handled_between_steps_on_all_ranks_at_once():
    answers = answers_of("requeue")
    for calls, steps in answers:
        assert steps == 70
        assert len(calls) == 1
        assert calls[0][:2] == answers[0][0][0][:2]
        assert calls[0][0] == signal.SIGUSR1
        for mine, first in zip(calls[0][2], answers[0][0][0][2], strict=True):
            np.testing.assert_array_equal(mine, first)


SCRIPT = """
    import sys, time, torch
    from torch.utils.data import DataLoader, TensorDataset
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.demos.boring_classes import BoringModel
    import lightning_comm

    class Slow(BoringModel):
        def training_step(self, batch, batch_idx):
            time.sleep(0.005)
            if batch_idx == 20:
                sys.stdout.write(f"running {self.global_rank}\\n")  # in one piece, since both ranks share a pipe
                sys.stdout.flush()
            if batch_idx == 60 and sys.argv[2] == str(self.global_rank):
                raise ValueError("boom")
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    trainer = Trainer(strategy="local_sgd", accelerator="cpu", devices=2, max_epochs=1, limit_val_batches=0,
                      callbacks=[ModelCheckpoint(sys.argv[1])], logger=False, enable_progress_bar=False)
    trainer.fit(Slow(), DataLoader(torch.randn(100_000, 32), batch_size=2))
"""


def _start(tmp_path, who):
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT))
    env = {
        key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "RANK")
    }
    with forked():  # the rank that Lightning's launcher starts is one, too
        return subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "saved"), who],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env | {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            start_new_session=True,
        )


def test_sigterm_to_a_launched_job_saves_and_ends_every_process(tmp_path):
    process = _start(tmp_path, "none")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if sum(each.startswith("running") for each in lines) == 2:
            break
    else:
        pytest.fail(f"the job ended by itself, with {process.wait()}:\n{''.join(lines)}")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert "all ranks agreed to terminate at step" in output
    (path,) = (tmp_path / "saved").glob("last-terminated-step=*.ckpt")
    assert sorted(each.name for each in own_file(path, 0).parent.iterdir()) == ["rank0.pt", "rank1.pt"]


@pytest.mark.parametrize("who", ["0", "1"])
def test_a_launched_job_in_which_one_process_fails_ends_and_shows_the_error(tmp_path, who):
    process = _start(tmp_path, who)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "ValueError: boom" in output


def _without_limit(rank):
    return run(rank, 2, (0.01, 0.03), -1, steps=10)


def _with_limit(rank):
    return run(rank, 2, (0.01, 0.03), -1, steps=10, max_time=timedelta(seconds=1), max_epochs=-1)


def _launches(*cases, world_size=2):
    """For each group of cases, which share their ranks, the names and the ranks."""
    return [(set(each), SharedRanks(each, world_size=world_size)) for each in cases]


def _should_stop(step_times):
    return {("should stop", times): (run, 2, times, 8) for times in step_times}


def _in_step(case):
    return {case: (_lockstep, 2, case[1], case[0])}


def _in_hooks(hooks):
    return {("in", hook): (_in_hook, hook) for hook in hooks}


def _failing_as(who):
    return {("failing in the gradient phase", who): (_failing_in_gradient_phase, 2, who)}


# All of these mostly wait, so that they run side by side: each in processes of its own or with quick ones.
SIDE_BY_SIDE = [
    *_launches(
        *map(_in_step, IN_STEP),
        {
            **_should_stop(STEP_TIMES),
            **_in_hooks(HOOKS),
        },
        {
            ("without a time limit",): (_without_limit,),
            ("time limit",): (_with_limit,),
            ("min_steps",): (_min_steps, 2),
        },
        _failing_as(0),
        _failing_as(1),
        {("requeue",): (_requeue, 2)},
    ),
    *_launches({("three ranks",): (run, 3, (0.01, 0.02, 0.04), 30)}, world_size=3),
]
OTHERS = _launches(*map(_in_step, MORE_IN_STEP), _should_stop(MORE_STEP_TIMES), _in_hooks(MORE_HOOKS))


@functools.cache
def _run_all(which):
    """Run all launches of a list, two at a time; return the ranks by the names of their cases."""
    launches = {"side by side": SIDE_BY_SIDE, "others": OTHERS}[which]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda each: [each[1].outcomes(name) for name in each[0]], launches))
    return {name: ranks for names, ranks in launches for name in names}


def _ranks_of(name):
    kept = any(name in names for names, _ in SIDE_BY_SIDE)
    return _run_all("side by side" if kept else "others")[name]


def answers_of(*name):
    return _ranks_of(name)[name]


def outcomes_of(*name):
    return _ranks_of(name).outcomes(name)
