"""Ranks that stop, die, fail or hang in every phase: all other processes end in time, and say the right rank."""

import atexit
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from support import faults
from support.cyclic import deep, momentum
from support.faults import Fault, Job, fates
from support.training import Regression, loader, trainer

import lightning_comm.transport.failures as peers
import lightning_comm.transport.group_ends as group_ends
from lightning_comm import Averaging, CyclicStrategy, FixedPeriod, LocalUpdateStrategy

TIMEOUT_S = 6.0  # where it has to run out
WITHIN_S = 10.0  # beyond that, all processes have ended
LONG_S = 60.0  # where it must not be waited for
# The short time-out is set once ranks are joined, which gloo of torch 2.6 ignores: there the watchdog ends
# ranks, with no exception of their own.
TAKES_TIME_OUTS = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="gloo of torch 2.6 keeps its first time-out"
)

STRATEGIES = {
    "local": lambda **options: LocalUpdateStrategy(FixedPeriod(10), **options),
    "overlap": lambda **options: LocalUpdateStrategy(FixedPeriod(10), averaging=Averaging(overlap_steps=4), **options),
    "gradients": lambda **options: LocalUpdateStrategy(FixedPeriod(10), gradient_steps=10_000, **options),
    "cyclic": lambda **options: CyclicStrategy(**options),
    "staggered": lambda **options: CyclicStrategy(stagger="step", **options),
}


class Struck(Regression):
    """A module that is struck by a fault in one of its hooks."""

    def __init__(self, fault, rank, hook, world_size):
        super().__init__(deep(2 * world_size), momentum)
        self.fault, self.rank, self.hook = fault, rank, hook

    def strike(self, hook):
        if hook == self.hook:
            self.fault.strike(self.rank)

    def prepare_data(self):
        self.strike("prepare_data")

    def configure_optimizers(self):
        self.strike("configure_optimizers")
        return super().configure_optimizers()

    def training_step(self, batch, batch_idx):
        if batch_idx == 15:
            self.strike("training_step")
        loss = super().training_step(batch, batch_idx)
        if self.hook == "own collective":
            dist.all_reduce(loss.detach().clone())
            if batch_idx == 15:
                self.strike("own collective")
        return loss

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.strike("validation_step")
        super().validation_step(batch, batch_idx)


def fit(rank, fault, strategy, hook, world_size):
    validate = {"limit_val_batches": 2, "val_check_interval": 20} if hook == "validation_step" else {}
    timeout = timedelta(seconds=TIMEOUT_S if fault.what is faults.stop else LONG_S)
    # joined before the Trainer, since many jobs start at once and the short time-out is none for that
    dist.init_process_group("gloo", timeout=timedelta(seconds=LONG_S))
    dist.distributed_c10d._set_pg_timeout(timeout, dist.group.WORLD)
    dist.barrier()
    try:
        runner = trainer(STRATEGIES[strategy](timeout=timeout), world_size, **validate)
        runner.fit(Struck(fault, rank, hook, world_size), loader(2000, rank), loader(2, rank))
    except BaseException:
        if rank == fault.rank and fault.lives_on:
            time.sleep(10 * LONG_S)
        raise


CASES = [
    (faults.stop, 0, "local", "training_step", 3),
    (faults.stop, 0, "cyclic", "training_step", 2),
    (faults.stop, 0, "cyclic", "configure_optimizers", 2),
    (faults.stop, 0, "local", "prepare_data", 2),
    (faults.stop, 2, "local", "validation_step", 3),
    (faults.stop, 1, "overlap", "training_step", 2),
    (faults.crash, 1, "gradients", "training_step", 2),
    (faults.kill, 1, "staggered", "training_step", 2),
    (faults.vanish, 2, "cyclic", "training_step", 3),
    (faults.boom, 0, "local", "training_step", 2),
    (faults.leave, 1, "cyclic", "validation_step", 2),
    (faults.interrupt, 1, "local", "training_step", 2),
    (faults.boom, 2, "local", "own collective", 3),
]
ALSO = [(faults.out_of_memory, 0, "cyclic", "training_step", 2)]  # an exception as any other


@pytest.fixture(scope="module")
def others(request):
    """Run a job for each case, side by side; return the fates of the ranks that the fault did not hit.

    Those with a short time-out are by themselves: a rank that gets no processor for seconds would be missed.
    """
    found, asked_for = {}, CASES + ALSO if request.config.getoption("exhaustive") else CASES
    for stopped in (True, False):
        jobs, cases = [], [case for case in asked_for if (case[0] is faults.stop) == stopped]
        for what, who, strategy, hook, world_size in cases:
            fault = Fault(what, who, lives_on=hook == "own collective")
            jobs.append((Job(fit, (fault, strategy, hook, world_size), world_size), fault))
        for case, ranks in zip(cases, fates(jobs, 3 * LONG_S), strict=True):
            found[case] = [fate for rank, fate in enumerate(ranks) if rank != case[1]]
    return found


def of(others, **chosen):
    fields = ("what", "who", "strategy", "hook", "world_size")
    found = [
        (case, fates)
        for case, fates in others.items()
        if all(case[fields.index(name)] == value for name, value in chosen.items())
    ]
    assert found
    return found


def test_all_processes_of_other_ranks_end_with_an_error_before_the_time_out_of_a_long_wait(others):
    for case, ended in others.items():
        for fate in ended:
            assert fate.status == 1, (case, fate)
            # `TIMEOUT_S + WITHIN_S` on a machine that has nothing else to do; a busy one may need several times as long
            assert fate.seconds < min(LONG_S, 3 * (TIMEOUT_S + WITHIN_S)), (case, fate)


@pytest.mark.parametrize("strategy", ["local", "cyclic"])
def test_with_rank_0_stopped_all_others_say_so(others, strategy):
    for _, ended in of(others, what=faults.stop, who=0, hook="training_step", strategy=strategy):
        for fate in ended:
            assert fate.text.startswith("PeerFailure")
            assert "rank 0, which hosts it, is stopped or hangs, or the network between it and rank" in fate.text


def test_a_preparation_that_torch_would_never_leave_is_ended_by_the_watchdog(others):
    for _, ended in of(others, hook="prepare_data"):
        assert [fate.text for fate in ended] == [""]  # from another thread, while this one waited


@TAKES_TIME_OUTS
def test_a_rank_that_stops_before_process_groups_are_made_is_heard_of_before_they_are(others):
    for _, ended in of(others, hook="configure_optimizers"):
        for fate in ended:
            assert fate.text.startswith("PeerFailure")
            assert "rank 0, which hosts it, is stopped or hangs" in fate.text


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param("local", marks=TAKES_TIME_OUTS),
        pytest.param("overlap", marks=TAKES_TIME_OUTS),
        "gradients",
        "staggered",
        "cyclic",
    ],
)
def test_a_rank_that_is_stopped_or_killed_is_named_by_all_others(others, strategy):
    for (what, who, *_), ended in of(others, strategy=strategy):
        for fate in ended:
            if what in (faults.stop, faults.kill, faults.crash, faults.vanish) and who > 0:
                assert fate.text.startswith(f"PeerFailure: Rank {who} does not answer. It was killed, or stopped, or")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (faults.boom, "ValueError: boom"),
        (faults.leave, "SystemExit: 0"),
        (faults.interrupt, "KeyboardInterrupt: "),
        pytest.param(faults.out_of_memory, "MemoryError: ", marks=pytest.mark.exhaustive),
    ],
)
def test_whatever_ends_a_rank_is_told_to_the_others(others, what, says):
    for (_, who, *_), ended in of(others, what=what):
        for fate in ended:
            assert f"rank {who} failed: {says}" in fate.text


def test_ranks_in_a_collective_of_the_users_are_freed_from_a_rank_that_failed_and_lives_on(others):
    for (_, who, *_), ended in of(others, hook="own collective"):
        for fate in ended:
            assert f"rank {who} failed: ValueError: boom" in fate.text


def evaluate(rank):
    class Slow(Regression):
        def test_step(self, batch, batch_idx):
            time.sleep(0.6 * rank)

    atexit.register(group_ends._end_without_shutting_down)  # jobs begin without what was registered before
    peers._STAY_S = LONG_S  # of this process alone
    strategy = LocalUpdateStrategy(FixedPeriod(10), timeout=timedelta(seconds=LONG_S))
    trainer(strategy, 2).test(Slow(), loader(3 if rank else 1, rank), verbose=False)


def test_ranks_that_are_through_long_before_others_end_well_and_say_nothing(capfd):
    (ended,) = fates([(Job(evaluate, (), 2), Fault(faults.boom, rank=-1))], LONG_S)
    assert [(fate.text, fate.status) for fate in ended] == [("ended", 0), ("ended", 0)]
    assert "TCPStore" not in capfd.readouterr().err
