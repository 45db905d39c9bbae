"""Fits under local updates on a device: the same as on the processor, with few waits, and with nothing sent beside."""

import os
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from support.mock_cuda import mock_cuda
from support.mock_cuda_record import mocks
from support.model_averages import Model
from support.processes import launch, start_ranks
from support.training import Regression, Stop, loader, local_update, trainer, weights
from torch import nn

from lightning_comm import Averaging, FixedPeriod, LocalUpdateStrategy
from lightning_comm.errors import RefusedSetUp
from lightning_comm.ondevice.model_tensors import ModelTensors
from lightning_comm.ondevice.share import Share
from lightning_comm.strategies.common import loss_scale, rank_status
from lightning_comm.strategies.common.rank_status import RankStatus
from lightning_comm.strategies.local_update.rounds import Rounds
from lightning_comm.transport import backends, recording
from lightning_comm.transport.model_average import ModelAverage
from lightning_comm.transport.recording import Recorder

STEPS, PERIOD = 9, 3


class Partly(Regression):
    """Parameters, buffers, a frozen layer; its loss is not read in a step."""

    def __init__(self, large=0.0):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 7), nn.Linear(7, 1)).double()
        net[3].requires_grad_(False)
        super().__init__(net, lambda parameters: torch.optim.Adam([p for p in parameters if p.requires_grad], 0.01))
        self.register_buffer("mask", torch.tensor([large, 1.0]))

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


class Reducing(Callback):
    """Logs as `sync_dist=True` does, after each step."""

    def on_train_batch_end(self, runner, module, *_):
        runner.strategy.reduce(torch.ones(2, device=module.device))


def fit(rank, averaging, on_device, module=None, callbacks=(), steps=STEPS, **kwargs):
    states = {} if averaging.overlap_steps else {"optimizer_state": "average"}
    strategy = LocalUpdateStrategy(
        FixedPeriod(PERIOD), averaging=averaging, timeout=timedelta(seconds=40), process_group_backend="gloo", **states
    )
    module = module or Partly()
    where = {"accelerator": "cpu", "devices": 2}
    if on_device:  # two processes with a card each, though it is the same: for Lightning they are two machines
        os.environ |= {"LOCAL_RANK": "0", "NODE_RANK": str(rank), "GROUP_RANK": str(rank), "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"TORCHELASTIC_RUN_ID": "mock", "RANK": str(rank), "WORLD_SIZE": "2"}
        where = {"accelerator": "gpu", "devices": 1, "num_nodes": 2}
    runner = Trainer(
        strategy=strategy, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, callbacks=list(callbacks),
        **where, **kwargs,
    )  # fmt: skip
    runner.fit(module, loader(steps, rank), loader(1, rank) if "val_check_interval" in kwargs else None)
    return strategy, weights(module.cpu())


# ---- waits -----------------------------------------------------------------------------------------------------------


def _on_processor(rank, averaging, large, callbacks):
    return fit(rank, averaging, False, Partly(large), callbacks)[1]


@contextmanager
def around(owner, name, wrapped):
    """Let calls of a method go through ``wrapped(method, *args, **kwargs)`` within the block."""
    plain = getattr(owner, name)

    def instead(*args, **kwargs):
        return wrapped(plain, *args, **kwargs)

    with mock.patch.object(owner, name, instead):
        yield


def _on_device(rank, averaging, large, callbacks):
    waits, looks = [], []

    def synchronise(plain, rounds, **kwargs):
        with device.counting() as found:
            plain(rounds, **kwargs)
        waits.append([wait.where for wait in found])

    def look(plain, *args, **kwargs):
        looks.append(1)
        return plain(*args, **kwargs)

    with (
        mock_cuda() as device,
        around(Rounds, "synchronise", synchronise),
        around(ModelTensors, "look", look),
    ):
        strategy, got = fit(rank, averaging, True, Partly(large), callbacks)
        dist.destroy_process_group()  # here, since a barrier would ask a driver
        in_threads = [wait for wait in device.waits if "background" in wait.thread]
    times = [(done.wait_s, done.transfer_s) for done in strategy.history]
    return got, waits, in_threads, device.hazards, times, strategy._run.steps.seconds, len(looks)


def on_both(averaging, large=0.0, callbacks=()):
    """Yield for each rank whether the weights are the same on both, and what happened on the device."""
    expected = launch(_on_processor, averaging, large, callbacks, world_size=2)
    for wanted, (got, *rest) in zip(
        expected, launch(_on_device, averaging, large, callbacks, world_size=2), strict=True
    ):
        yield all((one == other).all() for one, other in zip(wanted, got, strict=True)), *rest


@pytest.mark.parametrize(
    "averaging",
    [
        pytest.param(Averaging(1e-4), id="full", marks=pytest.mark.exhaustive),
        pytest.param(Averaging(1e-4, "topk"), id="topk"),
        pytest.param(Averaging(1e-4, "bf16", 2), id="bf16-overlap"),
    ],
)
def test_a_synchronisation_on_a_device_waits_twice_at_most_and_computes_the_same(averaging):
    callbacks = [EMAWeightAveraging(decay=0.9)]
    for same, waits, in_threads, hazards, times, step_time_s, looks in on_both(averaging, callbacks=callbacks):
        assert same
        assert len(waits) == looks == STEPS // PERIOD, "nothing is averaged where the first round opens"
        assert all(len(each) <= 2 for each in waits), waits
        assert not in_threads
        assert not hazards
        # on this device a thousandth of a second lies between any two events, so what is noted is of its own clock
        assert step_time_s == pytest.approx(0.001)
        assert all(wait_s == 0.001 for wait_s, _ in times), times
        # of an average in the background: its departure, a wait for it, and its landing
        assert [transfer_s for _, transfer_s in times][:-1] == pytest.approx(
            [0.003 if averaging.overlap_steps else 0.001] * 2
        )


def test_where_an_entry_is_infinite_the_host_looks_at_the_buckets_of_its_kind_alone():
    for same, waits, *_ in on_both(Averaging(1e-4), -float("inf")):
        assert same
        for each in waits:  # 16 numbers of 8 bytes are two buckets of 104 bytes; parameters and states have 30
            assert 2 < len(each) < 2 + 2 * 7, each


# ---- what ranks tell each other -----------------------------------------------------------------------------------


def _rows(rank):
    found = {"moved": torch.tensor(rank == 1), "parameters": False, "buffers": rank == 0, "weight_averages": False}
    row = RankStatus(next_steps=7, urgent=rank == 0, layout=2.0**48 - 1, samples=3.0 + rank)
    scale = torch.tensor(2.0**16 * (rank + 1))
    with mock.patch.object(dist, "get_backend_config", return_value="cpu:nccl"):
        model = ModelAverage(ModelTensors(nn.Linear(1, 1)), Recorder(recording.CommLedger()), Averaging())
        assert model._bucket_bytes == 25 * 2**20
        return rank_status.exchange(row, Recorder(recording.CommLedger()), torch.device("cpu"), lambda p: p.wait(),
                                loss_scale=scale, found=found)  # fmt: skip


def test_rows_bring_what_ranks_have_seen_and_everything_else_as_it_was(run_ranks):
    for first, second in run_ranks(_rows, world_size=2):
        assert (first.urgent, second.urgent) == (1, 0)
        assert (first.samples, second.samples) == (3.0, 4.0)
        assert (first.loss_scale, second.loss_scale) == (2.0**16, 2.0**17)
        assert first.next_steps == 7
        assert second.layout == 2.0**48 - 1
        assert rank_status.seen([first, second]) == {"moved", "buffers"}
        # a frozen parameter that has moved is averaged with the others, and nobody has looked at it
        assert rank_status.moderate([first, second]) == {"weight_averages", "optimizer_state"}
        assert rank_status.moderate([first]) == {"parameters", "weight_averages", "optimizer_state"}


# ---- loss scales --------------------------------------------------------------------------------------------------


class AtTheEndOfARound(Callback):
    """Resumes where a round is over and its average has not been taken, with another loss scale on each rank."""

    def on_train_batch_start(self, runner, module, batch, batch_idx):
        if batch_idx != 2:
            return
        clock = runner.strategy._run.clock
        clock.round_ends_at = clock.steps_done
        scaler = runner.precision_plugin.scaler
        assert scaler._scale is None, "not used before"
        scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0 ** (8 - runner.global_rank)})


class First(Callback):
    def __init__(self):
        self.scales = []

    def on_train_batch_start(self, runner, *_):
        self.scales.append(runner.precision_plugin.scaler.get_scale())


def _resume_in_fp16(rank, folder):
    def run(steps, callbacks, **kwargs):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
        net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1))
        strategy = local_update(FixedPeriod(PERIOD))
        runner = trainer(strategy, 2, max_steps=steps, max_epochs=-1, callbacks=callbacks, plugins=[plugin])
        runner.fit(Regression(net), loader(STEPS, rank, dtype=torch.float32), **kwargs)
        return strategy

    run(STEPS, [Stop(2, f"{folder}/mid.ckpt")])
    first = First()
    strategy = run(STEPS, [AtTheEndOfARound(), first], ckpt_path=f"{folder}/mid.ckpt")
    return first.scales[1], [done.step for done in strategy.history]


def test_a_scaler_that_has_not_been_used_takes_the_smallest_scale_of_all_ranks(tmp_path):
    for scale, ends in launch(_resume_in_fp16, str(tmp_path), world_size=2):
        assert scale == 2.0**7
        assert ends[0] == 2


def test_a_scale_is_changed_only_where_another_rank_has_a_smaller_one():
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=10)
    scaler.load_state_dict({**scaler.state_dict(), "_growth_tracker": 7})
    plugin = type("Plugin", (), {"scaler": scaler})()
    loss_scale.take_smallest_scale(plugin, [64.0, 64.0], 64.0)
    assert scaler._scale is None
    loss_scale.take_smallest_scale(plugin, [64.0, 16.0], 64.0)
    assert scaler.get_scale() == 16.0
    assert float(loss_scale.loss_scale_on(plugin, torch.device("cpu"))) == 16.0
    assert scaler.state_dict()["_growth_tracker"] == 7
    loss_scale.take_smallest_scale(plugin, [0.0, 16.0], 16.0)  # a rank without one
    assert scaler.get_scale() == 16.0


class LowersItsScale(Callback):
    """Has another loss scale on each rank, as if rank 0 had skipped steps."""

    def on_train_batch_end(self, runner, module, outputs, batch, batch_idx):
        scaler = runner.precision_plugin.scaler
        if batch_idx == 0:
            scaler.update(2.0 ** (8 + runner.global_rank))


def _fit_in_fp16(rank):
    scales, waits = [], []

    def synchronise(plain, rounds, **kwargs):
        before = scaler.get_scale()
        with device.counting() as found:
            plain(rounds, **kwargs)
        waits.append([wait.where for wait in found])
        scales.append((before, scaler.get_scale()))

    with mock_cuda() as device, around(Rounds, "synchronise", synchronise):
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
        plugin = MixedPrecision("16-mixed", "cuda", scaler)
        fit(rank, Averaging(1e-4), True, callbacks=[LowersItsScale()], steps=2 * PERIOD, plugins=[plugin])
        dist.destroy_process_group()
    return scales, waits


def test_ranks_with_unequal_scales_take_the_smallest_and_wait_no_longer_for_it():
    for rank, (scales, waits) in enumerate(launch(_fit_in_fp16, world_size=2)):
        assert scales[0] == (2.0 ** (8 + rank), 2.0**8)
        assert len(waits) == 2
        assert all(len(each) <= 2 for each in waits), waits


# ---- evaluations ----------------------------------------------------------------------------------------------------


def _evaluate(rank, background, device, large):
    """Enter an evaluation while an average is in flight; return what ranks knew of tensors, and what is averaged."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(5, 5) for _ in range(9)]).to(device)
    net.register_buffer("mean", torch.full((40,), float(rank), device=device))
    recorder, weight = Recorder(recording.CommLedger()), Share.of([7, 3], rank)
    averages = Model(net, Averaging(1e-4, overlap_steps=2), background=background)

    def meet():
        row = RankStatus(layout=averages.tensors.layout())
        overlapped = averages.overlapped
        found = averages.tensors.look(corrections=overlapped.corrections, sending=overlapped.is_sending)
        rows = rank_status.exchange(row, recorder, torch.device(device), recording.Pending.wait, found=found)
        return rank_status.moderate(rows)

    with torch.no_grad():
        net[3].bias[0] = large
        averages.average.begin_round(equal=True)
        net[2].weight.add_(rank + 1.0)
        averages.depart(weight, meet())
        net[4].weight.sub_(rank + 1.0)
    averages.overlapped.wait()
    before = len(mocks[-1].waits) if mocks else 0
    known = meet()
    averages.temporary.enter("evaluation", weight, known)
    waits = len(mocks[-1].waits) - before if mocks else 0
    return known, waits, [tensor.detach().cpu().tolist() for tensor in [*net.parameters(), *net.buffers()]]


def _evaluations(rank):
    background, answers = dist.new_group(), []
    for large in (0.0, 1.5 * 2.0**13):
        *_, expected = _evaluate(rank, background, "cpu", large)
        with mock_cuda() as device:
            known, waits, found = _evaluate(rank, background, "cuda", large)
            answers.append((known, waits, found == expected, device.hazards))
    return answers


def test_an_evaluation_while_an_average_is_in_flight_waits_twice_at_most_where_nothing_is_near_a_limit():
    for (known, waits, same, hazards), large in start_ranks(_evaluations, world_size=2):
        assert known == {"parameters", "buffers", "weight_averages", "optimizer_state"}
        assert waits <= 2
        assert same
        assert not hazards
        # weights below the limit, which what is in flight might take beyond it: each bucket is looked at
        assert large[0] == known - {"parameters"}
        assert large[1] > 2
        assert large[2:] == (True, [])


# ---- order of messages --------------------------------------------------------------------------------------------


def _beside(rank, on_device):
    beside, strategies = [], []

    class Note(Reducing):
        def on_train_batch_end(self, runner, module, *_):
            strategies[:] = [runner.strategy]

            def noting(reduce, *args, **kwargs):
                if threading.current_thread() is threading.main_thread():  # and not the average itself
                    beside.append(("reduce", runner.strategy._run.overlapped.is_sending))
                return reduce(*args, **kwargs)

            with around(dist, "all_reduce", noting):
                super().on_train_batch_end(runner, module)

    def issue(plain, recorder, kind, purpose, *args):
        run = strategies[0]._run if strategies else None
        if recorder._group is None and run is not None:
            beside.append((purpose, run.overlapped.is_sending))
        return plain(recorder, kind, purpose, *args)

    kwargs = {"val_check_interval": PERIOD + 1, "callbacks": [Note()], "steps": 2 * PERIOD}
    with mock_cuda() if on_device else nullcontext(), around(Recorder, "_issue", issue):
        strategy, _ = fit(rank, Averaging(1e-4, overlap_steps=2), on_device, **kwargs)
        if on_device:
            dist.destroy_process_group()
    return beside, len(strategy.history)


def test_on_a_device_nothing_is_sent_while_an_average_is_on_its_way_in_the_background():
    for beside, rounds in launch(_beside, True, world_size=2):
        assert rounds == 2
        assert {"reduce", "control", "evaluation"} <= {purpose for purpose, _ in beside}
        assert not {purpose for purpose, sending in beside if sending}


def test_on_a_processor_logging_does_not_wait_for_the_background():
    for beside, _ in launch(_beside, False, world_size=2):
        assert any(sending for purpose, sending in beside if purpose == "reduce")
        assert not any(sending for purpose, sending in beside if purpose == "control"), "meetings wait everywhere"


# ---- what no backend sends ----------------------------------------------------------------------------------------


def _served_by(rank, config, optimizer_state):
    os.environ["LOCAL_RANK"] = str(rank)
    runner = trainer(local_update(FixedPeriod(PERIOD), optimizer_state=optimizer_state), 2)
    with mock.patch.object(dist, "get_backend_config", return_value=config):
        try:
            runner.fit(Regression(), loader(STEPS, rank))
        except RefusedSetUp as error:
            return str(error), runner.global_step
    return "", runner.global_step


def test_tensors_that_no_backend_sends_are_refused_before_training_with_a_way_out():
    for text, steps in launch(_served_by, "cuda:nccl", "local", world_size=2):
        assert steps == 0
        assert text.startswith("LocalUpdateStrategy: `process_group_backend` is 'cuda:nccl'")
        assert "'net.0.weight' on cpu" in text
        assert "and 1 more" in text
        assert "process_group_backend='cpu:gloo,cuda:nccl'" in text
    for text, steps in launch(_served_by, "cpu:gloo,cuda:nccl", "average", world_size=2):
        assert (text, steps) == ("", STEPS)


def test_the_backend_of_a_device_is_read_from_the_group(monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda group=None: "cpu:gloo,cuda:nccl")
    assert backends.backend_of(torch.device("cuda", 0)) == "nccl"
    assert backends.backend_of(torch.device("cpu")) == "gloo"
    assert backends.backend_of(torch.device("meta")) is None
    averaging = Averaging()
    assert averaging.bucket_bytes_under("nccl") == 25 * 2**20
    assert averaging.bucket_bytes_under("gloo") == averaging.bucket_bytes_under("") == 4 * 2**20
    for backend in ("nccl", "gloo"):
        assert replace(averaging, bucket_mib=4.0).bucket_bytes_under(backend) == 4 * 2**20
    monkeypatch.setattr(dist, "get_backend_config", lambda group=None: "cuda:nccl")
    (problem,) = backends.unsent_problems([("a", torch.zeros(1)), ("b", torch.zeros(1, device="meta"))], "move it")
    assert "a on cpu, b on meta" in problem
