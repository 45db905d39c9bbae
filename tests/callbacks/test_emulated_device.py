"""The emulated device in a Trainer: batches take their time under every strategy, and results are those without it."""

import os
import time

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support.processes import launch
from support.shared_ranks import SharedRanks
from support.training import Regression, loader, local_update, trainer, weights
from torch.utils.data import DataLoader

from lightning_comm import FixedPeriod
from lightning_comm.callbacks import EmulatedDevice
from lightning_comm.core.ledger import CommRecord
from lightning_comm.lab.device.pacer import DevicePacer
from lightning_comm.transport import recording

STEP_S = 0.04


class BatchTimes(Callback):
    """When each batch began and ended; in front of the others, so that theirs is inside."""

    def __init__(self):
        self.began, self.ended = [], []

    def on_train_batch_start(self, *args):
        self.began.append(time.perf_counter())

    def on_train_batch_end(self, *args):
        self.ended.append(time.perf_counter())

    @property
    def lengths(self):
        return [end - begin for begin, end in zip(self.began, self.ended, strict=True)]


def strategy_of(name):
    return local_update(FixedPeriod(2)) if name == "local" else name


def _both(rank, strategy, speeds):
    return [_fit(rank, strategy, with_device, speeds) for with_device in (False, True)]


def _fit(rank, strategy, with_device, speeds):
    os.environ["LIGHTNING_COMM_SPEED"] = speeds[rank]
    module, times = Regression(), BatchTimes()
    device = EmulatedDevice(step_s=STEP_S, batch_size=4)
    run = trainer(strategy_of(strategy), devices=2, callbacks=[times, *([device] if with_device else [])])
    run.fit(module, loader(4, rank))
    return weights(module), times.lengths, device.pacer and (device.pacer.steps, device.pacer.speed)


@pytest.mark.parametrize("strategy", ["ddp", "local"])
def test_weights_are_those_without_it_and_each_rank_has_the_speed_of_its_host(strategy):
    alone, emulated = zip(*launch(_both, strategy, ["1", "0.5"], world_size=2), strict=True)
    for rank, speed in enumerate((1.0, 0.5)):
        assert all((a == b).all() for a, b in zip(alone[rank][0], emulated[rank][0], strict=True))
        assert emulated[rank][2] == (3, speed)
        assert min(emulated[rank][1]) >= STEP_S / speed


def _fit_with_a_list(rank, speeds):
    times, device = BatchTimes(), EmulatedDevice(step_s=STEP_S, batch_size=4, speed=speeds)
    run = trainer("ddp", devices=2, callbacks=[device, times])
    try:
        run.fit(Regression(), loader(4, rank))
    except ValueError as error:
        return str(error)
    return device.pacer.speed, device.pacer.steps


@pytest.fixture(scope="module")
def lists():
    cases = {len(speeds): (_fit_with_a_list, speeds) for speeds in ([1, 0.5], [], [1.0], [1.0, 2.0, 3.0])}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("LIGHTNING_COMM_SPEED", "7")  # which a list overrules
        ranks = SharedRanks(cases, world_size=2)
        ranks.outcomes(2)
    return ranks


def test_a_list_gives_each_rank_a_speed_of_its_own(lists):
    assert lists[2] == [(1, 3), (0.5, 3)]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_list_of_another_length_is_refused_on_all_ranks_with_both_numbers(lists, count):
    for said in lists[count]:
        for part in ("EmulatedDevice: `speed`", "each of 2 ranks", f"which has {count}", "num_nodes"):
            assert part in said


def test_the_summary_of_a_list_has_every_speed():
    said = EmulatedDevice(step_s=0.03, batch_size=16, speed=[1, 3]).summary()
    assert said == "Emulated device: 16 samples take 0.03, 0.01 s (step_s=0.03, speed=1, 3); not run yet."


def fit(device, *loaders, module=None, **kwargs):
    times = BatchTimes()
    run = trainer("auto", devices=1, callbacks=[times, device], **kwargs)
    run.fit(Regression() if module is None else module, *loaders)
    return times


def test_a_batch_takes_time_by_its_samples_also_the_short_one_at_the_end():
    data = loader(5, rank=0, batch_size=2).dataset  # 10 samples
    times = fit(EmulatedDevice(step_s=0.2, batch_size=8, speed=1.0), DataLoader(data, batch_size=4))
    assert [len(times.lengths), times.lengths[-1] < 0.1 <= times.lengths[-2]] == [3, True]
    assert times.lengths[-1] >= 0.05


def test_every_batch_is_a_step_under_gradient_accumulation():
    device = EmulatedDevice(step_s=STEP_S, batch_size=4, speed=1.0)
    times = fit(device, loader(4, rank=0), accumulate_grad_batches=2)
    assert min(times.lengths) >= STEP_S
    assert device.pacer.steps == 3


def test_a_wait_for_other_ranks_inside_a_pass_comes_on_top_of_it_and_nobody_watches_after_the_run():
    def wait(*_):
        time.sleep(0.03)
        for observer in recording._observers:
            observer(CommRecord("receive", "wait", 0, 0, step=0, start_s=0.0, duration_s=0.03))

    module = Regression()
    module.net[-1].register_forward_pre_hook(wait)
    watching = list(recording._observers)
    times = fit(EmulatedDevice(step_s=0.12, batch_size=4, speed=1.0), loader(4, rank=0), module=module)
    assert min(times.lengths[1:]) >= 0.12 + 0.03
    assert recording._observers == watching


def test_validation_is_not_paced():
    device = EmulatedDevice(step_s=0.3, batch_size=4, speed=1.0)
    started = time.perf_counter()
    fit(device, loader(1, rank=0), loader(20, rank=0), limit_val_batches=20, num_sanity_val_steps=2)
    assert device.pacer is not None
    assert time.perf_counter() - started < 0.3 + 20 * 0.1  # one forward pass would take 0.1


def test_the_end_of_a_run_says_that_its_device_was_emulated_and_that_it_overran(caplog, capfd):
    class Slow(Regression):
        def training_step(self, batch, batch_idx):
            self.net[0].register_forward_hook(lambda *args: time.sleep(0.02))
            return super().training_step(batch, batch_idx)

    device = EmulatedDevice(step_s=0.01, batch_size=4, speed=0.5)
    assert device.summary().endswith("not run yet.")
    with caplog.at_level("WARNING"):
        fit(device, loader(3, rank=0), module=Slow())
    said = device.summary()
    for part in ("Emulated device", "4 samples take 0.02 s", "step_s=0.01", "speed=0.5", "2 steps overran"):
        assert part in said
    assert f"Rank 0: {said}" in caplog.text


def test_a_run_that_fails_leaves_no_hooks_behind():
    class Failing(Regression):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("as planned")
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(RuntimeError, match="as planned"):
        fit(EmulatedDevice(step_s=0.01, batch_size=4, speed=1.0), loader(2, rank=0), module=module)
    assert not module.net[0]._forward_hooks


def test_a_batch_without_samples_is_refused_with_what_to_return():
    class Untouched(Regression):
        def training_step(self, batch, batch_idx):
            return self.net(torch.ones(1, 5, dtype=torch.float64)).sum()

    with pytest.raises(MisconfigurationException, match=r"EmulatedDevice: .*got str .*return tensors"):
        fit(EmulatedDevice(0.01, 4), DataLoader(["text"], batch_size=None), module=Untouched())


def test_a_compiled_model_is_refused():
    with pytest.raises(ValueError, match=r"EmulatedDevice: .*must not be compiled.*Leave torch.compile out"):
        fit(EmulatedDevice(0.01, 4), loader(1, rank=0), module=torch.compile(Regression(), backend="eager"))


def test_bad_arguments_are_refused_before_training_in_the_name_of_the_callback():
    with pytest.raises(ValueError, match=r"EmulatedDevice: `step_s` .*got -1"):
        EmulatedDevice(step_s=-1, batch_size=4)
    with pytest.raises(ValueError, match=r"EmulatedDevice: `speed` .*got 0"):
        EmulatedDevice(step_s=1, batch_size=4, speed=[1, 0])
    assert DevicePacer.__name__ not in EmulatedDevice(1, 1).summary()
